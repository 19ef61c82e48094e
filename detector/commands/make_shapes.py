"""Generate the shapes data set: COCO annotations whose categories can only be told apart by shape.

    detector shapes --out data/shapes
    detector shapes --kind figures --out data/figures      jointed figures with keypoints, told apart by posture
    detector shapes --video --out data/moving    videos, in which shapes cross and hide one another; --help says more

Colour, texture, size and orientation of an object are drawn from the same distributions for every category. Objects
hide one another and are cut by the image's border; what is annotated is the visible part. The same options give the
same files, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from detector.commands import figures
from detector.data.outlines import Outlines, ring_area, trace_rings
from detector.ops.text import readable_streams

# COCO's own category ids have gaps, so these have too.
CATEGORIES = {1: "ellipse", 2: "triangle", 4: "rectangle", 5: "star", 8: "ring"}
NAMES = {"shapes": CATEGORIES, "figures": figures.CATEGORIES}
SMALLEST, LARGEST = 0.065, 0.7  # longer side of an object, as a share of the image's side
MIN_VISIBLE = 0.6  # share of an object that neither the border nor later objects hide
MIN_CONTRAST = 0.3  # distance of an object's mean colour from the background's, RGB in 0..1
SHORTEST, TALLEST = 0.1, 0.85  # height of a figure, likewise
EMPTY_SHARE, CROWD_SHARE, RLE_SHARE = 0.03, 0.02, 0.1


def outline(name: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Rings [P, 2] of an irregular shape of the named category around the origin; a second ring is a hole."""
    if name in ("ellipse", "ring"):
        angle = np.arange(48) * (2 * np.pi / 48)
        wobble = 1 + rng.uniform(0, 0.06) * np.sin(rng.integers(2, 5) * angle + rng.uniform(0, 2 * np.pi))
        ring = np.stack([np.cos(angle), np.sin(angle) * rng.uniform(0.6, 1)], axis=1) * wobble[:, None]
        rings = [ring, ring * rng.uniform(0.45, 0.55)] if name == "ring" else [ring]
    elif name == "triangle":
        angle = np.arange(3) * (2 * np.pi / 3) + rng.uniform(-0.25, 0.25, 3)
        rings = [np.stack([np.cos(angle), np.sin(angle)], axis=1) * rng.uniform(0.85, 1.15, (3, 1))]
    elif name == "rectangle":
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [1, rng.uniform(0.55, 1)]
        rings = [corners + rng.uniform(-0.08, 0.08, (4, 2))]
    else:  # star
        angle = np.arange(10) * (np.pi / 5)
        radius = np.where(np.arange(10) % 2, rng.uniform(0.38, 0.48), 1) * rng.uniform(0.92, 1.08, 10)
        rings = [np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]]
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return [ring @ rotation for ring in rings]


def fitted(rings: list[np.ndarray], longer_side: float, centre: np.ndarray) -> list[np.ndarray]:
    """The rings scaled so that their box's longer side is as given and the box's centre is `centre`."""
    low, high = rings[0].min(0), rings[0].max(0)
    return [(ring - (low + high) / 2) * (longer_side / (high - low).max()) + centre for ring in rings]


def coverage(rings: list[np.ndarray], corner: np.ndarray, side: int, parts: bool = False) -> np.ndarray:
    """Share of each pixel [side, side] from `corner` on that lies inside the rings, for smooth edges: inside an odd
    number of them, or of `parts` inside any."""
    starts = np.cumsum([0, *map(len, rings)])
    owners = np.arange(len(rings)) if parts else np.zeros(len(rings), int)
    objects = owners[-1] + 1
    outlines = Outlines(np.concatenate(rings), starts, owners, np.ones(objects, bool))
    fine = fill(outlines, np.tile(np.concatenate([corner, corner + side]), (objects, 1)), 4 * side).any(0)
    return cv2.resize(fine * np.float32(1), (side, side), interpolation=cv2.INTER_AREA)


def fill(outlines: Outlines, windows: np.ndarray, side: int) -> np.ndarray:
    """Masks [G, S, S] uint8 0/1 of the outlines, each seen through its window [G, 4] cut into S x S cells: a cell is
    filled where its centre lies inside, to the last digit, where pycocotools' masks round to fifths of a pixel."""
    rings = outlines.point_rings()
    objects = outlines.ring_objects[rings]
    origin, extent = windows[:, :2], windows[:, 2:] - windows[:, :2]
    scale = side / extent
    start = (outlines.points - origin[objects]) * scale[objects]
    end = (outlines.next_points() - origin[objects]) * scale[objects]
    # rings that add up get a layer each, rings of one even-odd object share one
    new_layer = np.ones(len(outlines.ring_objects), bool)
    new_layer[1:] = np.diff(outlines.ring_objects).astype(bool) | ~outlines.even_odd[outlines.ring_objects[1:]]
    layers = np.cumsum(new_layer) - 1
    # every edge toggles, in each column whose centre it passes, the cells below it
    first = np.ceil(np.minimum(start[:, 0], end[:, 0]) - 0.5).clip(0, side).astype(np.int64)
    last = np.ceil(np.maximum(start[:, 0], end[:, 0]) - 0.5).clip(0, side).astype(np.int64)
    passes = last - first
    edge = np.repeat(np.arange(len(start)), passes)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(passes) - passes, passes) + first[edge]
    x0, y0, x1, y1 = start[edge, 0], start[edge, 1], end[edge, 0], end[edge, 1]
    y = y0 + (column + 0.5 - x0) * ((y1 - y0) / (x1 - x0))
    row = np.ceil(y - 0.5).clip(0, side).astype(np.int64)
    grid = np.zeros((int(new_layer.sum()), side + 1, side), np.uint8)
    np.add.at(grid.reshape(-1), (layers[rings[edge]] * (side + 1) + row) * side + column, 1)
    for below in range(1, side):  # only the parity counts
        grid[:, below] ^= grid[:, below - 1]
    masks = np.zeros((len(outlines.even_odd), side, side), np.uint8)
    for layer, owner in zip(grid, outlines.ring_objects[new_layer]):
        masks[owner] |= layer[:side]
    return masks & 1


def texture(side: int, colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A pattern [side, side, 3] around the colour: clouds, and often stripes or checks, of any scale and direction."""
    cells = 2 + int(side / rng.uniform(6, 60))
    clouds = cv2.resize(rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32), (side, side))
    pattern = clouds * rng.uniform(0.05, 0.2) + rng.normal(0, 0.02, (side, side, 3))
    y, x = np.mgrid[:side, :side]
    turn, period, kind = rng.uniform(0, np.pi), rng.uniform(8, 60), rng.choice(["plain", "stripes", "checks"])
    waves = np.sin(2 * np.pi / period * (x * math.cos(turn) + y * math.sin(turn)))
    if kind == "checks":
        waves *= np.sin(2 * np.pi / period * (y * math.cos(turn) - x * math.sin(turn)))
    if kind != "plain":
        pattern += waves[..., None] * rng.uniform(-0.15, 0.15, 3)
    return (colour + pattern).astype(np.float32)


@dataclass
class Object:
    category: int
    crowd: bool
    rings: list[np.ndarray]
    area: float  # with the hidden part
    colour: np.ndarray
    mask: np.ndarray  # [size, size] bool, inside the image
    visible: np.ndarray  # what later objects leave of it
    keypoints: np.ndarray | None = None  # [K, 2], of a figure, whose rings are parts that overlap


def draw(kind: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Object]]:
    """One image [size, size, 3] uint8 of shapes or figures, and its objects."""
    ground = rng.uniform(0.15, 0.85, 3)
    image = texture(size, ground, rng)
    objects: list[Object] = []
    if rng.random() >= EMPTY_SHARE:
        (add_figures if kind == "figures" else add_shapes)(image, objects, ground, rng)
    return to_uint8(image), objects


def add_shapes(image: np.ndarray, objects: list[Object], ground: np.ndarray, rng: np.random.Generator) -> None:
    size = len(image)
    sides = size * np.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST), 1 + rng.poisson(5)))
    for side in sorted(sides, reverse=True):  # small ones in front
        category = int(rng.choice(list(CATEGORIES)))
        shape = outline(CATEGORIES[category], rng)
        for _ in range(10):
            if paint(image, fitted(shape, side, rng.uniform(0, size, 2)), category, False, objects, ground, rng):
                break
    if rng.random() < CROWD_SHARE:
        category, centre = int(rng.choice(list(CATEGORIES))), rng.uniform(0.25, 0.75, 2) * size
        places = rng.permutation([(i, j) for i in (-1.5, -0.5, 0.5, 1.5) for j in (-1, 0, 1)])[:9]
        members = [fitted(outline(CATEGORIES[category], rng), 0.05 * size, centre + 0.055 * size * p) for p in places]
        paint(image, [ring for member in members for ring in member], category, True, objects, ground, rng)


def add_figures(image: np.ndarray, objects: list[Object], ground: np.ndarray, rng: np.random.Generator) -> None:
    size = len(image)
    heights = size * np.exp(rng.uniform(math.log(SHORTEST), math.log(TALLEST), 1 + rng.poisson(4)))
    for height in sorted(heights, reverse=True):
        category = int(rng.choice(list(figures.CATEGORIES)))
        parts, points = figures.figure(figures.CATEGORIES[category], rng)
        for _ in range(10):
            centre = rng.uniform(0, size, 2)
            placed = [part * height + centre for part in parts]
            if paint(image, placed, category, False, objects, ground, rng, points * height + centre):
                break


def paint(
    image: np.ndarray,
    rings: list[np.ndarray],
    category: int,
    crowd: bool,
    objects: list[Object],
    ground: np.ndarray,
    rng: np.random.Generator,
    keypoints: np.ndarray | None = None,
) -> bool:
    """Put an object in front of the others, unless it or one of them would be hidden too much."""
    points = np.concatenate(rings)
    first, last = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int)
    low, high = first.clip(0), last.clip(max=len(image))
    if (low >= high).any():
        return False
    region, side = np.s_[low[1] : high[1], low[0] : high[0]], int((high - low).max())
    cut = np.s_[: high[1] - low[1], : high[0] - low[0]]
    if keypoints is None:
        alpha = coverage(rings, low, side)[cut]
        area = sum(abs(ring_area(ring)) * (1 if i == 0 or crowd else -1) for i, ring in enumerate(rings))
    else:
        whole = coverage(rings, first, int((last - first).max()), parts=True)
        alpha = whole[low[1] - first[1] : high[1] - first[1], low[0] - first[0] : high[0] - first[0]]
        area = float(whole.sum())
    mask = np.zeros(image.shape[:2], bool)
    mask[region] = alpha >= 0.5
    if mask.sum() < (0.3 if crowd else MIN_VISIBLE) * area:
        return False
    if any((seen.visible & ~mask).sum() < MIN_VISIBLE * seen.area for seen in objects):
        return False
    others = np.array([ground, *(seen.colour for seen in objects if (seen.visible & mask).any())])
    colour = rng.uniform(0, 1, 3)
    while np.linalg.norm(colour - others, axis=1).min() < MIN_CONTRAST:
        colour = rng.uniform(0, 1, 3)
    image[region] += alpha[..., None] * (texture(side, colour, rng)[cut] - image[region])
    for seen in objects:
        seen.visible &= ~mask
    objects.append(Object(category, crowd, rings, area, colour, mask, mask.copy(), keypoints))
    return True


def to_uint8(image: np.ndarray) -> np.ndarray:
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def annotation(item: Object, size: int, rng: np.random.Generator) -> dict:
    """COCO's record of an object: polygons where they can tell the visible part, run lengths otherwise."""
    visible, rings = item.visible, item.rings
    points = np.concatenate(rings)
    has_hole = len(rings) > 1
    if item.keypoints is not None or (visible != item.mask).any() or points.min() < 0 or points.max() > size:
        rings = trace_rings(visible)
        has_hole = min(map(ring_area, rings)) < 0
    rle = coco_mask.encode(np.asfortranarray(visible, np.uint8))
    if item.crowd:  # as COCO has it: not compressed
        runs = np.flatnonzero(np.diff(visible.ravel("F"), prepend=False, append=not visible[-1, -1]))
        segmentation = {"size": [size, size], "counts": np.diff(runs, prepend=0).tolist()}
    elif has_hole or rng.random() < RLE_SHARE:
        segmentation = {"size": [size, size], "counts": rle["counts"].decode()}
    else:
        segmentation = [ring.astype(float).round(2).ravel().tolist() for ring in rings]
    record = {
        "category_id": item.category,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(visible.sum()),
        "iscrowd": int(item.crowd),
        "segmentation": segmentation,
    }
    if item.keypoints is not None:
        places = labelled(item.keypoints, visible)
        record |= {"keypoints": places.ravel().tolist(), "num_keypoints": int((places[:, 2] > 0).sum())}
        record["visible_share"] = round(min(1, visible.sum() / item.area), 3)
    return record


def labelled(keypoints: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """[K, 3] as COCO has them: x, y and 2 where the object is visible there, 1 where it is hidden, 0, 0, 0 outside."""
    column, row = np.floor(keypoints).astype(int).T
    inside = (row >= 0) & (row < visible.shape[0]) & (column >= 0) & (column < visible.shape[1])
    near = cv2.dilate(visible.astype(np.uint8), np.ones((3, 3), np.uint8))  # a thin part may miss its own pixel
    seen = near[row.clip(0, visible.shape[0] - 1), column.clip(0, visible.shape[1] - 1)]
    return np.column_stack([keypoints.round(2), 1 + seen]) * inside[:, None]


def write_image(index: int, split: int, folder: Path, size: int, seed: int, kind: str) -> list[dict]:
    rng = np.random.default_rng((seed, split, index))
    image, objects = draw(kind, size, rng)
    cv2.imwrite(str(folder / f"{index:06d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return [annotation(item, size, rng) for item in objects]


def single_threaded() -> None:
    cv2.setNumThreads(0)


def make_shapes(
    out: Path,
    train: int = 1200,
    val: int = 250,
    size: int = 176,
    seed: int = 0,
    processes: int | None = None,
    kind: str = "shapes",
) -> None:
    """Write out/{train,val}/*.jpg and out/annotations/instances_{train,val}.json. kind: one of NAMES."""
    if kind not in NAMES:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(NAMES)}")
    if min(train, val) < 1:
        raise ValueError(f"train={train}, val={val}: each split needs at least one image")
    if size < 64:
        raise ValueError(f"size={size}: at least 64 pixels, the smallest objects cannot be told apart below")
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count(), single_threaded) as pool:
        for split, (name, count) in enumerate({"train": train, "val": val}.items()):
            folder = out / name
            folder.mkdir(exist_ok=True)
            work = partial(write_image, split=split, folder=folder, size=size, seed=seed, kind=kind)
            found = pool.map(work, range(count), chunksize=16)
            images = [{"id": i + 1, "file_name": f"{i:06d}.jpg", "width": size, "height": size} for i in range(count)]
            records = [dict(record, image_id=i + 1) for i, records in enumerate(found) for record in records]
            coco = {
                "info": {"description": f"{kind}: train={train} val={val} size={size} seed={seed}"},
                "images": images,
                "annotations": [dict(record, id=i + 1) for i, record in enumerate(records)],
                "categories": categories(kind),
            }
            (out / "annotations" / f"instances_{name}.json").write_text(json.dumps(coco), encoding="utf-8")
            print(f"{name}: {count} images, {len(records)} objects in {folder}")


def categories(kind: str) -> list[dict]:
    """COCO's records of them."""
    records = [{"id": i, "name": name, "supercategory": kind.rstrip("s")} for i, name in NAMES[kind].items()]
    if kind == "figures":
        names = figures.KEYPOINTS
        bones = [[names.index(end) + 1 for end in bone] for bone in figures.BONES]
        records = [{**record, "keypoints": names, "skeleton": bones} for record in records]
    return records


def main() -> None:
    from detector.commands.moving import main as videos

    try:
        videos() if "--video" in sys.argv[1:] else pictures()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def pictures() -> None:
    """The command without --video."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(NAMES), default="shapes", help="what to draw")
    parser.add_argument("--out", type=Path, help="folder to write to (default: data/KIND)")
    parser.add_argument("--train", type=int, default=1500, help="number of training images")
    parser.add_argument("--val", type=int, default=250, help="number of validation images")
    parser.add_argument("--size", type=int, default=160, help="side of the square images in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, help="default: one per core")
    options = vars(parser.parse_args())
    options["out"] = options["out"] or Path("data") / options["kind"]
    readable_streams()
    make_shapes(**options)
