"""Augmentation: any albumentations pipeline, with boxes, labels and outlines kept in step.

A box carries its object's index through the pipeline, outlines travel as keypoints. Afterwards an object with an
outline gets the box around what is left of it, other boxes are taken as albumentations returns them.
"""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise it asks the internet for newer versions

import albumentations as A
import cv2
import numpy as np
from PIL import Image

from detector.data.outlines import Outlines, visible_bounds
from detector.data.pictures import resized

# albumentations moves keypoints as pixel centres (a flip is x -> width - 1 - x), but these transforms scale them as if
# the centre of pixel 0 were its corner: half a pixel off at factor 2, more at larger factors.
_SCALING = (
    A.RandomScale,
    A.LongestMaxSize,
    A.SmallestMaxSize,
    A.Resize,
    A.RandomSizedCrop,
    A.RandomResizedCrop,
    A.RandomSizedBBoxSafeCrop,
    A.CropAndPad,
)
# These move keypoints otherwise than pixels, so outlines would slip off their objects.
_UNFAITHFUL = (A.ThinPlateSpline, A.RandomGridShuffle, A.Mosaic)


class Transformed(NamedTuple):
    """What comes out of a `Pipeline`."""

    image: np.ndarray  # [H, W, C] uint8
    boxes: np.ndarray  # [G, 4] float32, inside the image
    outlines: Outlines
    kept: np.ndarray  # [G] index of each remaining object among those that went in, ascending
    keypoints: np.ndarray | None  # [G, P, 3] float32


class Pipeline:
    """A list of albumentations transforms as one function of image, objects and seed.

    Args:
        transforms: applied in turn; they must leave a uint8 image of as many channels (the model normalises).
        min_size: objects narrower or lower than this many pixels after the transforms are dropped.
        channels: C of the images.

    Raises ValueError, naming the transform, for one that cannot be used: whose keypoints do not follow its pixels, or
    that takes three channels alone where C is another number.
    """

    def __init__(
        self, transforms: Sequence[A.BasicTransform | A.BaseCompose] = (), min_size: float = 1.0, channels: int = 3
    ):
        if min_size <= 0:
            raise ValueError(f"min_size={min_size}: must be positive")
        self.min_size = min_size
        self.compose = A.Compose(
            [A.NoOp(), *transforms],  # a pipeline without geometric transforms would warn
            bbox_params=A.BboxParams("pascal_voc"),
            keypoint_params=A.KeypointParams("xy", remove_invisible=False),
        )
        for transform in _leaves(self.compose):
            if isinstance(transform, _UNFAITHFUL):
                raise ValueError(
                    f"augmentation {type(transform).__name__}: its keypoints do not follow its pixels, so masks would "
                    "slip off their objects; use another transform"
                )
            if isinstance(transform, _SCALING):
                move = type(transform).apply_to_keypoints
                transform.apply_to_keypoints = partial(_scaled_as_centres, partial(move, transform))
                transform.add_targets({"keypoints": "keypoints"})  # it looks the function up anew
            if channels != 3 and (reason := _refusal(transform, channels)):
                raise ValueError(
                    f"augmentation {type(transform).__name__} cannot take pictures of {channels} channels ({reason}): "
                    "leave it out, or give it values for as many"
                )

    def __call__(
        self,
        image: np.ndarray,
        boxes: np.ndarray | None = None,
        outlines: Outlines | None = None,
        seed: int = 0,
        keypoints: np.ndarray | None = None,
        mirrored: Sequence[int] | None = None,
    ) -> Transformed:
        """Transform an image [H, W, C] uint8 with its objects; a function of its arguments alone.

        boxes: [G, 4]. keypoints: [G, P, 3] (x, y, visibility); `mirrored`: [P] which keypoint each one becomes when the
        picture is mirrored (left and right hands change places).
        """
        if boxes is None:
            boxes = np.zeros((0, 4), np.float32)
        if outlines is None:
            outlines = Outlines(np.zeros((0, 2)), np.zeros(1, int), np.zeros(0, int), np.zeros(len(boxes), bool))
        points = outlines.points
        if keypoints is not None:  # and three corners, which tell afterwards whether the picture was mirrored
            corners = [[0, 0], [image.shape[1], 0], [0, image.shape[0]]]
            points = np.concatenate([points, keypoints[..., :2].reshape(-1, 2), corners])
        data = {"image": image}
        if len(boxes):
            data["bboxes"] = np.column_stack([boxes, np.arange(len(boxes))]).astype(np.float32)
        if len(points):
            data["keypoints"] = np.asarray(points, np.float32) - np.float32(0.5)
        channels = image.shape[2]
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        data = self.compose(**data)

        image = data["image"]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels:
            raise ValueError(
                f"the augmentation turned the image into {image.dtype} {list(image.shape)}, not uint8 "
                f"[H, W, {channels}]: leave out Normalize, ToFloat, ToGray with one channel and ToTensorV2 (the model "
                "normalises)"
            )
        height, width = image.shape[:2]
        result = np.full((len(boxes), 4), -1.0)
        rows = data.get("bboxes", ())
        if len(rows):  # without its columns where no box is left
            result[rows[:, 4].astype(int)] = rows[:, :4]
        if len(points):
            moved = data["keypoints"][:, :2] + 0.5
            if len(moved) != len(points):
                raise ValueError(
                    f"the augmentation turned {len(points)} outline points into {len(moved)}; transforms "
                    "that copy or cut away keypoints (such as padding by reflection) cannot be used"
                )
            outlines = outlines._replace(points=moved[: len(outlines.points)])
            has_rings = outlines.has_rings()
            result[has_rings] = visible_bounds(outlines, height, width)[has_rings]
        result[:, 0::2] = result[:, 0::2].clip(0, width)
        result[:, 1::2] = result[:, 1::2].clip(0, height)
        keep = (result[:, 2:] - result[:, :2] >= self.min_size).all(axis=1)
        if not keep.all():
            outlines = outlines.select(keep)
        if keypoints is not None:
            keypoints = _placed(keypoints, moved[-keypoints[..., 0].size - 3 :], (width, height), mirrored)[keep]
        return Transformed(image, result[keep].astype(np.float32), outlines, np.flatnonzero(keep), keypoints)


def _leaves(transform) -> Iterator[A.BasicTransform]:
    if isinstance(transform, A.BaseCompose):
        for child in transform.transforms:
            yield from _leaves(child)
    else:
        yield transform


def _refusal(transform: A.BasicTransform, channels: int) -> str:
    """Why a transform cannot be applied to images of C channels, though to those of three; "" if it can."""
    fill = getattr(transform, "fill", 0)
    if np.size(fill) not in (1, channels):
        return f"fill has {np.size(fill)} values"
    reasons = []
    for count in (3, channels):
        tried = copy.copy(transform)
        tried.p = 1.0
        image = np.random.default_rng(0).integers(0, 256, (64, 96, count), np.uint8)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                same = A.Compose([tried], seed=0)(image=image)["image"].shape[2:] == (count,)
            reasons.append("" if same else "it changes their number")
        except Exception as error:  # of whatever kind
            reasons.append(" ".join(str(error).split())[:160] or type(error).__name__)
    return "" if reasons[0] else reasons[1]


def _scaled_as_centres(apply_to_keypoints, keypoints: np.ndarray, **params) -> np.ndarray:
    shift = np.zeros(keypoints.shape[1], np.float32)
    shift[:2] = 0.5
    return apply_to_keypoints(keypoints + shift, **params) - shift


def _placed(keypoints: np.ndarray, moved: np.ndarray, size: tuple[int, int], mirrored: Sequence[int] | None):
    """Keypoints [G, P, 3] at their new places, the first rows of `moved`; three moved corners follow there.

    Keypoints outside the image of `size` (width, height) are no longer labelled.
    """
    places, (origin, right, below) = moved[:-3].reshape(*keypoints.shape[:2], 2), moved[-3:]
    labelled = (keypoints[..., 2] > 0) & (places >= 0).all(-1) & (places <= size).all(-1)
    placed = np.concatenate([places, keypoints[..., 2:]], axis=2) * labelled[..., None]
    (a, b), (c, d) = right - origin, below - origin
    if mirrored is not None and a * d - b * c < 0:
        placed = placed[:, mirrored]
    return placed.astype(np.float32)


class Resize(A.DualTransform):
    """What resizing transforms share: a subclass says `new`, the (height, width) that the image gets.

    interpolation: "area" averages over all pixels where the image shrinks, which keeps fine patterns from turning into
    others, and is bilinear where it grows; "pillow": Pillow's bilinear one, as in detectron2, which averages too; or
    OpenCV's constant. The default is bilinear, which looks at four pixels alone: what configs meant that do not say it.
    """

    def _check(self, interpolation: int | str) -> None:
        if isinstance(interpolation, str) and interpolation not in ("area", "pillow"):
            raise ValueError(
                f"{type(self).__name__}: interpolation={interpolation!r} must be 'area', 'pillow' or OpenCV's constant"
            )

    def apply(self, img, new, interpolation, **params):
        if img.shape[:2] == new:
            return img
        if interpolation == "area":
            interpolation = cv2.INTER_AREA if new[0] < img.shape[0] or new[1] < img.shape[1] else cv2.INTER_LINEAR
        if interpolation != "pillow":
            return resized(img, *new, interpolation)
        if img.shape[2] == 3:
            return np.array(Image.fromarray(img).resize(new[::-1], Image.Resampling.BILINEAR))
        planes = [Image.fromarray(plane).resize(new[::-1], Image.Resampling.BILINEAR) for plane in cv2.split(img)]
        return np.stack(planes, axis=2)

    def apply_to_bboxes(self, bboxes, **params):
        return bboxes  # relative to the image's sides

    def apply_to_keypoints(self, keypoints, new, shape, **params):
        keypoints = keypoints.copy()
        scale = np.array(new[::-1], np.float32) / np.array(shape[1::-1], np.float32)
        keypoints[:, :2] = (keypoints[:, :2] + 0.5) * scale - 0.5
        return keypoints


class ResizeShortestEdge(Resize):
    """Scale the image so that its shorter side becomes `size`, but its longer side at most `max_size`.

    Args:
        size: pixels; of several sizes one is drawn for each image.
        max_size: limit of the longer side; None for no limit.
        rounding: how sides come to whole pixels: "nearest" as in detectron2 (half up), "floor" as in torchvision.
        interpolation: see Resize.
    """

    class InitSchema(A.BasicTransform.InitSchema):
        size: int | list[int]
        max_size: int | None
        rounding: str
        interpolation: int | str

    def __init__(
        self,
        size: int | Sequence[int] = 800,
        max_size: int | None = 1333,
        rounding: str = "nearest",
        interpolation: int | str = cv2.INTER_LINEAR,
        p: float = 1.0,
    ):
        super().__init__(p=p)
        self.size = [size] if isinstance(size, int) else list(size)
        self.max_size, self.rounding, self.interpolation = max_size, rounding, interpolation
        if not self.size or min(self.size) < 1 or (max_size is not None and max_size < 1):
            raise ValueError(f"ResizeShortestEdge: size={size} and max_size={max_size} must be positive")
        if rounding not in ("nearest", "floor"):
            raise ValueError(f"ResizeShortestEdge: rounding={rounding!r} must be 'nearest' or 'floor'")
        self._check(interpolation)

    def get_params_dependent_on_data(self, params, data):
        height, width = params["shape"][:2]
        scale = self.py_random.choice(self.size) / min(height, width)
        if self.max_size is not None:
            scale = min(scale, self.max_size / max(height, width))
        shift = 0.5 if self.rounding == "nearest" else 0.0
        # the tiny addition undoes the division's rounding: 800 / 3 * 3 must be 800
        return {"new": tuple(max(1, int(side * scale + shift + 1e-6)) for side in (height, width))}


class ScaleJitter(Resize):
    """Scale the image so that it just fits into a square of `size` times a factor drawn uniformly from `scale`.

    With scale (0.1, 2) and a crop of `size` behind it this is large-scale jitter (Ghiasi et al. 2021).

    Args:
        size: pixels.
        scale: (least, largest) factor.
        interpolation: see Resize.
    """

    class InitSchema(A.BasicTransform.InitSchema):
        size: int
        scale: tuple[float, float]
        interpolation: int | str

    def __init__(
        self,
        size: int = 1024,
        scale: tuple[float, float] = (0.1, 2.0),
        interpolation: int | str = cv2.INTER_LINEAR,
        p: float = 1.0,
    ):
        super().__init__(p=p)
        self._check(interpolation)
        self.size, self.scale, self.interpolation = size, tuple(scale), interpolation
        if size < 1 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"ScaleJitter: size={size} must be positive and scale={scale} be 0 < least <= largest")

    def get_params_dependent_on_data(self, params, data):
        height, width = params["shape"][:2]
        factor = self.py_random.uniform(*self.scale) * self.size / max(height, width)
        return {"new": tuple(max(1, int(side * factor + 0.5)) for side in (height, width))}
