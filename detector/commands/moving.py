"""Generate moving shapes: videos in which objects cross and hide one another while the camera moves, with their ids.

    detector shapes --video --out data/moving

The shapes are those of make_shapes.py. Several of a video are of one category, in colours of their own. Annotated is a
visible part of an object, where enough of it is visible; its track has a gap where another one hides it. Written are
OUT/{train,val}/VIDEO/*.jpg and COCO-VID in OUT/annotations/instances_{train,val}.json.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as rle_tools

from detector.commands import make_shapes as shapes
from detector.ops.text import readable_streams

LEAST_VISIBLE = 0.25  # share of an object, from which on it is annotated
FEWEST, MOST = 5, 9  # objects of a video
KINDS = 3  # categories of a video
SMALL, LARGE = 0.14, 0.3  # longer side of an object, as a share of the image's
SLOW, FAST = 0.003, 0.014  # of the image's side in a frame
RATE = 25  # frames a second, in which the speeds look natural


@dataclass
class Sprite:
    """An object: pixels [S, S, 3] and coverage [S, S], which do not change, and its way."""

    category: int
    pixels: np.ndarray
    alpha: np.ndarray
    start: np.ndarray  # centre, px
    speed: np.ndarray  # px a frame
    swing: np.ndarray  # px, of a sine along both axes
    pace: float  # radians a frame
    phase: float

    def centre(self, frame: int, size: int) -> np.ndarray:
        """Where it is: it turns back a little outside the image."""
        free = self.start + self.speed * frame + self.swing * math.sin(self.pace * frame + self.phase)
        low, span = -0.1 * size, 1.2 * size
        along = np.mod(free - low, 2 * span)
        return low + np.where(along > span, 2 * span - along, along)


def shifted(image: np.ndarray, x: float, y: float, size: int) -> np.ndarray:
    """[size, size, ...] with an image whose corner lies at (x, y), 0 elsewhere."""
    return cv2.warpAffine(image, np.float32([[1, 0, x], [0, 1, y]]), (size, size), flags=cv2.INTER_LINEAR)


def sprites(size: int, rng: np.random.Generator) -> list[Sprite]:
    """The objects of a video, those behind first."""
    kinds = rng.choice(list(shapes.CATEGORIES), KINDS, replace=False)
    found = []
    for _ in range(int(rng.integers(FEWEST, MOST + 1))):
        category, side = int(rng.choice(kinds)), size * rng.uniform(SMALL, LARGE)
        whole = math.ceil(side) + 4
        rings = shapes.fitted(shapes.outline(shapes.CATEGORIES[category], rng), side, np.full(2, whole / 2))
        turn, fast = rng.uniform(0, 2 * np.pi), size * rng.uniform(SLOW, FAST)
        found.append(
            Sprite(
                category,
                shapes.texture(whole, rng.uniform(0, 1, 3), rng),
                shapes.coverage(rings, np.zeros(2, int), whole),
                rng.uniform(0, size, 2),
                fast * np.array([math.cos(turn), math.sin(turn)]),
                size * rng.uniform(0, 0.06, 2),
                rng.uniform(0.02, 0.12),
                rng.uniform(0, 2 * np.pi),
            )
        )
    return found


def film(size: int, frames: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, list[tuple]]]:
    """Yields each frame [size, size, 3] uint8 and its objects: (index, category, visible [size, size] bool, share)."""
    reach = size // 5
    ground = shapes.texture(size + 2 * reach, rng.uniform(0.15, 0.85, 3), rng)
    objects = sprites(size, rng)
    pan, pace, phase = rng.uniform(0.2, 1, 2) * reach, rng.uniform(0.01, 0.05, 2), rng.uniform(0, 2 * np.pi, 2)
    for frame in range(frames):
        camera = pan * np.sin(pace * frame + phase) + rng.normal(0, 0.004 * size, 2)  # it pans, and shakes a little
        image = shifted(ground, *(-reach - camera), size)
        seen, whole = [], []
        for one in objects:
            corner = one.centre(frame, size) - camera - len(one.alpha) / 2
            alpha = shifted(one.alpha, *corner, size)[..., None]
            image = image * (1 - alpha) + shifted(one.pixels, *corner, size) * alpha
            mask = alpha[..., 0] >= 0.5
            for other in seen:
                other &= ~mask
            seen.append(mask)
            whole.append((one.alpha >= 0.5).sum())
        shares = [mask.sum() / max(area, 1) for mask, area in zip(seen, whole)]
        kept = [(i, objects[i].category, seen[i], shares[i]) for i in range(len(seen)) if shares[i] >= LEAST_VISIBLE]
        yield shapes.to_uint8(image), kept


def write_video(index: int, split: int, folder: Path, size: int, frames: int, seed: int) -> list[list[dict]]:
    """The records of each frame."""
    rng = np.random.default_rng((seed, 7, split, index))
    target = folder / f"{index:04d}"
    target.mkdir(exist_ok=True)
    records = []
    for number, (image, objects) in enumerate(film(size, frames, rng)):
        cv2.imwrite(str(target / f"{number:06d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
        records.append([])
        for track, category, mask, share in objects:
            rle = rle_tools.encode(np.asfortranarray(mask, np.uint8))
            record = {"category_id": category, "track_id": track + 1, "bbox": rle_tools.toBbox(rle).tolist()}
            record |= {"area": int(mask.sum()), "iscrowd": 0, "visibility": round(min(1.0, float(share)), 3)}
            record["segmentation"] = {"size": [size, size], "counts": rle["counts"].decode()}
            records[-1].append(record)
    return records


def coco_vid(found: list[list[list[dict]]], size: int, about: str, categories: list[dict]) -> dict:
    """COCO-VID of the records of videos, frames and objects."""
    videos, images, annotations = [], [], []
    for video, frames in enumerate(found):
        videos.append({"id": video + 1, "name": f"{video:04d}", "rate": RATE})
        for frame, records in enumerate(frames):
            image = {"id": len(images) + 1, "file_name": f"{video:04d}/{frame:06d}.jpg", "width": size, "height": size}
            images.append(image | {"video_id": video + 1, "frame_id": frame})
            for record in records:
                annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **record})
    known = {"info": {"description": about}, "videos": videos, "images": images}
    return {**known, "annotations": annotations, "categories": categories}


def make_videos(
    out: Path,
    train: int = 12,
    val: int = 12,
    frames: int = 100,
    size: int = 160,
    seed: int = 0,
    processes: int | None = None,
) -> None:
    """Write them: so many videos of so many frames. Raises ValueError for none, and for small pictures."""
    if min(train, val) < 1 or frames < 2:
        raise ValueError(f"train={train}, val={val}, frames={frames}: each split needs a video, and that two frames")
    if size < 64:
        raise ValueError(f"size={size}: at least 64 pixels, the smallest objects cannot be told apart below")
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    kinds = [{"id": i, "name": name, "supercategory": "shape"} for i, name in shapes.CATEGORIES.items()]
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count(), shapes.single_threaded) as pool:
        for split, (name, count) in enumerate({"train": train, "val": val}.items()):
            folder = out / name
            folder.mkdir(exist_ok=True)
            work = partial(write_video, split=split, folder=folder, size=size, frames=frames, seed=seed)
            about = f"moving shapes: train={train} val={val} size={size} frames={frames} seed={seed}"
            content = coco_vid(pool.map(work, range(count)), size, about, kinds)
            (out / "annotations" / f"instances_{name}.json").write_text(json.dumps(content), encoding="utf-8")
            print(f"{name}: {count} videos of {frames} frames, {len(content['annotations'])} objects in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", action="store_true", help="this")
    parser.add_argument("--out", type=Path, default=Path("data/moving"), help="folder to write to")
    parser.add_argument("--train", type=int, default=12, help="number of training videos")
    parser.add_argument("--val", type=int, default=12, help="number of validation videos")
    parser.add_argument("--frames", type=int, default=100, help="of each video")
    parser.add_argument("--size", type=int, default=160, help="side of the square images in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, help="default: one per core")
    options = vars(parser.parse_args())
    options.pop("video")
    readable_streams()
    make_videos(**options)
