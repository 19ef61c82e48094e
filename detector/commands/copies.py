"""Pictures that are the same though their files are not: saved anew, resized, or mirrored.

A perceptual hash (imagehash's phash, BSD: the signs of a small picture's lowest frequencies) finds candidates,
and a comparison of both pictures at one size decides. Without the package there are no candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

NEAR = 6  # of 64 bits in which two hashes may differ
SAME_PICTURE = 0.95  # correlation of two pictures that are one
SIDE = 64  # px at which pictures are compared
VIEW = 400  # px, of a picture that is shown
CHUNK = 500
BITS = np.array([bin(value).count("1") for value in range(256)], np.uint8)


class Looks(NamedTuple):
    """How the images of a data set look: their indices [I], and hashes [I, 2] of each and of its mirror image."""

    index: np.ndarray
    hashes: np.ndarray


def look_of(image: np.ndarray) -> tuple[int, int] | None:
    """The hashes of an image [H, W, C] uint8 and of its mirror image; None where imagehash is not installed."""
    try:
        import imagehash
    except ImportError:
        return None
    grey = cv2.resize(
        np.ascontiguousarray(image[..., :3]).mean(-1).astype(np.uint8), (128, 128), interpolation=cv2.INTER_AREA
    )
    found = (imagehash.phash(Image.fromarray(np.ascontiguousarray(picture))) for picture in (grey, grey[:, ::-1]))
    return tuple(int.from_bytes(np.packbits(one.hash.ravel()).tobytes(), "big") for one in found)


def alike(one: Looks, other: Looks) -> Iterator[tuple[int, int, bool]]:
    """Pairs (index, index, mirrored) of images whose hashes are near, of each of `one` the nearest."""
    for start in range(0, len(one.index), CHUNK):
        own = one.hashes[start : start + CHUNK, 0]
        gaps = np.stack([_gaps(own, other.hashes[:, side]) for side in range(2)])  # [2, own, other]
        for row, gap in enumerate(gaps.transpose(1, 0, 2)):
            side, column = np.unravel_index(gap.argmin(), gap.shape)
            if gap[side, column] <= NEAR:
                yield int(one.index[start + row]), int(other.index[column]), bool(side)


def _gaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[A, B] bits in which hashes differ."""
    return BITS[(a[:, None] ^ b[None]).view(np.uint8).reshape(len(a), len(b), 8)].sum(2, dtype=np.uint8)


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of two pictures, whatever their sizes; 0 where one is of a single colour."""
    small = [
        cv2.resize(np.ascontiguousarray(p), (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(float)
        for p in (one, other)
    ]
    centred = [picture.ravel() - picture.mean() for picture in small]
    scale = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / scale) if scale else 0.0


def fitted(image: np.ndarray) -> np.ndarray:
    """An image on a square canvas, to be shown beside another."""
    scale = VIEW / max(image.shape[:2])
    small = cv2.resize(np.ascontiguousarray(image[..., :3]), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)[
        :VIEW, :VIEW
    ]
    canvas = np.full((VIEW, VIEW, 3), 255, np.uint8)
    canvas[: small.shape[0], : small.shape[1]] = small
    return canvas
