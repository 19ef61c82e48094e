"""The report of one run: what it says, that it stands alone, and that it loses nothing where it fails."""

from __future__ import annotations

import copy
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from detector.commands.train import conclude
from detector.comparison import pictures, run_report
from detector.comparison.run_report import Evaluated, diagnose, suspects, write_run_report
from detector.engine.train import train
from detector.evaluation.coco import check_annotations, check_predictions
from detector.evaluation.evaluator import measure
from detector.evaluation.operating_point import kept_matches, operating_point


@pytest.fixture(scope="module")
def truth(shapes_tiny):
    return check_annotations(shapes_tiny / "annotations" / "instances_val.json", "segm")


@pytest.fixture(scope="module")
def evaluated(truth, shapes_tiny, tmp_path_factory):
    """Detections that are the truth, but for the first object, which is taken for another class, and one that finds
    nothing, both of high score."""
    results = []
    for n, entry in enumerate(a for a in truth.to_coco()["annotations"] if not a["iscrowd"]):
        fields = {key: entry[key] for key in ("image_id", "category_id", "segmentation", "bbox")}
        results.append(copy.deepcopy(fields) | {"score": 0.5 + 0.4 * (n % 5) / 5})
    first, second = results[0], results[1]
    first |= {"category_id": next(k for k in truth.category_ids if k != first["category_id"]), "score": 0.99}
    corner = [[0, 0, 3, 0, 3, 3, 0, 3]]
    results.append({**second, "segmentation": corner, "bbox": [0, 0, 3, 3], "score": 0.95})
    results = check_predictions(results, truth, "segm")
    measured = measure(truth, results, ["bbox", "segm"], "hotcoco", True)
    point = operating_point(kept_matches(truth, results, "segm"), "segm", samples=20)
    log = tmp_path_factory.mktemp("run") / "log.jsonl"
    lines = [{"iteration": i, "loss": 3 / i, "loss_mask": 1 / i, "loss_offset": 0.1 / i} for i in (20, 40)]
    lines += [{"iteration": i, "metrics": {"bbox": {"AP": i / 100}}} for i in (20, 40)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut": ')
    folders = [shapes_tiny / "val"]
    return Evaluated("runs/<b>", truth, results, measured, point, folders=folders, log_file=log)


def test_the_numbers(evaluated, truth):
    found = diagnose(evaluated)
    assert found["kinds"] == ["bbox", "segm"] and found["kind"] == "segm"
    assert found["metrics"]["segm"]["runs/<b>"]["AP"]["mean"] == pytest.approx(evaluated.metrics["segm"]["AP"])
    low, high = found["interval"]
    assert low <= evaluated.metrics["segm"]["AP"] <= high <= 1 and low < high
    matrix = np.array(found["confusion"]["matrix"])
    objects = int((~truth.crowd).sum())
    assert np.trace(matrix) == objects - 1 and matrix[:-1].sum() == objects and matrix[-1].sum() == 1
    assert len(found["classes"]) == len(truth.categories) and found["calibration"]["num_detections"] == objects + 1
    assert json.loads(json.dumps(found["point"])) == found["point"]


def test_labels_that_may_be_wrong(evaluated, truth):
    rows, shown = suspects(evaluated)
    first, last = evaluated.results[0], evaluated.results[-1]
    names = dict(zip(truth.category_ids, truth.categories))
    assert {(row[1], row[2]) for row in rows} == {
        ("another class?", names[first["category_id"]]),
        ("an object without annotation?", names[last["category_id"]]),
    }
    assert rows[0][3] == "0.99" and len(shown) == 2 and rows[0][0] in shown[0][0]


def test_the_page_stands_alone(evaluated, tmp_path):
    assert write_run_report(evaluated, tmp_path / "report.html") == tmp_path / "report.html"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for title in (
        *("Average precision", "From which score on", "Classes", "Confusion", "Errors", "Calibration", "Training"),
        *("Learned offsets", "Worst and best images", "Labels that may be wrong"),
    ):
        assert f"<h2>{title}</h2>" in page, title
    assert "runs/&lt;b&gt;" in page and "<b>" not in page and page.count("data:image/jpeg") >= 4
    page = re.sub(r"base64,[^\"]*", "", page)
    assert "http" not in page and not re.search(r"\bnan\b", page, re.IGNORECASE)
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)


def test_nothing_found_many_classes_and_no_images(truth, tmp_path):
    """What can be said is said; of many classes the pairs that are confused."""
    measured = measure(truth, check_predictions([], truth, "segm"), ["bbox"], "hotcoco", True)
    point = operating_point(kept_matches(truth, [], "bbox"), "bbox", samples=20)
    found = Evaluated("empty", truth, [], measured, point, folders=[tmp_path / "gone"])
    assert write_run_report(found, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no score has best F1" in page and "data:image" not in page
    names = [f"class {k}" for k in range(30)]
    matrix = np.diag(np.full(31, 9))
    matrix[3, 7] = 4
    many = run_report.confusion({"confusion": {"names": names, "matrix": matrix.tolist()}})
    assert "<td>class 3</td><td>class 7</td><td>4</td>" in many and many.count("<tr>") == 2


def test_large_images_are_shown_small_with_what_is_on_them(evaluated, truth, tmp_path, monkeypatch):
    """And no mask of theirs is ever drawn whole."""
    monkeypatch.setattr(pictures, "LARGEST", 48)
    image, size = pictures.read_picture(truth, 0, evaluated.folders, evaluated.pictures)
    assert image.shape == (48, 48, 3) and size == (96, 96)
    entries = [entry for entry in truth.to_coco()["annotations"] if not entry["iscrowd"]]
    for entry in entries:
        x, y, w, h = entry["bbox"]
        whole = pictures.mask_of(entry["segmentation"], None, size, size)
        small = pictures.mask_of(entry["segmentation"], np.array([x, y, x + w, y + h]) / 2, size, (48, 48))
        assert whole.any() and (small == whole[1::2, 1::2]).all()
    assert write_run_report(evaluated, tmp_path / "report.html")


def test_a_report_that_fails_says_so(evaluated, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_report, "diagnose", lambda _: 1 / 0)
    assert write_run_report(evaluated, tmp_path / "report.html") is None and not list(tmp_path.iterdir())
    assert "no report: ZeroDivisionError: division by zero" in caplog.text


def test_a_run_ends_with_its_report(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # what fails here ends no run
        patch.setattr("detector.commands.train.evaluated", lambda *_: 1 / 0)
        train(config("schedule.max_iterations=1", "schedule.warmup=0"), at_end=conclude)
        assert "no table of classes: ZeroDivisionError" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    train(config("schedule.max_iterations=2", "schedule.warmup=0"), at_end=conclude)
    held = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"report.html", "classes.csv", "metrics.json"} <= held
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert f"report       {tmp_path / 'run' / 'report.html'}" in log and "mask AP75" in log
