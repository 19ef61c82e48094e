"""The path that exported programs take gives what the others give; what it cannot do, it refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from detector.roi import (
    PositionSensitiveRoIAlign,
    PositionSensitiveRoIPool,
    PreciseRoIPool,
    RoIAlign,
    max_bag,
    weighted_bag,
)
from detector.roi.base import use_path
from tests.roi.common import make_features, make_rois
from tests.roi.test_contract import CHANNELS, build, run
from tests.roi.test_contract import OPS as USUAL

REFUSED = {"align_max_adaptive"}
OPS = USUAL | {
    "precise_aligned": partial(PreciseRoIPool, aligned=True),
    "align_legacy": partial(RoIAlign, aligned=False),
    "align_edge": partial(RoIAlign, placement="edge"),
    "align_max_edge_legacy": partial(RoIAlign, placement="edge", reduction="max", sampling_ratio=3, aligned=False),
    "align_bicubic_per_level": partial(RoIAlign, kernel="bicubic", sampling_ratio=[2, 2, 1, 1]),
    "align_adaptive_edge": partial(RoIAlign, placement="edge", sampling_ratio=0),
    "position_sensitive_pool_torchvision": partial(PositionSensitiveRoIPool, quantization="torchvision"),
}


@pytest.mark.parametrize("name", [name for name in OPS if name not in REFUSED])
def test_same_as_the_bag(name):
    op, features = build(OPS[name]), make_features(CHANNELS)
    for rois in (make_rois(30), make_rois(0)):
        with use_path("plain"):
            plain = run(op, features, rois)
        torch.testing.assert_close(plain, run(op, features, rois))
    op, features, rois = op.float(), make_features(CHANNELS, dtype=torch.float32), make_rois(30, dtype=torch.float32)
    with use_path("plain"):
        plain = run(op, features, rois)
    torch.testing.assert_close(plain, run(op, features, rois), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "op",
    [
        RoIAlign(2, 0, reduction="max"),
        RoIAlign(2, 0, kernel="bicubic"),
        RoIAlign(2, [0, 2, 2, 2]),
        PositionSensitiveRoIAlign((2, 3), 0),
    ],
)
def test_what_follows_the_size_of_the_roi_is_refused(op):
    with use_path("plain"), pytest.raises(ValueError, match="follows the RoI's size"):
        run(op, make_features(CHANNELS), make_rois(3))


def test_bags():
    table, weights = torch.randn(10, 3), torch.rand(4, 5)
    indices, valid = torch.randint(10, (4, 5)), torch.rand(4, 5) > 0.5
    valid[0] = False
    with use_path("plain"):
        plain = weighted_bag(table, indices, weights), max_bag(table, indices, valid)
    torch.testing.assert_close(plain[0], weighted_bag(table, indices, weights))
    assert torch.equal(plain[1], max_bag(table, indices, valid)) and not plain[1][0].any()
