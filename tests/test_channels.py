"""Pictures of other than three channels, from the files to what is found in them."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from types import SimpleNamespace

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image

import detector
from detector.backbone import ResNet, TimmBackbone
from detector.commands.predict import predict_files
from detector.commands.validate import as_text, report_on
from detector.config import ConfigError, build
from detector.data import Pipeline
from detector.data.transforms import ResizeShortestEdge
from detector.engine.train import train
from detector.explorer.page import write_page
from detector.export.export import Exportable
from detector.inference.tta import Augmented
from detector.weights.loading import widen
from tests.runs import TINY, checked
from tests.untrained import arguments

BOXES = [text for text in TINY if "mask_head" not in text] + ["model=faster_rcnn", "data.masks=false"]
SIX = ["data.channels=6", "data.shown=[4,5,6]"]
MEASURED = ["model.pixel_mean=[127,127,127,127,127,127]", "model.pixel_std=[64,64,64,64,64,64]"]


def make_set(root, channels: int):
    """Squares of two categories on noise. Channels 1 to 3 show alike where they are; 4 to 6 alone which is which."""
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(1, count + 1):
            picture = random.integers(90, 110, (64, 64, 6)).astype(np.uint8)
            for place in (2, 34):
                x, y, side, kind = (
                    place + int(random.integers(6)),
                    int(random.integers(40)),
                    22,
                    int(random.integers(2)),
                )
                picture[y : y + side, x : x + side, :3] += 100
                picture[y : y + side, x : x + side, 3:] = (250, 20, 130) if kind else (20, 250, 130)
                box = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0, "category_id": kind + 1}
                annotations.append(box | {"id": len(annotations) + 1, "image_id": number})
            np.save(root / split / f"{number}.npy", picture[..., :channels])
            images.append({"id": number, "file_name": f"{number}.npy", "width": 64, "height": 64})
        categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "other"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def six(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("six") / "data", 6)


@pytest.fixture(scope="session")
def trained(six, tmp_path_factory):
    """The folder of a run on all six channels, and what it comes to beside one on the first three."""
    folder = tmp_path_factory.mktemp("channels")
    three = make_set(folder / "three", 3)
    short = ["data=custom", "augment=flip", "optimizer=adamw", "optimizer.lr=0.003", "schedule.max_iterations=60"]
    short += ["model.box_head.positive_fraction=0.5"]
    ends = []
    for root, name, settings in ((six, "six", [*SIX, *MEASURED]), (three, "of_three", [])):
        look = ["runtime.tensorboard=true", "runtime.pictures_every=60"] if settings else []
        train(checked(*BOXES, *settings, *short, *look, f"data.root={root}", f"run_dir={folder / name}"))
        lines = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        loss = np.mean([line["loss_classifier"] for line in lines if "loss_classifier" in line][-15:])
        ends.append({"loss": loss, **json.loads((folder / name / "metrics.json").read_text())["bbox"]})
    return folder / "six", *ends


def test_what_only_the_other_channels_show_is_learnt(trained):
    """Three channels tell no category from the other: there no training helps."""
    _, six, three = trained
    assert six["loss"] < 0.8 * three["loss"] and six["AP50"] > three["AP50"] + 0.2


def test_validation_measures_the_statistics_and_says_what_to_train_with(six):
    """The model lacks them at first: that is an error, with the line that mends it."""
    settings = [*BOXES, *SIX, "data=custom", f"data.root={six}"]
    report = report_on(checked(*settings), pictures=1)
    assert report.has_errors() and "model.pixel_mean has 3 numbers, data.channels=6" in as_text(report)
    assert report.pictures[0][1].shape[2] == 3
    line = as_text(report).split("to train with: ")[1].splitlines()[0]
    given = shlex.split(line)
    pixels = np.stack([np.load(path) for path in (six / "train").glob("*.npy")]).reshape(-1, 6)
    for text, expected in zip(given, (pixels.mean(0), pixels.std(0))):
        np.testing.assert_allclose(json.loads(text.partition("=")[2]), expected, rtol=1e-3)
    again = report_on(checked(*settings, *given), pictures=0)  # what the line says works
    assert not again.has_errors()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.channels=6"], r"pixel_mean=.*a number for each of the 6 channels.*detector validate"),
        ([*SIX, *MEASURED, "augment=photometric"], r"augmentation ColorJitter cannot take pictures of 6 channels"),
        ([*SIX, *MEASURED, "augment=lsj"], r"augmentation RandomCrop cannot take pictures of 6 channels"),
        ([*SIX, *MEASURED, "model.channel_order=bgr"], r"channel_order='bgr': 6 channels have no such order"),
        (["data.channels=17"], r"data\.channels = 17: must be from 1 to 16"),
        (["data.intensity=full"], r"data\.intensity = 'full': must be"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(six, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        train(checked(*BOXES, "data=custom", f"data.root={six}", f"run_dir={tmp_path / 'run'}", *settings))


def test_a_model_of_six_channels_does_what_others_do(trained, six, tmp_path):
    """Prediction from files and arrays, drawing, test-time augmentation, export, the explorer."""
    found = detector.load(trained[0] / "last.pt", changes={"box_head": {"score_threshold": 0.01}})
    path = six / "val" / "1.npy"
    picture = np.load(path)
    from_file, from_array = found.predict(path, 0), found.predict(picture, 0)
    assert len(from_file.boxes) and torch.equal(from_file.boxes, from_array.boxes)
    with pytest.raises(TypeError, match=r"uint8 array \[H, W, 6\], got uint8 \[64, 64, 3\]"):
        found.predict(picture[..., :3])
    with pytest.raises(ValueError, match=r"3\.png cannot be read: it has 3 channels, data\.channels=6"):
        Image.fromarray(picture[..., :3]).save(tmp_path / "3.png")
        found.predict(tmp_path / "3.png")
    tiled = found.predict(path, 0, tiles={"size": 48})
    assert len(tiled.boxes)
    batch = found.as_batch([picture])
    assert batch.images.shape[1] == 6 and Augmented(found.model, [1.0, 0.5])(batch).valid.any()
    exported = Exportable(found.model)(batch.images, batch.image_sizes[0])
    plain = found.model(batch)
    count = int(plain.valid.sum())
    torch.testing.assert_close(exported[0][:count], plain.boxes[0][:count], atol=1e-2, rtol=1e-3)
    page = write_page(found, picture, tmp_path / "page.html", max_mb=2)
    shown = found.pictures.rgb(picture)
    drawn = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page.read_text())[1]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn)))), shown)
    assert (shown == picture[..., 3:]).all()
    options = [
        f"checkpoint={trained[0] / 'last.pt'}",
        f"images={six / 'val'}",
        f"output={tmp_path / 'out'}",
        "device=cpu",
    ]
    assert predict_files(**arguments("predict", [*options, "threshold=0.01"])) == 0
    assert len(list((tmp_path / "out").glob("*.npy.png"))) == 8


@pytest.mark.slow
def test_the_run_draws_the_chosen_channels(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(trained[0] / "tensorboard"))
    board.Reload()
    drawn = np.asarray(Image.open(io.BytesIO(board.Images("predictions/0")[0].encoded_image_string)))
    assert {(20, 250, 130), (250, 20, 130)} & {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()}


@pytest.mark.parametrize("channels", [1, 2, 5, 16])
def test_resizing_and_photometric_changes_of_any_number_of_channels(channels):
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, channels)).astype(np.uint8)
    for interpolation in (1, "pillow"):
        steps = [ResizeShortestEdge(80, None, interpolation=interpolation), A.RandomBrightnessContrast(p=1), A.D4(p=1)]
        out = Pipeline(steps, channels=channels)(picture, np.float32([[5, 6, 20, 30]]), seed=3)
        assert out.image.shape[2] == channels and min(out.image.shape[:2]) == 80 and len(out.boxes) == 1
    alone = Pipeline([ResizeShortestEdge(80, None)])(np.repeat(picture[..., :1], 3, 2)).image
    np.testing.assert_array_equal(
        Pipeline([ResizeShortestEdge(80, None)], channels=channels)(picture).image[..., 0], alone[..., 0]
    )


def test_transforms_that_change_the_number_of_channels_are_refused():
    with pytest.raises(ValueError, match="augmentation ToGray cannot take pictures of 6 channels"):
        Pipeline([A.OneOf([A.ToGray()], p=0.1)], channels=6)
    Pipeline([A.OneOf([A.ToGray()], p=0.1)])


# ------------------------------------------------------------------------------------------------------- first weights


def first_weight(channels: int, how: str, presets=None, frozen: int = 0):
    """(theirs [8, 3, 7, 7], the widened one)."""
    model = SimpleNamespace(backbone=ResNet(10, width=8, norm="batch_norm", frozen_stages=frozen, in_channels=channels))
    theirs = torch.randn(8, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    state = widen(model, {"backbone.conv1.weight": theirs, "other": theirs}, presets or {}, how)
    assert state["other"] is theirs
    return theirs, state["backbone.conv1.weight"], model.backbone.conv1.weight


def test_the_first_convolution_is_widened():
    theirs, mean, _ = first_weight(6, "mean")
    torch.testing.assert_close(mean, theirs.mean(1, keepdim=True).repeat(1, 6, 1, 1) / 2)
    theirs, repeated, _ = first_weight(6, "repeat")
    torch.testing.assert_close(repeated, theirs.repeat(1, 2, 1, 1) / 2)
    _, new, own = first_weight(6, "new")
    assert torch.equal(new, own)
    theirs, grey, _ = first_weight(1, "mean")  # of three channels that are alike
    torch.testing.assert_close(grey, theirs.sum(1, keepdim=True))
    theirs, same, _ = first_weight(3, "new")
    assert same is theirs


def test_weights_that_were_trained_on_bgr_and_other_scales():
    presets = {"channel_order": "bgr", "pixel_std": [1.0, 1.0, 1.0], "pixel_mean": [103.53, 116.28, 123.675]}
    theirs, repeated, _ = first_weight(3 + 3, "repeat", presets)
    torch.testing.assert_close(repeated[:, 0], theirs[:, 2] * 58.395 / 2)
    torch.testing.assert_close(repeated[:, 5], theirs[:, 0] * 57.375 / 2)


def test_a_first_convolution_that_is_not_trained(caplog):
    with pytest.raises(ValueError, match=r"not trained: model\.backbone\.frozen_stages=0 trains it"):
        first_weight(6, "new", frozen=1)
    first_weight(6, "mean", frozen=1)
    assert "is widened to 6 channels, but not trained: model.backbone.frozen_stages=0 trains it" in caplog.text


@pytest.mark.parametrize("how", ["mean", "repeat"])
def test_a_run_starts_from_weights_for_three_channels(six, tmp_path, how):
    """As file of a backbone and of a detector; afterwards the run's own checkpoint is one of six channels."""
    settings = [*BOXES, *SIX, *MEASURED, "data=custom", f"data.root={six}", f"weights.first_conv={how}"]
    three = build(checked(*BOXES).model, "model", num_classes=2)
    torch.save(three.state_dict(), tmp_path / "three.pth")
    for key in ("model.weights", "model.backbone.weights"):
        cfg = checked(*settings, f"{key}={tmp_path / 'three.pth'}")
        start, model = build(cfg.weights, "weights"), build(cfg.model, "model", num_classes=2)
        start.load(model, start.read(cfg))
        theirs = three.backbone.conv1.weight
        expected = theirs.mean(1, keepdim=True).repeat(1, 6, 1, 1) if how == "mean" else theirs.repeat(1, 2, 1, 1)
        torch.testing.assert_close(model.backbone.conv1.weight, expected / 2)
        assert torch.equal(model.backbone.layer1[0].conv1.weight, three.backbone.layer1[0].conv1.weight)


def test_timm_takes_other_channels():
    backbone = TimmBackbone("resnet10t", in_channels=5)
    assert backbone.in_channels == 5 and len(backbone(torch.zeros(1, 5, 64, 64))) == 4
