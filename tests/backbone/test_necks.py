"""The necks beside FPN, by their equations."""

from __future__ import annotations

import torch

from detector.backbone import FPN, PAFPN, SingleLevel

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
