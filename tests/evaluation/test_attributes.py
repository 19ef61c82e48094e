"""How well attributes are told: against plain loops, and from the training to the tables."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import detector
from detector.commands.evaluate import evaluate_checkpoint
from detector.commands.predict import predict_files
from detector.config import ConfigError
from detector.data.read_coco import read_coco
from detector.engine.train import train
from detector.evaluation.attributes import attribute_metrics
from detector.evaluation.fit import check_training
from detector.heads import AttributeHead
from detector.heads.box import SampledRoIs
from detector.inference.draw import note
from detector.roi import RoIAlign
from detector.structures import Detections, Targets
from tests.data.coco_files import minimal
from tests.runs import TINY, checked
from tests.untrained import arguments

GROUPS = [["near"], ["half", "left", "right"]]


def head(**settings) -> AttributeHead:
    torch.manual_seed(0)
    return AttributeHead(4, [4], 1, roi=RoIAlign, **{"attributes": GROUPS} | settings)


def test_the_loss_is_the_mean_over_what_is_known():
    model = head(loss_weight=2.0)
    codes = torch.tensor([[[1, -1], [0, 1], [-1, -1], [-1, 0]]])
    rois = torch.tensor([[0.0, 2, 3, 20, 30], [0, 5, 5, 40, 20], [0, 1, 1, 9, 9], [0, 8, 8, 30, 30]])
    rows = SampledRoIs(torch.tensor([1.0, 1, 1, 0]), rois, torch.ones(4).long(), torch.arange(4))
    targets = Targets(rois[None, :, 1:], torch.ones(1, 4).long(), torch.ones(1, 4).bool(), torch.zeros(1, 4).bool())
    prediction = model([torch.randn(1, 4, 16, 16)], rois)
    loss = model.losses(prediction, rows, targets._replace(attributes=codes))["loss_attributes"]
    near, half = prediction.logits[:, 0], prediction.logits[:, 1:]
    terms = [-F.logsigmoid(near[0]), -F.logsigmoid(-near[1]), -half[1].log_softmax(0)[1]]
    torch.testing.assert_close(loss, 2 * sum(terms) / 3)
    nothing = model.losses(prediction, rows, targets._replace(attributes=torch.full_like(codes, -1)))
    assert nothing["loss_attributes"] == 0


def test_probabilities_their_words_and_nothing_found():
    model = head()
    boxes = torch.tensor([[[2.0, 3, 20, 30], [0, 0, 0, 0]]])
    found = Detections(boxes, torch.ones(1, 2), torch.ones(1, 2).long(), torch.tensor([[True, False]]))
    maps = [torch.randn(1, 4, 16, 16)]
    values = model.detect(maps, found)["attributes"]
    logits = model(maps, torch.tensor([[0, 2.0, 3, 20, 30]])).logits[0]
    torch.testing.assert_close(values[0, 0], torch.cat([logits[:1].sigmoid(), logits[1:].softmax(0)]))
    assert (values[0, 1] == 0).all()
    none = found._replace(valid=torch.zeros(1, 2).bool())
    assert model.detect(maps, none)["attributes"].shape == (1, 2, 3)
    said = model.writers["attributes"](np.array([0.75, 0.2, 0.8], np.float32))
    assert said == {"near": 0.75, "half": {"left": 0.2, "right": 0.8}}
    assert note({"attributes": said, "fill": 0.9}) == "near, right" and note({"attributes": {"near": 0.4}}) == ""
    assert note({"segmentation": {"size": [4, 5], "counts": "0"}, "bbox": [1, 2, 3, 4], "own": {"x": "y"}}) == ""


@pytest.mark.parametrize("groups", [[["a"], ["a"]], [["a", "x"]], [["a", "x", "x"]], [[]]])
def test_attributes_that_cannot_be_told_apart(groups):
    with pytest.raises(ValueError, match="names and words that each occur once"):
        head(attributes=groups)


def plain_average_precision(pairs) -> float:
    """Of (score, is right): precision among all that score as high as each positive, by loops."""
    values = []
    for score, right in pairs:
        if right:
            above = [r for s, r in pairs if s >= score]
            values.append(sum(above) / len(above))
    return sum(values) / len(values)


def test_numbers_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    coco, results, known = minimal(), [], []
    first = coco["annotations"][0]
    coco["annotations"] = []
    for i in range(30):
        said = {"near": bool(rng.random() < 0.5), "half": ("left", "right")[rng.integers(2)]}
        said = {name: value for name, value in said.items() if rng.random() < 0.8}
        box = [2 + 9 * (i % 6), 2 + 8 * (i // 6), 8, 7]
        coco["annotations"].append({**first, "id": i + 1, "bbox": box, "attributes": said, "segmentation": []})
        entry = {"image_id": 7, "category_id": 5, "bbox": [box[0] + 1, *box[1:]], "score": float(rng.random())}
        right = round(float(rng.random()), 1)
        entry["attributes"] = {"near": round(float(rng.random()), 1), "half": {"left": 1 - right, "right": right}}
        worse = {**entry, "score": entry["score"] / 2, "attributes": {"near": 0.5, "half": {"left": 0.5, "right": 0.5}}}
        if i % 5:
            results += [worse, entry]
            known.append((said, entry["attributes"]))
        else:  # of another class, and too far away
            results += [{**entry, "category_id": 2}, {**entry, "bbox": [box[0] + 5, *box[1:]]}]
    rng.shuffle(results)
    truth = read_coco(coco, attributes=True).truth
    found = attribute_metrics(truth, results, per_attribute=True)
    near = [(e["near"], s["near"]) for s, e in known if "near" in s]
    halves = [(e["half"], s["half"]) for s, e in known if "half" in s]
    table, average = found["per_attribute"], []
    average.append(plain_average_precision(near))
    assert table["near"]["AP"] == pytest.approx(average[0])
    assert table["near"]["objects"] == len(near) and table["near"]["positives"] == sum(r for _, r in near)
    for word in ("left", "right"):
        average.append(plain_average_precision([(e[word], s == word) for e, s in halves]))
        assert table[f"half={word}"]["AP"] == pytest.approx(average[-1])
    right = [sum((s >= 0.5) == r for s, r in near) / len(near)]
    right.append(sum(("left" if e["left"] >= e["right"] else "right") == s for e, s in halves) / len(halves))
    assert [table["near"]["accuracy"], table["half"]["accuracy"]] == pytest.approx(right)
    assert found["AP"] == pytest.approx(sum(average) / 3) and found["accuracy"] == pytest.approx(sum(right) / 2)
    said = [bool(entry["attributes"]) for entry in coco["annotations"]]
    assert found["found"] == pytest.approx(sum(s for i, s in enumerate(said) if i % 5) / sum(said))
    nothing = attribute_metrics(truth, [])
    assert nothing == {"AP": -1.0, "accuracy": -1.0, "found": 0.0}


@pytest.fixture(scope="module")
def data(shapes_tiny, tmp_path_factory):
    """The tiny shapes: each object says in which half of the image it is, and every second one whether it is large."""
    root = tmp_path_factory.mktemp("attributes") / "data"
    shutil.copytree(shapes_tiny, root)
    for file in (root / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        for number, entry in enumerate(content["annotations"]):
            x, _, width, _ = entry["bbox"]
            entry["attributes"] = {"half": "left" if x + width / 2 < 48 else "right"}
            entry["attributes"] |= {"large": entry["area"] > 500} if number % 2 else {}
        file.write_text(json.dumps(content))
    return root


SETTINGS = [text for text in TINY if "mask_head" not in text] + [
    *("model=attribute_rcnn", "model.extra_heads.attributes.trunk.fc_channels=[16]", "data.masks=false"),
    *("data=custom", "model.box_head.score_threshold=0.0", "schedule.max_iterations=2", "schedule.warmup=0"),
]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("attributes") / "run"
    train(checked(*SETTINGS, "data.attributes=true", f"data.root={data}", f"run_dir={run}"))
    return run


def test_from_the_training_to_the_tables(trained, data, capsys):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert all(line["loss_attributes"] > 0 for line in lines if "loss" in line)
    assert {"AP", "accuracy", "found"} == {*json.loads((trained / "metrics.json").read_text())["attributes"]}
    options = {"checkpoint": trained / "last.pt", "device": "cpu", "workers": 0, "batch_size": 4, "threads": 1}
    metrics = evaluate_checkpoint(**arguments("eval", [f"{key}={value}" for key, value in options.items()]))
    assert [*metrics["per_attribute"]] == ["half", "half=left", "half=right", "large"]
    folder = trained / "eval_last"
    table = (folder / "attributes.csv").read_text().splitlines()
    assert table[0] == "attribute,objects,positives,AP,accuracy" and table[1].startswith("half,")
    shown = capsys.readouterr().out
    assert "attributes: AP " in shown and "half=left" in shown and "half=left" in (folder / "table.txt").read_text()
    results = json.loads((folder / "predictions.json").read_text())
    assert all({*entry["attributes"]} == {"half", "large"} for entry in results)


def test_predictions_have_them(trained, data, tmp_path):
    model, image = detector.load(trained / "last.pt"), data / "val" / "000000.jpg"
    found = model.predict(image, threshold=0.0)
    said = found.to_coco()[0]["attributes"]
    assert sum(said["half"].values()) == pytest.approx(1, abs=1e-3) and found.notes()[0].split(", ")[0] in said["half"]
    assert np.asarray(found.draw()).shape != np.asarray(found.draw(labels=False)).shape or not np.array_equal(
        np.asarray(found.draw()), np.asarray(found._replace(extra=None).draw())
    )
    predict_files(str(trained / "last.pt"), str(image), threshold=0.0, output=str(tmp_path), device="cpu")
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert content["annotations"][0]["attributes"] == said


def test_a_model_and_data_that_do_not_fit(data, shapes_tiny, tmp_path):
    settings = [*SETTINGS, f"run_dir={tmp_path}"]
    with pytest.raises(ConfigError, match=r"data\.attributes = False.*data\.attributes=true reads them"):
        train(checked(*settings, f"data.root={data}"))
    with pytest.raises(ConfigError, match=r"_train\.json has attributes.*~model\.extra_heads\.attributes trains"):
        train(checked(*settings, f"data.root={shapes_tiny}", "data.attributes=true"))
    with pytest.raises(ConfigError, match=r"attributes = \[\['large'\]\]: .* null takes the data's"):
        own = "model.extra_heads.attributes.attributes=[[large]]"
        train(checked(*settings, f"data.root={data}", "data.attributes=true", own))
    assert not checked(*settings, f"data.root={data}", "~model.extra_heads.attributes").model.extra_heads  # as advised
    heads = {"mask_head": None, "keypoint_head": None, "extra_heads": {"a": head(attributes=[["large"]])}}
    found = read_coco(data / "annotations" / "instances_train.json", attributes=["large"])
    check_training(
        SimpleNamespace(**heads), SimpleNamespace(annotations=found, origin="x", attributes=["large"])
    )  # as advised
