"""benchmarks/time_to_accuracy.py: every part that can be exchanged is a configuration that trains."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle_tools

from benchmarks import digits, time_to_accuracy
from detector.data.read_coco import read_truth
from tests.runs import make_tiny_shapes


@pytest.mark.parametrize("name", time_to_accuracy.SETS)
@pytest.mark.parametrize("part", [*time_to_accuracy.PARTS, *time_to_accuracy.OURS])
def test_parts_are_configurations(name, part, tmp_path):
    """Checked as train.py checks them, and other than ours wherever the set has the part."""
    ours = time_to_accuracy.recipe(name, tmp_path, 0, tmp_path, [])
    if part == "initialisation":
        return
    overrides = time_to_accuracy.part_overrides(part, name, images=100)
    if not overrides:
        others = ["bccd", "nuclei", "shapes"]
        same = {"masks": ["bccd"], "resize": ["shapes", "digits"], "augmentation": ["digits"], "more_rois": ["digits"]}
        assert name in (same | {"turns": others, "few_rois": others})[part]
    else:
        assert time_to_accuracy.recipe(name, tmp_path, 0, tmp_path, overrides) != ours


def test_digits_lie_over_each_other(tmp_path):
    """What is kept of a digit is what later ones leave to be seen: no cell belongs to two; its class is the digit's."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 17, (20, 8, 8)).astype(float), np.arange(20) % 3 + 7
    digits.write_split(tmp_path, "val", 2, 0, images, labels)
    truth = read_truth(tmp_path / "annotations" / "instances_val.json", masks=True).to_coco(segmentation=True)
    assert [cv2.imread(str(path)).shape for path in sorted((tmp_path / "val").iterdir())] == [(160, 160, 3)] * 2
    names = {category["id"]: category["name"] for category in truth["categories"]}
    assert {names[entry["category_id"]] for entry in truth["annotations"]} == {"7", "8", "9"}
    for image in (1, 2):
        masks = [e["segmentation"] for e in truth["annotations"] if e["image_id"] == image]
        covered = rle_tools.decode(masks).sum(2, dtype=int)
        assert len(masks) >= 5 and covered.max() == 1


@pytest.mark.slow
def test_runs_are_kept_and_compared(tmp_path, monkeypatch):
    make_tiny_shapes(tmp_path / "data")
    tiny = time_to_accuracy.SETS["shapes"]._replace(batch=2, iterations=3)
    monkeypatch.setitem(time_to_accuracy.SETS, "shapes", tiny)
    args = SimpleNamespace(out=tmp_path / "out", data="shapes", root=tmp_path / "data", draws=20)
    args.base, args.iterations = ["small_predictors", "adamw"], 3
    runs = {name: [time_to_accuracy.run(args, name, 0)] for name in ("ours", "torchvision", "trained_alike", "all")}
    for name, (each,) in runs.items():
        assert [mark["iteration"] for mark in each["curve"]] == [1, 2, 3], name
        assert 0 < each["curve"][0]["cpu_s"] < each["curve"][2]["cpu_s"] and {"bbox", "segm"} <= set(each["curve"][0])
    kept = tmp_path / "out" / "shapes-3" / "ours+small_predictors+adamw-0.json"
    assert (kept.parent / "trained_alike+adamw-0.json").exists() and (kept.parent / "torchvision-0.json").exists()
    kept.write_text(json.dumps(runs["ours"][0] | {"curve": [{"iteration": 3, "cpu_s": 1.0, "bbox": 0.5, "segm": 0.5}]}))
    assert time_to_accuracy.run(args, "ours", 0)["curve"][0]["bbox"] == 0.5  # what is kept is not run again
    summary = time_to_accuracy.compared(args, runs, "segm")
    assert summary["ours"]["to_ours"] == [0.0, 0.0, 0.0] and summary["torchvision"]["cpu_s"] > 0
    charts = [time_to_accuracy.chart(runs, "segm", against) for against in ("iteration", "cpu_s")]
    assert time_to_accuracy.side_by_side(charts).count("<svg") == 3
