"""The Double-Head (Wu et al. 2020): fully connected layers tell the class, convolutions on a wider RoI refine the box.

Dimensions: R RoIs, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from detector.heads.box import BoxHead, BoxPrediction, BoxPredictor
from detector.heads.cascade import side_by_side
from detector.ops.layers import conv_block, init_kaiming
from detector.protocols import Trunk
from detector.roi.context import enlarged


class ResidualBlock(nn.Module):
    """Convolutions beside a shortcut, each [R, in_channels, h, w] -> [R, out_channels, h, w]; ReLU of their sum."""

    def __init__(self, layers: Sequence[nn.Module], shortcut: nn.Module | None = None):
        super().__init__()
        self.conv, self.shortcut = nn.Sequential(*layers), shortcut or nn.Identity()
        init_kaiming(self)

    def forward(self, features: Tensor) -> Tensor:
        return (self.conv(features) + self.shortcut(features)).relu()


class ResidualTrunk(nn.Module):
    """A residual block that widens the RoI features, bottlenecks (figure 5 of the paper), the mean over the cells.

    Args:
        in_channels, output_size: of the RoI features [R, C, h, w].
        channels: C of the bottlenecks, a quarter of it between their 1 x 1 convolutions.
        blocks: number of bottlenecks.
        norm: norm by name after each convolution, or None.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: tuple[int, int],
        channels: int = 1024,
        blocks: int = 4,
        norm: str | None = "batch_norm",
    ):
        super().__init__()
        middle = channels // 4
        widening = [conv_block(in_channels, in_channels, 3, norm), conv_block(in_channels, channels, 1, norm, False)]
        self.blocks = nn.Sequential(ResidualBlock(widening, conv_block(in_channels, channels, 1, norm, relu=False)))
        for _ in range(blocks):
            narrow = [conv_block(channels, middle, 1, norm), conv_block(middle, middle, 3, norm)]
            self.blocks.append(ResidualBlock([*narrow, conv_block(middle, channels, 1, norm, relu=False)]))
        self.out_channels = channels

    def forward(self, features: Tensor) -> Tensor:
        """[R, channels] of RoI features [R, C, h, w]."""
        return self.blocks(features).mean(dim=(2, 3))


class DoubleBoxHead(BoxHead):
    """A box head whose boxes come from a trunk of their own, which sees the RoI enlarged about its centre.

    Args:
        box_trunk: factory `box_trunk(in_channels, output_size)`, from RoI features to [R, C].
        box_scale: of the width and height of the RoIs that it sees.
        settings: see BoxHead, whose `trunk` serves the classes.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        box_trunk: Callable[..., Trunk] = ResidualTrunk,
        box_scale: float = 1.3,
        class_agnostic: bool = False,
        predictor_init: str = "small",
        **settings: Any,
    ):
        super().__init__(in_channels, strides, num_classes, class_agnostic=class_agnostic, **settings)
        if not box_scale > 0:
            raise ValueError(f"box_scale={box_scale}: must be positive")
        op = self.extractor.op
        self.box_trunk, self.box_scale = box_trunk(op.output_channels(in_channels), op.output_size), box_scale
        channels = self.trunk.out_channels, self.box_trunk.out_channels
        self.predictor = BoxPredictor(channels[0], num_classes, class_agnostic, predictor_init, channels[1])

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> BoxPrediction:
        """Predictions for rois [R, 5] = (batch_index, x1, y1, x2, y2)."""
        of_class, of_box = (self.extractor(features, boxes) for boxes in (rois, enlarged(rois, self.box_scale)))
        logits, deltas = self.predictor(self.trunk(of_class.features), self.box_trunk(of_box.features))
        return BoxPrediction(logits, deltas, side_by_side([of_class, of_box]))
