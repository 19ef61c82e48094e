"""Pictures as their files hold them: numbers of any type, any number of channels, whole or region by region.

Pictures of 8 bits are read by OpenCV and Pillow, other TIFF by tifffile, DICOM by pydicom, arrays by numpy. Opening a
file reads its header alone. Dimensions: H x W pixels, C channels. Pages of TIFF and frames of DICOM count from 1.
"""

from __future__ import annotations

import io
import os
import re
from abc import ABC, abstractmethod
from functools import cache, cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from detector.data.places import Entry

Source = Path | BinaryIO  # of a picture: its file's path, or what was opened where it has none
# How the files end that OpenCV decodes without a word when their end is missing.
_FILE_ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")  # JPEG, PNG
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ARRAYS, DICOM = (".npy",), (".dcm", ".dicom")
NEED = "pip install 'two-stage-detector[pictures]'"


class PictureFile(ABC):
    """The header of a picture, and what reads its pixels.

    Attributes:
        height, width, channels: of a page. dtype: of its numbers. pages: how many the file has.
        color: its first three channels are red, green and blue; a fourth is transparency or what else came along.
        limits: (least, largest) number that its type holds, None where it does not tell: of fractions.
        window: (black, white) as the file itself says, or None.
        inverted: the least number is white.
        by_regions: `region` reads about what it returns, not the whole picture.
    """

    height = width = channels = 0
    dtype = np.dtype(np.uint8)
    pages = 1
    color = inverted = by_regions = False
    limits: tuple[float, float] | None = None
    window: tuple[float, float] | None = None

    def offers(self) -> set[int]:
        """The numbers of channels that can be made of it: grey is three alike, colours give a grey."""
        return {self.channels} | ({1, 3} if self.color else {3} if self.channels == 1 else set())

    @abstractmethod
    def pixels(self, channels: int) -> np.ndarray:
        """[H, W, C] of `dtype`, upright; C is what the file has, or `channels` where the format itself knows how."""

    def region(self, rows: slice, columns: slice, channels: int) -> np.ndarray:
        """The same of some rows and columns."""
        return self.pixels(channels)[rows, columns]

    def windowed(self, pixels: np.ndarray) -> tuple[np.ndarray, tuple[float, float] | None]:
        """Pixels, and the numbers that are black and white in them, as the file itself wants to be seen."""
        return pixels, self.window

    def close(self) -> None:  # noqa: B027  # arrays hold nothing open
        """End the use of the file."""


def open_file(
    path: str | os.PathLike | Entry, channels: int, page: int | None = None, whole: bool = True
) -> PictureFile:
    """A picture file, of which `page` (None: the first) and `channels` are wanted; `whole`: its pixels will be. Of
    shards and addresses the file is then read as a whole first, else only where its header is.

    Raises FileNotFoundError, and ValueError for what is no picture or lacks the page.
    """
    if isinstance(path, Entry):
        file: BinaryIO = io.BytesIO(path.read_bytes()) if whole else path.open()
        found = _opened(file, path.suffix, file, channels, page, whole)
    else:
        path = Path(path)
        with open(path, "rb") as file:
            found = _opened(path, path.suffix, file, channels, page, whole)
    if page is not None and not 1 <= page <= found.pages:
        pages = found.pages
        found.close()
        raise ValueError(f"page {page} is wanted, and the file has {pages}")
    return found


def _opened(source: Source, suffix: str, file: BinaryIO, channels: int, page: int | None, whole: bool) -> PictureFile:
    """source: the path of a file, or itself; file: it, opened."""
    head = file.read(132)
    if head.startswith(b"\x93NUMPY"):
        return ArrayFile(source, channels)
    if head[128:] == b"DICM" or suffix.lower() in DICOM:
        return DicomFile(source, page or 1, suffix)
    if head.startswith(TIFF) and (found := open_tiff(source, channels, page)):
        return found
    if whole:
        file.seek(len(head))
    return PillowFile(source, page or 1, head + file.read() if whole else None)


def _start(source: Source) -> Source:
    """A file that was opened, from its start."""
    if not isinstance(source, Path):
        source.seek(0)
    return source


@cache
def image_suffixes() -> frozenset[str]:
    """Of the pictures that `open_file` reads, as '.jpg', in lower case: what Pillow here can open and decode itself,
    and DICOM. Arrays are not among them: some tools keep one beside each picture."""
    suffixes = Image.registered_extensions()  # makes it look for its formats
    stubs = {k for k, (opener, _) in Image.OPEN.items() if ImageFile.StubImageFile in getattr(opener, "__mro__", ())}
    others = {kind for kind, what in Image.MIME.items() if not what.startswith("image/")}  # films, PostScript
    readable = {suffix for suffix, kind in suffixes.items() if kind in Image.OPEN.keys() - stubs - others}
    return frozenset(readable) | {*DICOM}


def type_limits(dtype: np.dtype) -> tuple[float, float] | None:
    """(least, largest) number of an integer type."""
    if dtype == np.bool_:
        return 0, 1
    return (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)) if np.issubdtype(dtype, np.integer) else None


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, C] turned as an EXIF or TIFF orientation from 1 to 8 says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


class PillowFile(PictureFile):
    """What Pillow opens: 8 bits as OpenCV or Pillow make RGB of it, 16 bits and more as they are.

    data: the content of the file where it has been read.
    """

    def __init__(self, source: Source, page: int, data: bytes | None = None):
        self.source, self.page, self.data = source, page, data
        self.picture = picture = Image.open(_start(source) if data is None else io.BytesIO(data))
        self.width, self.height = picture.size
        self.dtype, self.limits = self._type()
        grey = picture.mode in ("1", "L", "LA") or picture.mode[0] in "IF"
        clear = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
        self.color, self.channels = not grey, (1 if grey else 3) + clear
        self.deep, self.orientation = self.dtype != np.uint8, 1
        if self.deep:
            self.orientation = picture.getexif().get(0x0112, 1)

    def offers(self) -> set[int]:
        return {1, 3, self.channels}

    @cached_property
    def pages(self) -> int:
        return getattr(self.picture, "n_frames", 1)  # which Pillow counts while the file is open

    def close(self) -> None:
        self.picture.close()

    def _type(self) -> tuple[np.dtype, tuple[float, float] | None]:
        """Of the file's numbers, and what they may be."""
        mode, kind = self.picture.mode, self.picture.format
        if kind == "PNG" and self._head()[24] == 16:
            return np.dtype(np.uint16), (0, 65535)
        if kind == "PPM" and (found := _netpbm(self._head())) and found[3] > 255:
            return np.dtype(np.uint16), (0, found[3])
        if mode[0] not in "IF":
            return np.dtype(np.uint8), (0, 255)
        dtype = np.dtype({"I": np.int32, "F": np.float32}.get(mode, np.uint16))
        return dtype, type_limits(dtype)

    def _head(self) -> bytes:
        if self.data is not None:
            return self.data[:1024]
        return self._content(1024)

    def _content(self, most: int = -1) -> bytes:
        if not isinstance(self.source, Path):
            return _start(self.source).read(most)
        with open(self.source, "rb") as file:
            return file.read(most)

    def pixels(self, channels: int) -> np.ndarray:
        data, picture = self._content() if self.data is None else self.data, self.picture
        if self.deep:
            return upright(self._deep_pixels(data), self.orientation)
        if self.page == 1 and channels in (1, 3) and picture.mode != "CMYK":
            whole = data.rstrip(b"\0").endswith(_FILE_ENDS)
            if whole and (pixels := _decode(data)) is not None:
                return pixels if channels == 3 else _grey(pixels, self.color)
        picture.seek(self.page - 1)
        mode = {2: "LA", 4: "RGBA"}.get(channels, "RGB")
        pixels = np.asarray(ImageOps.exif_transpose(picture).convert(mode))
        return _grey(pixels, self.color) if channels == 1 else pixels

    def _deep_pixels(self, data: bytes) -> np.ndarray:
        if self.picture.format == "PPM" and (found := _netpbm(data)):
            start, width, height, _ = found
            pixels = np.frombuffer(data, ">u2", height * width * self.channels, start)
            return pixels.astype(np.uint16).reshape(height, width, self.channels)
        if self.picture.format == "PNG":
            if not data.rstrip(b"\0").endswith(_FILE_ENDS):
                raise ValueError("image file is truncated")
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            if pixels is None:
                raise ValueError("OpenCV does not decode it")
            pixels = pixels.reshape(*pixels.shape[:2], -1)
            if pixels.shape[2] >= 3:  # blue comes first
                pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
            return pixels[..., [0, 3]] if self.channels == 2 and pixels.shape[2] == 4 else pixels
        self.picture.seek(self.page - 1)
        return np.asarray(self.picture)[..., None]


def _netpbm(data: bytes) -> tuple[int, int, int, int] | None:
    """(where the pixels start, width, height, largest number) of binary PGM and PPM."""
    space = rb"(?:\s+|\s*#[^\n]*\n\s*)"
    found = re.match(rb"P[56]" + space + rb"(\d+)" + space + rb"(\d+)" + space + rb"(\d+)\s", data)
    return (found.end(), *map(int, found.groups())) if found else None


def _decode(data: bytes) -> np.ndarray | None:
    """OpenCV's picture [H, W, 3] RGB; None where it cannot read it, or will not: more than 2^20 pixels a side."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    if pixels is not None:
        for start in range(0, len(pixels), 1024):  # in place: a large picture has no room for a second
            part = pixels[start : start + 1024]
            cv2.cvtColor(part, cv2.COLOR_BGR2RGB, dst=part)
    return pixels


def _grey(pixels: np.ndarray, color: bool) -> np.ndarray:
    """[H, W, 1] of RGB [H, W, 3] uint8, whose channels are alike unless it is in colour."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None] if color else pixels[..., :1].copy()


class ArrayFile(PictureFile):
    """numpy's .npy: [H, W] or [H, W, C]; [C, H, W] where only that fits the channels that are wanted."""

    by_regions = True

    def __init__(self, source: Source, channels: int):
        array = np.load(_start(source), mmap_mode="r" if isinstance(source, Path) else None, allow_pickle=False)
        if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
            raise ValueError(f"an array of {array.dtype} {list(array.shape)}: numbers [H, W] or [H, W, C] are needed")
        if array.ndim == 3 and array.shape[2] != channels == array.shape[0]:
            array = array.transpose(1, 2, 0)
        self.array = array.reshape(*array.shape[:2], -1) if array.ndim == 2 else array
        self.height, self.width, self.channels = self.array.shape
        self.dtype, self.limits = array.dtype.newbyteorder("="), type_limits(array.dtype)
        self.color = self.channels == 3

    def pixels(self, channels: int) -> np.ndarray:
        return np.ascontiguousarray(self.array, self.dtype)

    def region(self, rows: slice, columns: slice, channels: int) -> np.ndarray:
        return np.ascontiguousarray(self.array[rows, columns], self.dtype)


def open_tiff(source: Source, channels: int, page: int | None) -> TiffFile | None:
    """A TIFF that tifffile has to read; None for one of 8 bits that Pillow and OpenCV make RGB or grey of."""
    try:
        import tifffile
    except ImportError:
        return None
    try:
        file = tifffile.TiffFile(_start(source))
    except (tifffile.TiffFileError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"no whole TIFF ({error})") from error
    try:
        found = TiffFile(file, channels, page)
        usual = found.dtype in (np.bool_, np.uint8) and found.channels in (1, 3, 4) and channels in (1, 3)
        if not usual or not _pillow_opens(source):
            if (colors := found.planes[0].keyframe.photometric) not in (0, 1, 2):
                raise ValueError(f"colours of the kind {getattr(colors, 'name', colors)} are read of 8 bits alone")
            return found
    except Exception:
        file.close()
        raise
    file.close()
    return None


def _pillow_opens(source: Source) -> bool:
    try:
        with Image.open(_start(source)):
            return True
    except (UnidentifiedImageError, OSError, ValueError):
        return False


class TiffFile(PictureFile):
    """TIFF of any type: its pictures are the pages of all its series; axes C and S are channels.

    Pages of one channel each are the channels of one picture where just as many are wanted, more than three or two, and
    no page was chosen.
    """

    def __init__(self, file: Any, channels: int, page: int | None):
        self.file = file
        pictures = [picture for series in file.series if (made := _pictures(series)) for picture in made]
        if not pictures:
            axes = ", ".join(f"{series.axes} {list(series.shape)}" for series in file.series) or "nothing"
            raise ValueError(f"no picture that can be read: it holds {axes}")
        self.pages = len(pictures)
        chosen = pictures[min(page or 1, self.pages) - 1] if (page or 1) >= 1 else pictures[0]
        alone = all(len(p) == 1 and _samples(p[0]) == 1 for p in pictures)
        if page is None and channels not in (1, 3) and self.pages == channels and alone:
            chosen, self.pages = [p[0] for p in pictures], 1
        self.planes = chosen
        key = chosen[0].keyframe
        self.height, self.width = key.imagelength, key.imagewidth
        self.channels = len(chosen) * _samples(chosen[0])
        self.dtype = np.dtype(key.dtype).newbyteorder("=")
        self.color = key.photometric == 2 and self.channels >= 3
        self.inverted = key.photometric == 0
        bits = key.bitspersample if isinstance(key.bitspersample, int) else 0
        packed = self.dtype.kind == "u" and 0 < bits < 8 * self.dtype.itemsize
        self.limits = (0, (1 << bits) - 1) if packed else type_limits(self.dtype)
        least, largest = (_first(key, name) for name in ("SMinSampleValue", "SMaxSampleValue"))
        if least is None or largest is None:
            least, largest = (_first(key, name) for name in ("MinSampleValue", "MaxSampleValue"))
        self.window = (least, largest) if least is not None and largest is not None and least < largest else None
        self.orientation = int(_first(key, "Orientation") or 1)
        if self.orientation > 4:
            self.height, self.width = self.width, self.height
        self.by_regions = self.orientation == 1

    def pixels(self, channels: int) -> np.ndarray:
        with _decoding():
            planes = [_bands(page.asarray(), page) for page in self.planes]
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        return upright(pixels, self.orientation).astype(self.dtype, copy=False)

    def region(self, rows: slice, columns: slice, channels: int) -> np.ndarray:
        with _decoding():
            planes = [_page_region(page, rows, columns) for page in self.planes]
        return (planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)).astype(self.dtype, copy=False)

    def close(self) -> None:
        self.file.close()


class _decoding:
    """What tifffile says where it lacks a decoder, with the mend."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, (ValueError, NotImplementedError)) and "imagecodecs" in str(error):
            raise ValueError(f"{error}: {NEED}") from error


def _pictures(series: Any) -> list[list[Any]]:
    """The pages that make up each picture of a series; [] where it holds something else."""
    key = series.keyframe
    if key is None or not set("YX") <= set(key.axes) <= set("YXSC") or key.is_reduced:
        return []
    ahead = series.axes[: len(series.axes) - len(key.axes)]
    shape = series.shape[: len(ahead)]
    if (
        series.axes[len(ahead) :] != key.axes
        or len(series.pages) != prod(shape)
        or any(p is None for p in series.pages)
    ):
        return [[page] for page in series.pages if page is not None]
    grid = np.arange(prod(shape)).reshape(shape)
    grid = np.moveaxis(grid, ahead.index("C"), -1) if "C" in ahead else grid[..., None]
    return [[series.pages[int(i)] for i in row] for row in grid.reshape(-1, grid.shape[-1])]


def _samples(page: Any) -> int:
    """Channels in a page."""
    key = page.keyframe
    return key.shaped[0] * key.shaped[-1]


def _first(page: Any, name: str) -> float | None:
    tag = page.tags.get(name)
    return None if tag is None else tag.value[0] if isinstance(tag.value, tuple) else tag.value


def _bands(array: np.ndarray, page: Any) -> np.ndarray:
    """A page's array as [H, W, C]."""
    planes, _, height, width, samples = page.keyframe.shaped
    array = array.reshape(planes, height, width, samples)
    return array[0] if planes == 1 else np.moveaxis(array[..., 0], 0, -1)


def _page_region(page: Any, rows: slice, columns: slice) -> np.ndarray:
    """[h, w, C] of some rows and columns of a page: only the strips or tiles that they touch are read."""
    key = page.keyframe
    if key.is_memmappable:
        return np.array(_bands(page.asarray(out="memmap"), page)[rows, columns])
    planes, _, height, width, samples = key.shaped
    side = (key.tilelength, key.tilewidth) if key.is_tiled else (min(key.rowsperstrip, height), width)
    counts = ceil(height / side[0]), ceil(width / side[1])
    out = np.full((rows.stop - rows.start, columns.stop - columns.start, planes * samples), key.nodata, key.dtype)
    tables = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader} if key.compression in (6, 7) else {}
    for plane in range(planes):
        for i in range(rows.start // side[0], ceil(rows.stop / side[0])):
            for j in range(columns.start // side[1], ceil(columns.stop / side[1])):
                index = (plane * counts[0] + i) * counts[1] + j
                if not page.databytecounts[index]:
                    continue
                handle = page.parent.filehandle
                handle.seek(page.dataoffsets[index])
                part, *_ = key.decode(handle.read(page.databytecounts[index]), index, **tables)
                part = part[0]
                top, left = i * side[0], j * side[1]
                low = max(rows.start, top), max(columns.start, left)
                high = min(rows.stop, top + part.shape[0]), min(columns.stop, left + part.shape[1])
                to = out[low[0] - rows.start : high[0] - rows.start, low[1] - columns.start : high[1] - columns.start]
                to[..., plane * samples : (plane + 1) * samples] = part[
                    low[0] - top : high[0] - top, low[1] - left : high[1] - left
                ]
    return out


class DicomFile(PictureFile):
    """DICOM: the numbers after the modality's slope and intercept; frames are pages."""

    def __init__(self, source: Source, page: int, suffix: str):
        try:
            import pydicom
        except ImportError:
            raise ValueError(f"DICOM needs pydicom: {NEED}") from None
        self.source, self.page = source, page
        try:
            header = pydicom.dcmread(_start(source), stop_before_pixels=True, force=suffix.lower() in DICOM)
        except Exception as error:  # pydicom raises what it meets in a damaged file
            raise ValueError(f"no DICOM that can be read ({error})") from error
        if "Rows" not in header or "Columns" not in header:
            raise ValueError("DICOM without a picture")
        self.header = header
        self.height, self.width = int(header.Rows), int(header.Columns)
        self.pages = int(header.get("NumberOfFrames") or 1)
        self.palette = header.get("PhotometricInterpretation") == "PALETTE COLOR"
        self.channels = 3 if self.palette else int(header.get("SamplesPerPixel", 1))
        self.color, self.inverted = self.channels == 3, header.get("PhotometricInterpretation") == "MONOCHROME1"
        slope = self._value("PixelValueTransformationSequence", "RescaleSlope")
        intercept = self._value("PixelValueTransformationSequence", "RescaleIntercept")
        self.slope, self.intercept = float(1 if slope is None else slope), float(intercept or 0)
        bits, signed = int(header.get("BitsStored", 8)), bool(header.get("PixelRepresentation"))
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        plain = self.slope == 1 and self.intercept == 0
        self.dtype = np.dtype(np.uint8 if (low, high) == (0, 255) and plain else np.int32 if plain else np.float32)
        self.limits = tuple(sorted((low * self.slope + self.intercept, high * self.slope + self.intercept)))
        if header.get("ModalityLUTSequence"):
            self.dtype, self.limits = np.dtype(np.int32), (0, (1 << header.ModalityLUTSequence[0].LUTDescriptor[2]) - 1)
        elif self.palette:
            depth = header.RedPaletteColorLookupTableDescriptor[2]
            self.dtype, self.limits = np.dtype(np.uint8 if depth == 8 else np.int32), (0, (1 << depth) - 1)
        self.window = self._window()

    def _value(self, group: str, name: str) -> Any:
        """A value of the file, or of the frame where an enhanced file keeps it by frame or for all."""
        for sequence, index in (
            ("PerFrameFunctionalGroupsSequence", self.page - 1),
            ("SharedFunctionalGroupsSequence", 0),
        ):
            items = self.header.get(sequence) or []
            if index < len(items) and items[index].get(group) and name in items[index][group][0]:
                return items[index][group][0][name].value
        return self.header.get(name)

    def _window(self) -> tuple[float, float] | None:
        """(black, white) of the first window (PS3.3 C.11.2.1.2 and C.11.2.1.3); all that is of other shapes is left to
        `windowed`, which then works on the limits."""
        centre, width = (self._value("FrameVOILUTSequence", name) for name in ("WindowCenter", "WindowWidth"))
        if centre is None or width is None:
            return None if not self.header.get("VOILUTSequence") else self.limits
        centre, width = (
            float(value if isinstance(value, (int, float, str)) else value[0]) for value in (centre, width)
        )
        function = str(self._value("FrameVOILUTSequence", "VOILUTFunction") or "LINEAR").upper()
        if function == "SIGMOID":
            return self.limits
        if function == "LINEAR":
            centre, width = centre - 0.5, width - 1
        return (centre - width / 2, centre + width / 2) if width > 0 else None

    def pixels(self, channels: int) -> np.ndarray:
        from pydicom import pixels as tools

        try:
            array = tools.pixel_array(_start(self.source), index=self.page - 1)
            if self.palette:
                array = tools.apply_color_lut(array, self.header)
            elif self.header.get("ModalityLUTSequence"):
                array = tools.apply_modality_lut(array, self.header)
        except Exception as error:  # of any decoder
            raise ValueError(f"its pixels cannot be decoded ({error})") from error
        array = array.reshape(self.height, self.width, -1)
        if self.dtype == np.float32:
            array = array.astype(np.float32) * np.float32(self.slope) + np.float32(self.intercept)
        return array.astype(self.dtype, copy=False)

    def windowed(self, pixels: np.ndarray) -> tuple[np.ndarray, tuple[float, float] | None]:
        from pydicom import pixels as tools

        if "WindowCenter" in self.header and self.window == self.limits:
            return tools.apply_windowing(pixels, self.header), self.limits
        if self.header.get("VOILUTSequence") and "WindowCenter" not in self.header:
            bits = self.header.VOILUTSequence[0].LUTDescriptor[2]
            return tools.apply_voi(pixels.astype(np.int32), self.header), (0, (1 << bits) - 1)
        return pixels, self.window
