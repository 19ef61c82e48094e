"""From which score on detections are shown: counted by brute force, chosen, stored, and used by predict."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import detector
from detector import checkpoint as checkpoints
from detector.commands.evaluate import evaluate_checkpoint
from detector.commands.predict import predict_files
from detector.comparison.statistics import match
from detector.evaluation.coco import check_annotations
from detector.evaluation.operating_point import (
    SCORES,
    Counts,
    check_threshold,
    choose,
    describe,
    kept_matches,
    operating_point,
    thresholds,
)
from detector.inference.predict import passing
from detector.ops.checks import ConfigError

NAMES = ["cat", "dog"]


@pytest.fixture(scope="module")
def files():
    """(annotations, results): 30 images of 100 px, two classes, a crowd in each, detections right and wrong."""
    rng = np.random.default_rng(0)
    objects, results = [], []
    for image in range(1, 31):
        for k in range(4):
            box = [25.0 * k, *rng.uniform(0, 60, 1).tolist(), 20.0, 30.0]
            kind = {"image_id": image, "category_id": int(rng.integers(1, 3))}
            objects.append({"id": len(objects) + 1, **kind, "bbox": box, "area": 600, "iscrowd": int(k == 3)})
            for _ in range(rng.integers(0, 3)):
                moved = [box[0] + rng.normal(0, 4), *box[1:]]
                kind["category_id"] = kind["category_id"] if rng.random() < 0.8 else 3 - kind["category_id"]
                right = abs(moved[0] - box[0]) < 6
                score = float(np.float32(rng.beta(4, 2) if right else rng.beta(2, 4)))
                results.append({**kind, "bbox": moved, "score": score})
    images = [{"id": i, "width": 100, "height": 100, "file_name": f"{i}.png"} for i in range(1, 31)]
    categories = [{"id": k, "name": name} for k, name in enumerate(NAMES, 1)]
    return {"images": images, "annotations": objects, "categories": categories}, results


@pytest.fixture(scope="module")
def point(files):
    return operating_point(kept_matches(*files), "bbox", samples=100)


@pytest.mark.parametrize("limit", [100, 1])
def test_matches_are_those_that_coco_keeps(files, limit):
    """The same as the comparison's own matching finds, crowds and limits included."""
    kept, other = kept_matches(*files, limit=limit), match(*files, limit=limit)
    np.testing.assert_array_equal(kept.objects, other.objects[:, :, 0])

    def rows(matches, true, false):
        return sorted(zip(*(a.tolist() for a in (matches.image, matches.category, matches.score, true, false))))

    assert rows(kept, kept.true, kept.false) == rows(other, other.true[:, 0, 0], other.false[:, 0, 0])
    assert (~kept.true & ~kept.false).any() or limit == 1  # on crowds


def brute(files, least: float, name: str | None = None) -> dict[str, float]:
    """F1, precision and recall of the results of at least a score, matched anew."""
    annotations, results = files
    kept = kept_matches(annotations, [r for r in results if r["score"] >= least])
    rows = np.ones(len(kept.score), bool) if name is None else kept.category == NAMES.index(name)
    objects = kept.objects.sum() if name is None else kept.objects[:, NAMES.index(name)].sum()
    true, false = kept.true[rows].sum(), kept.false[rows].sum()
    return {"f1": 2 * true / (objects + true + false), "precision": true / (true + false), "recall": true / objects}


@pytest.mark.parametrize("name", [None, "dog"])
def test_the_chosen_score_is_the_best(files, point, name):
    chosen = point["all"] if name is None else point["classes"][name]
    score = chosen["threshold"][0]
    expected = brute(files, score, name)
    assert {key: chosen[key][0] for key in expected} == pytest.approx(expected)
    best = max(brute(files, least, name)["f1"] for least in SCORES[:190:6])
    assert expected["f1"] >= best and 0.1 < score < 0.9
    for key in ("threshold", *expected):
        value, low, high = chosen[key]
        assert low <= value <= high and low < high, key


def test_wished_precision_and_recall(files):
    kept = kept_matches(*files)
    for name, other, share in (("precision", "recall", 0.6), ("recall", "precision", 0.4)):
        wished = {name: share}
        found = operating_point(kept, "bbox", wished, samples=50)
        score = found["all"]["threshold"][0]
        assert found["all"][name][0] >= share and found["all"][name][0] == pytest.approx(brute(files, score)[name])
        able = [numbers[other] for least in SCORES[:190:6] if (numbers := brute(files, least))[name] >= share]
        assert found["all"][other][0] >= max(able) - 1e-9
        f1 = operating_point(kept, "bbox", samples=2)
        assert thresholds(f1, wished, NAMES)[0] == score
        assert f"{name} {found['all'][name][0]:.3f}" in thresholds(f1, wished, NAMES)[1]
        assert f"{name} of at least {share}" in describe(found)
    with pytest.raises(ConfigError, match=r"no score has recall 1; the most is 0\.\d+"):
        thresholds(f1, {"recall": 1.0}, NAMES)


def test_equal_images_leave_no_doubt_and_the_middle_of_equals_is_chosen():
    image = {"width": 9, "height": 9}
    box = {"category_id": 1, "bbox": [0, 0, 5, 5]}
    annotations = {
        "images": [{"id": i, "file_name": f"{i}", **image} for i in (1, 2, 3)],
        "annotations": [{"id": i, "image_id": i, "area": 25, "iscrowd": 0, **box} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    results = [{"image_id": i, "score": 0.8, **box} for i in (1, 2, 3)]
    results += [{"image_id": i, "score": 0.4, "category_id": 1, "bbox": [6, 6, 2, 2]} for i in (1, 2, 3)]
    found = operating_point(kept_matches(annotations, results), "bbox", samples=20)
    assert found["all"]["threshold"] == [0.6, 0.6, 0.6] and found["all"]["f1"] == [1, 1, 1]
    assert found["classes"]["dog"] == {"objects": 0, "threshold": None, "f1": None, "precision": None, "recall": None}
    nothing = operating_point(kept_matches(annotations, []), "bbox", samples=20)
    assert nothing["all"]["threshold"] is None and "no score has best F1" in describe(nothing)
    assert thresholds(nothing, "best", NAMES)[0] == 0.5
    assert json.loads(json.dumps(found)) == found


def test_choose_for_many_at_once():
    true, false = np.zeros((2, 201)), np.zeros((2, 201))
    true[0, :101], false[0, :51] = 5, 5
    assert choose(Counts(true, false, np.array([5, 5]))).tolist() == [75, -1]
    assert choose(Counts(true, false, np.array([5, 5])), {"precision": 0.9}).tolist() == [51, -1]
    assert choose(Counts(true, false, np.array([10, 0])), {"recall": 0.5}).tolist() == [100, -1]


def test_thresholds_of_each_class(point):
    least, text = thresholds(point, "per_class", [*NAMES, "emu"])
    own = [point["classes"][name]["threshold"][0] for name in NAMES]
    assert least.tolist() == [*own, point["all"]["threshold"][0]] and own[0] != own[1]
    assert "best F1 of each class, of 1 with fewer than 20 objects that of all" in text
    rare = point | {"classes": point["classes"] | {"dog": point["classes"]["dog"] | {"objects": 19}}}
    assert thresholds(rare, "per_class", NAMES)[0].tolist() == [own[0], point["all"]["threshold"][0]]
    scores, labels = torch.tensor([0.5, 0.5, 0.7]), torch.tensor([1, 2, 2])
    assert passing(scores, labels, np.array([0.4, 0.6])).tolist() == [True, False, True]
    assert passing(scores.numpy(), labels.numpy(), np.array([0.4, 0.6])).tolist() == [True, False, True]
    assert passing(scores, labels, 0.6).tolist() == [False, False, True]


def test_lvis_counts_what_was_looked_for(files):
    annotations, results = json.loads(json.dumps(files))
    annotations["annotations"] = [a | {"iscrowd": 0} for a in annotations["annotations"] if not a["iscrowd"]]
    for image in annotations["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for category in annotations["categories"]:
        category["frequency"] = "f"
    usual, federated = (kept_matches(each, results) for each in (files[0], annotations))
    held = {(a["image_id"], a["category_id"]) for a in annotations["annotations"]}
    assert check_annotations(annotations).federated
    assert {(i + 1, k + 1) for i, k in zip(federated.image.tolist(), federated.category.tolist())} <= held
    assert federated.true.sum() == usual.true.sum()


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (30, r"threshold = 30: must be a score from 0 to 1; 30 % is threshold=0\.3"),
        (-0.1, r"threshold = -0\.1: must be a score from 0 to 1$"),
        (1.5, "must be a score from 0 to 1; 1.5 % is threshold=0.015"),
        (101, r"threshold = 101: must be a score from 0 to 1$"),
        ("Best", "threshold = 'Best': must be a score from 0 to 1, best, per_class"),
        (True, "threshold = True: must be a score"),
        ({"precision": 90}, r"choose f1, \{precision: 0\.9\} or .*; shares go from 0 to 1, 90 % is 0\.9"),
        ({"f2": 0.9}, "choose f1"),
        ({"precision": 0.9, "recall": 0.9}, "choose f1"),
    ],
)
def test_thresholds_that_cannot_be(threshold, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        check_threshold(threshold)
    with pytest.raises(ConfigError, match=message):
        predict_files("gone.pt", "gone", threshold=threshold)


def test_a_run_keeps_the_operating_point_of_its_best_evaluation(run):
    folder = run("evaluation.every=4")
    best = checkpoints.load(folder / "best.pt")
    stored = best["operating_point"]
    assert stored["iou_type"] == "segm" and stored["images"] == 8 and stored["criterion"] == "f1"
    assert set(stored["counts"]["true"]) == {*best["categories"]} and sum(stored["counts"]["objects"].values()) == 39
    assert detector.load(folder / "last.pt").operating_point == stored
    assert describe(stored) in (folder / "train.log").read_text()


def test_predict_uses_what_is_stored(state, shapes_tiny, point, tmp_path, capsys, monkeypatch):
    photo, best = min((shapes_tiny / "val").iterdir()), tmp_path / "best.pt"
    every = detector.load(state).predict(photo, threshold=0)
    least = every.scores[6].item() - 1e-6
    stored = point | {"all": point["all"] | {"threshold": [least, least, least]}}
    checkpoints.save(state | {"operating_point": stored}, best)
    model = detector.load(best)
    found = model.predict(photo)
    assert model.operating_point == stored and found.threshold == least and len(found.boxes) == 7
    assert model.predict([photo], threshold=0.0)[0].threshold == 0
    tiled = model.predict(photo, tiles={"size": 64})
    assert tiled.threshold == least and tiled.scores.min() >= least
    predict_files(str(best), str(photo), output=str(tmp_path / "found"), device="cpu", draw=False)
    shown = capsys.readouterr().out
    assert f"{model.least_score('best')[1]}; threshold=0.3 and the like" in shown and "7 objects in 1 images" in shown

    checkpoints.save_safetensors(checkpoints.load(best), tmp_path / "best.safetensors")
    assert detector.load(tmp_path / "best.safetensors").operating_point == stored

    options = {"device": "cpu", "workers": 0, "batch_size": 8}
    evaluate_checkpoint(str(best), operating_point={"recall": 0.01}, **options)
    again = detector.load(best).operating_point  # what eval has left beside the checkpoint, of the same weights
    assert again["criterion"] == {"recall": 0.01} and describe(again) in capsys.readouterr().out
    file = tmp_path / "eval_best" / "operating_point.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"iteration": 7}))
    assert detector.load(best).operating_point == stored


def test_checkpoints_without_an_operating_point(state, shapes_tiny, caplog):
    photo = min((shapes_tiny / "val").iterdir())
    model = detector.load(state)
    found = model.predict([photo, photo])
    assert found[0].threshold == 0.5 == model.least_score("best")[0]
    model.predict(photo)
    assert caplog.text.count("threshold 0.5: the checkpoint has no operating point; threshold=0.3 and the like") == 1
    with pytest.raises(
        ConfigError, match=r"the checkpoint has no operating point\. Give a score, or evaluate it first"
    ):
        model.predict(photo, threshold="per_class")
    spoilt = detector.load(state | {"operating_point": {"all": 3}})
    with pytest.raises(ConfigError, match=r"operating point cannot be read .*give a threshold, such as 0\.5"):
        spoilt.predict(photo)
    assert spoilt.predict(photo, threshold=0.5).threshold == 0.5
