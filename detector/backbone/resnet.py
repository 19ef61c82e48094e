"""ResNet bodies (He et al. 2016; ResNeXt: Xie et al. 2017), made of torchvision's blocks under torchvision's names.

Stages may have deformable convolutions (Dai et al. 2017; modulated, "v2": Zhu et al. 2019):

    y(p) = sum over the kernel's points k of w_k x(p + p_k + offset_k(p)) m_k(p)

Offsets and, in v2, the modulation m in (0, 1) come from a convolution on the same input; in v1 m is 1.

Dimensions: N images, C channels; stage s (2..5, the "C2".."C5" of FPN) has stride 2^s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model_weights, resnet
from torchvision.ops import deform_conv2d

from detector.ops.layers import checkpointed, conv_norm, count_once, init_zero, norm_layer


class DeformConv2d(nn.Conv2d):
    """A convolution whose points move; it starts as the plain one (v2: as half of it).

    Args:
        plain: the convolution that it takes the place of, without a bias.
        modulated: v2 instead of v1.
        offset_groups: groups of input channels with offsets of their own.
    """

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __init__(self, plain: nn.Conv2d, modulated: bool = False, offset_groups: int = 1):
        kernel = plain.kernel_size[0], plain.kernel_size[1]
        settings: dict[str, Any] = {"stride": plain.stride, "padding": plain.padding, "dilation": plain.dilation}
        super().__init__(plain.in_channels, plain.out_channels, kernel, groups=plain.groups, bias=False, **settings)
        self.weight = plain.weight
        if offset_groups < 1 or plain.in_channels % offset_groups:
            raise ValueError(f"offset_groups={offset_groups}: expected a divisor of the {plain.in_channels} channels")
        points = offset_groups * kernel[0] * kernel[1]
        self.offset = nn.Conv2d(plain.in_channels, (3 if modulated else 2) * points, kernel, **settings)
        init_zero(self.offset)
        self.modulated = modulated

    def forward(self, x: Tensor) -> Tensor:
        """[N, out_channels, H', W'] of x [N, in_channels, H, W]."""
        offset, mask = self.offset(x), None
        if self.modulated:
            points = offset.shape[1] // 3
            offset, mask = offset.split([2 * points, points], dim=1)
            mask = mask.sigmoid()
        # the op has no bf16, and autocast casts for it on GPUs alone
        exact = torch.promote_types(x.dtype, torch.float32)
        mask = None if mask is None else mask.to(exact)
        args = x.to(exact), offset.to(exact), self.weight.to(exact), None, self.stride, self.padding, self.dilation
        return deform_conv2d(*args, mask).to(x.dtype)


class Residual:
    """The forward pass of torchvision's blocks, with frozen norms folded into the convolutions."""

    convolutions: int
    downsample: nn.Module | None
    conv2: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            conv, norm = self.downsample.children()
            shortcut = conv_norm(x, conv, norm)
        for i in range(1, self.convolutions):
            x = conv_norm(x, getattr(self, f"conv{i}"), getattr(self, f"bn{i}"), relu=True)
        i = self.convolutions
        return conv_norm(x, getattr(self, f"conv{i}"), getattr(self, f"bn{i}"), relu=True, shortcut=shortcut)


class BasicBlock(Residual, resnet.BasicBlock):
    convolutions = 2


class Bottleneck(Residual, resnet.Bottleneck):
    convolutions = 3


BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def make_stage(
    block: type[BasicBlock | Bottleneck], in_channels: int, planes: int, blocks: int, stride: int, **settings: Any
) -> nn.Sequential:
    """Residual blocks in a row, the first one at `stride` and with a convolution in its shortcut where shapes change.

    settings: of torchvision's blocks: groups, base_width, norm_layer.
    """
    channels, shortcut = planes * block.expansion, None
    if stride != 1 or in_channels != channels:
        shortcut = nn.Sequential(resnet.conv1x1(in_channels, channels, stride), settings["norm_layer"](channels))
    first = block(in_channels, planes, stride, shortcut, **settings)
    return nn.Sequential(first, *(block(channels, planes, **settings) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """The convolutional stages of a ResNet.

    Args:
        depth: 10, 18, 34, 50, 101 or 152.
        width: channels of the stem; stage 2 has as many, each later stage twice the one before
            (bottlenecks: times 4); at least 8 there.
        norm: 'frozen_batch_norm', 'batch_norm', 'sync_batch_norm', 'group_norm' or 'plain_frozen_batch_norm'.
        groups, width_per_group: of the 3 x 3 convolutions (32 and 8 make a ResNeXt 32x8d).
        stride_in_1x1: bottlenecks stride in their first 1 x 1 (the original, Caffe's) instead of the 3 x 3.
        dilate_last: stage 5 keeps the resolution of stage 4 and dilates instead ("DC5").
        deform_stages: the stages whose 3 x 3 convolutions are deformable ([3, 4, 5] for "c3-c5"); for bottlenecks.
        deform_modulated: and modulated ("v2"). deform_groups: groups of channels with offsets of their own.
        stages: the stages whose maps are returned, for instance [2, 3, 4, 5] for FPN or [4] for C4.
        frozen_stages: the stem (1) and the stages up to this one are not trained; 0 trains everything.
        in_channels: of the images.
        checkpointing: keep only what goes into each block for the backward pass, which computes the rest again.
    """

    def __init__(
        self,
        depth: int = 50,
        width: int = 64,
        norm: str = "frozen_batch_norm",
        groups: int = 1,
        width_per_group: int = 64,
        stride_in_1x1: bool = False,
        dilate_last: bool = False,
        deform_stages: Sequence[int] = (),
        deform_modulated: bool = False,
        deform_groups: int = 1,
        stages: Sequence[int] = (2, 3, 4, 5),
        frozen_stages: int = 2,
        in_channels: int = 3,
        checkpointing: bool = False,
    ):
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth={depth}: expected one of {', '.join(map(str, BLOCKS))}")
        if not set(stages) <= {2, 3, 4, 5} or not stages:
            raise ValueError(f"stages={list(stages)}: expected some of 2, 3, 4, 5")
        if not 0 <= frozen_stages <= 5:
            raise ValueError(f"frozen_stages={frozen_stages}: expected 0 to 5")
        block, repeats = BLOCKS[depth]
        if width * block.expansion < 8:
            raise ValueError(
                f"width={width}: a ResNet-{depth} needs at least {8 // block.expansion}. Strided 1 x 1 convolutions of "
                "fewer than 8 channels overwrite memory in PyTorch's backward pass on CPUs (seen with 2.15)"
            )
        self.name = f"resnext{depth}_{groups}x{width_per_group}d" if groups > 1 else f"resnet{depth}"  # torchvision's
        if not set(deform_stages) <= set(range(2, max(stages) + 1)) or (deform_stages and block is BasicBlock):
            raise ValueError(
                f"deform_stages={list(deform_stages)}: expected some of the stages 2 to {max(stages)}, and bottlenecks "
                "(depth 50 or more)"
            )
        settings: dict[str, Any] = {"groups": groups, "base_width": width_per_group, "norm_layer": norm_layer(norm)}
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(norm)(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = sorted(stages)
        channels = width
        for stage in range(2, self.stages[-1] + 1):
            dilate = dilate_last and stage == 5
            planes, stride = width << (stage - 2), 1 if stage == 2 or dilate else 2
            layer = make_stage(block, channels, planes, repeats[stage - 2], stride, **settings)
            for part in layer.modules() if dilate else ():
                if isinstance(part, Residual):  # from the first block on, as in detectron2, not in torchvision
                    part.conv2.dilation = part.conv2.padding = (2, 2)
            setattr(self, f"layer{stage - 1}", layer)
            channels = planes * block.expansion
        self.out_channels = [(width << (stage - 2)) * block.expansion for stage in self.stages]
        self.strides = [16 if dilate_last and stage == 5 else 1 << stage for stage in self.stages]

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if stride_in_1x1 and isinstance(module, Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
        for stage in deform_stages:
            for part in getattr(self, f"layer{stage - 1}"):
                part.conv2 = DeformConv2d(part.conv2, deform_modulated, deform_groups)
        if frozen_stages >= 1:
            self.conv1.requires_grad_(False)
            self.bn1.requires_grad_(False)
        for stage in range(2, min(frozen_stages, self.stages[-1]) + 1):
            getattr(self, f"layer{stage - 1}").requires_grad_(False)
        self.checkpointing = checkpointing
        if checkpointing:
            count_once(self)

    def published(self, name: str) -> dict[str, Tensor]:
        """torchvision's weights of that name ('IMAGENET1K_V1' ...), downloaded once, all stages of them.

        Raises ValueError for a name that torchvision does not have for this body.
        """
        has = {} if self.name not in torchvision.models.list_models() else get_model_weights(self.name).__members__
        if name not in has:
            names = f"those of {self.name} are {', '.join(has)}" if has else f"it has none of a {self.name}"
            raise ValueError(f"torchvision publishes no {name!r}: {names}; or give the path of a file")
        return {key: value for key, value in has[name].get_state_dict().items() if not key.startswith("fc.")}

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [N, C, H / stride, W / stride] of the chosen stages, of images [N, C, H, W]."""
        x = checkpointed(self.stem, images) if self.checkpointing else self.stem(images)
        maps = []
        for stage in range(2, self.stages[-1] + 1):
            for block in getattr(self, f"layer{stage - 1}"):
                x = checkpointed(block, x) if self.checkpointing else block(x)
            if stage in self.stages:
                maps.append(x)
        return maps

    def stem(self, images: Tensor) -> Tensor:
        """The map [N, width, H / 4, W / 4] that stage 2 works on."""
        return self.maxpool(conv_norm(images, self.conv1, self.bn1, relu=True))
