"""From the network's detections to COCO results, and files that are either whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from detector.ops.boxes import area, clip
from detector.ops.paste import encode_window, paste_window
from detector.structures import Batch, Detections, each, to_device

Writers = Mapping[str, Callable[[np.ndarray], Any]]


def to_original(detections: Detections, batch: Batch) -> Detections:
    """The same detections in pixels of the original images; boxes without area inside the image become invalid.

    Both on one device.
    """
    scale = batch.original_sizes / batch.image_sizes
    scale = scale.to(detections.boxes).flip(1)[:, None]  # [N, 1, 2] (x, y)
    boxes = clip(detections.boxes.float() * scale.repeat(1, 1, 2), batch.original_sizes)
    keypoints = detections.keypoints
    if keypoints is not None:
        keypoints = torch.cat([keypoints[..., :2] * scale[:, :, None], keypoints[..., 2:]], dim=-1)
    return detections._replace(boxes=boxes, valid=detections.valid & (area(boxes) > 0), keypoints=keypoints)


def detections_to_coco(
    detections: Detections,
    batch: Batch,
    category_ids: Sequence[int | None],
    threshold: float = 0.5,
    paste: str = "aligned",
    writers: Writers | None = None,
) -> list[dict]:
    """COCO results, best first in each image: image_id, category_id, bbox [x, y, width, height], score, and where the
    model predicts them segmentation (compressed RLE, text counts), keypoints [x, y, score] * points and `extra` fields.

    detections: in pixels of the network's input. category_ids: the id of label 1, 2, ... in the annotation file;
    labels without one (categories that the data set does not have) are left out. threshold, paste: as in
    masks.paste_window. writers: see `writers_of`.
    """
    found = to_original(to_device(detections, "cpu", non_blocking=False), to_device(batch, "cpu"))
    found = each(lambda t: t.float().numpy(), found)
    results = []
    for n, image_id in enumerate(batch.image_ids.tolist()):
        height, width = batch.original_sizes[n].tolist()
        for d in np.flatnonzero(found.valid[n]):
            label = int(found.labels[n, d])
            if not 1 <= label <= len(category_ids):
                raise ValueError(f"label {label} of image {image_id} has no category: there are {len(category_ids)}")
            if category_ids[label - 1] is None:
                continue
            x1, y1, x2, y2 = found.boxes[n, d].tolist()
            result = {
                "image_id": image_id,
                "category_id": int(category_ids[label - 1]),
                "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                "score": float(found.scores[n, d]),
            }
            if found.masks is not None:
                window = paste_window(found.masks[n, d], found.boxes[n, d], height, width, threshold, paste)
                result["segmentation"] = encode_window(*window, height, width)
            if found.keypoints is not None:
                result["keypoints"] = coco_keypoints(found.keypoints[n, d])
            results.append(result | written(found.extra, (n, d), writers or {}))
    return results


def writers_of(model: nn.Module) -> Writers:
    """What predictions.json says of the fields of a model's extra heads, by the name of the field."""
    heads = getattr(model, "extra_heads", {}).values()
    return {name: writer for head in heads for name, writer in getattr(head, "writers", {}).items()}


def written(extra: Mapping[str, Any] | None, index: Any, writers: Writers) -> dict[str, Any]:
    """The `extra` fields of the detection at `index`, as predictions.json has them."""
    values = {name: np.asarray(field[index]) for name, field in (extra or {}).items()}
    return {name: writers.get(name, plain)(value) for name, value in values.items()}


def plain(value: np.ndarray) -> Any:
    """A number, or lists of numbers, to six digits."""
    return np.vectorize(lambda number: float(f"{number:.6g}"), otypes=[object])(value).tolist()


def coco_keypoints(keypoints) -> list[float]:
    """[x, y, score] * P of keypoints [P, 3], as COCO counts: the centre of the first pixel is 0, ours 0.5."""
    return [round(v - 0.5 * (i % 3 < 2), 3) for i, v in enumerate(keypoints.flatten().tolist())]
