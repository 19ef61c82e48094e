"""The health report of a data set: every fault is found, named, and told by the exit code."""

from __future__ import annotations

import json
import shlex
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from detector.commands import advice, validate
from detector.config import CONFIGS, compose
from detector.data import CocoDataset
from detector.rpn import AnchorGenerator
from tests.data.coco_files import minimal, write


@pytest.fixture
def folder(tmp_path):
    """A data set without faults: the same objects in train and val, different pictures."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        coco = minimal()
        coco["annotations"][1]["segmentation"] = [[30, 20, 40, 20, 40, 30, 30, 30]]
        for image in coco["images"]:
            image["id"] += 100 * (split == "val")
        for annotation in coco["annotations"]:
            annotation["image_id"] += 100 * (split == "val")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        source = write(tmp_path / split, coco, "instances.json")
        shutil.move(source, tmp_path / "annotations" / f"instances_{split}.json")
    return tmp_path


def change(folder, split, edit):
    path = folder / "annotations" / f"instances_{split}.json"
    coco = json.loads(path.read_text())
    edit(coco)
    path.write_text(json.dumps(coco))


def run(monkeypatch, capsys, folder, *options):
    """Exit code, report.json, what was printed."""
    out = folder / "report"
    arguments = ["data=custom", f"data.root={folder}", "--output", str(out), "--no-step", *options]
    monkeypatch.setattr(sys, "argv", ["validate", *arguments])
    with pytest.raises(SystemExit) as end:
        validate.main()
    printed = capsys.readouterr()
    report = json.loads((out / "report.json").read_text()) if (out / "report.json").exists() else None
    return end.value.code, report, printed.out + printed.err


def test_sound_data(monkeypatch, capsys, folder):
    code, report, _ = run(monkeypatch, capsys, folder)
    assert code == 0
    expected = ("hotcoco", "anchor", "is mostly chance")  # of two images
    assert not [f for f in report["findings"] if not any(text in f["what"] for text in expected)]
    assert not any("points wide" in f["what"] for f in report["findings"])  # which two objects cannot tell
    train = report["statistics"]["train"]
    assert train["images"] == 2 and train["objects"] == 2 and train["images without objects"] == 1
    assert train["per category"] == {"dog": {"objects": 1, "images": 1}, "cat": {"objects": 1, "images": 1}}
    assert sum(train["size as the network sees it, sqrt(area)"].values()) == 2
    assert sum(train["pyramid level of the box head"].values()) == 2
    assert (folder / "report" / "report.html").read_text().count("<img") == 4


def set_first(**values):
    return lambda coco: coco["annotations"][0].update(values)


FAULTS = {
    "unknown category": ("train", set_first(category_id=77), 1, "category_id=77"),
    "zero box": ("val", set_first(bbox=[1, 1, 0, 5]), 0, "bbox of no size"),
    "outside": ("val", set_first(bbox=[100, 1, 5, 5]), 0, "outside the image"),
    "mask beside box": (
        "train",
        set_first(bbox=[30, 6, 20, 10]),
        0,
        "annotation 1 (image 7, a.png): bbox [30.0, 6.0, 50.0",
    ),
    "duplicate id": ("train", set_first(id=2), 0, "annotation id that occurs twice"),
    "twice": ("train", lambda c: c["annotations"].append(dict(c["annotations"][0], id=9)), 0, "same box and category"),
    "other category": ("val", lambda c: c["categories"].append({"id": 9, "name": "bird"}), 1, "bird"),
    "missing image": ("val", lambda c: c["images"][0].update(file_name="gone.png"), 1, "gone.png"),
    "wrong size": ("val", lambda c: c["images"][1].update(height=50), 1, "is 40 x 60 (as its EXIF data turn it), but"),
    "crowded": (
        "train",
        lambda c: c["annotations"].extend(
            dict(c["annotations"][1], id=100 + i, bbox=[i / 10, 1, 9, 9]) for i in range(101)
        ),
        0,
        "more than 100 objects",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(monkeypatch, capsys, folder, fault):
    split, edit, expected, named = FAULTS[fault]
    change(folder, split, edit)
    code, report, printed = run(monkeypatch, capsys, folder)
    assert code == expected
    assert named in printed
    found = [f for f in report["findings"] if named in f["what"] or any(named in e for e in f["examples"])]
    assert found[0]["severity"] == ("error" if expected else "warning") and found[0]["split"] in (split, "both")


@pytest.mark.slow
def test_what_a_crowded_set_needs(monkeypatch, capsys, folder):
    """The settings with their numbers, and with them there is nothing to say."""
    entries = [{"category_id": 2, "iscrowd": 0, "area": 64, "image_id": 7} for _ in range(122)]
    boxes = [{"id": 50 + i, "bbox": [4 * (i % 12), 3 * (i // 12), 8, 8]} for i in range(122)]
    change(folder, "train", lambda coco: coco.update(annotations=[a | b for a, b in zip(entries, boxes)]))
    _, report, printed = run(monkeypatch, capsys, folder)
    advice = "model.box_head.detections_per_image=200 evaluation.max_detections=[1,10,200]"
    assert f"more than 100 objects, the most that are kept or counted; images hold up to 122: {advice}" in printed
    assert next(f for f in report["findings"] if "100 objects" in f["what"])["examples"] == ["image 7, a.png: 122"]
    _, report, _ = run(monkeypatch, capsys, folder, *advice.split())
    assert not [f for f in report["findings"] if "objects, the most" in f["what"]]
    lists = {"neg_category_ids": [], "not_exhaustive_category_ids": []}  # LVIS's AP has a limit of its own
    for split in ("train", "val"):
        change(folder, split, lambda coco: [image.update(lists) for image in coco["images"]])
    _, report, _ = run(monkeypatch, capsys, folder)
    (what,) = (f["what"] for f in report["findings"] if "objects, the most" in f["what"])
    assert what.endswith("122: model.box_head.detections_per_image=200")


@pytest.mark.slow
def test_a_wrong_image_folder_is_one_finding_that_names_the_right_one(monkeypatch, capsys, folder):
    (folder / "train").rename(folder / "pictures")
    (folder / "train").mkdir()
    code, report, printed = run(monkeypatch, capsys, folder)
    (finding,) = (f for f in report["findings"] if f["what"] == "image folder without any of the files")
    where = f"they are in {folder / 'pictures'} or {folder / 'val'}: set data.train.images=pictures or data"
    assert (
        code == 1
        and finding["count"] == 1
        and finding["examples"][0].startswith(f"{folder / 'train'}: none of 2; {where}")
    )
    (folder / "train").rmdir()
    code, report, printed = run(monkeypatch, capsys, folder)
    assert code == 1 and f"image folder {folder / 'train'} does not exist: {where}" in printed
    assert run(monkeypatch, capsys, folder, "data.train.images=pictures")[0] == 0


def test_copies_whose_files_differ(monkeypatch, capsys, folder):
    """Saved anew as JPEG or PNG, resized, mirrored; candidates are shown side by side."""
    pytest.importorskip("imagehash")
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (240, 180), interpolation=cv2.INTER_CUBIC)
    other = cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (240, 180), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(folder / "train" / "scene.png"), scene)
    copies = {
        "again.jpg": scene,
        "same.bmp": scene,
        "small.png": cv2.resize(scene, (120, 90)),
        "turned.png": scene[:, ::-1],
    }
    for name, picture in {**copies, "other.png": other}.items():
        cv2.imwrite(str(folder / "val" / name), picture)

    def add(split, names):
        def edit(coco):
            for number, name in enumerate(names, 1000):
                height, width = cv2.imread(str(folder / split / name)).shape[:2]
                coco["images"].append({"id": number, "file_name": name, "height": height, "width": width})

        change(folder, split, edit)

    add("train", ["scene.png"])
    add("val", [*copies, "other.png"])
    _, report, _ = run(monkeypatch, capsys, folder)
    (finding,) = (f for f in report["findings"] if "looks like one of train" in f["what"])
    wanted = [f"train scene.png, val {name}" + ", mirrored" * (name == "turned.png") for name in copies]
    assert sorted(finding["examples"]) == sorted(wanted)
    assert (folder / "report" / "report.html").read_text().count("<figcaption>copy: ") == 4


def test_the_terminal_has_the_counts_of_each_class_and_pictures_show_masks(monkeypatch, capsys, folder):
    _, _, printed = run(monkeypatch, capsys, folder)
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(("cat ", "dog "))}
    assert rows == {"cat": ["1", "1", "1", "1"], "dog": ["1", "1", "1", "1"]}
    objects = CocoDataset(folder / "train", folder / "annotations" / "instances_train.json").annotations.objects(0)
    masks = validate.object_masks(objects, 40, 60)
    assert masks.shape == (2, 40, 60) and sorted(masks.sum((1, 2)).tolist()) == [100, 200]


def test_the_command_line_at_the_end_does_what_it_says(monkeypatch, capsys, folder):
    """With its settings there is nothing more to propose."""
    for split in ("train", "val"):
        change(folder, split, lambda coco: [a.update(bbox=[5, 6, 40, 4], segmentation=[]) for a in coco["annotations"]])
    options = ["model=faster_rcnn", "data.masks=false"]
    _, report, printed = run(monkeypatch, capsys, folder, *options)
    assert "looked at for experiment=finetune model=faster_rcnn data=custom" in printed
    assert {"model.rpn.anchor_sizes", "model.rpn.aspect_ratios"} <= report["suggestions"].keys()
    command = shlex.split(next(line for line in printed.splitlines() if line.strip().startswith("detector train")))
    assert command[:5] == ["detector", "train", "experiment=finetune", "data=custom", f"data.root={folder}"]
    _, again, printed = run(monkeypatch, capsys, folder, *command[2:])
    assert not again["suggestions"] and "as well as others would" in printed


def test_not_json(monkeypatch, capsys, folder):
    (folder / "annotations" / "instances_val.json").write_text("{")
    code, report, printed = run(monkeypatch, capsys, folder)
    assert code == 1 and "not JSON" in printed and "train" in report["statistics"]


def test_leaks_and_unreadable_images(monkeypatch, capsys, folder):
    shutil.copy(folder / "train" / "a.png", folder / "val" / "a.png")
    data = (folder / "train" / "b.png").read_bytes()
    (folder / "train" / "b.png").write_bytes(data[:-100])
    code, report, printed = run(monkeypatch, capsys, folder)
    assert code == 1 and "b.png cannot be read" in printed
    leak = next(f for f in report["findings"] if "is in train too" in f["what"])
    assert leak["examples"] == ["train: image 7, a.png; val: image 107, a.png"]
    code, report, _ = run(monkeypatch, capsys, folder, "--no-images")
    assert code == 0 and not any("is in train too" in f["what"] for f in report["findings"])


def test_nothing_to_look_at(monkeypatch, capsys, tmp_path):
    code, report, printed = run(monkeypatch, capsys, tmp_path)
    assert code == 2 and report is None and "instances_train.json" in printed


def test_misspelt_override(monkeypatch, capsys, folder):
    monkeypatch.setattr(sys, "argv", ["validate", "dat=custom"])
    with pytest.raises(SystemExit) as end:
        validate.main()
    assert end.value.code == 2 and "there is no 'dat'" in capsys.readouterr().err


def test_texts_from_the_data_are_escaped(monkeypatch, capsys, folder):
    evil = "<script>alert(1)</script>"

    def edit(coco):
        coco["categories"][0]["name"] = evil
        coco["images"][0]["file_name"] = "<b>.png"

    for split in ("train", "val"):
        change(folder, split, edit)
        cv2.imwrite(str(folder / split / "<b>.png"), np.zeros((40, 60, 3), np.uint8))
    run(monkeypatch, capsys, folder)
    page = (folder / "report" / "report.html").read_text()
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page


def test_best_anchor_against_all_anchors():
    """The nearest anchor of each shape is enough: the same as IoU with every anchor of the image."""
    rng = np.random.default_rng(0)
    generator = AnchorGenerator([4, 8, 16], [[12.0], [24.0], [48.0]])
    features = [torch.zeros(1, 1, 64 // s, 96 // s) for s in (4, 8, 16)]
    anchors = torch.cat(generator(features))
    corner = rng.uniform(0, [80, 50], (60, 2))
    boxes = torch.tensor(np.concatenate([corner, corner + rng.uniform(4, 40, (60, 2))], axis=1)).float()
    sizes = torch.tensor([[64, 96]]).expand(60, 2)
    torch.testing.assert_close(advice.best_anchor_iou(boxes, sizes, generator), box_iou(boxes, anchors).max(1).values)


def test_an_image_of_average_crowdedness_has_a_place_for_each_object():
    assert advice.propose_rois(24.7, rois=64, positive_fraction=0.25) == 128
    assert advice.propose_rois(16.0, rois=64, positive_fraction=0.25) is None
    assert advice.propose_rois(19.1, rois=64, positive_fraction=0.3) == 128  # 64 have 19 places
    assert advice.propose_rois(300.0, rois=64, positive_fraction=0.25) == 512
    assert advice.propose_rois(300.0, rois=512, positive_fraction=0.25) is None


def test_rois_are_proposed_for_crowded_images(monkeypatch, capsys, folder):
    """Images without objects do not count; with what is proposed there is nothing more to propose."""
    boxes = [[4 * (i % 12), 4 * (i // 12), 9, 9] for i in range(40)]
    objects = [
        {"id": i, "bbox": b, "category_id": 2, "iscrowd": 0, "area": 81, "image_id": 7} for i, b in enumerate(boxes)
    ]
    change(folder, "train", lambda coco: coco.update(annotations=objects))
    options = ["experiment=small", "model=faster_rcnn", "data.masks=false"]
    _, report, printed = run(monkeypatch, capsys, folder, *options)
    assert report["suggestions"]["model.box_head.batch_size_per_image"] == "256"
    assert "images with objects have 40.0 of them on average, and only 16 RoIs of objects enter the losses" in printed
    command = shlex.split(next(line for line in printed.splitlines() if line.strip().startswith("detector train")))
    _, again, printed = run(monkeypatch, capsys, folder, *command[2:])
    assert "model.box_head.batch_size_per_image" not in again["suggestions"] and "RoIs of objects" not in printed


def test_sizes_are_those_after_resizing(folder):
    cfg = compose("train", ["data=custom", f"data.root={folder}", "experiment=none", "augment=default"])
    report = validate.report_on(cfg, images=False, pictures=0)
    # 40 x 60 px at shorter side 800: the objects of 20 x 10 and 10 x 10 px become 283 and 200 px large
    assert report.statistics["train"]["size as the network sees it, sqrt(area)"]["128 to 256 px"] == 1
    assert report.statistics["train"]["size as the network sees it, sqrt(area)"]["256 to 512 px"] == 1


@pytest.mark.slow
def test_real_data_have_no_errors(shared):
    for name, model in (("coco_cc_sample", "mask_rcnn"), ("bccd", "faster_rcnn")):
        root = shared / "data" / name
        images = ["data.train.images=images", "data.val.images=images"]
        cfg = compose("train", ["data=custom", f"data.root={root}", f"model={model}", *images])
        assert not validate.report_on(cfg, images=name == "bccd", pictures=1).has_errors()


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONFIGS / "experiment").glob("*_r50_*.yaml")))
def test_every_model_can_be_looked_at(five, shapes_tiny, recipe):
    root = five if "keypoint" in recipe else shapes_tiny
    data = "data.keypoints=true" if "keypoint" in recipe else "data.keypoints=false"
    cfg = compose("train", [f"experiment={recipe}", "data=custom", f"data.root={root}", data])
    report = validate.report_on(cfg, images=False, pictures=0, suggest=False)
    assert not report.has_errors(), report.findings
    statistics = report.statistics["train"]
    assert sum(statistics["best anchor"].values()) >= statistics["objects"]
    assert ("pyramid level of the box head" in statistics) == (not recipe.startswith("rpn"))


@pytest.mark.slow
def test_what_stops_a_training_is_an_error_and_nothing_else_is(folder, five):
    """The same settings, the same rules: one answer."""

    def look(*overrides, root=folder):
        given = ["data=custom", f"data.root={root}", "heads=small", *overrides]
        return validate.report_on(compose("train", given), images=True, pictures=1)

    boxes = ["model=faster_rcnn", "data.masks=false"]
    assert not look().has_errors()
    for overrides, message in (
        (["data.masks=false"], "data.masks = False: model.mask_head learns from masks"),
        ([*boxes, "evaluation.metric=segm.AP"], "evaluation.metric = 'segm.AP': is not measured"),
        (["model=keypoint_rcnn", "data.keypoints=true"], "'keypoints' must be one list of names"),
        ([*boxes, "data.max_pixels=2000"], "no usable images"),
        ([*boxes, "data.pad_multiple=32", "augment.copy_paste=0.5"], "augment.copy_paste=0.5 needs outlines"),
    ):
        if "augment.copy_paste=0.5" in overrides:
            overrides = [*overrides, "augment=copy_paste"]
        errors = [f for f in look(*overrides).findings if f.severity == "error"]
        assert any(message in text for f in errors for text in f.examples), (overrides, errors)
    wrong = look("model=keypoint_rcnn", "data.keypoints=true", "model.keypoint_head.num_keypoints=4", root=five)
    assert any("has 5 keypoints" in text for f in wrong.findings for text in f.examples) and wrong.has_errors()
    (folder / "val" / "a.png").unlink()
    (folder / "val" / "a.png").mkdir()
    spoilt = look(*boxes)
    assert "folder in place of an image file" in [f.what for f in spoilt.findings if f.severity == "error"]
    assert not look(*boxes, "data.on_error=skip").has_errors()


def test_a_setting_that_cannot_work(monkeypatch, capsys, folder):
    code, _, printed = run(monkeypatch, capsys, folder, "evaluation.batch_size=0")
    assert code == 2 and "batch_size = 0" in printed and "Traceback" not in printed
    code, _, printed = run(monkeypatch, capsys, folder, "data.max_pixels=many")
    assert code == 2 and "data.max_pixels = 'many'" in printed


def test_the_methods_settings_reach_the_heads(monkeypatch, capsys, folder):
    """As in training: roi.gamma is of every head that has the method."""
    seen = []
    monkeypatch.setattr(validate, "report_on", lambda cfg, **_: seen.append(cfg) or validate.Report())
    run(monkeypatch, capsys, folder, "roi=deformable", "roi.gamma=0.3", "model.mask_head=null")
    assert seen[0].model.box_head.roi.gamma == 0.3 and seen[0].model.mask_head is None
