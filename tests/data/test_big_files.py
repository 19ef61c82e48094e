"""Annotation files that are read block by block: the same arrays, notices and errors as record by record."""

from __future__ import annotations

import codecs
import copy
import dataclasses
import json
import math
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detector.data import json_lists, read_coco
from detector.data.annotations import Annotations, Truth
from detector.data.columns import Columns, Rows, Seen, order_of
from detector.data.json_lists import JsonList, NotJSON, read_lists
from detector.data.read_coco import Problems, read_truth
from tests.data.coco_files import minimal

NUMBERS = [0, 1, -1, 0.5, -0.0, 7.0, "7", " 8.0 ", 1e300, -1e-300, 2**31, 2**63, -(2**63), 2**70, 1e19, True, None, "x"]
NUMBERS += [math.nan, math.inf, -math.inf, 9007199254740993, 10**30, [], {}, "", 3.999999999999999999]
BOXES = [[1, 2, 3, 4], [1, 2, 3.5, 4], [5, 5, 0, 3], [-3, 2, 20, 9], [70, 2, 3, 4], [9, 9, -4, -5], ["1", 2, 3, 4]]
BOXES += [
    [1, 2, 3],
    None,
    [],
    {},
    "1,2,3,4",
    [1, 2, None, 4],
    [1e308, 1, 1e308, 1],
    [0.1, 0.2, 0.3, 0.4],
    [1, 2, True, 4],
]
SQUARE = [5, 6, 25, 6, 25.5, 16, 5, 16]
COUNTS = [100, 10, 30, 10, 60 * 40 - 150]
OUTLINES = [
    [SQUARE],
    [SQUARE, [1, 1, 9, 1, 9, 9.25]],
    [],
    None,
    "",
    [[]],
    [[1, 2, 3, 4]],
    [SQUARE, [1, 2, 3]],
    [SQUARE[:7]],
]
OUTLINES += [SQUARE, [[1, 2], [9, 2], [9, 9]], [["1", "2", "3", "4", "5", "6"]], [[1, 2, None, 4, 5, 6]], {}, 7, "abc"]
OUTLINES += [
    [[70, 2, 80, 2, 80, 9]],
    [[5, 5, 5, 9, 5, 20]],
    [[1, 2, 1e9, 4, 5, 6]],
    [[1, 2, 10**400, 4, 5, 6]],
    [[True] * 6],
]
OUTLINES += [
    {"size": [40, 60], "counts": COUNTS},
    {"size": [9, 9], "counts": COUNTS},
    {"size": [40, 60], "counts": "x"},
]
EXTRA = [
    {"a": [{"b": 1}, {"c": "}, {"}]},
    ['"', "\\", "],["],
    "\u00e9\U0001f600",
    "\ud800",
    [[[[1]]]],
    math.nan,
    'a\\"b\n',
    10**400,
]
FIELDS = {
    "id": NUMBERS + list(range(9)),
    "image_id": [7, 9, 7.0, "9", *NUMBERS],
    "category_id": [5, 2, 5.0, "2", *NUMBERS],
    "bbox": BOXES,
    "area": [200, 0, -3, *NUMBERS],
    "iscrowd": [0, 1, *NUMBERS],
    "ignore": [0, 1, *NUMBERS],
    "segmentation": OUTLINES,
    "attributes": [{}, {"rotation": 0.0}, {"rotation": 30}, {"rotation": "45"}, {"occluded": False}, [], None, 3],
    "keypoints": [[1, 2, 2], [0, 0, 0], [1, 2, 3], [1.5, 2, 1], [], None, "x"],
    "num_keypoints": NUMBERS,
    "extra": EXTRA,
}
PICTURE = {
    "id": [7, 9, 11, 12, *NUMBERS],
    "file_name": ["a.png", "b.png", "\u00e9.png", "", None, 3, "\ud800", "a\\b.png"],
    "height": [40, 60, *NUMBERS],
    "width": [60, 40, *NUMBERS],
    "neg_category_ids": [[], [5], [2, 5, 99], ["5"], None],
    "not_exhaustive_category_ids": [[], [2], None],
    "extra": EXTRA,
}


@st.composite
def records(draw, fields, plain):
    record = copy.deepcopy(plain)
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)):
        record[name] = draw(st.sampled_from(fields[name]))
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=1)) if draw(st.booleans()) else ():
        record.pop(name, None)
    return dict(draw(st.permutations(sorted(record.items(), key=lambda item: item[0]))))


@st.composite
def contents(draw):
    content = minimal()
    images = [*content["images"], {"id": 11, "file_name": "c.png", "width": 60, "height": 40}]
    listed = draw(st.booleans())
    for image in images if listed else ():
        image |= {"neg_category_ids": [5], "not_exhaustive_category_ids": []}
    odd_images = st.sampled_from(images).flatmap(lambda plain: records(PICTURE, plain))
    content["images"] = images + draw(st.lists(odd_images, max_size=3) if draw(st.booleans()) else st.just([]))
    plain = st.builds(
        lambda id_, image, category, outlined: (
            (content["annotations"][0] if outlined else content["annotations"][1])
            | {"id": id_, "image_id": image, "category_id": category}
        ),
        st.integers(0, 200),
        st.sampled_from([7, 9, 11]),
        st.sampled_from([5, 2]),
        st.booleans(),
    )
    odd = plain.flatmap(lambda record: records(FIELDS, record))
    more = st.integers(0, 12).flatmap(lambda number: odd if number else st.sampled_from([3, "x", None, [], {}]))
    content["annotations"] += draw(st.lists(st.one_of(plain, plain, more), max_size=12))
    content["info"] = draw(st.sampled_from([*EXTRA, {"description": "}, {"}]))
    content["other"] = draw(st.sampled_from([[], [1, 2, 3], [[], [{}]], {}, *EXTRA]))
    return dict(draw(st.permutations(list(content.items()))))


def found_by(read, **options):
    """Arrays and problems, or the error."""
    problems = Problems("file", "skip")
    try:
        found = read(problems=problems, **options)
    except (ValueError, OverflowError) as error:
        return type(error), str(error).partition(": ")[2], problems.found
    return found, problems.found


def assert_same(one, other):
    assert type(one) is type(other), (one, other)
    if isinstance(one, (Annotations, Truth)):
        for item in dataclasses.fields(one):
            assert_same(getattr(one, item.name), getattr(other, item.name))
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other):
            assert_same(left, right)
    elif isinstance(one, dict):
        assert list(one.items()) == list(other.items())
    else:
        assert one == other


def text_of(content, style: int) -> bytes:
    options = [{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}][style]
    return json.dumps(content, **options).encode("utf-8", errors="surrogatepass")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(json_lists, "BLOCK", 300)
    monkeypatch.setattr(json_lists, "NEAR", 100)


SHARED = [HealthCheck.function_scoped_fixture]  # all examples have small blocks


@settings(max_examples=60, suppress_health_check=SHARED)
@given(content=contents(), style=st.integers(0, 3), masks=st.booleans(), keypoints=st.booleans(), truth=st.booleans())
def test_blocks_give_what_single_records_give(tmp_path_factory, small_blocks, content, style, masks, keypoints, truth):
    path = tmp_path_factory.mktemp("odd") / "instances.json"
    path.write_bytes(text_of(content, style))
    if keypoints:
        content["categories"] = [c | {"keypoints": ["nose"]} for c in content["categories"]]
        path.write_bytes(text_of(content, style))
    loaded = json.loads(path.read_bytes())  # read record by record
    options = {"masks": masks, "keypoints": keypoints, "truth": truth}
    one, other = (found_by(partial(read_coco, source), **options) for source in (path, loaded))
    assert_same(one, other)


@settings(max_examples=30, suppress_health_check=SHARED)
@given(content=contents(), masks=st.booleans())
def test_truth_without_sizes_is_the_same(tmp_path_factory, small_blocks, content, masks):
    for image in content["images"]:
        image.pop("width", None)
    path = tmp_path_factory.mktemp("odd") / "instances.json"
    path.write_bytes(text_of(content, 0))

    def read(source, problems):
        return read_truth(source, masks)

    one, other = (found_by(partial(read, source)) for source in (path, json.loads(path.read_bytes())))
    assert_same(one, other)


def error_of(read) -> str | None:
    try:
        read()
    except (ValueError, RecursionError) as error:
        return str(error)


@settings(max_examples=60, suppress_health_check=SHARED)
@given(content=contents(), style=st.integers(0, 3), data=st.data())
def test_damage_is_told_as_the_standard_library_tells_it(tmp_path_factory, small_blocks, content, style, data):
    text = bytearray(text_of(content, style))
    at = data.draw(st.integers(0, len(text)))
    kind = data.draw(st.sampled_from(["cut", "remove", "put", "more"]))
    if kind == "cut":
        del text[at:]
    elif kind == "remove":
        del text[at : at + data.draw(st.integers(1, 3))]
    elif kind == "put":
        text[at:at] = data.draw(
            st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"0", b"\n", b"\xff"])
        )
    else:
        text += data.draw(st.sampled_from([b" ", b"\n{}", b"]", b"x", b"\0", b","]))
    path = tmp_path_factory.mktemp("odd") / "instances.json"
    path.write_bytes(text)
    assert error_of(lambda: read_lists(path)) == error_of(lambda: json.loads(bytes(text)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"])
def test_encodings(tmp_path, small_blocks, encoding):
    content = minimal()
    content["images"][0]["file_name"] = "\u00e9\U0001f600.png"
    path = tmp_path / "instances.json"
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert_same(read_coco(path), read_coco(content))
    path.write_bytes(b"[" + codecs.BOM_UTF8)
    assert error_of(lambda: read_lists(path)) == error_of(lambda: json.loads(path.read_bytes()))


def boxes_only(path: Path, count: int) -> Path:
    """A file of many objects as most tools write them."""
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(0, 30, (count, 2)), rng.uniform(1, 9, (count, 2))], axis=1).round(3).tolist()
    content = minimal() | {
        "annotations": [
            {"id": i, "image_id": (7, 9)[i % 2], "category_id": 5, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, box in enumerate(boxes, 1)
        ]
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_usual_records_are_not_read_one_by_one(tmp_path, monkeypatch):
    path = boxes_only(tmp_path / "instances.json", 1000)
    monkeypatch.delattr(sys.modules["detector.data.read_coco"]._Reader, "_read_object")
    assert len(read_coco(path).boxes) == 1000


def test_memory_is_that_of_the_arrays(tmp_path):
    path = boxes_only(tmp_path / "instances.json", 40_000)
    tracemalloc.start()
    try:
        found = read_coco(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    arrays = sum(
        value.nbytes for part in (found, found.truth) for value in vars(part).values() if hasattr(value, "nbytes")
    )
    assert peak < 2 * arrays + 16e6, (peak, arrays)  # loaded as a whole it takes 60 MB


def test_lists_of_any_kind_are_cut_into_blocks(tmp_path, small_blocks):
    content = {
        "a": [{"x": "}, {"}] * 90,
        "b": list(range(900)),
        "c": {"d": ["y" * 2000] * 2},
        "e": [[{}, {}]] * 99,
        "f": 1.5,
    }
    path = tmp_path / "any.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    found = read_lists(path)
    assert {key: value for key, value in found.items() if not isinstance(value, JsonList)} == {"c": dict, "f": float}
    for key in "abe":
        assert list(found[key]) == content[key] and len(list(found[key].blocks())) > 2
        assert [block.first for block in found[key].blocks()][1] == len(json.loads(next(found[key].blocks()).data))


def test_a_top_level_that_is_no_object(tmp_path):
    for text, kind in (("[1, 2]", list), ("3", int), (' "x" ', str)):
        (tmp_path / "any.json").write_text(text, encoding="utf-8")
        assert read_lists(tmp_path / "any.json") is kind
    (tmp_path / "any.json").write_text("[1, 2", encoding="utf-8")
    with pytest.raises(NotJSON):
        read_lists(tmp_path / "any.json")


@given(parts=st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9), max_size=9), max_size=9))
def test_numbers_that_came_before(parts):
    seen, known = Seen(), set()
    for part in parts:
        values = np.array(part, np.int64)
        assert seen.has(values).tolist() == [value in known for value in part]
        expected = [value in known or value in part[:i] for i, value in enumerate(part)]
        assert seen.add(values).tolist() == expected
        known |= set(part)


@given(
    ids=st.lists(st.integers(0, 40) | st.integers(-(2**63), 2**63 - 1), unique=True),
    asked=st.lists(st.integers(-3, 44)),
)
def test_rows_of_numbers(ids, asked):
    asked = [*asked, *ids]
    expected = [ids.index(value) if value in ids else -1 for value in asked]
    assert Rows(np.array(ids, np.int64)).of(np.array(asked, np.int64)).tolist() == expected


@given(keys=st.lists(st.integers(0, 3) | st.integers(0, 2**31 - 1)))
def test_order_is_stable(keys):
    assert order_of(np.array(keys, np.int32)).tolist() == sorted(range(len(keys)), key=keys.__getitem__)


@pytest.mark.parametrize("joined", [1, 40, 1 << 28])
def test_columns_are_put_in_order(monkeypatch, joined):
    monkeypatch.setattr("detector.data.columns.JOINED", joined)
    columns = Columns()
    for values, lists in (([1, 2], [[7], [8, 9]]), ([3], [[]]), ([4], [[5]])):
        flat = [value for group in lists for value in group]
        block = {"a": np.array(values), "b": np.array(flat, np.int64), "b_counts": np.array(list(map(len, lists)))}
        columns.append(block, len(values))
    places = np.array([3, 0, 1, 2])
    assert columns.length == 4 and columns.take("a", places).tolist() == [2, 3, 4, 1]
    values, starts = columns.take_lists("b", places)
    assert values.tolist() == [8, 9, 5, 7] and starts.tolist() == [0, 2, 2, 3, 4] and not columns.blocks
