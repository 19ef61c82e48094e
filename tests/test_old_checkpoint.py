"""Checkpoints and configs written before modules moved: they load, predict and continue as they did.

tests/recorded/96e4f90.pt was written by that commit: a tiny Mask R-CNN with deformable RoI pooling after 300 steps on
the tiny shapes. 96e4f90.json beside it has what the same commit made of it: detections in `picture`, losses of the next
steps, written anew when mask targets became those of pycocotools' masks (at the first step loss_mask alone differed).
targets_96e4f90.json has all names that a `_target_` could have had: those in configs/, and of every public class and
factory that a config can build from.
"""

from __future__ import annotations

import hashlib
import json
import pkgutil
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch

from detector import load
from detector.checkpoint import new_name
from detector.config import CONFIGS, check
from detector.engine.train import train
from tests.machine import machine
from tests.runs import curve

RECORDED = Path(__file__).parent / "recorded"
CHECKPOINT = RECORDED / "96e4f90.pt"
STEPS = 300
OLD = [
    *("experiment=quickstart", "roi=deformable_small", "optimizer=sgd", "optimizer.lr=0.1"),
    *("model.backbone.width=8", "model.backbone.stages=[2,3]", "model.neck.out_channels=4"),
    *(
        "model.rpn.anchor_sizes=[[12],[24],[48]]",
        "model.rpn.pre_nms_top_n=[200,50]",
        "model.rpn.post_nms_top_n=[60,20]",
    ),
    *("model.box_head.trunk.conv_channels=[4]", "model.box_head.trunk.fc_channels=[8]"),
    *("model.box_head.roi.predictor_width=8", "model.box_head.detections_per_image=20"),
    *(
        "model.mask_head.output_size=7",
        "model.mask_head.trunk.conv_channels=[4]",
        "model.mask_head.upsample_channels=4",
    ),
    *("model.mask_head.roi.predictor_width=8", "training.batch_size=4", "evaluation.every=null"),
    *("runtime.device=cpu", "runtime.precision=fp32", "runtime.threads=1", "runtime.workers=0", "runtime.log_every=1"),
    *("runtime.tensorboard=false", "runtime.pictures_every=null", "runtime.checkpoint_every=300"),
]


def picture() -> np.ndarray:
    """[96, 96, 3]: a rectangle, an ellipse and a triangle on a shaded ground."""
    y, x = np.mgrid[:96, :96]
    image = np.stack([60 + x // 4, 70 + y // 4, 90 + (x + y) // 8], axis=2)
    image[(abs(x - 24) < 16) & (abs(y - 26) < 12)] = (200, 60, 50)
    image[((x - 68) / 20) ** 2 + ((y - 32) / 14) ** 2 < 1] = (40, 190, 80)
    image[(y > 56) & (y < 90) & (abs(x - 48) < (y - 54) * 0.7)] = (230, 220, 90)
    return image.astype(np.uint8)


def detections(checkpoint: Path | dict) -> dict[str, list]:
    """What the model finds in `picture`, of which it is as little sure as its size lets it be."""
    torch.set_num_threads(1)
    found = load(checkpoint, changes={"box_head": {"score_threshold": 0.005}}).predict(picture(), threshold=0)
    masks = [hashlib.sha256(mask.numpy().tobytes()).hexdigest()[:16] for mask in found.masks]
    return {name: getattr(found, name).tolist() for name in ("boxes", "scores", "labels")} | {"masks": masks}


def continued(steps: int, data: Path, folder: Path, *overrides: str) -> dict[int, dict[str, float]]:
    """iteration -> losses of a run of OLD up to `steps`."""
    overrides = (*OLD, f"schedule.max_iterations={steps}", f"data.root={data}", f"run_dir={folder}", *overrides)
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", list(overrides))
    check(cfg)
    train(cfg)
    return curve(folder)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((RECORDED / "96e4f90.json").read_text())


def assert_same_detections(found: dict[str, list], recorded: dict) -> None:
    expected = recorded["detections"]
    if machine() == recorded["machine"]:
        assert found == expected
    else:  # the boxes far down are about as good as those that fell out
        assert found["scores"] == pytest.approx(expected["scores"], rel=1e-2)
        assert found["boxes"][0] == pytest.approx(expected["boxes"][0], abs=0.1)
        assert found["labels"][0] == expected["labels"][0]


def test_predicts_the_same(recorded):
    assert_same_detections(detections(CHECKPOINT), recorded)


def test_predicts_the_same_whatever_name_the_config_had_for_a_class(recorded, tmp_path):
    """A config may name a class by the package that offers it, as ours do, or by the module that defined it."""
    targets = json.loads((RECORDED / "targets_96e4f90.json").read_text())
    defined = {name.rpartition(".")[2]: name for name in targets["defined"]}
    renamed = set()

    def by_module(node):
        if isinstance(node, dict):
            target = node.get("_target_", "")
            if target.startswith("detector."):
                node = node | {"_target_": defined[target.rpartition(".")[2]]}
                renamed.add(node["_target_"])
            return {key: by_module(value) for key, value in node.items()}
        return [by_module(item) for item in node] if isinstance(node, list) else node

    state = torch.load(CHECKPOINT, weights_only=True)
    torch.save(state | {"config": by_module(state["config"])}, tmp_path / "renamed.pt")
    assert_same_detections(detections(tmp_path / "renamed.pt"), recorded)
    assert {"detector.backbone.fpn.FPN", "detector.rpn.rpn.RPN", "detector.engine.settings.Training"} <= renamed


def test_training_goes_on_the_same(recorded, shapes_tiny, tmp_path):
    losses = continued(STEPS + 2, shapes_tiny, tmp_path / "run", f"resume={CHECKPOINT}")
    exact = machine() == recorded["machine"]
    assert set(losses) == {STEPS + 1, STEPS + 2}
    for step, values in losses.items():
        expected = recorded["losses"][str(step)]
        assert values == (expected if exact else pytest.approx(expected, rel=1e-3, abs=1e-5)), step


def test_every_old_target_is_still_there():
    targets = json.loads((RECORDED / "targets_96e4f90.json").read_text())
    lost = {}
    for name in sorted({name for names in targets.values() for name in names}):
        try:
            found = pkgutil.resolve_name(new_name(name))
        except (ImportError, AttributeError) as error:
            lost[name] = str(error)
        else:
            assert found.__name__ == name.rpartition(".")[2], name
    assert not lost
