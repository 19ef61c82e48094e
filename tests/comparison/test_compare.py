"""compare.py: run folders to methods, methods to a report, and what it does with runs that cannot be used."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

import detector
from detector import checkpoint as checkpoints
from detector.commands.compare import compare_runs, f1_by_image, main
from detector.comparison.alignment import area_error, box_shift, feature_shift, measure_alignment, measure_offsets
from detector.comparison.charts import bar_chart, interval_chart, line_chart, ticks
from detector.comparison.cost import measure_cost
from detector.comparison.report import steps, training_chart
from detector.comparison.runs import (
    Unusable,
    find_folders,
    group,
    read_run,
    roi_name,
    same_validation_set,
    validation_truth,
)
from detector.comparison.summary import sentence
from detector.config import CONFIGS, ConfigError, build, compose
from detector.data import build_dataset, collate, several, store
from detector.evaluation import coco_metrics
from detector.roi import RoIPool
from detector.structures import Batch
from tests.untrained import SMALL, arguments, configured


def roi(name, **changes):
    return yaml.safe_load((CONFIGS / "roi" / f"{name}.yaml").read_text()) | changes


def changed(config, method, seed):
    config = copy.deepcopy(config) | {"seed": seed, "roi": method, "run_dir": f"runs/{seed}"}
    for head in ("box_head", "mask_head"):
        config["model"][head]["roi"] = method
    return config


@pytest.fixture
def make_run(run_config, shapes_tiny, tmp_path):
    """A function that writes a finished run whose detections are the truth, moved by `noise` of its size; that share
    is missed."""
    truth = json.loads((shapes_tiny / "annotations" / "instances_val.json").read_text())

    def make(name, method, seed=0, noise=0.05, **changes):
        folder = tmp_path / "runs" / name
        (folder / "eval_last").mkdir(parents=True)
        config = changed(run_config, method, seed) | changes
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [{"iteration": i, "loss": 3 / i, "images_per_second": 5.0, "memory_mb": 800} for i in (20, 40)]
        lines = [line | ({"loss_offset": 0.1} if "gamma" in method else {}) for line in lines]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "metrics.json").write_text("{}")
        rng = np.random.default_rng([seed, len(name)])
        predictions = []
        for a in truth["annotations"]:
            if not a["iscrowd"] and rng.random() > noise:
                x, y, w, h = a["bbox"]
                box = [x + w * rng.normal(0, noise), y + h * rng.normal(0, noise), w, h]
                fields = {key: a[key] for key in ("image_id", "category_id", "segmentation")}
                predictions.append(fields | {"bbox": box, "score": float(rng.uniform(0.3, 1))})
        (folder / "eval_last" / "predictions.json").write_text(json.dumps(predictions))
        about = {
            "annotations": str(shapes_tiny / "annotations" / "instances_val.json"),
            "images": str(shapes_tiny / "val"),
        }
        (folder / "eval_last" / "about.json").write_text(json.dumps(about))
        return folder

    return make


def settings(tmp_path, **more):
    fixed = {
        "runs": tmp_path / "runs",
        "output": tmp_path / "report",
        "samples": 60,
        "probe_images": 0,
        "device": "cpu",
    }
    fixed |= {"evaluate": "false", "pictures": 2}
    return arguments("compare", [f"{key}={value}" for key, value in (fixed | more).items()])


# ---------------------------------------------------------------------------------------------------------------- runs


def test_runs_are_grouped_by_settings_and_named_by_them(make_run):
    for name, method, seed in (("a1", roi("align"), 1), ("a0", roi("align"), 0), ("p0", roi("pool"), 0)):
        make_run(name, method, seed)
    folder = make_run("m0", roi("align_max"), 0)
    runs = [read_run(path, "last") for path in find_folders(str(folder.parent))]
    methods, left_out = group(runs)
    assert not left_out and [(m.label, m.seeds) for m in methods] == [
        ("align", [0, 1]),
        ("align_max", [0]),
        ("pool", [0]),
    ]
    assert set(methods[0].settings) >= {"roi._target_", "model.box_head.roi._target_"}


def test_names_of_methods(make_run):
    assert roi_name(roi("deformable")) == "deformable"
    assert roi_name(roi("deformable", gamma=0.3)) == "deformable(gamma=0.3)"
    assert roi_name({"_target_": "mine.MyPool", "_partial_": True}) == "MyPool" and roi_name(None) == "none"
    one, two = make_run("a", roi("align")), make_run("b", roi("align"))
    config = yaml.safe_load((two / "config.yaml").read_text())
    config["model"]["neck"]["out_channels"] = 32
    config["model"]["mask_head"]["roi"] = roi("pool")
    (two / "config.yaml").write_text(yaml.safe_dump(config))
    methods, _ = group([read_run(path, "last") for path in (one, two)])
    assert [m.label for m in methods] == [
        "align, out_channels=16",
        "align, mask_head=pool, out_channels=32",
    ]


def test_precision_is_compared_and_other_ways_to_run_are_not(make_run):
    ways = {"a": {"precision": "bf16", "threads": 2}, "b": {"precision": "fp32"}, "c": {"threads": 1}, "old": None}
    for seed, (name, runtime) in enumerate(ways.items()):
        make_run(name, roi("align"), seed, **({} if runtime is None else {"runtime": runtime}))
    folder = make_run("b again", roi("align"), 1, runtime={"precision": "fp32", "workers": 0})
    methods, left_out = group([read_run(path, "last") for path in find_folders(str(folder.parent))])
    assert [(m.label, m.seeds) for m in methods] == [("precision=bf16", [0]), ("precision=fp32", [1, 2, 3])]
    assert len(left_out) == 1


def test_the_weight_of_offsets_tells_only_those_apart_that_learn_some(make_run, run_config):
    for name, method, weight in (
        ("a", "align", 0.1),
        ("b", "align", 1),
        ("c", "deformable", 0.1),
        ("d", "deformable", 1),
    ):
        make_run(name, roi(method), model=run_config["model"] | {"offset_loss_weight": weight})
    runs = []
    for folder in find_folders(str(make_run("p", roi("pool")).parent)):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        for head in ("box_head", "mask_head"):
            config["model"][head]["roi"] = config["roi"]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        runs.append(read_run(folder, "last"))
    methods, left_out = group(runs)
    labels = ["align", "deformable, offset_loss_weight=0.1", "deformable, offset_loss_weight=1", "pool"]
    assert [method.label for method in methods] == labels
    assert [folder.name for folder in left_out] == ["b"]


def test_runs_on_other_data_and_repeated_ones_are_left_out(make_run, tmp_path):
    first, second, third, fourth = (make_run(name, roi("align"), seed) for name, seed in zip("abcd", (0, 1, 0, 2)))
    other = json.loads((fourth / "eval_last" / "about.json").read_text())
    truth = json.loads(Path(other["annotations"]).read_text())
    (tmp_path / "other.json").write_text(json.dumps(truth | {"info": {}}))
    (fourth / "eval_last" / "about.json").write_text(json.dumps(other | {"annotations": str(tmp_path / "other.json")}))
    runs, others = same_validation_set([read_run(path, "last") for path in (first, second, third, fourth)])
    assert list(others) == [fourth] and "other.json" in others[fourth]
    methods, repeated = group(runs)
    assert [run.folder for run in methods[0].runs] == [first, second]
    assert repeated == {third: f"it repeats {first}: the same settings and seed"}


def test_bad_runs_are_named_and_the_rest_is_compared(make_run, tmp_path, capsys):
    make_run("align", roi("align"))
    make_run("pool", roi("pool"), noise=0.2)
    (make_run("unfinished", roi("warp")) / "metrics.json").unlink()
    (make_run("no_log", roi("warp")) / "log.jsonl").unlink()
    (make_run("cut", roi("warp")) / "eval_last" / "predictions.json").write_text('[{"image_id"')
    (make_run("unseen", roi("warp")) / "eval_last" / "predictions.json").unlink()
    make_run("proposals", roi("warp"), model={"box_head": None})
    report = compare_runs(**settings(tmp_path))
    reasons = {path.rpartition("/")[2]: reason for path, reason in report["left_out"].items()}
    assert reasons["unfinished"] == "it is not finished: there is no metrics.json, and its log ends at iteration 40"
    assert "log.jsonl" in reasons["no_log"] and "not JSON" in reasons["cut"]
    assert "neither eval_last/predictions.json nor last.pt" in reasons["unseen"] and len(reasons) == 5
    assert reasons["proposals"] == "its model has no box head: its proposals are of no class"
    assert [m["label"] for m in report["methods"]] == ["align", "pool"]
    assert "left out: " in capsys.readouterr().out


def test_detections_that_training_left_are_those_of_the_last_checkpoint(make_run, shapes_tiny):
    folder = make_run("a", roi("align"))
    (folder / "eval_last" / "predictions.json").rename(folder / "predictions.json")
    (folder / "eval_last" / "about.json").unlink()
    run = read_run(folder, "last")
    assert len(run.predictions) and run.truth == (shapes_tiny / "annotations" / "instances_val.json",)
    assert run.images == (shapes_tiny / "val",)
    with pytest.raises(Unusable, match="neither eval_best"):
        read_run(folder, "best")


def test_what_an_evaluation_left_out_is_left_out_of_the_comparison(make_run, tmp_path, shapes_tiny):
    """data.on_error=skip: a wrong record and a missing image, on a file that only our reader takes."""
    truth = json.loads((shapes_tiny / "annotations" / "instances_val.json").read_text())
    gone = truth["images"][0]["id"]
    left = [a for a in truth["annotations"] if a["image_id"] != gone]
    clean = truth | {"images": truth["images"][1:], "annotations": left[1:]}
    truth["images"][0]["file_name"] = "gone.jpg"
    for image in truth["images"]:
        image |= {"date_captured": 0, "width": str(image["width"])}
    left[0]["bbox"] = [None, 1, 2, 3]
    (tmp_path / "dirty.json").write_text(json.dumps(truth))
    runs = []
    for name in ("align", "pool"):
        folder = make_run(name, roi(name))
        results = json.loads((folder / "eval_last" / "predictions.json").read_text())
        results = [r for r in results if r["image_id"] != gone]
        (folder / "eval_last" / "predictions.json").write_text(json.dumps(results))
        about = json.loads((folder / "eval_last" / "about.json").read_text())
        about |= {"annotations": str(tmp_path / "dirty.json"), "settings": {"data": {"on_error": "skip"}}}
        (folder / "eval_last" / "about.json").write_text(json.dumps(about))
        runs.append(results)
    report = compare_runs(**settings(tmp_path, pictures=1))
    for kind in ("bbox", "segm"):
        expected = [coco_metrics(clean, results, kind)["AP"] for results in runs]
        assert [report["metrics"][kind][name]["AP"]["mean"] for name in ("align", "pool")] == expected
    assert report["validation"]["images"] == len(clean["images"])


def test_nothing_to_compare(make_run, tmp_path):
    with pytest.raises(ConfigError, match="names no run"):
        compare_runs(**settings(tmp_path))
    (make_run("a", roi("align")) / "metrics.json").unlink()
    with pytest.raises(ConfigError, match=r"runs: none can be used: .*not finished"):
        compare_runs(**settings(tmp_path))


# -------------------------------------------------------------------------------------------------------------- report


class Balanced(HTMLParser):
    """Checks that elements are closed in order, and keeps what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attributes):
        self.fetched += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report(make_run, tmp_path):
    for seed in (0, 1, 2):
        make_run(f"align_{seed}", roi("align"), seed, noise=0.03)
        make_run(f"pool_{seed}", roi("pool"), seed, noise=0.12)
    report = compare_runs(**settings(tmp_path, baseline="pool"))
    output = tmp_path / "report"
    assert json.loads((output / "report.json").read_text()) == report
    assert [m["label"] for m in report["methods"]] == ["pool", "align"] and report["kinds"] == [
        "bbox",
        "segm",
        "boundary",
    ]
    run = tmp_path / "runs" / "pool_1"
    truth = json.loads((run / "eval_last" / "about.json").read_text())["annotations"]
    expected = coco_metrics(truth, run / "eval_last" / "predictions.json")
    values = report["metrics"]["bbox"]["pool"]
    assert values["AP"]["values"][1] == expected["AP"] and values["AP"]["mean"] == pytest.approx(
        np.mean(values["AP"]["values"])
    )
    boundary = coco_metrics(truth, run / "eval_last" / "predictions.json", "boundary")
    assert report["metrics"]["boundary"]["pool"]["AP"]["values"][1] == pytest.approx(boundary["AP"])
    found = next(e for e in report["differences"]["bbox"] if e["metric"] == "AP")
    assert (
        found["clear"]
        and found["low"] < found["delta"] < found["high"]
        and (found["a"], found["b"]) == ("pool", "align")
    )
    assert len(report["per_class"]["bbox"]["differences"]["align"]) == 5
    assert report["tide"]["bbox"]["pool"]["Loc"] > report["tide"]["bbox"]["align"]["Loc"]
    assert np.mean(report["curves"]["bbox"]["pool"]["mean"]) == pytest.approx(values["AP"]["mean"])
    (gain,) = report["curve_differences"]["bbox"]
    assert (gain["a"], gain["b"]) == ("pool", "align") and np.mean(gain["delta"]) == pytest.approx(found["delta"])
    assert all(low < delta < high for low, delta, high in zip(gain["low"], gain["delta"], gain["high"]))

    page = (output / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.fetched == [] and parser.open == []
    assert page.count("data:image/jpeg") == 2
    page = re.sub(r"base64,[^\"]*", "", page)
    assert "http" not in page and not re.search(r"\bnan\b", page, re.IGNORECASE)
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)
    assert "prefers-color-scheme: dark" in page
    words = (output / "report.md").read_text()
    assert f"**{sentence('bbox', found)}, clear**" in words and "| pool | 3 |" in words


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_the_truth_of_a_large_file_comes_from_the_store(make_run, tmp_path, monkeypatch, on_error):
    """What the evaluation opened, `compare` does not read again: neither to compare with nor for the file's key."""
    data = configured()["data"] | {"cache": str(tmp_path / "cache"), "on_error": on_error}
    run = read_run(make_run("a", roi("align"), data=data), "last")
    parsed = validation_truth(run)
    monkeypatch.setitem(store.open_truth.__kwdefaults__, "small", 0)
    monkeypatch.setattr(store.cache_of, "__defaults__", (0,))
    monkeypatch.setattr(store.time, "time_ns", lambda: run.truth[0].stat().st_mtime_ns + 10**10)
    names = detector.data.read_coco(run.truth[0]).categories
    store.open_coco(run.truth, names, on_error=on_error, cache=data["cache"], small=0)
    for name in ("read_coco", "read_truth"):
        monkeypatch.setattr(several, name, lambda *_, **__: pytest.fail("the JSON is read again"))
    monkeypatch.setattr(store, "_digest", lambda _: pytest.fail("the JSON is read again"))
    assert same_validation_set([run, run])[0] == [run, run]
    truth = validation_truth(run)
    for item in dataclasses.fields(truth):
        np.testing.assert_array_equal(getattr(truth, item.name), getattr(parsed, item.name))


def test_zero_detections_one_run_and_absent_classes(make_run, tmp_path):
    make_run("align", roi("align"))
    (make_run("pool", roi("pool")) / "eval_last" / "predictions.json").write_text("[]")
    report = compare_runs(**settings(tmp_path))
    assert report["metrics"]["bbox"]["pool"]["AP"]["mean"] == 0
    assert any("pool: no detections at all" in text for text in report["warnings"])
    assert any("align: one run. Its intervals cover the choice of images" in text for text in report["warnings"])
    assert any("8 validation images are few" in text for text in report["warnings"])


def test_pictures_show_detections_above_the_best_score(make_run):
    """The limit is the score of the largest F1: good detections at 0.3 are shown, worse ones below are not."""
    folder = make_run("a", roi("align"), noise=0.0)
    file = folder / "eval_last" / "predictions.json"
    entries = [entry | {"score": 0.3} for entry in json.loads(file.read_text())]
    wrong = [entry | {"score": 0.2, "bbox": [0, 0, 1, 1]} for entry in entries]
    file.write_text(json.dumps(entries + wrong))
    run = read_run(folder, "last")
    limit, scores = f1_by_image(validation_truth(run), run.predictions, "bbox")
    assert 0.2 < limit <= 0.3 and (scores == 1).all()
    file.write_text("[]")
    run = read_run(folder, "last")
    limit, scores = f1_by_image(validation_truth(run), run.predictions, "bbox")
    with_objects = len({entry["image_id"] for entry in entries})
    assert limit == 1 and (scores == 0).sum() == with_objects and set(scores) <= {0, 1}


def test_no_detections_in_any_run(make_run, tmp_path):
    for name in ("align", "pool"):
        (make_run(name, roi(name)) / "eval_last" / "predictions.json").write_text("[]")
    report = compare_runs(**settings(tmp_path))
    assert report["kinds"] == ["bbox"] and report["metrics"]["bbox"]["pool"]["AP"]["mean"] == 0
    assert sum("no detections at all" in text for text in report["warnings"]) == 2


def test_a_class_without_ground_truth(make_run, tmp_path):
    """It has no AP, it is in no mean, and the report says so."""
    folders = [make_run(name, roi(name), noise=noise) for name, noise in (("align", 0.05), ("pool", 0.2))]
    about = json.loads((folders[0] / "eval_last" / "about.json").read_text())
    truth = json.loads(Path(about["annotations"]).read_text())
    truth["categories"].append({"id": 99, "name": "unicorn"})
    (tmp_path / "more.json").write_text(json.dumps(truth))
    for folder in folders:
        (folder / "eval_last" / "about.json").write_text(
            json.dumps(about | {"annotations": str(tmp_path / "more.json")})
        )
    report = compare_runs(**settings(tmp_path))
    assert "The validation set has no object of unicorn: left out of every mean." in report["warnings"]
    classes = report["per_class"]["bbox"]
    assert classes["categories"][-1] == "unicorn" and classes["mean"]["pool"][-1] is None
    assert classes["differences"]["pool"][-1]["delta"] is None
    expected = coco_metrics(about["annotations"], folders[1] / "eval_last" / "predictions.json")["AP"]
    assert report["metrics"]["bbox"]["pool"]["AP"]["mean"] == pytest.approx(expected)
    assert not re.search(r"\bnan\b", (tmp_path / "report" / "report.md").read_text())


def test_another_validation_set_and_foreign_predictions_are_left_out(make_run, tmp_path, capsys):
    folders = {name: make_run(name, roi(name)) for name in ("align", "pool", "warp", "precise", "align_max")}
    about = json.loads((folders["warp"] / "eval_last" / "about.json").read_text())
    other = json.loads(Path(about["annotations"]).read_text())
    other["images"] = other["images"][:4]
    (tmp_path / "other.json").write_text(json.dumps(other))
    (folders["warp"] / "eval_last" / "about.json").write_text(
        json.dumps(about | {"annotations": str(tmp_path / "other.json")})
    )
    for name, key, value in (("precise", "image_id", 10**6), ("align_max", "score", "high")):
        file = folders[name] / "eval_last" / "predictions.json"
        entries = json.loads(file.read_text())
        file.write_text(json.dumps([entries[0] | {key: value}, *entries[1:]]))
    report = compare_runs(**settings(tmp_path))
    reasons = {path.rpartition("/")[2]: reason for path, reason in report["left_out"].items()}
    assert set(reasons) == {"warp", "precise", "align_max"}
    assert "it was evaluated on" in reasons["warp"] and "other.json" in reasons["warp"]
    assert (
        reasons["precise"].startswith("its predictions cannot be used: ")
        and "image_id is 1000000" in reasons["precise"]
    )
    assert "score is 'high'" in reasons["align_max"]
    assert [m["label"] for m in report["methods"]] == ["align", "pool"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(str(folders[name]) in page for name in reasons) and "<h3>Left out</h3>" in page


def test_annotations_that_nobody_can_use(make_run, tmp_path):
    folder = make_run("align", roi("align"))
    about = json.loads((folder / "eval_last" / "about.json").read_text())
    (tmp_path / "broken.json").write_text('{"images": []}')
    (folder / "eval_last" / "about.json").write_text(json.dumps(about | {"annotations": str(tmp_path / "broken.json")}))
    with pytest.raises(
        ConfigError, match=r"their validation set cannot be used: .*broken\.json.*'annotations' is missing"
    ):
        compare_runs(**settings(tmp_path))


def test_one_method_alone_is_reported(make_run, tmp_path):
    make_run("align", roi("align"))
    report = compare_runs(**settings(tmp_path))
    assert report["differences"]["bbox"] == [] and "There is one method only: nothing to compare." in report["warnings"]
    assert "<h2>Average precision" in (tmp_path / "report" / "report.html").read_text()


def test_the_limit_of_detections(make_run, tmp_path):
    """As the runs were measured, the most where they differ, or as the user wants it; the report says so."""
    make_run("one", roi("align"))
    wide = make_run("two", roi("pool"))
    assert compare_runs(**settings(tmp_path))["max_detections"] == [1, 10, 100]
    about = wide / "eval_last" / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"max_detections": [1, 10, 300]}))
    report = compare_runs(**settings(tmp_path))
    assert report["max_detections"] == [1, 10, 300] and "AR300" in report["metrics"]["bbox"]["align"]
    assert report["metrics"]["boundary"]["pool"]["AR300"]["mean"] > 0
    assert any(
        "measured with max_detections = [1, 10, 100] and [1, 10, 300]; here with" in w for w in report["warnings"]
    )
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| AR300 |" in page and "AR100" not in page and "up to 300 detections" in page
    few = compare_runs(**settings(tmp_path, max_detections="[1]"))
    assert few["metrics"]["bbox"]["align"]["AP"]["mean"] < report["metrics"]["bbox"]["align"]["AP"]["mean"]


def test_unknown_baseline(make_run, tmp_path):
    make_run("align", roi("align"))
    with pytest.raises(ConfigError, match="baseline = 'pool': the methods are align"):
        compare_runs(**settings(tmp_path, baseline="pool"))


def test_sentences():
    entry = {"a": "align", "b": "deformable", "metric": "AP", "delta": 0.008, "low": 0.001, "high": 0.0153}
    assert sentence("segm", entry) == "deformable − align: mask AP +0.8 [+0.1, +1.5]"
    assert sentence("bbox", entry | {"delta": -1e-5}) == "deformable − align: box AP +0.0 [+0.1, +1.5]"
    assert sentence("bbox", entry | {"low": None}) == "deformable − align: box AP cannot be compared"


# -------------------------------------------------------------------------------------------------- measured on models


@pytest.fixture
def model_of(run_config, state):
    def make(method):
        config = changed(run_config, method, 0)
        torch.manual_seed(0)
        weights = build(config["model"], "model", num_classes=5).state_dict()
        return detector.load(state | {"config": config, "model": weights}).model

    return make


@pytest.mark.slow
def test_run_without_evaluation_is_evaluated_and_probed(make_run, model_of, state, tmp_path):
    for name in ("align", "pool", "deformable"):
        folder = make_run(f"roi={name},seed=0", roi(name))
        for file in (folder / "eval_last").iterdir():
            file.unlink()
        config, model = yaml.safe_load((folder / "config.yaml").read_text()), model_of(roi(name))
        checkpoints.save(state | {"config": config, "model": model.state_dict()}, folder / "last.pt")
    report = compare_runs(**settings(tmp_path, evaluate="true", probe_images=2, workers=0, pictures=0))
    assert (tmp_path / "runs" / "roi=align,seed=0" / "eval_last" / "predictions.json").exists() and not report[
        "left_out"
    ]
    assert report["cost"]["align"]["parameters"] == report["cost"]["pool"]["parameters"] > 0
    shifts = {name: max(report["alignment"][name]["feature_shift"]) for name in ("align", "pool")}
    assert shifts["pool"] > 5 * shifts["align"] and report["alignment"]["align"]["area_error"] is None
    assert report["offsets"]["deformable"]["box_head"]["mean_px"] == 0 and set(report["offsets"]) == {"deformable"}
    assert "<h2>Alignment" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.slow
def test_the_program_evaluates_a_run_that_was_not(call, make_run, model_of, state, tmp_path):
    """Inside Hydra, where another configuration cannot be composed."""
    folder = make_run("roi=align,seed=0", roi("align"))
    for file in (folder / "eval_last").iterdir():
        file.unlink()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    checkpoints.save(state | {"config": config, "model": model_of(roi("align")).state_dict()}, folder / "last.pt")
    options = {
        "runs": folder,
        "output": tmp_path / "report",
        "samples": 20,
        "device": "cpu",
        "workers": 0,
        "probe_images": 0,
    }
    code, shown, errors = call(main, *(f"{key}={value}" for key, value in options.items()))
    assert code == 0 and "left out" not in shown, shown + errors
    assert (folder / "eval_last" / "predictions.json").exists() and (tmp_path / "report" / "report.html").exists()


def test_feature_shift(model_of):
    boxes = torch.tensor([[10.0, 20, 60, 90], [33, 12, 120, 70], [5, 5, 25, 31]])
    precise, align, pool = (feature_shift(model_of(roi(n)), boxes, [0, 0.5, 1]) for n in ("precise", "align", "pool"))
    for changes in (precise, align, pool):
        assert changes[0] == 0 and changes[2] < 1e-4  # a whole cell is no misalignment
    assert precise[1] < 0.05 and align[1] < 0.1 < 0.2 < pool[1]


def test_box_shift_is_zero_without_a_shift_and_for_a_shift_by_the_coarsest_stride(model_of):
    model = model_of(roi("pool"))
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    found = box_shift(model, image, torch.tensor([[8.0, 8, 40, 50]]), torch.tensor([2]), (0, 5, 64))
    assert found[0] == 0 and found[1] > 0 and found[2] < 0.05


def test_area_error_of_a_rounded_roi(model_of):
    model = model_of(roi("pool"))
    assert isinstance(model.box_head.extractor.op, RoIPool)
    # stride 4, cells 2.5..10.25 -> 3..10 inclusive: 8 x 8 cells instead of 7.75 x 7.75
    box = torch.tensor([[10.0, 10, 41, 41]])
    torch.testing.assert_close(area_error(model, box), torch.tensor([64 / 7.75**2 - 1]))
    assert area_error(model_of(roi("align")), box) is None


def test_offsets_in_pixels(model_of, run_config):
    """A predictor that says (0.3, -0.4) for every bin moves it by gamma * 0.5 of a square RoI's side."""
    model = model_of(roi("modulated_deformable"))
    last = model.box_head.extractor.op.offset_predictor[0].offsets[-1]
    torch.nn.init.constant_(last.bias[:49], 0.3), torch.nn.init.constant_(last.bias[49:], -0.4)
    batch, _ = collate([build_dataset(run_config["data"], "val", run_config["augment"])[0]])
    sides = []
    model.box_head.extractor.register_forward_hook(
        lambda _, inputs, output: sides.append(inputs[1][:, 3:] - inputs[1][:, 1:3])
    )
    found = measure_offsets(model, [batch])
    sizes = torch.cat([batch.original_sizes, 2 * batch.original_sizes])
    twice = Batch(*(torch.cat([t, t]) for t in batch))._replace(original_sizes=sizes)
    both, second = (measure_offsets(model, [b]) for b in (twice, batch._replace(original_sizes=sizes[1:])))
    mean = (found["box_head"]["mean_px"] + second["box_head"]["mean_px"]) / 2
    assert both["box_head"]["mean_px"] == pytest.approx(mean, rel=1e-5)
    assert batch.image_sizes.tolist() == [[128, 128]] and batch.original_sizes.tolist() == [[96, 96]]
    moves = 0.1 * sides[0] * torch.tensor([0.3, 0.4]) * 96 / 128
    box_head, distances = found["box_head"], moves.norm(dim=1)
    assert box_head["mean_px"] == pytest.approx(distances.mean().item(), rel=1e-5)
    assert box_head["mean_abs_px"] == pytest.approx(moves.mean(0).tolist(), rel=1e-5)
    assert box_head["quantiles_px"][-1] == pytest.approx(distances.max().item(), rel=1e-5)
    assert box_head["mean_norm"] == pytest.approx(0.5) and box_head["modulation"] == 0.5
    edges, percent = box_head["histogram"]["edges"], box_head["histogram"]["percent"]
    for low, high, share in zip(edges, edges[1:], percent):
        inside = ((distances > low + 1e-5) & (distances < high - 1e-5)).float().mean()
        assert share >= 100 * inside - 1e-4
    assert 99 <= sum(percent) <= 100 + 1e-9
    assert box_head["modulation_histogram"]["percent"][15] == 100  # all of them are 1/2
    assert found["mask_head"]["mean_px"] == 0 and found["mask_head"]["histogram"]["percent"][0] == 100
    assert measure_offsets(model_of(roi("align")), [batch]) == {}


def test_offsets_in_the_report(make_run, model_of, state, tmp_path):
    """Norms and L2 loss over training as means of the seeds, histograms, moves in pixels."""
    for seed in (0, 1):
        folder = make_run(f"deformable_{seed}", roi("modulated_deformable"), seed)
        keys = ("loss", "loss_offset", "box_head/offsets_mean_norm")
        lines = [{"iteration": i} | dict.fromkeys(keys, (seed + 1) / i) for i in (20, 40)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config, model = yaml.safe_load((folder / "config.yaml").read_text()), model_of(roi("modulated_deformable"))
        checkpoints.save(state | {"config": config, "model": model.state_dict()}, folder / "last.pt")
    report = compare_runs(**settings(tmp_path, probe_images=1, pictures=0))
    page = (tmp_path / "report" / "report.html").read_text()
    captions = ("Norm of the offsets (dx, dy) in training", "L2 loss of the offsets", "Histogram of the moves")
    for caption in (*captions, "Histogram of the modulation", "mean |x|, px"):
        assert caption in page
    chart, _ = training_chart(report, {"a": ("modulated_deformable", "loss_offset")}, "loss", "L2")
    assert "<polygon" in chart
    assert set(report["offsets"]["modulated_deformable"]) == {"box_head", "mask_head"}


def test_steps_outline_a_histogram():
    assert steps({"edges": [0, 2, 4], "percent": [60, 40]}) == ([0, 2, 2, 4], [30, 30, 20, 20])


def test_alignment_of_a_cascade(model_of, run_config):
    """Its first stage pools the proposals, its last stage says where the boxes are."""
    config = copy.deepcopy(run_config)
    changes = [s for s in SMALL if not s.startswith(("model/", "model.mask_head"))]
    cfg = compose("train", [*changes, "model=cascade_rcnn", "roi=pool", f"data.root={config['data']['root']}"])
    torch.manual_seed(0)
    cascade = build(OmegaConf.to_container(cfg.model, resolve=True), "model", num_classes=5).eval()
    dataset = build_dataset(config["data"], "val", config["augment"])
    found = measure_alignment(cascade, [dataset[0], dataset[1]])
    assert max(found["feature_shift"]) > 0.2 and found["area_error"] is not None
    assert found["box_shift"][0] == 0 and found["box_shift"][3] > 0
    # the last stage decides: without it nothing is left but what the others did
    image, boxes = dataset[0].image, torch.from_numpy(dataset[0].boxes)
    before = box_shift(cascade, image, boxes, torch.ones(len(boxes), dtype=torch.long), (0, 5))[1]
    torch.nn.init.normal_(cascade.box_head.stages[-1].predictor.box_deltas.weight, std=0.1)
    after = box_shift(cascade, image, boxes, torch.ones(len(boxes), dtype=torch.long), (0, 5))[1]
    assert after > 2 * before


def test_cost(model_of, run_config):
    dataset = build_dataset(run_config["data"], "val", run_config["augment"])
    batches = [collate([dataset[i]])[0] for i in range(2)]
    plain, deformable = (measure_cost(model_of(roi(name)), batches) for name in ("align", "deformable"))
    assert plain["roi_parameters"] == 0 < deformable["roi_parameters"]
    assert deformable["parameters"] - plain["parameters"] == deformable["roi_parameters"]
    assert 0 < plain["roi_gflops"] < plain["gflops"] and deformable["roi_gflops"] > plain["roi_gflops"]
    assert 0 < plain["roi_ms"] < plain["ms"] and plain["memory_mb"] is None


# -------------------------------------------------------------------------------------------------------------- charts


def test_charts_are_valid_and_leave_gaps():
    charts = [
        line_chart({"a & b": ([0, 1, 2], [1, None, 3]), "c": ([0, 1], [0, 2])}, "x", "y", {"c": [(-0.1, 0.2), (1, 3)]}),
        interval_chart(["b − a & c", ("a < b", 1, 0.5, 2), ("none", None, None, None)], "difference"),
        bar_chart({"a": {"one": 1, "two": None}, "b": {"one": -2, "two": 3}}, "y"),
    ]
    for chart in charts:
        ElementTree.fromstring(chart)
    assert (
        charts[0].count("<polyline") == 2
        and charts[1].count("<circle") == 1
        and charts[2].count('<rect class="bar') == 5
    )
    assert charts[0].count("<polygon") == 1 and 'class="zero"' in charts[0]
    assert line_chart({}, "x", "y") == interval_chart([], "x") == bar_chart({}, "y") == ""
    assert line_chart({"a": ([1], [None])}, "x", "y") == ""


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 7.9), (0.5, 0.95), (2, 2), (0, 0), (1e-9, 3e-9), (-40, -12)])
def test_ticks_enclose_the_values(low, high):
    values = ticks(low, high)
    assert values[0] <= low and values[-1] >= high and 3 <= len(values) <= 9
    assert np.allclose(np.diff(values), values[1] - values[0])
