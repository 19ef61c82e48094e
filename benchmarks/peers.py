"""The same model in this project and in torchvision, and the same data in the form that each of them takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import hydra
import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from detector.structures import Batch, Targets, to_device
from detector.weights import load_foreign, load_into, model_config

# Standard deviations at which random weights give images full of detections with scores from 0 to 1.
CONFIDENT = {"rpn.head.cls_logits.weight": 0.1, "cls_score.weight": 0.5, "bbox_pred.weight": 0.02}


def mask_rcnn_pair(
    device: str, size: tuple[int, int], num_classes: int = 80, confident: bool = False
) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's) Mask R-CNN R50-FPN with equal random weights; stem and stage 2 frozen in both.

    torchvision resizes by itself: it is told to leave images of `size` (height, width) as they are. `confident` weights
    find objects everywhere, where those of training's start find none.
    """
    torch.manual_seed(0)
    theirs = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes + 1,
        min_size=min(size),
        max_size=max(size),
    )
    replace_batch_norm(theirs)
    for name, parameter in theirs.backbone.body.named_parameters():
        parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
    if confident:
        with torch.no_grad():
            for name, weight in theirs.named_parameters():
                for end, std in CONFIDENT.items():
                    if name.endswith(end):
                        weight.normal_(std=std)
    foreign = load_foreign(theirs.state_dict(), "torchvision")
    config = model_config(*foreign)
    # an imported model computes as its source does, to the bit; here ours computes as it does by default
    config["channels_last"], config["backbone"]["norm"] = True, "frozen_batch_norm"
    config["box_head"]["roi"]["exact"] = config["mask_head"]["roi"]["exact"] = False
    ours = hydra.utils.instantiate(config, _convert_="all")
    load_into(ours, foreign.state_dict)
    ours.mask_head.target_aligned, ours.mask_head.target_threshold = False, None  # how torchvision makes mask targets
    return ours.to(device), theirs.to(device)


def replace_batch_norm(module: nn.Module) -> None:
    """Freeze every batch norm, as torchvision does when it starts from classification weights.

    The statistics are such that activations of random weights neither grow nor vanish through the blocks.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features)
            if name == "bn3":
                frozen.weight.fill_(0.2)
            setattr(module, name, frozen)
        else:
            replace_batch_norm(child)


class Data(NamedTuple):
    batch: Batch
    targets: Targets
    images: list[Tensor]  # torchvision's: float [3, H, W] in 0..1
    their_targets: list[dict[str, Any]]


def synthetic_batch(images: int, size: tuple[int, int], objects: int, device: str, seed: int = 0) -> Data:
    """Smooth random images with elliptic objects of 16 px to half the image."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    low = torch.rand(images, 3, height // 16 + 1, width // 16 + 1, generator=generator)
    pixels = nn.functional.interpolate(low, size=(height, width), mode="bilinear")
    pixels = (pixels * 255).to(torch.uint8)
    sides = torch.exp(torch.empty(images, objects, 2).uniform_(2.8, 5.5, generator=generator))
    sides = sides.minimum(torch.tensor([width / 2, height / 2])).round()
    corner = (torch.rand(images, objects, 2, generator=generator) * (torch.tensor([width, height]) - sides)).floor()
    boxes = torch.cat([corner, corner + sides], dim=-1)
    labels = torch.randint(1, 81, (images, objects), generator=generator)

    y = torch.arange(height).view(1, 1, -1, 1) + 0.5
    x = torch.arange(width).view(1, 1, 1, -1) + 0.5
    centre, half = (corner + sides / 2)[..., None, None], (sides / 2)[..., None, None]
    full = ((x - centre[:, :, 0]) / half[:, :, 0]) ** 2 + ((y - centre[:, :, 1]) / half[:, :, 1]) ** 2 <= 1
    grid = (torch.arange(112) + 0.5) / 56 - 1
    disc = (grid[:, None] ** 2 + grid**2 <= 1).to(torch.uint8)

    valid = torch.ones(images, objects, dtype=torch.bool)
    targets = Targets(
        boxes, labels, valid, ~valid, disc.expand(images, objects, -1, -1).contiguous(), boxes.clone(), valid
    )
    # torchvision pads to multiples of 32 by itself.
    padded = [-(-side // 32) * 32 for side in size]
    canvas = torch.zeros(images, 3, *padded, dtype=torch.uint8)
    canvas[:, :, :height, :width] = pixels
    sizes = torch.tensor([size] * images)
    batch = Batch(canvas, sizes, sizes, torch.arange(images), torch.arange(images))
    theirs = [
        {"boxes": boxes[i].to(device), "labels": labels[i].to(device), "masks": full[i].to(torch.uint8).to(device)}
        for i in range(images)
    ]
    floats = [(pixels[i].float() / 255).to(device) for i in range(images)]
    return Data(to_device(batch, device), to_device(targets, device), floats, theirs)
