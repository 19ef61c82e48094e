"""3 x 3 convolution in a quarter of the multiplications, for CPUs (GPU libraries have it built in).

Lavin and Gray 2016, 'Fast algorithms for convolutional neural networks', F(4 x 4, 3 x 3): a kernel g makes the 4 x 4
outputs Y of a channel from its 6 x 6 inputs d as

    Y = A [(G g G') * (B d B')] A'

whose element-wise product, summed over the input channels, is 36 matrix products. In float32 it rounds about four times
as coarsely as the plain sum.

Dimensions: N images, C input and O output channels, T tiles of 4 x 4 outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

TILES = 320
"""Made in one go, so that what lies between input and output stays in the processor's cache."""


def both_axes(matrix: list[list[float]]) -> Tensor:
    """M as the matrix that makes M X M', flattened, from X, flattened."""
    m = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(m, m).float()


# For the points 0, 1, -1, 2, -2 and infinity.
G = both_axes(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
B = both_axes(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
A = both_axes([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv3x3` may replace the plain convolution of x [N, C, H, W] with weight [O, C, 3, 3] and is faster: on
    the CPU in float32 and channels_last, for the many channels and large maps of an FPN's fine levels."""
    if torch.compiler.is_compiling():  # whose sizes may be unknown
        return False
    usable = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.stride(1) == 1
    large = min(weight.shape[:2]) >= 256 and x.shape[2] * x.shape[3] >= 2048
    return usable and large and not torch.is_autocast_enabled("cpu")


@torch.library.custom_op("detector::conv3x3", mutates_args=())
def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1) of x [N, C, H, W] and weight [O, C, 3, 3], float32: [N, O, H, W] in
    channels_last."""
    n, channels, height, width = x.shape
    tall, wide = -(-height // 4), -(-width // 4)
    kernels = (G @ weight.permute(0, 2, 3, 1).flatten(1, 2)).permute(1, 2, 0)  # [36, C, O]
    maps = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * wide + 1 - width, 1, 4 * tall + 1 - height))
    out = x.new_empty(n, 4 * tall, 4 * wide, len(weight))
    rows = min(tall, max(1, TILES // wide))
    images = max(1, TILES // (rows * wide))
    for i in range(0, n, images):
        for j in range(0, tall, rows):
            tiles = maps[i : i + images, 4 * j : 4 * (j + rows) + 2].unfold(1, 6, 4).unfold(2, 6, 4)
            there = tiles.shape[:3]
            tiles = B @ tiles.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)
            tiles = torch.bmm(tiles.view(36, -1, channels), kernels)  # [36, T, O]
            tiles = (A @ tiles.view(36, -1)).view(4, 4, *there, -1).permute(2, 3, 0, 4, 1, 5)
            part = out[i : i + images, 4 * j : 4 * (j + rows)].unflatten(1, (-1, 4)).unflatten(3, (-1, 4))
            torch.add(tiles, 0 if bias is None else bias, out=part)
    return out[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


@conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = x.shape[0], weight.shape[0], *x.shape[2:]
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@register_flop_formula(torch.ops.detector.conv3x3)
def _(x_shape: list[int], weight_shape: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    """Those of the plain convolution, so that a model costs the same whatever computes it."""
    return conv_flop_count(x_shape, weight_shape, out_shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.has_bias = inputs[2] is not None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The input's gradient is a 3 x 3 convolution too, with the kernels turned round and the channels swapped."""
    x, weight = ctx.saved_tensors
    to_x = to_weight = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = conv3x3(grad, weight.flip(2, 3).transpose(0, 1), None)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        wanted = [False, ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        sizes = [len(weight)] if ctx.has_bias else None
        ones = [1, 1]
        _, to_weight, to_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, sizes, ones, ones, ones, False, [0, 0], 1, wanted
        )
    return to_x, to_weight, to_bias


conv3x3.register_autograd(_gradients, setup_context=_save)
