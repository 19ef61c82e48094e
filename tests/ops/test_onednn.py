"""Convolutions in bf16 on a CPU, in one pass with what follows them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detector.engine.optimizer import EMA
from detector.ops import layers, onednn
from tests.ops.convolutions import KINDS, check_against_layers

needs_bf16 = pytest.mark.skipif(not onednn.available(), reason="oneDNN has no bf16 on this processor")


@needs_bf16
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_layers(kind, monkeypatch):
    calls, conv = [], onednn.conv
    monkeypatch.setattr(onednn, "conv", lambda *args: calls.append(args) or conv(*args))
    check_against_layers(kind, torch.bfloat16, "cpu")
    assert len(calls) == 1


@needs_bf16
@pytest.mark.parametrize(("groups", "side", "layout"), [(2, 6, "channels_last"), (1, 6, "contiguous"), (1, 1, "both")])
def test_shortcuts_of_all_kinds(groups, side, layout):
    conv, norm = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False), layers.FrozenBatchNorm(8)
    x, more = torch.randn(2, 8, side, side), torch.randn(2, 8, side, side).bfloat16()
    if layout == "channels_last":
        x, more = (t.contiguous(memory_format=torch.channels_last) for t in (x, more))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layers.conv_norm(x, conv, norm, relu=True, shortcut=more)
    expected = (norm(conv(x)) + more).relu()
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@needs_bf16
def test_where_it_serves():
    x = torch.zeros(1, 3, 4, 4)
    assert not onednn.takes(x) and onednn.takes(x.bfloat16()) and not onednn.takes(x[:0].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.takes(x)
    with torch.autocast("cpu", torch.float16):
        assert not onednn.takes(x)


@needs_bf16
@pytest.mark.parametrize("shortcut", [False, True])
def test_its_operations_are_counted(shortcut):
    conv, norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), layers.FrozenBatchNorm(16)
    x, more, counts = torch.randn(2, 8, 5, 7), torch.randn(2, 16, 5, 7) if shortcut else None, []
    for half in (False, True):
        with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16, enabled=half):
            layers.conv_norm(x, conv, norm, shortcut=more)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 16 * 5 * 7 * 8 * 9


def test_another_pytorch_goes_without(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    onednn.available.cache_clear()
    try:
        assert not onednn.available() and not onednn.takes(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16))
    finally:
        onednn.available.cache_clear()


@needs_bf16
def test_weights_that_are_not_trained_are_made_once_and_again_when_they_change(monkeypatch):
    made, scaled = [], layers._scaled
    monkeypatch.setattr(layers, "_scaled", lambda *args: made.append(args) or scaled(*args))
    conv, norm, x = nn.Conv2d(4, 4, 3, bias=False), layers.FrozenBatchNorm(4), torch.randn(1, 4, 6, 6)
    conv.requires_grad_(False)

    def look() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return layers.conv_norm(x, conv, norm)

    looks = [look()]
    assert torch.equal(look(), looks[0]) and len(made) == 1
    norm.load_state_dict({**norm.state_dict(), "running_var": torch.full((4,), 4.0)})
    looks.append(look())
    conv.load_state_dict({"weight": torch.randn(4, 4, 3, 3)})
    looks.append(look())
    average = EMA(conv, 0.9)
    average.model = conv  # what an average of weights is looked through, too
    average.update(nn.Conv2d(4, 4, 3, bias=False), 0)
    looks.append(look())
    conv.requires_grad_(True)  # trained after all, by an optimiser that raises no version
    with torch.autocast("cpu", torch.bfloat16):
        layers.conv_norm(x, conv, norm).float().sum().backward()
    torch.optim.SGD(conv.parameters(), lr=0.1, fused=True).step()
    looks.append(look())
    conv.weight = nn.Parameter(torch.zeros_like(conv.weight), requires_grad=False)
    looks.append(look())
    assert not any(torch.equal(a, b) for a, b in zip(looks, looks[1:]))
