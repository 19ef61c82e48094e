"""Anchors: reference boxes of several sizes and shapes at every cell (Faster R-CNN, Ren et al. 2015, section 3.1.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AnchorGenerator(nn.Module):
    """Anchors of all levels.

    Args:
        strides: stride in image pixels of each level.
        sizes: for each level the anchor sizes, sqrt(area) in image pixels; one list serves all levels.
        aspect_ratios: height / width.
        rounding: round the corners of the cell's anchors to whole pixels, as torchvision does.

    At each cell the order is ratio by ratio, and size by size within a ratio.
    """

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        rounding: bool = False,
    ):
        super().__init__()
        sizes = list(sizes) * len(strides) if len(sizes) == 1 else list(sizes)
        if len(sizes) != len(strides):
            raise ValueError(f"anchor sizes for {len(sizes)} levels, but the neck gives {len(strides)} (sizes={sizes})")
        if len({len(level) for level in sizes}) != 1 or min(min(level) for level in sizes) <= 0:
            raise ValueError(f"anchor sizes={sizes}: expected the same number of positive sizes on each level")
        if min(aspect_ratios) <= 0:
            raise ValueError(f"aspect_ratios={list(aspect_ratios)}: must be positive")
        self.strides = list(strides)
        self.num_anchors = len(sizes[0]) * len(aspect_ratios)
        cells = torch.stack([self._cell(level, aspect_ratios, rounding) for level in sizes])
        self.register_buffer("cells", cells, persistent=False)  # [L, A, 4], around the origin

    @staticmethod
    def _cell(sizes, ratios, rounding: bool) -> Tensor:
        shapes = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in ratios for size in sizes]
        cell = torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in shapes])
        return cell.round() if rounding else cell

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Anchors [Hl * Wl * A, 4] of each level of features [N, C, Hl, Wl], row by row."""
        anchors = []
        for level, stride, cell in zip(features, self.strides, self.cells):
            height, width = level.shape[-2:]
            y = torch.arange(height, device=level.device, dtype=torch.float32) * stride
            x = torch.arange(width, device=level.device, dtype=torch.float32) * stride
            y, x = torch.meshgrid(y, x, indexing="ij")
            corner = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            anchors.append((corner + cell).reshape(-1, 4))
        return anchors
