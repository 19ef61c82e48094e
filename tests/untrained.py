"""A checkpoint of a small untrained model that finds something everywhere."""

from __future__ import annotations

import pytest
import torch

from detector import checkpoint as checkpoints
from detector.config import arguments, build
from tests.tiny import OVERRIDES

SMALL = [
    *OVERRIDES,
    "model.rpn.post_nms_top_n=[60,60]",
    "model.box_head.detections_per_image=20",
    "augment=default",
    "augment.short_edge=128",
]


def configured(*overrides: str) -> dict:
    """The configuration of a run, as its checkpoint keeps it."""
    return arguments("train", overrides)


def untrained(config: dict) -> dict:
    """What a training run of `config` would save."""
    torch.manual_seed(0)
    names = ["ellipse", "triangle", "rectangle", "star", "ring"]
    model = build(config["model"], "model", num_classes=len(names))
    ids = {"category_ids": [1, 2, 4, 5, 8], "categories": names}
    return {"model": model.state_dict(), "ema": None, "config": config, "iteration": 1, **ids}


@pytest.fixture(scope="session")
def run_config(shapes_tiny):
    return configured(*SMALL, f"data.root={shapes_tiny}")


@pytest.fixture(scope="session")
def state(run_config):
    return untrained(run_config)


@pytest.fixture
def checkpoint(state, tmp_path):
    checkpoints.save(state, tmp_path / "run.pt")
    return tmp_path / "run.pt"
