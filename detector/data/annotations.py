"""The annotations of a data set as flat arrays, which worker processes share instead of copying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from detector.data.outlines import Outlines


class Objects(NamedTuple):
    """The objects of one image."""

    boxes: np.ndarray  # [G, 4] float32 (x1, y1, x2, y2), clipped to the image
    labels: np.ndarray  # [G] int64, 1..K
    crowd: np.ndarray  # [G] bool
    outlines: Outlines
    keypoints: np.ndarray  # [G, N, 3] float32 (x, y, visibility 0, 1, 2); N = 0 where they were not asked for


@dataclass(frozen=True)
class Annotations:
    """All images and objects of a data set; objects in the order of their images.

    Dimensions: I images, M objects, Q rings, P points, N keypoints of an object. `file_names` is UTF-8 text
    cut by `file_name_starts`.
    """

    categories: list[str]  # name of label 1, 2, ...
    category_ids: list[int]  # id of label 1, 2, ... in the file; -1 for a category that the file does not have
    keypoint_names: list[str]  # N names
    image_ids: np.ndarray  # [I] int64
    image_sizes: np.ndarray  # [I, 2] int32 (height, width)
    file_names: np.ndarray  # [bytes] uint8
    file_name_starts: np.ndarray  # [I + 1] int64
    object_starts: np.ndarray  # [I + 1] int64
    object_ids: np.ndarray  # [M] int64
    boxes: np.ndarray  # [M, 4] float32
    labels: np.ndarray  # [M] int32
    crowd: np.ndarray  # [M] bool
    even_odd: np.ndarray  # [M] bool
    ring_starts: np.ndarray  # [M + 1] int64: first ring of each object
    point_starts: np.ndarray  # [Q + 1] int64: first point of each ring
    points: np.ndarray  # [P, 2] float32
    keypoints: np.ndarray  # [M, N, 3] float32 (x, y, visibility); continuous: the centre of pixel 0 is 0.5

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        start, end = self.file_name_starts[index : index + 2]
        return self.file_names[start:end].tobytes().decode()

    def all_file_names(self) -> list[str]:
        text, starts = self.file_names.tobytes(), self.file_name_starts.tolist()
        return [text[start:end].decode() for start, end in zip(starts, starts[1:])]

    def objects(self, index: int) -> Objects:
        start, end = self.object_starts[index : index + 2]
        rings = self.ring_starts[start : end + 1]
        points = self.point_starts[rings[0] : rings[-1] + 1]
        outlines = Outlines(
            points=self.points[points[0] : points[-1]],
            ring_starts=points - points[0],
            ring_objects=np.repeat(np.arange(end - start), np.diff(rings)),
            even_odd=self.even_odd[start:end],
        )
        labels = self.labels[start:end].astype(np.int64)
        return Objects(self.boxes[start:end], labels, self.crowd[start:end], outlines, self.keypoints[start:end])
