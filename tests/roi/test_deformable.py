"""Deformable RoI pooling: its start, its predictors, and mmdetection's layout."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from detector.ops.losses import offset_l2
from detector.roi import (
    DeformablePositionSensitiveRoIPool,
    DeformableRoIPool,
    PositionSensitiveRoIAlign,
    RoIAlign,
    RoIPool,
)
from tests.roi.common import STRIDES, levels_of, make_features, make_rois

ROIS = make_rois(20, dtype=torch.float32)
FEATURES = make_features(8, dtype=torch.float32)


def pool(op):
    return op(FEATURES, ROIS, levels_of(ROIS), STRIDES)


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("predictor", ["shared", "per_level"])
def test_starts_as_roi_align_to_the_bit(predictor, sampling_ratio):
    settings = {"sampling_ratio": sampling_ratio, "predictor": predictor, "predictor_width": 16}
    align = pool(RoIAlign((3, 4), sampling_ratio)).features
    v1 = pool(DeformableRoIPool((3, 4), 8, **settings))
    assert torch.equal(v1.features, align)
    assert torch.equal(v1.offsets, torch.zeros(20, 2, 3, 4))
    v2 = pool(DeformableRoIPool((3, 4), 8, modulated=True, **settings))
    torch.testing.assert_close(v2.features, align / 2, rtol=1e-6, atol=1e-7)
    assert torch.equal(v2.modulation, torch.full((20, 3, 4), 0.5))


def test_offsets_per_point_start_as_roi_align():
    op = DeformableRoIPool((3, 4), 8, offset_granularity="point", predictor_width=16)
    result = pool(op)
    assert result.offsets.shape == (20, 2, 6, 8)
    torch.testing.assert_close(result.features, pool(RoIAlign((3, 4))).features, rtol=1e-5, atol=1e-6)


def test_position_sensitive_starts_as_its_align():
    features = make_features(12, dtype=torch.float32)
    arguments = features, ROIS, levels_of(ROIS), STRIDES
    deformable = DeformablePositionSensitiveRoIPool((2, 3), 12, sampling_ratio=2)(*arguments)
    assert torch.equal(deformable.features, PositionSensitiveRoIAlign((2, 3))(*arguments).features)
    assert not deformable.offsets.any()


def test_the_predictor_learns_from_the_first_step():
    """The last layer starts at zero, yet gets a gradient at once; the layers before it after one step."""
    torch.manual_seed(0)
    op = DeformableRoIPool((3, 4), 8, modulated=True, predictor_width=16)
    optimizer = torch.optim.SGD(op.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        result = pool(op)
        (result.features.square().mean() + 0.1 * result.offsets.square().mean()).backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in op.parameters())
    assert pool(op).offsets.abs().max() > 0


def test_offset_loss_pulls_the_offsets_back():
    torch.manual_seed(0)
    op = DeformableRoIPool((3, 4), 8, predictor_width=16)
    torch.nn.init.normal_(op.offset_predictor[0].offsets[-1].weight)
    optimizer = torch.optim.SGD(op.parameters(), lr=0.02)
    sizes = []
    for _ in range(5):
        optimizer.zero_grad()
        offsets = pool(op).offsets
        offset_l2(offsets, torch.ones(20), torch.tensor(20.0)).backward()
        optimizer.step()
        sizes.append(offsets.square().mean().item())
    assert sizes[-1] < sizes[0]


def test_each_level_has_its_own_predictor():
    torch.manual_seed(0)
    op = DeformableRoIPool((2, 2), 8, predictor="per_level", predictor_width=4)
    for level, predictor in enumerate(op.offset_predictor):
        predictor.offsets[-1].bias.data.fill_(level + 1.0)
    levels = torch.tensor([3, 0, 1, 1, 2] * 4)
    offsets = op(FEATURES, ROIS, levels, STRIDES).offsets
    assert torch.equal(offsets, (levels + 1.0).view(20, 1, 1, 1).expand(20, 2, 2, 2))
    op(FEATURES, ROIS, torch.ones(20, dtype=torch.int64), STRIDES).features.sum().backward()
    idle = op.offset_predictor[0].offsets[-1].bias.grad
    assert (
        idle is not None and not idle.any()
    )  # takes part in the backward pass without RoIs, for DistributedDataParallel
    assert op.offset_predictor[1].offsets[-1].bias.grad.any()


def test_the_base_pooling_can_be_chosen():
    torch.manual_seed(0)
    op = DeformableRoIPool((2, 2), 8, predictor_width=4, base=partial(RoIPool, quantization="floor"))
    torch.nn.init.normal_(op.offset_predictor[0].offsets[-1].weight)
    expected = op.offset_predictor[0](pool(RoIPool((2, 2), "floor")).features)[0]
    torch.testing.assert_close(pool(op).offsets, expected)


@pytest.mark.parametrize("name", ["dpool", "mdpool"])
def test_predictors_have_the_shapes_of_mmdetections(shared, name):
    path = shared / "parity" / "layouts" / f"mmdet-faster-rcnn_r50_fpn_{name}_1x_coco.json"
    if not path.exists():
        pytest.skip(f"{path.name} is missing")
    theirs = {
        key.removeprefix("roi_head.bbox_roi_extractor.roi_layers."): tuple(shape)
        for key, shape in json.loads(path.read_text())["state_dict"].items()
        if "roi_layers" in key
    }
    with torch.device("meta"):
        op = DeformableRoIPool(7, 256, sampling_ratio=0, predictor="per_level", modulated=name == "mdpool")
    ours = {
        key.removeprefix("offset_predictor.").replace("offsets", "offset_fc").replace("modulation", "mask_fc"): tuple(
            v.shape
        )
        for key, v in op.state_dict().items()
    }
    assert ours == theirs
