"""model.region_features and `detector features`: what the model itself computes, for boxes of one's own."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import detector
from detector.commands.features import main, write_features
from detector.config import ConfigError
from detector.data import read_image


@pytest.fixture(scope="module")
def model(state):
    return detector.load(state)


@pytest.fixture(scope="module")
def image():
    """Of a size that the network sees in another."""
    return np.random.default_rng(0).integers(0, 255, (96, 200, 3), np.uint8)


BOXES = [[10.0, 5.0, 90.0, 60.0], [0.0, 0.0, 200.0, 96.0], [150.5, 40.25, 180.0, 50.0]]


def test_they_are_what_the_box_head_reads(model, image):
    found = model.region_features(image, BOXES)
    batch = model.as_batch([image])
    (height, width) = batch.image_sizes[0].tolist()
    assert (height, width) != image.shape[:2]
    scaled = torch.tensor(BOXES) * torch.tensor([width / 200, height / 96] * 2)
    seen = []
    handle = model.model.box_head.predictor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        prediction = model.model.box_head(model.model.features(batch)[:4], torch.cat([torch.zeros(3, 1), scaled], 1))
    handle.remove()
    torch.testing.assert_close(found.features, prediction.roi_features.features)
    torch.testing.assert_close(found.vectors, seen[0])
    assert found.features.shape[2:] == (7, 7) and found.vectors.ndim == 2 and found.vectors.std() > 0
    for given in (np.array(BOXES), torch.tensor(BOXES)):
        assert torch.equal(model.region_features(image, given).vectors, found.vectors)


def test_none(model, image):
    found = model.region_features(image, [])
    assert found.features.shape == (0, found.features.shape[1], 7, 7) and len(found.vectors) == 0


def test_stages_of_a_cascade(model, image):
    with pytest.raises(ConfigError, match="stage = 1: the model's box head has 1 stages, counted from 0"):
        model.region_features(image, BOXES, stage=1)


@pytest.mark.parametrize("boxes", [[1.0, 2, 3, 4], [[1.0, 2, 3]], [[1.0, 2, float("nan"), 4]]])
def test_boxes_that_are_none(model, image, boxes):
    with pytest.raises(ValueError, match=r"boxes must be finite numbers \[R, 4\]"):
        model.region_features(image, boxes)


@pytest.fixture
def folder(tmp_path, shapes_tiny):
    """Three images, of which one has no objects, and their annotations."""
    content = json.loads((shapes_tiny / "annotations" / "instances_val.json").read_text())
    content["images"] = content["images"][:3]
    wanted = {image["id"] for image in content["images"][:2]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in wanted]
    (tmp_path / "images").mkdir()
    for entry in content["images"]:
        shutil.copy(shapes_tiny / "val" / entry["file_name"], tmp_path / "images")
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return tmp_path, content


def options(folder, checkpoint, **more):
    paths = {"checkpoint": checkpoint, "annotations": folder / "boxes.json", "images": folder / "images"}
    return {key: str(path) for key, path in paths.items()} | {"output": f"{folder}/out/all.npz", "device": "cpu"} | more


def test_command(folder, checkpoint, model, capsys):
    folder, content = folder
    write_features(**options(folder, checkpoint))
    assert f"{len(content['annotations'])} boxes; annotation_ids" in capsys.readouterr().out
    assert [path.name for path in (folder / "out").iterdir()] == ["all.npz"]
    found = np.load(folder / "out" / "all.npz")
    by_id = {entry["id"]: entry for entry in content["annotations"]}
    assert sorted(found["annotation_ids"]) == sorted(by_id)
    names = {entry["id"]: entry["file_name"] for entry in content["images"]}
    for k in (0, len(by_id) - 1):
        entry = by_id[found["annotation_ids"][k]]
        x, y, w, h = entry["bbox"]
        assert found["boxes"][k].tolist() == pytest.approx([x, y, x + w, y + h], abs=1e-3)
        assert (found["image_ids"][k], found["category_ids"][k]) == (entry["image_id"], entry["category_id"])
        picture = read_image(folder / "images" / names[entry["image_id"]])
        alone = model.region_features(picture, found["boxes"][k : k + 1])
        np.testing.assert_allclose(found["features"][k], alone.features[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["vectors"][k], alone.vectors[0], rtol=1e-4, atol=1e-4)


def test_small_ones_and_unreadable_images(folder, checkpoint, caplog):
    folder, content = folder
    name = content["images"][0]["file_name"]
    (folder / "images" / name).write_text("no image")
    with pytest.raises(ConfigError, match=f"{name}.*; on_error=skip leaves it out"):
        write_features(**options(folder, checkpoint))
    assert not list((folder / "out").iterdir())
    write_features(**options(folder, checkpoint, maps=False, dtype="float16", on_error="skip"))
    found = np.load(folder / "out" / "all.npz")
    kept = [entry["id"] for entry in content["annotations"] if entry["image_id"] != content["images"][0]["id"]]
    assert found["annotation_ids"].tolist() == kept and found["vectors"].dtype == np.float16
    assert "features" not in found and name in caplog.text


def test_refused(folder, checkpoint, call):
    folder, _ = folder
    for change, message in (
        ("output=all.npy", "output = all.npy: the name must end in .npz"),
        ("stage=2", "stage = 2: the model's box head has 1 stages"),
        ("dtype=int8", "dtype"),
        ("annotations=none.json", "none.json"),
    ):
        given = [f"{key}={value}" for key, value in options(folder, checkpoint).items()]
        code, _, shown = call(main, *given, change)
        assert code == 2 and message in shown


def test_a_picture_of_another_size_than_its_record_says(folder, checkpoint):
    folder, content = folder
    entry = content["images"][1]
    picture = Image.open(folder / "images" / entry["file_name"])
    picture.resize((picture.width // 2, picture.height)).save(folder / "images" / entry["file_name"])
    with pytest.raises(ConfigError, match=f"{entry['file_name']} is .*but .*boxes.json says width="):
        write_features(**options(folder, checkpoint))
