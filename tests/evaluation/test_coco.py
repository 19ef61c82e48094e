"""The project's COCO numbers against pycocotools, the authors' reference values, and hand-made cases."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math

import cv2
import numpy as np
import pytest
from hotcoco import mask as rle_tools
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from detector.evaluation import coco_metrics
from detector.evaluation.boundary import boundary_rle, boundary_width
from detector.evaluation.coco import BOX_METRICS, KEYPOINT_METRICS, coco_sigmas
from tests.cases.border import plain

CONFORMANCE = ["val2014_fake_bbox", "val2014_fake_segm", "dataset_bbox", "dataset_segm"]


def disc(height, width, centre, radius):
    y, x = np.mgrid[:height, :width]
    return ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2).astype(np.uint8)


def rle_of(mask):
    rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def random_case(seed, images=6, objects=8, classes=3, size=160):
    """Ground truth with crowds and wide area range, and noisy, duplicated, mislabelled and spurious detections."""
    rng = np.random.default_rng(seed)
    annotations, predictions = [], []

    def entry(centre, radius, image, category):
        mask = disc(size, size, centre, radius)
        rle = rle_of(mask)
        return {
            "image_id": image,
            "category_id": category,
            "bbox": rle_tools.toBbox(rle).tolist(),
            "segmentation": rle,
            "area": float(mask.sum()),
        }

    for image in range(images):
        for _ in range(rng.integers(0, objects)):
            centre, radius, category = (
                rng.uniform(8, size - 8, 2),
                rng.uniform(2, 70),
                int(rng.integers(classes)) * 7 + 3,
            )
            annotations.append(
                entry(centre, radius, image, category) | {"id": len(annotations), "iscrowd": int(rng.random() < 0.15)}
            )
            for _ in range(rng.integers(0, 4)):
                moved = entry(centre + rng.normal(0, 2, 2), radius * rng.uniform(0.8, 1.2), image, category)
                if rng.random() < 0.2:
                    moved["category_id"] = int(rng.integers(classes)) * 7 + 3
                moved["score"] = float(np.round(rng.random(), 1))  # ties on purpose
                moved.pop("area")
                predictions.append(moved)
    truth = {
        "images": [{"id": i, "width": size, "height": size, "file_name": f"{i}.jpg"} for i in range(images)],
        "categories": [{"id": k * 7 + 3, "name": f"class {k}"} for k in range(classes)],
        "annotations": annotations,
    }
    return truth, predictions


def crowded_case(objects=250):
    """Two images full of objects, most of one class, with one noisy detection of each."""
    rng = np.random.default_rng(0)
    annotations, predictions = [], []
    for image in (1, 2):
        for _ in range(objects):
            box = [*rng.uniform(0, 900, 2).tolist(), *rng.uniform(10, 60, 2).tolist()]
            entry = {"image_id": image, "category_id": 1 + int(rng.random() < 0.1), "bbox": box}
            annotations.append(entry | {"id": len(annotations), "area": box[2] * box[3], "iscrowd": 0})
            moved = [box[0] + rng.normal(), box[1] + rng.normal(), *box[2:]]
            predictions.append(entry | {"bbox": moved, "score": float(np.round(rng.random(), 2))})
    images = [{"id": i, "width": 1000, "height": 1000, "file_name": f"{i}.jpg"} for i in (1, 2)]
    categories = [{"id": 1, "name": "cell"}, {"id": 2, "name": "debris"}]
    return {"images": images, "categories": categories, "annotations": annotations}, predictions


@pytest.mark.parametrize("limits", [(1, 10, 300), (50,), (5, 75, 150, 400)])
def test_limits_of_detections(limits):
    truth, predictions = crowded_case()
    found = coco_metrics(truth, predictions, per_class=True, max_detections=limits)
    assert found == coco_metrics(truth, predictions, "bbox", "pycocotools", True, max_detections=limits)
    assert [name for name in found if name.startswith("AR") and name[2].isdigit()] == [f"AR{n}" for n in limits]
    evaluator = pycocotools_by_hand(truth, predictions)
    evaluator.params.maxDets = list(limits)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]  # every value is there: no -1
    assert found["AP"] == pytest.approx(precision[..., 0, -1].mean())
    assert found["AP75"] == pytest.approx(precision[5, ..., 0, -1].mean())
    for place, limit in enumerate(limits):
        assert found[f"AR{limit}"] == pytest.approx(recall[..., 0, place].mean())


def pycocotools_by_hand(truth, predictions):
    reference = COCO()
    reference.dataset = copy.deepcopy(truth)
    for number, entry in enumerate(reference.dataset["annotations"], 1):
        entry["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        reference.createIndex()
        return COCOeval(reference, reference.loadRes(copy.deepcopy(predictions)), "bbox")


def test_100_detections_of_250_objects():
    truth, _ = crowded_case()
    perfect = [{**a, "score": 1.0} for a in truth["annotations"]]
    assert coco_metrics(truth, perfect)["AP"] < 0.75 < 1 == coco_metrics(truth, perfect, max_detections=[300])["AP"]


@pytest.mark.parametrize("limits", [[], [10, 1], [0, 10], [1, 10, 10], [1.5], [True]])
def test_limits_that_cannot_be(case, limits):
    with pytest.raises(ValueError, match=r"max_detections.*growing whole numbers, such as \[1, 10, 100\]"):
        coco_metrics(*case, max_detections=limits)


@pytest.fixture
def case():
    return random_case(0)


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("name", CONFORMANCE)
def test_conformance_to_full_precision(shared, name, backend):
    folder = shared / "data" / "coco_eval_conformance"
    expected = json.loads((folder / "expected_pycocotools.json").read_text())[name]
    metrics = coco_metrics(folder / expected["gt"], str(folder / expected["dt"]), expected["iou_type"], backend)
    assert tuple(metrics) == BOX_METRICS
    assert list(metrics.values()) == expected["stats"]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), iou_type=st.sampled_from(["bbox", "segm"]), mask_area=st.booleans())
def test_backends_agree_bit_for_bit(seed, iou_type, mask_area):
    truth, predictions = random_case(seed)
    a, b = (coco_metrics(truth, predictions, iou_type, k, True, mask_area) for k in ("hotcoco", "pycocotools"))
    assert a == b


def test_mask_area_option_is_what_results_without_boxes_give(shared):
    folder = shared / "data" / "coco_eval_conformance"
    truth, results = (json.loads((folder / f"{k}_dataset.json").read_text()) for k in ("gt", "dt"))
    without = [{k: v for k, v in r.items() if k not in ("bbox", "area")} for r in results]
    by_box, by_mask = (coco_metrics(truth, results, "segm", mask_area=m) for m in (False, True))
    assert by_mask == coco_metrics(truth, without, "segm", "pycocotools")
    assert by_mask["APm"] != by_box["APm"] and by_mask["AP"] == by_box["AP"]


def test_inputs_stay_as_they_were(case):
    before = copy.deepcopy(case)
    for iou_type in ("bbox", "segm", "boundary"):
        for backend in ("hotcoco", "pycocotools"):
            coco_metrics(*case, iou_type, backend)
    assert case == before


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "boundary"])
@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_truth_as_predictions_is_perfect_and_nothing_is_zero(case, iou_type, backend):
    truth, _ = case
    truth["annotations"] = [a | {"iscrowd": 0} for a in truth["annotations"]]
    perfect = [{k: a[k] for k in ("image_id", "category_id", "bbox", "segmentation")} for a in truth["annotations"]]
    metrics = coco_metrics(truth, [p | {"score": 1.0} for p in perfect], iou_type, backend, per_class=True)
    assert metrics["AP"] == pytest.approx(1, abs=1e-12) and metrics["AR100"] == 1
    assert {k: v["AP"] for k, v in metrics["per_class"].items()} == pytest.approx(
        dict.fromkeys(metrics["per_class"], 1)
    )
    nothing = coco_metrics(truth, [], iou_type, backend)
    assert nothing["AP"] == nothing["AR100"] == 0


def test_per_class_mean_is_the_total_and_absent_class_is_minus_one(case):
    truth, predictions = case
    truth["categories"].append({"id": 99, "name": "absent"})
    metrics = coco_metrics(truth, predictions, per_class=True)
    assert metrics["per_class"]["absent"] == dict.fromkeys(BOX_METRICS, -1.0)
    for name in BOX_METRICS:
        values = [v[name] for v in metrics["per_class"].values() if v[name] > -1]
        assert np.mean(values) == pytest.approx(metrics[name], abs=1e-12)


def test_annotation_ids_do_not_matter(case):
    """pycocotools takes id 0 for 'unmatched' and merges repeated ids."""
    truth, predictions = case
    expected = coco_metrics(truth, predictions)
    for ids in (range(1, 999), range(0, 998), [5] * 999):
        changed = truth | {"annotations": [a | {"id": i} for a, i in zip(truth["annotations"], ids)]}
        assert coco_metrics(changed, predictions, backend="pycocotools") == expected


def test_keypoints():
    rng = np.random.default_rng(0)
    points = rng.uniform(10, 90, (4, 17, 2))
    annotations = [
        {
            "id": i,
            "image_id": 1,
            "category_id": 1,
            "bbox": [0, 0, 96, 96],
            "area": 9000,
            "iscrowd": 0,
            "num_keypoints": 17,
            "keypoints": np.insert(p, 2, 2, axis=1).ravel().tolist(),
        }
        for i, p in enumerate(points)
    ]
    truth = {"images": [{"id": 1, "width": 96, "height": 96}], "categories": [{"id": 1, "name": "person"}]}
    truth["annotations"] = annotations
    predictions = [
        {"image_id": 1, "category_id": 1, "score": 0.9, "keypoints": np.insert(p + e, 2, 1, axis=1).ravel().tolist()}
        for p, e in zip(points, (0, 0.5, 3, 30))
    ]
    a, b = (coco_metrics(truth, predictions, "keypoints", k) for k in ("hotcoco", "pycocotools"))
    assert a == b and tuple(a) == KEYPOINT_METRICS and 0.3 < a["AP"] < 0.9
    tight, loose = (coco_metrics(truth, predictions, "keypoints", sigmas=[s] * 17)["AP"] for s in (1e-3, 10))
    assert tight == pytest.approx(1 / 4, abs=0.01) and loose == pytest.approx(1)


def test_keypoints_of_another_skeleton():
    """Five keypoints: the numbers of pycocotools with the same fall-offs, those given or the mean of COCO's."""
    rng = np.random.default_rng(0)
    points = rng.uniform(10, 90, (12, 5, 3))
    points[..., 2] = rng.integers(0, 3, (12, 5))
    points[:, 0, 2] = 2
    entry = {"category_id": 1, "bbox": [0, 0, 96, 96], "area": 3000.0, "iscrowd": 0}
    annotations = [
        entry | {"id": i + 1, "image_id": i, "num_keypoints": int((p[:, 2] > 0).sum()), "keypoints": p.ravel().tolist()}
        for i, p in enumerate(points)
    ]
    truth = {"images": [{"id": i, "width": 96, "height": 96} for i in range(12)], "annotations": annotations}
    truth["categories"] = [{"id": 1, "name": "hand"}]
    moved = points[..., :2] + rng.normal(0, 4, (12, 5, 2))
    predictions = [
        {"image_id": i, "category_id": 1, "score": s, "keypoints": np.insert(p, 2, 1, axis=1).ravel().tolist()}
        for i, (p, s) in enumerate(zip(moved, rng.uniform(0, 1, 12)))
    ]
    usual = Params("keypoints").kpt_oks_sigmas
    assert (coco_sigmas(17) == usual).all() and coco_sigmas(5).tolist() == [usual.mean()] * 5
    for sigmas in (None, [0.03, 0.05, 0.08, 0.1, 0.12]):
        with contextlib.redirect_stdout(io.StringIO()):
            gt = COCO()
            gt.dataset = copy.deepcopy(truth)
            gt.createIndex()
            reference = COCOeval(gt, gt.loadRes(copy.deepcopy(predictions)), "keypoints")
            reference.params.kpt_oks_sigmas = np.array(sigmas or [usual.mean()] * 5)
            reference.evaluate()
            reference.accumulate()
            reference.summarize()
        for backend in ("hotcoco", "pycocotools"):
            found = coco_metrics(truth, predictions, "keypoints", backend, sigmas=sigmas)
            assert list(found.values()) == reference.stats.tolist() and 0.1 < found["AP"] < 0.9
    with pytest.raises(ValueError, match=r"sigmas must be positive and one per keypoint \(\[5\]\), got \[0.1, 0.1\]"):
        coco_metrics(truth, predictions, "keypoints", sigmas=[0.1, 0.1])


BAD_PREDICTIONS = [
    ({"image_id": 404}, "image_id is 404"),
    ({"image_id": "first"}, "image_id is 'first'"),
    ({"category_id": 1}, "category_id is 1"),
    ({"score": math.nan}, "score is nan"),
    ({"score": "high"}, "score is 'high'"),
    ({"score": None}, "score is None"),
    ({"bbox": [1, 2, 3]}, r"bbox is \[1, 2, 3\]"),
    ({"bbox": [1, 2, math.inf, 4]}, "four finite numbers"),
    ({"bbox": [1, 2, -3, 4]}, "cannot be negative"),
]


@pytest.mark.parametrize("change, message", BAD_PREDICTIONS)
@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_bad_predictions_are_named(case, change, message, backend):
    truth, predictions = case
    predictions[2] |= change
    with pytest.raises(ValueError, match=r"predictions\[2\].*" + message):
        coco_metrics(truth, predictions, backend=backend)


def test_predictions_of_the_wrong_kind(case, tmp_path):
    truth, predictions = case
    with pytest.raises(TypeError, match="list of COCO results, got dict"):
        coco_metrics(truth, {"annotations": predictions})
    with pytest.raises(TypeError, match=r"predictions\[0\]: expected a dict, got list"):
        coco_metrics(truth, [[1, 2, 3]])
    with pytest.raises(ValueError, match=r"predictions\[0\] has no 'segmentation', which iou_type='segm' needs"):
        coco_metrics(truth, [{k: v for k, v in predictions[0].items() if k != "segmentation"}], "segm")
    with pytest.raises(ValueError, match=r"segmentation size=\[9, 9\], the image has \[160, 160\]"):
        coco_metrics(truth, [predictions[0] | {"segmentation": {"size": [9, 9], "counts": "abc"}}], "segm")
    with pytest.raises(ValueError, match=r"predictions\[0\]: segmentation must be polygons or an RLE"):
        coco_metrics(truth, [predictions[0] | {"segmentation": "outline"}], "segm")
    with pytest.raises(FileNotFoundError, match=r"prediction file .*gone.json does not exist"):
        coco_metrics(truth, tmp_path / "gone.json")
    (tmp_path / "cut.json").write_text(json.dumps(predictions)[:-30])
    with pytest.raises(ValueError, match=r"cut.json: not JSON"):
        coco_metrics(truth, tmp_path / "cut.json")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("images"), "'images' is missing, a list is needed"),
        (lambda t: t["images"].append(t["images"][0] | {"width": 9}), "duplicate image id: image 0"),
        (
            lambda t: t["categories"].append({"id": 50, "name": "class 0"}),
            r"'class 0' is that of id 3 .* and id 50",
        ),
        (lambda t: t["annotations"][1].update(image_id=77), "annotation 1 image_id=77"),
        (lambda t: t["annotations"][1].update(category_id=77), "annotation 1 category_id=77"),
        (lambda t: t["annotations"][1].update(bbox=[0, 0, math.nan, 1]), r"annotation 1 bbox=\[0, 0, nan, 1\]"),
        (lambda t: [t["annotations"][1].pop(k) for k in ("bbox", "segmentation")], "annotation 1 bbox=None"),
    ],
)
def test_bad_annotations_are_named(case, change, message):
    truth, predictions = case
    change(truth)
    with pytest.raises(ValueError, match=message):
        coco_metrics(truth, predictions)


def test_unknown_options(case):
    with pytest.raises(ValueError, match="iou_type is 'box'; choose one of bbox, segm, boundary, keypoints"):
        coco_metrics(*case, "box")
    with pytest.raises(ValueError, match="backend is 'coco'; choose one of hotcoco, pycocotools"):
        coco_metrics(*case, backend="coco")


# ----------------------------------------------------------------------------------------------------------- boundary


@pytest.mark.parametrize("seed", range(8))
def test_boundary_region_is_the_pixels_near_the_outline(seed):
    """The paper's definition by distance: a 3 x 3 erosion counts chessboard steps to the nearest pixel outside."""
    rng = np.random.default_rng(seed)
    mask = (cv2.GaussianBlur(rng.random((70, 90)), (0, 0), 5) > 0.5).astype(np.uint8)
    distance = cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_C, 3)[1:-1, 1:-1]
    expected = (mask > 0) & (distance <= boundary_width(70, 90))
    np.testing.assert_array_equal(rle_tools.decode(boundary_rle(rle_of(mask))), expected)


def test_boundary_width():
    assert [boundary_width(*s) for s in [(10, 10), (480, 640), (1080, 1920)]] == [1, 16, 44]


def test_boundary_ap_is_the_minimum_of_both_ious():
    """One large object whose prediction covers it but has a ragged outline: mask IoU is high, boundary IoU is not."""
    mask, close = disc(200, 200, (100, 100), 80), disc(200, 200, (100, 100), 76)
    truth = {
        "images": [{"id": 1, "width": 200, "height": 200}],
        "categories": [{"id": 1, "name": "disc"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 20, 161, 161], "segmentation": rle_of(mask)}
        ],
    }
    predictions = [{"image_id": 1, "category_id": 1, "score": 1, "segmentation": rle_of(close)}]
    d = boundary_width(200, 200)
    ring, ring2 = (
        m.astype(bool) & ~cv2.erode(m, np.ones((3, 3), np.uint8), iterations=d).astype(bool) for m in (mask, close)
    )
    boundary_iou, mask_iou = (ring & ring2).sum() / (ring | ring2).sum(), close.sum() / mask.sum()
    assert boundary_iou < 0.5 < mask_iou
    assert coco_metrics(truth, predictions, "segm")["AP75"] == pytest.approx(1)
    assert coco_metrics(truth, predictions, "boundary")["AP50"] == 0
    # A small object is all boundary: both numbers are the same
    small = truth | {"annotations": [truth["annotations"][0] | {"segmentation": rle_of(disc(200, 200, (9, 9), 5))}]}
    predictions[0]["segmentation"] = rle_of(disc(200, 200, (10, 9), 5))
    assert coco_metrics(small, predictions, "boundary") == coco_metrics(small, predictions, "segm")


# ---------------------------------------------------------------------------------------------- truth as its own result

# What the data sets' own descriptions say; nuclei: tiles of more than the 100 detections that COCO counts.
PERFECT = {"nuclei_dsb2018": 0.9901, "bccd": 1.0, "coco_cc_sample": 1.0}


def perfect_metrics(file, iou_type):
    truth, field = json.loads(file.read_text()), "bbox" if iou_type == "bbox" else "segmentation"
    if not truth["annotations"][0].get(field):
        pytest.skip("boxes only")
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], field: a[field], "score": 1.0}
        for a in truth["annotations"]
        if not a.get("iscrowd")
    ]
    return coco_metrics(truth, results, iou_type, per_class=True)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("name", PERFECT)
def test_real_truth_as_predictions(shared, name, iou_type):
    metrics = perfect_metrics(shared / "data" / name / "annotations" / "instances_val.json", iou_type)
    assert metrics["AP"] == pytest.approx(PERFECT[name], abs=1e-4)
    assert metrics["APl"] == (-1 if name == "nuclei_dsb2018" else pytest.approx(1))


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_shapes_truth_as_predictions(shapes_tiny, iou_type):
    metrics = perfect_metrics(shapes_tiny / "annotations" / "instances_val.json", iou_type)
    assert metrics["AP"] == metrics["AR100"] == pytest.approx(1)
    assert all(v["AP"] == pytest.approx(1) for v in metrics["per_class"].values())


# -------------------------------------------------------------------------------------------- against plain pycocotools


def wild_case(seed: int) -> tuple[dict, list[dict]]:
    """Ground truth of polygons and run lengths, with crowds and `ignore`, boxes and masks that reach out of small
    images; results with ties, and in every tenth case more than the 100 that count."""
    chance = np.random.default_rng(seed)
    crowded = seed % 10 == 0
    images = [{"id": int(i), "width": 70, "height": 50} for i in chance.permutation(20)[: 1 if crowded else 3]]
    annotations, predictions = [], []
    for image in images:
        for _ in range(chance.integers(0, 7)):
            x, y, w, h = (chance.uniform(-6, 60), chance.uniform(-6, 40), *chance.uniform(0.2, 40, 2))
            angle = np.sort(chance.uniform(0, 2 * np.pi, chance.integers(3, 9)))
            ring = np.column_stack([x + w / 2 + w / 2 * np.cos(angle), y + h / 2 + h / 2 * np.sin(angle)])
            entry = {"image_id": image["id"], "category_id": int(chance.integers(1, 3)), "bbox": [x, y, w, h]}
            segmentation, extra = [ring.ravel().tolist()], {}
            if chance.random() < 0.3:
                mask = np.zeros((50, 70), np.uint8)
                mask[max(int(y), 0) : max(int(y + h), 0), max(int(x), 0) : max(int(x + w), 0)] = 1
                segmentation = rle_of(mask)
            if chance.random() < 0.2:
                extra["ignore"] = int(chance.integers(0, 2))
            extra["iscrowd"] = int(chance.random() < 0.2)
            number = {"id": len(annotations) + 1, "area": float(w * h * chance.uniform(0.5, 1))}
            annotations.append(entry | number | extra | {"segmentation": segmentation})
            for _ in range(60 if crowded else chance.integers(0, 4)):
                box = np.array([x, y, w, h]) + chance.normal(0, 1, 4)
                box[2:] = np.maximum(box[2:], 1)
                mask = np.zeros((50, 70), np.uint8)
                (left, top), (right, bottom) = box[:2].clip(0).astype(int), (box[:2] + box[2:]).clip(0).astype(int)
                mask[top:bottom, left:right] = 1
                score = float(chance.integers(1, 6) / 5)
                predictions.append(entry | {"bbox": box.tolist(), "score": score, "segmentation": rle_of(mask)})
    truth = {"images": images, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    return truth | {"annotations": annotations}, predictions


@pytest.mark.slow
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_random_truths_give_the_numbers_of_plain_pycocotools(iou_type):
    most = 0
    for seed in range(120):
        truth, predictions = wild_case(seed)
        if not predictions:  # loadRes looks at the first one
            continue
        most = max(most, len(predictions))
        expected = plain(truth, predictions, iou_type)
        for backend in ("hotcoco", "pycocotools"):
            assert coco_metrics(truth, predictions, iou_type, backend) == expected, (seed, backend)
    assert most > 100
