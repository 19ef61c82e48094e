"""Attributes of objects, in both forms that are in use: what is read, what is unknown, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest

from detector.data import CocoDataset, collate
from detector.data.attributes import UNKNOWN
from detector.data.read_coco import Problems, read_coco
from detector.data.several import read_several
from detector.data.store import open_coco
from tests.data.coco_files import minimal, write

TABLE = [{"id": 4, "name": "striped"}, {"id": 2, "name": "old"}, {"id": 9, "name": "torn"}]


def of(*given, table=None, **others) -> dict:
    """A COCO file whose objects have these `attributes`; None: an object without the field."""
    coco = minimal()
    first = coco["annotations"][0]
    coco["annotations"] = [
        {**first, "id": number} | ({} if one is None else {"attributes": one}) for number, one in enumerate(given, 1)
    ]
    return coco | ({"attributes": table} if table else {}) | others


def read(coco, attributes=True):
    problems = Problems("file")
    found = read_coco(coco, attributes=attributes, problems=problems)
    assert np.array_equal(found.attributes, found.truth.attributes)
    return found.attribute_groups, found.attributes.tolist(), {kind: p.count for (_, kind), p in problems.found.items()}


def test_a_list_names_what_is_there_and_no_list_is_unknown():
    groups, codes, said = read(of([4, 9], None, [], [2], table=TABLE))
    assert groups == [["striped"], ["old"], ["torn"]]
    assert codes == [[1, 0, 1], [-1, -1, -1], [0, 0, 0], [0, 1, 0]] and not said


def test_fashionpedias_field_and_names_in_the_place_of_ids():
    coco = of(["torn"], None, table=TABLE)
    coco["annotations"][1]["attribute_ids"] = [2]
    assert read(coco)[1] == [[0, 0, 1], [0, 1, 0]]


def test_words_truth_values_and_what_an_object_does_not_say():
    groups, codes, said = read(
        of(
            {"occluded": False, "color": "red", "rotation": 0.0, "track_id": 7, "keyframe": True},
            {"occluded": "true", "color": "blue"},
            {"occluded": 1, "color": "__undefined__"},
            {"color": None},
            None,
        )
    )
    assert groups == [["occluded"], ["color", "blue", "red"]]
    assert codes == [[0, 1], [1, 0], [1, -1], [-1, -1], [-1, -1]] and not said


def test_what_is_no_label_is_left_out_and_counted():
    groups, codes, said = read(
        of(
            *({"plate": f"XY {i}", "age": i, "maker": "one", "fine": i % 2 == 0, "a${b}": True} for i in range(101)),
            {"fine": {"deep": 1}, "yes": "true"},
            {"yes": "no"},
        )
    )
    assert groups == [["fine"], ["yes", "no", "true"]]
    assert codes[:2] == [[1, -1], [0, -1]] and codes[-2:] == [[-1, 1], [-1, 0]]
    assert said == {
        "attribute that is a number, left out": 99,
        "attribute that is neither true nor false nor a word, left out": 1,
        "attribute of more than 100 different words, which is free text: left out": 1,
        "attribute that is the same word for every object: left out": 1,
    }


@pytest.mark.parametrize("given", [[3], ["blue"], "red", 4, [[1]], [{"name": "a"}]])
def test_what_cannot_be_an_attribute_stops_with_its_place(given):
    with pytest.raises(ValueError, match=r"1 x attributes are neither ids nor names .* annotation 1 attributes="):
        read_coco(of(given, [4], table=TABLE), attributes=True)
    assert len(read_coco(of(given, [4], table=TABLE), attributes=True, on_error="skip").labels) == 2
    read_coco(of(given, [4], table=TABLE))  # nobody asked


@pytest.mark.parametrize("table", [[{"id": 1}], [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], ["red"]])
def test_a_table_that_names_nothing(table):
    with pytest.raises(ValueError, match=r"attributes: .*(needs an 'id' and a text 'name'|must each occur once)"):
        read_coco(of([1], table=table), attributes=True)


def test_some_by_name_and_the_groups_of_a_training_set():
    coco = of({"a": True, "b": "x"}, {"a": False, "b": "y"})
    assert read(coco, ["b"])[:2] == ([["b", "x", "y"]], [[0], [1]])
    with pytest.raises(ValueError, match=r"data\.attributes: no object has 'c'; there are a, b"):
        read_coco(coco, attributes=["c"])
    groups, codes, said = read(coco, [["b", "w", "x"], ["c"]])
    assert groups == [["b", "w", "x"], ["c"]] and codes == [[1, -1], [UNKNOWN, -1]]
    assert said == {"attribute of a value that is not among those of the training set, unknown": 1}


def test_several_files_know_together_what_each_knows(tmp_path):
    files = [of({"b": "y", "a": True}, {"b": "x"}), of({"c": False, "b": "z"}, {"b": "y"})]
    paths = [write(tmp_path, {**coco}, f"{name}.json") for name, coco in zip("pq", files)]
    found = read_several(paths, attributes=True, problems=Problems("both"))
    assert found.attribute_groups == [["b", "x", "y", "z"], ["a"], ["c"]] == found.truth.attribute_groups
    expected = [[1, 1, -1], [0, -1, -1], [2, -1, 0], [1, -1, -1]]
    assert found.attributes.tolist() == expected == found.truth.attributes.tolist()
    clash = write(tmp_path, of({"b": True}), "r.json")
    with pytest.raises(ValueError, match="attribute 'b' is true or false in one file and a word in another"):
        read_several([paths[0], clash], attributes=True, problems=Problems("both"))


def test_a_store_keeps_them_and_batches_have_them(tmp_path):
    path = write(tmp_path, of({"a": True}, {"a": False}, None))
    stored = [open_coco(path, attributes=True, cache=tmp_path / "cache", small=0) for _ in range(2)][1]
    assert stored.attribute_groups == [["a"]] == stored.truth.attribute_groups
    assert stored.attributes.tolist() == [[1], [0], [-1]]
    assert open_coco(path, cache=tmp_path / "cache", small=0).attributes.shape == (3, 0)
    dataset = CocoDataset(tmp_path, path, attributes=True)
    targets = collate([dataset[0], dataset[1]])[1]
    assert targets.attributes[0].tolist() == [[1], [0], [-1]]
    assert collate([CocoDataset(tmp_path, path)[0]])[1].attributes is None


def test_augmented_objects_keep_their_own(tmp_path):
    """Copy-paste puts objects of another image in, and covers some."""
    coco = of(*({"n": str(i)} for i in range(6)))
    for number, entry in enumerate(coco["annotations"]):
        entry["image_id"], entry["category_id"] = (7, 9)[number % 2], (5, 2)[number % 2]
        x = entry["bbox"][0] = 2 + 3 * number
        entry["bbox"][2:] = [8 + number, 10]
        entry["segmentation"] = [[x, 6, x + 8 + number, 6, x + 8 + number, 16, x, 16]]
    dataset = CocoDataset(tmp_path, write(tmp_path, coco), attributes=True, copy_paste=1.0, training=True)
    mixed = 0
    for epoch in range(6):
        sample = dataset[epoch, 0]
        assert len(sample.attributes) == len(sample.boxes)
        assert ((sample.attributes[:, 0] % 2 == 0) == (sample.labels == 2)).all()  # cat is label 2 of ids 2, 5
        mixed += len(set(sample.labels.tolist())) == 2
    assert mixed
