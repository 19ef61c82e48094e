"""The same model here, in torchvision and in mmdetection, and the same data in the form that each of them takes.

mmdetection is its living fork, onedl-mmdetection. Its operators have no wheel: they are compiled, in 20 minutes on one
core, as C++20, which PyTorch 2.15 needs. --no-deps, because its augmentations want an older OpenCV:

    pip install addict ninja rich "setuptools>=80" shapely termcolor terminaltables wheel yapf
    pip install --no-deps onedl-mmengine==0.10.12 onedl-mmdetection==3.5.1
    pip download --no-deps --no-build-isolation --no-binary onedl-mmcv onedl-mmcv==2.3.6
    tar xzf onedl_mmcv-2.3.6.tar.gz && sed -i s/c++17/c++20/ onedl_mmcv-2.3.6/setup.py
    pip install --no-deps --no-build-isolation ./onedl_mmcv-2.3.6
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import hydra
import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from detector.structures import Batch, Targets, to_device
from detector.weights import load_foreign, load_into, model_config
from detector.weights.keymaps import rename
from detector.weights.loading import TABLES
from detector.weights.presets import presets_of

# Standard deviations at which random weights give images full of detections with scores from 0 to 1.
CONFIDENT = {"rpn.head.cls_logits.weight": 0.1, "cls_score.weight": 0.5, "bbox_pred.weight": 0.02}
MMDETECTION = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"


def mask_rcnn_pair(
    device: str, size: tuple[int, int], num_classes: int = 80, confident: bool = False, settings: str = "torchvision"
) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's) Mask R-CNN R50-FPN with equal random weights; stem and stage 2 frozen in both.

    torchvision resizes by itself: it is told to leave images of `size` (height, width) as they are. `confident` weights
    find objects everywhere, where those of training's start find none. `settings`: whose ours has, or "mmdet"'s.
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
    state = load_foreign(theirs.state_dict(), "torchvision").state_dict
    config = model_config(state, presets_of(settings, state, style="pytorch"))
    # an imported model computes as its source does, to the bit; here ours computes as it does by default
    config["channels_last"], config["backbone"]["norm"] = True, "frozen_batch_norm"
    config["box_head"]["roi"]["exact"] = config["mask_head"]["roi"]["exact"] = False
    if settings == "mmdet":  # its losses of boxes are L1
        config["rpn"]["beta"] = config["box_head"]["beta"] = 0.0
    ours = hydra.utils.instantiate(config, _convert_="all")
    load_into(ours, state)
    if settings == "torchvision":  # how it makes mask targets
        ours.mask_head.target_aligned, ours.mask_head.target_threshold = False, None
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


def require_mmdetection() -> None:
    """End the program, saying how to install mmdetection, where it cannot be imported with its operators."""
    try:
        for module in ("mmcv.ops", "mmdet.models", "mmengine.hub"):
            import_module(module)
    except ImportError as error:
        how = "onedl-mmdetection, with onedl-mmcv built from source: benchmarks/peers.py begins with the commands"
        raise SystemExit(f"mmdetection cannot be imported ({error}): pip install {how}") from None


class MMDetection(nn.Module):
    """mmdetection's Mask R-CNN R50-FPN by its own config, with our model's weights, called as the others are.

    Frozen as its config has it: stem and stage 2, and the statistics of all batch norms, whose scales and shifts learn
    from stage 3 on. Its RoI Align adapts the samples to the RoI, and 1000 proposals an image go on to training.
    """

    def __init__(self, ours: nn.Module):
        super().__init__()
        from mmdet.registry import MODELS
        from mmengine.hub import get_config
        from mmengine.registry import DefaultScope

        with DefaultScope.overwrite_default_scope("mmdet"):
            self.detector = MODELS.build(get_config(MMDETECTION).model)
        own = self.detector.state_dict()
        self.detector.load_state_dict(own | mmdetection_state(ours.state_dict(), own))

    def forward(self, data: dict[str, list]) -> Any:
        """Losses by name in training mode; else detections in torchvision's form, but with bool masks [D, 1, H, W]."""
        inputs = self.detector.data_preprocessor(data, self.training)
        if not self.training:
            found = [sample.pred_instances for sample in self.detector(**inputs, mode="predict")]
            return [
                {"boxes": one.bboxes, "scores": one.scores, "labels": one.labels + 1, "masks": one.masks[:, None]}
                for one in found
            ]
        _, values = self.detector.parse_losses(self.detector(**inputs, mode="loss"))
        return {name: value for name, value in values.items() if name.startswith("loss_")}  # not the sum, nor accuracy


def mmdetection_state(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by the keys and in the shapes of mmdetection's, but for counters of batches, which ours lack."""
    state = {}
    for key, own in theirs.items():
        if not key.endswith("num_batches_tracked"):
            name = str(rename(key, TABLES["mmdet"]))
            value = ours[name].reshape(own.shape)
            state[key] = value.roll(-1, 0) if ".class_logits." in name else value  # the background is the last there
    return state


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


def mmdetection_data(data: Data) -> dict[str, list]:
    """What mmdetection's data preprocessor takes: images, uint8 BGR [3, H, W], and data samples with the objects."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    found: dict[str, list] = {"inputs": [], "data_samples": []}
    for image, size, objects in zip(data.batch.images, data.batch.image_sizes.tolist(), data.their_targets):
        height, width = size
        sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
        masks = BitmapMasks(objects["masks"].cpu().numpy(), height, width)
        sample.gt_instances = InstanceData(bboxes=objects["boxes"], labels=objects["labels"] - 1, masks=masks)
        found["inputs"].append(image[:, :height, :width].flip(0))
        found["data_samples"].append(sample)
    return found
