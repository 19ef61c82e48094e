"""KITTI and BDD100K as COCO, and AP by difficulty."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from detector.commands import driving as program
from detector.config import ConfigError
from detector.data import convert as converter
from detector.data.convert import convert
from detector.data.formats import Notes
from detector.evaluation.driving import by_difficulty

LINES = """Car 0.00 0 1.5 10.0 20.0 60.0 70.0 1.5 1.6 3.9 2.0 1.5 12.5 1.6
Van 0.00 0 1.5 70.0 20.0 90.0 40.0 1.5 1.6 3.9 2.0 1.5 30.0 1.6
Pedestrian 0.20 1 0.1 100.0 20.0 110.0 50.0 1.7 0.6 0.8 5.0 1.5 45.0 0.1
Truck 0.00 0 1.5 70.0 20.0 90.0 40.0 1.5 1.6 3.9 2.0 1.5 30.0 1.6
DontCare -1 -1 -10 0.0 0.0 9.0 9.0 -1 -1 -1 -1000 -1000 -1000 -10
"""


@pytest.fixture
def kitti(tmp_path):
    root = tmp_path / "kitti"
    for folder in ("training/label_2", "training/image_2", "ImageSets"):
        (root / folder).mkdir(parents=True)
    for number in ("000000", "000001"):
        (root / "training/label_2" / f"{number}.txt").write_text(LINES)
        Image.fromarray(np.zeros((90, 120, 3), np.uint8)).save(root / "training/image_2" / f"{number}.png")
    (root / "ImageSets/train.txt").write_text("000000\n")
    (root / "ImageSets/val.txt").write_text("000001\n")
    return root


def test_kitti(kitti, capsys):
    notes = Notes()
    coco = convert("kitti", kitti, ["training"], notes)
    assert len(coco["images"]) == 2 and coco["images"][0]["file_name"] == "training/image_2/000000.png"
    mine = [one for one in coco["annotations"] if one["image_id"] == 1]
    real = [one for one in mine if not one["iscrowd"]]
    assert [(one["category_id"], one["bbox"], one["distance"]) for one in real] == [
        (1, [10, 20, 50, 50], 12.5),
        (2, [100, 20, 10, 30], 45.0),
    ]
    assert real[1]["occluded"] == 1 and real[1]["truncated"] == 0.2
    assert sorted(one["category_id"] for one in mine if one["iscrowd"]) == [1, 1, 2, 3]  # the van; DontCare, thrice
    assert any("Truck objects are left out" in line for line in notes.lines())
    assert converter.main(["kitti", str(kitti)]) == 0 and (kitti / "annotations" / "kitti_val.json").is_file()


def test_kitti_that_is_wrong(kitti):
    file = kitti / "training/label_2/000000.txt"
    for text, message in [
        ("Car 0 0\n", r"000000.txt, line 1: 'Car 0 0' is not type and 14 numbers"),
        (LINES.splitlines()[0].replace(" 60.0", " 5.0"), "has no size"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            convert("kitti", kitti, ["train"])
    with pytest.raises(FileNotFoundError, match="`training` takes all"):
        convert("kitti", kitti, ["other"])
    (kitti / "training/image_2/000000.png").unlink()
    with pytest.raises(ValueError, match=r"000000.png is missing"):
        convert("kitti", kitti, ["train"])
    with pytest.raises(FileNotFoundError, match="no such files"):
        convert("kitti", kitti / "ImageSets", ["train"])


def label(kind: str, number: str = "7", **attributes) -> dict:
    return {"id": number, "category": kind, "attributes": attributes, "box2d": {"x1": 1, "y1": 2, "x2": 31, "y2": 42}}


@pytest.fixture
def bdd(tmp_path):
    root = tmp_path / "bdd"
    for split in ("train", "val"):
        for folder in (
            f"labels/box_track_20/{split}",
            f"images/100k/{split}",
            f"images/track/{split}/v1",
            "labels/det_20",
        ):
            (root / folder).mkdir(parents=True, exist_ok=True)
        frames = [{"name": "a.jpg", "labels": [label("car", occluded=True), label("person"), {"category": "lane"}]}]
        (root / f"labels/det_20/det_{split}.json").write_text(json.dumps(frames))
        Image.fromarray(np.zeros((72, 128, 3), np.uint8)).save(root / f"images/100k/{split}/a.jpg")
        film = [
            {
                "name": f"{n}.jpg",
                "videoName": "v1",
                "frameIndex": n,
                "labels": [label("car"), label("other vehicle", "8")],
            }
            for n in range(2)
        ]
        (root / f"labels/box_track_20/{split}/v1.json").write_text(json.dumps(film))
        for n in range(2):
            Image.fromarray(np.zeros((72, 128, 3), np.uint8)).save(root / f"images/track/{split}/v1/{n}.jpg")
    return root


def test_bdd100k(bdd):
    notes = Notes()
    coco = convert("bdd100k", bdd, ["train"], notes)
    assert coco["images"] == [{"id": 1, "file_name": "images/100k/train/a.jpg", "height": 72, "width": 128}]
    names = {c["id"]: c["name"] for c in coco["categories"]}
    assert [names[one["category_id"]] for one in coco["annotations"]] == ["car", "pedestrian"] and len(names) == 10
    assert coco["annotations"][0]["bbox"] == [1, 2, 30, 40] and coco["annotations"][0]["occluded"] == 1
    assert any("person is called pedestrian" in line for line in notes.lines())
    assert converter.main(["bdd100k", str(bdd)]) == 0


def test_bdd100k_with_tracks_is_coco_vid(bdd):
    from detector.evaluation.tracks import coco_vid

    (bdd / "labels/det_20/det_val.json").unlink()
    coco = convert("bdd100k", bdd, ["val"])
    (bdd / "vid.json").write_text(json.dumps(coco))
    [film] = coco_vid(bdd / "vid.json")
    assert film.name == "v1" and [[row[6] for row in film.frames[n]] for n in range(2)] == [[True, False]] * 2
    assert film.frames[0][0][0] == film.frames[1][0][0] == "7"


def test_bdd100k_that_is_wrong(bdd):
    file = bdd / "labels/det_20/det_train.json"
    for content, message in [
        ({}, "a list of frames is expected"),
        ([{"name": "b.jpg"}], r"frame 0: .*b.jpg is missing"),
        ([{"name": "a.jpg", "labels": [label("cow")]}], r"frame 0, label 0: category = 'cow': is none of"),
        ([{"name": "a.jpg", "labels": [label("car") | {"box2d": {"x1": 1}}]}], r"label 0: box2d = \{'x1': 1\}"),
    ]:
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            convert("bdd100k", bdd, ["train"])
    with pytest.raises(FileNotFoundError, match=r"det_20/det_test.json: no such file"):
        convert("bdd100k", bdd, ["test"])


def truth_of(rows) -> dict:
    """rows: (left, top, height, occluded, truncated, distance, crowd) of cars 50 px wide in one image."""
    keys = ("occluded", "truncated", "distance", "iscrowd")
    annotations = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": [float(x), float(y), 50.0, float(h)], "area": 50.0 * h}
        | dict(zip(keys, rest))
        for n, (x, y, h, *rest) in enumerate(rows, 1)
    ]
    image = {"id": 1, "file_name": "a.png", "height": 500, "width": 900}
    return {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "Car"}]}


def found(*boxes) -> list[dict]:
    return [{"image_id": 1, "category_id": 1, "bbox": [*map(float, box[:4])], "score": box[4]} for box in boxes]


def test_harder_objects_and_low_detections_are_neither_right_nor_wrong():
    truth = truth_of([(0, 0, 60, 0, 0.0, 10, 0), (100, 0, 30, 1, 0.2, 30, 0), (200, 0, 30, 2, 0.4, 70, 0)])
    results = found((0, 0, 50, 60, 0.9), (100, 0, 50, 30, 0.8), (400, 0, 50, 30, 0.7))
    row = by_difficulty(truth, results)["Car"]
    assert row["easy"] == pytest.approx(1)  # the second detection found what is harder, the third is too low
    assert row["moderate"] == pytest.approx(1) and row["hard"] == pytest.approx(26 / 40)  # recalls up to 2 of 3
    wrong = found((400, 0, 50, 60, 0.95), (0, 0, 50, 60, 0.9))
    assert by_difficulty(truth, wrong)["Car"]["easy"] == pytest.approx(0.5)
    assert row["distance"] == {"0-20": 1, "20-40": 1, "40-60": -1, "60+": 0} and row["height"]["80+"] == -1
    assert row["height"]["40-80"] == pytest.approx(1) and row["IoU"] == 0.7
    crowd = truth_of([(0, 0, 60, 0, 0.0, 10, 0), (400, 0, 100, -1, -1.0, 0, 1)])
    assert by_difficulty(crowd, wrong)["Car"]["easy"] == pytest.approx(1)  # what lies in a DontCare region


def test_the_command(tmp_path, call):
    truth = truth_of([(0, 0, 60, 0, 0.0, 10, 0)])
    (tmp_path / "t.json").write_text(json.dumps(truth))
    (tmp_path / "p.json").write_text(json.dumps(found((0, 0, 50, 60, 0.9))))
    files = [f"annotations={tmp_path / 't.json'}", f"predictions={tmp_path / 'p.json'}"]
    code, out, error = call(program.main, *files, f"output={tmp_path / 'o.json'}")
    assert code == 0, error
    assert "easy" in out and "100.0" in out and (tmp_path / "o.json").is_file()
    code, _, error = call(program.main, files[0], "predictions=none.json")
    assert code == 2 and "none.json cannot be read" in error
    del truth["annotations"][0]["occluded"]
    with pytest.raises(ConfigError, match="objects have no occluded: detector convert kitti and bdd100k write them"):
        by_difficulty(truth, [])
