"""Pascal VOC's AP against its definition written out, LVIS's federated AP against cases worked by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle_tools

from detector.evaluation.evaluator import measure
from detector.evaluation.lvis import lvis_metrics
from detector.evaluation.tables import class_table, summary_table
from detector.evaluation.voc import voc_metrics


def by_definition(objects, results, threshold=0.5):
    """(area, 11 points) for one class, straight from the development kit's description.

    objects: list of (image, box, difficult); results: list of (image, box, score); boxes (x1, y1, x2, y2).
    """

    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(0, w) * max(0, h)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    total = sum(not difficult for _, _, difficult in objects)
    used, hits, errors, points = set(), 0, 0, []
    for image, box, _ in sorted(results, key=lambda r: -r[2]):
        overlaps = [iou(box, o[1]) if o[0] == image else -1 for o in objects]
        best = max(range(len(objects)), key=lambda k: overlaps[k])
        if overlaps[best] >= threshold:
            if objects[best][2]:
                continue
            if best not in used:
                used.add(best)
                hits += 1
            else:
                errors += 1
        else:
            errors += 1
        points.append((hits / total, hits / (hits + errors)))

    def highest(recall):
        return max((p for r, p in points if r >= recall), default=0)

    steps = sorted({0.0, *(r for r, _ in points)})
    area = sum((b - a) * highest(b) for a, b in zip(steps, steps[1:]))
    return area, sum(highest(k / 10) for k in range(11)) / 11


def coco(objects, results, images=3):
    def xywh(b):
        return [b[0], b[1], b[2] - b[0], b[3] - b[1]]

    truth = {
        "images": [{"id": i, "width": 100, "height": 100} for i in range(images)],
        "annotations": [
            {"id": k + 1, "image_id": i, "category_id": 4, "bbox": xywh(b), "iscrowd": int(d)}
            for k, (i, b, d) in enumerate(objects)
        ],
        "categories": [{"id": 4, "name": "dog"}, {"id": 5, "name": "cat"}],
    }
    return truth, [{"image_id": i, "category_id": 4, "bbox": xywh(b), "score": s} for i, b, s in results]


def test_worked_example():
    objects = [(0, (0, 0, 10, 10), 0), (0, (20, 20, 30, 30), 0), (1, (0, 0, 10, 10), 1), (2, (0, 0, 10, 10), 0)]
    results = [
        (0, (0, 0, 10, 10), 0.9),  # hit: recall 1/3, precision 1
        (1, (0, 0, 10, 10), 0.8),  # on a difficult object: nothing
        (1, (0, 0, 10, 10), 0.75),  # and once more
        (0, (0, 0, 10, 9), 0.7),  # a second time: error, precision 1/2
        (2, (0, 0, 10, 5), 0.6),  # IoU 0.5 is enough: recall 2/3, precision 2/3
    ]
    metrics = voc_metrics(*coco(objects, results), per_class=True)
    assert metrics["AP50"] == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)
    assert metrics["AP50_11_points"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)  # up to 0.3; 0.4, 0.5, 0.6
    assert metrics["per_class"]["cat"] == {"AP50": -1, "AP50_11_points": -1}
    assert voc_metrics(*coco(objects, []))["AP50"] == 0


places = st.integers(0, 3)


@st.composite
def box(draw):
    x, y = 10 * draw(places), 10 * draw(places)
    return (x, y, x + draw(st.integers(8, 22)), y + draw(st.integers(8, 22)))


images = st.integers(0, 2)
objects_of = st.lists(st.tuples(images, box(), st.booleans()), min_size=1, max_size=6)
results_of = st.lists(st.tuples(images, box(), st.integers(0, 10**6)), max_size=12, unique_by=lambda r: r[2])


@settings(max_examples=40)
@given(objects_of, results_of)
def test_equals_the_definition(objects, results):
    objects = [*objects, (0, (90, 90, 99, 99), False)]  # at least one that counts
    expected = by_definition(objects, results)
    metrics = voc_metrics(*coco(objects, results))
    np.testing.assert_allclose([metrics["AP50"], metrics["AP50_11_points"]], expected, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- LVIS


def federated():
    def image(id_, negative, unsure):
        lists = {"neg_category_ids": negative, "not_exhaustive_category_ids": unsure}
        return {"id": id_, "width": 100, "height": 100, **lists}

    def entry(id_, image_id, category_id, box):
        return {"id": id_, "image_id": image_id, "category_id": category_id, "bbox": box, "area": box[2] * box[3]}

    truth = {
        "images": [image(1, [2], []), image(2, [], [1])],
        "annotations": [
            entry(1, 1, 1, [0, 0, 50, 50]),
            entry(2, 2, 1, [0, 0, 50, 50]),
            entry(3, 2, 2, [50, 50, 40, 40]),
        ],
        "categories": [{"id": 1, "name": "cup", "frequency": "r"}, {"id": 2, "name": "pen", "frequency": "f"}],
    }
    perfect = [{k: e[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.5} for e in truth["annotations"]]
    return truth, perfect


def result(image_id, category_id, box, score=0.9):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


@pytest.mark.parametrize(
    ("wrong", "category", "ap"),
    [
        (result(1, 1, [60, 60, 30, 30]), "cup", 2 / 3),  # the category has objects here: an error
        (result(2, 1, [60, 60, 30, 30]), "cup", 1),  # not all of its objects may be marked here
        (result(1, 2, [60, 60, 30, 30]), "pen", 1 / 2),  # there are certainly none here
    ],
)
def test_lvis_counts_only_where_annotators_looked(wrong, category, ap):
    truth, perfect = federated()
    metrics = lvis_metrics(truth, [*perfect, wrong], per_class=True)
    assert metrics["per_class"][category]["AP"] == pytest.approx(ap, abs=0.005)  # 101 recall points
    assert metrics["APr" if category == "cup" else "APf"] == pytest.approx(ap, abs=0.005)
    other = "pen" if category == "cup" else "cup"
    assert metrics["per_class"][other]["AP"] == pytest.approx(1)


def test_lvis_masks():
    truth, perfect = federated()
    for entry in [*truth["annotations"], *perfect]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    truth["annotations"][0]["segmentation"] = [[0, 0, 50, 0, 0, 50]]  # a triangle: half of what is found
    metrics = measure(truth, rasterised(perfect), ["bbox", "segm"], "hotcoco", True)
    assert metrics["bbox"]["AP"] == pytest.approx(1) and metrics["segm"]["APf"] == pytest.approx(1)
    assert 0 < metrics["segm"]["APr"] < 0.6


def rasterised(results: list[dict]) -> list[dict]:
    """Results with RLE in the place of polygons."""

    def rle(polygons: list) -> dict:
        found = rle_tools.frPyObjects(polygons, 100, 100)[0]
        return {"size": found["size"], "counts": found["counts"].decode()}

    return [r | {"segmentation": rle(r["segmentation"])} for r in results]


def test_lvis_leaves_out_images_where_nobody_looked():
    truth, perfect = federated()
    truth["images"].append(
        {"id": 3, "width": 9, "height": 9, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    )
    assert lvis_metrics(truth, [*perfect, result(3, 2, [0, 0, 5, 5])])["AP"] == pytest.approx(1)


def test_evaluation_chooses_lvis_by_the_annotations_and_voc_on_request():
    truth, perfect = federated()
    results = [*perfect, result(2, 1, [60, 60, 30, 30])]
    metrics = measure(truth, results, ["bbox", "voc"], "hotcoco", True)
    assert metrics["bbox"]["AP"] == pytest.approx(1) and "APr" in metrics["bbox"]
    assert metrics["voc"]["AP50"] == pytest.approx((1 + 2 / 3) / 2)
    assert "VOC box" in summary_table(metrics) and "VOC box AP50" in class_table(metrics, truth)
    plain = copy.deepcopy(truth)
    for image in plain["images"]:
        del image["neg_category_ids"]
    assert measure(plain, results, ["bbox"], "hotcoco", False)["bbox"]["AP"] < 0.9
    with pytest.raises(ValueError, match="neg_category_ids"):
        lvis_metrics(plain, results)
