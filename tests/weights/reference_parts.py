"""Arithmetic that both reference passes share, in plain torch and torchvision.ops: nothing of the package they check.

Weights are a mapping of the checkpoint's own keys. Dimensions: N images, R RoIs, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d, roi_align

Weights = Mapping[str, Tensor]
MAX_LOG_SCALE = math.log(1000 / 16)  # how much a box may grow


class Found(NamedTuple):
    """One image's proposals or detections, best first; labels count from 0, without the background."""

    boxes: Tensor  # [D, 4]
    scores: Tensor  # [D]
    labels: Tensor | None = None  # [D]
    masks: Tensor | None = None  # [D, M, M] probabilities in the box's frame
    keypoints: Tensor | None = None  # [D, P, 3] = (x, y, score)


class Outputs(NamedTuple):
    features: list[Tensor]  # levels [N, C, Hl, Wl]
    proposals: list[Found]  # of each image
    detections: list[Found]


class Limits(NamedTuple):
    """How much goes through at inference."""

    pre_nms: int  # candidates of each level
    post_nms: int  # proposals of an image
    detections: int = 100
    score: float = 0.05


def conv(w: Weights, key: str, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """The convolution at `key`, padded to keep the size at stride 1, in as many groups as its shape implies."""
    weight = w[f"{key}.weight"]
    padding = dilation * (weight.shape[2] // 2)
    return F.conv2d(x, weight, w.get(f"{key}.bias"), stride, padding, dilation, x.shape[1] // weight.shape[1])


def linear(w: Weights, key: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{key}.weight"], w[f"{key}.bias"])


def norm(w: Weights, key: str, x: Tensor) -> Tensor:
    """Batch norm by its running statistics; without any, group norm of 32 groups, or, with detectron2's transformers, a
    norm over channels."""
    weight, bias = w[f"{key}.weight"], w[f"{key}.bias"]
    if "backbone.net.pos_embed" in w or "backbone.bottom_up.norm0.weight" in w:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]
    if f"{key}.running_mean" in w:
        return F.batch_norm(x, w[f"{key}.running_mean"], w[f"{key}.running_var"], weight, bias, eps=1e-5)
    return F.group_norm(x, 32, weight, bias, eps=1e-5)


def bottleneck(w: Weights, at: Callable[[str], str], x: Tensor, stride: int, dilation: int, caffe: bool) -> Tensor:
    """1 x 1, 3 x 3, 1 x 1 and a shortcut; `at` gives the keys of conv1, norm1, ..., offset, shortcut, shortcut_norm,
    squeeze, excite.

    The stride is in the first 1 x 1 (caffe) or in the 3 x 3; that one may be deformable (v1: offsets alone), or squeeze
    and excite after it.
    """
    first, second = (stride, 1) if caffe else (1, stride)
    out = norm(w, at("norm1"), conv(w, at("conv1"), x, first)).relu()
    if f"{at('offset')}.weight" in w:
        offset = conv(w, at("offset"), out, second, dilation)
        kernel = w[f"{at('conv2')}.weight"]
        out = deform_conv2d(out, offset, kernel, None, second, dilation, dilation)
    else:
        out = conv(w, at("conv2"), out, second, dilation)
    out = norm(w, at("norm2"), out).relu()
    if f"{at('squeeze')}.weight" in w:
        squeezed = conv(w, at("squeeze"), out.mean(dim=(2, 3), keepdim=True)).relu()
        out = out * conv(w, at("excite"), squeezed).sigmoid()
    out = norm(w, at("norm3"), conv(w, at("conv3"), out))
    if f"{at('shortcut')}.weight" in w:
        x = norm(w, at("shortcut_norm"), conv(w, at("shortcut"), x, stride))
    return (out + x).relu()


def layer_norm(w: Weights, key: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{key}.weight"], w[f"{key}.bias"], eps)


def shifted_windows(w: Weights, at: Callable[[str], str], x: Tensor, shifted: bool) -> Tensor:
    """A block of a Swin transformer on a map [N, H, W, C], window by window: padded to whole ones, then shifted. `at`
    gives the keys of norm1, norm2, table, qkv, proj, fc1, fc2."""
    heads, side = w[at("table")].shape[1], (math.isqrt(len(w[at("table")])) + 1) // 2
    (height, width), shift = x.shape[1:3], side // 2
    y = F.pad(layer_norm(w, at("norm1"), x, 1e-5), (0, 0, 0, -width % side, 0, -height % side))
    regions = torch.zeros(y.shape[1:3])
    if shifted:
        y = y.roll((-shift, -shift), (1, 2))
        cuts = slice(0, -side), slice(-side, -shift), slice(-shift, None)
        for number, (rows, columns) in enumerate((rows, columns) for rows in cuts for columns in cuts):
            regions[rows, columns] = number
    i, j = (place.flatten() for place in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    down, right = (place[:, None] - place + side - 1 for place in (i, j))
    position = w[at("table")][down * (2 * side - 1) + right].permute(2, 0, 1)  # [heads, side side, side side]
    out = torch.zeros_like(y)
    for top in range(0, y.shape[1], side):
        for left in range(0, y.shape[2], side):
            window = slice(top, top + side), slice(left, left + side)
            q, k, v = linear(w, at("qkv"), y[:, *window].flatten(1, 2)).unflatten(2, (3, heads, -1)).unbind(2)
            logits = torch.einsum("nqhc,nkhc->nhqk", q * q.shape[-1] ** -0.5, k) + position
            region = regions[window].flatten()
            logits = logits + torch.where(region[:, None] == region, 0.0, -100.0)
            mixed = torch.einsum("nhqk,nkhc->nqhc", logits.softmax(-1), v).flatten(2)
            out[:, *window] = linear(w, at("proj"), mixed).unflatten(1, (side, side))
    if shifted:
        out = out.roll((shift, shift), (1, 2))
    x = x + out[:, :height, :width]
    return x + linear(w, at("fc2"), F.gelu(linear(w, at("fc1"), layer_norm(w, at("norm2"), x, 1e-5))))


def swin(
    w: Weights,
    x: Tensor,
    patch: str,
    norm: str,
    blocks: str,
    names: Mapping[str, str],
    merge: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """The maps of a Swin transformer's four stages, each with a norm of its own, of images [N, 3, H, W].

    patch, norm, blocks: keys of the first convolution, of the maps' norms and of blocks, without the numbers. names: of
    what is in a block. merge: what a stage's map becomes for the next one.
    """
    x = F.conv2d(x, w[f"{patch}.weight"], w[f"{patch}.bias"], 4).permute(0, 2, 3, 1)
    x, maps = layer_norm(w, f"{patch.rpartition('.')[0]}.norm", x, 1e-5), []
    for stage in range(4):
        block = 0
        while f"{(start := f'{blocks}.{stage}.blocks.{block}.')}norm1.weight" in w:
            keys = {part: start + name for part, name in names.items()}
            x, block = shifted_windows(w, keys.__getitem__, x, shifted=block % 2 == 1), block + 1
        maps.append(layer_norm(w, f"{norm}{stage}", x, 1e-5).permute(0, 3, 1, 2))
        if stage < 3:
            x = merge(F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2)))
            x = layer_norm(w, f"{blocks}.{stage}.downsample.norm", x, 1e-5)
            x = F.linear(x, w[f"{blocks}.{stage}.downsample.reduction.weight"])
    return maps


def align(maps: Sequence[Tensor], strides: Sequence[int], rois: Tensor, levels: Tensor, size: int) -> Tensor:
    """RoI Align, aligned and adaptive, of rois [R, 5] from the map of each one's level: [R, C, size, size]."""
    out = maps[0].new_zeros(len(rois), maps[0].shape[1], size, size)
    for level, (feature, stride) in enumerate(zip(maps, strides)):
        rows = levels == level
        out[rows] = roi_align(feature, rois[rows], size, 1 / stride, sampling_ratio=-1, aligned=True)
    return out


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] cut at the borders of an image of (height, width)."""
    x, y = boxes[..., 0::2].clamp(0, size[1]), boxes[..., 1::2].clamp(0, size[0])
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def with_image(boxes: Sequence[Tensor]) -> Tensor:
    """rois [R, 5] of the boxes [Ri, 4] of each image."""
    return torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], dim=1) for i, b in enumerate(boxes)])


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [D, M, M] in boxes [D, 4] at the pixels of an image (height, width): [D, height, width] bool.

    Both frameworks sample at pixel centres, bilinearly, zero beyond the mask; at least 1/2 is object.
    """
    y, x = (torch.arange(side) + 0.5 for side in size)
    x = (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    y = (y - boxes[:, 1:2]) / (boxes[:, 3:4] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], dim=3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5
