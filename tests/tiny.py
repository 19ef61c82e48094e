"""A model small enough to train in a test, and batches to feed it."""

from __future__ import annotations

from functools import partial

import torch

from detector.backbone import FPN, ResNet, swin, timm
from detector.heads import BoxHead, ConvTrunk, FCTrunk, MaskHead
from detector.model import TwoStageDetector
from detector.roi import RoIAlign
from detector.rpn import RPN
from detector.structures import Batch, Targets

OVERRIDES = [  # make about the same of configs/model/mask_rcnn.yaml
    "experiment=none",
    "model.backbone.depth=10",
    "+model.backbone.width=8",
    "model.backbone.norm=batch_norm",
    "model.backbone.frozen_stages=0",
    "model.neck.out_channels=16",
    "model.rpn.anchor_sizes=[[8],[16],[32],[64],[128]]",
    "model.box_head.trunk.fc_channels=[32]",
    "model.mask_head.trunk.conv_channels=[16]",
    "model.mask_head.upsample_channels=16",
]


def tiny_model(roi=RoIAlign, mask=True, num_classes=3, box_head=None, rpn=None, seed=0, **settings):
    """About 0.1 M parameters: ResNet-10 of width 8, 16 channels, anchors for images of about 100 px."""
    torch.manual_seed(seed)
    mask_head = partial(MaskHead, roi=roi, trunk=partial(ConvTrunk, conv_channels=[16]), upsample_channels=16)
    return TwoStageDetector(
        num_classes,
        ResNet(10, width=8, norm="batch_norm", frozen_stages=0),
        partial(FPN, out_channels=16),
        partial(RPN, anchor_sizes=[[8], [16], [32], [64], [128]], **(rpn or {})),
        partial(
            BoxHead,
            **{
                "roi": roi,
                "trunk": partial(FCTrunk, fc_channels=[32]),
                "batch_size_per_image": 32,
                "canonical_size": 64,
                **(box_head or {}),
            },
        ),
        mask_head if mask else None,
        **settings,
    )


def small_swins(monkeypatch) -> None:
    """For this test Swin transformers have a third of Swin-T's channels and few blocks, whatever their names."""
    size, create = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}, timm.created
    for module in (swin, timm):
        monkeypatch.setattr(
            module, "created", lambda name, **rest: create(name, **rest, **size if "swin" in name else {})
        )


def random_batch(images: int = 2, objects: int = 3, size: tuple[int, int] = (96, 128), num_classes: int = 3, seed=0):
    """Noise with bright rectangles: (Batch, Targets). The last image has one object less than the others."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    pixels = torch.randint(0, 100, (images, 3, height, width), generator=generator, dtype=torch.uint8)
    top_left = torch.rand(images, objects, 2, generator=generator) * torch.tensor([width - 50.0, height - 50.0])
    sides = 16 + 30 * torch.rand(images, objects, 2, generator=generator)
    boxes = torch.cat([top_left, top_left + sides], dim=-1).round()
    labels = torch.randint(1, num_classes + 1, (images, objects), generator=generator)
    valid = torch.ones(images, objects, dtype=torch.bool)
    valid[-1, -1] = False
    for i, g in valid.nonzero().tolist():
        x1, y1, x2, y2 = boxes[i, g].int().tolist()
        pixels[i, labels[i, g] - 1, y1:y2, x1:x2] = 255
    sizes = torch.tensor([[height, width]] * images)
    batch = Batch(pixels, sizes, sizes, torch.arange(images), torch.arange(images) + 1000 * seed)
    masks = torch.ones(images, objects, 28, 28, dtype=torch.uint8)
    boxes, labels = boxes * valid[..., None], labels * valid
    return batch, Targets(boxes, labels, valid, torch.zeros_like(valid), masks, boxes.clone(), valid)


def all_rows(valid, *tensors):
    """structures.flatten_valid as it is on a GPU."""
    return valid.flatten().float(), *(t.flatten(0, 1) for t in tensors)
