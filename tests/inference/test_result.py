"""What predict takes, and what can be done with its result."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detector
from detector.commands.predict import predict_files
from detector.data import read_image
from detector.inference.result import Result
from detector.structures import Detections


@pytest.fixture(scope="module")
def model(state):
    return detector.load(state)


@pytest.fixture(scope="module")
def photo(shapes_tiny):
    return sorted((shapes_tiny / "val").iterdir())[0]


@pytest.fixture(scope="module")
def found(model, photo):
    return model.predict(photo, threshold=0)


def same(a: Detections, b: Detections) -> None:
    for name, one, other in zip(Detections._fields, a, b):
        assert one is None if other is None else torch.equal(one, other), name


def test_one_image_in_every_form(model, photo, found):
    """The same pixels give the same detections, whoever holds them."""
    image = read_image(photo)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for form in (str(photo), image, Image.fromarray(image), tensor, tensor.float() / 255, tensor.half() / 255):
        same(model.predict(form, threshold=0), found)
    same(model.predict(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), threshold=0, order="BGR"), found)
    same(model.predict(Image.fromarray(image).convert("RGBA"), threshold=0), found)


def test_pictures_of_pillow_are_turned_upright_and_grey_ones_read(model, photo, tmp_path):
    image = Image.fromarray(read_image(photo)[:60])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        seen = model.predict(turned, threshold=0)
    same(seen, model.predict(tmp_path / "turned.png", threshold=0))
    assert seen.image.shape == (96, 60, 3)
    grey = image.convert("L")
    same(model.predict(grey, threshold=0), model.predict(np.dstack([np.asarray(grey)] * 3), threshold=0))


def test_numbers_of_other_types_need_a_window(state, photo):
    config = copy.deepcopy(state["config"])
    config["data"]["intensity"] = [0, 4095]
    deep = detector.load(state | {"config": config})
    numbers = np.repeat(np.arange(96 * 96, dtype=np.int32).reshape(96, 96) % 4096, 1, axis=1)
    three = np.dstack([numbers] * 3)
    expected = deep.predict(three, threshold=0)
    same(deep.predict(Image.fromarray(numbers), threshold=0), expected)
    same(deep.predict(torch.from_numpy(three).permute(2, 0, 1).float(), threshold=0), expected)


def test_several_images(model, photo, found):
    image = read_image(photo)
    lists = model.predict([photo, image, Image.fromarray(image)], threshold=0, batch_size=2)
    batch = model.predict(np.stack([image, image]), threshold=0)
    tensors = model.predict(torch.from_numpy(np.stack([image] * 2)).permute(0, 3, 1, 2), threshold=0)
    assert [len(lists), len(batch), len(tensors)] == [3, 2, 2] and model.predict([]) == []
    for one in (*lists, *batch, *tensors):
        assert one.names == found.names
        torch.testing.assert_close(one.boxes, found.boxes, atol=1e-3, rtol=0)
    tiled = model.predict((image,), threshold=0, tiles={"size": 64})
    same(tiled[0], model.predict(photo, threshold=0, tiles={"size": 64}))
    assert isinstance(tiled[0], Result) and tiled[0].image.shape == image.shape


def test_generators_are_taken_as_far_as_results_are_wanted(model, photo, found):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield photo

    results = model.predict(endless(), threshold=0, batch_size=2)
    assert not taken
    torch.testing.assert_close(next(results).boxes, found.boxes, atol=1e-3, rtol=0)
    assert len(taken) == 2
    next(results), next(results)
    assert len(taken) == 4
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        list(model.predict(Path(name) for name in (photo, "gone.png")))


UNFIT = {  # what is given: the error, and the same put right as the error says
    "floats": (lambda i: i / 255, TypeError, r"got float64 .*np\.uint8\(255 \* image\)", lambda i: np.uint8(255 * i)),
    "0 to 255": (lambda i: i.astype(float), TypeError, r"np\.uint8\(image\)", np.uint8),
    "first": (
        lambda i: i.transpose(2, 0, 1),
        TypeError,
        r"image\.transpose\(1, 2, 0\)",
        lambda i: i.transpose(1, 2, 0),
    ),
    "grey": (lambda i: i[..., 0], TypeError, r"np\.dstack\(\[image\] \* 3\)", lambda i: np.dstack([i] * 3)),
    "alpha": (lambda i: np.dstack([i, i[..., :1]]), TypeError, r"image\[\.\.\., :3\]", lambda i: i[..., :3]),
    "bytes": (
        lambda i: cv2.imencode(".png", i)[1].tobytes(),
        TypeError,
        r"got bytes; PIL\.Image\.open\(io\.BytesIO\(image\)\)",
        lambda i: Image.open(io.BytesIO(i)),
    ),
    "last": (torch.from_numpy, TypeError, r"a tensor \[3, H, W\], RGB.*image\.permute", lambda i: i.permute(2, 0, 1)),
    "tensor of 0 to 255": (
        lambda i: torch.from_numpy(i).permute(2, 0, 1).float(),
        ValueError,
        r"floats go from 0 to 1, these from \d+ to 255; image\.to\(torch\.uint8\)",
        lambda i: i.to(torch.uint8),
    ),
    "integers": (
        lambda i: torch.from_numpy(i).permute(2, 0, 1).long(),
        TypeError,
        r"got int64.*image\.to\(torch\.uint8\)",
        lambda i: i.to(torch.uint8),
    ),
    "normalised": (lambda i: torch.zeros(3, 9, 9) - 1, ValueError, r"from -1 to -1; undo its normalisation", None),
    "not finite": (
        lambda i: torch.zeros(3, 9, 9) * torch.nan,
        ValueError,
        "floats go from 0 to 1, these from nan",
        None,
    ),
    "none": (lambda i: None, TypeError, r"got NoneType, which is what cv2\.imread gives", None),
    "a dict": (lambda i: {"image": i}, TypeError, r"got dict; a PIL\.Image, a tensor \[C, H, W\]", None),
    "a number": (lambda i: [i, 7], TypeError, r"images\[1\]: image must be .* got int", None),
    "an address": (lambda i: "https://x.org/a.jpg", ValueError, "is an address: give a file", None),
    "a folder": (lambda i: "/", ValueError, "image / is a folder: give a list", None),
    "a pattern": (lambda i: "photos/*.jpg", ValueError, "is a pattern: give a list", None),
    "deep": (
        lambda i: Image.fromarray(i[..., 0].astype(np.int32)),
        TypeError,
        r"PIL\.Image of mode I, int32, and the run's data\.intensity does not say",
        None,
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_is_no_image_is_refused_and_the_advice_works(model, photo, case):
    spoil, error, message, mend = UNFIT[case]
    given = spoil(read_image(photo))
    with pytest.raises(error, match=message):
        model.predict(given)
    if mend:
        assert len(model.predict(mend(given), threshold=0).boxes)


def test_orders_and_batches_that_cannot_be(model, photo):
    with pytest.raises(ValueError, match="order = 'bgr': choose RGB or BGR"):
        model.predict(photo, order="bgr")
    with pytest.raises(ValueError, match="batch_size = 0: must be at least 1"):
        model.predict([photo], batch_size=0)


def result(labels=(1, 1, 2), scores=(0.98, 0.71, 0.66), categories=("person", "dog")) -> Result:
    count = len(labels)
    found = Result(torch.zeros(count, 4), torch.tensor(scores), torch.tensor(labels), torch.ones(count).bool())
    found.categories = categories
    return found


def test_a_result_is_one_line():
    assert str(result()) == "3 objects: 2 person 0.98 0.71, 1 dog 0.66" == f"{result()!r}"
    assert str(result((2,), (0.5,))) == "1 object: 1 dog 0.50" and str(result((), ())) == "no objects"
    many = result(range(1, 13), [0.5] * 12, [f"a\n{i}" for i in range(12)])
    assert "1 a\\n7 0.50, and 4 more classes" in str(many) and "\n" not in str(many)
    assert str(result((1,) * 9, (0.9,) * 9)) == "9 objects: 9 person 0.90 0.90 0.90 0.90 0.90 ..."
    assert result().names == ["person", "person", "dog"]
    assert result()._replace(labels=torch.tensor([2, 2, 2])).names == ["dog"] * 3
    assert copy.copy(result()).names == result().names and isinstance(result(), Detections)
    with pytest.raises(ValueError, match="only those of predict have"):
        result().draw()


def test_drawing_and_its_switches(found, photo):
    plain = found.draw(labels=False, boxes=False, masks=False)
    assert isinstance(plain, Image.Image)
    zoom = plain.width // 96
    expected = cv2.resize(read_image(photo), None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    np.testing.assert_array_equal(np.asarray(plain), expected)
    pictures = [
        np.asarray(found.draw(**{"labels": False, "boxes": False, "masks": False, **switch}))
        for switch in ({}, {"labels": True}, {"labels": True, "scores": False}, {"boxes": True}, {"masks": True})
    ]
    assert len({picture.tobytes() for picture in pictures}) == 5
    np.testing.assert_array_equal(found.draw(), found.draw(labels=True, boxes=True, masks=True, scores=True))


def test_predict_files_has_the_same_switches(checkpoint, photo, found, tmp_path):
    for switches in ({}, {"labels": False}, {"scores": False}, {"boxes": False}, {"masks": False}):
        predict_files(str(checkpoint), str(photo), output=str(tmp_path), device="cpu", threshold=0, **switches)
        with Image.open(tmp_path / f"{photo.name}.png") as picture:
            np.testing.assert_array_equal(picture, found.draw(**switches))


def test_crops(found, photo):
    image, parts = read_image(photo), found.crop()
    x1, y1, x2, y2 = found.boxes[0].tolist()
    np.testing.assert_array_equal(parts[0], image[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))])
    assert len(parts) == len(found.boxes) and parts[0].base is None
    assert all(a.size >= b.size for a, b in zip(found.crop(margin=0.2), parts))
    masked = found.crop(masked=True)
    inside = found.masks[0].numpy()[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))]
    np.testing.assert_array_equal(masked[0], np.where(inside[..., None], parts[0], 0))
    with pytest.raises(ValueError, match="the model finds no masks"):
        found._replace(masks=None).crop(masked=True)


def test_coco_and_supervision(found, model):
    entries = json.loads(json.dumps(found.to_coco(image_id=7)))
    assert {entry["image_id"] for entry in entries} == {7} and len(entries) == len(found.boxes)
    ids = dict(zip(model.categories, model.category_ids))
    assert [entry["category_id"] for entry in entries] == [ids[name] for name in found.names]
    assert entries[0]["area"] == int(found.masks[0].sum()) and entries[0]["segmentation"]["size"] == [96, 96]
    x1, y1, x2, y2 = found.boxes[0].tolist()
    boxes = found._replace(masks=None).to_coco()
    assert boxes[0]["bbox"] == [x1, y1, x2 - x1, y2 - y1] and "segmentation" not in boxes[0]
    assert boxes[0]["area"] == pytest.approx((x2 - x1) * (y2 - y1))
    pytest.importorskip("supervision")
    assert found.to_supervision().data["class_name"].tolist() == found.names
