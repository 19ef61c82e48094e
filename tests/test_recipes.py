"""Every recipe of configs/experiment, and the options that it is made of: what its card says, its size, and in small a
training step and an inference.

tests/test_config.py checks the keys and values of all of them, tests/test_variants.py models, backbones and necks, and
their operations against torchvision's.
"""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

from detector.commands.train import train as train_command
from detector.config import CONFIGS, build, check
from detector.data import Pipeline
from detector.data.loader import build_transforms
from detector.engine.optimizer import build_optimizer
from tests.test_variants import random_input, small

NOT_FOR_COCO = (
    *("none", "small", "coco", "finetune", "finetune_small", "realtime"),
    *("quickstart", "mask_rcnn_nuclei", "faster_rcnn_bccd", "keypoint_figures"),
    *(file.stem for file in (CONFIGS / "experiment").glob("ablation_*.yaml")),
)
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
RUNNABLE = [name for name in EXPERIMENTS if name != "small"]  # whose length is left to those that build on it
PUBLISHED = [name for name in EXPERIMENTS if name not in NOT_FOR_COCO]
BACKBONE, PREDICTOR = 256 * 7 * 7 * 1024 + 1024, 1024 * 1024 + 1024
PARAMETERS = {  # of detectron2, mmdetection and torchvision (less the boxes and masks of the background)
    "rpn_r50_fpn_1x": 27_393_231,
    "faster_rcnn_r50_fpn_1x": 41_699_936,
    "faster_rcnn_r50_fpn_3x": 41_699_936,
    # on each of four levels three fully connected layers for the offsets, two for the modulation
    "faster_rcnn_r50_fpn_dpool_1x": 41_699_936 + 4 * (BACKBONE + PREDICTOR + 1025 * 98),
    "faster_rcnn_r50_fpn_mdpool_1x": 41_699_936 + 4 * (2 * BACKBONE + PREDICTOR + 1025 * (98 + 49)),
    "mask_rcnn_r50_fpn_1x": 44_343_216,
    "mask_rcnn_r50_fpn_2x": 44_343_216,
    "mask_rcnn_r50_fpn_3x": 44_343_216,
    "mask_rcnn_r50_fpn_dconv_c3-c5_1x": 44_924_058,
    "mask_rcnn_r50_c4_1x": 35_909_612,
    "mask_rcnn_r50_dc5_1x": 172_353_516,
    "mask_rcnn_r50_fpn_copy_paste": 46_301_232,
    "cascade_mask_rcnn_r50_fpn_1x": 71_984_926,
    "keypoint_rcnn_r50_fpn_1x": 59_133_158 + 79 * 5 * 1025,  # 80 classes instead of the person
    "torchvision_faster_rcnn_v1": 41_699_936,
    "torchvision_faster_rcnn_v2": 43_656_928,
    "torchvision_mask_rcnn_v1": 44_343_216,
    "torchvision_mask_rcnn_v2": 46_301_232,
}


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """The checked config, never to be changed."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", list(overrides))
    check(cfg, train_command)
    return cfg


def recipe(name: str) -> DictConfig:
    return composed(f"experiment={name}")


def model_of(cfg: DictConfig, num_classes: int = 80, **settings) -> nn.Module:
    """The model at full size without weights or memory."""
    node = OmegaConf.to_container(cfg.model, resolve=True)
    with torch.device("meta"):
        return build(node | settings, "model", num_classes=num_classes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_card_says_what_the_recipe_does(name):
    cfg = recipe(name)
    card = re.sub(r"\n# ", " ", (CONFIGS / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0])
    if "As torchvision_faster_rcnn_v2: " in card:
        assert cfg.schedule == recipe("torchvision_faster_rcnn_v2").schedule
    lr = cfg.optimizer.lr * cfg.training.batch_size / cfg.training.reference_batch
    assert int(re.search(r"[Bb]atch (\d+)", card)[1]) == cfg.training.batch_size
    assert float(re.search(r"lr ([\d.]+\d)", card)[1]) == pytest.approx(lr)
    if cfg.schedule.max_iterations:
        assert int(re.search(r"([\d,]+) iterations", card)[1].replace(",", "")) == cfg.schedule.max_iterations
    else:
        assert int(re.search(r"(\d+) epochs", card)[1]) == cfg.schedule.max_epochs
    assert "Expected: " in card or name == "mask_rcnn_r50_fpn_2x"
    assert re.search("Not run on (COCO|VOC) here", card)
    assert cfg.name == name
    assert cfg.data.masks == ("mask" in name)
    assert cfg.data.keypoints == ("keypoint" in name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_as_many_parameters_as_published(name):
    assert sum(p.numel() for p in model_of(recipe(name)).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_training_step_and_an_inference(name):
    cfg = recipe(name)
    parts = {key: build(cfg[key], key) for key in ("training", "evaluation", "schedule", "runtime", "weights")}
    per_epoch = 117_266 // cfg.training.batch_size
    factor = parts["schedule"].factor(per_epoch)
    assert 0 < factor(0) < 1 and factor(parts["schedule"].total(per_epoch) - 1) < 0.02

    torch.manual_seed(0)
    node = small(OmegaConf.create(OmegaConf.to_container(cfg.model, resolve=True)))
    if node.get("box_head"):
        node.box_head.score_threshold = 0.0
    model = build(node, "model", num_classes=3)
    with torch.no_grad():
        for key, value in model.backbone.state_dict().items():
            if key.endswith("bn3.weight"):
                value.fill_(0.1)  # or untrained residual blocks add up to infinity
    optimizer = build_optimizer(build(cfg.optimizer, "optimizer"), model, parts["training"])
    batch, targets = random_input()
    losses = model.train()(batch, targets)
    sum(losses.values()).backward()
    for group in optimizer.param_groups:
        group["lr"] *= factor(0)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    optimizer.step()
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.isfinite().all() for p in after)
    assert sum(not torch.equal(a, b) for a, b in zip(before, after)) > len(after) / 2
    assert ("loss_mask" in losses) == cfg.data.masks or name in ("none", "coco")
    with torch.no_grad():
        found = model.eval()(batch)
    assert found.valid.any(dim=1).all() and found.boxes.isfinite().all()


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("name", options("roi"))
def test_every_roi_method_fits_both_heads(name):
    cfg = composed("experiment=quickstart", f"roi={name}")
    model = model_of(cfg, num_classes=3)
    for head in (model.box_head, model.mask_head):
        assert type(head.extractor.op).__name__ == cfg.roi._target_.split(".")[-1]


@pytest.mark.parametrize("name", options("augment"))
def test_every_augmentation_runs(name):
    augment = composed("experiment=none", f"augment={name}").augment
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    for split in ("train", "val"):
        pipeline = Pipeline(build_transforms(augment, split))
        first, second = (pipeline(image, np.array([[10.0, 20, 90, 80]]), seed=3) for _ in range(2))
        assert np.array_equal(first.image, second.image) and np.array_equal(first.boxes, second.boxes)
        assert first.image.dtype == np.uint8
        if split == "val":
            assert len(first.boxes) == 1


@pytest.mark.parametrize("name", options("optimizer"))
def test_every_optimizer_takes_a_step(name):
    cfg = composed("experiment=none", f"optimizer={name}")
    model = nn.ModuleDict({"backbone": nn.Linear(3, 2)})
    optimizer = build_optimizer(build(cfg.optimizer, "optimizer"), model, build(cfg.training, "training"))
    weight = model["backbone"].weight
    before = weight.detach().clone()
    weight.sum().backward()
    optimizer.step()
    assert (weight < before).all()


@pytest.mark.parametrize("name", options("schedule"))
def test_every_schedule_ends_lower_than_it_was(name):
    schedule = build(composed("experiment=none", f"schedule={name}").schedule, "schedule")
    factor, total = schedule.factor(1000), schedule.total(1000)
    values = [factor(int(share * (total - 1))) for share in np.linspace(0, 1, 50)]
    assert max(values) <= 1 and values[0] < 0.1 and values[-1] < 0.011 < max(values)


def test_the_schedules_of_coco():
    steps = {"1x": (60_000, 80_000, 90_000), "2x": (120_000, 160_000, 180_000), "3x": (210_000, 250_000, 270_000)}
    for name, (first, second, end) in steps.items():
        schedule = build(composed("experiment=none", f"schedule={name}").schedule, "schedule")
        factor = schedule.factor(7330)
        assert schedule.total(7330) == end
        assert [factor(t) for t in (0, 500)] == pytest.approx([0.001, 0.5005])
        assert [factor(t) for t in (1000, first - 1, first, second - 1)] == pytest.approx([1, 1, 0.1, 0.1])
        assert factor(second) == factor(end - 1) == pytest.approx(0.01)
