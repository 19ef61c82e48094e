"""Simple copy-paste (Ghiasi et al. 2021): objects of one augmented image are put over another, without blending.

What they cover is taken out of the outlines and boxes below; objects that are covered altogether vanish.

Dimensions: G objects below, A objects above, H x W the picture below.
"""

from __future__ import annotations

import numpy as np

from detector.data.outlines import Outlines, cover, join, trace_rings, visible_bounds
from detector.data.transforms import Transformed


def paste(below: Transformed, above: Transformed, chosen: np.ndarray, shift: int, min_size: float = 1.0) -> Transformed:
    """The picture below with the `chosen` [A] bool objects of the picture above, at the same place.

    Objects need an outline to be pasted; those below without one stay until their box is covered. `kept` counts the
    objects above from `shift` on. What is left narrower or lower than `min_size` pixels is dropped.
    """
    height, width = below.image.shape[:2]
    common = min(height, above.image.shape[0]), min(width, above.image.shape[1])
    bounds = visible_bounds(above.outlines, *common)
    sides = bounds[:, 2:] - bounds[:, :2]  # -inf without an outline, and outside the picture below
    chosen = chosen & (sides >= min_size).all(axis=1)
    covered = np.zeros((height, width), bool)
    for index in np.flatnonzero(chosen):
        rows, columns = area(bounds[index], height, width)
        covered[rows, columns] |= drawn(above.outlines, index, rows, columns)
    image = below.image.copy()
    rows, columns = map(slice, common)
    np.copyto(image[rows, columns], above.image[rows, columns], where=covered[rows, columns, None])

    boxes, parts, keep = below.boxes.copy(), [], np.ones(len(below.boxes), bool)
    has_rings = below.outlines.has_rings()
    for index, box in enumerate(below.boxes):
        outline = below.outlines.select(np.arange(len(keep)) == index)
        rows, columns = area(box, height, width)
        hidden = covered[rows, columns]
        if has_rings[index] and hidden.any():
            seen = drawn(below.outlines, index, rows, columns)
            if (seen & hidden).any():
                rings = [ring + np.float32([columns.start, rows.start]) for ring in trace_rings(seen & ~hidden)]
                outline = of_rings(rings)
                if rings:
                    boxes[index] = visible_bounds(outline, height, width)[0]
                keep[index] = bool(rings)
        elif hidden.all():
            keep[index] = False
        parts.append(outline)
    keep &= (boxes[:, 2:] - boxes[:, :2] >= min_size).all(axis=1)
    parts = [part for part, stays in zip(parts, keep) if stays]
    return Transformed(
        image,
        np.concatenate([boxes[keep], bounds[chosen]]).astype(np.float32),
        join([*parts, above.outlines.select(chosen)]),
        np.concatenate([below.kept[keep], above.kept[chosen] + shift]),
        None,
    )


def area(box: np.ndarray, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels that a box touches."""
    (x1, y1), (x2, y2) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
    return slice(max(y1, 0), min(y2, height)), slice(max(x1, 0), min(x2, width))


def drawn(outlines: Outlines, index: int, rows: slice, columns: slice) -> np.ndarray:
    """The mask [rows, columns] bool of one object."""
    height, width = rows.stop - rows.start, columns.stop - columns.start
    box = np.array([[columns.start, rows.start, columns.stop, rows.stop]])
    mask = cover(outlines.select(np.arange(len(outlines.even_odd)) == index), box, max(height, width))[0]
    return mask[:height, :width] > 0.5


def of_rings(rings: list[np.ndarray]) -> Outlines:
    """The outlines of one object whose rings fill by the even-odd rule."""
    return Outlines(
        points=np.concatenate([np.zeros((0, 2), np.float32), *rings]),
        ring_starts=np.cumsum([0, *map(len, rings)]),
        ring_objects=np.zeros(len(rings), int),
        even_odd=np.ones(1, bool),
    )
