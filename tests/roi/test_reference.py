"""Every fast method against its oracle: plain loops, float64, on ordinary and on awkward RoIs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from detector.roi import (
    DeformablePositionSensitiveRoIPool,
    DeformableRoIPool,
    PositionSensitiveRoIAlign,
    PositionSensitiveRoIPool,
    PreciseRoIPool,
    RoIAlign,
    RoIPool,
    RoIWarp,
    SumLevels,
    reference,
)
from tests.roi.common import STRIDES, levels_of, make_awkward, make_features, make_rois

SIZES = [(7, 7), (3, 5), (1, 1)]
ROIS = {"ordinary": make_rois(), "awkward": make_awkward()}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

ALIGN = (RoIAlign, reference.roi_align)
POOL = (RoIPool, reference.roi_pool)
METHODS = {  # class, oracle, settings of both
    "align": (*ALIGN, {}),
    "align_1_point": (*ALIGN, {"sampling_ratio": 1}),
    "align_3_points": (*ALIGN, {"sampling_ratio": 3}),
    "align_adaptive": (*ALIGN, {"sampling_ratio": 0}),
    "align_legacy": (*ALIGN, {"aligned": False}),
    "align_legacy_adaptive": (*ALIGN, {"aligned": False, "sampling_ratio": 0}),
    "align_max": (*ALIGN, {"reduction": "max"}),
    "align_max_adaptive": (*ALIGN, {"reduction": "max", "sampling_ratio": 0}),
    "align_edge": (*ALIGN, {"placement": "edge", "sampling_ratio": 3}),
    "align_edge_max": (*ALIGN, {"placement": "edge", "reduction": "max"}),
    "align_edge_adaptive": (*ALIGN, {"placement": "edge", "sampling_ratio": 0}),
    "align_bicubic": (*ALIGN, {"kernel": "bicubic"}),
    "align_lanczos": (*ALIGN, {"kernel": "lanczos", "sampling_ratio": 1}),
    "align_lanczos_adaptive": (*ALIGN, {"kernel": "lanczos", "sampling_ratio": 0}),
    "align_bicubic_max": (*ALIGN, {"kernel": "bicubic", "reduction": "max"}),
    "pool_caffe": (*POOL, {"quantization": "caffe"}),
    "pool_floor": (*POOL, {"quantization": "floor"}),
    "pool_uniform": (*POOL, {"quantization": "uniform"}),
    "warp": (RoIWarp, reference.roi_warp, {}),
    "warp_adaptive": (RoIWarp, reference.roi_warp, {"sampling_ratio": 0}),
    "precise": (PreciseRoIPool, reference.precise_roi_pool, {}),
    "precise_aligned": (PreciseRoIPool, reference.precise_roi_pool, {"aligned": True}),
}

# the oracles loop over every point or cell of a RoI: 1e5 px wide adaptive ones would take minutes
SLOW_IN_LOOPS = {
    "align_adaptive",
    "align_legacy_adaptive",
    "align_max_adaptive",
    "align_edge_adaptive",
    "align_lanczos_adaptive",
    "warp_adaptive",
}


def loopable(name: str, rois: torch.Tensor) -> torch.Tensor:
    return rois[~(rois[:, 3].abs() >= 1e5) | rois[:, 3].isinf()] if name in SLOW_IN_LOOPS else rois


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ROIS)
@pytest.mark.parametrize("name", METHODS)
def test_equals_oracle(name, kind, size):
    make, oracle, settings = METHODS[name]
    features, rois = make_features(), loopable(name, ROIS[kind])
    expected = reference.over_rois(oracle, features, rois, levels_of(rois), STRIDES, size=size, **settings)
    actual = make(size, **settings)(features, rois, levels_of(rois), STRIDES).features
    assert actual.shape == (len(rois), 3, *size)
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("kind", ROIS)
@pytest.mark.parametrize("reduction", ["avg", "max"])
@pytest.mark.parametrize(
    "ratios", [[3, 1, 2, 1], [0, 2, 1, 3], [[0, 3], [20, 1], [60.5, 2]], [[0, 1], [50, 0]]], ids=str
)
def test_ratios_per_level_and_per_size_equal_oracle(ratios, reduction, kind):
    features, rois = make_features(), loopable("align_adaptive", ROIS[kind])
    levels = torch.arange(len(rois)) % 4 if isinstance(ratios[0], int) else levels_of(rois)
    actual = RoIAlign((2, 3), ratios, reduction=reduction)(features, rois, levels, STRIDES).features
    for r, (_, x1, y1, x2, y2) in enumerate(rois.tolist()):
        if isinstance(ratios[0], int):
            ratio = ratios[levels[r]]
        else:
            size = (abs(x2 - x1) * abs(y2 - y1)) ** 0.5
            ratio = [ratio for least, ratio in ratios if size >= least or least == 0][-1]
        one = rois[r : r + 1], levels[r : r + 1]
        settings = {"size": (2, 3), "sampling_ratio": ratio, "reduction": reduction}
        expected = reference.over_rois(reference.roi_align, features, *one, STRIDES, **settings)
        torch.testing.assert_close(actual[r : r + 1], expected, **CLOSE)


@pytest.mark.parametrize("kind", ROIS)
@pytest.mark.parametrize("sampling_ratio", [2, 0])
@pytest.mark.parametrize("granularity", ["bin", "point"])
@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_equals_oracle(granularity, modulated, sampling_ratio, kind):
    if granularity == "point" and sampling_ratio == 0:
        with pytest.raises(ValueError, match="sampling_ratio"):
            DeformableRoIPool((4, 3), 3, sampling_ratio, offset_granularity="point")
        return
    size = (4, 3)
    features, rois = make_features(), loopable("align_adaptive", ROIS[kind])
    points = size if granularity == "bin" else (8, 6)
    generator = torch.Generator().manual_seed(1)
    offsets = torch.randn(len(rois), 2, *points, generator=generator, dtype=torch.float64)
    modulation = torch.rand(len(rois), *points, generator=generator, dtype=torch.float64) if modulated else None
    op = DeformableRoIPool(size, 3, sampling_ratio, gamma=0.3, modulated=modulated, offset_granularity=granularity)
    levels = levels_of(rois)
    actual = op.pool(features, rois, levels, STRIDES, offsets, modulation)
    per_roi = (offsets,) if modulation is None else (offsets, modulation)
    expected = reference.over_rois(
        reference.roi_align,
        features,
        rois,
        levels,
        STRIDES,
        *per_roi,
        size=size,
        sampling_ratio=sampling_ratio,
        gamma=0.3,
    )
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("kind", ROIS)
@pytest.mark.parametrize(
    ("make", "method", "settings"),
    [
        (PositionSensitiveRoIPool, reference.average_pool, {"quantization": "rfcn"}),
        (PositionSensitiveRoIPool, reference.average_pool, {"quantization": "torchvision"}),
        (PositionSensitiveRoIAlign, reference.roi_align, {"sampling_ratio": 2}),
        (PositionSensitiveRoIAlign, reference.roi_align, {"sampling_ratio": 0}),
    ],
)
def test_position_sensitive_equals_oracle(make, method, settings, kind):
    size = (2, 3)
    features, rois = make_features(channels=12), loopable("align_adaptive", ROIS[kind])
    oracle = partial(reference.position_sensitive, method=method, size=size, **settings)
    expected = reference.over_rois(oracle, features, rois, levels_of(rois), STRIDES)
    actual = make(size, **settings)(features, rois, levels_of(rois), STRIDES).features
    assert actual.shape == (len(rois), 2, *size)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_deformable_position_sensitive_equals_oracle():
    size, rois = (2, 3), ROIS["ordinary"]
    features, levels = make_features(channels=12), levels_of(rois)
    torch.manual_seed(0)
    op = DeformablePositionSensitiveRoIPool(size, 12, sampling_ratio=2).double()
    torch.nn.init.normal_(op.offset_predictor.weight)
    result = op(features, rois, levels, STRIDES)
    align = partial(reference.position_sensitive, method=reference.roi_align, size=size)
    fields = [op.offset_predictor(f).detach() for f in features]
    offsets = reference.over_rois(align, fields, rois, levels, STRIDES)
    torch.testing.assert_close(result.offsets.detach(), offsets, **CLOSE)
    assert offsets.abs().max() > 0.5
    expected = reference.over_rois(align, features, rois, levels, STRIDES, offsets)
    torch.testing.assert_close(result.features.detach(), expected, **CLOSE)


def test_sum_of_levels_equals_oracle():
    features, rois = make_features(), ROIS["ordinary"]
    expected = reference.sum_levels(features, rois, STRIDES, size=(3, 2))
    actual = SumLevels((3, 2), channels=3)(features, rois, levels_of(rois), STRIDES).features
    torch.testing.assert_close(actual, expected, **CLOSE)
