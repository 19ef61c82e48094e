"""eval.py: a checkpoint and a data set in, the same numbers out however they are computed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import detector
from detector.checkpoint import save
from detector.commands.evaluate import evaluate_checkpoint, main, usual_folder
from detector.config import CONFIGS, ConfigError
from detector.data import build_dataset
from detector.data.contents import contents
from detector.evaluation import coco_metrics
from detector.inference.load import merge
from tests.untrained import arguments, configured, untrained


def options(checkpoint, **more):
    fixed = {"checkpoint": checkpoint, "device": "cpu", "workers": 0, "batch_size": 4, "threads": 1}
    return [f"{key}={value}" for key, value in (fixed | more).items()]


def test_evaluation_of_a_checkpoint(checkpoint, shapes_tiny, tmp_path, capsys):
    metrics = evaluate_checkpoint(**arguments("eval", options(checkpoint)))
    folder = checkpoint.parent / "eval_run"
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    truth = shapes_tiny / "annotations" / "instances_val.json"
    for kind in ("bbox", "segm"):
        assert metrics[kind] == coco_metrics(truth, folder / "predictions.json", kind, "pycocotools")
    assert len(json.loads((folder / "predictions.json").read_text())) == 8 * 20
    assert json.loads((folder / "about.json").read_text())["annotations"] == str(truth)
    assert "<h2>Confusion</h2>" in (folder / "report.html").read_text(encoding="utf-8")
    table = (folder / "table.txt").read_text()
    assert table.strip() in capsys.readouterr().out and "triangle" in table
    other = evaluate_checkpoint(
        **arguments("eval", options(checkpoint, evaluator="pycocotools", output=tmp_path / "other"))
    )
    assert other == metrics


def test_nothing_measured_is_lost_where_what_follows_fails(checkpoint, capsys, caplog, monkeypatch):
    module = sys.modules[evaluate_checkpoint.__module__]
    for name in ("class_table", "find_operating_point", "class_csv"):
        monkeypatch.setattr(module, name, lambda *_: 1 / 0)
    metrics = evaluate_checkpoint(**arguments("eval", options(checkpoint)))
    folder = checkpoint.parent / "eval_run"
    assert json.loads((folder / "metrics.json").read_text()) == metrics and (folder / "about.json").is_file()
    printed = capsys.readouterr().out
    assert (folder / "table.txt").read_text().strip() in printed and "metrics.json, predictions.json\n" in printed
    for what in ("table of classes", "operating point", "classes.csv"):
        assert f"no {what}: ZeroDivisionError: division by zero" in caplog.text


def test_proposals_are_of_no_class(shapes_tiny, tmp_path):
    """A model without a box head: one class, 'object', in tables and in what it predicts."""
    save(untrained(configured("model=rpn", f"data.root={shapes_tiny}")), tmp_path / "rpn.pt")
    metrics = evaluate_checkpoint(**arguments("eval", options(tmp_path / "rpn.pt", output=tmp_path)))
    assert metrics.keys() == {"bbox", "per_class"} and metrics["per_class"]["bbox"].keys() == {"object"}
    assert metrics["bbox"]["AR1000"] >= metrics["bbox"]["AR100"]
    truth = json.loads((shapes_tiny / "annotations" / "instances_val.json").read_text())
    rows = (tmp_path / "table.txt").read_text().splitlines()
    assert rows[-1].split()[:3] == ["object", str(len(truth["images"])), str(len(truth["annotations"]))]
    model = detector.load(tmp_path / "rpn.pt")
    found = model.predict(shapes_tiny / "val" / truth["images"][0]["file_name"], threshold=0)
    assert model.categories == ["object"] and set(found.labels.tolist()) == {1}


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output = '.*file': nothing can be written there \(File exists\)"):
        evaluate_checkpoint(**arguments("eval", options(checkpoint, output=tmp_path / "file")))


def test_another_data_set_and_other_thresholds(checkpoint, shapes_tiny, tmp_path):
    truth = json.loads((shapes_tiny / "annotations" / "instances_val.json").read_text())
    truth["categories"] = [c | {"id": c["id"] + 100} for c in truth["categories"]]  # mapped by name, not by id
    truth["annotations"] = [a | {"category_id": a["category_id"] + 100} for a in truth["annotations"]]
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps(truth))
    first = evaluate_checkpoint(**arguments("eval", options(checkpoint)))
    changed = {"data.val.annotations": moved, "output": tmp_path / "other"}
    assert evaluate_checkpoint(**arguments("eval", options(checkpoint, **changed))) == first
    changed["model.box_head.detections_per_image"] = 3
    evaluate_checkpoint(**arguments("eval", options(checkpoint, **changed)))
    assert len(json.loads((tmp_path / "other" / "predictions.json").read_text())) == 8 * 3
    written = (tmp_path / "other" / "metrics.json").read_bytes()
    with pytest.raises(ConfigError, match=r"output: \S*other holds the results on \S*moved\.json.*another folder"):
        evaluate_checkpoint(**arguments("eval", options(checkpoint, output=tmp_path / "other")))
    assert (tmp_path / "other" / "metrics.json").read_bytes() == written


def test_max_pixels_of_the_data(checkpoint):
    with pytest.raises(ConfigError, match=r"image over data\.max_pixels=5000: image \d+ 96 x 96"):
        evaluate_checkpoint(**arguments("eval", [*options(checkpoint), "data.max_pixels=5000"]))


def test_a_data_set_of_other_categories(checkpoint, shapes_tiny, tmp_path):
    truth = json.loads((shapes_tiny / "annotations" / "instances_val.json").read_text())
    truth["categories"][0]["name"] = "cat"
    (tmp_path / "cats.json").write_text(json.dumps(truth))
    with pytest.raises(ConfigError, match=r"data: .*cats.json: categories \['cat'\] are not among those of"):
        evaluate_checkpoint(
            **arguments("eval", options(checkpoint, **{"data.val.annotations": tmp_path / "cats.json"}))
        )


def script(*arguments, launcher=()):
    command = [sys.executable, *launcher, "eval.py", *map(str, arguments)]
    return subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_two_ranks_write_the_files_of_one(checkpoint, tmp_path):
    arguments = options(checkpoint, batch_size=2)
    one = script(*arguments, f"output={tmp_path / 'one'}")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    two = script(*arguments, f"output={tmp_path / 'two'}", launcher=[*launcher, "--rdzv-endpoint=localhost:0"])
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for name in ("metrics.json", "predictions.json", "table.txt", "classes.csv", "operating_point.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def test_another_data_set_has_its_own_folder(state, shapes_tiny, tmp_path):
    """The run's own keeps eval_<name>, wherever it lies; one with other annotations or other images does not."""
    data = state["config"]["data"]
    copied = tmp_path / "copy"
    shutil.copytree(shapes_tiny, copied)
    truth = json.loads((copied / "annotations" / "instances_val.json").read_text(encoding="utf-8"))
    (copied / "other.json").write_text(json.dumps(truth | {"info": {}}), encoding="utf-8")
    shutil.copytree(copied / "val", copied / "blurred")
    (copied / "blurred" / truth["images"][0]["file_name"]).write_bytes(b"other")
    held = {"val": contents(build_dataset(data, "val", state["config"]["augment"]))}

    def folder(known, **given) -> str:
        changed = arguments("eval", options("run.pt"))["data"] | {"root": given.get("root")}
        changed["val"] = {key: given.get(key) for key in ("images", "annotations")}
        dataset = build_dataset(merge(data, changed), "val", state["config"]["augment"])
        model = SimpleNamespace(config=state["config"], contents=known)
        return usual_folder(tmp_path / "run.pt", changed, model, dataset).name

    for known in (held, None):  # None: of older checkpoints
        assert folder(known) == folder(known, root=str(copied)) == "eval_run"
        assert folder(known, annotations="annotations/instances_val.json") == "eval_run"
        other = folder(known, root=str(copied), annotations="other.json")
        blurred = folder(known, root=str(copied), images="blurred")
        assert re.fullmatch(r"eval_run_other-[0-9a-f]{8}", other)
        assert re.fullmatch(r"eval_run_instances_val-[0-9a-f]{8}", blurred)


@pytest.mark.parametrize(
    "change, message",
    [
        ("evaluator=coco", "evaluator = 'coco'"),
        ("iou_types=[box]", "iou_types"),
        ("batchsize=3", "did you mean batch_size"),
        ("checkpoint=gone.pt", "gone.pt: there is no such checkpoint"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(call, checkpoint, change, message):
    code, _, errors = call(main, *options(checkpoint), change)
    assert code == 2 and message in errors and "Traceback" not in errors


def test_test_time_augmentation(checkpoint, tmp_path):
    evaluate_checkpoint(**arguments("eval", [*options(checkpoint, output=tmp_path / "plain")]))
    evaluate_checkpoint(**arguments("eval", [*options(checkpoint, output=tmp_path / "both"), "flip=true"]))
    plain, both = (json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("plain", "both"))
    assert len(plain) == len(both) and plain != both
    with pytest.raises(ConfigError, match=r"scales: scales=\[\]"):
        evaluate_checkpoint(**arguments("eval", [*options(checkpoint, output=tmp_path / "none"), "scales=[]"]))


@pytest.mark.parametrize(
    "given, lacking, message",
    [
        ("[]", False, r"nothing would be measured; choose among bbox, voc, segm, boundary, each once"),
        ("[segm,bbox,segm]", False, r"a type is there twice"),
        ("[bbox,keypoints]", False, r"'keypoints' needs keypoints, which the model does not predict"),
        ("[segm]", True, r"'segm' needs masks, which .*instances_val\.json.*; choose among bbox, voc, each once"),
        ("[boundary]", True, r"'boundary' needs masks"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_work(
    checkpoint, shapes_tiny, tmp_path, monkeypatch, given, lacking, message
):
    """And what the message offers instead can be measured."""
    root = shapes_tiny
    if lacking:
        root = tmp_path / "boxes"
        shutil.copytree(shapes_tiny, root)
        truth = json.loads((root / "annotations" / "instances_val.json").read_text())
        for entry in truth["annotations"]:
            del entry["segmentation"]
        (root / "annotations" / "instances_val.json").write_text(json.dumps(truth))
    common = options(checkpoint, **{"data.root": root})
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=f"iou_types = .*{message}") as found:
        patch.setattr("detector.commands.evaluate.evaluate", lambda *_, **__: pytest.fail("inference began"))
        evaluate_checkpoint(**arguments("eval", [*common, f"iou_types={given}"]))
    choices = re.search(r"choose among (.*), each once; null", str(found.value))[1].split(", ")
    metrics = evaluate_checkpoint(**arguments("eval", [*common, f"iou_types=[{','.join(choices)}]"]))
    assert [kind for kind in metrics if kind != "per_class"] == choices
    assert evaluate_checkpoint(**arguments("eval", [*common, "iou_types=null"])).keys() <= {*choices, "per_class"}


def test_proposals_are_measured_by_boxes_alone(shapes_tiny, tmp_path):
    save(untrained(configured("model=rpn", f"data.root={shapes_tiny}")), tmp_path / "rpn.pt")
    common = options(tmp_path / "rpn.pt", output=tmp_path)
    with pytest.raises(
        ConfigError, match=r"'segm' needs masks, which the model does not predict; choose among bbox, voc"
    ):
        evaluate_checkpoint(**arguments("eval", [*common, "iou_types=[segm]"]))
    assert evaluate_checkpoint(**arguments("eval", [*common, "iou_types=[voc]"])).keys() == {"voc", "per_class"}


@pytest.mark.slow
def test_more_detections_than_coco_counts(checkpoint, tmp_path, capsys, caplog):
    """max_detections reaches the box head, the metrics' names and the table; another checkpoint's evaluation has it."""
    wide = options(checkpoint, max_detections="[1,10,300]", output=tmp_path / "wide")
    metrics = evaluate_checkpoint(**arguments("eval", wide))
    assert "AR300" in metrics["bbox"] and "AR100" not in metrics["segm"]
    assert len(json.loads((tmp_path / "wide" / "predictions.json").read_text())) > 8 * 20
    about = json.loads((tmp_path / "wide" / "about.json").read_text())
    assert about["max_detections"] == [1, 10, 300]
    table = (tmp_path / "wide" / "table.txt").read_text()
    assert "AR300" in table and "count up to 300 detections of a class in an image, COCO's 100" in table
    assert table.strip() in capsys.readouterr().out and not caplog.records
    evaluate_checkpoint(**arguments("eval", [*wide, "model.box_head.detections_per_image=30"]))
    assert len(json.loads((tmp_path / "wide" / "predictions.json").read_text())) == 8 * 30
    assert "counts up to 300, but model.box_head.detections_per_image = 30" in caplog.text
    with pytest.raises(ConfigError, match=r"max_detections.*growing whole numbers"):
        evaluate_checkpoint(**arguments("eval", options(checkpoint, max_detections="[100,10]")))
