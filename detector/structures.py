"""The padded, batched tensors that travel between the stages.

Dimensions: N images, G ground-truth boxes per image (padded), P proposals per image (padded), R RoIs, D detections per
image (padded), C channels, K foreground classes, S side of a stored mask, M side of a predicted mask.

Every stage is batched over images: rows that only pad are marked False in `valid`. Boxes are (x1, y1, x2, y2) in pixels
of the network's input image, continuous and half-open, float32. Labels: 0 background, 1..K foreground, -1 ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# what a COCO result says of a detection, beside the fields of extra heads
RESULT_FIELDS = (
    *("id", "image_id", "category_id", "bbox", "score", "area", "iscrowd", "segmentation", "keypoints", "track_id"),
)
Fields = TypeVar("Fields", bound=tuple[Any, ...])


class Batch(NamedTuple):
    """What the network sees."""

    images: Tensor  # [N, C, H, W] uint8, C = 3: RGB; content at the top left, zeros right and below
    image_sizes: Tensor  # [N, 2] int64 (height, width) of the content
    original_sizes: Tensor  # [N, 2] int64 (height, width) of the image file, EXIF orientation applied
    image_ids: Tensor  # [N] int64, the data set's image ids
    sample_keys: Tensor  # [N] int64, seeds of the random RoI sampling: a function of (seed, epoch, image) alone


class Targets(NamedTuple):
    """What the network should find, padded to the largest G of the batch (at least 1)."""

    boxes: Tensor  # [N, G, 4] float32
    labels: Tensor  # [N, G] int64, 1..K; 0 in padding
    valid: Tensor  # [N, G] bool
    crowd: Tensor  # [N, G] bool: regions to ignore, never positives
    masks: Tensor | None = None  # [N, G, S, S] float16, the share of each cell that the object covers
    mask_windows: Tensor | None = None  # [N, G, 4] float32, the rectangle of the image that the S x S cells cover
    has_mask: Tensor | None = None  # [N, G] bool: False for objects that came with a box only
    keypoints: Tensor | None = None  # [N, G, points, 3] float32 (x, y, visibility 0/1/2)
    attributes: Tensor | None = None  # [N, G, A] int64, codes of data/attributes.py; -1: unknown


class Proposals(NamedTuple):
    """Class-agnostic candidate boxes of the RPN, best first."""

    boxes: Tensor  # [N, P, 4]
    scores: Tensor  # [N, P] in (0, 1)
    valid: Tensor  # [N, P] bool


class RoIFeatures(NamedTuple):
    """What a RoI method returns."""

    features: Tensor  # [R, C, output_h, output_w]
    offsets: Tensor | None = None  # [R, 2, points_h, points_w] (dx, dy), normalised, before gamma
    modulation: Tensor | None = None  # [R, points_h, points_w] in (0, 1)


class Detections(NamedTuple):
    """The result, best first. `masks` are probabilities in the box's own frame until they are pasted into the image."""

    boxes: Tensor  # [N, D, 4]
    scores: Tensor  # [N, D]
    labels: Tensor  # [N, D] int64, 1..K
    valid: Tensor  # [N, D] bool
    masks: Tensor | None = None  # [N, D, M, M] float in (0, 1)
    keypoints: Tensor | None = None  # [N, D, points, 3] float (x, y, score)
    extra: Mapping[str, Tensor] | None = None  # [N, D, ...] of each field that heads beside the usual ones give


def each(change: Callable[..., Any], *tuples: Fields) -> Fields:
    """A tuple of their kind with what `change` makes of each field of the tuples, and of each entry of those that are
    mappings; None where the first has None."""

    def changed(*fields: Any) -> Any:
        if isinstance(fields[0], Mapping):
            return {name: change(*(field[name] for field in fields)) for name in fields[0]}
        return None if fields[0] is None else change(*fields)

    kind: Callable[..., Fields] = type(tuples[0])
    return kind(*(changed(*fields) for fields in zip(*tuples)))


def to_device(batch: Fields, device: torch.device | str, non_blocking: bool = True) -> Fields:
    """Copy of a tuple of tensors (None allowed) on `device`."""
    return each(lambda t: t.to(device, non_blocking=non_blocking), batch)


def flatten_valid(valid: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Padded tensors [N, P, ...] as rows [R, ...], and the weight [R] float of each row, first.

    On the CPU only the valid rows are kept, because every row costs time. Elsewhere all rows stay, padding with weight
    0: their number is then known without waiting for the device.
    """
    if valid.device.type == "cpu":
        return torch.ones(int(valid.sum())), *(t[valid] for t in tensors)
    return valid.flatten().float(), *(t.flatten(0, 1) for t in tensors)


def with_image(boxes: Tensor) -> Tensor:
    """Padded boxes [N, P, 4] as padded RoIs [N, P, 5] = (batch_index, x1, y1, x2, y2)."""
    image = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([image[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=2)


def rois_from_boxes(boxes: Tensor, valid: Tensor) -> Tensor:
    """The valid rows of padded boxes [N, P, 4] as RoIs [R, 5] = (batch_index, x1, y1, x2, y2), image by image."""
    return with_image(boxes)[valid]
