"""A convolution with bias, shortcut and ReLU in one pass, on CPUs that multiply in bf16: oneDNN's, through the operator
that torch.compile takes, too. By themselves shortcut and ReLU take longer there than many a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula


@cache
def available() -> bool:
    """Whether PyTorch has the operator, and oneDNN bf16 on this processor."""
    names = "_convolution_pointwise", "_is_mkldnn_bf16_supported"
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def takes(x: Tensor) -> bool:
    """Whether `conv` computes a convolution of x as PyTorch would at this place: in bf16, on this CPU."""
    if x.device.type != "cpu" or x.numel() == 0 or not available():
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16


def conv(x: Tensor, weight: Tensor, bias: Tensor, like: Any, relu: bool, shortcut: Tensor | None) -> Tensor:
    """(weight * x + bias + shortcut) in bf16, its positive part if relu, summed in float32 and rounded once.

    Args:
        x: [N, C, H, W]. weight: [O, C / groups, h, w]. bias: [O]. shortcut: [N, O, H', W'], as the result is.
        like: has the convolution's stride, padding, dilation and groups.
    """
    x, weight, bias = (t.to(torch.bfloat16) for t in (x, weight, bias))
    shape = like.padding, like.stride, like.dilation, like.groups
    op, channels_last = torch.ops.mkldnn._convolution_pointwise, torch.channels_last
    if shortcut is None:
        return op(x, weight, bias, *shape, "relu" if relu else "none", [], "")
    if like.groups == 1 and x.is_contiguous(memory_format=channels_last) and not x.is_contiguous():
        activation = "relu" if relu else None
        return op.binary(x, shortcut.to(torch.bfloat16), weight, bias, *shape, "add", 1.0, activation, [], "")
    out = op(x, weight, bias, *shape, "none", [], "").add_(shortcut)  # others it adds to by itself, and not in bf16
    return out.relu_() if relu else out


def _flops(x: Sequence[int], second: Sequence[int], third: Any, *rest: Any, out_shape: Sequence[int], **_: Any) -> int:
    weight = second if third is None or len(third) == 1 else third  # with a shortcut it comes before the weight
    return conv_flop_count(list(x), list(weight), list(out_shape), transposed=False)


if hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
    register_flop_formula(torch.ops.mkldnn._convolution_pointwise)(_flops)
