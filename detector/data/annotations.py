"""The annotations of a data set as flat arrays, which worker processes share instead of copying.

`Annotations` is what is trained on; its `truth` is the same file as evaluation compares with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from detector.data.outlines import Outlines


class Objects(NamedTuple):
    """The objects of one image."""

    boxes: np.ndarray  # [G, 4] float32 (x1, y1, x2, y2), clipped to the image
    labels: np.ndarray  # [G] int64, 1..K
    crowd: np.ndarray  # [G] bool
    outlines: Outlines
    keypoints: np.ndarray  # [G, N, 3] float32 (x, y, visibility 0, 1, 2); N = 0 where they were not asked for
    attributes: np.ndarray  # [G, A] int16, codes of attributes.py; A = 0 where they were not asked for


@dataclass(frozen=True)
class Images:
    """The images of a data set. Dimensions: I images. `file_names` is UTF-8 text cut by `file_name_starts`."""

    image_ids: np.ndarray  # [I] int64
    image_sizes: np.ndarray  # [I, 2] int32 (height, width)
    file_names: np.ndarray  # [bytes] uint8
    file_name_starts: np.ndarray  # [I + 1] int64
    sources: np.ndarray  # [I] int32: which of several annotation files an image is from

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        start, end = self.file_name_starts[index : index + 2]
        return self.file_names[start:end].tobytes().decode()

    def all_file_names(self) -> list[str]:
        text, starts = self.file_names.tobytes(), self.file_name_starts.tolist()
        return [text[start:end].decode() for start, end in zip(starts, starts[1:])]


@dataclass(frozen=True)
class Truth(Images):
    """Every object of a data set as evaluation compares with it: numbers as in the file, float64, nothing clipped.

    It has the objects that nothing is learnt from too: crowd regions, boxes of no size or outside their image. Objects
    are in the order of their images. Dimensions: as in `Annotations`. An image of size 0 x 0 has none in the file.
    """

    categories: list[str]  # name of label 1, 2, ..., in the order of their ids
    category_ids: list[int]
    frequencies: list[str | None]  # LVIS's r, c, f of each category
    federated: bool  # the images have LVIS's lists of the categories that were looked for
    object_starts: np.ndarray  # [I + 1] int64
    object_ids: np.ndarray  # [M] int64
    labels: np.ndarray  # [M] int32
    boxes: np.ndarray  # [M, 4] float64 (x, y, width, height)
    areas: np.ndarray  # [M] float64, square pixels
    crowd: np.ndarray  # [M] bool
    ignored: np.ndarray  # [M] bool: `ignore`, which LVIS's metrics respect
    ring_starts: np.ndarray  # [M + 1] int64: first polygon of each object
    point_starts: np.ndarray  # [Q + 1] int64: first point of each polygon
    points: np.ndarray  # [P, 2] float64
    run_starts: np.ndarray  # [M + 1] int64: where the compressed run lengths of each object begin
    runs: np.ndarray  # [bytes] uint8
    keypoints: np.ndarray  # [M, N, 3] float64 (x, y, visibility); N = 0 where they were not asked for
    num_keypoints: np.ndarray  # [M] int32
    negative_starts: np.ndarray  # [I + 1] int64: LVIS's lists, `neg_category_ids`
    negative: np.ndarray  # labels, int32
    unsure_starts: np.ndarray  # [I + 1] int64: `not_exhaustive_category_ids`
    unsure: np.ndarray  # labels, int32
    attribute_groups: list[list[str]]  # A of them, see attributes.py
    attributes: np.ndarray  # [M, A] int16; A = 0 where they were not asked for
    series: np.ndarray  # [I] int32: a number for each series of images (video, volume), -1 for an image by itself
    tracks: np.ndarray  # [M] int32: a number for each track_id, the same thing in the images of a series; -1 without

    def has_mask(self) -> np.ndarray:
        """[M] bool."""
        return (np.diff(self.ring_starts) > 0) | (np.diff(self.run_starts) > 0)

    def images_of(self) -> np.ndarray:
        """[M] index of each object's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.object_starts))

    def select(self, images: np.ndarray) -> Truth:
        """The truth of some images only: their indices [I']."""
        names, name_starts = cut(self.file_names, self.file_name_starts, images)
        objects = ranges(self.object_starts, images)
        rings = ranges(self.ring_starts, objects)
        points, point_starts = cut(self.points, self.point_starts, rings)
        runs, run_starts = cut(self.runs, self.run_starts, objects)
        negative, negative_starts = cut(self.negative, self.negative_starts, images)
        unsure, unsure_starts = cut(self.unsure, self.unsure_starts, images)
        own = ("object_ids", "labels", "boxes", "areas", "crowd", "ignored", "keypoints", "num_keypoints")
        own += ("attributes", "tracks")
        return replace(
            self,
            image_ids=self.image_ids[images],
            image_sizes=self.image_sizes[images],
            sources=self.sources[images],
            series=self.series[images],
            **{"file_names": names, "file_name_starts": name_starts},
            object_starts=starts_of(np.diff(self.object_starts)[images]),
            ring_starts=starts_of(np.diff(self.ring_starts)[objects]),
            **{"points": points, "point_starts": point_starts, "runs": runs, "run_starts": run_starts},
            **{"negative": negative, "negative_starts": negative_starts},
            **{"unsure": unsure, "unsure_starts": unsure_starts},
            **{name: getattr(self, name)[objects] for name in own},
        )

    def without_classes(self, name: str = "object", id: int = 1) -> Truth:
        """The same objects, all of one category."""
        return replace(
            self,
            categories=[name],
            category_ids=[id],
            frequencies=[None],
            federated=False,
            labels=np.ones_like(self.labels),
        )

    def to_coco(self, segmentation: bool = True, keypoints: bool = True) -> dict[str, Any]:
        """COCO instances with the fields that metrics need and no others.

        Ids of annotations are 1, 2, ...: pycocotools takes 0 for "unmatched" and merges those that occur twice. An
        object without a mask has no `segmentation`.
        """
        starts, lists = self.object_starts.tolist(), {}
        if self.federated:
            for key, values, first in (
                ("neg_category_ids", self.negative, self.negative_starts),
                ("not_exhaustive_category_ids", self.unsure, self.unsure_starts),
            ):
                ids = np.array(self.category_ids, np.int64)[values - 1].tolist()
                lists[key] = [ids[a:b] for a, b in zip(first.tolist(), first[1:].tolist())]
        images, annotations = [], []
        sizes, ids, names = self.image_sizes.tolist(), self.image_ids.tolist(), self.all_file_names()
        columns = (self.labels, self.boxes, self.areas, self.crowd, self.ignored)
        rows = zip(*(column.tolist() for column in columns))
        for index, image_id in enumerate(ids):
            image = {"id": image_id, "file_name": names[index]}
            if any(sizes[index]):
                image |= {"height": sizes[index][0], "width": sizes[index][1]}
            images.append(image | {key: values[index] for key, values in lists.items()})
            for number, (label, box, area, crowd, ignored) in zip(range(starts[index], starts[index + 1]), rows):
                entry = {"id": number + 1, "image_id": image_id, "category_id": self.category_ids[label - 1]}
                entry |= {"bbox": box, "area": area, "iscrowd": int(crowd), "ignore": int(ignored)}
                if segmentation and (mask := self._segmentation(number, sizes[index])):
                    entry["segmentation"] = mask
                if keypoints and self.keypoints.shape[1]:
                    entry["keypoints"] = self.keypoints[number].ravel().tolist()
                    entry["num_keypoints"] = int(self.num_keypoints[number])
                annotations.append(entry)
        categories = [
            {"id": id_, "name": name} | ({"frequency": frequency} if frequency else {})
            for id_, name, frequency in zip(self.category_ids, self.categories, self.frequencies)
        ]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _segmentation(self, index: int, size: list[int]) -> dict | list | None:
        start, end = self.run_starts[index : index + 2]
        if end > start:
            return {"size": size, "counts": self.runs[start:end].tobytes().decode()}
        first, last = self.ring_starts[index : index + 2]
        cuts = self.point_starts[first : last + 1].tolist()
        return [self.points[a:b].ravel().tolist() for a, b in zip(cuts, cuts[1:])]


def starts_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """[groups + 1] int64: where each group starts when they are joined, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def ranges(starts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The indices of everything in the groups [G] of what is cut by `starts`, group after group."""
    lengths = np.diff(starts)[groups]
    return np.arange(lengths.sum()) + np.repeat(starts[:-1][groups] - starts_of(lengths)[:-1], lengths)


def cut(values: np.ndarray, starts: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values in some groups, and where each starts now."""
    return values[ranges(starts, groups)], starts_of(np.diff(starts)[groups])


@dataclass(frozen=True)
class Annotations(Images):
    """All images of a data set and the objects to learn from, in the order of their images.

    Dimensions: I images, M objects, Q rings, P points, N keypoints of an object.
    """

    categories: list[str]  # name of label 1, 2, ...
    category_ids: list[int | None]  # id of label 1, 2, ... in the file; None for a category that the file does not have
    keypoint_names: list[str]  # N names
    object_starts: np.ndarray  # [I + 1] int64
    object_ids: np.ndarray  # [M] int64; its place in the file where an object has none
    boxes: np.ndarray  # [M, 4] float32
    labels: np.ndarray  # [M] int32
    crowd: np.ndarray  # [M] bool
    even_odd: np.ndarray  # [M] bool
    ring_starts: np.ndarray  # [M + 1] int64: first ring of each object
    point_starts: np.ndarray  # [Q + 1] int64: first point of each ring
    points: np.ndarray  # [P, 2] float32
    keypoints: np.ndarray  # [M, N, 3] float32 (x, y, visibility); continuous: the centre of pixel 0 is 0.5
    attribute_groups: list[list[str]]  # A of them, see attributes.py
    attributes: np.ndarray  # [M, A] int16
    truth: Truth | None = None  # what evaluation compares with; None where it was not asked for

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
        own = self.keypoints[start:end], self.attributes[start:end]
        return Objects(self.boxes[start:end], labels, self.crowd[start:end], outlines, *own)
