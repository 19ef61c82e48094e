"""Swin transformers (Liu et al. 2021) of timm as detectors have them: maps of any size, each with a norm of its own.

    x = x + drop_path(attend(norm1(x)))          x = x + drop_path(mlp(norm2(x)))          in each block

Blocks attend within windows of S x S patches. The map is padded with zeros to whole windows after norm1, and what is
padded takes part as keys. In every second block the padded map first moves by S / 2 up and to the left, and what comes
in from the other side attends to itself alone. So it is in detectron2 and mmdetection. timm's own forward pass moves
the map before it pads, which is the same only where windows divide it, and does not move maps of a single window.

Dimensions: N images, H x W patches, C channels, S side of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detector.backbone.timm import created, known_model
from detector.backbone.vit import from_windows, to_whole, to_windows
from detector.ops.layers import checkpointed, module_list

APART = -100.0  # the logit of patches that are no neighbours, in the sources of all


class Swin(nn.Module):
    """Maps of a Swin transformer of timm.

    Args:
        name: timm's name of the model, for instance 'swin_tiny_patch4_window7_224.ms_in1k'.
        strides: of the maps that are returned, finest first.
        drop_path_rate: stochastic depth, rising from 0 to this rate at the last block.
        in_channels: of the images.
        checkpointing: keep only what goes into each block for the backward pass, which computes the rest again.

    Attributes: in_channels, out_channels, strides.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int] = (4, 8, 16, 32),
        drop_path_rate: float = 0.0,
        in_channels: int = 3,
        checkpointing: bool = False,
    ):
        super().__init__()
        known_model(name)
        check_first_version(name)
        self.create = partial(created, name, num_classes=0, always_partition=True, strict_img_size=False)
        model = self.create(in_chans=in_channels, drop_path_rate=drop_path_rate)
        reductions = [stage["reduction"] for stage in model.feature_info]
        if not strides or [*strides] != [stride for stride in reductions if stride in strides]:
            raise ValueError(f"strides={list(strides)}: expected some of {reductions}, finest first")
        self.stages = [reductions.index(stride) for stride in strides]
        model.layers = model.layers[: self.stages[-1] + 1]
        model.norm = model.head = None
        self.name, self.in_channels, self.model = name, in_channels, model
        self.out_channels = [model.feature_info[stage]["num_chs"] for stage in self.stages]
        self.strides, self.checkpointing = list(strides), checkpointing
        self.norms = module_list(nn.LayerNorm(channels) for channels in self.out_channels)

    def published(self, name: str) -> dict[str, Tensor]:
        """The weights that timm publishes for this model ('pretrained'), downloaded once, and this one's norms of the
        maps, which classifiers do not have. Raises ValueError for another name."""
        if name != "pretrained":
            raise ValueError(f"{name!r}: expected 'pretrained', which takes timm's, or the path of a file")
        with torch.random.fork_rng(devices=[]):
            theirs = {f"model.{key}": value for key, value in self.create(pretrained=True).state_dict().items()}
        return {key: theirs.get(key, value) for key, value in self.state_dict().items()}

    def layers(self) -> dict[str, int]:
        """The layer of each parameter, as timm groups them: the stem 0, then block by block. The norm of a map belongs
        to the last block before it."""
        from timm.models import group_parameters

        found = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
        known = {f"model.{key}": layer for key, layer in found.items()}
        for i, stage in enumerate(self.stages):
            last = max(layer for key, layer in known.items() if key.startswith(f"model.layers.{stage}."))
            known |= {f"norms.{i}.{key}": last for key in ("weight", "bias")}
        return known

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [N, C, H / stride, W / stride] of images [N, in_channels, H, W]; 4 divides H and W."""
        x = self.model.patch_embed(images)
        maps: list[Tensor] = []
        for i, stage in enumerate(self.model.layers):
            x = stage.downsample(x)
            apart = neighbours(x, stage.blocks[0].attn.window_size[0])
            for number, block in enumerate(stage.blocks):
                args = block, x, apart if number % 2 else None
                x = checkpointed(transformed, *args) if self.checkpointing else transformed(*args)
            if i in self.stages:
                maps.append(self.norms[len(maps)](x).permute(0, 3, 1, 2))
        return maps


def check_first_version(name: str) -> None:
    """ValueError unless timm's model of that name is a Swin transformer whose parts this file knows."""
    from timm.models import model_entrypoint

    made_by = model_entrypoint(name.partition(".")[0]).__module__
    if made_by != "timm.models.swin_transformer":
        raise ValueError(
            f"{name} is no Swin transformer of the first version, but of {made_by}: take one of timm's swin_*; others "
            "are backbone@model.backbone=timm"
        )


def transformed(block: Any, x: Tensor, apart: Tensor | None) -> Tensor:
    """A block of timm's: [N, H, W, C] of x [N, H, W, C]."""
    x = x + block.drop_path1(attend(block.attn, block.norm1(x), apart))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def attend(attention: Any, x: Tensor, apart: Tensor | None) -> Tensor:
    """Attention within windows, x [N, H, W, C], moved by half a window where `apart` says who are no neighbours."""
    side, (height, width) = attention.window_size[0], x.shape[1:3]
    half = side // 2 if apart is not None else 0
    x = to_whole(x, side)
    if half:
        x = x.roll((-half, -half), (1, 2))
    found = attention(to_windows(x, side), apart)
    x = from_windows(found, side, (x.shape[1], x.shape[2]), x.shape[0])
    if half:
        x = x.roll((half, half), (1, 2))
    if torch.compiler.is_exporting():  # a slice would ask whether there is something to cut off
        rows, columns = (torch.arange(length, device=x.device) for length in (height, width))
        return x.index_select(1, rows).index_select(2, columns)
    return x[:, :height, :width]


def neighbours(x: Tensor, side: int) -> Tensor:
    """What is added to the logits [windows, S S, S S] of a map x [N, H, W, C] that moved by half a window: 0 for
    patches that were neighbours before, APART for those that came together around its borders."""
    bands = []
    for length in x.shape[1:3]:
        length = (length + side - 1) // side * side
        place = torch.arange(length, device=x.device)
        bands.append((place >= length - side).long() + (place >= length - side // 2).long())
    areas = to_windows((3 * bands[0][:, None] + bands[1])[None, :, :, None], side)[..., 0]
    return torch.where(areas[:, :, None] == areas[:, None], 0.0, APART).to(x.dtype)
