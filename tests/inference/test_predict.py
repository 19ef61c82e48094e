"""detector.load, model.predict and predict.py."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import tifffile
import torch
from hotcoco import COCO
from hotcoco import mask as rle_tools
from PIL import Image

import detector
from detector import checkpoint as checkpoints
from detector.commands.evaluate import evaluate_checkpoint
from detector.commands.predict import find_images, predict_files
from detector.config import ConfigError, RunError
from detector.data import read_image
from detector.engine.train import train
from detector.inference.load import merge, validation_transforms
from tests.runs import TINY, checked
from tests.untrained import arguments


@pytest.fixture
def model(checkpoint):
    return detector.load(checkpoint)


@pytest.fixture
def photo(shapes_tiny):
    return sorted((shapes_tiny / "val").iterdir())[0]


def test_load(model, state):
    assert not model.model.training and not model.model.box_head.training
    assert model.categories == state["categories"] and model.category_ids == [1, 2, 4, 5, 8]
    assert all(torch.equal(v, state["model"][k]) for k, v in model.model.state_dict().items())


def test_a_detector_says_where_it_is_and_goes_where_it_is_told(model):
    assert model.device.type == "cpu" and model.max_pixels == 100_000_000
    moved = model.to("meta")
    assert moved is model and model.device.type == "meta"
    assert {p.device.type for p in model.model.parameters()} == {"meta"}


def test_load_takes_the_average_and_changes(state):
    averaged = {k: v + 1 if v.is_floating_point() else v for k, v in state["model"].items()}
    model = detector.load(
        state | {"ema": averaged}, changes={"box_head": {"score_threshold": 0.9, "nms_threshold": None}}
    )
    head = model.model.box_head
    assert torch.equal(head.predictor.class_logits.bias, averaged["box_head.predictor.class_logits.bias"])
    assert head.score_threshold == 0.9 and head.nms_threshold == 0.5


def test_load_needs_no_file_that_the_run_started_from(state):
    config = copy.deepcopy(state["config"])
    config["model"]["weights"] = config["model"]["backbone"]["weights"] = "gone.pth"
    model = detector.load(state | {"config": config})
    assert all(torch.equal(v, state["model"][k]) for k, v in model.model.state_dict().items())


def test_load_refuses_what_cannot_work(state, tmp_path):
    with pytest.raises(ConfigError, match="there is no such checkpoint"):
        detector.load(tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ConfigError, match=r"cut.pt: not readable as a checkpoint"):
        detector.load(tmp_path / "cut.pt")
    checkpoints.save(state | {"categories": state["categories"][:3]}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"(?s)other.pt: the weights do not fit.*size mismatch for box_head"):
        detector.load(tmp_path / "other.pt")
    config = copy.deepcopy(state["config"])
    config["model"]["backbone"]["_target_"] = "os.system"
    with pytest.raises(ConfigError, match="not a part of a model"):
        detector.load(state | {"config": config})


@pytest.mark.parametrize(
    "step, message",
    [
        ({"_target_": "albumentations.CenterCrop", "height": 32, "width": 32}, "must only resize"),
        ({"_target_": "albumentations.HorizontalFlip", "p": 1.0}, "must only resize"),
        ({"_target_": "subprocess.run", "args": ["true"]}, "not a transform"),
        ({"_target_": "albumentations.Resize", "height": -1, "width": 9}, "augment.val"),
    ],
)
def test_validation_transforms_that_cannot_be_undone(step, message):
    with pytest.raises(ConfigError, match=message):
        validation_transforms({"augment": {"val": [step]}})
    assert validation_transforms(
        {"augment": {"val": [{"_target_": "albumentations.Resize", "height": 90, "width": 70}]}}
    )


def test_merge():
    base = {"a": 1, "b": {"c": 2, "d": [1]}}
    assert merge(base, {"a": None, "b": {"c": 3, "e": None}}) == {"a": 1, "b": {"c": 3, "d": [1]}}
    assert base == {"a": 1, "b": {"c": 2, "d": [1]}} and merge(base, {"x": {"y": None}}) == base


def test_predict_gives_whole_masks_in_pixels_of_the_image(model, photo):
    image, raw = read_image(photo), []
    model.model.register_forward_hook(lambda module, args, detections: raw.append(detections))
    found = model.predict(image, threshold=0)
    count, (height, width) = len(found.boxes), image.shape[:2]
    assert (
        count == 20
        and found.valid.all()
        and found.masks.shape == (count, height, width)
        and found.masks.dtype == torch.bool
    )
    assert (found.boxes[:, :2] >= 0).all() and (found.boxes[:, 2:] <= torch.tensor([width, height])).all()
    torch.testing.assert_close(found.boxes, raw[0].boxes[0] * width / 128, atol=1e-3, rtol=1e-4)
    assert (found.scores.diff() <= 0).all() and set(found.labels.tolist()) <= set(range(1, 6))
    for mask, (x1, y1, x2, y2) in zip(found.masks.numpy(), found.boxes.numpy()):
        rows, columns = np.nonzero(mask)
        if len(rows):
            assert (
                x1 <= columns.min() + 0.5
                and columns.max() + 0.5 <= x2
                and y1 <= rows.min() + 0.5
                and rows.max() + 0.5 <= y2
            )
    assert all(a is None or torch.equal(a, b) for a, b in zip(found, model.predict(str(photo), threshold=0)))


def test_threshold_and_batches(model, photo):
    image = read_image(photo)
    every = model.predict(image, threshold=0)
    score = every.scores[4].item()
    assert len(model.predict(image, threshold=score).boxes) == 5 and len(model.predict(image, threshold=1).boxes) == 0
    for one in model.predict_batch([image, image], threshold=0):
        torch.testing.assert_close(one.boxes, every.boxes, atol=1e-3, rtol=0)


def test_one_pixel_and_empty_images(model):
    assert model.predict(np.zeros((1, 1, 3), np.uint8), threshold=0).boxes.shape[1] == 4
    with pytest.raises(ValueError, match="image is empty"):
        model.predict(np.zeros((0, 5, 3), np.uint8))


def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "deep/c.jpeg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in find_images(str(tmp_path))] == ["a.png", "b.JPG", "c.jpeg"]
    assert [p.name for p in find_images(f"{tmp_path}/*.txt")] == ["notes.txt"]
    assert [p.name for p in find_images([f"{tmp_path}/a.png", str(tmp_path)])] == ["a.png", "b.JPG", "c.jpeg"]
    with pytest.raises(
        ConfigError, match=r"images: 'nowhere/\*.jpg' is no file, no folder with images, and matches nothing"
    ):
        find_images("nowhere/*.jpg")


def test_what_a_folder_holds_beside_images_is_counted_by_kind(tmp_path, caplog):
    """Pillow's own formats are read, .avif and .jfif among them; what is left out is said."""
    picture = Image.new("RGB", (20, 10), (9, 99, 199))
    for suffix in (".avif", ".jfif", ".webp", ".PNG", ".gif", ".jp2", ".tga"):
        picture.save(tmp_path / f"a{suffix}")
        assert read_image(tmp_path / f"a{suffix}").shape == (10, 20, 3)
    for name in ("a.heic", "b.HEIC", "c.mpg", "notes"):
        (tmp_path / name).write_bytes(b"")
    assert len(find_images(str(tmp_path))) == 7
    assert "left out are 2 .heic, 1 .mpg, 1 without a suffix" in caplog.text
    (tmp_path / "phone").mkdir()
    (tmp_path / "a.heic").rename(tmp_path / "phone" / "a.heic")
    with pytest.raises(ConfigError, match=r"no folder with images, and matches nothing \(but 1 \.heic\)"):
        find_images(str(tmp_path / "phone"))


@pytest.mark.slow
def test_own_drawings_are_never_detected_in(checkpoint, photo, tmp_path, capsys, caplog):
    """Whatever lies where: the output among the images, beside them, or elsewhere among them at each call."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "mine.jpg.png").write_bytes(photo.read_bytes())  # somebody's own, named like a drawing
    for output in (folder / "found", folder / "found", folder, folder, folder / "again"):
        options = [f"checkpoint={checkpoint}", f"images={folder}", f"output={output}", "device=cpu"]
        predict_files(**arguments("predict", options))
        assert "in 3 images, 0 files unreadable" in capsys.readouterr().out
    assert "3 pictures that predict.py drew" in caplog.text
    predict_files(**arguments("predict", [options[0], f"images={folder}/*", *options[2:]]))
    assert "in 3 images," in capsys.readouterr().out
    older = folder / "found" / "a.jpg.png"
    Image.open(older).save(older)  # as older versions left them, without the sign
    assert "Software" not in Image.open(older).info
    predict_files(**arguments("predict", [*options[:2], f"output={folder / 'found'}", "device=cpu"]))
    assert "in 3 images," in capsys.readouterr().out and "drawn anew, such as" in caplog.text


def test_settings_of_the_model_and_the_limit_of_detections(checkpoint, photo, tmp_path, capsys, caplog):
    options = [f"checkpoint={checkpoint}", f"images={photo}", f"output={tmp_path / 'out'}", "device=cpu", "draw=false"]
    predict_files(**arguments("predict", [*options, "threshold=0.01"]))
    shown = capsys.readouterr().out
    assert "20 objects in 1 images" in shown and "1 of the images have 20 objects, the most" in shown
    assert "model.box_head.detections_per_image=60" in shown
    assert "threshold = 0.01: the model gives no scores below 0.05" in caplog.text
    caplog.clear()
    advice = ["model.box_head.detections_per_image=60", "model.box_head.score_threshold=0.01"]
    predict_files(**arguments("predict", [*options, "threshold=0.01", *advice]))
    more = int(capsys.readouterr().out.split()[0])
    assert 20 < more <= 60 and not caplog.text


def test_larger_images_than_in_training(checkpoint, tmp_path, monkeypatch, capsys):
    """max_pixels is the run's, or one's own; Pillow's limit gives way."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.fromarray(np.zeros((60, 70, 3), np.uint8)).save(tmp_path / "large.png")
    state = checkpoints.load(checkpoint)
    state["config"]["data"]["max_pixels"] = 4000
    model = detector.load(state)
    with pytest.raises(ValueError, match=r"large\.png cannot be read: .*max_pixels=4000"):
        model.predict(tmp_path / "large.png")
    model.predict(tmp_path / "large.png", max_pixels=4200)
    options = [f"checkpoint={checkpoint}", f"images={tmp_path / 'large.png'}", f"output={tmp_path / 'out'}"]
    assert predict_files(**arguments("predict", [*options, "device=cpu"])) == 0
    with pytest.raises(RunError, match="none of the 1 files could be read"):
        predict_files(**arguments("predict", [*options, "device=cpu", "max_pixels=4199"]))
    assert "max_pixels=4199" in capsys.readouterr().err


def test_predict_files(checkpoint, photo, tmp_path, capsys):
    folder, output = tmp_path / "images", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "deep/a.jpg"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "cut.jpg").write_bytes(photo.read_bytes()[:500])
    (folder / "words.png").write_text("no picture")
    options = [
        f"checkpoint={checkpoint}",
        f"images={folder}",
        f"output={output}",
        "threshold=0.0",
        "batch_size=2",
        "device=cpu",
    ]
    assert predict_files(**arguments("predict", options)) == 2
    message = capsys.readouterr()
    assert "cut.jpg cannot be read" in message.err and "in 3 images, 2 files unreadable" in message.out
    assert "words.png cannot be read: it is in no format of a picture" in message.err
    pictures = sorted(p.relative_to(output).as_posix() for p in output.rglob("*.png"))
    assert pictures == ["a.jpg.png", "b.jpg.png", "deep/a.jpg.png"]
    assert max(Image.open(output / pictures[0]).size) >= 800
    found = COCO(str(output / "predictions.json"))  # COCO tools can read it
    assert len(found.imgs) == 3 and set(found.cats) == {1, 2, 4, 5, 8}
    annotations = json.loads((output / "predictions.json").read_text())["annotations"]
    expected = detector.load(checkpoint).predict(photo, threshold=0)
    first = [a for a in annotations if a["image_id"] == 1]
    assert [a["score"] for a in first] == pytest.approx(expected.scores.tolist(), abs=1e-5)
    np.testing.assert_array_equal(rle_tools.decode(first[0]["segmentation"]), expected.masks[0].numpy())
    predict_files(**arguments("predict", [*options, "precision=bf16", "draw=false"]))
    halved = json.loads((output / "predictions.json").read_text())["annotations"]
    assert 0 < abs(halved[0]["score"] - annotations[0]["score"]) < 0.02
    with pytest.raises(RunError, match="none of the 1 files could be read"):
        predict_files(**arguments("predict", [*options[:1], f"images={folder}/cut.jpg", *options[2:]]))


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [[], ["tiles.size=64"]], ids=["whole", "tiles"])
def test_every_page_of_a_file_is_an_image(checkpoint, shapes_tiny, tmp_path, tiles, capsys, caplog):
    """With data.page=each; one page with its number, the first one otherwise, which is said. A file name that ends with
    a page makes it an image of a data set, whose evaluation finds the same."""
    files = sorted((shapes_tiny / "val").iterdir())[:3]
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "stack.tif", np.stack([read_image(file) for file in files]), photometric="rgb")
    Image.fromarray(read_image(files[0])).save(tmp_path / "in" / "single.png")

    def found(name: str, *options: str) -> dict:
        options = (
            f"checkpoint={checkpoint}",
            f"images={tmp_path / 'in'}",
            f"output={tmp_path / name}",
            *options,
            *tiles,
        )
        assert predict_files(**arguments("predict", [*options, "threshold=0", "device=cpu"])) == 0
        return json.loads((tmp_path / name / "predictions.json").read_text())

    def of_image(content: dict, number: int) -> list[tuple]:
        return [(e["score"], *e["bbox"]) for e in content["annotations"] if e["image_id"] == number]

    each = found("each", "data.page=each")
    names = [image["file_name"].rpartition("/")[2] for image in each["images"]]
    assert names == ["single.png", "stack.tif#page=1", "stack.tif#page=2", "stack.tif#page=3"]
    drawn = {path.name for path in (tmp_path / "each").glob("*.png")}
    assert drawn == {"single.png.png", *(f"stack_page{page}.tif.png" for page in (1, 2, 3))}
    assert "have several pages" not in caplog.text
    assert of_image(each, 1) == of_image(each, 2) != of_image(each, 3) != of_image(each, 4)
    first = found("first", "draw=false")
    assert of_image(first, 2) == of_image(each, 2) and "1 files have several pages, of which the first" in caplog.text
    (tmp_path / "in" / "single.png").unlink()
    second = found("second", "data.page=2", "draw=false")
    assert of_image(second, 1) == of_image(each, 3)

    if tiles:
        return
    truth = json.loads((shapes_tiny / "annotations" / "instances_val.json").read_text())
    ids = [next(image["id"] for image in truth["images"] if image["file_name"] == file.name) for file in files]
    truth["images"] = [
        {"id": id_, "file_name": f"stack.tif#page={page}", "width": 96, "height": 96} for page, id_ in enumerate(ids, 1)
    ]
    truth["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] in ids]
    (tmp_path / "in" / "pages.json").write_text(json.dumps(truth))
    data = [f"data.root={tmp_path / 'in'}", "data.val.images=.", "data.val.annotations=pages.json"]
    evaluate_checkpoint(
        **arguments(
            "eval",
            [f"checkpoint={checkpoint}", f"output={tmp_path / 'eval'}", "device=cpu", "workers=0", *data, *tiles],
        )
    )
    results = {"annotations": json.loads((tmp_path / "eval" / "predictions.json").read_text())}
    for page, id_ in enumerate(ids, 1):
        assert [v[0] for v in of_image(results, id_)] == [v[0] for v in of_image(each, page + 1)]
    both = [*data, "data.train.images=.", "data.train.annotations=pages.json"]
    with pytest.raises(ConfigError, match=r"data\.page = 'each': .*in data sets a file_name is like stack"):
        train(checked(*TINY, *both, f"run_dir={tmp_path / 'run'}", "data.page=each"))
    train(checked(*TINY, *both, f"run_dir={tmp_path / 'run'}", "schedule.max_iterations=1", "schedule.warmup=0"))
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_threads_of_prediction(checkpoint, tmp_path, monkeypatch):
    followed, before = [], torch.get_num_threads()
    monkeypatch.setattr("detector.inference.predict.follow", lambda: followed.append(torch.get_num_threads()))
    photo = tmp_path / "photo.png"
    Image.new("RGB", (96, 64)).save(photo)
    options = [f"checkpoint={checkpoint}", f"images={photo}", f"output={tmp_path / 'out'}", "device=cpu", "draw=false"]
    try:
        predict_files(**arguments("predict", [*options, "threads=3"]))
        assert followed == [3]
        with pytest.raises(ConfigError, match="threads = 0"):
            predict_files(**arguments("predict", [*options, "threads=0"]))
    finally:
        torch.set_num_threads(before)
