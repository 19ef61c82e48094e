"""What a step takes, and `training.batch_size=auto`."""

from __future__ import annotations

import pytest
import torch
import yaml

from detector.config import build, compose
from detector.data import build_dataset
from detector.engine import memory
from detector.runtime import World
from tests.runs import curve
from tests.tiny import OVERRIDES


def test_what_a_batch_takes():
    step = memory.Step("cuda", 2, seconds=1.0, loading=0.2, fixed=1000, per_image=500, free=10_000)
    assert step.batch() == 8 and step._replace(free=2000).batch() == 1
    assert step.epoch(100, workers=2) == 50 and step.epoch(100, workers=0) == pytest.approx(70)
    assert step._replace(loading=2.0).epoch(100, workers=2) == 100


def test_a_step_is_measured(shapes_tiny):
    tiny = [*OVERRIDES, "runtime.device=cpu", "training.accumulate=2", "training.batch_size=4"]
    cfg = compose("train", [*tiny, f"data.root={shapes_tiny}"])
    step = memory.measure_step(cfg, build_dataset(cfg.data, "train", cfg.augment))
    assert step.images == 2 and step.seconds > 0 and step.loading > 0 and 0 < step.fixed < 50 and step.per_image >= 0
    assert step.free > 0


AUTO = ["training.batch_size=auto", "training.reference_batch=16", "schedule.max_iterations=3"]


@pytest.mark.slow
def test_the_largest_batch_that_fits(run, tmp_path, monkeypatch):
    """As the same number given by hand, learning rate and random state included; a resumed run keeps it."""
    step = memory.Step("cpu", 2, seconds=1.0, loading=0.1, fixed=100, per_image=100, free=1200)
    monkeypatch.setattr(memory, "measure_step", lambda *_, **__: step)
    auto = run(*AUTO, f"run_dir={tmp_path / 'auto'}")
    stored = yaml.safe_load((auto / "config.yaml").read_text())
    assert stored["training"]["batch_size"] == 8  # of (0.8 * 1200 - 100) / 100
    assert "training.batch_size = 8: 8 images at once; each takes 100 MB" in (auto / "train.log").read_text()
    hand = run(*AUTO, "training.batch_size=8", f"run_dir={tmp_path / 'hand'}")
    assert curve(auto) == curve(hand)
    assert curve(auto)[3]["lr"] == pytest.approx(0.01)  # 0.02 is for 16 images
    monkeypatch.setattr(memory, "measure_step", lambda *_, **__: pytest.fail("measured again"))
    run(*AUTO, "schedule.max_iterations=4", f"run_dir={tmp_path / 'auto'}")
    assert list(curve(auto)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("overrides", "free", "expected"),
    [
        ([], 100_000, 16),  # of 24 images
        (["training.accumulate=2"], 1200, 16),
        (["training.accumulate=3"], 150, 3),  # not even two at once
    ],
)
def test_batches_of_other_memory(config, monkeypatch, overrides, free, expected):
    step = memory.Step("cpu", 2, seconds=1.0, loading=0.1, fixed=100, per_image=100, free=free)
    monkeypatch.setattr(memory, "measure_step", lambda *_, **__: step)
    cfg = config("training.batch_size=auto", *overrides)
    memory.choose_batch(cfg, build(cfg.runtime, "runtime"))
    assert cfg.training.batch_size == expected


def test_a_gpu_takes_half_of_what_does_not_fit(config, monkeypatch):
    tried = []

    def measure(cfg, dataset, images=2):
        tried.append(images)
        if images > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return memory.Step("cuda", 2, seconds=1.0, loading=0.1, fixed=100, per_image=100, free=5000)

    monkeypatch.setattr(memory, "measure_step", measure)
    monkeypatch.setattr(memory, "start_ranks", lambda _: World(0, 1, torch.device("cuda")))
    cfg = config("training.batch_size=auto")
    memory.choose_batch(cfg, build(cfg.runtime, "runtime"))
    assert tried == [2, 16, 8, 4] and cfg.training.batch_size == 4
