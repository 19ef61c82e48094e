"""Exported programs in the place of a model: ONNX Runtime's and OpenVINO's, and ONNX with weights and maps of 8 bits.

A `Program` takes a Batch and gives Detections as a TwoStageDetector does, so that prediction, evaluation and the bench
work with both. Dimensions: N images, D detections, M sides of masks, P keypoints.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from detector.data import Pipeline
from detector.export.export import output_names
from detector.inference.predict import as_batch
from detector.model import TwoStageDetector
from detector.structures import Batch, Detections

RUNTIMES = ("onnxruntime", "openvino")
LAYERS = ("Conv", "Gemm", "MatMul")  # that take most of the time


def installed(runtime: str) -> bool:
    return importlib.util.find_spec(runtime) is not None


class Program(nn.Module):
    """An ONNX file of `detector export` in a runtime, on the CPU.

    Args:
        model: that the file is of; it says how images are padded. threads: of the runtime; None: as it likes.

    Raises ModuleNotFoundError for a runtime that is not installed, ValueError for a file that it does not take.
    """

    def __init__(
        self, file: str | Path, model: TwoStageDetector, runtime: str = "onnxruntime", threads: int | None = None
    ):
        super().__init__()
        if not installed(runtime):
            extra = "export" if runtime == "onnxruntime" else "openvino"
            raise ModuleNotFoundError(f"{runtime} is not installed: pip install 'two-stage-detector[{extra}]'")
        self.pad_multiple, self.divisor = model.pad_multiple, model.divisor
        self.register_buffer("pixel_mean", model.pixel_mean.cpu(), persistent=False)
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # says where batches go: the CPU
        self.names = output_names(model)[3:]
        try:
            self.run = open_program(str(file), runtime, threads)
        except Exception as error:  # each runtime has its own kinds
            raise ValueError(f"{file}: {runtime} does not take it: {str(error).splitlines()[0]}") from error

    def forward(self, batch: Batch) -> Detections:
        found = []
        for image, size in zip(batch.images, batch.image_sizes.tolist()):
            height, width = (-(-side // self.divisor) * self.divisor for side in size)
            content = np.ascontiguousarray(image[:, :height, :width].numpy()[None])
            outputs = self.run([content, np.array(size, np.int64)])
            found.append([torch.from_numpy(np.array(values)) for values in outputs])
        count = max(len(one[0]) for one in found)
        boxes, scores, labels, *rest = (torch.stack([_padded(v, count) for v in values]) for values in zip(*found))
        optional = dict(zip(self.names, rest))
        extra = {"mask_score": optional["mask_score"]} if "mask_score" in optional else None
        own = optional.get("masks"), optional.get("keypoints"), extra
        return Detections(boxes, scores, labels.long(), labels > 0, *own)


def _padded(values: Tensor, count: int) -> Tensor:
    return torch.cat([values, values.new_zeros(count - len(values), *values.shape[1:])])


def open_program(file: str, runtime: str, threads: int | None) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """An ONNX file as a function of its inputs, in their order; runtime: one of RUNTIMES, on the CPU in float32."""
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        return lambda inputs: session.run(None, dict(zip(names, inputs)))

    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32", **settings})

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = compiled(list(inputs))
        return [found[output] for output in compiled.outputs]

    return run


def quantize(
    file: str | Path,
    out: str | Path,
    model: TwoStageDetector,
    preprocess: Pipeline,
    images: Iterable[np.ndarray],
    keep: Sequence[str] = (),
) -> int:
    """Write `file`, ONNX of `detector export`, with convolutions and matrix products in 8 bits to `out`.

    Static quantisation after training (ONNX Runtime's): the ranges of all maps are those that `images` [H, W, C] uint8
    show; weights have a scale for each channel. keep: names of nodes that stay in float32. Returns how many images were
    seen. Raises ModuleNotFoundError without onnxruntime, ValueError where there are no images.
    """
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"8 bits need {error.name}: pip install 'two-stage-detector[export]'") from None

    images = iter(images)
    if (first := next(images, None)) is None:
        raise ValueError("8 bits need images to learn the ranges from, and there are none")

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.images, self.seen = chain([first], images), 0

        def get_next(self):
            image = next(self.images, None)
            if image is None:
                return None
            self.seen += 1
            batch = as_batch(model, [image], preprocess)
            return {"images": batch.images.cpu().numpy(), "image_size": batch.image_sizes[0].cpu().numpy()}

    reader, prepared = Reader(), Path(out).with_suffix(".prepared.onnx")
    try:
        # what the exporter wrote is folded already, and the shapes of a detector are known only when it runs
        quant_pre_process(str(file), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(out),
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            nodes_to_exclude=list(keep),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        prepared.unlink(missing_ok=True)
    return reader.seen
