"""Outlines: exact round trips between run lengths, rings and pixels; extents inside the image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from detector.data.outlines import fill, mask_windows, ring_area, rle_counts, run_rings, trace_rings, visible_bounds
from tests.data.coco_files import outlines_of

MASKS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.integers(0, 1))


def draw(outlines, height, width):
    side = max(height, width)
    window = np.tile([[0.0, 0.0, side, side]], (len(outlines.even_odd), 1))
    return fill(outlines, window, side)[:, :height, :width]


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


def test_polygons_add_up_and_rings_of_a_mask_cancel():
    big, small = [[0, 0], [8, 0], [8, 8], [0, 8]], [[2, 2], [6, 2], [6, 6], [2, 6]]
    assert draw(outlines_of([[big, small]]), 8, 8).sum() == 64
    assert draw(outlines_of([[big, small]], even_odd=True), 8, 8).sum() == 64 - 16


@given(st.integers(0, 2**32 - 1))
def test_polygon_raster_agrees_with_pycocotools_up_to_the_outline(seed):
    rng = np.random.default_rng(seed)
    ring = rng.uniform(0, 64, (rng.integers(3, 9), 2))
    ours = draw(outlines_of([[ring]]), 64, 64)[0]
    theirs = coco_mask.decode(coco_mask.frPyObjects([ring.ravel().tolist()], 64, 64))[..., 0]
    closed = np.concatenate([ring, ring[:1]])
    length = np.linalg.norm(np.diff(closed, axis=0), axis=1).sum()
    assert (ours != theirs).sum() <= 1.5 * length  # they differ where an edge crosses a pixel


def test_objects_are_drawn_into_their_own_windows():
    square = np.array([[10, 20], [14, 20], [14, 24], [10, 24]])
    masks = fill(
        outlines_of([[square], [], [square * 10]]), np.array([[8, 18, 16, 26], [0, 0, 8, 8], [100, 200, 140, 240.0]]), 8
    )
    expected = np.zeros((8, 8), np.uint8)
    expected[2:6, 2:6] = 1
    np.testing.assert_array_equal(masks[0], expected)
    assert masks[1].sum() == 0
    assert masks[2].all()


def test_windows_are_native_where_the_object_fits():
    boxes = np.array([[3.4, 5.6, 9.2, 8.0], [3.4, 5.6, 300.5, 8.0]])
    np.testing.assert_array_equal(mask_windows(boxes, 112), [[3, 5, 115, 117], [3, 5, 301, 117]])


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
