"""The generated data set."""

from __future__ import annotations

import json
import sys

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from detector.commands import figures
from detector.commands.make_shapes import main, make_shapes
from detector.data import CocoDataset
from detector.data.dataset import mirrored_keypoints


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_whatever_the_number_of_processes(tmp_path):
    for name, options in {"a": {"processes": 1}, "b": {"processes": 3}, "c": {"seed": 1}}.items():
        make_shapes(tmp_path / name, train=20, val=3, size=64, **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    assert len(contents(tmp_path / "a")) == 25


@pytest.mark.parametrize("option", ["train", "val", "size", "kind"])
def test_wrong_options(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option}=0"):
        make_shapes(tmp_path, **{option: 0})


@pytest.mark.parametrize(("more", "named"), [(["--val", "0"], "val=0"), (["--video", "--train", "0"], "train=0")])
def test_wrong_options_end_the_command_in_one_line(more, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shapes", "--out", str(tmp_path / "new"), *more])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("error: ") and named in printed
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """300 images: enough for every rare thing."""
    out = tmp_path_factory.mktemp("shapes")
    make_shapes(out, train=300, val=1, size=96)
    return out


def test_what_it_promises(sample):
    coco = COCO(sample / "annotations" / "instances_train.json")
    annotations = coco.dataset["annotations"]
    kinds = {type(a["segmentation"]) for a in annotations}
    longer = [max(a["bbox"][2:]) for a in annotations if not a["iscrowd"]]
    per_category = np.bincount([a["category_id"] for a in annotations])
    assert kinds == {list, dict}
    assert 0 < sum(a["iscrowd"] for a in annotations) < 0.02 * len(annotations)
    assert 0 < sum(not coco.imgToAnns[i] for i in coco.imgs) < 0.1 * len(coco.imgs)
    assert max(longer) > 10 * min(longer)
    assert (np.sort(per_category)[-5:] > 0.15 * len(annotations)).all() and (per_category > 0).sum() == 5
    assert any(len(a["segmentation"]) > 1 for a in annotations if isinstance(a["segmentation"], list))  # cut in two


def test_annotations_are_consistent_and_visible(sample):
    coco = COCO(sample / "annotations" / "instances_train.json")
    for image_id in list(coco.imgs)[:80]:
        image = cv2.imread(str(sample / "train" / coco.imgs[image_id]["file_name"]))
        assert image.shape == (96, 96, 3)
        masks = [coco.annToMask(a).astype(bool) for a in coco.imgToAnns[image_id]]
        assert not masks or np.sum(masks, axis=0).max() <= 2  # visible parts do not overlap, outlines may by a pixel
        for a, mask in zip(coco.imgToAnns[image_id], masks):
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            x, y, w, h = a["bbox"]
            np.testing.assert_allclose([x, y, x + w, y + h], box, atol=1)
            assert mask.sum() == pytest.approx(a["area"], rel=0.1, abs=12)


def test_reads_without_a_warning(sample, caplog):
    for split in ("train", "val"):
        data = CocoDataset(sample / split, sample / "annotations" / f"instances_{split}.json")
        assert data.categories == ["ellipse", "triangle", "rectangle", "star", "ring"]
        assert data[0].image.shape == (96, 96, 3)
    assert not caplog.records


def test_colour_tells_nothing_about_the_category(sample):
    """Mean colour of the objects of each category: equal up to chance."""
    coco = COCO(sample / "annotations" / "instances_train.json")
    colours = {category: [] for category in coco.cats}
    for a in coco.dataset["annotations"]:
        image = cv2.imread(str(sample / "train" / coco.imgs[a["image_id"]]["file_name"]))
        colours[a["category_id"]].append(image[coco.annToMask(a).astype(bool)].mean(0) / 255)
    means = np.array([np.mean(group, axis=0) for group in colours.values()])
    fewest = min(map(len, colours.values()))
    assert np.ptp(means, axis=0).max() < 5 * 0.3 / np.sqrt(fewest)


def test_json_is_plain_coco(sample):
    coco = json.loads((sample / "annotations" / "instances_val.json").read_text())
    assert set(coco) == {"info", "images", "annotations", "categories"}
    assert set(coco["annotations"][0]) == {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    make_shapes(out, train=60, val=1, size=128, kind="figures")
    return COCO(out / "annotations" / "instances_train.json")


def test_keypoints_lie_on_what_is_seen_of_a_figure(people):
    """2 where the figure is visible, 1 where something else is in front of it, 0 outside of the image."""
    seen, agree = np.zeros(3, int), []
    for a in people.dataset["annotations"]:
        mask = np.pad(people.annToMask(a).astype(bool), 1)
        points = np.array(a["keypoints"]).reshape(11, 3)
        assert a["num_keypoints"] == (points[:, 2] > 0).sum() and 0.6 <= a["visible_share"] <= 1
        for x, y, state in points:
            seen[int(state)] += 1
            if state == 0:
                assert x == y == 0
                continue
            assert 0 <= x < 128 and 0 <= y < 128
            agree.append(mask[int(y) : int(y) + 3, int(x) : int(x) + 3].any() == (state == 2))
    assert (seen > 5).all() and np.mean(agree) > 0.98  # outlines are polygons, up to half a pixel beside the pixels


def test_figures_are_told_apart_by_posture_and_proportion():
    """By rules of thumb over the keypoints that hold for every figure of a category and for few of another."""
    rng = np.random.default_rng(0)
    rules = {
        "waving": lambda p: (p["left_hand"][1] < p["neck"][1]) & (p["right_hand"][1] < p["neck"][1]),
        "sitting": lambda p: np.sign(p["left_knee"][0] - p["hip"][0]) == np.sign(p["right_knee"][0] - p["hip"][0]),
        "long_legged": lambda p: reach(p, "hip", "knee", "foot") > 2.2 * np.linalg.norm(p["hip"] - p["neck"]),
        "long_armed": lambda p: np.linalg.norm(p["left_hand"] - p["left_elbow"]) > 0.2,
    }
    for name in figures.CATEGORIES.values():
        for _ in range(50):
            points = dict(zip(figures.KEYPOINTS, upright(figures.figure(name, rng)[1])))
            told = {rule for rule, holds in rules.items() if holds(points)}
            assert told == ({name} & set(rules)), name


def reach(points, *names):
    """The length of the left limb."""
    places = [points[names[0]], *(points[f"left_{name}"] for name in names[1:])]
    return sum(np.linalg.norm(b - a) for a, b in zip(places, places[1:]))


def upright(points):
    """The figure turned so that its torso is vertical."""
    x, y = points[figures.KEYPOINTS.index("hip")] - points[figures.KEYPOINTS.index("neck")]
    angle = np.arctan2(x, y)
    return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def test_figures_read_without_a_warning_and_mirror_by_name(tmp_path, caplog):
    make_shapes(tmp_path, train=2, val=1, size=96, kind="figures")
    data = CocoDataset(
        tmp_path / "train", tmp_path / "annotations" / "instances_train.json", masks=False, keypoints=True
    )
    assert data.categories == list(figures.CATEGORIES.values()) and not caplog.records
    swapped = mirrored_keypoints(figures.KEYPOINTS)
    assert [figures.KEYPOINTS[i] for i in swapped[:5]] == ["head", "neck", "hip", "right_elbow", "left_elbow"]
