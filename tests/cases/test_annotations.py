"""Annotation files as tools write them: training, validation and both evaluators see the same objects, or all refuse."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from detector.commands import validate
from detector.config import build
from detector.engine import setup
from tests.cases.border import (
    KINDS,
    SIZES,
    Border,
    clean,
    convert,
    detections,
    drawn,
    drop,
    each,
    plain,
    put,
    records,
    rectangle,
)

Change = Callable[[dict], Any]


def nothing(data: dict) -> None:
    pass


class Case(NamedTuple):
    """says: what the one warning of the file tells; nothing: there is none. truth: what it makes of the clean file, as
    pycocotools reads it; for masks, `masks`. ids: new category and image ids by their old ones."""

    change: Change
    says: str = ""
    truth: Change = nothing
    masks: Change | None = None
    ids: tuple[dict, dict] = ({}, {})


def all_of(*changes: Change) -> Change:
    def apply(data: dict) -> None:
        for change in changes:
            change(data)

    return apply


def without_mask(*places: int) -> Change:
    """Nothing on the box of an object without a mask counts for masks."""

    def apply(data: dict) -> None:
        for place in places:
            entry = data["annotations"][place]
            entry |= {"segmentation": [rectangle(*entry["bbox"])], "iscrowd": 1}

    return apply


def renamed(categories: dict, images: dict) -> Change:
    def apply(data: dict) -> None:
        for record in data["categories"]:
            record["id"] = categories.get(record["id"], record["id"])
        for record in data["images"]:
            record["id"] = images.get(record["id"], record["id"])
        for entry in data["annotations"]:
            entry["category_id"] = categories.get(entry["category_id"], entry["category_id"])
            entry["image_id"] = images.get(entry["image_id"], entry["image_id"])

    return apply


def ids_as(how: Callable[[int], Any]) -> Change:
    return all_of(
        records("images", "id", how),
        records("categories", "id", how),
        convert("image_id", how),
        convert("category_id", how),
    )


def restarting(data: dict) -> None:
    seen: dict[int, int] = {}
    for entry in data["annotations"]:
        seen[entry["image_id"]] = entry["id"] = seen.get(entry["image_id"], 0) + 1


def of_runs(change: Callable[[dict], Any]) -> Change:
    """A change of run lengths; `change` returns the new segmentation."""
    return each(
        lambda entry: (
            isinstance(entry["segmentation"], dict) and entry.__setitem__("segmentation", change(entry["segmentation"]))
        )
    )


def of_polygons(change: Callable[[list], Any], single: bool = False) -> Change:
    """A change of polygons, or of those that have one ring only."""
    return each(
        lambda entry: (
            isinstance(entry["segmentation"], list)
            and (not single or len(entry["segmentation"]) == 1)
            and entry.__setitem__("segmentation", change(entry["segmentation"]))
        )
    )


def counts(how: Callable[[Any], Any], kind: type) -> Change:
    return of_runs(lambda s: s | {"counts": how(s["counts"])} if isinstance(s["counts"], kind) else s)


def pairs(ring: list[float]) -> list[list[float]]:
    return [ring[i : i + 2] for i in range(0, len(ring), 2)]


def super_category(data: dict) -> None:
    data["categories"].insert(0, {"id": 0, "name": "cat", "supercategory": "none"})


NEGATIVE = ({1: -1}, {1: -7, 2: -6})
WHOLE, FLAG = "number that is not written as a whole one", "iscrowd that is not written as 0 or 1"
AREA, BOX = "area that is no positive number, taken from the mask", "no bbox, taken from the segmentation"
NONE_LEFT = "segmentation without a polygon of at least three points"

READ = {
    # the files of ../shared/cases
    "no_bbox": Case(drop("bbox"), BOX),
    "area_text": Case(convert("area", str), "area written as text"),
    "area_zero": Case(put("area", 0), AREA),
    "box_of_no_size": Case(put("bbox", [10, 10, 0, 5], {3}), "bbox of no size", put("bbox", [10, 10, 0, 5], {3})),
    "segmentation_empty_ring": Case(put("segmentation", [[]], {0}), NONE_LEFT, masks=without_mask(0)),
    "segmentation_missing_for_one": Case(
        drop("segmentation", {0}), "object without a segmentation", masks=without_mask(0)
    ),
    "segmentation_two_points": Case(put("segmentation", [[1, 2, 9, 2]], {0}), NONE_LEFT, masks=without_mask(0)),
    "iscrowd_null": Case(put("iscrowd", None), FLAG, put("iscrowd", 0)),
    "iscrowd_text": Case(convert("iscrowd", str), FLAG),
    "annotation_ids_missing": Case(drop("id"), "annotation without an id of its own"),
    "image_size_float": Case(records("images", "width", float), WHOLE),
    "image_ids_text": Case(all_of(records("images", "id", str), convert("image_id", str)), WHOLE),
    "category_zero_repeats_a_name": Case(super_category, "category 0 repeats a name and no object uses it"),
    "date_captured_number": Case(records("images", "date_captured", lambda _: 0)),
    "license_text": Case(records("images", "license", lambda _: "")),
    "supercategory_number": Case(records("categories", "supercategory", lambda _: 0)),
    "info_year_text": Case(lambda data: data.__setitem__("info", {"year": "2024", "version": "1"})),
    # and more of each kind
    "ids as fractions": Case(ids_as(float), WHOLE),
    "ids as text of fractions": Case(ids_as("{}.0".format), WHOLE),
    "sizes as text": Case(all_of(records("images", "width", str), records("images", "height", str)), WHOLE),
    "negative ids": Case(renamed(*NEGATIVE), ids=NEGATIVE),
    "category 0": Case(renamed({1: 0}, {1: 0}), ids=({1: 0}, {1: 0})),
    "large ids": Case(renamed({2: 2**40}, {6: 2**53}), ids=({2: 2**40}, {6: 2**53})),
    "category name that is a number": Case(
        lambda data: data["categories"][0].update(name=7), "name of a category that is a number"
    ),
    "annotation ids that restart": Case(restarting, "annotation id that occurs twice"),
    "one annotation id": Case(put("id", 3), "annotation id that occurs twice"),
    "annotation ids that are no numbers": Case(convert("id", "a{}".format), "annotation without an id of its own"),
    "negative annotation ids": Case(convert("id", lambda i: -i)),
    "image that is listed twice": Case(
        lambda data: data["images"].append(copy.deepcopy(data["images"][0])), "image that is listed twice"
    ),
    "iscrowd true and false": Case(convert("iscrowd", bool), FLAG),
    "iscrowd as fractions": Case(convert("iscrowd", float), FLAG),
    "iscrowd as words": Case(convert("iscrowd", lambda flag: ["false", "True"][flag]), FLAG),
    "iscrowd missing": Case(drop("iscrowd", {0, 1, 2})),
    "bbox null": Case(put("bbox", None), BOX),
    "bbox empty": Case(put("bbox", [], {1, 2}), BOX),
    "bbox as text": Case(convert("bbox", lambda box: [str(v) for v in box]), "bbox written as text"),
    "bbox of negative size": Case(
        convert("bbox", lambda b: [b[0] + b[2], b[1] + b[3], -b[2], -b[3]], {0, 1, 4}), "bbox of negative size"
    ),
    "bbox outside": Case(put("bbox", [90, 9, 9, 9], {3}), "bbox outside the image", put("bbox", [90, 9, 9, 9], {3})),
    "bbox that reaches out": Case(
        put("bbox", [40, 9, 60, 9], {3}), "bbox reaches out of the image, clipped", put("bbox", [40, 9, 60, 9], {3})
    ),
    "area missing": Case(drop("area"), AREA),
    "area null": Case(put("area", None), AREA),
    "area NaN": Case(put("area", float("nan")), AREA),
    "area as a word": Case(put("area", "large"), AREA),
    "area negative": Case(put("area", -4.5), AREA),
    "area as a list": Case(put("area", [3]), AREA),
    "run lengths in a list": Case(of_runs(lambda s: [s]), "run lengths in a list"),
    "run lengths as fractions": Case(
        counts(lambda c: list(map(float, c)), list), "run lengths that are not written as whole numbers"
    ),
    "run lengths as text": Case(
        counts(lambda c: list(map(str, c)), list), "run lengths that are not written as whole numbers"
    ),
    "bytes as text": Case(counts(lambda c: str(c.encode()), str), "run lengths that are bytes written as text"),
    "size of masks as fractions": Case(of_runs(lambda s: s | {"size": list(map(float, s["size"]))}), "size of a mask that is not"),
    "polygons that are flat": Case(of_polygons(lambda s: s[0], single=True), "polygon that is not in a list"),
    "polygons of pairs": Case(of_polygons(lambda s: pairs(s[0]), single=True), "polygon that is not in a list"),
    "polygons of pairs in a list": Case(of_polygons(lambda s: list(map(pairs, s))), "polygon of pairs"),
    "polygons as text": Case(of_polygons(lambda s: [list(map(str, ring)) for ring in s]), "polygon written as text"),
    "polygon of an odd number": Case(
        put("segmentation", [[1, 2, 20, 2, 20, 20, 1]], {0, 3}), NONE_LEFT, masks=without_mask(0, 3)
    ),
    "one ring of two points": Case(
        of_polygons(lambda s: [*s, [1, 2, 3, 4]], single=True), "polygon of fewer than three points"
    ),
    "segmentation null": Case(put("segmentation", None, {0}), "object without a seg", masks=without_mask(0)),
    "segmentation an empty list": Case(put("segmentation", [], {0}), "object without a seg", masks=without_mask(0)),
    "segmentation an empty text": Case(put("segmentation", "", {0}), "object without a seg", masks=without_mask(0)),
    "a third is crowd": Case(
        put("iscrowd", 1, {0, 3, 6, 9}), "crowd region (iscrowd: 1) among only 15 objects", put("iscrowd", 1, {0, 3, 6, 9})
    ),
    "ignore": Case(put("ignore", 1, {0, 1})),  # pycocotools does not look at it either
}  # fmt: skip

ENCODINGS = {
    "utf8_bom": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "utf16": lambda text: text.encode("utf-16"),
    "utf16 without a mark": lambda text: text.encode("utf-16-le"),
    "utf32": lambda text: text.encode("utf-32"),
    "names beyond ASCII": lambda text: text.replace('"cat"', '"Kätzchen 猫"').encode(),
}

# fields that detection does not need, in every JSON type
VALUES = [None, True, 0, -1.5, "", "text", [], [1, "a"], {}, {"a": 1}]
NO_SAY = {
    "images": ["date_captured", "license", "flickr_url", "coco_url", "extra", "neg_category_ids"],
    "annotations": ["attributes", "score", "ignore", "keypoints", "num_keypoints", "caption"],
    "categories": ["supercategory", "color", "isthing", "keypoints", "skeleton", "frequency"],
}

# fields that matter, in every JSON type: whatever becomes of it, it is the same for all
MATTER = {
    "images": ["id", "file_name", "height", "width"],
    "annotations": ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"],
    "categories": ["id", "name"],
}


class Wrong(NamedTuple):
    """named: what the error tells beside the file. left: what data.on_error=skip makes of the clean file; None where it
    cannot help."""

    change: Change
    named: str
    left: Change | None = None


def without(*places: int) -> Change:
    def apply(data: dict) -> None:
        data["annotations"] = [a for i, a in enumerate(data["annotations"]) if i not in places]

    return apply


def without_image(*ids: int) -> Change:
    def apply(data: dict) -> None:
        for key, field in (("images", "id"), ("annotations", "image_id")):
            data[key] = [record for record in data[key] if record[field] not in ids]

    return apply


def used_twice(data: dict) -> None:
    super_category(data)
    data["annotations"][0]["category_id"] = 0


def first_image(**values: Any) -> Change:
    return lambda data: data["images"][0].update(values)


def as_fractions(data: dict) -> None:
    for entry in data["annotations"]:
        height, width = SIZES[entry["image_id"]]
        entry["bbox"] = [v / side for v, side in zip(entry["bbox"], (width, height) * 2)]


REFUSED = {
    "iscrowd 2": Wrong(put("iscrowd", 2, {1}), "annotation 2 iscrowd=2", without(1)),
    "iscrowd a word": Wrong(put("iscrowd", "many", {1}), "annotation 2 iscrowd='many'", without(1)),
    "bbox with NaN": Wrong(put("bbox", [1, 2, float("nan"), 4], {1}), "annotation 2 bbox=[1, 2, nan, 4]", without(1)),
    "bbox of words": Wrong(put("bbox", ["a", 2, 3, 4], {1}), "annotation 2 bbox=['a', 2, 3, 4]", without(1)),
    "neither box nor mask": Wrong(all_of(drop("bbox", {1}), drop("segmentation", {1})), "annotation 2 bbox=None", without(1)),
    "no bbox, half of the objects": Wrong(
        all_of(drop("bbox", {0, 2, 4}), put("segmentation", [[]], {0, 2, 4})), "annotation 1 bbox=None", without(0, 2, 4)
    ),
    "unknown image": Wrong(put("image_id", 99, {1}), "annotation 2 image_id=99", without(1)),
    "unknown category": Wrong(put("category_id", 0, {1}), "annotation 2 category_id=0", without(1)),
    "masks of another size": Wrong(
        put("segmentation", {"size": [9, 9], "counts": [81]}, {1}), "annotation 2 size=[9, 9]", without(1)
    ),
    "run lengths that do not fill": Wrong(
        put("segmentation", {"size": [64, 64], "counts": [5, 6]}, {1}), "annotation 2 segmentation: counts covers 11",
        without(1),
    ),
    "run lengths that are none": Wrong(
        put("segmentation", {"size": [64, 64], "counts": "b'"}, {1}), "annotation 2 segmentation: counts", without(1)
    ),
    "polygon of words": Wrong(put("segmentation", [["a", "b"]], {1}), "annotation 2 segmentation", without(1)),
    "polygon far away": Wrong(put("segmentation", [[1e9, 0, 5, 5, 0, 5]], {1}), "reach out of the image", without(1)),
    "image without a name": Wrong(first_image(file_name=""), "image 1 file_name=''", without_image(1)),
    "image without a size": Wrong(first_image(width="wide"), "image 1 height=64 width='wide'", without_image(1)),
    "image that is not there": Wrong(first_image(file_name="gone.png"), "gone.png", without_image(1)),
    "image id twice": Wrong(
        lambda data: data["images"].append(data["images"][0] | {"file_name": "6.png"}), "duplicate image id: image 1",
        nothing,
    ),
    "category zero and its namesake in use": Wrong(used_twice, "'cat' is that of id 0 (1 objects) and id 1 (7 objects)"),
    "names twice": Wrong(records("categories", "name", lambda _: "cat"), "'cat' is that of id 1 (7 objects) and id 2"),
    "category ids twice": Wrong(records("categories", "id", lambda _: 1), "1 is that of 'cat' and of 'dog'"),
    "all is crowd": Wrong(put("iscrowd", 1), "all 15 usable objects are crowd regions"),
    "boxes in fractions": Wrong(as_fractions, "bbox are fractions of the image"),
    "boxes as corners": Wrong(
        convert("bbox", lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]), "bbox are corners [x1, y1, x2, y2]"
    ),
    "no objects": Wrong(lambda data: data.update(annotations=[]), "no usable objects"),
    "no list": Wrong(lambda data: data.update(annotations={}), "'annotations' is a dict"),
}  # fmt: skip

RESULTS = detections()


@pytest.fixture(scope="module")
def border(tmp_path_factory):
    """The settings are the same throughout, so the model that they describe is built once."""
    patch = pytest.MonkeyPatch()
    border = Border(tmp_path_factory.mktemp("border"))
    skeleton = setup.skeleton(border.cfg)
    patch.setattr(setup, "skeleton", lambda cfg: skeleton)
    patch.setattr(setup, "preflight", lambda *_: None)
    built = cache(lambda name: build(OmegaConf.select(border.cfg, name), name))
    patch.setattr(validate, "build", lambda node, name: built(name))
    yield border
    patch.undo()


def made(*changes: Change) -> dict:
    data = clean()
    all_of(*changes)(data)
    return data


@cache
def numbers_of(text: str, kind: str) -> dict[str, float]:
    truth = json.loads(text)
    images = {image["id"] for image in truth["images"]}
    return plain(truth, [r for r in RESULTS if r["image_id"] in images], kind)


def expected(truth: Change = nothing, masks: Change | None = None) -> dict[str, dict[str, float]]:
    """pycocotools' own numbers; ids do not matter."""
    return {kind: numbers_of(json.dumps(made(truth if kind == "bbox" or not masks else masks)), kind) for kind in KINDS}


def with_ids(categories: dict, images: dict) -> list[dict]:
    return [
        r | {"category_id": categories.get(r["category_id"], r["category_id"]), "image_id": images.get(i, i)}
        for r in RESULTS
        for i in [r["image_id"]]
    ]


@pytest.mark.parametrize("name", READ)
def test_what_can_only_mean_one_thing_is_read(border, name):
    case = READ[name]
    outcome = border.outcome(made(case.change), with_ids(*case.ids))
    assert outcome.error is None
    assert outcome.numbers == expected(case.truth, case.masks)
    of_file = [text for text in outcome.said if text.startswith(str(border.folder))]
    assert len(of_file) == bool(case.says), outcome.said
    if case.says:
        assert case.says in of_file[0] and re.search(r"\d+ x ", of_file[0])
        assert any(case.says in finding.what for finding in outcome.report.findings)


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings(border, name):
    outcome = border.outcome(ENCODINGS[name](json.dumps(clean(), ensure_ascii=False)), RESULTS)
    assert outcome.error is None and outcome.said == [] and outcome.numbers == expected()


@pytest.mark.parametrize("kind, key", [(kind, key) for kind, keys in NO_SAY.items() for key in keys])
def test_fields_that_detection_does_not_need_have_no_say(border, kind, key):
    for value in VALUES:
        data = made(records(kind, key, lambda _: value))  # noqa: B023
        outcome = border.outcome(data, RESULTS)
        federated = key == "neg_category_ids" and isinstance(value, list)  # LVIS's: measured in another way
        assert (outcome.error, outcome.said) == (None, []), value
        assert federated or outcome.numbers == expected(), value


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_before_anything_else_or_left_out_everywhere(border, name):
    case = REFUSED[name]
    outcome = border.outcome(made(case.change), RESULTS)
    assert outcome.error and "file.json" in outcome.error and case.named in outcome.error, outcome.error
    images = {image["id"] for image in made(case.left or nothing)["images"]}
    results = [r for r in RESULTS if r["image_id"] in images]
    kept = border.outcome(made(case.change), results, on_error="skip")
    if case.left is None:
        assert kept.error and case.named in kept.error
    else:
        assert kept.error is None and kept.numbers == expected(case.left)
        assert any(case.named in text for text in kept.said)


@pytest.mark.parametrize("kind, key", [(kind, key) for kind, keys in MATTER.items() for key in keys])
def test_whatever_stands_in_a_field_all_agree(border, kind, key):
    """`Border.outcome` asserts that run, validate, both evaluators and the file by itself agree."""
    for value in [*VALUES, 2**70, [[]], {"size": [64, 64], "counts": [4096]}, [1, 2, 3, 4]]:
        data = clean()
        data[kind][0][key] = copy.deepcopy(value)
        outcome = border.outcome(data, known(data))
        if outcome.error is not None:
            assert "file.json" in outcome.error
            border.outcome(data, known(data), on_error="skip")


def known(data: dict) -> list[dict]:
    """The results for the images and categories that a damaged file still has."""
    images, categories = ({r["id"] for r in data[k] if isinstance(r["id"], int)} for k in ("images", "categories"))
    lost = {1} if json.dumps(data["images"][0]) != json.dumps(clean()["images"][0]) else set()  # True is no 1
    return [r for r in RESULTS if r["image_id"] in images - lost and r["category_id"] in categories]


def test_the_way_out_of_names_used_twice_is_one(border):
    """The error about category 0 says what to write; written so, the file is read."""
    data = made(used_twice)
    error = border.outcome(data, RESULTS, step=False).error
    target, source = re.search(r"write category_id (\d+) for the objects of (\d+) and remove", error).groups()
    for entry in data["annotations"]:
        if entry["category_id"] == int(source):
            entry["category_id"] = int(target)
    data["categories"] = [c for c in data["categories"] if c["id"] != int(source)]
    assert border.outcome(data, RESULTS).numbers == expected(put("category_id", 1, {0}))


def test_every_shared_case_is_in_the_table(shared, border):
    """The files that fell short once, from the generator that is beside the project."""
    path = shared / "cases" / "annotations.py"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    spec = importlib.util.spec_from_file_location("shared_cases", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.CASES) <= set(READ) and set(module.ENCODINGS) <= set(ENCODINGS)
    for change in module.CASES.values():
        assert border.outcome(made(change), RESULTS).error is None


# variations of fields that leave the clean file's meaning as it is, by the objects they are made to; masks come first
def of_rings(change: Callable[[dict], Any]) -> Callable[[set[int]], Change]:
    return lambda only: each(
        lambda e: isinstance(e["segmentation"], list) and e.__setitem__("segmentation", change(e)), only
    )


VARIATIONS = {
    "segmentation": {
        "run lengths": of_rings(lambda e: [drawn(e["segmentation"], SIZES[e["image_id"]])]),
        "pairs": of_rings(lambda e: list(map(pairs, e["segmentation"]))),
    },
    "bbox": {
        "missing": lambda only: drop("bbox", only),
        "turned round": lambda only: convert("bbox", lambda b: [b[0] + b[2], b[1], -b[2], b[3]], only),
        "text": lambda only: convert("bbox", lambda b: list(map(str, b)), only),
    },
    "area": {"none": lambda only: put("area", 0, only), "text": lambda only: convert("area", str, only)},
    "iscrowd": {
        "text": lambda only: convert("iscrowd", str, only),
        "truth": lambda only: convert("iscrowd", bool, only),
    },
    "id": {"missing": lambda only: drop("id", only), "twice": lambda only: put("id", 7, only)},
    "image_id": {"text": lambda only: convert("image_id", str, only)},
    "category_id": {"fraction": lambda only: convert("category_id", float, only)},
    "attributes": {"any": lambda only: put("attributes", {"occluded": None}, only)},
}
DAMAGE = {
    "iscrowd": lambda only: put("iscrowd", 2, only),
    "image": lambda only: put("image_id", None, only),
    "category": lambda only: put("category_id", "cat", only),
    "box": lambda only: put("bbox", [1, None, 3, 4], only),
    "mask": lambda only: put("segmentation", {"size": [1, 1], "counts": "1"}, only),
}
PLACES = st.sets(st.integers(0, 14), min_size=1)
MIXTURES = st.dictionaries(st.sampled_from(list(VARIATIONS)), st.tuples(st.integers(0, 5), PLACES), min_size=1)


@settings(max_examples=25)
@given(
    mixture=MIXTURES,
    damage=st.dictionaries(st.sampled_from(list(DAMAGE)), st.sets(st.integers(0, 14), max_size=2), max_size=2),
)
def test_mixtures_of_variations(border, mixture, damage):
    """Reader, validate, one training step and both evaluators agree on what pycocotools says of the clean file without
    the damaged objects."""
    names = {field: list(VARIATIONS[field])[number % len(VARIATIONS[field])] for field, (number, _) in mixture.items()}
    if (names.get("segmentation"), names.get("bbox")) == ("run lengths", "missing"):
        del names["bbox"]  # it would be that of whole pixels
    changes = [VARIATIONS[field][names[field]](mixture[field][1]) for field in VARIATIONS if field in names]
    lost = set().union(*damage.values())
    data = made(*changes, *(DAMAGE[name](places) for name, places in damage.items()))
    if lost:
        assert "file.json" in border.outcome(data, RESULTS).error
    kept = border.outcome(data, RESULTS, on_error="skip" if lost else "raise")
    assert kept.error is None and kept.numbers == expected(without(*lost))
