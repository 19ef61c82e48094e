"""RoI methods never read beyond their maps: the memory around them holds NaN, which no result may show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.roi import make_op
from tests.roi.common import STRIDES, make_awkward
from tests.roi.test_contract import CHANNELS, OPS, SIZE, build

COORDINATE = st.floats(-400, 400, width=32) | st.sampled_from([0.0, -0.5, 1e5, -1e5, 1e20, float("nan"), float("inf")])
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def fenced(size: tuple[int, int], images: int, layout: torch.memory_format, seed: int) -> torch.Tensor:
    """A map [images, CHANNELS, *size] in the middle of memory that is NaN: a whole image before and after it."""
    around = torch.full((images + 2, CHANNELS, *size), float("nan")).to(memory_format=layout)
    generator = torch.Generator().manual_seed(seed)
    around[1:-1] = torch.rand(images, CHANNELS, *size, generator=generator)
    return around[1:-1]


def framed(size: tuple[int, int], images: int, seed: int) -> torch.Tensor:
    """The same map as a window of a larger one that is NaN: three cells to every side."""
    height, width = size
    around = torch.full((images, CHANNELS, height + 6, width + 6), float("nan"))
    around[:, :, 3:-3, 3:-3] = fenced(size, images, torch.contiguous_format, seed)
    return around[:, :, 3:-3, 3:-3]


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=12)
@given(
    boxes=st.lists(st.tuples(*[COORDINATE] * 4), min_size=1, max_size=8),
    images=st.lists(st.integers(0, 1), min_size=8, max_size=8),
    levels=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    sizes=st.lists(SIZES, min_size=4, max_size=4),
)
def test_nothing_is_read_beyond_the_maps(name, boxes, images, levels, sizes):
    """Any boxes on maps of any size down to a cell, in every layout. (Images that do not exist are refused.)"""
    op = build(name, torch.float32)
    rois = torch.tensor([[image, *box] for image, box in zip(images, boxes)])
    levels = torch.tensor(levels[: len(rois)])
    results = []
    for maps in (
        [fenced(size, 2, torch.channels_last, i) for i, size in enumerate(sizes)],
        [fenced(size, 2, torch.contiguous_format, i) for i, size in enumerate(sizes)],
        [framed(size, 2, i) for i, size in enumerate(sizes)],
    ):
        features = [m.requires_grad_() for m in maps]
        out = op(features, rois, levels, STRIDES).features
        assert out.isfinite().all()
        out.sum().backward()
        assert all(f.grad is None or f.grad.isfinite().all() for f in features)
        results.append(out.detach())
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("name", OPS)
def test_the_fence_would_be_seen(name):
    """A map that does hold NaN shows it: the test above can fail."""
    op = make_op(OPS[name], SIZE, CHANNELS, 4)
    maps = [torch.full((2, CHANNELS, 9, 9), float("nan")) for _ in STRIDES]
    rois = make_awkward(torch.float32)[9:10]
    assert not op(maps, rois, torch.tensor([2]), STRIDES).features.isfinite().all()
