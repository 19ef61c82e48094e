"""Images as people hold them: files, Pillow's pictures, arrays, tensors, and several of these.

what                            how it is read
path                            as data.intensity, page and channels of the run say, turned upright
PIL.Image                       likewise; its transparency is ignored
array [H, W, C]                 uint8 as it is, three channels in RGB order (`order`: BGR, what OpenCV gives); other
                                numbers where data.intensity says which are black and white
tensor [C, H, W]                uint8 as it is; floats go from 0 to 1, or are what data.intensity says
list, tuple, [N, ...]           each of them: a list of results
iterator, generator             each of them, taken when its result is wanted
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from detector.data import Pictures

ORDERS = ("RGB", "BGR")


def several(images: Any) -> Iterable | None:
    """The images that `images` consists of; None if it is one image, or nothing that can be one."""
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else None
    if isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image, Mapping, set, frozenset)):
        return None
    return images if isinstance(images, Iterable) else None


def to_array(image: Any, pictures: Pictures, order: str = "RGB") -> np.ndarray:
    """One image as the network wants it: [H, W, C] uint8. order: of an array's three channels.

    Raises TypeError or ValueError that says what it is and how it can be given; for files as `Pictures.read`.
    """
    if isinstance(image, (str, os.PathLike)):
        return pictures.read(check_path(image))
    if isinstance(image, Image.Image):
        return _of_pillow(image, pictures)
    if isinstance(image, Tensor):
        return _of_tensor(image, pictures)
    try:
        array = pictures.of_array(image)
    except TypeError as error:
        raise TypeError(f"{error}{_mend(image, pictures)}") from None
    return np.ascontiguousarray(array[..., ::-1]) if order == "BGR" else array


def check_order(order: str, channels: int) -> None:
    """Raise ValueError unless arrays of so many channels can have the order."""
    if order not in ORDERS:
        raise ValueError(f"order = {order!r}: choose RGB or BGR")
    if order != "RGB" and channels != 3:
        raise ValueError(f"order = {order!r}: the model takes {channels} channels, which are in the order of training")


def check_path(path: str | os.PathLike) -> str | os.PathLike:
    """The path itself. Raises ValueError for text that names no single file but an address, a folder, a pattern."""
    text = os.fspath(path)
    if isinstance(text, bytes):
        raise TypeError(f"image must be a path in text, got {text[:40]!r}")
    if "://" in text[:10]:
        raise ValueError(f"image {text} is an address: give a file, or the picture as an array or PIL.Image")
    if os.path.isdir(text):
        raise ValueError(f"image {text} is a folder: give a list of files, such as sorted(Path(...).iterdir())")
    if any(sign in text for sign in "*?") and not os.path.exists(text):
        raise ValueError(f"image {text} is a pattern: give a list of files, such as sorted(glob.glob(...))")
    return path


def _of_pillow(image: Image.Image, pictures: Pictures) -> np.ndarray:
    image, channels = ImageOps.exif_transpose(image), pictures.channels
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        raise TypeError(
            f"image is a PIL.Image, which cannot have the {channels} channels of data.channels: an array can"
        )
    if image.mode[0] in "IF":  # more than 8 bits, grey
        deep = np.repeat(np.asarray(image)[..., None], channels, axis=2)
        try:
            return pictures.of_array(deep)
        except TypeError:
            raise TypeError(
                f"image is a PIL.Image of mode {image.mode}, {deep.dtype}, and the run's data.intensity does not say "
                "which numbers are black and white: give it as uint8"
            ) from None
    return pictures.of_array(np.array(image.convert(mode)))


def _of_tensor(image: Tensor, pictures: Pictures) -> np.ndarray:
    channels, shape = pictures.channels, f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
    wanted = f"image must be a tensor [{channels}, H, W]{', RGB' * (channels == 3)}"
    if image.ndim != 3 or image.shape[0] != channels:
        mend = "; image.permute(2, 0, 1) puts channels first" if image.ndim == 3 and image.shape[2] == channels else ""
        raise TypeError(f"{wanted}, got {shape}{mend}")
    image = image.detach().cpu().permute(1, 2, 0)
    if image.is_floating_point():
        image = image.float()
        if pictures.rule[0] in ("none", "file") and image.numel():  # torchvision's convention
            low, high = image.min().item(), image.max().item()
            if not (low >= 0 and high <= 1):
                mend = "image.to(torch.uint8) is right for 0 to 255" if low >= 0 else "undo its normalisation"
                raise ValueError(f"{wanted}: floats go from 0 to 1, these from {low:g} to {high:g}; {mend}")
            image = (image * 255).round().byte()
    try:
        return pictures.of_array(np.ascontiguousarray(image.numpy()))
    except TypeError:
        raise TypeError(
            f"{wanted}, uint8 or floats from 0 to 1, got {shape}; image.to(torch.uint8) makes it so"
        ) from None


def _mend(image: Any, pictures: Pictures) -> str:
    """How something that is no image could be given, as the end of a message; "" where nobody can know."""
    if image is None:
        return ", which is what cv2.imread gives for a file that it cannot read"
    if isinstance(image, (bytes, bytearray)):
        return "; PIL.Image.open(io.BytesIO(image)) is a picture"
    if not isinstance(image, np.ndarray):
        return "; a PIL.Image, a tensor [C, H, W], and lists and generators of all these are taken, too"
    channels, shape = pictures.channels, image.shape
    if image.ndim == 3 and shape[0] == channels != shape[2]:
        return "; image.transpose(1, 2, 0) puts channels last"
    if image.ndim == 2 and channels == 3:
        return "; np.dstack([image] * 3) makes three channels"
    if image.ndim == 3 and shape[2] == 4 and channels == 3:
        return "; image[..., :3] leaves transparency out"
    if image.ndim == 3 and shape[2] == channels and image.dtype.kind == "f":
        finite = image[np.isfinite(image)]
        if finite.size and finite.min() >= 0:
            factor = "255 * " if finite.max() <= 1 else ""
            return f"; np.uint8({factor}image) makes it so, or data.intensity in the training"
    return ""


class Picture:
    """Where the pixels of a result are: a file to be read again, or an array that somebody holds."""

    def __init__(self, image: Any, pictures: Pictures, array: np.ndarray | None):
        self.file = Path(image) if isinstance(image, (str, os.PathLike)) else None
        self.pictures = pictures
        self.array = array if self.file is None else None

    def pixels(self) -> np.ndarray:
        """[H, W, C] uint8."""
        return self.array if self.file is None else self.pictures.read(self.file)


def with_max_pixels(pictures: Pictures, max_pixels: int | None) -> Pictures:
    return pictures if max_pixels is None else replace(pictures, max_pixels=max_pixels)
