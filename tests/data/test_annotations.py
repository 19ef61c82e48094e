"""What the reader takes, and what it says about wrong files."""

from __future__ import annotations

import json
import logging
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from detector.data import read_coco
from tests.data.coco_files import minimal, write


def test_reads_images_objects_and_categories(tmp_path):
    found = read_coco(write(tmp_path, minimal()))
    assert found.categories == ["dog", "cat"] and found.category_ids == [2, 5]  # in the order of the ids
    assert len(found) == 2 and found.image_ids.tolist() == [7, 9]
    assert found.image_sizes.tolist() == [[40, 60], [60, 40]]
    assert [found.file_name(i) for i in range(2)] == ["a.png", "b.png"]
    objects = found.objects(0)
    np.testing.assert_array_equal(objects.boxes, [[5, 6, 25, 16], [30, 20, 40, 30]])
    assert objects.labels.tolist() == [2, 1]
    assert objects.outlines.has_rings().tolist() == [True, False]
    np.testing.assert_array_equal(objects.outlines.points, [[5, 6], [25, 6], [25, 16], [5, 16]])
    assert len(found.objects(1).boxes) == 0


def test_objects_do_not_depend_on_the_order_of_the_file(tmp_path):
    coco = minimal()
    coco["annotations"][1]["image_id"] = 9
    coco["annotations"].reverse()
    found = read_coco(write(tmp_path, coco))
    assert found.objects(0).labels.tolist() == [2] and found.objects(1).labels.tolist() == [1]


@pytest.mark.parametrize("compressed", [True, False])
def test_run_lengths(tmp_path, compressed):
    mask = np.zeros((40, 60), np.uint8)
    mask[3:9, 10:30] = 1
    mask[5:7, 12:20] = 0  # a hole
    coco = minimal()
    rle = coco_mask.encode(np.asfortranarray(mask))
    runs = np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=1 - mask[-1, -1]))
    counts = rle["counts"].decode() if compressed else np.diff(runs, prepend=0).tolist()
    coco["annotations"][0]["segmentation"] = {"size": [40, 60], "counts": counts}
    outlines = read_coco(write(tmp_path, coco)).objects(0).outlines
    assert outlines.even_odd.tolist() == [True, False] and len(outlines.ring_objects) == 2
    np.testing.assert_array_equal(outlines.points.min(0), [10, 3])
    np.testing.assert_array_equal(outlines.points.max(0), [30, 9])


def test_crowd_keeps_its_box_only(tmp_path):
    coco = minimal()
    coco["annotations"][0].update(iscrowd=1, segmentation={"size": [40, 60], "counts": [0, 2400]})
    objects = read_coco(write(tmp_path, coco)).objects(0)
    assert objects.crowd.tolist() == [True, False] and not objects.outlines.has_rings().any()


def test_box_from_the_segmentation_where_there_is_none(tmp_path):
    coco = minimal()
    del coco["annotations"][0]["bbox"]
    for masks in (True, False):
        objects = read_coco(write(tmp_path, coco), masks=masks).objects(0)
        np.testing.assert_array_equal(objects.boxes[0], [5, 6, 25, 16])
        assert objects.outlines.has_rings().any() == masks


def test_categories_are_matched_by_name(tmp_path, caplog):
    found = read_coco(write(tmp_path, minimal()), categories=["cat", "bird", "dog"])
    assert found.objects(0).labels.tolist() == [1, 3] and found.category_ids == [5, None, 2]
    assert "bird" in caplog.text
    with pytest.raises(ValueError, match=r"dog.*matched by name"):
        read_coco(write(tmp_path, minimal()), categories=["cat"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "not JSON"),
        ("\x00\x01", "not JSON"),
        ("[]", "top level is a list"),
        ('{"images": [], "categories": []}', "'annotations' is missing"),
        ('{"images": {}, "annotations": [], "categories": []}', "'images' is a dict"),
        ('{"images": [], "annotations": [], "categories": []}', "categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}', "no usable images"),
        ('{"images": [], "annotations": [], "categories": [{"id": "one", "name": "x"}]}', "integer 'id'"),
    ],
)
def test_files_that_are_not_coco(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_coco(write(tmp_path, text))
    assert "instances.json" in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_coco(tmp_path / "nowhere.json")


def test_no_objects(tmp_path):
    with pytest.raises(ValueError, match="no usable objects"):
        read_coco(write(tmp_path, minimal() | {"annotations": []}))


@pytest.mark.parametrize("records", [[{"id": 1, "name": "a"}] * 2, [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]])
def test_duplicate_categories(tmp_path, records):
    with pytest.raises(ValueError, match="once"):
        read_coco(write(tmp_path, minimal() | {"categories": records}))


# what is changed, where, to what; what the message must name; objects left with on_error=skip
ERRORS = {
    "image id": ("images", 1, {"id": "nine"}, ["images[1]", "integer id"], 2),
    "image id twice": ("images", 1, {"id": 7}, ["duplicate image id", "image 7", "b.png"], 2),
    "no file name": ("images", 1, {"file_name": None}, ["image 9", "file_name=None"], 2),
    "no size": ("images", 1, {"width": 0}, ["image 9", "width=0"], 2),
    "size as text": ("images", 1, {"height": "tall"}, ["image 9", "height='tall'"], 2),
    "huge": ("images", 1, {"height": 10**7}, ["image 9", "max_pixels"], 2),
    "iscrowd 2": ("annotations", 1, {"iscrowd": 2}, ["annotation 2", "iscrowd=2"], 1),
    "image_id beyond 64 bits": ("images", 1, {"id": 2**70}, ["images[1]", "integer id"], 2),
    "image_id": ("annotations", 1, {"image_id": 8}, ["annotation 2", "image_id=8"], 1),
    "image_id as list": ("annotations", 1, {"image_id": [7]}, ["annotation 2", "image_id=[7]"], 1),
    "category_id": ("annotations", 1, {"category_id": 3}, ["annotation 2", "category_id=3"], 1),
    "NaN": ("annotations", 1, {"bbox": [1, 2, float("nan"), 4]}, ["annotation 2", "bbox=[1, 2, nan, 4]"], 1),
    "infinite": ("annotations", 1, {"bbox": [1, 2, 3, float("inf")]}, ["annotation 2", "inf"], 1),
    "three numbers": ("annotations", 1, {"bbox": [1, 2, 3]}, ["annotation 2", "bbox=[1, 2, 3]"], 1),
    "text box": ("annotations", 1, {"bbox": "1 2 3 4"}, ["annotation 2", "bbox='1 2 3 4'"], 1),
    "no box": ("annotations", 1, {"bbox": None}, ["annotation 2", "bbox=None"], 1),
    "iscrowd": ("annotations", 1, {"iscrowd": "no"}, ["annotation 2", "iscrowd='no'"], 1),
    "far polygon": ("annotations", 0, {"segmentation": [[1, 2, 1e9, 4, 5, 6]]}, ["annotation 1", "reach out"], 1),
    "NaN in polygon": ("annotations", 0, {"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, ["annotation 1", "nan"], 1),
    "text polygon": ("annotations", 0, {"segmentation": "none"}, ["annotation 1", "'none'"], 1),
    "mask size": (
        "annotations", 0, {"segmentation": {"size": [60, 40], "counts": [0, 2400]}}, ["annotation 1", "[60, 40]"], 1,
    ),
    "mask counts": (
        "annotations", 0, {"segmentation": {"size": [40, 60], "counts": [1, 2]}}, ["annotation 1", "2400"], 1,
    ),
    "no counts": ("annotations", 0, {"segmentation": {"size": [40, 60]}}, ["annotation 1", "counts"], 1),
    "crowd mask size": (
        "annotations", 0, {"iscrowd": 1, "segmentation": {"size": [4, 6], "counts": [24]}}, ["annotation 1", "[4, 6]"],
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_records_stop_the_run_or_are_left_out(tmp_path, caplog, case):
    key, index, change, named, left = ERRORS[case]
    coco = minimal()
    coco[key][index].update(change)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="on_error=skip") as error:
        read_coco(path)
    for text in [str(path), *named]:
        assert text in str(error.value)
    found = read_coco(path, on_error="skip")
    assert len(found.boxes) == left
    assert str(path) in caplog.text and named[0] in caplog.text


# boxes that occur in COCO itself: never an error
NOTICES = {
    "no width": ([30, 20, 0, 10], "no size", 1),
    "hair's breadth": ([30, 20, 1e-9, 10], "no size", 1),
    "negative height": ([30, 20, 10, -3], "turned round", 2),
    "outside": ([70, 20, 10, 10], "outside the image", 1),
    "beside": ([-10, 20, 10, 10], "outside the image", 1),
    "across the border": ([50, 20, 20, 10], "clipped", 2),
}


@pytest.mark.parametrize("case", NOTICES)
def test_degenerate_boxes_are_counted_and_named(tmp_path, caplog, case):
    bbox, message, left = NOTICES[case]
    coco = minimal()
    coco["annotations"][1]["bbox"] = bbox
    path = write(tmp_path, coco)
    found = read_coco(path)
    assert len(found.boxes) == left
    for text in (str(path), "1 x", message, "annotation 2", f"bbox={bbox}"):
        assert text in caplog.text
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1


def test_many_problems_make_one_short_warning(tmp_path, caplog):
    coco = minimal()
    coco["annotations"] += [dict(coco["annotations"][1], id=10 + i, bbox=[1, 1, 0, 0]) for i in range(500)]
    read_coco(write(tmp_path, coco))
    assert len(caplog.records) == 1 and "500 x" in caplog.text and "and 495 more" in caplog.text
    assert len(caplog.text) < 1000


def test_box_reaching_out_is_clipped(tmp_path):
    coco = minimal()
    coco["annotations"][1]["bbox"] = [50, -5, 20, 10]
    np.testing.assert_array_equal(read_coco(write(tmp_path, coco)).boxes[1], [50, 0, 60, 5])


@pytest.mark.parametrize("polygons", [[[1, 2, 3, 4]], [[70, 2, 80, 2, 80, 9]], [[5, 5, 5, 9, 5, 20]]])
def test_segmentation_without_area_leaves_the_box(tmp_path, caplog, polygons):
    coco = minimal()
    coco["annotations"][0]["segmentation"] = polygons
    found = read_coco(write(tmp_path, coco))
    assert len(found.boxes) == 2 and len(found.points) == 0
    assert "annotation 1" in caplog.text


def test_unknown_policy(tmp_path):
    with pytest.raises(ValueError, match="on_error='ignore'"):
        read_coco(write(tmp_path, minimal()), on_error="ignore")


def test_real_files_agree_with_pycocotools(shared):
    from pycocotools.coco import COCO

    for name in ("coco_cc_sample", "nuclei_dsb2018", "bccd"):
        path = shared / "data" / name / "annotations" / "instances_val.json"
        found, coco = read_coco(path), COCO(path)
        assert found.image_ids.tolist() == [image["id"] for image in coco.dataset["images"]]
        for i, image_id in enumerate(found.image_ids.tolist()):
            theirs = coco.imgToAnns[image_id]
            objects = found.objects(i)
            assert [found.category_ids[label - 1] for label in objects.labels] == [a["category_id"] for a in theirs]
            boxes = np.array([a["bbox"] for a in theirs]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            np.testing.assert_allclose(objects.boxes, boxes, atol=1)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_random_damage_gives_an_error_or_sound_objects(tmp_path, data):
    """Junk anywhere in a valid file: a ValueError that names the file, or objects that are in range."""
    coco = minimal()
    for _ in range(data.draw(st.integers(1, 3))):
        target = coco
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(target[key], (dict, list)) and target[key] and data.draw(st.booleans()):
                target = target[key]
                continue
            target[key] = data.draw(JUNK)
            break
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco))
    for on_error in ("raise", "skip"):
        try:
            found = read_coco(path, on_error=on_error)
        except ValueError as error:
            assert re.search(r"instances\.json", str(error))
            continue
        assert np.isfinite(found.boxes).all() and np.isfinite(found.points).all()
        assert ((found.labels >= 1) & (found.labels <= len(found.categories))).all()
        for i, (height, width) in enumerate(found.image_sizes):
            boxes = found.objects(i).boxes
            assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= width).all() and (boxes[:, [1, 3]] <= height).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
