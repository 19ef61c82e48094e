"""Five keypoints instead of COCO's seventeen, from validation to pictures."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest

import detector
from detector.commands.evaluate import evaluate_checkpoint
from detector.commands.predict import predict_files
from detector.commands.validate import report_on
from detector.config import ConfigError
from detector.evaluation import coco_metrics
from tests.data.coco_files import FIVE, five_points
from tests.runs import KEYPOINTS, checked
from tests.untrained import arguments

FOUND = "model.box_head.score_threshold=0"  # something is found after three steps


def options(checkpoint, *more: str) -> list[str]:
    return [f"checkpoint={checkpoint}", "device=cpu", "batch_size=4", *more]


@pytest.mark.slow
def test_from_validation_to_pictures(points, five, tmp_path, monkeypatch):
    assert not report_on(checked(*KEYPOINTS, f"data.root={five}"), pictures=1).has_errors()
    points(five, "schedule.max_iterations=3", "schedule.warmup=0", "evaluation.metric=keypoints.AP", FOUND)
    best = tmp_path / "run" / "best.pt"
    truth = five / "annotations" / "instances_val.json"
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())
    metrics = evaluate_checkpoint(**arguments("eval", options(best, "workers=0", "threads=1")))
    assert {kind: metrics[kind] for kind in trained} == trained and "keypoints" in trained
    found = tmp_path / "run" / "eval_best" / "predictions.json"
    assert metrics["keypoints"] == coco_metrics(truth, found, "keypoints", "pycocotools")
    loose = "sigmas=[9,9,9,9,9]"
    other = evaluate_checkpoint(**arguments("eval", options(best, "workers=0", f"output={tmp_path / 'loose'}", loose)))
    assert other["keypoints"] == coco_metrics(truth, found, "keypoints", sigmas=[9] * 5) != metrics["keypoints"]

    model = detector.load(best)
    assert model.keypoint_names == FIVE
    image = five / "val" / "1.png"
    assert model.predict(image, threshold=0).keypoints.shape[1:] == (5, 3)
    for name in ("with", "without"):
        output = f"output={tmp_path / name}"
        predict_files(**arguments("predict", options(best, f"images={image}", output, "threshold=0")))
        monkeypatch.setattr(
            "detector.commands.predict.draw_objects",
            lambda *given, **shown: detector.inference.draw.draw(*given[:-1], **shown),
        )
    content = json.loads((tmp_path / "with" / "predictions.json").read_text())
    assert content["annotations"] and all(len(entry["keypoints"]) == 15 for entry in content["annotations"])
    drawn, plain = (cv2.imread(str(tmp_path / name / "1.png.png")) for name in ("with", "without"))
    assert drawn.shape == plain.shape and (drawn != plain).any()


def test_a_checkpoint_on_other_keypoints(points, five, tmp_path):
    points(five, "schedule.max_iterations=1", "schedule.warmup=0")
    best = tmp_path / "run" / "best.pt"
    three, mixed = five_points(tmp_path / "three", FIVE[:3]), five_points(tmp_path / "mixed", FIVE[::-1])
    for root, message in (
        (three, r"num_keypoints = 5: \S* has 3 keypoints.*iou_types=\[bbox\]"),
        (mixed, r"the keypoints of \S* are centre, .*order.*iou_types=\[bbox\]"),
    ):
        given = options(best, "workers=0", "threads=1", f"data.root={root}", f"output={tmp_path / 'eval'}")
        with pytest.raises(ConfigError, match=message):
            evaluate_checkpoint(**arguments("eval", given))
        assert not (tmp_path / "eval").exists()
        assert evaluate_checkpoint(**arguments("eval", [*given, "iou_types=[bbox]"])).keys() == {"bbox", "per_class"}
        shutil.rmtree(tmp_path / "eval")


def test_points_are_drawn_where_they_are():
    picture = detector.inference.draw.draw(
        np.full((800, 800, 3), 255, np.uint8),
        np.array([[100.0, 100, 700, 700]]),
        np.array([1]),
        ["card"],
        keypoints=np.array([[[300.5, 400.5, 2], [500.5, 600.5, 1], [400, 400, 0]]]),
    )
    assert (picture[400, 300] != 255).any() and (picture[600, 500] != 255).any() and (picture[400, 400] == 255).all()
