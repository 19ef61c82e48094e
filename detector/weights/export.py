"""A trained detector for other programs: safetensors, torch.export's program, ONNX.

The exported network is the inference path for one image of a fixed canvas, with shapes known in advance:

    images uint8 [1, 3, H, W] RGB, content at the top left; image_size int64 [2] = (height, width) of the content
    -> boxes [D, 4] in pixels of the canvas, scores [D], labels [D] (0 in rows that only pad), masks [D, M, M] where the
       model has a mask head: probabilities in the box's frame, for evaluation.masks.paste_masks

    python -m detector.weights export runs/quickstart/best.pt detector.onnx --size 800 1344

D is the model's detections_per_image, best first. What depends on the data (the size of the content, how many boxes
survive) stays dynamic inside; batch, H and W are fixed.

Dimensions: P proposals, R RoIs, D detections, K classes, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from detector.boxes import clip
from detector.engine import checkpoint as checkpoints
from detector.heads import BoxHead, MaskHead
from detector.model import TwoStageDetector
from detector.predict import load
from detector.roi import RoIAlign, RoIExtractor
from detector.roi.levels import assign_levels
from detector.structures import Batch
from detector.weights.portable import save_safetensors

OUTPUTS = ("boxes", "scores", "labels", "masks")


class Exportable(nn.Module):
    """The inference path of `model` in operations that torch.export and ONNX know.

    The same numbers as the model's own path, which compacts rows and takes faster ways that cannot be exported; boxes
    whose IoU lies within rounding of an NMS threshold may differ.

    Raises ValueError for a model with parts that have no exportable form: it names them.
    """

    def __init__(self, model: TwoStageDetector):
        super().__init__()
        check_exportable(model)
        self.model = model

    def forward(self, images: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """Detections of the one image, as in the module's docstring."""
        model, sizes, none = self.model, image_size[None], torch.zeros(1, dtype=torch.int64)
        batch = Batch(images, sizes, sizes, none, none)
        features = model.features(batch)
        proposals = self.propose(features, sizes)
        features = features[: model.neck.roi_levels]
        boxes, scores, labels = self.detect(features, proposals, sizes)
        if model.mask_head is None:
            return boxes, scores, labels
        head = model.mask_head
        logits = head.predictor(head.trunk(pool(head.extractor, features, boxes)), labels)
        return boxes, scores, labels, logits.float().sigmoid()

    def propose(self, features: Sequence[Tensor], sizes: Tensor) -> Tensor:
        """Boxes [P, 4] of the RPN, zeros after the last one."""
        rpn = self.model.rpn
        boxes, scores, levels = [], [], []
        for level, (logits, deltas, anchors) in enumerate(zip(*rpn.head(features), rpn.anchors(features))):
            score, index = rpn.best(logits.float(), min(rpn.pre_nms_top_n[1], logits.shape[1]))
            boxes.append(rpn.coder.decode(deltas[0, index[0]], anchors[index[0]]))
            scores.append(score[0])
            levels.append(torch.full_like(index[0], level))
        boxes, scores, levels = clip(torch.cat(boxes)[None], sizes)[0], torch.cat(scores), torch.cat(levels)
        kept = torch.nonzero((boxes[:, 2:] - boxes[:, :2] > rpn.min_size).all(1))[:, 0]
        boxes, scores, levels = boxes[kept], scores[kept], levels[kept]
        boxes, scores, levels = two_more(boxes), two_more(scores, torch.finfo(scores.dtype).min), two_more(levels)
        keep = self.nms(boxes, scores, levels, rpn.nms_threshold)
        return first(boxes[keep], rpn.post_nms_top_n[1])

    def detect(self, features: Sequence[Tensor], proposals: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [D, 4], scores [D] and labels [D] of the proposals [P, 4]."""
        head, limit = self.model.box_head, self.model.box_head.detections_per_image
        logits, deltas = head.predictor(head.trunk(pool(head.extractor, features, proposals)))
        real = (proposals[:, 2:] > proposals[:, :2]).all(1)
        scores = logits.float().softmax(dim=1)[:, 1:]
        boxes = clip(head.coder.decode(deltas, proposals[:, None])[None], sizes)[0].expand(-1, scores.shape[1], -1)
        large = (boxes[..., 2:] - boxes[..., :2] > head.min_size).all(-1)
        row, column = torch.nonzero((scores > head.score_threshold) & large & real[:, None], as_tuple=True)
        boxes, scores, labels = two_more(boxes[row, column]), two_more(scores[row, column]), two_more(column + 1)
        group = torch.zeros_like(labels) if head.nms_agnostic else labels
        keep = self.nms(boxes, scores, group, head.nms_threshold)
        return first(boxes[keep], limit), first(scores[keep], limit), first(labels[keep], limit)

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
        """Rows that survive, best first. Groups are moved apart so that they cannot overlap."""
        away = boxes.flatten().amax(0) + 1
        return nms(boxes + (group * away)[:, None], scores, threshold)


def pool(extractor: RoIExtractor, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """RoI Align [R, C, h, w] of the boxes [R, 4] in the first image: every level pools, the assigned one is taken."""
    op, strides = extractor.op, extractor.strides
    levels = assign_levels(boxes, strides, extractor.canonical_level, extractor.canonical_size, extractor.level_rule)
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    pooled = 0
    for level, (feature, stride) in enumerate(zip(features, strides)):
        values = roi_align(feature.float(), rois, op.output_size, 1 / stride, op.sampling_ratio, op.aligned)
        pooled = pooled + values * (levels == level)[:, None, None, None]
    return pooled.to(features[0].dtype)


def two_more(values: Tensor, fill: float = 0) -> Tensor:
    """`values` with two more rows, which end up as padding: programs of torch.export want at least two of a kind."""
    return torch.cat([values, values.new_full((2, *values.shape[1:]), fill)])


def first(values: Tensor, count: int) -> Tensor:
    """The first `count` rows, zeros where there are fewer: as many rows for every image."""
    return torch.cat([values, values.new_zeros(count, *values.shape[1:])])[:count]


def check_exportable(model: nn.Module) -> None:
    """Raise ValueError naming each part of the model that `Exportable` has no form for."""
    if not isinstance(model, TwoStageDetector):
        raise TypeError(f"model is a {type(model).__name__}, not a TwoStageDetector: give what detector.load returns")
    wrong = []
    if type(model.box_head) is not BoxHead:
        wrong.append(f"box_head is {type(model.box_head).__name__}, not BoxHead")
    elif model.box_head.nms not in ("hard", "mmcv"):
        wrong.append(f"box_head.nms is {model.box_head.nms!r}, not 'hard'")
    if model.mask_head is not None and type(model.mask_head) is not MaskHead:
        wrong.append(f"mask_head is {type(model.mask_head).__name__}, not MaskHead")
    if model.keypoint_head is not None:
        wrong.append("there is a keypoint_head")
    if model.size_divisibility is not None:
        wrong.append(f"size_divisibility is {model.size_divisibility}, not null")
    for name in ("box_head", "mask_head"):
        op = getattr(getattr(getattr(model, name), "extractor", None), "op", None)
        usual = type(op) is RoIAlign and op.reduction == "avg" and op.placement == "centre"
        if op is not None and not usual:
            wrong.append(f"{name}.roi is {op}, not the usual RoIAlign")
    if wrong:
        raise ValueError(f"this model cannot be exported: {'; '.join(wrong)}. Its weights travel as .safetensors")


def export_program(model: nn.Module, size: tuple[int, int]) -> torch.export.ExportedProgram:
    """`Exportable(model)` for a canvas of `size` (height, width) as a program of torch.export; on the model's device.

    Raises ValueError for a model without an exportable form, or a size that is no multiple of 32.
    """
    height, width = size
    if min(size) < 32 or height % 32 or width % 32:
        raise ValueError(f"size={height, width}: height and width of the canvas must be multiples of 32")
    exportable = Exportable(model).eval().requires_grad_(False)
    device = next(model.parameters()).device
    images = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, device=device)
    return torch.export.export(exportable, (images, torch.tensor([height, width], device=device)))


def export(checkpoint: str | Path, out: str | Path, size: tuple[int, int] | None = None) -> None:
    """Write a checkpoint in the format that the suffix of `out` names: .safetensors, which detector.load reads, .pt2
    (torch.export) or .onnx; the latter two for a canvas of `size` (height, width).

    Raises ValueError for another suffix or without a size, and what the functions of this module raise.
    """
    suffix = Path(out).suffix
    if suffix not in (".safetensors", ".pt2", ".onnx"):
        raise ValueError(f"{out}: the name must end in .safetensors, .pt2 or .onnx")
    if suffix == ".safetensors":
        return save_safetensors(checkpoints.load(checkpoint), out)
    if size is None:
        raise ValueError(
            f"{out}: give the size (height, width) of the canvas; 800 1344 holds images of the usual resize"
        )
    program = export_program(load(checkpoint), size)
    return torch.export.save(program, out) if suffix == ".pt2" else save_onnx(program, out)


def save_onnx(program: torch.export.ExportedProgram, path: str | Path) -> None:
    """Write a program of `export_program` as ONNX, opset 18, with the names of the module's docstring.

    Raises ModuleNotFoundError without the packages of the extra `export`.
    """
    try:
        from detector.weights.onnx_ops import translations
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"ONNX needs {error.name}: pip install 'two-stage-detector[export]'") from None
    torch.onnx.export(
        program,
        dynamo=True,
        opset_version=18,
        input_names=["images", "image_size"],
        output_names=list(OUTPUTS[: len(program.graph_signature.user_outputs)]),
        custom_translation_table=translations(),
        verbose=False,
    ).save(path)
