"""A trained detector, and its detections in any image."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from detector.data import Pictures, Pipeline, collate_images
from detector.data.pictures import resized
from detector.evaluation.operating_point import BEST, check_threshold, thresholds
from detector.evaluation.results import to_original, writers_of
from detector.inference.inputs import Picture, check_order, check_path, several, to_array, with_max_pixels
from detector.inference.result import Result
from detector.model import TwoStageDetector
from detector.ops.checks import ConfigError
from detector.ops.paste import paste_masks
from detector.runtime import autocast
from detector.settings import Tiles
from detector.structures import Batch, Detections, each, to_device, with_image
from detector.threads import follow

log = logging.getLogger(__name__)
OLD_THRESHOLD = 0.5  # of checkpoints without an operating point


class RegionFeatures(NamedTuple):
    """What a box head makes of R boxes of one's own, float32 on the CPU."""

    features: Tensor  # [R, C, h, w], what the RoI method gives the head
    vectors: Tensor  # [R, D], what the head's predictor reads


@dataclass
class Detector:
    """A model in evaluation mode, with what its checkpoint says about it; `detector.load` makes one."""

    model: TwoStageDetector
    categories: list[str]  # names of labels 1, 2, ...; of a model without a box head only "object"
    category_ids: list[int]  # their COCO ids in the training set
    config: Mapping[str, Any]  # the run's
    preprocess: Pipeline  # the transforms that it was evaluated with
    keypoint_names: list[str] | None = None  # None if the checkpoint does not tell, and so
    contents: Mapping[str, Any] | None = None  # what the run's data held, see data/contents.py
    iteration: int | None = None  # steps that its weights have learnt
    operating_point: Mapping[str, Any] | None = None  # see evaluation/operating_point.py
    told: set[str] = field(default_factory=set, repr=False)  # what has been said of thresholds

    @property
    def device(self) -> torch.device:
        return self.model.pixel_mean.device

    @property
    def pictures(self) -> Pictures:
        """How files were read in the run."""
        return Pictures.of(self.config.get("data"))

    @property
    def max_pixels(self) -> int:
        """How many pixels an image could have in the run."""
        return self.pictures.max_pixels

    def to(self, device: str | torch.device) -> Detector:
        """Move the model; returns the detector itself."""
        self.model.to(device)
        return self

    def predict(
        self,
        image: Any,
        threshold: float | str | Mapping[str, float] = BEST,
        paste: str = "aligned",
        precision: str = "fp32",
        max_pixels: int | None = None,
        tiles: Mapping[str, Any] | None = None,
        order: str = "RGB",
        batch_size: int = 8,
    ) -> Any:
        """What is found in an image: a path, PIL.Image, array [H, W, C] or tensor [C, H, W].

        threshold: the least score. best is the checkpoint's operating point, the score of the best F1 over all classes
        on its validation images, 0.5 where it has none; per_class that of each class; {"precision": 0.9} and
        {"recall": 0.9} are the scores that reach this on those images. The result's `threshold` tells which it was.

        inference/inputs.py says how each is read. Returns a `Result`: boxes [D, 4] in pixels of the image, scores [D],
        labels [D] (1..K), valid [D] (all True) and, of a model with a mask head, masks [D, H, W] bool, of one with
        extra heads `extra`, their fields [D, ...] by name; best first, on the CPU; with names, draw, crop, to_coco and
        to_supervision. Of a list, and of a batch [N, ...], a list of results; of a generator or another iterable a
        generator of results, which takes `batch_size` images at a time.

        precision: fp32, or bf16, fp16: autocast of the network's layers. max_pixels: files of more pixels are refused;
        None: as in training. order: of arrays with three channels: RGB, or BGR as cv2.imread gives them.
        tiles: {"size": 1024, "overlap": 0.2, "whole": True} looks at a large picture tile by tile. Masks are whole all
        the same, and may fill the memory: `inference.tiles.find` gives windows instead. None: as in training.
        batch_size: images that the network sees at once, where there are several.

        Raises TypeError or ValueError that names what cannot be an image, FileNotFoundError for a path.
        """
        from detector.inference.tiles import tiles_of  # which stands on this module

        check_order(order, self.pictures.channels)
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1")
        pictures, wanted = with_max_pixels(self.pictures, max_pixels), tiles_of(self.config, tiles or {})
        options = {"threshold": self._announced(threshold), "paste": paste, "precision": precision}
        images = several(image)
        if images is None:
            if wanted.size:
                return self._by_tiles(image, pictures, order, wanted, **options)
            return self._see([image], [to_array(image, pictures, order)], pictures, **options)[0]
        if wanted.size:
            found = (self._by_tiles(one, pictures, order, wanted, **options) for one in images)
        else:
            found = self._in_batches(images, batch_size, pictures, order, **options)
        return list(found) if isinstance(images, Sequence) else found

    def predict_batch(
        self,
        images: Sequence[Any],
        threshold: float | str | Mapping[str, float] = BEST,
        paste: str = "aligned",
        precision: str = "fp32",
        max_pixels: int | None = None,
        order: str = "RGB",
    ) -> list[Result]:
        """`predict` for several images in one pass of the network."""
        pictures = with_max_pixels(self.pictures, max_pixels)
        options = {"threshold": self._announced(threshold), "paste": paste, "precision": precision}
        return list(self._in_batches(images, max(len(images), 1), pictures, order, **options))

    def _in_batches(
        self, images: Iterable, size: int, pictures: Pictures, order: str, **options: Any
    ) -> Iterator[Result]:
        """Results of images one after another, `size` of them in a pass of the network."""
        numbered = enumerate(images)
        while batch := list(islice(numbered, size)):
            arrays = []
            for number, image in batch:
                try:
                    arrays.append(to_array(image, pictures, order))
                except (TypeError, ValueError) as error:
                    if not isinstance(image, (str, os.PathLike)):  # of a file the name is told
                        error.args = (f"images[{number}]: {error}",)
                    raise
            yield from self._see([image for _, image in batch], arrays, pictures, **options)

    @torch.inference_mode()
    def _see(
        self,
        images: Sequence[Any],
        arrays: Sequence[np.ndarray],
        pictures: Pictures,
        threshold: float | np.ndarray,
        paste: str,
        precision: str,
    ) -> list[Result]:
        """Results of images, given as [H, W, C] uint8, too, in one pass of the network."""
        results = []
        for image, array, found in zip(images, arrays, detect(self.model, arrays, self.preprocess, precision)):
            keep = passing(found.scores, found.labels, threshold)
            one = each(lambda t, keep=keep: t[keep], found)
            if one.masks is not None:
                masks = paste_masks(one.masks.float().numpy(), one.boxes.numpy(), *array.shape[:2], paste=paste)
                one = one._replace(masks=torch.from_numpy(masks))
            results.append(self._result(one, threshold, Picture(image, pictures, array)))
        return results

    def _by_tiles(self, image: Any, pictures: Pictures, order: str, tiles: Tiles, **options: Any) -> Result:
        from detector.inference.tiles import find

        array = None if isinstance(image, (str, os.PathLike)) else to_array(image, pictures, order)
        with pictures.parts(check_path(image)) if array is None else pictures.parts_of(array) as picture:
            found = find(self.model, picture, tiles, self.preprocess, **options).detections()
        return self._result(found, options["threshold"], Picture(image, pictures, array))

    def _result(self, found: Detections, threshold: float | np.ndarray, picture: Picture) -> Result:
        result = Result(*found)
        result.categories, result.category_ids, result.picture = self.categories, self.category_ids, picture
        result.threshold, result.writers = threshold, writers_of(self.model)
        return result

    def least_score(self, threshold: float | str | Mapping[str, float]) -> tuple[float | np.ndarray, str]:
        """The score, or one for each class [K], that `threshold` of `predict` means, and a sentence that says which.

        Raises ConfigError for what it cannot be.
        """
        threshold = check_threshold(threshold)
        if isinstance(threshold, float):
            return threshold, f"threshold {threshold:g}: as it was given"
        if self.operating_point is None and threshold != BEST:
            raise ConfigError(
                f"threshold = {threshold!r}: the checkpoint has no operating point. Give a score, or "
                "evaluate it first: detector eval checkpoint=... leaves one beside it"
            )
        if self.operating_point is None:
            return OLD_THRESHOLD, f"threshold {OLD_THRESHOLD}: the checkpoint has no operating point"
        try:
            return thresholds(self.operating_point, threshold, self.categories)
        except (KeyError, TypeError, AttributeError, IndexError) as error:  # a file may say anything
            raise ConfigError(
                f"the checkpoint's operating point cannot be read ({error!r}); give a threshold, such as 0.5"
            ) from None

    def _announced(self, threshold: float | str | Mapping[str, float]) -> float | np.ndarray:
        """`least_score`, which is said once where it was not given."""
        least, text = self.least_score(threshold)
        if not isinstance(threshold, (int, float)) and text not in self.told:
            self.told.add(text)
            (log.info if self.operating_point else log.warning)("%s; threshold=0.3 and the like set another", text)
        return least

    @torch.inference_mode()
    def region_features(
        self,
        image: Any,
        boxes: Sequence[Sequence[float]] | np.ndarray | Tensor,
        stage: int = 0,
        precision: str = "fp32",
        max_pixels: int | None = None,
    ) -> RegionFeatures:
        """The box head's features of boxes [R, 4] = (x1, y1, x2, y2) in pixels of an image, as `predict` takes it.

        stage: of a cascade, 0 its first. precision, max_pixels: as in `predict`.
        Raises: ConfigError (a ValueError) for a model without a box head or such a stage, ValueError for boxes of
        another shape or that are not finite.
        """
        stages = self.model.box_head.stages if self.model.box_head is not None else ()
        if not 0 <= stage < len(stages):
            raise ConfigError(f"stage = {stage}: the model's box head has {len(stages)} stages, counted from 0")
        wanted = torch.as_tensor(boxes, dtype=torch.float32) if len(boxes) else torch.zeros(0, 4)
        if wanted.ndim != 2 or wanted.shape[1] != 4 or not wanted.isfinite().all():
            raise ValueError(f"boxes must be finite numbers [R, 4] = (x1, y1, x2, y2), got {list(wanted.shape)}")
        array = to_array(image, with_max_pixels(self.pictures, max_pixels))
        batch, head = self.as_batch([array]), stages[stage]
        with autocast(self.device, precision):
            features = self.model.features(batch)[: self.model.neck.roi_levels]
            scale = (batch.image_sizes / batch.original_sizes).flip(1).float().repeat(1, 2)  # (x, y, x, y)
            pooled = head.extractor(features, with_image((wanted.to(scale) * scale)[None])[0]).features
            vectors = head.trunk(pooled)
        return RegionFeatures(pooled.float().cpu(), vectors.float().cpu())

    def as_batch(self, arrays: Sequence[np.ndarray], scale: float = 1.0) -> Batch:
        """Images [H, W, C] uint8 as the model wants them, on its device; `scale` makes them smaller than usual."""
        return as_batch(self.model, arrays, self.preprocess, scale)


def detect(
    model: TwoStageDetector, arrays: Sequence[np.ndarray], preprocess: Pipeline, precision: str = "fp32"
) -> list[Detections]:
    """Valid detections in images [H, W, C] uint8, in their pixels, on the CPU; masks are probabilities in their boxes.

    model: any in evaluation mode. preprocess: the validation transforms.
    """
    follow()
    batch = as_batch(model, arrays, preprocess)
    with autocast(batch.images.device, precision):
        found = model(batch)
    found = to_original(found, batch)
    return [each(lambda t, n=n: t[n][found.valid[n]].cpu(), found) for n in range(len(arrays))]


def passing(scores: Any, labels: Any, threshold: float | np.ndarray) -> Any:
    """Which of the scores [D], a tensor or an array, reach the threshold, or that of their class [K]."""
    if np.ndim(threshold) == 0:
        return scores >= threshold
    least = np.append(threshold, np.inf)[np.asarray(labels) - 1]  # label 0 pads
    return scores >= (torch.from_numpy(least) if isinstance(scores, Tensor) else least)


def as_batch(model: TwoStageDetector, arrays: Sequence[np.ndarray], preprocess: Pipeline, scale: float = 1.0) -> Batch:
    """Images [H, W, C] uint8 after `preprocess`, resized by `scale` then, as a batch on the model's device."""
    images = [preprocess(array).image for array in arrays]
    if scale != 1:
        sizes = [[max(1, round(side * scale)) for side in image.shape[:2]] for image in images]
        images = [resized(image, *size, cv2.INTER_AREA) for image, size in zip(images, sizes)]
    numbers = range(len(arrays))
    sizes = [array.shape[:2] for array in arrays]
    batch = collate_images(images, sizes, numbers, [0 for _ in numbers], model.pad_multiple)
    return to_device(batch, next(model.parameters()).device)
