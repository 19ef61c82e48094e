"""A model and data that do not fit end before the first step, and what the message advises works."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from detector.config import ConfigError
from detector.engine import setup
from detector.engine import train as loop
from detector.evaluation.fit import rehearse
from detector.settings import Evaluation
from tests.data.coco_files import FIVE, five_points

SHORT = ["schedule.max_iterations=1", "schedule.warmup=0"]


def refused(go, monkeypatch, tmp_path, message: str) -> None:
    """`go` raises a ConfigError that says `message` before the first step, and leaves no run behind."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "forward_backward", lambda *_, **__: pytest.fail("a step was taken"))
        with pytest.raises(ConfigError, match=message):
            go()
    assert not (tmp_path / "run" / "last.pt").exists()


def without(root, field: str, target, splits: str = "*"):
    """A copy of a data set whose objects lack a field, in one split or in both."""
    shutil.copytree(root, target)
    for file in (target / "annotations").glob(f"instances_{splits}.json"):
        content = json.loads(file.read_text())
        for entry in content["annotations"]:
            entry.pop(field, None)
        file.write_text(json.dumps(content))
    return target


def test_a_mask_model_on_data_that_are_read_without_masks(run, monkeypatch, tmp_path):
    message = r"data\.masks = False: .*data\.masks=true reads them, model\.mask_head=null"
    refused(lambda: run(*SHORT, "data.masks=false"), monkeypatch, tmp_path, message)
    run(*SHORT, "data.masks=false", "data.masks=true")
    run(*SHORT, "data.masks=false", "model.mask_head=null", f"run_dir={tmp_path / 'boxes'}")


def test_a_mask_model_on_data_without_masks(run, monkeypatch, tmp_path, shapes_tiny):
    data = f"data.root={without(shapes_tiny, 'segmentation', tmp_path / 'boxes')}"
    message = r"no object of \S*instances_train\.json has a segmentation.*model\.mask_head=null trains boxes alone"
    refused(lambda: run(*SHORT, data), monkeypatch, tmp_path, message)
    run(*SHORT, data, "model.mask_head=null")


def test_a_keypoint_model_on_data_that_are_read_without_keypoints(points, five, monkeypatch, tmp_path):
    message = r"data\.keypoints = False.*data\.keypoints=true reads them, model\.keypoint_head=null trains without"
    refused(lambda: points(five, *SHORT, "data.keypoints=false"), monkeypatch, tmp_path, message)
    points(five, *SHORT, "data.keypoints=false", "model.keypoint_head=null")


def test_a_keypoint_model_on_data_without_keypoints(points, monkeypatch, tmp_path, shapes_tiny):
    message = r"'keypoints' must be one list of names, there are \[\]; data\.keypoints=false"
    refused(lambda: points(shapes_tiny, *SHORT), monkeypatch, tmp_path, message)
    points(shapes_tiny, *SHORT, "data.keypoints=false", "model.keypoint_head=null")


def test_keypoints_that_nobody_labelled(points, monkeypatch, tmp_path):
    root = five_points(tmp_path / "data", visibility=0)
    message = r"no object of \S*_train\.json has a keypoint that is labelled.*model\.keypoint_head=null"
    refused(lambda: points(root, *SHORT), monkeypatch, tmp_path, message)
    points(root, *SHORT, "model.keypoint_head=null")


def test_another_number_of_keypoints(points, five, monkeypatch, tmp_path):
    message = r"num_keypoints = 17: \S* has 5 keypoints \(left_top, .*num_keypoints=5 or null"
    refused(lambda: points(five, *SHORT, "model.keypoint_head.num_keypoints=17"), monkeypatch, tmp_path, message)
    cfg = points(five, *SHORT, "model.keypoint_head.num_keypoints=5")
    assert cfg.model.keypoint_head.num_keypoints == 5
    cfg = points(five, *SHORT)  # continues the same run: null is the data's number
    assert cfg.model.keypoint_head.num_keypoints == 5


def test_keypoints_in_another_order(points, monkeypatch, tmp_path):
    root = five_points(tmp_path / "data", FIVE[::-1])
    train_file = five_points(tmp_path / "other") / "annotations" / "instances_train.json"
    shutil.copy(train_file, root / "annotations")
    message = "keypoints of .*instances_val.json are centre, .*those of the training set are left_top, .*their order"
    refused(lambda: points(root, *SHORT), monkeypatch, tmp_path, message)


def test_fall_offs_of_keypoints(points, run, five, monkeypatch, tmp_path):
    wrong = r"evaluation\.sigmas = \[0\.1, 0\.2\]: must be 5 positive numbers, one for each of left_top, "
    refused(lambda: points(five, *SHORT, "evaluation.sigmas=[0.1,0.2]"), monkeypatch, tmp_path, wrong)
    refused(lambda: points(five, *SHORT, "evaluation.sigmas=[0.1,0.1,0,0.1,0.1]"), monkeypatch, tmp_path, "positive")
    points(five, *SHORT, "evaluation.sigmas=[0.1,0.1,0.1,0.1,0.1]")
    message = r"evaluation\.sigmas = \[0\.1\]: no keypoints are measured; evaluation\.sigmas=null"
    other = tmp_path / "other"
    refused(lambda: run(f"run_dir={other / 'run'}", "evaluation.sigmas=[0.1]"), monkeypatch, other, message)


def test_a_metric_that_will_not_be_measured(run, monkeypatch, tmp_path):
    boxes = [*SHORT, "model.mask_head=null", "evaluation.metric=segm.AP"]
    with pytest.raises(ConfigError) as found, monkeypatch.context() as patch:
        patch.setattr(loop, "forward_backward", lambda *_, **__: pytest.fail("a step was taken"))
        run(*boxes)
    assert str(found.value).startswith("evaluation.metric = 'segm.AP': is not measured; choose auto, bbox.AP or ")
    choices = re.split(", | or ", str(found.value).partition("choose ")[2])
    assert len(choices) == 13 and all(Evaluation(metric=choice) for choice in choices)
    run(*boxes, "evaluation.metric=bbox.ARl")


def test_a_metric_of_masks_that_the_validation_set_lacks(run, monkeypatch, tmp_path, shapes_tiny):
    data = f"data.root={without(shapes_tiny, 'segmentation', tmp_path / 'data', 'val')}"
    message = r"evaluation\.metric = 'segm\.AP': is not measured; choose auto, bbox\.AP"
    refused(lambda: run(*SHORT, data, "evaluation.metric=segm.AP"), monkeypatch, tmp_path, message)
    run(*SHORT, data)


def test_as_many_detections_are_kept_as_are_counted(config, run, caplog, monkeypatch):
    """Unless the command line says otherwise, which a warning answers; a resumed run may count more than before."""
    wide = "evaluation.max_detections=[1,10,300]"
    with caplog.at_level("INFO", "detector"):
        cfg = config(wide)
        setup.fit(cfg, *setup.datasets(cfg), Evaluation(max_detections=[1, 10, 300]))
    assert cfg.model.box_head.detections_per_image == 300
    assert "detections_per_image = 300, not 100: as many as evaluation.max_detections counts" in caplog.text
    monkeypatch.setattr(setup, "overridden", lambda: {"model.box_head.detections_per_image"})
    cfg = config(wide, "model.box_head.detections_per_image=50")
    setup.keep_enough(cfg, 300)
    assert cfg.model.box_head.detections_per_image == 50 and "= 50 keeps fewer" in caplog.text
    monkeypatch.undo()
    folder = run(*SHORT)
    assert folder == run(*SHORT, "schedule.max_iterations=2", wide)
    assert "AR300" in json.loads((folder / "metrics.json").read_text())["bbox"]
    with pytest.raises(ConfigError, match="max_detections"):
        run(*SHORT, "evaluation.max_detections=[10,1]")


def test_limits_that_an_ap_has_by_its_definition_are_not_set(config, shapes_tiny, tmp_path, monkeypatch):
    """LVIS's AP counts 300 of an image, VOC's all: another number is refused, and what is advised works."""
    data = shutil.copytree(shapes_tiny, tmp_path / "lvis")
    for file in (data / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        for image in content["images"]:
            image |= {"neg_category_ids": [1, 2, 4, 5, 8], "not_exhaustive_category_ids": []}
        file.write_text(json.dumps(content))
    cfg = config(f"data.root={data}")
    sets, usual = setup.datasets(cfg), Evaluation()
    with pytest.raises(ConfigError, match=r"^evaluation\.max_detections = \[1, 10, 500\]: .*LVIS's AP counts") as found:
        setup.fit(cfg, *sets, Evaluation(max_detections=[1, 10, 500]))
    advised = dict(re.findall(r"([\w.]+)=(\S+)", str(found.value)))
    assert json.loads(advised["evaluation.max_detections"]) == list(usual.max_detections)
    cfg = config(
        f"data.root={data}", f"model.box_head.detections_per_image={advised['model.box_head.detections_per_image']}"
    )
    setup.fit(cfg, *sets, usual)
    model, val_set = setup.skeleton(cfg), sets[1]
    with pytest.raises(ConfigError, match=r"^max_detections = \[5\]: VOC's AP counts all"):
        rehearse(model, setup.datasets(config())[1], iou_types=["voc"], max_detections=[5])
    assert rehearse(model, val_set, iou_types=["voc"])["voc"]["AP50"] == 0
