"""Videos of shapes that move: what their annotations promise."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle_tools

from detector.commands import make_shapes
from detector.commands.moving import LEAST_VISIBLE, film, make_videos
from detector.data import read_coco
from detector.evaluation.tracks import coco_vid


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    out = tmp_path_factory.mktemp("moving")
    make_videos(out, train=1, val=2, frames=12, size=64, processes=1)
    return out


def test_a_file_is_coco_and_coco_vid(moving):
    file = moving / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    assert len(read_coco(file).image_ids) == 24 and [film.name for film in coco_vid(file)] == ["0000", "0001"]
    for image in content["images"]:
        assert (moving / "val" / image["file_name"]).is_file()
    for one in content["annotations"]:
        mask = rle_tools.decode(one["segmentation"])
        assert one["area"] == mask.sum() and one["bbox"] == rle_tools.toBbox(one["segmentation"]).tolist()
        assert one["visibility"] >= LEAST_VISIBLE - 1e-3
    ids = {
        (one["track_id"], one["category_id"], content["images"][one["image_id"] - 1]["video_id"])
        for one in content["annotations"]
    }
    assert len(ids) == len({(track, video) for track, _, video in ids})  # an object keeps its category


def test_objects_move_hide_each_other_and_the_camera_moves():
    rng = np.random.default_rng(4)
    frames = list(film(96, 60, rng))
    places = {}
    for _, objects in frames:
        masks = [mask for _, _, mask, _ in objects]
        assert not masks or (np.sum(masks, axis=0) <= 1).all()  # a pixel is of one object
        for track, _, mask, _ in objects:
            places.setdefault(track, []).append(np.argwhere(mask).mean(0))
    ways = [np.linalg.norm(way[-1] - way[0]) for way in places.values() if len(way) > 20]
    assert ways and max(ways) > 10
    assert any(share < 0.9 for _, objects in frames for *_, share in objects)
    corners = np.stack([image[:8, :8].astype(float) for image, _ in frames])
    assert corners.std(0).mean() > 1


def test_the_same_seed_gives_the_same_videos(moving, tmp_path):
    make_videos(tmp_path, train=1, val=1, frames=12, size=64, processes=1)
    one, other = (folder / "val" / "0000" / "000011.jpg" for folder in (moving, tmp_path))
    assert np.array_equal(cv2.imread(str(one)), cv2.imread(str(other)))


def test_the_command(tmp_path, call):
    options = ["--video", "--out", str(tmp_path), "--train", "1", "--val", "1", "--frames", "2", "--size", "64"]
    code, out, _ = call(make_shapes.main, *options, "--processes", "1")
    assert code == 0 and "val: 1 videos of 2 frames" in out
    for wrong in ({"frames": 1}, {"val": 0}, {"size": 10}):
        with pytest.raises(ValueError):
            make_videos(tmp_path, **wrong)
