"""Pasting and encoding of masks against oracles that visit every pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle_tools
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detector.ops.paste import encode_window, paste_masks, paste_window


def random_boxes(rng, count, height, width):
    centre, size = (
        rng.uniform(0, 1, (count, 2)) * [width, height],
        np.exp(rng.uniform(np.log(0.4), np.log(90), (count, 2))),
    )
    return np.concatenate([centre - size / 2, centre + size / 2], 1).astype(np.float32)


def paste_oracle(mask, box, height, width):
    """The definition, pixel by pixel: bilinear between the four nearest cell centres, zero outside the mask."""
    m = len(mask)
    image = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            if not (box[0] <= j + 0.5 < box[2] and box[1] <= i + 0.5 < box[3]):
                continue
            x, y = (j + 0.5 - box[0]) / (box[2] - box[0]) * m - 0.5, (i + 0.5 - box[1]) / (box[3] - box[1]) * m - 0.5
            for r in (int(np.floor(y)), int(np.floor(y)) + 1):
                for c in (int(np.floor(x)), int(np.floor(x)) + 1):
                    if 0 <= r < m and 0 <= c < m:
                        image[i, j] += mask[r, c] * (1 - abs(y - r)) * (1 - abs(x - c))
    return image


@pytest.mark.parametrize("seed", range(3))
def test_aligned_paste_is_the_definition(seed):
    rng = np.random.default_rng(seed)
    boxes, masks = random_boxes(rng, 12, 40, 55), rng.random((12, 7, 7)).astype(np.float32)
    values = np.stack([paste_oracle(m, b.astype(float), 40, 55) for m, b in zip(masks, boxes)])
    pasted, sure = paste_masks(masks, boxes, 40, 55), abs(values - 0.5) > 1e-4
    np.testing.assert_array_equal(pasted[sure], (values >= 0.5)[sure])
    assert sure.mean() > 0.99 and pasted.any()


def test_aligned_paste_is_grid_sample_over_the_whole_image():
    """Detectron2's way: sample the box-frame mask at every pixel centre; it differs only in reading outside the box."""
    rng = np.random.default_rng(0)
    boxes, masks = random_boxes(rng, 60, 64, 80), torch.from_numpy(rng.random((60, 28, 28)).astype(np.float32))
    x1, y1, x2, y2 = torch.from_numpy(boxes)[:, :, None].unbind(1)
    x, y = ((torch.arange(80) + 0.5 - x1) / (x2 - x1) * 2 - 1), ((torch.arange(64) + 0.5 - y1) / (y2 - y1) * 2 - 1)
    grid = torch.stack([x[:, None].expand(-1, 64, -1), y[:, :, None].expand(-1, -1, 80)], 3)
    values = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0].numpy()
    sure = abs(values - 0.5) > 1e-4
    np.testing.assert_array_equal(paste_masks(masks, boxes, 64, 80)[sure], (values >= 0.5)[sure])


@pytest.mark.parametrize("seed", range(5))
def test_torchvision_paste_is_torchvisions(seed):
    rng = np.random.default_rng(seed)
    boxes, masks = random_boxes(rng, 50, 64, 80), rng.random((50, 28, 28)).astype(np.float32)
    boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clip(0, 80), boxes[:, 1::2].clip(0, 64)
    expected = paste_masks_in_image(torch.from_numpy(masks)[:, None], torch.from_numpy(boxes), (64, 80))[:, 0].numpy()
    sure = abs(expected - 0.5) > 1e-5
    np.testing.assert_array_equal(paste_masks(masks, boxes, 64, 80, paste="torchvision")[sure], (expected > 0.5)[sure])


def test_unknown_paste():
    with pytest.raises(ValueError, match="paste is 'exact'; choose one of aligned, torchvision"):
        paste_window(np.ones((2, 2), np.float32), np.array([0, 0, 1, 1], np.float32), 4, 4, paste="exact")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_window_encoding_is_pycocotools_of_the_full_image(data):
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    h, w = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    bits = data.draw(st.lists(st.booleans(), min_size=h * w, max_size=h * w))
    full = np.zeros((height, width), np.uint8, order="F")
    full[top : top + h, left : left + w] = np.array(bits, bool).reshape(h, w)
    window = full[top : top + h, left : left + w].astype(bool)
    expected = rle_tools.encode(full)
    assert encode_window(window, top, left, height, width) == expected | {"counts": expected["counts"].decode()}


@pytest.mark.parametrize("shape", [(30, 40, 3, 5, 12, 9), (30, 40, 0, 0, 30, 40), (30, 40, 0, 31, 30, 9)])
def test_full_windows(shape):
    height, width, top, left, h, w = shape
    full = np.zeros((height, width), np.uint8, order="F")
    full[top : top + h, left : left + w] = 1
    assert (
        encode_window(np.ones((h, w), bool), top, left, height, width)["counts"]
        == rle_tools.encode(full)["counts"].decode()
    )
