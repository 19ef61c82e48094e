"""Adaptive feature pooling ('Path aggregation network for instance segmentation', Liu et al. 2018, section 3.2).

    out = max over the levels l of relu(W_l * x_l)        (or their sum)

with x_l the RoI pooled from level l, whatever its size, and W_l a layer of the level's own: what lets maps of different
meaning be compared. The paper puts the layer and the fusion behind the first layer of the head; here they stand before
it, so that every head can have them. Dimensions: L levels, R RoIs, C channels, h x w bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from detector.ops.checks import check_choice
from detector.ops.layers import init_kaiming
from detector.roi.aggregate import SumLevels
from detector.roi.base import RoIOp


class AdaptivePooling(SumLevels):
    """Every level through its own convolution, fused by maximum or sum.

    Args:
        output_size, channels, op: as in SumLevels. levels: L, as many as will be fed.
        fusion: of the levels, "max" or "sum".
        kernel: size of the convolutions, odd; 3 as in the paper's mask branch.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int,
        levels: int = 4,
        op: Callable[..., RoIOp] | None = None,
        fusion: str = "max",
        kernel: int = 3,
    ):
        super().__init__(output_size, channels, op)
        check_choice("fusion", fusion, ("max", "sum"))
        channels, self.fusion = self.op.output_channels(channels), fusion
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(levels))
        init_kaiming(self.layers)

    def aggregate(self, results: list[Tensor]) -> Tensor:
        check_levels(results, len(self.layers))
        adapted = [layer(result).relu() for layer, result in zip(self.layers, results)]
        return reduce(torch.maximum, adapted) if self.fusion == "max" else super().aggregate(adapted)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fusion={self.fusion!r}"


def check_levels(results: Sequence[Tensor], levels: int) -> None:
    """ValueError unless there are as many levels as the method has layers for."""
    if len(results) != levels:
        raise ValueError(
            f"features must hold {levels} maps, as the method was built with levels={levels}, got {len(results)}"
        )
