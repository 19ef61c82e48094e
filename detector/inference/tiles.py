"""Large pictures: the network sees them tile by tile, and what it finds is put together again.

Tiles of `size` pixels lie evenly over the picture, neighbours share at least `overlap` of a side. With `whole` the
network sees the picture once more, made as small as a tile; of that look only what is longer than the overlap is taken,
for anything else is whole in some tile. A detection is cut if its box ends at a side of its tile that is no side of the
picture. Where another tile shows the place of a detection clearly farther from its sides, that tile alone decides what
is there: it sees more of the surroundings. Of the others, along the lines between tiles and of the whole picture, what
different looks find of one class is one object

    if neither is cut: where their IoU exceeds the model's own NMS threshold. The better one stays, a tile's before the
        whole picture's, whose boxes are coarse;
    if one is cut: where, in the part of the picture that both looks see, their IoU exceeds it, or where most of the cut
        one lies inside the other. The one that is not cut stays, with the better score;
    if both are cut, likewise: they become one, with the box around them and both masks, for as many tiles as it takes.

Dimensions: H x W pixels of the picture, D detections, V looks, P keypoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import nn

from detector.data import CocoDataset, Pipeline
from detector.data.pictures import Parts
from detector.evaluation.results import Writers, coco_keypoints, writers_of, written
from detector.inference.predict import detect, passing
from detector.ops.paste import encode_window, paste_window
from detector.settings import Tiles
from detector.structures import Detections, each

SLACK = 1 / 10  # of a tile's side, by which another tile must see more around a detection to decide alone
COVERED = 0.7  # share of a cut box inside another, from which it is a part of that


@dataclass
class Found:
    """Detections in a picture, best first. Masks are windows [h, w] bool with their top and left: whole masks of a
    large picture would fill the memory."""

    height: int
    width: int
    boxes: np.ndarray  # [D, 4] float32, pixels of the picture
    scores: np.ndarray  # [D] float32
    labels: np.ndarray  # [D] int64
    windows: list[tuple[np.ndarray, int, int]] | None = None
    keypoints: np.ndarray | None = None  # [D, P, 3]
    full: bool = False  # some look gave as many detections as the model gives at most
    extra: dict[str, np.ndarray] | None = None  # [D, ...] of the fields of extra heads, and how they are written:
    writers: Writers = field(default_factory=dict)

    def mask(self, index: int) -> np.ndarray:
        """[H, W] bool."""
        out = np.zeros((self.height, self.width), bool)
        window, top, left = self.windows[index]
        out[top : top + window.shape[0], left : left + window.shape[1]] = window
        return out

    def detections(self) -> Detections:
        """With masks [D, H, W], as `predict` gives them."""
        masks = None if self.windows is None else np.zeros((len(self.boxes), self.height, self.width), bool)
        for index in range(len(self.boxes) if masks is not None else 0):
            masks[index] = self.mask(index)
        arrays = self.boxes, self.scores, self.labels, np.ones(len(self.boxes), bool), masks, self.keypoints, self.extra
        return each(torch.from_numpy, Detections(*arrays))

    def results(self, image_id: int, category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
        """COCO results; labels without a category are left out."""
        entries = []
        for index, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            category = category_ids[int(self.labels[index]) - 1]
            if category is None:
                continue
            entry = {"image_id": image_id, "category_id": int(category)}
            entry |= {"bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)], "score": float(self.scores[index])}
            if self.windows is not None:
                entry["segmentation"] = encode_window(*self.windows[index], self.height, self.width)
            if self.keypoints is not None:
                entry["keypoints"] = coco_keypoints(self.keypoints[index])
            entries.append(entry | written(self.extra, index, self.writers))
        return entries

    def shrunk(self, height: int, width: int) -> Found:
        """The same in a picture of another size, for drawing."""
        scale = np.array([width / self.width, height / self.height], np.float32)
        keypoints = self.keypoints
        if keypoints is not None:
            keypoints = np.concatenate([keypoints[..., :2] * scale, keypoints[..., 2:]], axis=2)
        windows = self.windows and [_resized(window, scale, height, width) for window in self.windows]
        return Found(height, width, self.boxes * np.tile(scale, 2), self.scores, self.labels, windows, keypoints)


class Masks(Sequence):
    """The masks [H, W] bool of `found`, made one at a time."""

    def __init__(self, found: Found):
        self.found = found

    def __len__(self) -> int:
        return len(self.found.boxes)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.found.mask(index)


def _resized(window: tuple[np.ndarray, int, int], scale: np.ndarray, height: int, width: int):
    mask, top, left = window
    first, last = np.array([top, left]), np.array([top, left]) + mask.shape
    first, last = (np.round(corner * scale[::-1]).astype(int).clip(0, (height, width)) for corner in (first, last))
    rows, columns = (np.linspace(0, side, n, endpoint=False).astype(int) for side, n in zip(mask.shape, last - first))
    return mask[np.ix_(rows, columns)], int(first[0]), int(first[1])


def tiles_of(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Tiles:
    """The tiles of a run's config (evaluation.tiles), with those of the `changes` that are not None."""
    stored = (config.get("evaluation") or {}).get("tiles") or {}
    return Tiles(**(dict(stored) | {key: value for key, value in changes.items() if value is not None}))


def starts(side: int, size: int, overlap: float) -> list[int]:
    """Where tiles of `size` begin on a side of the picture, evenly, the last one at its end."""
    if side <= size:
        return [0]
    shared = round(overlap * size)
    count = ceil((side - shared) / (size - shared))
    return np.linspace(0, side - size, count).round().astype(int).tolist()


def looks(height: int, width: int, tiles: Tiles) -> list[tuple[int, int, int, int]]:
    """The tiles (x1, y1, x2, y2) of a picture, row by row."""
    size = tiles.size
    return [
        (x, y, min(x + size, width), min(y + size, height))
        for y in starts(height, size, tiles.overlap)
        for x in starts(width, size, tiles.overlap)
    ]


@torch.inference_mode()
def find(
    model: nn.Module,
    picture: Parts,
    tiles: Tiles,
    preprocess: Pipeline,
    *,
    threshold: float | np.ndarray = 0.0,
    paste: str = "aligned",
    precision: str = "fp32",
    batch_size: int = 1,
) -> Found:
    """What a model in evaluation mode finds in a picture by tiles, `batch_size` of them in a pass of the network.

    preprocess: the validation transforms, through which every tile goes as a picture of its own would.
    """
    height, width = picture.height, picture.width
    views = looks(height, width, tiles)
    scales = [(1.0, 1.0)] * len(views)
    arrays: Iterator[np.ndarray] = (picture.region(slice(y1, y2), slice(x1, x2)) for x1, y1, x2, y2 in views)
    least, shared = [0.0] * len(views), round(tiles.overlap * tiles.size)
    if tiles.whole and len(views) > 1:
        arrays, views = _and_whole(arrays, picture, tiles.size), [*views, (0, 0, width, height)]
        small = picture.reduced_size(tiles.size)
        scales.append((width / small[1], height / small[0]))
        least.append(float(shared))
    head = model.box_head and model.box_head.stages[-1]
    kept: list[tuple] = []  # (look, boxes, scores, labels, windows, keypoints, extra)
    full = False
    for start in range(0, len(views), batch_size):
        batch = [array for _, array in zip(range(min(batch_size, len(views) - start)), arrays)]
        for offset, found in enumerate(detect(model, batch, preprocess, precision)):
            full |= head is not None and len(found.boxes) >= head.detections_per_image
            kept.append(_placed(start + offset, found, views, scales, least, threshold, height, width, paste))
    count = [len(part[1]) for part in kept]
    boxes, scores, labels = (np.concatenate([part[i] for part in kept]) for i in (1, 2, 3))
    windows = None if kept[0][4] is None else [window for part in kept for window in part[4]]
    keypoints = None if kept[0][5] is None else np.concatenate([part[5] for part in kept])
    extra = kept[0][6] and {name: np.concatenate([part[6][name] for part in kept]) for name in kept[0][6]}
    look = np.repeat(np.arange(len(views)), count)
    everything = Found(height, width, boxes, scores, labels, windows, keypoints, full, extra, writers_of(model))
    if len(views) == 1:
        return everything
    nms_threshold = head.nms_threshold if head is not None else model.rpn.nms_threshold
    return merge(everything, np.array(views, np.float32), look, nms_threshold, tiles.size)


def _and_whole(arrays: Iterator[np.ndarray], picture: Parts, size: int) -> Iterator[np.ndarray]:
    yield from arrays
    yield picture.reduced(size)


def _placed(look, found, views, scales, least, threshold, height, width, paste) -> tuple:
    """What one look found, in pixels of the picture."""
    (x1, y1, *_), scale = views[look], np.array(scales[look], np.float32)
    boxes = found.boxes.numpy() * np.tile(scale, 2) + np.array([x1, y1, x1, y1], np.float32)
    scores, sides = found.scores.numpy(), boxes[:, 2:] - boxes[:, :2]
    reached = passing(scores, found.labels.numpy(), threshold)
    keep = np.flatnonzero(reached & (sides.max(1, initial=0) >= least[look]))
    windows = keypoints = None
    if found.masks is not None:
        masks = found.masks.float().numpy()
        windows = [paste_window(masks[i], boxes[i], height, width, paste=paste) for i in keep]
    if found.keypoints is not None:
        keypoints = found.keypoints.numpy()[keep].copy()
        keypoints[..., :2] = keypoints[..., :2] * scale + np.array([x1, y1], np.float32)
    extra = found.extra and {name: values.numpy()[keep] for name, values in found.extra.items()}
    return look, boxes[keep], scores[keep], found.labels.numpy()[keep], windows, keypoints, extra


def merge(found: Found, views: np.ndarray, look: np.ndarray, nms_threshold: float, size: int) -> Found:
    """One detection for each object, of those of all looks; see above.

    views: [V, 4], the part of the picture that each look saw. look: [D], which one each detection is of.
    """
    boxes, labels, scores = found.boxes, found.labels, found.scores.copy()
    frame, own = np.array([0, 0, found.width, found.height], np.float32), views[look]
    margin = max(3, size // 100)
    at_border = np.abs(boxes - own) <= margin
    cut = (at_border & (own != frame)).any(axis=1)
    is_whole = (own == frame).all(axis=1)
    meet = (
        np.minimum(views[:, None, 2:], views[None, :, 2:]) > np.maximum(views[:, None, :2], views[None, :, :2])
    ).all(2)
    np.fill_diagonal(meet, False)
    near = [np.flatnonzero(meet[view][look]) for view in range(len(views))]
    best_seen = ~_seen_better(boxes, views, look, frame, meet, size)
    cut &= best_seen
    alive = best_seen.copy()

    def same(one: int, which: np.ndarray) -> np.ndarray:
        """Those of the others, indices in a list, that are the same object as `one`."""
        others = near[look[one]]
        others = others[which[others] & alive[others] & (labels[others] == labels[one])]
        if not len(others):
            return others
        a, b = boxes[one][None], boxes[others]
        either = cut[others] | cut[one]
        common = np.concatenate(
            [np.maximum(own[one, :2], own[others, :2]), np.minimum(own[one, 2:], own[others, 2:])], 1
        )
        common = np.where(either[:, None], common, frame)
        iou = _iou(_clip(a, common), _clip(b, common))
        shared = _intersection(a, b)
        inside = (cut[others] & (shared > COVERED * _area(b))) | (cut[one] & (shared > COVERED * _area(a)))
        return others[(iou > nms_threshold) | inside]

    kept = []
    for one in np.lexsort((-scores, is_whole)):
        if cut[one] or not alive[one]:
            continue
        alive[one] = False
        kept.append(int(one))
        again = same(one, ~cut)
        alive[again] = False
        scores[one] = max(scores[one], scores[again].max(initial=0))
    alive = cut.copy()
    stays = np.zeros(len(boxes), bool)
    stays[kept] = True
    alive |= stays
    order = np.argsort(-found.scores, kind="stable")
    for one in order[cut[order]]:
        whole = same(one, stays)
        if len(whole):
            scores[whole[0]] = max(scores[whole[0]], scores[one])
            alive[one] = False
    groups = [[one] for one in kept]
    for one in order[cut[order]]:
        if not alive[one]:
            continue
        group, waiting = [], [int(one)]
        alive[one] = False
        while waiting:
            group.append(waiting.pop())
            more = same(group[-1], cut)
            alive[more] = False
            waiting += more.tolist()
        groups.append(group)
    groups.sort(key=lambda group: -scores[group].max())
    return _united(found, groups, scores)


def _seen_better(
    boxes: np.ndarray, views: np.ndarray, look: np.ndarray, frame: np.ndarray, meet: np.ndarray, size: int
) -> np.ndarray:
    """[D] bool: some other tile shows this place clearly farther from its sides than the detection's own does.

    meet: [V, V] bool, which looks have a part of the picture in common.
    """
    is_tile = (views != frame).any(axis=1)
    inner = views != frame  # sides that are no sides of the picture

    def clearance(at: np.ndarray, view: np.ndarray | slice) -> np.ndarray:
        """From the boxes [R, 1, 4] to the nearest inner side of the looks: [R, V']. Negative outside."""
        gaps = np.concatenate([at[..., :2] - views[view, :2], views[view, 2:] - at[..., 2:]], axis=-1)
        return np.where(inner[view], np.minimum(gaps, size), size).min(axis=-1)

    better = np.zeros(len(boxes), bool)
    for view in np.flatnonzero(is_tile):
        rows, others = np.flatnonzero(look == view), np.flatnonzero(meet[view] & is_tile)
        if len(rows) and len(others):
            at = boxes[rows][:, None]
            better[rows] = clearance(at, others).max(1) - clearance(at, [view])[:, 0] > SLACK * size
    return better


def _united(found: Found, groups: list[list[int]], scores: np.ndarray) -> Found:
    """One detection for each group: the first one's label, keypoints and extra fields, the box around all, all masks in
    one."""
    first = [group[0] for group in groups]
    boxes = np.array([[*found.boxes[g, :2].min(0), *found.boxes[g, 2:].max(0)] for g in groups], np.float32)
    return Found(
        found.height,
        found.width,
        boxes.reshape(-1, 4),
        np.array([scores[group].max() for group in groups], np.float32),
        found.labels[first],
        None if found.windows is None else [_joined([found.windows[i] for i in group]) for group in groups],
        None if found.keypoints is None else found.keypoints[first],
        found.full,
        found.extra and {name: values[first] for name, values in found.extra.items()},
        found.writers,
    )


def _joined(windows: list[tuple[np.ndarray, int, int]]) -> tuple[np.ndarray, int, int]:
    """The smallest window that has all pixels of several."""
    windows = [window for window in windows if window[0].size] or windows[:1]
    if len(windows) == 1:
        return windows[0]
    top, left = (min(window[i] for window in windows) for i in (1, 2))
    bottom, right = (max(window[i] + window[0].shape[i - 1] for window in windows) for i in (1, 2))
    out = np.zeros((bottom - top, right - left), bool)
    for mask, y, x in windows:
        out[y - top : y - top + mask.shape[0], x - left : x - left + mask.shape[1]] |= mask
    return out, top, left


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)


def _intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0).prod(1)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    shared = _intersection(a, b)
    return shared / np.maximum(_area(a) + _area(b) - shared, 1e-9)


def _clip(boxes: np.ndarray, to: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(boxes[:, :2], to[:, :2]), np.minimum(boxes[:, 2:], to[:, 2:])], axis=1)


def results_by_image(
    model: nn.Module,
    category_ids: Sequence[int | None],
    dataset: CocoDataset,
    tiles: Tiles,
    *,
    paste: str = "aligned",
    precision: str = "fp32",
    batch_size: int = 1,
    rank: int = 0,
    world: int = 1,
    stop: Any = None,
) -> tuple[dict[int, list[dict]], set[str]]:
    """COCO results by image id of every `world`-th image of a data set, and the IoU types that the model predicts: what
    `evaluation.evaluator.predict` gives of whole pictures."""
    results = {}
    indices = range(rank, len(dataset), world)
    for index in indices if stop is None else stop.watch(indices):
        with dataset.parts(index) as picture:
            options = {"paste": paste, "precision": precision, "batch_size": batch_size}
            found = find(model, picture, tiles, dataset.pipeline, **options)
        image_id = int(dataset.image_ids[index])
        results[image_id] = found.results(image_id, category_ids)
    heads = {"segm": getattr(model, "mask_head", None), "keypoints": getattr(model, "keypoint_head", None)}
    extra = {"attributes"} & {name for head in model.extra_heads.values() for name in getattr(head, "writers", ())}
    return results, {"bbox"} | {kind for kind, head in heads.items() if head is not None} | extra
