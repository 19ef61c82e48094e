"""Pictures of validation images with what is there and what was found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as rle_tools

from detector.data import Pictures, split_page
from detector.data.annotations import Truth
from detector.data.file_names import find_files
from detector.data.outlines import rle_counts
from detector.data.places import Folder
from detector.evaluation.operating_point import SCORES, Kept, choose, counts, kept_matches
from detector.inference.draw import draw
from detector.settings import COCO_LIMITS

LARGEST = 2000  # px of a side, as `predict` draws large pictures


def f1_by_image(truth: Truth, results: list[dict], kind: str, most: int = COCO_LIMITS[-1]) -> tuple[float, np.ndarray]:
    """The least score that gives the largest F1 at IoU 0.5 over all images, and the F1 [I] of each image with it, in
    the order of their ids; 1 where there is nothing and nothing is found. most: detections of a class in an image."""
    kept = kept_matches(truth, results, kind, most)
    at = int(choose(counts(kept, np.arange(len(kept.score)), kept.objects.sum(1))))
    limit = float(SCORES[at]) if at >= 0 else 1.0
    return limit, f1_at(kept, limit)[0]


def f1_at(kept: Kept, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """F1 [I] of each image with the detections of at least a score, and how many errors it has."""
    objects, shown = kept.objects.sum(1), kept.score >= limit
    found, wrong = (np.bincount(kept.image[shown & hits], minlength=len(objects)) for hits in (kept.true, kept.false))
    count = objects + found + wrong
    return np.where(count > 0, 2 * found / np.maximum(count, 1), 1.0), objects - found + wrong


def read_picture(
    truth: Truth, index: int, folders: Sequence[Folder], pictures: Pictures
) -> tuple[np.ndarray, tuple[int, int]]:
    """Image `index` of the truth as people see it, [h, w, 3] uint8, of at most LARGEST a side, and its own (H, W).
    Raises ValueError or OSError where it cannot be read."""
    folder = folders[truth.sources[index] if len(folders) > 1 else 0]
    file, page = split_page(truth.file_name(index))
    (path,), _, problems = find_files(folder, [file])
    if path is None:
        raise ValueError(f"image {truth.image_ids[index]}: {problems[0]} is not in {folder}")
    with pictures.parts(folder / path, page) as parts:
        return pictures.rgb(parts.reduced(min(LARGEST, max(parts.height, parts.width)))), (parts.height, parts.width)


def picture_of(
    image: np.ndarray, truth: Truth, entries: Sequence[dict], with_scores: bool, size: tuple[int, int]
) -> np.ndarray:
    """An image with checked COCO annotations or results, which are of an image of `size`, (height, width)."""
    entries = [entry for entry in entries if not entry.get("iscrowd")]
    boxes = [entry.get("bbox") or rle_tools.toBbox(entry["segmentation"]) for entry in entries]  # results may have none
    boxes = np.array(boxes, float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes *= np.tile(np.divide(image.shape[:2], size)[::-1], 2)
    masks = None
    if entries and all(entry.get("segmentation") for entry in entries):
        masks = Shrunk([entry["segmentation"] for entry in entries], boxes, size, image.shape[:2])
    scores = np.array([entry["score"] for entry in entries]) if with_scores else None
    labels = [truth.category_ids.index(entry["category_id"]) + 1 for entry in entries]
    return draw(image, boxes, labels, truth.categories, scores, masks)


class Shrunk(Sequence):
    """Masks [h, w] bool of checked segmentations, made one at a time: those of a large picture would fill the memory.

    boxes: [D, 4], pixels of the picture that is shown.
    """

    def __init__(self, segmentations: Sequence, boxes: np.ndarray, size: tuple[int, int], shown: tuple[int, int]):
        self.segmentations, self.boxes, self.size, self.shown = segmentations, boxes, size, shown

    def __len__(self) -> int:
        return len(self.segmentations)

    def __getitem__(self, index: int) -> np.ndarray:
        return mask_of(self.segmentations[index], self.boxes[index], self.size, self.shown)


def mask_of(segmentation: list | dict, box: np.ndarray, size: tuple[int, int], shown: tuple[int, int]) -> np.ndarray:
    """The mask [h, w] bool of checked polygons or run lengths, of an image of `size`, at the size that is `shown`. Of a
    larger image the middles of the pixels in the box, and a margin, are looked up in the runs."""
    if isinstance(segmentation, list):
        segmentation = rle_tools.merge(rle_tools.frPyObjects(segmentation, *size))
    if tuple(size) == tuple(shown):
        return rle_tools.decode(segmentation).astype(bool)
    ends, out = np.cumsum(rle_counts(segmentation["counts"], *size)), np.zeros(shown, bool)
    x1, y1 = np.floor(box[:2]).astype(int).clip(1) - 1
    x2, y2 = np.ceil(box[2:]).astype(int) + 1
    rows, columns = (
        ((np.arange(first, min(last, n)) + 0.5) * whole / n).astype(np.int64)
        for first, last, n, whole in zip((y1, x1), (y2, x2), shown, size)
    )
    at = columns * size[0] + rows[:, None]
    out[y1 : y1 + len(rows), x1 : x1 + len(columns)] = np.searchsorted(ends, at, side="right") % 2
    return out
