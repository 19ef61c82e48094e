"""Object outlines: exact outlines of pixel masks, their extent inside an image, and the masks that they enclose.

An outline is a set of closed rings of continuous (x, y) points; pixel (column i, row j) covers [i, i+1) x [j, j+1).
COCO's polygons are rings that add up. The rings of a pixel mask follow the pixels' edges and fill by the even-odd rule,
so that a hole is just one more ring. Either way a mask is drawn no larger than its object.

Dimensions: G objects, Q rings in the order of their objects, P points in the order of their rings, S cells per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch


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


def are_whole(texts: Sequence[bytes], pixels: np.ndarray) -> np.ndarray:
    """Which [N] bool of the compressed run lengths [N] fill their mask of pixels [N] exactly.

    True where `rle_counts` would not raise, found for many at once: for short texts up to nine times as fast.
    """
    lengths = np.array([len(text) for text in texts], np.int64)
    values, last = np.frombuffer(b"".join(texts), np.uint8), lengths.cumsum()
    strange = np.concatenate([[0], np.cumsum((values < 48) | (values > 111))])
    whole = (lengths > 0) & (strange[last] == strange[last - lengths])
    whole[whole] = (values[last[whole] - 1] - 48 & 32) == 0
    if not whole.any():
        return whole
    if not whole.all():
        whole[whole] = are_whole([text for text, right in zip(texts, whole) if right], pixels[whole])
        return whole
    values = values.astype(np.int64) - 48
    ends = np.flatnonzero((values & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    shifts = np.minimum(5 * (np.arange(len(values)) - np.repeat(starts, sizes)), 35)
    runs = np.add.reduceat((values & 31) << shifts, starts)
    runs -= ((values[ends] & 16) > 0) << np.minimum(5 * sizes, 35)
    first = np.searchsorted(ends, last - lengths)  # run of each text
    owner = np.repeat(np.arange(len(texts)), np.diff(first, append=len(runs)))
    place = np.arange(len(runs)) - first[owner]
    for rows in (np.flatnonzero(place % 2 == 1), np.flatnonzero((place % 2 == 0) & (place > 0))):
        own = runs[rows]
        begins = np.flatnonzero(np.diff(owner[rows], prepend=-1))
        before = np.cumsum(own) - own
        runs[rows] = np.cumsum(own) - np.repeat(before[begins], np.diff(begins, append=len(rows)))
    wrong = (runs < 0) | (runs > pixels[owner]) | (sizes > 7)
    return (np.add.reduceat(runs, first) == pixels) & (np.bincount(owner, wrong, len(texts)) == 0)


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


def cover(outlines: Outlines, boxes: np.ndarray, side: int) -> np.ndarray:
    """Masks [G, S, S] float16 of the outlines, seen from the corner of whole pixels' boxes [G, 4] on.

    They are pycocotools' masks, by which AP is measured. Cells are pixels where the box has no more than S on a side;
    otherwise they are larger on that side, and hold the share of their area that the object covers.
    """
    boxes = np.asarray(boxes, np.int64)
    edge, column, row = _crossings(outlines, boxes)
    rings = outlines.point_rings()[edge]
    owner = outlines.ring_objects[rings]
    # in every column an outline is entered and left in turn; rings of an even-odd object are one outline
    outline = np.where(outlines.even_odd[owner], outlines.ring_objects.searchsorted(owner), rings)
    column, row = column - boxes[owner, 0], (row - boxes[owner, 1]).clip(0, boxes[owner, 3] - boxes[owner, 1])
    place = _order(outline, column, row)
    owner, column, row = owner[place], column[place], row[place]
    enters = 1 - 2 * (np.arange(len(row)) % 2)
    if len(outline) and (np.diff(outlines.ring_objects)[~outlines.even_odd[outlines.ring_objects[1:]]] == 0).any():
        # rings that add up: what counts is to enter the first of them and to leave the last
        place = _order(owner, column, row)
        owner, column, row = owner[place], column[place], row[place]
        inside = enters[place].cumsum() > 0
        enters = np.diff(inside.astype(int), prepend=0)
    # From an entry on all cells below are covered, the entry's own in part: so a sum down the rows gives the shares.
    # A pixel may lie in two cells of a row.
    cell = np.maximum(1.0, (boxes[:, 2:] - boxes[:, :2]) / side)[owner]
    y, left, right = row / cell[:, 1], column / cell[:, 0], (column + 1) / cell[:, 0]
    own_row, own_column = y.astype(int), (left + 1e-9).astype(int)
    of_row, of_column = own_row + 1 - y, np.minimum(right, own_column + 1) - left
    index = (owner * (side + 2) + own_row) * (side + 1) + own_column
    over = right - left - of_column  # in the next column of cells
    split = np.flatnonzero(over > 1e-9)
    parts = [(index, enters * of_column, of_row), (index[split] + 1, (enters * over)[split], of_row[split])]
    index, share, of_row = (torch.from_numpy(np.concatenate(values)) for values in zip(*parts))
    share, of_row = share.float(), of_row.float()
    grid = torch.zeros(len(boxes) * (side + 2) * (side + 1))
    grid.index_add_(0, index, share * of_row).index_add_(0, index + side + 1, share * (1 - of_row))
    return grid.view(-1, side + 2, side + 1)[:, :side, :side].cumsum(dim=1).half().numpy()


def _order(*keys: np.ndarray) -> np.ndarray:
    """What sorts whole numbers from 0 on by the first key, then the second, and so on."""
    joined = np.zeros(len(keys[0]), np.int64)
    for key in keys:
        joined = joined * (int(key.max(initial=0)) + 1) + key
    return joined.argsort()


def _crossings(outlines: Outlines, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where outlines toggle pixels inside their boxes [G, 4]: edges [X], columns [X] and the first rows [X] below.

    pycocotools walks along every edge in steps of a fifth of a pixel, one at a time in the direction in which it goes
    farther; the walk crosses a pixel's centre between the third and the fourth fifth of its column.
    """
    fifths = (outlines.points.astype(np.float64) * 5 + 0.5).clip(-1e9, 1e9)
    fifths += np.copysign(1e-3, fifths)  # a tenth of a pixel is a tie, which float32 must not decide
    fifths = np.trunc(fifths).astype(np.int64)
    start, end = fifths, outlines._replace(points=fifths).next_points()
    span = np.abs(end - start)
    flat = span[:, 0] >= span[:, 1]
    swap = np.where(flat, start[:, 0] > end[:, 0], start[:, 1] > end[:, 1])[:, None]
    start, end = np.where(swap, end, start), np.where(swap, start, end)
    left, right = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
    limits = boxes[outlines.ring_objects[outlines.point_rings()]]
    first = np.maximum(-(-(left - 2) // 5), limits[:, 0])
    count = (np.minimum((right - 3) // 5 + 1, limits[:, 2]) - first).clip(0)
    edge = np.repeat(np.arange(len(fifths)), count)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]

    (x, y), (dx, dy), flat = start[edge].T, (end - start)[edge].T, flat[edge]
    slope = np.where(flat, dy, dx) / np.where(flat, dx, dy)
    third = 5 * column + 2
    step = third - x

    def walked(origin: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return np.trunc(origin + slope * steps + 0.5).astype(np.int64)

    # steep edges: the last step before the centre, by the walk's own rounding
    with np.errstate(divide="ignore", invalid="ignore"):
        last = np.where(flat, 0, np.floor((step + 0.5) / slope)).astype(np.int64)

    def before(steps: np.ndarray) -> np.ndarray:
        at = walked(x, steps)
        return np.where(slope > 0, at <= third, at > third)

    last -= ~before(last)
    last += before(last + 1)
    crossed = np.where(flat, np.minimum(walked(y, step), walked(y, step + 1)), y + last)
    return edge, column, np.ceil((crossed + 0.5) / 5 - 0.5).astype(np.int64)


def grids(outlines: Outlines, boxes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks [G, S, S] float16 of the outlines, and the window [G, 4] float32 of the image that each one's cells cover.

    A window starts at the first pixel that its box [G, 4] touches. Its cells are pixels where the object has no more
    than `most` on a side; otherwise they are larger on that side, and hold the share of their area that the object
    covers. S is what the largest object needs, in sixteens, at most `most`.
    """
    first, last = np.floor(boxes[:, :2]).astype(np.int64), np.ceil(boxes[:, 2:]).astype(np.int64)
    size = last - first
    side = min(most, -(-int(size.max(initial=1)) // 16) * 16)
    masks = cover(outlines, np.concatenate([first, last], axis=1), side)
    return masks, np.concatenate([first, first + np.maximum(size, side)], axis=1).astype(np.float32)


def enlarged(masks: np.ndarray, windows: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks [G, S, S] and their windows [G, 4] of `grids` with so many cells on a side, the new ones empty."""
    more = side - masks.shape[-1]
    if not more:
        return masks, windows
    windows = windows.copy()
    windows[:, 2:] += (windows[:, 2:] - windows[:, :2]) * (more / masks.shape[-1])
    return np.pad(masks, ((0, 0), (0, more), (0, more))), windows
