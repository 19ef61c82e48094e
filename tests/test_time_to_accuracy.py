"""benchmarks/time_to_accuracy.py: every part that can be exchanged is a configuration that trains."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import time_to_accuracy
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
        assert (part, name) in {("masks", "bccd"), ("resize", "shapes")}
    else:
        assert time_to_accuracy.recipe(name, tmp_path, 0, tmp_path, overrides) != ours


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
