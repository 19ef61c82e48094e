"""Large pictures seen tile by tile, mostly by a detector that finds every blob of its tile: only the tiles can fail."""

from __future__ import annotations

import json
import tracemalloc
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle_tools
from torch import nn

import detector
from detector.commands.evaluate import evaluate_checkpoint
from detector.commands.predict import predict_files
from detector.config import ConfigError
from detector.data import Pictures, Pipeline, read_image
from detector.data.picture_files import TiffFile
from detector.engine.train import train
from detector.inference.tiles import Found, find, looks, merge, starts
from detector.settings import Tiles
from detector.structures import Detections
from tests.untrained import arguments

CELLS = 56  # of a predicted mask


class Blobs(nn.Module):
    """Finds the connected blobs of its input: red ones are of label 1, white ones of label 2; small ones score less."""

    def __init__(self, least: int = 1, limit: int = 100):
        super().__init__()
        self.parameter, self.pad_multiple, self.least = nn.Parameter(torch.zeros(1)), 32, least
        self.box_head = SimpleNamespace(stages=[SimpleNamespace(nms_threshold=0.5, detections_per_image=limit)])
        self.passes = []

    def forward(self, batch):
        self.passes.append(len(batch.images))
        found = [
            self.blobs(image[:, :h, :w].numpy()) for image, (h, w) in zip(batch.images, batch.image_sizes.tolist())
        ]
        most = max(1, *(len(rows) for rows in found))
        padded = [rows + [(np.zeros(4), 0.0, 0, np.zeros((CELLS, CELLS)))] * (most - len(rows)) for rows in found]
        boxes, scores, labels, masks = (
            torch.tensor(np.array([[row[i] for row in rows] for rows in padded]), dtype=torch.float32) for i in range(4)
        )
        return Detections(boxes, scores, labels.long(), scores > 0, masks)

    def blobs(self, image):
        count, parts, stats, _ = cv2.connectedComponentsWithStats((image[0] > 127).astype(np.uint8))
        rows = []
        for part in range(1, count):
            x, y, w, h, area = stats[part].tolist()
            if min(w, h) >= self.least:
                inside = (parts[y : y + h, x : x + w] == part).astype(np.float32)
                label = 2 if image[1][parts == part].mean() > 127 else 1
                mask = cv2.resize(inside, (CELLS, CELLS), interpolation=cv2.INTER_LINEAR)
                rows.append((np.array([x, y, x + w, y + h]), 1 - 1 / (2 + area), label, mask))
        return rows


def discs(size: int, places) -> tuple[np.ndarray, list[np.ndarray]]:
    """A picture of discs and their masks. places: (x, y, radius, is_white) of each."""
    picture, masks = np.zeros((size, size, 3), np.uint8), []
    for x, y, radius, is_white in places:
        mask = cv2.circle(np.zeros((size, size), np.uint8), (x, y), radius, 1, cv2.FILLED).astype(bool)
        picture[mask] = (255, 255, 255) if is_white else (255, 0, 0)
        masks.append(mask)
    return picture, masks


def see(picture: np.ndarray, model=None, **tiles) -> Found:
    with Pictures().parts_of(picture) as parts:
        return find(model or Blobs(), parts, Tiles(**tiles), Pipeline())


def around(mask: np.ndarray) -> np.ndarray:
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return np.array([x, y, x + w, y + h])


def nearest(found: Found, mask: np.ndarray) -> int:
    return int(np.abs(found.boxes - around(mask)).sum(1).argmin())


def agreement(found: Found, masks: list[np.ndarray]) -> list[float]:
    """The mask IoU of each object with what was found at its place."""
    pairs = [(mask, found.mask(nearest(found, mask))) for mask in masks]
    return [(mask & seen).sum() / (mask | seen).sum() for mask, seen in pairs]


@given(side=st.integers(1, 5000), size=st.integers(32, 1500), overlap=st.floats(0, 0.9))
def test_tiles_cover_a_side_evenly(side, size, overlap):
    found = starts(side, size, overlap)
    assert found[0] == 0 and (found[-1] == side - size if side > size else found == [0])
    steps = np.diff(found)
    assert (steps > 0).all() and (size - steps >= round(overlap * size) - 1).all()
    if len(found) > 1:  # one tile less would not do
        assert np.ptp(steps) <= 1
        assert size + (len(found) - 2) * (size - round(overlap * size)) < side


def test_looks_are_inside_and_whole():
    for height, width in ((100, 900), (64, 64), (65, 200), (30, 20)):
        seen = np.zeros((height, width), int)
        for x1, y1, x2, y2 in looks(height, width, Tiles(size=64, overlap=0.25)):
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            seen[y1:y2, x1:x2] += 1
        assert seen.min() >= 1


@pytest.mark.parametrize("whole", [True, False])
def test_every_object_is_found_once_and_whole(whole):
    """Small ones anywhere, also where four tiles meet; large ones that no tile holds."""
    places = [(40 + 52 * i, 40 + 52 * j, 6 + (3 * i + 5 * j) % 14, (i + j) % 2) for i in range(6) for j in range(6)]
    places += [(480, 110, 90, 0), (480, 320, 95, 1), (110, 470, 90, 1), (340, 480, 70, 0)]
    picture, masks = discs(600, places)
    found = see(picture, size=128, overlap=0.3, whole=whole)
    assert len(found.boxes) == len(masks) and (np.diff(found.scores) <= 0).all()
    assert min(agreement(found, masks)) > (0.9 if whole else 0.95)
    for mask, place in zip(masks, places):
        best, off = nearest(found, mask), 6 if whole and place[2] > 60 else 1
        assert found.labels[best] == place[3] + 1 and np.abs(found.boxes[best] - around(mask)).max() <= off


def test_an_object_longer_than_many_tiles_is_one():
    picture = np.zeros((120, 1000, 3), np.uint8)
    picture[50:70, 10:990] = (255, 0, 0)
    found = see(picture, size=100, overlap=0.2, whole=False)
    assert len(found.boxes) == 1 and np.abs(found.boxes[0] - [10, 50, 990, 70]).max() <= 1
    assert found.mask(0)[55:65, 20:980].all() and found.mask(0).sum() <= 980 * 22


def test_neighbours_at_a_seam_stay_two():
    """Two objects of one class, cut by the same seam; and two of other classes one inside the other."""
    picture, masks = discs(200, [(100, 60, 16, 0), (100, 96, 16, 0), (100, 150, 16, 1)])
    found = see(picture, size=100, overlap=0.1, whole=False)
    assert len(found.boxes) == 3 and min(agreement(found, masks)) > 0.9
    two = Found(
        200, 200, np.float32([[95, 90, 115, 130], [95, 90, 115, 130]]), np.float32([0.9, 0.8]), np.array([1, 2])
    )
    views = np.float32([[0, 0, 130, 200], [80, 0, 200, 200]])
    assert len(merge(two, views, np.array([0, 1]), 0.5, 130).boxes) == 2


def test_the_merging_rules():
    views = np.float32([[0, 0, 100, 100], [80, 0, 180, 100], [0, 0, 180, 100]])  # two tiles and the whole picture

    def merged(*rows):
        boxes, scores, look = (np.array([row[i] for row in rows]) for i in range(3))
        found = Found(100, 180, boxes.astype(np.float32), scores.astype(np.float32), np.ones(len(rows), int))
        return merge(found, views, look, 0.5, 100)

    # not cut: NMS, the tile's box before the whole picture's, with the better score
    assert merged(([84, 10, 96, 30], 0.6, 0), ([85, 10, 96, 31], 0.9, 1)).boxes.tolist() == [[85, 10, 96, 31]]
    found = merged(([20, 10, 70, 60], 0.6, 0), ([22, 8, 74, 62], 0.9, 2))
    assert found.boxes.tolist() == [[20, 10, 70, 60]] and found.scores.tolist() == [np.float32(0.9)]
    # a part at a seam gives way to what is whole, however good it is, and leaves its score
    found = merged(([85, 10, 100, 30], 0.95, 0), ([85, 10, 115, 30], 0.5, 1))
    assert found.boxes.tolist() == [[85, 10, 115, 30]] and found.scores.tolist() == [np.float32(0.95)]
    # two parts become one
    assert merged(([50, 10, 100, 30], 0.9, 0), ([80, 11, 150, 30], 0.8, 1)).boxes.tolist() == [[50, 10, 150, 30]]
    # but not of what differs where both tiles look
    assert len(merged(([50, 10, 100, 30], 0.9, 0), ([80, 60, 150, 90], 0.8, 1)).boxes) == 2
    # where another tile sees clearly more around a place, it alone decides: here that there is nothing, or another box
    assert len(merged(([81, 10, 88, 30], 0.9, 1)).boxes) == 0
    found = merged(([81, 10, 88, 30], 0.5, 0), ([81, 10, 88, 32], 0.9, 1))
    assert found.boxes.tolist() == [[81, 10, 88, 30]] and found.scores.tolist() == [np.float32(0.5)]
    # two of one look were told apart by the network
    assert len(merged(([20, 10, 70, 60], 0.6, 0), ([22, 8, 74, 62], 0.9, 0)).boxes) == 2


def test_of_the_whole_picture_only_what_tiles_may_not_hold():
    picture, masks = discs(400, [(60, 60, 10, 0), (200, 200, 90, 0)])
    model = Blobs()
    found = see(picture, model, size=100, overlap=0.2, whole=True)
    assert len(found.boxes) == 2 and len(model.passes) == 26
    alone = see(picture, size=100, overlap=0.2, whole=False)
    assert min(agreement(found, masks)) > 0.9 and min(agreement(alone, masks)) > 0.9
    far, _ = discs(400, [(60, 60, 4, 0)])  # is two pixels in the small picture: coarse, and not taken
    np.testing.assert_array_equal(see(far, size=100).boxes, see(far, size=100, whole=False).boxes)


def test_several_tiles_in_a_pass_change_nothing():
    picture, _ = discs(300, [(70 * i + 40, 60 * j + 40, 18, 0) for i in range(4) for j in range(4)])
    results = []
    for batch_size in (1, 5):
        model = Blobs()
        with Pictures().parts_of(picture) as parts:
            results.append(find(model, parts, Tiles(size=96), Pipeline(), batch_size=batch_size))
        assert max(model.passes) == batch_size and sum(model.passes) == 17
    np.testing.assert_array_equal(results[0].boxes, results[1].boxes)


@pytest.fixture
def model(checkpoint):
    return detector.load(checkpoint)


def test_a_picture_of_one_tile_is_seen_as_ever(model, shapes_tiny):
    """To the bit: masks, order and all."""
    path = sorted((shapes_tiny / "val").iterdir())[0]
    plain, tiled = model.predict(path, 0), model.predict(path, 0, tiles={"size": 96})
    for name, one, other in zip(plain._fields, plain, tiled):
        assert (one is None and other is None) or torch.equal(one, other), name
    assert len(model.predict(path, 0, tiles={"size": 48}).boxes) > len(plain.boxes)


def spread(path, size=2048, **options):
    """A large TIFF with discs."""
    picture, _ = discs(size, [(200 + 400 * i, 300 + 500 * j, 30, 0) for i in range(5) for j in range(4)])
    tifffile.imwrite(path, picture, photometric="rgb", **options)
    return picture


@pytest.mark.parametrize("options", [{"tile": (128, 128), "compression": "zlib"}, {"rowsperstrip": 32}], ids=str)
def test_regions_are_read_where_the_format_allows(tmp_path, monkeypatch, options):
    """Never the whole picture: 2048 x 2048 pixels are seen in less memory than a third of it takes."""
    picture = np.zeros((2048, 2048, 5), np.uint8)
    picture[300:340, 1000:1050] = 255
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="minisblack", planarconfig="contig", **options)
    monkeypatch.setattr(TiffFile, "pixels", lambda *_: pytest.fail("the whole picture is read"))
    tracemalloc.start()
    with Pictures(channels=5).parts(tmp_path / "a.tif") as parts:
        found = find(Blobs(), parts, Tiles(size=256), Pipeline(channels=5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.boxes.tolist() == [[1000, 300, 1050, 340]] and peak < picture.nbytes / 3


def test_what_is_decoded_whole_gives_the_same(tmp_path):
    picture = spread(tmp_path / "a.tif", 1000, tile=(64, 64))
    Image.fromarray(picture).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", picture)
    seen = []
    for name in ("a.tif", "a.png", "a.npy"):
        with Pictures().parts(tmp_path / name) as parts:
            seen.append(find(Blobs(), parts, Tiles(size=300), Pipeline()))
            np.testing.assert_array_equal(parts.reduced(100), Pictures().parts_of(picture).__enter__().reduced(100))
    for other in seen[1:]:
        np.testing.assert_array_equal(seen[0].boxes, other.boxes)


def test_predict_files_with_tiles(checkpoint, tmp_path, shapes_tiny, capsys):
    """A folder of large and small pictures, one of them broken; boxes, masks and drawings as `predict` gives them."""
    names = [str(path) for path in sorted((shapes_tiny / "val").iterdir())[:4]]
    (tmp_path / "in").mkdir()
    large = np.concatenate([np.concatenate([read_image(name) for name in names[:2]], 1)] * 2, 0)
    Image.fromarray(large).save(tmp_path / "in" / "large.png")
    Image.fromarray(read_image(names[3])).save(tmp_path / "in" / "small.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    options = [f"checkpoint={checkpoint}", f"images={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "device=cpu"]
    options += ["threshold=0", "tiles={size: 96, overlap: 0.25, whole: true}", "batch_size=3"]
    assert predict_files(**arguments("predict", options)) == 1
    assert "broken.png cannot be read" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [(i["width"], i["height"]) for i in found["images"]] == [(192, 192), (96, 96)]
    expected = detector.load(checkpoint).predict(large, 0, tiles={"size": 96, "overlap": 0.25})
    own = [entry for entry in found["annotations"] if entry["image_id"] == 1]
    assert len(own) == len(expected.boxes) > 20  # more than the network gives for one tile
    for entry, score, mask in zip(own, expected.scores, expected.masks):
        assert entry["score"] == float(score) and (rle_tools.decode(entry["segmentation"]) == mask.numpy()).all()
        assert entry["area"] == int(mask.sum())
    assert Image.open(tmp_path / "out" / "large.png.png").size[0] >= 192


def test_a_large_picture_is_drawn_small(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("detector.commands.predict.DRAWN_SIDE", 64)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 200, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    options = [f"checkpoint={checkpoint}", f"images={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}", "device=cpu"]
    predict_files(**arguments("predict", [*options, "threshold=0", "tiles.size=96"]))
    picture = Image.open(tmp_path / "out" / "a.png.png")
    assert picture.size == (64 * 13, 41 * 13)  # of 64 x 41 pixels, enlarged as small pictures are


def test_shrunk_masks_stay_in_place():
    picture, masks = discs(400, [(100, 200, 60, 0), (395, 5, 20, 1)])
    small = see(picture, size=400).shrunk(100, 100)
    for mask in masks:
        there = cv2.resize(mask.astype(np.uint8), (100, 100), interpolation=cv2.INTER_NEAREST).astype(bool)
        assert max((there & small.mask(i)).sum() / (there | small.mask(i)).sum() for i in range(2)) > 0.85


def evaluated(checkpoint, folder, *options):
    options = [f"checkpoint={checkpoint}", "device=cpu", "workers=0", f"output={folder}", *options]
    return evaluate_checkpoint(**arguments("eval", options))


def test_evaluation_by_tiles(checkpoint, tmp_path):
    """Pictures of one tile: the metrics of whole pictures, to the bit; smaller tiles: other ones, of every picture."""
    plain = evaluated(checkpoint, tmp_path / "a", "model.box_head.score_threshold=0")
    same = evaluated(checkpoint, tmp_path / "b", "model.box_head.score_threshold=0", "tiles.size=96")
    assert same == plain
    assert (tmp_path / "a" / "predictions.json").read_text() == (tmp_path / "b" / "predictions.json").read_text()
    evaluated(checkpoint, tmp_path / "c", "model.box_head.score_threshold=0", "tiles.size=64")
    assert len(json.loads((tmp_path / "c" / "predictions.json").read_text())) > len(
        json.loads((tmp_path / "b" / "predictions.json").read_text())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tiles.size=8"], r"tiles\.size = 8: must be at least 32"),
        (["tiles.size=64", "tiles.overlap=1"], r"tiles\.overlap = 1: must be a share from 0 to 0\.9"),
        (["tiles.size=64", "flip=true"], r"tiles\.size: tiles are seen once each; flip=false scales=\[1\.0\]"),
    ],
)
def test_tiles_that_cannot_be(checkpoint, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluated(checkpoint, tmp_path / "a", *options)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_run_is_evaluated_by_tiles(config, shapes_tiny, tmp_path):
    """Crops in training, tiles in evaluation; predict and eval take the run's tiles unless others are given."""
    options = ["augment=crops", "augment.size=64", "evaluation.tiles.size=64", "runtime.pictures_every=1"]
    cfg = config(*options, "schedule.max_iterations=1", "schedule.warmup=0", "runtime.tensorboard=true")
    train(cfg)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert evaluated(tmp_path / "run" / "last.pt", tmp_path / "a")["bbox"] == metrics["bbox"]
    model = detector.load(tmp_path / "run" / "last.pt", changes={"box_head": {"score_threshold": 0.0}})
    image = read_image(sorted((shapes_tiny / "val").iterdir())[0])
    by_run, by_hand, whole = (model.predict(image, 0, tiles=tiles) for tiles in (None, {"size": 64}, {"size": 0}))
    assert torch.equal(by_run.boxes, by_hand.boxes) and len(by_run.boxes) != len(whole.boxes)
