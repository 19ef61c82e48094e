"""The necks beside FPN, by their equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detector.backbone import FPN, PAFPN, BiFPN, SingleLevel

CHANNELS, STRIDES = [4, 8, 16], [4, 8, 16]


def maps() -> list[torch.Tensor]:
    return [torch.randn(2, c, 48 // s, 64 // s) for c, s in zip(CHANNELS, STRIDES)]


def test_path_aggregation():
    neck, x = PAFPN(CHANNELS, STRIDES, out_channels=6), maps()
    p = FPN.merge(neck, x)
    n3 = neck.downsample[0](p[0]) + p[1]
    n4 = neck.downsample[1](n3) + p[2]
    expected = [p[0], neck.bottom_up[0](n3), neck.bottom_up[1](n4)]
    found = neck(x)
    for level, wanted in zip(found, expected):
        torch.testing.assert_close(level, wanted)
    torch.testing.assert_close(found[3], expected[2][:, :, ::2, ::2])
    assert neck.strides == [4, 8, 16, 32] and neck.roi_levels == 3


def test_both_ways_with_weights():
    """The equations of the paper for four levels, written out; a negative weight counts as none."""
    torch.manual_seed(0)
    neck = BiFPN(CHANNELS, STRIDES, out_channels=6, repeats=1).eval()
    layer, x = neck.layers[0], maps()
    for fuse in [*layer.down, *layer.up]:
        torch.nn.init.uniform_(fuse.weight, 0.2, 2)
    with torch.no_grad():
        layer.up[0].weight[1] = -1

    def fuse(node, *inputs):
        w = [max(v, 0) for v in node.weight.tolist()]
        y = F.silu(sum(a * b for a, b in zip(w, inputs, strict=True)) / (sum(w) + 1e-4))
        y = F.conv2d(y, node.depthwise.weight, padding=1, groups=6)
        return node.norm(F.conv2d(y, node.pointwise.weight))

    def larger(y):
        return y.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def smaller(y):
        return F.max_pool2d(y, 3, 2, 1)

    p = [conv(y) for conv, y in zip(neck.lateral, x)]
    p.append(smaller(p[2]))
    t2 = fuse(layer.down[2], p[2], p[3].repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :3, :4])
    t1 = fuse(layer.down[1], p[1], larger(t2))
    n0 = fuse(layer.down[0], p[0], larger(t1))
    n1 = fuse(layer.up[0], p[1], t1, smaller(n0))
    n2 = fuse(layer.up[1], p[2], t2, smaller(n1))
    n3 = fuse(layer.up[2], p[3], smaller(n2))
    for level, wanted in zip(neck(x), [n0, n1, n2, n3], strict=True):
        torch.testing.assert_close(level, wanted)
    assert neck.strides == [4, 8, 16, 32] and neck.roi_levels == 3
    assert len(BiFPN(CHANNELS, STRIDES, out_channels=6, top="none")(x)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": "conv"}, "top='conv': expected 'max_pool' or 'none'"),
        ({"repeats": 0}, "repeats=0: expected at least 1"),
        ({"norm": None}, "norm=None: BiFPN needs one"),
    ],
)
def test_settings_that_make_no_bifpn(settings, message):
    with pytest.raises(ValueError, match=message):
        BiFPN(CHANNELS, STRIDES, **settings)


def test_the_top_level():
    x = maps()
    neck = FPN(CHANNELS, STRIDES, out_channels=6, top="conv")
    levels = neck(x)
    torch.testing.assert_close(levels[3], neck.output[3](levels[2]))
    assert levels[3].shape == (2, 6, 2, 2) and neck.strides == [4, 8, 16, 32] and neck.roi_levels == 3
    neck = FPN(CHANNELS, STRIDES, out_channels=6, top="none")
    assert len(neck(x)) == 3 and neck.strides == STRIDES


def test_a_single_level():
    x, neck = maps(), SingleLevel(CHANNELS, STRIDES)
    assert neck(x)[0] is x[-1] and len(neck(x)) == 1
    assert (neck.out_channels, neck.strides, neck.roi_levels) == (16, [16], 1)
