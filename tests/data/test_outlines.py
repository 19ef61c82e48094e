"""Outlines: exact round trips between run lengths, rings and pixels; extents inside the image."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from detector.data.outlines import (
    are_whole,
    cover,
    enlarged,
    grids,
    ring_area,
    rle_counts,
    run_rings,
    trace_rings,
    visible_bounds,
)
from tests.data.coco_files import outlines_of

MASKS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.integers(0, 1))


def draw(outlines, height, width):
    boxes = np.tile([[0, 0, width, height]], (len(outlines.even_odd), 1))
    return cover(outlines, boxes, max(height, width))[:, :height, :width]


@given(MASKS)
def test_run_lengths_to_rings_to_pixels_is_exact(mask):
    height, width = mask.shape
    rle = coco_mask.encode(np.asfortranarray(mask))
    runs = rle_counts(rle["counts"], height, width)
    np.testing.assert_array_equal(np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T, mask)
    for counts in (rle["counts"], rle["counts"].decode(), runs.tolist()):
        outlines = outlines_of([run_rings(rle_counts(counts, height, width), height)], even_odd=True)
        np.testing.assert_array_equal(draw(outlines, height, width)[0], mask)


@given(MASKS)
def test_signed_areas_of_traced_rings_sum_to_the_pixel_count(mask):
    assert sum(ring_area(ring) for ring in trace_rings(mask)) == mask.sum()


def test_ring_of_a_hole_is_negative():
    mask = np.ones((5, 5), np.uint8)
    mask[2, 2] = 0
    assert sorted(ring_area(ring) for ring in trace_rings(mask)) == [-1, 25]


@pytest.mark.parametrize("counts", ["", "!!", "o", [3, -1, 10], [1, 2], [1.5, 10.5], b"\xff\x00", "oooooooo0"])
def test_wrong_run_lengths_are_refused(counts):
    with pytest.raises(ValueError, match="counts"):
        rle_counts(counts, 3, 4)


def is_right(text: bytes, height: int, width: int) -> bool:
    try:
        rle_counts(text, height, width)
    except ValueError:
        return False
    return True


CHANGES = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 200), st.one_of(st.none(), st.integers(0, 255))))


@given(st.lists(MASKS, max_size=12), CHANGES, st.lists(st.binary(max_size=12), max_size=3))
def test_many_run_lengths_are_checked_as_one_is(masks, changes, others):
    """Right ones among others: with characters exchanged or left out, and any bytes."""
    texts = [bytearray(coco_mask.encode(np.asfortranarray(mask))["counts"]) for mask in masks]
    for which, place, byte in changes if texts else ():
        text = texts[which % len(texts)]
        if text:
            text[place % len(text) : place % len(text) + 1] = b"" if byte is None else bytes([byte])
    shapes = [mask.shape for mask in masks] + [(3, 4)] * len(others)
    texts = [bytes(text) for text in [*texts, *others]]
    expected = [is_right(text, *shape) for text, shape in zip(texts, shapes)]
    assert are_whole(texts, np.array([h * w for h, w in shapes], int)).tolist() == expected


def test_polygons_add_up_and_rings_of_a_mask_cancel():
    big, small = [[0, 0], [8, 0], [8, 8], [0, 8]], [[2, 2], [6, 2], [6, 6], [2, 6]]
    assert draw(outlines_of([[big, small]]), 8, 8).sum() == 64
    assert draw(outlines_of([[big, small]], even_odd=True), 8, 8).sum() == 64 - 16


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_masks_are_pycocotools(seed):
    """Of several polygons that overlap and lie partly outside: whole, in a part of the image, in larger cells."""
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 90, 2))
    rings = [
        rng.uniform(-30, 110, (rng.integers(3, 9), 2)).round(rng.integers(0, 3)) for _ in range(rng.integers(1, 4))
    ]
    coded = coco_mask.frPyObjects([ring.ravel().tolist() for ring in rings], height, width)
    theirs = coco_mask.decode(coco_mask.merge(coded))
    outlines = outlines_of([rings])
    np.testing.assert_array_equal(draw(outlines, height, width)[0], theirs)
    (x1, x2), (y1, y2) = (np.sort(rng.integers(0, side + 1, 2)) for side in (width, height))
    part = cover(outlines, np.array([[x1, y1, x2, y2]]), 90)[0]
    np.testing.assert_array_equal(part[: y2 - y1, : x2 - x1], theirs[y1:y2, x1:x2])
    assert part.sum(dtype=float) == theirs[y1:y2, x1:x2].sum()
    side = int(rng.integers(1, max(height, width) + 1))
    rows, columns = min(side, height), min(side, width)
    shares = cv2.resize(theirs.astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(
        cover(outlines, np.array([[0, 0, width, height]]), side)[0, :rows, :columns], shares, atol=1e-3
    )


def test_outlines_far_outside_cost_nothing():
    ring = [[-1e12, -1e12], [1e12, -1e12], [1e12, 1e12], [-1e12, 1e12]]
    assert draw(outlines_of([[ring]]), 20, 30).all()


def test_objects_are_drawn_into_their_own_windows():
    square = np.array([[10, 20], [14, 20], [14, 24], [10, 24]])
    boxes = np.array([[8.5, 18.2, 15.8, 26], [0, 0, 8, 8], [100, 200, 140, 240.0]])
    masks, windows = grids(outlines_of([[square], [], [square * 10]]), boxes, 8)
    np.testing.assert_array_equal(windows, [[8, 18, 16, 26], [0, 0, 8, 8], [100, 200, 140, 240]])
    expected = np.zeros((8, 8), np.uint8)
    expected[2:6, 2:6] = 1
    np.testing.assert_array_equal(masks[0], expected)
    assert masks[1].sum() == 0
    assert masks[2].all()


def test_cells_are_pixels_where_the_object_fits_and_no_more_than_it_needs():
    outlines = outlines_of([[], []])
    for boxes, most, side, windows in (
        ([[3.4, 5.6, 300.5, 8.0], [3.4, 5.6, 9.2, 8.0]], 112, 112, [[3, 5, 301, 117], [3, 5, 115, 117]]),
        ([[3.4, 5.6, 9.2, 8.0], [3.4, 5.6, 30.2, 8.0]], 112, 32, [[3, 5, 35, 37], [3, 5, 35, 37]]),
    ):
        masks, found = grids(outlines, np.array(boxes), most)
        assert masks.shape == (2, side, side) and masks.dtype == np.float16
        np.testing.assert_array_equal(found, windows)


def test_an_enlarged_grid_shows_the_same():
    ring = np.array([[3, 4], [40, 9], [20, 33]])
    masks, windows = grids(outlines_of([[ring]]), np.array([[3, 4, 40, 33.0]]), 16)
    larger, wider = enlarged(masks, windows, 20)
    np.testing.assert_array_equal(larger[:, :16, :16], masks)
    assert larger.sum() == masks.sum()
    np.testing.assert_allclose((wider[:, 2:] - wider[:, :2]) / 20, (windows[:, 2:] - windows[:, :2]) / 16)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_visible_bounds_fit_the_visible_pixels(seed, even_odd):
    """Against a fine raster of the outline inside the image."""
    rng = np.random.default_rng(seed)
    fine, height, width = 8, int(rng.integers(8, 24)), int(rng.integers(8, 24))
    rings = [rng.uniform(-20, 44, (rng.integers(3, 7), 2)) for _ in range(rng.integers(1, 3))]
    box = visible_bounds(outlines_of([rings], even_odd), height, width)[0]
    rows, columns = np.nonzero(
        draw(outlines_of([[ring * fine for ring in rings]], even_odd), height * fine, width * fine)[0]
    )
    if len(rows):
        drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / fine
        assert (box[:2] <= drawn[:2] + 1 / fine).all() and (box[2:] >= drawn[2:] - 1 / fine).all()
        assert (box >= 0).all() and box[2] <= width and box[3] <= height


def test_visible_bounds_are_tight():
    triangle = [[-10, 5], [30, -15], [30, 25]]  # its edges meet x=0 at y=0 and y=10
    np.testing.assert_allclose(visible_bounds(outlines_of([[triangle]]), 40, 10), [[0, 0, 10, 15]])
    np.testing.assert_allclose(visible_bounds(outlines_of([[triangle]]), 40, 100), [[0, 0, 30, 25]])


def test_object_around_the_whole_image_fills_it():
    around = [[-5, -5], [50, -5], [50, 50], [-5, 50]]
    outside = [[60, 60], [70, 60], [70, 70]]
    bounds = visible_bounds(outlines_of([[around], [outside]]), 20, 30)
    np.testing.assert_array_equal(bounds[0], [0, 0, 30, 20])
    assert bounds[1, 0] > bounds[1, 2]
