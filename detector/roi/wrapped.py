"""What methods share that make something of another method's result, or add to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detector.roi.align import RoIAlign
from detector.roi.base import RoIOp, make_op


class WrappedRoIOp(RoIOp):
    """A method around another, `op`, whose number of channels [R, D, h, w] it keeps.

    Args:
        output_size: int or (h, w). channels: C of the features. levels: that `op` will be fed.
        op: factory of the inner method, RoIAlign with its defaults if None. It must not return offsets.

    Raises: ValueError for what `op` refuses.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int,
        op: Callable[..., RoIOp] | None = None,
        levels: int = 1,
    ):
        super().__init__(output_size)
        self.op = make_op(op or RoIAlign, output_size, channels, levels)

    def output_channels(self, channels: int) -> int:
        return self.op.output_channels(channels)
