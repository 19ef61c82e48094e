"""GRoIE's attention by position, bin by bin, straight from its definition."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from detector.roi import GRoIE, make_op
from detector.roi.aggregate import PositionAttention

CHANNELS, HEADS = 12, 3


def attend(op: PositionAttention, x: torch.Tensor, crossed: bool) -> torch.Tensor:
    """x [C, h, w] with what every bin takes from every second one, head by head."""
    width, (_, h, w) = CHANNELS // HEADS, x.shape
    query, value = (layer.weight[:, :, 0, 0] for layer in (op.query, op.value))
    mixed = torch.zeros(CHANNELS, h, w, dtype=x.dtype)
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        for i in range(h):
            for j in range(w):
                across, down = query[part] @ x[:, i, j], query[part] @ (x[:, j, i] if crossed else x[:, i, j])
                others = [(k, m) for k in range(0, h, 2) for m in range(0, w, 2)]
                logits = [
                    across @ (op.distance_x.weight[part] @ wave(j - m))
                    + down @ (op.distance_y.weight[part] @ wave(i - k))
                    for k, m in others
                ]
                shares = torch.stack(logits).div(2**0.5).softmax(0)
                mixed[part, i, j] = sum(share * (value[part] @ x[:, k, m]) for share, (k, m) in zip(shares, others))
    project = op.project.weight[:, :, 0, 0]
    return x + op.gamma * (torch.einsum("oc,chw->ohw", project, mixed) + op.project.bias[:, None, None])


def wave(distance: int) -> torch.Tensor:
    """[C / 2]: sines and cosines of a distance at wavelengths from 2 pi to 2000 pi."""
    angles = distance / 1000.0 ** (torch.arange(CHANNELS // 4, dtype=torch.float64) * 4 / CHANNELS)
    return torch.cat([angles.sin(), angles.cos()])


@pytest.mark.parametrize("size, crossed", [((5, 5), True), ((5, 5), False), ((4, 3), False)])
def test_attention_by_position(size, crossed):
    torch.manual_seed(0)
    op = PositionAttention(CHANNELS, heads=HEADS, crossed=crossed).double()
    op.scales = op.scales.new_tensor([1000.0 ** (4 * i / CHANNELS) for i in range(CHANNELS // 4)])
    torch.nn.init.constant_(op.gamma, 0.7)
    x = torch.randn(2, CHANNELS, *size, dtype=torch.float64)
    torch.testing.assert_close(op(x), torch.stack([attend(op, one, crossed) for one in x]))


def test_it_starts_as_the_sum_of_levels():
    x = torch.randn(2, CHANNELS, 3, 4)
    assert torch.equal(PositionAttention(CHANNELS)(x), x)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="attention must be one of 'content', 'position', 'mmdetection'"):
        make_op(partial(GRoIE, attention="both"), 7, 16)
    with pytest.raises(ValueError, match="multiple of 4 channels"):
        PositionAttention(10)
    with pytest.raises(ValueError, match="as many rows of bins as columns"):
        PositionAttention(CHANNELS, crossed=True)(torch.zeros(1, CHANNELS, 3, 4))
