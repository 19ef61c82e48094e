"""benchmarks/claims.py: which runs there are and what is made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from benchmarks import claims
from benchmarks.claims import CLAIMS, Judge, Kinds, Run, compared, grid_points, limits, listing, markdown, rounding
from detector.comparison.statistics import Bands
from detector.config import RunError, check
from detector.roi import DeformableRoIPool
from tests.tiny import random_batch, tiny_model


def test_what_is_finished_is_not_made_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(claims, "make_shapes", lambda out, **_: made.append(out.name))
    monkeypatch.setattr(
        claims, "configuration", lambda overrides: next(o for o in overrides if o.startswith("run_dir="))
    )

    def train(text: str) -> None:
        made.append(text.rpartition("/")[2])
        if "points_4" in text:
            raise RunError("in use by process 1")
        if not busy:
            folder = Path(text.removeprefix("run_dir="))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.json").touch()

    busy = True
    monkeypatch.setattr(claims, "train", train)
    for name, file in (("shapes-boxes-align-0", "metrics.json"), ("shapes-boxes-points_1-0", "last.pt")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / file).touch()
    assert [row.split()[1:] for row in listing(tmp_path, [9], [0]).splitlines()[2:5]] == [
        ["shapes-boxes-align-0", "finished"],
        ["shapes-boxes-points_1-0", "begun"],
        ["shapes-boxes-points_4-0", "missing"],
    ]
    claims.train_missing(tmp_path, [9, 12], [0], tmp_path / "quickstart.pt")
    assert made == ["shapes", "shapes-start"]  # which another process trains: what would begin with it waits
    made.clear()
    busy = False
    claims.train_missing(tmp_path, [9, 12], [0], tmp_path / "quickstart.pt")
    ways = [way for claim in (9, 12) for way in CLAIMS[claim]["shapes"] if way != "align"]
    assert made == ["shapes", "shapes-start", *(f"shapes-boxes-{way}-0" for way in ways)]


def test_ways_are_configurations(tmp_path):
    """What a way changes arrives where the model is built from it."""
    for way, key, value in (
        ("points_4", "model.box_head.roi.sampling_ratio", 4),
        ("levels_coarser", "model.box_head.canonical_size", 28),
        ("l2_0.01", "model.offset_loss_weight", 0.01),
        ("lr_x10", "training.lr_multipliers.offset_predictor", 10),
    ):
        cfg = claims.configuration(Run("shapes", way).overrides(tmp_path, tmp_path / "a.pt"))
        check(cfg)
        assert OmegaConf.select(cfg, key) == value


def test_rounding_moves_borders_by_up_to_a_cell_each():
    """A corner by half a cell or a whole one; a bin's border by what both roundings can do."""
    caffe, floor = rounding("caffe"), rounding("floor")
    assert caffe["corner_most"] == 8 and floor["corner_most"] == 16
    assert 16 < caffe["both_most"] < 48 and 16 < floor["both_most"] <= 32
    assert rounding("caffe", stride=4)["corner_most"] == 2


def test_points_on_the_object():
    op = DeformableRoIPool(2, channels=4, sampling_ratio=2, gamma=0.5, predictor_width=1)
    box, mask = torch.tensor([0.0, 0.0, 8.0, 8.0]), np.zeros((20, 20), bool)
    mask[:8, :4] = True  # the left half of the box
    still = grid_points(box, op, torch.zeros(2, 2, 2))
    assert still.tolist() == [[x, y] for y in (1, 3, 5, 7) for x in (1, 3, 5, 7)]
    assert claims.on_object(still, mask)[0] == 0.5
    left = torch.stack([-torch.ones(2, 2), torch.zeros(2, 2)])  # half of the box's width
    assert claims.on_object(grid_points(box, op, left), mask) == (1.0, 7 / 16)  # the picture's edge is no outline


def test_differences_are_of_the_seeds_that_both_have(shapes_tiny, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shapes").symlink_to(shapes_tiny)
    judge = Judge(tmp_path, "shapes", samples=20)
    objects = [entry for entry in judge.content["annotations"] if not entry["iscrowd"]]
    perfect = [{k: entry[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for entry in objects]
    ways = {"poor": {0: [], 1: perfect[: len(perfect) // 3]}, "good": {1: perfect, 2: perfect}, "none": {}}
    kinds = Kinds(("small", "medium", "large"), Bands(limits(16**2, 36**2)))
    rows = compared(ways, judge, "bbox", kinds, {"good": "poor", "none": "poor"})
    assert [(row["way"], row["seeds"]) for row in rows] == [("poor", [0, 1]), ("good", [1, 2])]
    delta, low, high = rows[1]["difference"]["AP"]
    assert rows[1]["mean"]["AP"] == 100 and low < delta < high
    assert delta == pytest.approx(100 - 2 * rows[0]["mean"]["AP"], abs=0.02)  # that of seed 0 is 0
    assert f"**{delta:+.1f} [{low:+.1f}, {high:+.1f}]**" in markdown(rows)


def test_the_mask_head_reads_beside():
    model, (batch, _), seen = tiny_model().eval(), random_batch(), []
    model.mask_head.extractor.register_forward_hook(lambda _, inputs, output: seen.append(inputs[1]))
    with torch.inference_mode():
        found = model(batch)
        with claims.misread(model, 1.0):
            beside = model(batch)
        again = model(batch)
    plain, moved, back = (torch.cat(seen[i : i + len(seen) // 3]) for i in range(0, len(seen), len(seen) // 3))
    assert len(plain) and torch.equal(moved, plain + torch.tensor([0.0, 1, 1, 1, 1])) and torch.equal(back, plain)
    assert torch.equal(found.boxes, beside.boxes) and torch.equal(found.masks, again.masks)
    assert not torch.equal(found.masks, beside.masks)
