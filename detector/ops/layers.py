"""Building blocks that more than one part of the model uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torch.utils.module_tracker import ModuleTracker
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from detector.ops import onednn, winograd
from detector.ops.kernels import triton_available

Layer = TypeVar("Layer", bound=nn.Module)
Made = TypeVar("Made")
TRACKER = ModuleTracker()  # never entered: asked for what it tells at any time


def kept(owner: nn.Module, sources: Sequence[Tensor], make: Callable[[], Made]) -> Made:
    """What `make` makes of the sources, made anew only where they are others or have been written to since: by what
    raises a tensor's version, which fused optimisers do not, nor what goes through `.data`."""
    if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
        return make()
    versions = [t._version for t in sources]
    found = owner.__dict__.get("_kept")
    if found is None or versions != found[1] or any(a is not b for a, b in zip(sources, found[0], strict=True)):
        with torch.inference_mode(False), torch.no_grad():
            found = owner.__dict__["_kept"] = list(sources), versions, make()
    return found[2]


class FrozenBatchNorm(FrozenBatchNorm2d):
    """A batch norm whose scale, shift and statistics are constants.

    Args:
        channels: C of the maps [N, C, H, W].
        fold: `conv_norm` may fold it into the convolution before it; else it is a layer of its own, with the arithmetic
            of nn.BatchNorm2d to the bit.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, fold: bool = True):
        super().__init__(channels)
        self.fold = fold

    def folded(self) -> tuple[Tensor, Tensor]:
        """Scale and shift [C] of the values that come in."""
        return kept(self, [self.weight, self.bias, self.running_mean, self.running_var], self._fold)

    def _fold(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        if self.fold:
            return super().forward(x)
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *statistics, training=False, eps=self.eps)


BATCH_NORM = nn.modules.batchnorm._BatchNorm  # of all dimensions, synchronised or not

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen_batch_norm": FrozenBatchNorm,
    "plain_frozen_batch_norm": partial(FrozenBatchNorm, fold=False),
    "batch_norm": nn.BatchNorm2d,
    "sync_batch_norm": nn.SyncBatchNorm,
    "group_norm": partial(nn.GroupNorm, 32),
    "layer_norm": partial(LayerNorm2d, eps=1e-6),  # over the channels of each cell
}


def norm_layer(name: str) -> Callable[[int], nn.Module]:
    """The factory `norm(channels)` of that name; ValueError for a name that is not in NORMS."""
    if name not in NORMS:
        raise ValueError(f"norm={name!r}: expected one of {', '.join(NORMS)}")
    return NORMS[name]


def learns_statistics(module: nn.Module) -> bool:
    """Whether it has batch norms that learn, in whose statistics rows of padding would count."""
    return any(isinstance(part, BATCH_NORM) and part.training for part in module.modules())


def prefers_channels_last(device: torch.device) -> bool:
    """Whether 3 x 3 convolutions of large maps are fastest in channels_last there: on all but CPUs without AVX-512, for
    which oneDNN's backward pass takes twice as long in it. 1 x 1 convolutions and RoI methods always like it."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"


def to_preferred_layout(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, with the weights of its convolutions laid out in memory as the maps will be."""
    if prefers_channels_last(device):
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):  # those have but one layout
                module.to(memory_format=torch.channels_last)
    return model


def conv_layout(x: Tensor) -> Tensor:
    """Maps [N, C, H, W] in the layout in which 3 x 3 convolutions of them are fastest: as they come, or contiguous."""
    return x if prefers_channels_last(x.device) else x.contiguous()


def conv_norm(
    x: Tensor, conv: nn.Module, norm: nn.Module, relu: bool = False, shortcut: Tensor | None = None
) -> Tensor:
    """norm(conv(x)) + shortcut of x [N, C, H, W], with relu the positive part of it; a frozen batch norm costs nothing,
    folded into a plain convolution.

    With s = weight / sqrt(var + eps):  s (W * x - mean) + bias  =  (s W) * x + (bias - s mean),  exact in value and in
    the gradients of x and W, without a pass over the maps.
    """
    if type(conv) is nn.Conv2d and isinstance(norm, FrozenBatchNorm) and norm.fold:
        return joined(x, conv.weight, *norm.folded(), conv, relu, shortcut)
    out = norm(conv(x))
    out = out if shortcut is None else out.add_(shortcut)
    return out.relu_() if relu else out


def finishes_in_one_pass(x: Tensor) -> bool:
    """Whether bias, shortcut and ReLU of a convolution of x are added in one pass: by a kernel on a GPU, where the bias
    alone would take a pass over the result, and by oneDNN in bf16. Not where a compiler joins them by itself."""
    return not torch.compiler.is_compiling() and (onednn.takes(x) or (x.is_cuda and triton_available()))


def joined(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    like: nn.Conv2d | SimpleNamespace,
    relu: bool = False,
    shortcut: Tensor | None = None,
) -> Tensor:
    """(scale W) * x + bias + shortcut, or the positive part of it, by as few passes over the result as there can be.

    Args:
        like: the convolution whose stride and so on are meant.
    """
    args = x, weight, scale, bias, like, relu, shortcut
    return _Conv.apply(*args) if torch.is_grad_enabled() else _join(*args)


def _join(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    like: Any,
    relu: bool,
    shortcut: Tensor | None,
) -> Tensor:
    if not finishes_in_one_pass(x):
        out = F.conv2d(x, _scaled(weight, scale), bias, like.stride, like.padding, like.dilation, like.groups)
        out = out if shortcut is None else out.add_(shortcut)
        return out.relu_() if relu else out
    if not x.is_cuda:
        return onednn.conv(x, *_half(weight, scale, bias, like), like, relu, shortcut)
    from detector.ops.triton_finish import finish

    out = F.conv2d(x, _scaled(weight, scale), None, like.stride, like.padding, like.dilation, like.groups)
    return finish(out, bias, shortcut, relu)


def _half(weight: Tensor, scale: Tensor | None, bias: Tensor, like: Any) -> tuple[Tensor, Tensor]:
    """scale W and bias in bf16, made once of a layer's weight that is not trained, as those of a loaded detector."""

    def make() -> tuple[Tensor, Tensor]:
        return _scaled(weight, scale).to(torch.bfloat16), bias.to(torch.bfloat16)

    sources = [t for t in (weight, scale, bias) if t is not None]
    stays = isinstance(like, nn.Module) and not any(t.requires_grad for t in sources)
    return kept(like, sources, make) if stays else make()


class _Conv(torch.autograd.Function):
    """`joined`, which keeps W for its gradient and not the product: a copy of all weights less."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor,
        like: nn.Conv2d | SimpleNamespace,
        relu: bool,
        shortcut: Tensor | None,
    ) -> Tensor:
        out = _join(x, weight, scale, bias, like, relu, shortcut)
        ctx.save_for_backward(x, weight, scale, out if relu else None)
        ctx.like, ctx.shortcut = like, None if shortcut is None else shortcut.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, scale, out), like = ctx.saved_tensors, ctx.like
        if out is not None:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        # autocast made the result in grad's type
        inputs = grad, x.to(grad.dtype), _scaled(weight, scale).to(grad.dtype)
        shape = like.stride, like.padding, like.dilation, False, (0, 0), like.groups
        needs_x, needs_weight, _, needs_bias, *_, needs_shortcut = ctx.needs_input_grad
        to_x: Any = None
        to_weight, to_bias = to_x, to_x
        if needs_x or needs_weight or needs_bias:
            wanted = [needs_x, needs_weight, needs_bias]
            to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(*inputs, [len(weight)], *shape, wanted)
        return (
            to_x.to(x.dtype) if needs_x else None,
            _scaled(to_weight.to(weight.dtype), scale) if needs_weight else None,
            None,
            to_bias.to(weight.dtype) if needs_bias else None,
            *(None, None),
            grad.to(ctx.shortcut) if needs_shortcut else None,
        )


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight * scale.view(-1, 1, 1, 1)


POINTWISE = SimpleNamespace(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)


def pointwise_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The positive part of a 1 x 1 convolution of x [N, C, H, W] with weight [O, C, 1, 1] and bias [O]."""
    if finishes_in_one_pass(x):
        return joined(x, weight, None, bias, POINTWISE, relu=True)
    return F.conv2d(x, weight, bias).relu_()


def checkpointed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), of which nothing is kept for the backward pass but what goes in: it is computed again there,
    with the random numbers that it had (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). Batch norms
    inside of it count twice unless `count_once` has seen them."""
    return checkpoint(function, *args, use_reentrant=False) if torch.is_grad_enabled() else function(*args)


def count_once(model: nn.Module) -> None:
    """Let the batch norms of a model leave their running statistics alone in a backward pass, where `checkpointed`
    parts are computed again: there they count into copies."""
    for module in model.modules():
        if isinstance(module, BATCH_NORM) and module.running_mean is not None:
            module.register_forward_pre_hook(_take_copies)
            module.register_forward_hook(_put_back, always_call=True)  # a part may end early, by an exception


def in_backward_pass() -> bool:
    """Whether this thread computes gradients at the moment, by PyTorch's public word for it."""
    return TRACKER.is_bw


def _take_copies(norm: nn.Module, args: Any) -> None:
    if in_backward_pass():
        norm.__dict__["counted"] = dict(norm._buffers)
        norm._buffers.update({name: value.clone() for name, value in norm._buffers.items() if value is not None})


def _put_back(norm: nn.Module, args: Any, output: Any) -> None:
    norm._buffers.update(norm.__dict__.pop("counted", {}))


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution in the form that is fastest for its input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True):
        super().__init__(in_channels, out_channels, 3, stride, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1) and winograd.is_faster(x, self.weight):
            return winograd.conv3x3(x, self.weight, self.bias)
        return super().forward(x)


class ConvBlock(nn.Sequential):
    """A convolution and what follows it."""

    def forward(self, x: Tensor) -> Tensor:
        conv, *rest = self
        followed = not all(isinstance(layer, nn.ReLU) for layer in rest)  # by a norm
        if followed or not isinstance(conv, nn.Conv2d) or conv.bias is None or not finishes_in_one_pass(x):
            return super().forward(x)
        return joined(x, conv.weight, None, conv.bias, conv, relu=bool(rest))


def conv_block(
    in_channels: int, out_channels: int, kernel: int, norm: str | None = None, relu: bool = True, stride: int = 1
) -> ConvBlock:
    """Convolution that keeps the size (at stride 1), a norm by name, which then replaces the bias, and ReLU."""
    conv = Conv3x3 if kernel == 3 else partial(nn.Conv2d, kernel_size=kernel, padding=kernel // 2)
    layers: list[nn.Module] = [conv(in_channels, out_channels, stride=stride, bias=norm is None)]
    if norm is not None:
        layers.append(norm_layer(norm)(out_channels))
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return ConvBlock(*layers)


def module_list(modules: Iterable[Layer]) -> Sequence[Layer]:
    """nn.ModuleList of modules of one kind, which it does not remember for type checkers."""
    return nn.ModuleList(modules)  # type: ignore[return-value]  # a sequence in all but its base classes


def bias_of(layer: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    """Its bias [out_channels], zero if it has none."""
    return layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias


def init_zero(layer: nn.Module) -> None:
    """Zero weights and biases."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def init_normal(module: nn.Module, std: float) -> None:
    """Normal weights with that standard deviation and zero biases in every convolution and linear layer."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_uniform(module: nn.Module) -> None:
    """Uniform weights by fan-in, as Caffe2's XavierFill, and zero biases in every convolution and linear layer."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_kaiming(module: nn.Module) -> None:
    """He et al. 2015, fan-out for ReLU, and zero biases in every convolution."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
