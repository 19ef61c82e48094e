"""One annotation file as several."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.data.convert import main
from detector.data.formats import Notes
from detector.data.split import deal, split_coco


def films(count=12, frames=5, seed=0):
    """Frames of films; a rare category in few of them."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for film in range(count):
        for frame in range(frames):
            image = {"id": len(images) + 1, "file_name": f"film{film}_{frame}.png", "width": 40, "height": 40}
            images.append(image | {"patient": film, "extra": {"place": film % 3}, "date_captured": ""})
            for category in [1] * int(rng.integers(1, 4)) + [2] * (film % 4 == 0):
                box = {"bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
                annotations.append(box | {"id": len(annotations) + 1, "image_id": len(images), "category_id": category})
    categories = [{"id": 1, "name": "cell"}, {"id": 2, "name": "parasite"}, {"id": 3, "name": "never"}]
    return {"info": {"year": 2024}, "images": images, "annotations": annotations, "categories": categories}


@pytest.mark.parametrize("option", [{"by": "patient"}, {"pattern": r"^(film\d+)_"}])
def test_what_belongs_together_stays_together(option):
    content = films()
    parts = split_coco(content, {"train": 0.7, "val": 0.3}, **option)
    patients = [{image["patient"] for image in part["images"]} for part in parts.values()]
    assert not patients[0] & patients[1] and len(patients[0] | patients[1]) == 12
    assert sorted(i["id"] for part in parts.values() for i in part["images"]) == list(range(1, 61))
    for part in parts.values():
        own = {image["id"] for image in part["images"]}
        assert all(entry["image_id"] in own for entry in part["annotations"])
        assert part["categories"] == content["categories"] and part["info"] == content["info"]
        assert {entry["category_id"] for entry in part["annotations"]} == {1, 2}
    assert sum(len(part["annotations"]) for part in parts.values()) == len(content["annotations"])
    assert len(parts["val"]["images"]) == pytest.approx(0.3 * 60, abs=5)
    assert parts == split_coco(content, {"train": 0.7, "val": 0.3}, **option)


@given(st.integers(0, 2**31), st.integers(30, 200), st.integers(1, 8))
def test_every_side_gets_its_share(seed, units, classes):
    rng = np.random.default_rng(seed)
    amounts = np.concatenate([np.ones((units, 1)), rng.poisson(rng.uniform(0, 3, classes), (units, classes))], 1)
    sides = deal(amounts, [0.6, 0.2, 0.2], np.random.default_rng(seed))
    got = np.stack([amounts[sides == side].sum(0) for side in range(3)])
    wanted = np.array([0.6, 0.2, 0.2])[:, None] * amounts.sum(0)
    assert (np.abs(got - wanted) <= np.maximum(12, 0.2 * amounts.sum(0))).all()


def test_a_rare_category_is_on_both_sides():
    """Of 200 images three hold it; chance alone would leave one side in five without."""
    for seed in range(20):
        content = films(200, 1, seed)
        for entry in content["annotations"]:
            entry["category_id"] = 2 if entry["image_id"] in (5, 50, 150) else 1
        parts = split_coco(content, {"train": 0.7, "val": 0.3}, seed=seed)
        assert all(2 in Counter(a["category_id"] for a in part["annotations"]) for part in parts.values())


def test_the_command(tmp_path, capsys):
    file = tmp_path / "all.json"
    file.write_text(json.dumps(films()))
    assert main(["split", str(file), "--val", "0.2", "--test", "0.2", "--by", "extra.place", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'all_test.json'}: 20 images" in shown and (tmp_path / "all_train.json").is_file()
    parts = {name: json.loads((tmp_path / f"all_{name}.json").read_text()) for name in ("train", "val", "test")}
    assert all(len({i["extra"]["place"] for i in part["images"]}) == 1 for part in parts.values())


def test_a_category_in_one_group_is_told():
    content, notes = films(), Notes()
    for entry in content["annotations"]:
        entry["category_id"] = 2 if entry["image_id"] <= 5 else 1
    split_coco(content, {"train": 0.8, "val": 0.2}, by="patient", notes=notes)
    (line,) = notes.lines()
    assert "1 x category without an object in one of the files: parasite in " in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "doctor"], "60 of 60 images lack the field 'doctor': film0_0.png, film0_1.png"),
        (["--pattern", "^take"], "60 of 60 images lack a file name that '^take' matches"),
        (["--pattern", "("], "--pattern '(' is no regular expression"),
        (["--val", "1.5"], "the shares must be above 0 and add up to 1"),
        (["--val", "0.001"], "val would get none of the 60 images: give it a larger share"),
    ],
)
def test_what_cannot_be_split(tmp_path, capsys, options, message):
    file = tmp_path / "all.json"
    file.write_text(json.dumps(films()))
    assert main(["split", str(file), *options]) == 2
    assert message in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_records_that_cannot_be_dealt_out():
    content = films()
    content["annotations"][3]["image_id"] = 999
    with pytest.raises(ValueError, match="annotation 4: image_id=999 is unknown"):
        split_coco(content, {"train": 0.8, "val": 0.2})
    content["images"][1]["id"] = 1
    with pytest.raises(ValueError, match="ids must be whole numbers that occur once"):
        split_coco(content, {"train": 0.8, "val": 0.2})
