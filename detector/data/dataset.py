"""A COCO data set as samples for the detector, and batches of samples."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from detector.data.annotations import Objects
from detector.data.attributes import Groups
from detector.data.copy_paste import paste
from detector.data.file_names import find_in_folders, leads_out, nearby
from detector.data.outlines import enlarged, grids
from detector.data.pictures import Parts, PictureError, Pictures, split_page
from detector.data.places import Entry, Folder, Place, as_places
from detector.data.read_coco import Problems
from detector.data.several import Paths, as_paths, shown
from detector.data.store import open_coco
from detector.data.transforms import Pipeline, Transformed
from detector.structures import Batch, Targets

logger = logging.getLogger(__name__)

LOOKED_AT = 200  # files of each kind whose headers are read when a data set is opened
UNIFORM = (".jpg", ".jpeg")  # files whose headers tell nothing: 8 bits, in colours or grey


class Sample(NamedTuple):
    """One image after augmentation and its G objects. Shapes and units are those of `Batch` and `Targets`."""

    image: np.ndarray  # [H, W, C] uint8; C = 3: RGB
    original_size: tuple[int, int]  # (height, width) of the file
    image_id: int
    key: int
    boxes: np.ndarray  # [G, 4] float32
    labels: np.ndarray  # [G] int64
    crowd: np.ndarray  # [G] bool
    masks: np.ndarray | None  # [G, S, S] float16
    mask_windows: np.ndarray | None  # [G, 4] float32
    has_mask: np.ndarray | None  # [G] bool
    keypoints: np.ndarray | None = None  # [G, N, 3] float32
    attributes: np.ndarray | None = None  # [G, A] int64


class CocoDataset(Dataset):
    """Images and objects of a COCO annotation file, or of several, augmented.

    A sample is a pure function of (seed, epoch, index): `dataset[epoch, index]`; `dataset[index]` is epoch 0.

    Args:
        images: the folder, tar shards or address (see places.py) that the file names start from.
        annotations: COCO instances JSON. Of several files, each with its folder, or all with one, the categories are
            joined by name and the images numbered 1, 2, ...
        transforms: albumentations transforms or a `Pipeline`.
        categories: names of labels 1, 2, ... (those of the training set or the model); by default the file's own.
        masks: give masks [S, S] for objects that have an outline.
        mask_size: the largest S; see outlines.grids.
        keep_empty: keep images without objects.
        seed: of the augmentation and of `Batch.sample_keys`.
        on_error: "raise" stops at a wrong record or unreadable image; "skip" leaves it out with a warning. An image
            that turns out unreadable later is replaced by the next one in training, by a black one in evaluation.
        training: what replaces an unreadable image.
        pictures: how the files are read, and the most pixels that they may have.
        keypoints: give keypoints. Names that differ in "left" and "right" change places when a picture is mirrored.
        cache: folder that keeps parsed annotations for the next start; see `open_coco`.
        copy_paste: share of the images that get some objects of another, drawn by chance (see copy_paste.py).
        problems: collects what is wrong instead of reporting it, for those who report by themselves.
        truth: keep what evaluation compares with.
        attributes: give what objects say beside their class: see `read_coco`.
        setting: the key of a config that names `images`, and the folder that it counts from, for messages.

    Attributes:
        categories: name of label 1, 2, ...
        category_ids: COCO id of label 1, 2, ... in this file; None where the file does not have the category.
        image_ids: [I] int64, image_sizes: [I, 2] int32 (height, width).
        annotation_files, folders: as many of both. origin: the former in one text, for messages.
    """

    def __init__(
        self,
        images: Paths | Place | Sequence[Folder],
        annotations: Paths,
        transforms: Pipeline | Sequence = (),
        *,
        categories: Sequence[str] | None = None,
        masks: bool = True,
        mask_size: int = 112,
        keep_empty: bool = True,
        seed: int = 0,
        on_error: str = "raise",
        training: bool = False,
        pictures: Pictures = Pictures(),  # noqa: B008  it is frozen
        keypoints: bool = False,
        cache: str | os.PathLike | None = None,
        copy_paste: float = 0.0,
        problems: Problems | None = None,
        truth: bool = True,
        attributes: bool | Sequence[str] | Groups = False,
        setting: tuple[str, str | Path] = ("", ""),
    ):
        if mask_size < 1:
            raise ValueError(f"mask_size={mask_size}: must be positive")
        if not 0 <= copy_paste <= 1:
            raise ValueError(f"augment.copy_paste={copy_paste}: must be a share between 0 and 1")
        if copy_paste and (keypoints or not masks):
            raise ValueError(
                f"augment.copy_paste={copy_paste} needs outlines, and would cover keypoints: it cannot be used with "
                f"data.masks={masks}, data.keypoints={keypoints}"
            )
        self.copy_paste = copy_paste
        self.annotation_files, self.folders = as_paths(annotations), as_places(images, cache=cache)
        if len(self.folders) == 1:
            self.folders *= len(self.annotation_files)
        if len(self.folders) != len(self.annotation_files):
            raise ValueError(
                f"{len(self.folders)} image folders for {len(self.annotation_files)} annotation files: give one for "
                "each file, or one for all"
            )
        self.origin, self.setting = shown(self.annotation_files), setting
        self.pipeline = (
            transforms if isinstance(transforms, Pipeline) else Pipeline(transforms, channels=pictures.channels)
        )
        self.masks, self.mask_size, self.seed = masks, mask_size, seed
        self.on_error, self.training, self.pictures, self.cache = on_error, training, pictures, cache
        options = {"keypoints": keypoints, "cache": cache, "truth": truth, "problems": problems}
        options["attributes"] = self.attributes = attributes
        limit = pictures.max_pixels
        self.annotations = open_coco(self.annotation_files, categories, masks, on_error, limit, **options)
        if masks and not len(self.annotations.points):
            logger.warning("%s: masks are wanted, but no object has a segmentation", self.origin)
        usable, self.variants = self._find_files(problems)
        if not keep_empty:
            usable &= np.diff(self.annotations.object_starts) > 0
        self.rows = np.flatnonzero(usable)  # position in the data set -> position in the file
        if not len(self.rows):
            raise ValueError(f"{self.origin}: no images are left (keep_empty={keep_empty})")
        self.mirrored = mirrored_keypoints(self.annotations.keypoint_names)
        self.categories, self.category_ids = self.annotations.categories, self.annotations.category_ids
        self.image_ids = self.annotations.image_ids[self.rows]
        self.image_sizes = self.annotations.image_sizes[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def _find_files(self, problems: Problems | None) -> tuple[np.ndarray, dict[int, str]]:
        """Which images are there, [I] bool, and the paths of those whose names are written in another way."""
        names = [split_page(name)[0] for name in self.annotations.all_file_names()]
        sources = self.annotations.sources
        of_source = [[names[i] for i in np.flatnonzero(sources == s)] for s in range(len(self.folders))]
        collected, problems = problems, problems or Problems(self.origin, self.on_error)
        for folder in dict.fromkeys(folder for folder in self.folders if isinstance(folder, Place)):
            for damage in folder.check():
                problems.error("shard that is damaged or missing", damage)
        for folder, own in zip(self.folders, of_source):
            if isinstance(folder, Path) and not folder.is_dir():
                hint = self._where_else(folder, own) or f"check data.root and {self.setting[0] or 'its name'}"
                raise FileNotFoundError(f"image folder {folder} does not exist: {hint}")
        paths, variants, missing = find_in_folders(self.folders, sources, names)
        for row, text in variants.items():
            where = f"{self.name_of(row)} file_name={text}"
            problems.notice("file_name that is written in another way than the file's, which is taken", where)
        for source, (folder, own) in enumerate(zip(self.folders, of_source)):
            lacking = [row for row, text in missing.items() if sources[row] == source and text == repr(names[row])]
            if len(own) > 1 and len(lacking) == len(own):  # one mistake, not as many as there are files
                hint = self._where_else(folder, own) or f"{own[0]!r} is the first"
                problems.error("image folder without any of the files", f"{folder}: none of {len(own)}; {hint}")
                missing = {row: text for row, text in missing.items() if sources[row] != source}
        for row, text in missing.items():
            path, kind = self.folders[sources[row]] / names[row], "missing image file"
            if isinstance(path, Entry):
                path = path.place.lacks(names[row])
            elif not leads_out(names[row]) and (path.is_dir() or path.is_symlink()):
                kind = "folder in place of an image file" if path.is_dir() else "image file that is a link to nothing"
            text = path if text == repr(names[row]) else text
            problems.error(kind, f"{self.name_of(row)} file_name={text}")
        seen: dict[Path | Entry, int] = {}
        for row, path in enumerate(paths) if len(self.annotation_files) > 1 else ():
            file = self.folders[sources[row]] / (path or names[row])
            if sources[seen.setdefault(file, row)] != sources[row]:
                kind = "picture that two annotation files have: what one of them marks is background in the other"
                problems.notice(kind, str(file))
        for row in self._unfit(paths, problems):
            paths[row] = None
        if collected is None:
            problems.report()
        return np.array([path is not None for path in paths], bool), {row: paths[row] for row in variants}

    def _where_else(self, folder: Folder, names: Sequence[str]) -> str:
        """Folders nearby that have files of these names, and the setting that names one; "" where there are none."""
        if isinstance(folder, Place):
            own = min(folder.walk(), default=None)
            return f"{names[0]!r} is the first, and it holds {own!r}" if own else ""
        found = nearby(folder, names)[:3] if folder.parent.is_dir() else []
        key, root = self.setting
        ways = [f"{key}={os.path.relpath(path, root)}" for path in found] if key and len(set(self.folders)) == 1 else []
        told = f"they are in {' or '.join(map(str, found))}"
        return f"{told}: set {' or '.join(ways) or key}".removesuffix(": set ") if found else ""

    def name_of(self, row: int) -> str:
        """What messages call an image: its id, or among several annotation files, which number anew, its file."""
        if len(self.annotation_files) == 1:
            return f"image {self.annotations.image_ids[row]}"
        return f"{self.annotation_files[self.annotations.sources[row]]}: image {self.annotations.file_name(row)!r}"

    def _unfit(self, paths: Sequence[str | None], problems: Problems) -> list[int]:
        """Those of the images, looked at by their headers, that `pictures` does not say how to read."""
        kinds, unfit = defaultdict(list), []
        for row, path in enumerate(paths):
            if path is not None:
                kinds[os.path.splitext(path)[1].lower()].append(row)
        for suffix, rows in kinds.items():
            count = 1 if suffix in UNIFORM else min(LOOKED_AT, len(rows))
            for row in (rows[i] for i in np.linspace(0, len(rows) - 1, count).astype(int)):
                try:
                    self.pictures.check(
                        self.folders[self.annotations.sources[row]] / paths[row],
                        split_page(self.annotations.file_name(row))[1],
                    )
                except PictureError as error:
                    problems.error(error.kind, f"{self.name_of(row)}: {error}")
                    unfit.append(row)
                except (ValueError, OSError):
                    continue  # what is damaged is said where it is read
        return unfit

    def file_names(self) -> list[str]:
        """The file of every image of the annotations, below its folder; of those that are missing, as written."""
        names = [split_page(name)[0] for name in self.annotations.all_file_names()]
        for row, path in self.variants.items():
            names[row] = path
        return names

    def image_path(self, index: int) -> Path | Entry:
        row = int(self.rows[index])
        name = self.variants.get(row) or split_page(self.annotations.file_name(row))[0]
        return self.folders[self.annotations.sources[row]] / name

    def page(self, index: int) -> int | None:
        """Which page of its file an image is, where its file name says so."""
        return split_page(self.annotations.file_name(int(self.rows[index])))[1]

    def read(self, index: int) -> np.ndarray:
        """The image [H, W, C] uint8 as `pictures` reads it. Raises ValueError where it is not of the declared size."""
        image = self.pictures.read(self.image_path(index), self.page(index))
        self._check_size(index, *image.shape[:2])
        return image

    def _check_size(self, index: int, height: int, width: int) -> None:
        declared = self.image_sizes[index].tolist()
        if [height, width] != declared:
            raise ValueError(
                f"image {self.image_path(index)} is {width} x {height} (as its EXIF data turn it), but "
                f"{self.annotation_files[self.annotations.sources[self.rows[index]]]} says width={declared[1]} "
                f"height={declared[0]} for image id {self.image_ids[index]}"
            )

    @contextlib.contextmanager
    def parts(self, index: int) -> Iterator[Parts]:
        """An image as `read` gives it, part by part; black where it cannot be read and on_error is "skip"."""
        height, width = self.image_sizes[index].tolist()
        with contextlib.ExitStack() as stack:
            try:
                found = stack.enter_context(self.pictures.parts(self.image_path(index), self.page(index)))
                self._check_size(index, found.height, found.width)
            except (ValueError, OSError) as error:
                if self.on_error == "raise":
                    raise
                logger.warning("%s; taken as black", error)
                black = np.zeros((1, 1, self.pictures.channels), np.uint8)
                found = Parts(height, width, lambda rows, columns: np.broadcast_to(
                    black, (rows.stop - rows.start, columns.stop - columns.start, black.shape[2])).copy())  # fmt: skip
            yield found

    def __getitem__(self, position: int | tuple[int, int]) -> Sample:
        epoch, index = position if isinstance(position, tuple) else (0, position)
        key = int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)[0] >> 1)
        image, index = self._readable(index)
        objects, out = self._augmented(image, index, key)
        labels, crowd, said = objects.labels, objects.crowd, objects.attributes
        chance = np.random.default_rng((key, 1))
        if self.copy_paste and chance.random() < self.copy_paste:
            image, other = self._readable(int(chance.integers(len(self))))
            others, above = self._augmented(image, other, int(chance.integers(1 << 63)))
            free = np.flatnonzero(above.outlines.has_rings() & ~others.crowd[above.kept])
            some = chance.permutation(free)[: chance.integers(len(free) + 1)]
            chosen = np.isin(np.arange(len(above.kept)), some)
            out = paste(out, above, chosen, len(labels), self.pipeline.min_size)
            labels, crowd = np.concatenate([labels, others.labels]), np.concatenate([crowd, others.crowd])
            said = np.concatenate([said, others.attributes])
        masks = windows = has_mask = None
        if self.masks:
            masks, windows = grids(out.outlines, out.boxes, self.mask_size)
            has_mask = masks.any(axis=(1, 2))
        return Sample(
            image=out.image,
            original_size=tuple(self.image_sizes[index].tolist()),
            image_id=int(self.image_ids[index]),
            key=key,
            boxes=out.boxes,
            labels=labels[out.kept],
            crowd=crowd[out.kept],
            masks=masks,
            mask_windows=windows,
            has_mask=has_mask,
            keypoints=out.keypoints,
            attributes=said[out.kept].astype(np.int64) if self.annotations.attribute_groups else None,
        )

    def _readable(self, index: int) -> tuple[np.ndarray, int]:
        """The image and its index, or what replaces it where it cannot be read."""
        try:
            return self.read(index), index
        except (ValueError, OSError) as error:
            if self.on_error == "raise":
                raise
            logger.warning("%s; %s", error, "the next image replaces it" if self.training else "taken as black")
            return self._replacement(index)

    def _augmented(self, image: np.ndarray, index: int, seed: int) -> tuple[Objects, Transformed]:
        """The objects of image `index` as they are in the file, and what the pipeline makes of both."""
        objects = self.annotations.objects(self.rows[index])
        keypoints = objects.keypoints if self.annotations.keypoint_names else None
        return objects, self.pipeline(image, objects.boxes, objects.outlines, seed, keypoints, self.mirrored)

    def _replacement(self, index: int) -> tuple[np.ndarray, int]:
        if not self.training:
            return np.zeros((*self.image_sizes[index], self.pictures.channels), np.uint8), index
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            try:
                return self.read(other), other
            except (ValueError, OSError):
                continue
        raise ValueError(f"none of the {len(self)} images in {shown(self.folders)} can be read")


def mirrored_keypoints(names: Sequence[str]) -> list[int]:
    """[N] which keypoint each one becomes in a mirror: left_hand and right_hand change places."""
    swap = {"left": "right", "right": "left"}
    partners = [re.sub("left|right", lambda match: swap[match[0]], name) for name in names]
    return [names.index(partner) if partner in names else i for i, partner in enumerate(partners)]


def collate(
    samples: Sequence[Sample], multiple: int = 32, size: tuple[int, int] | None = None
) -> tuple[Batch, Targets]:
    """Join samples; `multiple` and `size` as in `collate_images`."""
    about = [(s.image, s.original_size, s.image_id, s.key) for s in samples]
    return collate_images(*zip(*about), multiple=multiple, size=size), collate_targets(samples)


def collate_images(
    images: Sequence[np.ndarray],
    original_sizes: Sequence[tuple[int, int]],
    image_ids: Sequence[int],
    sample_keys: Sequence[int],
    multiple: int = 32,
    size: tuple[int, int] | None = None,
) -> Batch:
    """Join images [H, W, 3] uint8, padded with zeros at the right and the bottom.

    Args:
        original_sizes, image_ids, sample_keys: of each image, see `Batch`.
        multiple: height and width of the batch are multiples of this.
        size: (height, width) of every batch instead, for compiled models.

    Raises:
        ValueError: an image is larger than `size`.
    """
    sizes = [image.shape[:2] for image in images]
    height, width = np.max(sizes, axis=0)
    if size is None:
        height, width = -(-height // multiple) * multiple, -(-width // multiple) * multiple
    elif height > size[0] or width > size[1]:
        raise ValueError(f"an image of {width} x {height} does not fit data.pad_to={list(size)} (height, width)")
    else:
        height, width = size
    canvases = torch.zeros(len(images), images[0].shape[2], height, width, dtype=torch.uint8)
    for canvas, image in zip(canvases.numpy(), images):
        for plane, channel in zip(canvas, cv2.split(image)):
            plane[: channel.shape[0], : channel.shape[1]] = channel
    return Batch(canvases, *map(torch.tensor, (sizes, original_sizes, image_ids, sample_keys)))


def collate_targets(samples: Sequence[Sample]) -> Targets:
    """Join the objects of samples; masks get as many cells as the largest of them has."""
    if samples[0].masks is not None:
        side = max(sample.masks.shape[-1] for sample in samples)
        joined = [enlarged(sample.masks, sample.mask_windows, side) for sample in samples]
        samples = [s._replace(masks=masks, mask_windows=windows) for s, (masks, windows) in zip(samples, joined)]
    counts = torch.tensor([len(sample.boxes) for sample in samples])
    most = max(1, int(counts.max()))

    def padded(name: str) -> torch.Tensor | None:
        values = [getattr(sample, name) for sample in samples]
        if values[0] is None:
            return None
        joined = np.zeros((len(values), most, *values[0].shape[1:]), values[0].dtype)
        for row, value in zip(joined, values):
            row[: len(value)] = value
        return torch.from_numpy(joined)

    names = ("boxes", "labels", "crowd", "masks", "mask_windows", "has_mask", "keypoints", "attributes")
    return Targets(valid=torch.arange(most) < counts[:, None], **{name: padded(name) for name in names})
