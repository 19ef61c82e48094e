"""What `predict` returns: detections that can be read, drawn, cut out and given to other programs."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools

from detector.evaluation.results import Writers, coco_keypoints, written
from detector.inference.draw import draw as draw_objects
from detector.inference.draw import note
from detector.inference.inputs import Picture
from detector.inference.supervision import to_supervision
from detector.ops.paste import encode_window
from detector.ops.text import one_line
from detector.structures import Detections

if TYPE_CHECKING:
    import supervision

SCORES, CLASSES = 5, 8  # that the line of a result shows


class Result(Detections):
    """Detections in one image, best first: boxes [D, 4] in its pixels, scores [D], labels [D] (1..K), valid [D] (all
    True), of a mask model masks [D, H, W] bool, of a keypoint model keypoints [D, P, 3], of one with extra heads
    `extra`, their fields [D, ...] by name.

    As text it is one line: "3 objects: 2 person 0.98 0.71, 1 dog 0.66".
    """

    categories: Sequence[str] = ()  # names of labels 1, 2, ...
    category_ids: Sequence[int] = ()  # their COCO ids
    picture: Picture | None = None
    threshold: float | np.ndarray = 0.0  # the least score, or that of each class [K]
    writers: Writers = {}  # noqa: RUF012  of the fields of `extra`, see evaluation.results

    def _replace(self, **fields) -> Result:
        result = super()._replace(**fields)
        result.__dict__.update(self.__dict__)
        return result

    @property
    def names(self) -> list[str]:
        """The class of each object."""
        return [self.categories[label - 1] for label in self.labels.tolist()]

    @property
    def image(self) -> np.ndarray:
        """The image [H, W, C] uint8; that of a file is read again. Raises as `predict` where it is gone."""
        if self.picture is None:
            raise ValueError("these detections have no image: only those of predict have")
        return self.picture.pixels()

    def __str__(self) -> str:
        count = len(self.labels)
        if not count:
            return "no objects"
        by_name: dict[str, list[float]] = {}
        for name, score in zip(self.names, self.scores.tolist()):
            by_name.setdefault(name, []).append(score)
        parts = []
        for name, scores in [*by_name.items()][:CLASSES]:
            more = " ..." if len(scores) > SCORES else ""
            parts.append(f"{len(scores)} {one_line(name)} {' '.join(f'{s:.2f}' for s in scores[:SCORES])}{more}")
        if len(by_name) > CLASSES:
            parts.append(f"and {len(by_name) - CLASSES} more classes")
        return f"{count} object{'s' * (count > 1)}: {', '.join(parts)}"

    __repr__ = __str__

    def draw(self, labels: bool = True, boxes: bool = True, masks: bool = True, scores: bool = True) -> Image.Image:
        """The image with its objects as a PIL.Image; a small one is enlarged. labels: names, with `scores`."""
        pictures, image = self.picture and self.picture.pictures, self.image
        drawn = draw_objects(
            image if pictures is None else pictures.rgb(image),
            self.boxes.numpy(),
            self.labels.numpy(),
            self.categories,
            self.scores.numpy() if scores else None,
            self.masks.numpy() if masks and self.masks is not None else None,
            None if self.keypoints is None else self.keypoints.numpy(),
            with_boxes=boxes,
            with_labels=labels,
            notes=self.notes(),
        )
        return Image.fromarray(drawn)

    def written(self, index: int) -> dict[str, Any]:
        """What extra heads say of an object, as predictions.json has it."""
        return written(self.extra, index, self.writers)

    def notes(self) -> list[str]:
        """The same of each object, as it is drawn."""
        return [note(self.written(index)) for index in range(len(self.labels))]

    def crop(self, margin: float = 0.0, masked: bool = False) -> list[np.ndarray]:
        """The part [h, w, C] uint8 of the image in each box, grown by `margin` of its sides at every side.

        masked: what is outside the object's mask is black. Raises ValueError for a model without masks.
        """
        if masked and self.masks is None:
            raise ValueError("masked = True: the model finds no masks")
        image, parts = self.image, []
        for index, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            wide, high = margin * (x2 - x1), margin * (y2 - y1)
            rows = slice(max(floor(y1 - high), 0), ceil(y2 + high))
            columns = slice(max(floor(x1 - wide), 0), ceil(x2 + wide))
            part = image[rows, columns]
            if masked:
                part = part * self.masks[index, rows, columns].numpy()[..., None]
            parts.append(part.copy())
        return parts

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """COCO annotations with a score: category_id, bbox [x, y, width, height], area, segmentation (run lengths),
        keypoints, and the fields of extra heads. They are COCO results, too."""
        entries = []
        for d, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            entry: dict[str, Any] = {"image_id": image_id, "category_id": self.category_ids[self.labels[d] - 1]}
            entry |= {"score": float(self.scores[d]), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            if self.masks is not None:
                mask = self.masks[d].numpy()
                entry["segmentation"] = encode_window(mask, 0, 0, *mask.shape)
            if self.keypoints is not None:
                entry["keypoints"] = coco_keypoints(self.keypoints[d])
            entries.append(with_area(entry) | self.written(d))
        return entries

    def to_supervision(self) -> supervision.Detections:
        """For the package supervision: see inference/supervision.py."""
        return to_supervision(self, self.categories)


def with_area(entry: dict[str, Any]) -> dict[str, Any]:
    """A COCO result as an annotation: with the area of its mask, or else of its box."""
    if "segmentation" in entry:
        area: float = int(rle_tools.area(entry["segmentation"]))
    else:
        area = entry["bbox"][2] * entry["bbox"][3]
    return {**entry, "area": area, "iscrowd": 0}
