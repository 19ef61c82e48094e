"""FROC against its definition, by image and by series."""

from __future__ import annotations

import json

import numpy as np
import pytest

from detector.commands import evaluate
from detector.data import read_coco
from detector.data.plain import series_of
from detector.data.read_coco import read_truth
from detector.data.several import read_truths
from detector.evaluation.froc import RATES, curve, froc, froc_by_series, froc_table, write_froc
from detector.evaluation.operating_point import kept_matches


def case(images: int = 12, seed: int = 0) -> tuple[dict, list[dict]]:
    """COCO with two objects an image, and results that find some, with wrong ones beside them."""
    random = np.random.default_rng(seed)
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    results = []
    for image in range(1, images + 1):
        truth["images"].append({"id": image, "file_name": f"s{image // 5}.tif#page={image}", "height": 99, "width": 99})
        for k in (1, 2):
            box = [10.0 * k, 10.0, 20.0, 20.0]
            entry = {"id": len(truth["annotations"]) + 1, "image_id": image, "category_id": k, "bbox": box, "area": 400}
            truth["annotations"].append(entry | {"iscrowd": 0})
            if random.random() < 0.7:
                results.append({"image_id": image, "category_id": k, "bbox": box, "score": float(random.random())})
            for _ in range(random.integers(0, 4)):
                wrong = {"image_id": image, "category_id": k, "bbox": [60.0, 60.0, 20.0, 20.0]}
                results.append(wrong | {"score": round(float(random.random()), 1)})
    return truth, results


def by_definition(kept, rate: float) -> float:
    """The best sensitivity of all thresholds with at most `rate` wrong detections an image."""
    best = 0.0
    for threshold in [*np.unique(kept.score), 2.0]:
        shown = kept.score >= threshold
        if (kept.false & shown).sum() <= rate * len(kept.image_ids):
            best = max(best, (kept.true & shown).sum() / kept.objects.sum())
    return best


@pytest.mark.parametrize("seed", range(4))
def test_sensitivities_are_their_definition(seed):
    truth, results = case(seed=seed)
    kept = kept_matches(truth, results)
    found = froc(kept, samples=50)
    for rate in RATES:
        value, low, high = found["all"]["sensitivity"][f"{rate:g}"]
        assert value == pytest.approx(by_definition(kept, rate), abs=1e-5) and low <= high
    values = [triple[0] for triple in found["all"]["sensitivity"].values()]
    assert values == sorted(values) and found["all"]["mean"][0] == pytest.approx(np.mean(values), abs=1e-4)
    assert found["all"]["mean"][1] <= found["all"]["mean"][0] <= found["all"]["mean"][2]
    assert {"a", "b"} <= set(found) and found["a"]["objects"] == 12


def test_nothing_found_and_everything_found():
    none = curve(np.zeros(0, int), np.zeros(0), np.zeros(0, bool), np.array([2, 1]), samples=10)
    assert none["mean"] == [0, 0, 0] and none["objects"] == 3
    everything = curve(np.array([0, 1]), np.array([0.9, 0.5]), np.ones(2, bool), np.array([1, 1]), samples=10)
    assert everything["mean"] == [1, 1, 1]


def test_a_lesion_of_a_series_counts_once():
    """Two lesions over three slices each; one is found in one slice, the other never, with a wrong detection."""
    boxes = {1: [10.0, 10.0, 20.0, 20.0], 2: [50.0, 50.0, 20.0, 20.0]}
    images = [{"id": i, "file_name": f"{i}.png", "height": 99, "width": 99, "series": "p"} for i in (1, 2, 3)]
    images += [{"id": 9, "file_name": "9.png", "height": 99, "width": 99, "series": "q"}]
    objects = [(image, track) for image in (1, 2, 3) for track in (1, 2)]
    annotations = [
        {"id": n, "image_id": i, "category_id": 1, "bbox": boxes[t], "area": 400, "iscrowd": 0, "track_id": t}
        for n, (i, t) in enumerate(objects, 1)
    ]
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    results = [{"image_id": 2, "category_id": 1, "bbox": boxes[1], "score": 0.9}]
    results += [{"image_id": 9, "category_id": 1, "bbox": boxes[2], "score": 0.8}]
    found = froc_by_series(truth, results, "bbox")
    assert found["series"] == 2 and found["all"]["objects"] == 2
    assert [triple[0] for triple in found["all"]["sensitivity"].values()] == [0.5] * len(RATES)
    assert "a series" in froc_table(found)
    alone = {**truth, "images": [{**image, "series": image["id"]} for image in images]}
    assert froc_by_series(alone, results, "bbox") is None


def test_series_are_told_by_fields_pages_and_folders():
    assert series_of("a/v.tif#page=3") == "a/v.tif" and series_of("p/1.dcm") == "p"
    assert series_of("x.png", 4) == "series 4" and series_of("x.png") is None
    assert series_of("x.png", None, 0) == "video 0"


def test_plain_and_odd_records_tell_the_same_series_and_tracks(tmp_path):
    """Read many at a time or one by one, of one file or of two, whose numbers are apart."""
    truth = case()[0]
    for n, (image, entry) in enumerate(zip(truth["images"], truth["annotations"])):
        image |= {"series": "s"} if n % 3 == 0 else {"video_id": n % 3}
        entry |= {"track_id": [0, "0", 1.5, None][n % 4]}
    odd = {**truth, "annotations": [{**entry, "area": str(entry["area"])} for entry in truth["annotations"]]}
    odd["images"] = [{**image, "width": str(image["width"])} for image in truth["images"]]
    read = []
    for name, content in (("plain", truth), ("odd", odd)):
        (tmp_path / name).write_text(json.dumps(content))
        read.append(read_truth(tmp_path / name))
    plain, other = read
    assert {*plain.series.tolist()} == {0, 1, 2} and -1 in plain.tracks and plain.tracks.max() == 2
    assert plain.series.tolist() == other.series.tolist() and plain.tracks.tolist() == other.tracks.tolist()
    part = plain.select(np.array([3, 1]))
    assert part.series.tolist() == plain.series[[3, 1]].tolist()
    assert part.tracks.tolist() == [t for i in (3, 1) for t in plain.tracks[plain.images_of() == i]]
    both = read_truths([tmp_path / "plain", tmp_path / "odd"])
    for column in ("series", "tracks"):
        first, second = np.split(getattr(both, column), 2)
        assert first.tolist() == getattr(plain, column).tolist() and not {*first[first >= 0]} & {*second}
        assert second.tolist() == [v if v < 0 else v + first.max() + 1 for v in first.tolist()]


def test_the_file_and_the_tables(tmp_path):
    truth, results = case()
    (tmp_path / "t.json").write_text(json.dumps(truth))
    text = write_froc(read_coco(tmp_path / "t.json").truth, results, "bbox", 100, tmp_path)
    assert "an image" in text and "a series" in text and "1/8" in text
    numbers = json.loads((tmp_path / "froc.json").read_text())
    assert numbers["by_image"]["images"] == 12 and numbers["by_series"]["series"] == 3


@pytest.mark.slow
def test_a_training_and_eval_write_it(run, call):
    folder = run("evaluation.froc=true")
    numbers = json.loads((folder / "froc.json").read_text())
    assert numbers["by_image"]["images"] == 8 and set(numbers["by_image"]["all"]["sensitivity"]) == {
        f"{r:g}" for r in RATES
    }
    (folder / "froc.json").unlink()
    code, out, error = call(evaluate.main, f"checkpoint={folder / 'best.pt'}", "workers=0", "device=cpu", "threads=1")
    assert code == 0, error
    assert "false detections an image" in out
    assert json.loads((folder / "eval_best" / "froc.json").read_text()) == numbers
