"""From picture files to what the detector sees: [H, W, C] uint8, in training, evaluation and prediction alike.

`intensity` says which numbers of a file become 0 and 255; what lies between is spread evenly, what lies beyond is cut:

    null            files of 8 bits as they are; others are refused, for nothing tells what is black in them
    [low, high]     these numbers; [[low, high], ...] for each channel
    percentiles     of each picture and channel by itself, from the 0.5th to the 99.5th; {percentiles: [1, 99]} others
    type            the least and the largest number that the file's type can hold, such as 0 and 65535
    file            the window that the file names itself (DICOM, TIFF's SMinSampleValue); 8 bits without as they are

Dimensions: H x W pixels, C channels. Channels and pages count from 1.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from detector.data.picture_files import PictureFile, open_file, type_limits
from detector.data.places import Entry
from detector.data.slices import around
from detector.ops.checks import require

MAX_PIXELS = 100_000_000  # of an image, unless data.max_pixels says otherwise
MOST = 16  # channels
USUAL = (0.5, 99.5)  # percentiles
ROWS = 512  # that are converted at once
WORDS = ("percentiles", "type", "file")


class PictureError(ValueError):
    """A picture that the settings do not fit; `kind` says in what way, whichever file it is."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):  # it comes from other processes
        return PictureError, (self.kind, str(self))


@dataclass(frozen=True)
class Pictures:
    """How picture files are read: the settings of these names below `data`.

    Raises ValueError, naming the setting, for values that cannot be.
    """

    channels: int = 3
    intensity: Any = None
    page: int | None = None
    max_pixels: int = MAX_PIXELS
    shown: Sequence[int] | None = None
    neighbours: int = 0  # slices before and behind one, which are its channels too
    rule: tuple = field(init=False, repr=False)  # `intensity`, see _rule

    def __post_init__(self):
        channels, page, shown = self.channels, self.page, self.shown
        require(type(channels) is int and 1 <= channels <= MOST, "data.channels", channels, f"from 1 to {MOST}")
        wanted = (
            "at least 1, or null: the first; `predict` takes each, in data sets a file_name is like stack.tif#page=2"
        )
        require(page is None or (type(page) is int and page >= 1), "data.page", page, wanted)
        if shown is not None:
            fits = len(shown) == 3 and all(1 <= number <= channels for number in shown)
            require(fits, "data.shown", list(shown), f"three numbers from 1 to data.channels={channels}, or null")
            object.__setattr__(self, "shown", tuple(shown))
        object.__setattr__(self, "rule", _rule(self.intensity, channels))
        count = self.neighbours
        require(type(count) is int and 0 <= count <= 7, "data.neighbours", count, "from 0 to 7")
        if count:
            wanted = f"{2 * count + 1} with data.neighbours={count}: the slice, and {count} before and behind it"
            require(channels == 2 * count + 1, "data.channels", channels, wanted)
            once = self.rule[0] != "window" or len(self.rule) == 2
            require(
                once, "data.intensity", self.intensity, "one [low, high] with data.neighbours, whose slices are alike"
            )

    @classmethod
    def of(cls, data: Mapping[str, Any] | None) -> Pictures:
        """As the `data` node of a configuration says; keys that it lacks, in old checkpoints, have their defaults."""
        data = data or {}
        names = ("channels", "intensity", "page", "max_pixels", "shown", "neighbours")
        return cls(**{name: data[name] for name in names if name in data})

    def read(self, path: str | os.PathLike | Entry, page: int | None = None) -> np.ndarray:
        """The picture [H, W, C] uint8; `page` instead of the settings'.

        Raises FileNotFoundError, PictureError where settings and file do not fit, and ValueError for what is no
        picture, is cut short, or has more than `max_pixels` pixels.
        """
        if self.neighbours:
            return self._slices(path, page)
        with self._opened(path, page) as file:
            return self.convert(file.pixels(self.channels), file)

    @property
    def slice(self) -> Pictures:
        """How one of the slices is read that are channels."""
        return replace(self, channels=1, neighbours=0, shown=None)

    def _slices(self, path: str | os.PathLike | Entry, page: int | None) -> np.ndarray:
        """A slice [H, W, C] with its neighbours, from the first to the last."""
        one, page = self.slice, self.page if page is None else page
        pages = one.check(path, page).pages
        with self._errors(path, page):
            wanted = around(path, page, pages, self.neighbours)
        read = {key: one.read(*key) for key in dict.fromkeys(wanted)}
        sizes = {picture.shape for picture in read.values()}
        if len(sizes) > 1:
            raise ValueError(f"image {path} cannot be read: its neighbours are of other sizes: {sorted(sizes)}")
        return np.concatenate([read[key] for key in wanted], axis=2)

    @contextlib.contextmanager
    def parts(self, path: str | os.PathLike | Entry, page: int | None = None) -> Iterator[Parts]:
        """A large picture, to be read part by part where its format allows: TIFF in tiles or strips, .npy. Others, and
        all with percentiles, are decoded whole. Raises as `read`, here or where a part is read."""
        if self.neighbours:
            image = self.read(path, page)
            yield Parts(*image.shape[:2], lambda rows, columns: image[rows, columns])
            return
        with contextlib.ExitStack() as stack:
            with self._errors(path, page):
                file = stack.enter_context(contextlib.closing(self._open(path, page)))
                if not file.by_regions or self.rule[0] == "percentiles":
                    image = self.convert(file.pixels(self.channels), file)
                    file.close()
            if not file.by_regions or self.rule[0] == "percentiles":
                yield Parts(*image.shape[:2], lambda rows, columns: image[rows, columns])
                return

            def region(rows: slice, columns: slice) -> np.ndarray:
                with self._errors(path, page):
                    return self.convert(file.region(rows, columns, self.channels), file)

            yield Parts(file.height, file.width, region)

    def check(self, path: str | os.PathLike | Entry, page: int | None = None) -> PictureFile:
        """The header of a picture. Raises as `read`, but for what only its pixels show."""
        if self.neighbours:
            found = self.slice.check(path, page)
            with self._errors(path, page):
                around(path, self.page if page is None else page, found.pages, self.neighbours)
            return found
        with self._opened(path, page, whole=False) as file:
            _ = file.pages  # counted before it is closed
            return file

    @contextlib.contextmanager
    def _opened(
        self, path: str | os.PathLike | Entry, page: int | None = None, whole: bool = True
    ) -> Iterator[PictureFile]:
        """The file while its pixels are read; errors name it."""
        with self._errors(path, page), contextlib.closing(self._open(path, page, whole)) as file:
            yield file

    def _open(self, path: str | os.PathLike | Entry, page: int | None = None, whole: bool = True) -> PictureFile:
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = self.max_pixels
        file = open_file(path, self.channels, self.page if page is None else page, whole)
        try:
            if file.width * file.height > self.max_pixels:
                raise ValueError(f"{file.width} x {file.height} pixels are more than max_pixels={self.max_pixels}")
            self._fit(file)
        except ValueError:
            file.close()
            raise
        return file

    @contextlib.contextmanager
    def _errors(self, path: str | os.PathLike | Entry, page: int | None = None) -> Iterator[None]:
        """Errors in this context name the file."""
        page = self.page if page is None else page
        name = path if page is None else f"{path} (page {page})"
        try:
            yield
        except PictureError as error:
            raise PictureError(error.kind, f"image {name} cannot be read: {error}") from None
        except UnidentifiedImageError:
            raise ValueError(f"image {name} cannot be read: it is in no format of a picture") from None
        except Image.DecompressionBombError as error:
            text = f"image {name} cannot be read: more pixels than max_pixels={self.max_pixels} ({error})"
            raise ValueError(text) from error
        except FileNotFoundError:
            raise
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise ValueError(f"image {name} cannot be read: {error}") from error

    def _fit(self, file: PictureFile) -> None:
        """Raise PictureError unless these settings say how to read the file."""
        kind = self.rule[0]
        if self.channels not in file.offers():
            raise PictureError(
                "picture of other channels than data.channels",
                f"it has {file.channels} channel{'s' * (file.channels > 1)}, data.channels={self.channels}; "
                f"data.channels={file.channels} reads it",
            )
        if kind == "none" and file.dtype != np.uint8:
            own = "data.intensity=file takes the window that it names, " if file.window else ""
            full = "data.intensity=type its whole range, " if file.limits else ""
            raise PictureError(
                "picture whose numbers are not of 8 bits: data.intensity has to say which are black and white",
                f"its numbers are {file.dtype}, and nothing says which are black and white: {own}{full}"
                "data.intensity=percentiles what each picture has, data.intensity=[low,high] these numbers",
            )
        if kind == "type" and file.limits is None:
            raise PictureError(
                "picture whose type has no range, for data.intensity=type",
                f"its numbers are {file.dtype}, which may be of any size; data.intensity=[0,1] or other numbers, or "
                "percentiles, says which are black and white",
            )
        if kind == "file" and file.window is None and file.dtype != np.uint8:
            raise PictureError(
                "picture without a window of its own, for data.intensity=file",
                f"its numbers are {file.dtype}, and it names no window; data.intensity=type, percentiles or [low,high] "
                "does not need one",
            )

    def convert(self, pixels: np.ndarray, file: PictureFile) -> np.ndarray:
        """[H, W, C] uint8 of pixels [H, W, c] of a file, or of a part of it where no percentiles are asked for."""
        window = None
        if self.rule[0] == "file":
            pixels, window = file.windowed(pixels)
        few = pixels.shape[2] == 1 and len(self.rule) <= 3  # one window: grey becomes three channels at the end
        pixels = pixels if few else _fitted(pixels, self.channels)
        windows = [window] if window else self._windows(pixels, file.limits)
        out = _fitted(pixels if windows is None else stretched(pixels, windows), self.channels)
        return np.subtract(255, out, out=None if windows is None else out) if file.inverted else out

    def _windows(self, pixels: np.ndarray, limits: tuple[float, float] | None) -> Sequence[tuple[float, float]] | None:
        """(black, white) of each channel, or one for all; None where pixels are what they are."""
        kind, *values = self.rule
        if kind == "window":
            return values
        if kind == "percentiles":
            return [_percentiles(pixels[..., channel], *values) for channel in range(pixels.shape[2])]
        return [limits] if kind == "type" and limits != (0, 255) else None

    def of_array(self, image: Any) -> np.ndarray:
        """An array [H, W, C], or [H, W] of one channel, as `read` gives a file: uint8 is taken as it is.

        Raises TypeError for what is no such array, or of a type that the settings do not say how to read.
        """
        shape = "[H, W, 3] in RGB order" if self.channels == 3 else f"[H, W, {self.channels}]"
        array = image[..., None] if isinstance(image, np.ndarray) and image.ndim == 2 and self.channels == 1 else image
        numbers = isinstance(array, np.ndarray) and array.dtype.kind in "uif"
        known = numbers and (array.dtype == np.uint8 or self.rule[0] in ("window", "percentiles", "type"))
        if not known or array.ndim != 3 or array.shape[2] != self.channels:
            kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise TypeError(f"image must be a path or a uint8 array {shape}, got {kind}")
        if 0 in array.shape:
            raise ValueError(f"image is empty: {list(array.shape)}")
        if array.dtype == np.uint8:
            return array
        limits = type_limits(array.dtype)
        if self.rule[0] == "type" and limits is None:
            raise TypeError(f"image is {array.dtype}, which has no range for data.intensity=type: give it as uint8")
        return stretched(array, self._windows(array, limits))

    @contextlib.contextmanager
    def parts_of(self, image: Any) -> Iterator[Parts]:
        """`of_array` as `parts` gives a file."""
        array = self.of_array(image)
        yield Parts(*array.shape[:2], lambda rows, columns: array[rows, columns])

    def rgb(self, image: np.ndarray) -> np.ndarray:
        """The three channels [H, W, 3] that are shown of a picture [H, W, C]: `shown`, by default the first ones."""
        if image.shape[2] == 3 and self.shown is None:
            return image
        first = (1, min(2, self.channels), min(3, self.channels))
        return np.ascontiguousarray(image[..., [number - 1 for number in self.shown or first]])


@dataclass(frozen=True)
class Parts:
    """A picture of which parts are read: `region(rows, columns)`, two slices, gives [h, w, C] uint8."""

    height: int
    width: int
    region: Callable[[slice, slice], np.ndarray]

    def reduced_size(self, side: int) -> tuple[int, int]:
        """(height, width) of the picture when its longer side is at most `side`."""
        scale = min(1.0, side / max(self.height, self.width))
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    def reduced(self, side: int) -> np.ndarray:
        """The whole picture [h, w, C] of that size, made strip by strip."""
        height, width = self.reduced_size(side)
        if (height, width) == (self.height, self.width):
            return self.region(slice(0, height), slice(0, width))
        out, step = None, max(1, side * side // self.width * height // self.height)  # strips as large as a tile
        for start in range(0, height, step):
            end = min(start + step, height)
            rows = slice(start * self.height // height, -(-end * self.height // height))
            strip = self.region(rows, slice(0, self.width))
            out = np.empty((height, width, strip.shape[2]), np.uint8) if out is None else out
            out[start:end] = resized(strip, end - start, width, cv2.INTER_AREA)
        return out


def resized(image: np.ndarray, height: int, width: int, interpolation: int) -> np.ndarray:
    """OpenCV's resizing of [H, W, C] uint8 for any C: it takes four channels at once, and drops the axis of one."""
    parts = [image[..., start : start + 4] for start in range(0, image.shape[2], 4)]
    parts = [cv2.resize(np.ascontiguousarray(part), (width, height), interpolation=interpolation) for part in parts]
    return parts[0].reshape(height, width, -1) if len(parts) == 1 else np.dstack(parts)


def read_image(path: str | os.PathLike | Entry, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A file of 8 bits as [H, W, 3] uint8 RGB, turned upright as its EXIF orientation says.

    Greyscale, palette and CMYK pictures are converted, transparency is ignored. `max_pixels` is the one limit: Pillow's
    own, of the whole process, is raised where it is lower, and Pillow reads what is beyond OpenCV's.

    Raises as `Pictures.read`.
    """
    return Pictures(max_pixels=max_pixels).read(path)


def _rule(value: Any, channels: int) -> tuple:
    """("none",), ("window", (low, high), ...), ("percentiles", low, high), ("type",) or ("file",)."""
    wanted = f"[low, high], one such pair for each channel, {', '.join(WORDS)}, {{percentiles: [1, 99]}}, or null"
    if value is None:
        return ("none",)
    if isinstance(value, str):
        require(value in WORDS, "data.intensity", value, wanted)
        return (value, *USUAL) if value == "percentiles" else (value,)
    if isinstance(value, Mapping):
        pair = value.get("percentiles")
        require(set(value) == {"percentiles"} and _is_pair(pair), "data.intensity", value, wanted)
        require(0 <= pair[0] < pair[1] <= 100, "data.intensity.percentiles", list(pair), "0 <= low < high <= 100")
        return "percentiles", float(pair[0]), float(pair[1])
    pairs = [value] if _is_pair(value) else value
    right = _is_list(pairs) and len(pairs) in (1, channels) and all(map(_is_pair, pairs))
    require(right, "data.intensity", value, wanted)
    require(all(low < high for low, high in pairs), "data.intensity", value, "low < high")
    return "window", *((float(low), float(high)) for low, high in pairs)


def _is_list(value: Any) -> bool:
    """Also that of a configuration, which is no list of Python's."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_pair(value: Any) -> bool:
    numbers = _is_list(value) and len(value) == 2
    return numbers and all(type(v) in (int, float) and np.isfinite(v) for v in value)


def _fitted(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Pixels [H, W, c] with C channels: of grey three alike, of colours without what else came along, or grey."""
    own = pixels.shape[2]
    if own == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels[..., :1], 3, axis=2) if own < 3 else pixels[..., :3]
    if own < 3:
        return pixels[..., :1]
    grey = np.empty((*pixels.shape[:2], 1), pixels.dtype if pixels.dtype.kind == "f" else np.float32)
    np.matmul(pixels[..., :3], np.array([0.299, 0.587, 0.114], grey.dtype), out=grey[..., 0])
    return grey


def stretched(pixels: np.ndarray, windows: Sequence[tuple[float, float]]) -> np.ndarray:
    """[H, W, C] uint8 of numbers [H, W, C]: 0 up to the low end of a channel's window, 255 from its high end on.

    windows: one for all channels, or one for each. What is no number becomes 0.
    """
    height, _, channels = pixels.shape
    out = np.empty(pixels.shape, np.uint8)
    windows = list(windows) * (channels if len(windows) == 1 else 1)
    if pixels.dtype in (np.uint8, np.uint16, np.int16):  # few numbers: a table is several times as fast
        least, largest = type_limits(pixels.dtype)
        numbers = np.arange(least, largest + 1)
        tables = [_stretch(numbers, *window) for window in windows]
        for start in range(0, height, ROWS):
            part = pixels[start : start + ROWS]
            for channel, table in enumerate(tables):
                out[start : start + ROWS, :, channel] = table[part[..., channel].astype(np.int32) - least]
        return out
    for start in range(0, height, ROWS):
        for channel, window in enumerate(windows):
            out[start : start + ROWS, :, channel] = _stretch(pixels[start : start + ROWS, :, channel], *window)
    return out


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float64) - low) / (high - low) * 255
    return np.rint(np.nan_to_num(scaled, nan=0, posinf=255, neginf=0).clip(0, 255)).astype(np.uint8)


def _percentiles(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Of the finite numbers of a channel [H, W]."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return tuple(np.percentile(values, (low, high)).tolist()) if values.size else (0.0, 0.0)


def split_page(name: str) -> tuple[str, int | None]:
    """'stack.tif#page=3' as ('stack.tif', 3), as PDF viewers and RFC 8118 write it; others as they are, with None."""
    stem, sign, page = name.rpartition("#page=")
    return (stem, int(page)) if sign and stem and page.isdecimal() and int(page) else (name, None)
