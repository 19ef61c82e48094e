"""Pictures of validation images with what is there and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_tools

from detector.data import Pictures, split_page
from detector.data.annotations import Truth
from detector.data.file_names import find_files
from detector.evaluation.operating_point import SCORES, Kept, choose, counts, kept_matches
from detector.inference.draw import draw
from detector.settings import COCO_LIMITS


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


def read_picture(truth: Truth, index: int, folders: Sequence[Path], pictures: Pictures) -> np.ndarray:
    """Image `index` of the truth as people see it, [H, W, 3] uint8. Raises ValueError or OSError where it cannot be."""
    folder = folders[truth.sources[index] if len(folders) > 1 else 0]
    file, page = split_page(truth.file_name(index))
    (path,), _, problems = find_files(folder, [file])
    if path is None:
        raise ValueError(f"image {truth.image_ids[index]}: {problems[0]} is not in {folder}")
    return pictures.rgb(pictures.read(folder / path, page))


def picture_of(image: np.ndarray, truth: Truth, entries: Sequence[dict], with_scores: bool) -> np.ndarray:
    """An image with checked COCO annotations or results."""
    entries = [entry for entry in entries if not entry.get("iscrowd")]
    boxes = [entry.get("bbox") or rle_tools.toBbox(entry["segmentation"]) for entry in entries]  # results may have none
    boxes = np.array(boxes, float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = None
    if entries and all(entry.get("segmentation") for entry in entries):
        masks = np.array([mask_of(entry["segmentation"], *image.shape[:2]) for entry in entries], bool)
    scores = np.array([entry["score"] for entry in entries]) if with_scores else None
    labels = [truth.category_ids.index(entry["category_id"]) + 1 for entry in entries]
    return draw(image, boxes, labels, truth.categories, scores, masks)


def mask_of(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """The mask [H, W] uint8 of checked polygons or run lengths."""
    if isinstance(segmentation, list):
        segmentation = rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))
    return rle_tools.decode(segmentation)
