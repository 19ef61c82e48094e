"""A change that only moves code leaves every loss and every weight as it was, to the bit.

Fifty steps of three small models, through the real training loop, against tests/recorded/training.json, which was
written by commit 96e4f90. Where torch and the processor are those of the recording, all has to be equal. Elsewhere sums
are rounded differently, which grows from step to step: there the first steps' losses are compared, to a tolerance.

A change that is meant to change the numbers records them anew, and its commit says why they changed:

    python -m tests.test_refactoring

On another machine, record at the commit before yours first: then the comparison is exact there, too.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from pathlib import Path

import hydra
import pytest
import torch

from detector.config import CONFIGS, check
from detector.engine.train import train
from tests.machine import machine
from tests.runs import curve, make_tiny_shapes

RECORDED = Path(__file__).parent / "recorded" / "training.json"
MODELS = {
    "quickstart": [],
    "deformable_small": [
        "roi=deformable_small",
        "model.box_head.roi.predictor_width=64",
        "model.mask_head.roi.predictor_width=64",
    ],
    "cascade": ["model=cascade_mask_rcnn", "heads=small"],
}
STEPS = 50
SMALLER = [
    *("experiment=quickstart", f"schedule.max_iterations={STEPS}", "training.batch_size=2", "evaluation.every=null"),
    *("model.backbone.width=8", "model.neck.out_channels=16", "model.box_head.trunk.conv_channels=[16]"),
    *("model.box_head.trunk.fc_channels=[64]", "model.box_head.batch_size_per_image=32"),
    # the recipe's own when this was recorded
    *("model.box_head.predictor_init=small", "optimizer=adamw", "optimizer.lr=3e-3"),
    *("model.mask_head.trunk.conv_channels=[16]", "model.mask_head.upsample_channels=16"),
    *("model.rpn.pre_nms_top_n=[200,50]", "model.rpn.post_nms_top_n=[60,20]", "runtime.checkpoint_every=50"),
    *("runtime.device=cpu", "runtime.precision=fp32", "runtime.threads=1", "runtime.workers=0", "runtime.log_every=1"),
    *("runtime.tensorboard=false", "runtime.pictures_every=null"),
]
# Elsewhere: with other vector instructions the losses of the first five steps differed by 5e-6 at most, relative to
# their size, and from the tenth step on the models went ways of their own.
FIRST, RELATIVE, ABSOLUTE = 5, 1e-4, 1e-6


def trained(name: str, data: Path, folder: Path) -> dict[str, dict]:
    """{"losses": {loss: [its value at every step]}, "weights": {part of the model: checksum after the last step}}"""
    overrides = [*SMALLER, *MODELS[name], f"data.root={data}", f"run_dir={folder}"]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", overrides)
    check(cfg)
    train(cfg)
    lines = curve(folder)
    losses = {key: [lines[i][key] for i in range(1, STEPS + 1)] for key in sorted(lines[1])}
    weights = torch.load(folder / "last.pt", weights_only=True)["model"]
    return {"losses": losses, "weights": checksums(weights)}


def checksums(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """sha256 over names and bytes of the tensors of each part of the model."""
    sums = {}
    for name in sorted(weights):
        digest = sums.setdefault(name.partition(".")[0], hashlib.sha256())
        digest.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return {part: digest.hexdigest()[:16] for part, digest in sums.items()}


@pytest.mark.parametrize("name", MODELS)
def test_trains_as_recorded(name, shapes_tiny, tmp_path):
    recorded = json.loads(RECORDED.read_text())
    losses, weights = trained(name, shapes_tiny, tmp_path / "run").values()
    expected = recorded["models"][name]
    assert losses.keys() == expected["losses"].keys()
    if machine() != recorded["machine"]:
        for key, values in losses.items():
            assert values[:FIRST] == pytest.approx(expected["losses"][key][:FIRST], rel=RELATIVE, abs=ABSOLUTE), key
        return
    differing = {
        step + 1: {key: (losses[key][step], expected["losses"][key][step]) for key in losses}
        for step in range(STEPS)
        if any(losses[key][step] != expected["losses"][key][step] for key in losses)
    }
    first = min(differing, default=None)
    assert not differing, f"from step {first} on, (now, recorded): {differing[first]}"
    assert weights == expected["weights"]


def record() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = make_tiny_shapes(Path(folder, "data"))
        models = {name: trained(name, data, Path(folder, name)) for name in MODELS}
    content = json.dumps({"machine": machine(), "steps": STEPS, "models": models}, indent=1)
    content = re.sub(r"\[[^]]*\]", lambda numbers: " ".join(numbers[0].split()), content)  # a loss is a line
    RECORDED.write_text(content + "\n")


if __name__ == "__main__":
    record()
