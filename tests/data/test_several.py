"""Several annotation files as one data set."""

from __future__ import annotations

import copy
import json
import shutil

import cv2
import numpy as np
import pytest
from omegaconf import OmegaConf

from detector.commands import compare, evaluate
from detector.config import ConfigError, as_typed, compose
from detector.data import CocoDataset, build_dataset, open_coco
from detector.data.contents import changes, contents
from detector.evaluation import coco_metrics
from detector.evaluation.coco import check_annotations
from tests.data.coco_files import minimal, write
from tests.untrained import arguments


@pytest.fixture
def two(tmp_path):
    """Annotation files and folders of two parts: the second has the categories in another order and one more, the same
    ids and file names, but other pictures."""
    parts = []
    for name in ("lab", "field"):
        (tmp_path / name).mkdir()
        coco = minimal()
        if name == "field":
            coco["categories"] = [{"id": 1, "name": "bird"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]
            for entry, category in zip(coco["annotations"], (1, 3)):
                entry["category_id"] = category
            coco["images"].append({"id": 11, "file_name": "c.png", "width": 30, "height": 30})
        parts.append(write(tmp_path / name, coco))
    return parts, [tmp_path / "lab", tmp_path / "field"]


def changed(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_categories_are_joined_by_name_and_images_numbered(two):
    files, folders = two
    data = CocoDataset(folders, files)
    assert data.categories == ["dog", "cat", "bird"] and data.category_ids == [1, 2, 3]
    assert data.image_ids.tolist() == [1, 2, 3, 4, 5] and len(data) == 5
    assert [data.image_path(i).relative_to(folders[0].parent).as_posix() for i in (0, 2, 4)] == [
        "lab/a.png",
        "field/a.png",
        "field/c.png",
    ]
    # file by file the same objects, under the joined labels
    for part, (file, folder) in enumerate(zip(files, folders)):
        alone = CocoDataset(folder, file)
        for index in range(len(alone)):
            one, own = data[index + 2 * part], alone[index]
            assert [data.categories[k - 1] for k in one.labels] == [alone.categories[k - 1] for k in own.labels]
            for name in ("image", "boxes", "masks", "crowd"):
                np.testing.assert_array_equal(getattr(one, name), getattr(own, name))
    assert data.annotations.truth.categories == ["dog", "cat", "bird"]


def test_one_folder_for_all_and_other_numbers_of_folders(two):
    files, (lab, field) = two
    shutil.copy(field / "c.png", lab)
    data = CocoDataset(lab, files)
    assert len(data) == 5 and data.image_path(4) == lab / "c.png"
    with pytest.raises(ValueError, match="3 image folders for 2 annotation files: give one for each file, or one for"):
        CocoDataset([lab, field, lab], files)


def test_problems_are_named_by_file(two, caplog):
    files, folders = two
    changed(files[1], lambda coco: coco["annotations"][0].update(category_id=77))
    with pytest.raises(ValueError, match=rf"unknown category_id: {files[1]}: annotation 1 category_id=77"):
        CocoDataset(folders, files)
    (folders[0] / "b.png").unlink()
    assert len(CocoDataset(folders, files, on_error="skip")) == 4
    assert f"missing image file: {files[0]}: image 'b.png' file_name={folders[0] / 'b.png'}" in caplog.text
    changed(files[1], lambda coco: coco.update(images=7))
    with pytest.raises(ValueError, match=f"{files[1]}: not COCO instances: 'images' is a int"):
        CocoDataset(folders, files)


def test_a_category_that_training_lacks_is_named_by_file(two, caplog):
    files, folders = two
    with pytest.raises(ValueError, match=rf"{files[1]}: categories \['bird'\] are not among those of the training set"):
        CocoDataset(folders, files, categories=["cat", "dog"])
    assert CocoDataset(folders, files, categories=["bird", "cow", "cat", "dog"]).category_ids == [3, None, 2, 1]
    assert caplog.text.count("has no categories") == 1 and "['cow']" in caplog.text


def test_pictures_without_objects_in_a_file_of_their_own(two):
    files, folders = two
    changed(files[1], lambda coco: coco.update(annotations=[]))
    data = CocoDataset(folders, files)
    assert len(data) == 5 and len(data[3].boxes) == 0
    changed(files[0], lambda coco: coco.update(annotations=[]))
    with pytest.raises(ValueError, match="no usable objects in any of the files"):
        CocoDataset(folders, files)


def test_a_picture_in_two_files_is_told(two, caplog):
    files, folders = two
    CocoDataset(folders[0], [files[0], files[0]])
    assert "2 x picture that two annotation files have: what one of them marks is background" in caplog.text
    caplog.clear()
    CocoDataset(folders, files)
    assert "picture that two" not in caplog.text


def test_keypoints_and_lvis(two, caplog):
    files, folders = two
    for file, names in zip(files, (["a", "b"], ["b", "a"])):
        changed(file, lambda coco, names=names: [c.update(keypoints=names) for c in coco["categories"]])
        points = {"keypoints": [1, 1, 2, 3, 3, 2], "num_keypoints": 2}
        changed(file, lambda coco, points=points: [a.update(points) for a in coco["annotations"]])
    with pytest.raises(ValueError, match="the keypoints differ"):
        CocoDataset(folders, files, keypoints=True)
    changed(files[1], lambda coco: [c.update(keypoints=["a", "b"]) for c in coco["categories"]])
    assert CocoDataset(folders, files, keypoints=True)[2].keypoints.shape == (2, 2, 3)
    lists = {"neg_category_ids": [2], "not_exhaustive_category_ids": []}
    changed(files[1], lambda coco: [image.update(lists) for image in coco["images"]])
    assert not CocoDataset(folders, files).annotations.truth.federated
    assert "LVIS's lists of checked categories among others without" in caplog.text
    changed(files[0], lambda coco: [image.update(lists) for image in coco["images"]])
    truth = CocoDataset(folders, files).annotations.truth
    assert truth.federated and [truth.categories[k - 1] for k in truth.negative] == ["dog"] * 2 + ["cat"] * 3


def test_the_store_is_of_all_files(two, tmp_path):
    files, _ = two
    options = {"cache": tmp_path / "cache", "small": 0}

    def stores():
        return sorted(path for path in (tmp_path / "cache").iterdir() if path.is_dir())

    first = open_coco(files, **options)
    assert stores() and len(first) == 5
    again = open_coco(files, **options)
    assert len(stores()) == 1 and (again.sources == first.sources).all() and again.truth.category_ids == [1, 2, 3]
    open_coco(files[::-1], **options)
    changed(files[1], lambda coco: coco["annotations"].pop())
    assert len(open_coco(files, **options).labels) == 3 and len(stores()) == 3


def test_a_change_of_any_file_is_noticed(two):
    files, folders = two
    before = contents(CocoDataset(folders, files))
    with open(folders[1] / "a.png", "ab") as file:
        file.write(b"\0")
    data = CocoDataset(folders, files)
    (text,) = changes(before, contents(data), data, "train")
    assert "data.train.images: 1 of 5 files" in text and "a.png: " in text
    changed(files[1], lambda coco: coco["annotations"].pop())
    data = CocoDataset(folders, files)
    assert "data.train.annotations: the content of" in changes(before, contents(data), data, "train")[0]


def halves(root, target):
    """A data set's validation set as two files, each with a folder."""
    coco = json.loads((root / "annotations" / "instances_val.json").read_text())
    for name, images in (("a", coco["images"][:3]), ("b", coco["images"][3:])):
        part, ids = copy.deepcopy(coco), {image["id"] for image in images}
        part["images"], part["annotations"] = images, [a for a in coco["annotations"] if a["image_id"] in ids]
        (target / name).mkdir(parents=True)
        (target / f"{name}.json").write_text(json.dumps(part))
        for image in images:
            shutil.copy(root / "val" / image["file_name"], target / name)
    return [f"{target}/a.json", f"{target}/b.json"], [f"{target}/a", f"{target}/b"]


@pytest.mark.slow
def test_evaluation_and_comparison_of_two_files_are_those_of_one(checkpoint, shapes_tiny, tmp_path):
    files, folders = halves(shapes_tiny, tmp_path / "halves")
    typed = [f"data.val.annotations=[{','.join(files)}]", f"data.val.images=[{','.join(folders)}]"]
    options = [f"checkpoint={checkpoint}", "device=cpu", "workers=0", "threads=1"]
    one = evaluate.evaluate_checkpoint(**arguments("eval", options))
    given = arguments("eval", as_typed([*options, *typed]))
    assert given["data"]["val"] == {"images": folders, "annotations": files}
    assert evaluate.evaluate_checkpoint(**given) == one
    (folder,) = checkpoint.parent.glob("eval_run_a-*")
    assert json.loads((folder / "about.json").read_text())["annotations"] == files
    for truth in (files, folder / "annotations.json"):
        assert coco_metrics(truth, folder / "predictions.json") == one["bbox"]
    config = OmegaConf.to_container(compose("train", as_typed([f"data.root={shapes_tiny}", *typed])).data)
    assert len(build_dataset(config, "val")) == 8
    run = tmp_path / "runs" / "one"
    shutil.copytree(folder, run / "eval_last")
    for name, text in (("metrics.json", "{}"), ("log.jsonl", "")):
        (run / name).write_text(text)
    from detector.checkpoint import load

    (run / "config.yaml").write_text(OmegaConf.to_yaml(load(checkpoint)["config"]))
    about = [f"runs={tmp_path / 'runs'}", f"output={tmp_path / 'report'}", "probe_images=0", "samples=20", "device=cpu"]
    report = compare.compare_runs(**arguments("compare", about))
    assert report["metrics"]["bbox"]["align"]["AP"]["mean"] == pytest.approx(one["bbox"]["AP"])
    assert len(check_annotations(files)) == 8


def test_training_names_the_file_that_is_missing(config, two):
    from detector.engine import setup
    from detector.settings import Training

    files, folders = two
    cfg = config(
        f"data.train.annotations=['{files[0]}','{files[1]}x']", f"data.train.images=['{folders[0]}','{folders[1]}']"
    )
    with pytest.raises(ConfigError, match=rf"data\.train\.annotations: {files[1]}x does not exist"):
        setup.preflight(cfg, Training())


def test_a_picture_of_each_is_read(two):
    files, folders = two
    data = CocoDataset(folders, files)
    for index in (0, 2):
        expected = cv2.cvtColor(cv2.imread(str(data.image_path(index))), cv2.COLOR_BGR2RGB)
        np.testing.assert_array_equal(data.read(index), expected)
    changed(files[1], lambda coco: coco["images"][0].update(width=50, height=50))
    with pytest.raises(ValueError, match=f"but {files[1]} says width=50 height=50"):
        CocoDataset(folders, files).read(2)
