"""torchvision's operators in ONNX's words, for torch.onnx's exporter, which does not know them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnxscript import INT64
from onnxscript import opset18 as op


def translations() -> dict[Callable, Callable]:
    """The `custom_translation_table` of torch.onnx.export."""
    ops = torch.ops.torchvision
    return {ops.nms.default: nms, ops.roi_align.default: roi_align, ops.roi_pool.default: roi_pool}


def nms(boxes, scores, iou_threshold: float):
    """Rows [kept] of boxes [R, 4] that survive, best first."""
    found = op.NonMaxSuppression(
        op.Unsqueeze(boxes, op.Constant(value_ints=[0])),
        op.Unsqueeze(scores, op.Constant(value_ints=[0, 1])),
        op.Constant(value_ints=[2**31 - 1]),
        op.Constant(value_floats=[iou_threshold]),
    )  # [kept, 3] = (image, class, row)
    return _column(found, 2)


def roi_align(
    input,
    rois,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
):
    """[R, C, h, w] of rois [R, 5] = (batch_index, x1, y1, x2, y2)."""
    boxes = op.Slice(rois, *(op.Constant(value_ints=[at]) for at in (1, 5, 1)))
    return op.RoiAlign(
        input,
        boxes,
        op.Cast(_column(rois, 0), to=INT64.dtype),
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        output_height=pooled_height,
        output_width=pooled_width,
        sampling_ratio=max(0, sampling_ratio),
        spatial_scale=spatial_scale,
    )


def roi_pool(input, rois, spatial_scale: float, pooled_height: int, pooled_width: int):
    """[R, C, h, w] of rois [R, 5] = (batch_index, x1, y1, x2, y2), and in place of the winners, which only training
    reads, the same."""
    pooled = op.MaxRoiPool(input, rois, pooled_shape=[pooled_height, pooled_width], spatial_scale=spatial_scale)
    return pooled, pooled


def _column(table, at: int):
    values = op.Slice(table, *(op.Constant(value_ints=[bound]) for bound in (at, at + 1, 1)))
    return op.Squeeze(values, op.Constant(value_ints=[1]))
