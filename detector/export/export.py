"""A trained detector for other programs: safetensors, torch.export's program, ONNX.

The exported network is the inference path for one image:

    images uint8 [1, C, H, W], 3: RGB, content at the top left; image_size int64 [2] = (height, width) of the content,
        and what lies beyond its next multiple of the model's divisor is cut off, as in the model's own path
    -> boxes [D, 4] in pixels of the canvas, scores [D], labels [D] (0 in rows that only pad)
    -> masks [D, M, M] of a model with a mask head: probabilities in the box's frame, for evaluation.masks.paste_masks
    -> mask_score [D] of a Mask Scoring R-CNN
    -> keypoints [D, P, 3] = (x, y, score) of a model with a keypoint head

    detector export runs/quickstart/best.pt detector.onnx

D is the model's detections_per_image, best first. One program serves canvases of every size, or of one given size.

Dimensions: P proposals, R RoIs, D detections, K classes, L levels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.overrides import TorchFunctionMode
from torchvision.ops import nms

from detector.checkpoint import save_safetensors
from detector.heads import BoxHead, HybridMaskHead, MaskScoringHead, PointRendHead
from detector.heads.keypoint import from_heatmaps
from detector.inference.load import load, read
from detector.model import TwoStageDetector
from detector.ops.boxes import Survivors
from detector.roi import RoIExtractor
from detector.roi.base import use_path
from detector.runtime import PRECISIONS
from detector.structures import Batch, with_image


class Exportable(nn.Module):
    """The inference path of `model` in operations that torch.export and ONNX know.

    The same numbers as the model's own path, which compacts rows and takes faster ways that cannot be exported; boxes
    whose IoU lies within rounding of an NMS threshold may differ.

    Args:
        model: in evaluation mode. precision: of its heavy layers, fp32, bf16 or fp16; boxes and scores are float32.

    Raises: ValueError for a model with parts that have no exportable form: it names them.
    """

    def __init__(self, model: TwoStageDetector, precision: str = "fp32"):
        super().__init__()
        check_exportable(model)
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
        self.model, self.layers = model, HeavyLayers(PRECISIONS[precision])

    def forward(self, images: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """Detections of the one image, as in the module's docstring."""
        with self.layers:
            return self.detect(images, image_size[None])

    def detect(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """The same, for sizes [1, 2] = (height, width)."""
        model, none = self.model, torch.zeros(1, dtype=torch.int64)
        features = model.features(Batch(images, sizes, sizes, none, none))
        # a strided view among them would tie the program to how its sides divide
        features = [level.clone(memory_format=torch.contiguous_format) for level in features]
        proposals = model.rpn.propose(*model.rpn.head(features), model.rpn.anchors(features), sizes, survivors)
        if model.box_head is None:
            return proposals.boxes[0], proposals.scores[0], proposals.valid[0].long()
        features, rois = features[: model.neck.roi_levels], with_image(proposals.boxes)[0]
        boxes, scores = model.box_head.candidates(features, rois, sizes)
        scores = scores.masked_fill(~proposals.valid[0][:, None], -torch.inf)  # all rows travel, padding too
        image = torch.zeros_like(rois[:, 0], dtype=torch.int64)
        detections = model.box_head.stages[-1].select(boxes, scores, image, sizes, survivors)
        found, rois, labels = [t[0] for t in detections[:3]], with_image(detections.boxes)[0], detections.labels[0]
        if model.mask_head is not None:
            predictions = [head(features, rois) for head in model.mask_head.stages]
            logits = [head.predictor(seen.hidden, labels) for head, seen in zip(model.mask_head.stages, predictions)]
            found.append(torch.stack([values.float().sigmoid() for values in logits]).mean(0))
            if isinstance(model.mask_head, MaskScoringHead):
                found.append(model.mask_head.scores(predictions[0], logits[0], labels, detections.scores[0]))
        if model.keypoint_head is not None:
            logits = model.keypoint_head(features, rois).keypoint_logits.float()
            keypoints = from_heatmaps(logits, detections.boxes[0], model.keypoint_head.score)
            found.append(keypoints * (labels > 0)[:, None, None])
        return tuple(found)


def survivors(
    boxes: Tensor,
    scores: Tensor,
    wanted: Tensor,
    image: Tensor,
    group: Tensor,
    nms_by_image: Callable,
    threshold: float,
    images: int,
    limit: int,
) -> Survivors:
    """`ops.boxes.survivors` of one image, in operations that can be exported: plain NMS, no question how many remain.

    Two entries more, which end up as padding, go along: programs of torch.export want at least two of a kind.
    """
    row, column = torch.nonzero(wanted, as_tuple=True)
    real = extended(torch.ones_like(row, dtype=torch.bool), 2)
    row, column = extended(row, 2), extended(column, 2)
    boxes = torch.where(real[:, None], boxes[row, column], 0)  # the first entry, which padding points at, may be NaN
    scores = torch.where(real, scores[row, column], torch.finfo(scores.dtype).min)
    apart = (group[row, column] * real) * (boxes.flatten().amax(0) + 1)  # so that groups cannot overlap
    keep = nms(boxes + apart[:, None], scores, threshold)
    kept = (extended(values[keep], limit)[None, :limit] for values in (row, column, real, scores))
    row, column, valid, scores = kept
    return Survivors(row, column, valid, torch.where(valid, scores, 0))


def extended(values: Tensor, count: int) -> Tensor:
    """`values` with `count` zeros more."""
    return torch.cat([values, values.new_zeros(count)])


class HeavyLayers(TorchFunctionMode):
    """Run convolutions and matrix products in `dtype`, norms in float32; None changes nothing.

    torch.autocast does so too, but the ONNX exporter then folds float32 norms into half-precision convolutions.
    """

    NORMS = (F.batch_norm, F.group_norm, F.layer_norm)
    LAYERS = (F.conv2d, F.linear, F.conv_transpose2d, torch.matmul, Tensor.matmul, Tensor.__matmul__)

    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype is None:
            return function(*args, **kwargs)
        if function in self.NORMS:
            return function(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        if function in self.LAYERS:
            args, kwargs = [self.cast(a) for a in args], {name: self.cast(a) for name, a in kwargs.items()}
        return function(*args, **kwargs)

    def cast(self, value):
        return value.to(self.dtype) if isinstance(value, Tensor) else value


def output_names(model: TwoStageDetector) -> list[str]:
    """Names of what `Exportable(model)` returns."""
    optional = {
        "masks": model.mask_head is not None,
        "mask_score": isinstance(model.mask_head, MaskScoringHead),
        "keypoints": model.keypoint_head is not None,
    }
    return ["boxes", "scores", "labels", *(name for name, there in optional.items() if there)]


def check_exportable(model: nn.Module) -> None:
    """Raise ValueError naming each part of the model that `Exportable` has no form for."""
    if not isinstance(model, TwoStageDetector):
        raise TypeError(f"model is a {type(model).__name__}, not a TwoStageDetector: give detector.load(...).model")
    wrong = [f"extra_heads.{name} has no form in a program" for name in model.extra_heads]
    if isinstance(model.mask_head, PointRendHead | HybridMaskHead):
        wrong.append(f"mask_head is a {type(model.mask_head).__name__}, which has no form in a program")
    for name, part in model.named_modules():
        if isinstance(part, BoxHead) and part.nms not in ("hard", "mmcv"):
            wrong.append(f"{name}.nms is {part.nms!r}, not 'hard'")
        if isinstance(part, RoIExtractor):
            parameter = next(model.neck.parameters(), torch.zeros(()))
            maps = [parameter.new_zeros(1, model.neck.out_channels, 4, 4) for _ in part.strides]
            try:
                with use_path("plain"), torch.no_grad():
                    part(maps, parameter.new_ones(2, 5) - 1)
            except ValueError as error:
                wrong.append(f"{name.removesuffix('.extractor')}.roi is {part.op}: {error}")
    if wrong:
        raise ValueError(f"this model cannot be exported: {'; '.join(wrong)}. Its weights travel as .safetensors")


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep back what nobody who exports can mend: torchvision's NMS asks for sizes by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*create_unbacked_symint", FutureWarning)
        yield


def export_program(
    model: nn.Module, size: tuple[int, int] | None = None, precision: str = "fp32"
) -> torch.export.ExportedProgram:
    """`Exportable(model, precision)` as a program of torch.export, on the model's device.

    Args:
        size: (height, width) of the canvas, multiples of the model's divisor; None makes a program for every size.

    Raises ValueError for a model without an exportable form, for a size that is no such multiple, and without one where
    torch needs it.
    """
    exportable = Exportable(model, precision).eval().requires_grad_(False)
    step = model.divisor
    height, width = size or (160, 192)
    if min(height, width) < 32 or height % step or width % step:
        raise ValueError(f"size={height, width}: height and width of the canvas must be multiples of {step} from 32 on")
    rows, columns = (Dim(name, min=ceil(32 / step)) for name in ("rows", "columns"))
    sides = {2: step * rows, 3: step * columns} if step > 1 else {2: rows, 3: columns}
    device = next(model.parameters()).device
    images = torch.randint(0, 256, (1, len(model.pixel_mean), height, width), dtype=torch.uint8, device=device)
    arguments = images, torch.tensor([height, width], device=device)
    try:
        with torch.no_grad(), without_warnings():
            return torch.export.export(exportable, arguments, dynamic_shapes=None if size else (sides, {}))
    except torch._dynamo.exc.UserError as error:
        if size:
            raise
        raise ValueError(f"torch {torch.__version__} makes no program of this model for every size: fix one") from error


def export(
    checkpoint: str | Path,
    out: str | Path,
    size: tuple[int, int] | None = None,
    precision: str = "fp32",
    trust: str | Sequence[str] | None = (),
) -> None:
    """Write a checkpoint in the format that the suffix of `out` names: .safetensors, which detector.load reads, .pt2
    (torch.export) or .onnx; the latter two for canvases of every size, or of `size` (height, width) alone. hf://owner/repo
    uploads it, see `export.hub`.
    trust: see detector.inference.load.load.

    Raises ValueError for another suffix, and what the functions of this module raise.
    """
    if str(out).startswith("hf://"):
        from detector.export.hub import push

        push(checkpoint, str(out), trust)
        return None
    suffix = Path(out).suffix
    if suffix not in (".safetensors", ".pt2", ".onnx"):
        raise ValueError(f"{out}: the name must end in .safetensors, .pt2 or .onnx")
    if suffix == ".safetensors":
        return save_safetensors(read(checkpoint), out)
    model = load(checkpoint, trust=trust).model
    program = export_program(model, size, precision)
    return torch.export.save(program, out) if suffix == ".pt2" else save_onnx(program, output_names(model), out)


def save_onnx(program: torch.export.ExportedProgram, outputs: Sequence[str], path: str | Path) -> None:
    """Write a program of `export_program` with the names of its outputs as ONNX, opset 18.

    Raises ModuleNotFoundError without the packages of the extra `export`, ValueError for what opset 18 cannot express:
    deformable convolutions, and bf16.
    """
    try:
        from onnxscript.optimizer import fold_constants, remove_unused_nodes

        from detector.export.onnx_ops import translations
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"ONNX needs {error.name}: pip install 'two-stage-detector[export]'") from None
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    unknown = {str(node.target) for node in nodes if getattr(node.target, "namespace", "") == "torchvision"}
    if unknown := unknown - {str(known) for known in translations()}:
        raise ValueError(f"{path}: ONNX has no form of {', '.join(sorted(unknown))}; torch.export has: name it .pt2")
    if any(getattr(node.meta.get("val"), "dtype", None) == torch.bfloat16 for node in nodes):
        raise ValueError(f"{path}: ONNX's convolutions take no bf16: export with precision fp16, or name it .pt2")
    with without_warnings():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=18,
            input_names=["images", "image_size"],
            output_names=list(outputs),
            custom_translation_table=translations(),
            verbose=False,
        )
    # the exporter leaves what is made of large weights, such as their half-precision form, to be made in every run
    fold_constants(exported.model, input_size_limit=1 << 40, output_size_limit=1 << 40)
    remove_unused_nodes(exported.model)
    exported.save(path)
