"""A checkpoint of a small untrained model that finds something everywhere."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from detector.config import build, compose
from detector.engine import checkpoint as checkpoints

SMALL = [
    "experiment=none",
    "model/backbone=resnet18",
    "model.backbone.depth=10",
    "+model.backbone.width=8",
    "model.backbone.norm=batch_norm",
    "model.backbone.frozen_stages=0",
    "model.neck.out_channels=16",
    "model.rpn.anchor_sizes=[[8],[16],[32],[64],[128]]",
    "model.rpn.post_nms_top_n=[60,60]",
    "model.box_head.trunk.fc_channels=[32]",
    "model.box_head.detections_per_image=20",
    "model.mask_head.trunk.conv_channels=[16]",
    "model.mask_head.upsample_channels=16",
    "augment=default",
    "augment.short_edge=128",
]


@pytest.fixture(scope="session")
def run_config(shapes_tiny):
    cfg = compose("train", [*[s for s in SMALL if not s.startswith("model/backbone")], f"data.root={shapes_tiny}"])
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), resolve=True)


@pytest.fixture(scope="session")
def state(run_config):
    """What a training run would save."""
    torch.manual_seed(0)
    names = ["ellipse", "triangle", "rectangle", "star", "ring"]
    model = build(run_config["model"], "model", num_classes=len(names))
    ids = {"category_ids": [1, 2, 4, 5, 8], "categories": names}
    return {"model": model.state_dict(), "ema": None, "config": run_config, "iteration": 1, **ids}


@pytest.fixture
def checkpoint(state, tmp_path):
    checkpoints.save(state, tmp_path / "run.pt")
    return tmp_path / "run.pt"
