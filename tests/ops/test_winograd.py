"""The fast 3 x 3 convolution: values and gradients of the plain one, used only where it may be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detector.ops import winograd
from detector.ops.layers import Conv3x3


def operands(n: int, channels: int, out: int, height: int, width: int):
    torch.manual_seed(0)
    x = torch.randn(n, channels, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(out, channels, 3, 3) / (3 * channels**0.5), torch.randn(out)
    return [t.requires_grad_() for t in (x, weight, bias)]


# one tile, sizes that are no multiples of 4, several chunks of rows, several chunks of images
SHAPES = [(1, 3, 5, 1, 1), (2, 8, 4, 7, 9), (1, 4, 6, 90, 131), (3, 6, 6, 33, 130), (50, 4, 4, 14, 14)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_plain_convolution(shape, with_bias):
    x, weight, bias = operands(*shape)
    bias = bias if with_bias else None
    found = winograd.conv3x3(x, weight, bias)
    exact = F.conv2d(x.double(), weight.double(), bias if bias is None else bias.double(), padding=1)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-5)

    along = torch.randn_like(found)
    wanted = [t for t in (x, weight, bias) if t is not None]
    exact = torch.autograd.grad((exact * along.double()).sum(), wanted)
    for got, value in zip(torch.autograd.grad((found * along).sum(), wanted), exact):
        assert (got - value).abs().max() <= 2e-5 * value.abs().max()


def test_is_an_operator():
    """Schema, fake result and autograd registration are as PyTorch's compiler expects them."""
    torch.library.opcheck(winograd.conv3x3, operands(1, 4, 6, 8, 8))


def test_counts_as_many_operations():
    x, weight, bias = operands(2, 4, 6, 20, 24)
    counts = []
    for run in (winograd.conv3x3, lambda *args: F.conv2d(*args, padding=1)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(x, weight, bias)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class Count:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls, plain = 0, winograd.conv3x3

        def counted(*args):
            self.calls += 1
            return plain(*args)

        monkeypatch.setattr(winograd, "conv3x3", counted)


def test_used_where_it_is_faster(monkeypatch):
    count, layer = Count(monkeypatch), Conv3x3(256, 256)
    large = torch.randn(1, 256, 48, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = nn.Conv2d.forward(layer, large)
        torch.testing.assert_close(layer(large), exact, rtol=0, atol=1e-4)
        assert count.calls == 1
        layer(large.contiguous())  # another layout, in which imported models keep their sums as they were
        layer(large[:, :, :16])  # a small map
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(large).dtype == torch.bfloat16
        layer.double()(large.double())
        Conv3x3(256, 256, stride=2)(large)
    assert count.calls == 1
