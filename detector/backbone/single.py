"""No pyramid: the heads work on one map, as in Faster R-CNN before FPN ("C4" and dilated "DC5" models)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class SingleLevel(nn.Module):
    """Pass the backbone's last map on.

    Args:
        in_channels, strides: of the backbone's maps.

    Attributes: out_channels; strides, of that one level; roi_levels, 1.
    """

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int]):
        super().__init__()
        self.out_channels, self.strides, self.roi_levels = in_channels[-1], [strides[-1]], 1

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[the last of the maps [N, C, H, W]]"""
        return [maps[-1]]
