"""Object outlines: exact outlines of pixel masks, their extent inside an image, and drawing into small grids.

An outline is a set of closed rings of continuous (x, y) points; pixel (column i, row j) covers [i, i+1) x [j, j+1).
COCO's polygons are rings that add up. The rings of a pixel mask follow the pixels' edges and fill by the even-odd rule,
so that a hole is just one more ring. Either way no mask is ever drawn at the size of the image.

Dimensions: G objects, Q rings in the order of their objects, P points in the order of their rings, S cells per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np


class Outlines(NamedTuple):
    """The rings of G objects; an object without rings has a box only."""

    points: np.ndarray  # [P, 2] float (x, y)
    ring_starts: np.ndarray  # [Q + 1] first point of each ring, and P
    ring_objects: np.ndarray  # [Q] index of each ring's object, ascending
    even_odd: np.ndarray  # [G] bool: rings fill by the even-odd rule; otherwise they add up

    def next_points(self) -> np.ndarray:
        """[P, 2] where the edge that starts at each point ends."""
        following = np.arange(1, len(self.points) + 1)
        following[self.ring_starts[1:] - 1] = self.ring_starts[:-1]
        return self.points[following]

    def point_rings(self) -> np.ndarray:
        """[P] the ring of each point."""
        return np.repeat(np.arange(len(self.ring_objects)), np.diff(self.ring_starts))

    def has_rings(self) -> np.ndarray:
        """[G] bool."""
        return np.bincount(self.ring_objects, minlength=len(self.even_odd)) > 0

    def select(self, keep: np.ndarray) -> Outlines:
        """The outlines of the objects `keep` [G] bool."""
        rings = keep[self.ring_objects]
        lengths = np.diff(self.ring_starts)
        return Outlines(
            points=self.points[np.repeat(rings, lengths)],
            ring_starts=np.concatenate([[0], np.cumsum(lengths[rings])]),
            ring_objects=(np.cumsum(keep) - 1)[self.ring_objects[rings]],
            even_odd=self.even_odd[keep],
        )


def join(parts: Sequence[Outlines]) -> Outlines:
    """The outlines of several lists of objects as those of one."""
    points = np.cumsum([0, *(len(part.points) for part in parts)])
    objects = np.cumsum([0, *(len(part.even_odd) for part in parts)])
    starts = [part.ring_starts[:-1] + first for part, first in zip(parts, points)]
    return Outlines(
        points=np.concatenate([part.points for part in parts]),
        ring_starts=np.concatenate([*starts, points[-1:]]),
        ring_objects=np.concatenate([part.ring_objects + first for part, first in zip(parts, objects)]),
        even_odd=np.concatenate([part.even_odd for part in parts]),
    )


def trace_rings(mask: np.ndarray) -> list[np.ndarray]:
    """The outline of a binary mask [H, W] as rings [P, 2] float32 along the pixels' edges.

    Filled by the even-odd rule they give back the mask exactly, holes included. Outer rings run counter-clockwise on
    the screen (positive `ring_area`), holes clockwise.
    """
    # OpenCV joins pixel centres. Seen twice as large, a pixel's two halves tell its two edges apart.
    doubled = np.ascontiguousarray(mask, np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [((contour[:, 0] + 1) // 2).astype(np.float32) for contour in contours]


def ring_area(ring: np.ndarray) -> float:
    """Signed area of a ring [P, 2]: positive where it runs counter-clockwise on the screen (y down)."""
    x, y = np.asarray(ring, np.float64).T
    return float(np.dot(y, np.roll(x, -1)) - np.dot(x, np.roll(y, -1))) / 2


def rle_counts(counts: str | bytes | list[int], height: int, width: int) -> np.ndarray:
    """The run lengths [runs] int64 of COCO's `counts`, compressed or not: background first, column by column.

    Raises ValueError where the runs do not fill height x width pixels exactly.
    """
    if isinstance(counts, list):
        runs = np.asarray(counts)
        if runs.dtype.kind not in "iu":
            raise ValueError("counts must be a list of integers")
    else:
        # As in LEB128: 5 bits a character, the lowest first; 32 says that more follow, the last one's 16 is the sign.
        text = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
        ends = np.flatnonzero((text & 32) == 0)
        if not len(ends) or ends[-1] != len(text) - 1 or text.min() < 0 or text.max() > 63:
            raise ValueError("counts is no compressed run-length string")
        starts = np.concatenate([[0], ends[:-1] + 1])
        lengths = ends - starts + 1
        if lengths.max() > 7:
            raise ValueError("counts holds a run of more than 32 bits")
        shifts = 5 * (np.arange(len(text)) - np.repeat(starts, lengths))
        runs = np.add.reduceat((text & 31) << shifts, starts)
        runs -= ((text[ends] & 16) > 0) << (5 * lengths)
        runs[1::2] = runs[1::2].cumsum()  # every run but the first three is stored as a difference to the last but one
        runs[2::2] = runs[2::2].cumsum()
    if runs.ndim != 1 or (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(f"counts covers {int(runs.sum())} pixels, size {height} x {width} has {height * width}")
    return runs.astype(np.int64)


def run_rings(runs: np.ndarray, height: int) -> list[np.ndarray]:
    """The rings [P, 2] (even-odd) around the foreground of checked run lengths [runs]; none where it is empty."""
    edges = runs.cumsum()[: len(runs) // 2 * 2]
    filled = runs[1::2] > 0
    starts, ends = edges[0::2][filled], edges[1::2][filled]
    if not len(starts):
        return []
    left, right = starts[0] // height, (ends[-1] - 1) // height + 1
    toggles = np.zeros((right - left) * height + 1, np.uint8)
    np.add.at(toggles, np.concatenate([starts, ends]) - left * height, 1)  # adjoining runs cancel out
    columns = (toggles[:-1].cumsum(dtype=np.uint8) & 1).reshape(-1, height)
    rows = np.flatnonzero(columns.any(axis=0))
    top, bottom = rows[0], rows[-1] + 1
    return [ring + np.float32([left, top]) for ring in trace_rings(columns[:, top:bottom].T)]


def visible_bounds(outlines: Outlines, height: int, width: int) -> np.ndarray:
    """Boxes [G, 4] float64 around what lies inside the image; (inf, inf, -inf, -inf) where nothing does."""
    low = np.full((len(outlines.even_odd), 2), np.inf)
    high = -low
    points = np.asarray(outlines.points, np.float64)
    if not len(points):
        return np.concatenate([low, high], axis=1)
    size = np.array([width, height], np.float64)
    rings = outlines.point_rings()
    objects = outlines.ring_objects[rings]
    inside = ((points >= 0) & (points <= size)).all()
    if not inside:  # cut every edge at the border (Liang and Barsky, 1984)
        step = outlines.next_points() - points
        with np.errstate(divide="ignore", invalid="ignore"):
            hits = np.stack([-points / step, (size - points) / step])
        parallel = step == 0
        hits[:, parallel] = np.where((points >= 0) & (points <= size), [[[-np.inf]], [[np.inf]]], np.nan)[:, parallel]
        enter = np.minimum(hits[0], hits[1]).max(axis=1).clip(min=0)  # nan where a parallel edge stays outside
        leave = np.maximum(hits[0], hits[1]).min(axis=1).clip(max=1)
        cut = enter <= leave
        first = points[cut] + enter[cut, None] * step[cut]
        last = points[cut] + leave[cut, None] * step[cut]
        # an object may cover a corner of the image without an edge near it
        corners, owners = _covered_corners(outlines, points, step, size)
        points = np.concatenate([first, last, corners]).clip(0, size)
        objects = np.concatenate([objects[cut], objects[cut], owners])
    for axis in range(2):
        np.minimum.at(low[:, axis], objects, points[:, axis])
        np.maximum.at(high[:, axis], objects, points[:, axis])
    return np.concatenate([low, high], axis=1)


def _covered_corners(outlines: Outlines, points: np.ndarray, step: np.ndarray, size: np.ndarray):
    """The image's corners that lie inside an object: their points [C, 2] and objects [C]."""
    corners = size * np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    rings = outlines.point_rings()
    covered = np.zeros((len(outlines.even_odd), 4), bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        for i, (x, y) in enumerate(corners):  # rays to the right, one parity per ring
            spans = (points[:, 1] > y) != (points[:, 1] + step[:, 1] > y)
            crossed = spans & (points[:, 0] + step[:, 0] * (y - points[:, 1]) / step[:, 1] > x)
            odd = np.bincount(rings, crossed, minlength=len(outlines.ring_objects)).astype(int) % 2
            number = np.bincount(outlines.ring_objects, odd, minlength=len(covered)).astype(int)
            covered[:, i] = np.where(outlines.even_odd, number % 2, number > 0)
    owners, which = np.nonzero(covered)
    return corners[which], owners


def fill(outlines: Outlines, windows: np.ndarray, side: int) -> np.ndarray:
    """Masks [G, S, S] uint8 0/1 of the outlines, each seen through its window [G, 4] cut into S x S cells.

    A cell is filled where its centre lies inside, so at native scale the rings of a pixel mask give the mask back.
    """
    rings = outlines.point_rings()
    objects = outlines.ring_objects[rings]
    origin, extent = windows[:, :2], windows[:, 2:] - windows[:, :2]
    scale = side / extent
    start = (outlines.points - origin[objects]) * scale[objects]
    end = (outlines.next_points() - origin[objects]) * scale[objects]
    # rings that add up get a layer each, rings of one even-odd object share one
    new_layer = np.ones(len(outlines.ring_objects), bool)
    new_layer[1:] = np.diff(outlines.ring_objects).astype(bool) | ~outlines.even_odd[outlines.ring_objects[1:]]
    layers = np.cumsum(new_layer) - 1
    # every edge toggles, in each column whose centre it passes, the cells below it
    first = np.ceil(np.minimum(start[:, 0], end[:, 0]) - 0.5).clip(0, side).astype(np.int64)
    last = np.ceil(np.maximum(start[:, 0], end[:, 0]) - 0.5).clip(0, side).astype(np.int64)
    passes = last - first
    edge = np.repeat(np.arange(len(start)), passes)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(passes) - passes, passes) + first[edge]
    x0, y0, x1, y1 = start[edge, 0], start[edge, 1], end[edge, 0], end[edge, 1]
    y = y0 + (column + 0.5 - x0) * ((y1 - y0) / (x1 - x0))
    row = np.ceil(y - 0.5).clip(0, side).astype(np.int64)
    grid = np.zeros((int(new_layer.sum()), side + 1, side), np.uint8)
    np.add.at(grid.reshape(-1), (layers[rings[edge]] * (side + 1) + row) * side + column, 1)
    for below in range(1, side):  # only the parity counts
        grid[:, below] ^= grid[:, below - 1]
    masks = np.zeros((len(outlines.even_odd), side, side), np.uint8)
    for layer, owner in zip(grid, outlines.ring_objects[new_layer]):
        masks[owner] |= layer[:side]
    return masks & 1


def mask_windows(boxes: np.ndarray, side: int) -> np.ndarray:
    """The window [G, 4] of each box [G, 4]: native scale where S cells hold it, squeezed per axis where they do not."""
    start = np.floor(boxes[:, :2])
    return np.concatenate([start, np.maximum(start + side, np.ceil(boxes[:, 2:]))], axis=1)
