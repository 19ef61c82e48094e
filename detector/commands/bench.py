"""How fast a trained detector is on this machine, and what takes the time.

detector bench checkpoint=runs/quickstart/best.pt
detector bench checkpoint=... images=photos size=640 batch=[1,8] device=cuda
detector bench checkpoint=... ways=[fp32,bf16,compile] threads=4 output=bench.json
detector bench checkpoint=... onnx=detector.onnx int8=detector_int8.onnx     programs that export and quantize wrote

A look is all from the picture's bytes to objects in its pixels: decoding, resizing, the network, NMS, masks pasted. The
ways: PyTorch in fp32, bf16, fp16, with its backbone and neck compiled; the exported program in ONNX Runtime and
OpenVINO. "finds" is the share of fp32's objects that a way finds too.

Exit codes: 0 done, 2 a setting, the checkpoint or the pictures cannot work.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from detector.checkpoint import write_json
from detector.commands.sources import find_images
from detector.config import ConfigError, as_program, config_errors
from detector.data import Pipeline, ResizeShortestEdge
from detector.evaluation.tables import table
from detector.export.export import export_program, output_names, save_onnx
from detector.export.programs import RUNTIMES, Program, installed
from detector.inference.load import load
from detector.inference.predict import Detector, as_batch
from detector.inference.result import Result
from detector.ops.boxes import pairwise_iou, survivors
from detector.roi import RoIExtractor
from detector.runtime import keep_freed_memory, start_ranks
from detector.settings import Runtime

WAYS = ("fp32", "bf16", "fp16", "compile", *RUNTIMES)
PARTS = ("decode", "resize", "backbone", "RPN", "RoI", "heads", "NMS", "paste")
MOST = 16  # pictures that take turns
WARM = 2  # looks that are not counted


class Stopwatch:
    """Seconds of named parts, each without the parts that run inside it."""

    def __init__(self, wait: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter):
        """wait: until a GPU has done what it was given."""
        self.seconds: dict[str, float] = {}
        self.wait, self.clock, self.inside = wait, clock, []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.wait()
        start = self.clock()
        self.inside.append(0.0)
        try:
            yield
        finally:
            self.wait()
            taken, within = self.clock() - start, self.inside.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - within
            if self.inside:
                self.inside[-1] += taken

    def timed(self, name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return run

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Time the parts of a model in this context."""
        suppress = self.timed("NMS", survivors)
        box = model.box_head and model.box_head.stages[-1]
        changed: list[tuple[Any, str, Callable]] = [
            (model.backbone, "forward", self.timed("backbone", model.backbone.forward)),
            (model.neck, "forward", self.timed("backbone", model.neck.forward)),
            (model.rpn, "forward", self.timed("RPN", model.rpn.forward)),
            (model.rpn, "propose", partial(model.rpn.propose, suppress=suppress)),
        ]
        for head in (model.box_head, model.mask_head, model.keypoint_head, *model.extra_heads.values()):
            changed += [(head, "detect", self.timed("heads", head.detect))] if head is not None else []
        changed += [(box, "select", partial(box.select, suppress=suppress))] if box is not None else []
        for module in model.modules():
            if isinstance(module, RoIExtractor):
                changed.append((module, "forward", self.timed("RoI", module.forward)))
        before = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in changed]
        try:
            for owner, name, function in changed:
                owner.__dict__[name] = function
            yield
        finally:
            for owner, name, function in before:
                owner.__dict__.pop(name, None)
                if function is not None:
                    owner.__dict__[name] = function


def bench(
    checkpoint: str,
    *,
    images: str | list[str] | None = None,
    size: int | None = None,
    batch: list[int] = [1, 4],  # noqa: B006  it is read
    ways: list[str] | None = None,
    onnx: str | None = None,
    int8: str | None = None,
    repeats: int = 20,
    threads: int | None = None,
    device: str = "auto",
    output: str | None = None,
    trust: str | list[str] | None = None,
) -> dict[str, Any]:
    """Time a checkpoint's detector; returns the numbers. configs/bench.yaml says what the arguments mean."""
    if repeats < 1 or not batch or min(batch) < 1 or (size is not None and size < 32):
        raise ConfigError(
            f"repeats = {repeats}, batch = {batch}, size = {size}: must be at least 1, and the size 32 px"
        )
    wrong = [way for way in ways or () if way not in WAYS]
    if wrong:
        raise ConfigError(f"ways = {wrong}: choose of {', '.join(WAYS)}")
    with config_errors("device"):
        world = start_ranks(Runtime(device=device, threads=threads))
    if world.device.type == "cpu":
        keep_freed_memory()
    detector = load(checkpoint, world.device, trust=trust)
    if size:
        pipeline = Pipeline([ResizeShortestEdge(size, size)], channels=detector.pictures.channels)
        detector = dataclasses.replace(detector, preprocess=pipeline)
    pictures = read_bytes(detector, images, size)
    wait = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    looks = Looks(detector, pictures, wait)
    chosen = ways or [way for way in WAYS if way != "fp16" and (way not in RUNTIMES or world.device.type == "cpu")]
    chosen = [way for way in chosen if ways or way not in RUNTIMES or installed(way)]
    rows, first = [], None
    with tempfile.TemporaryDirectory() as folder:
        for way in [*chosen, *(["int8"] if int8 else [])]:
            try:
                file = int8 if way == "int8" else exported(detector, onnx, folder) if way in RUNTIMES else None
                contender, precision = contender_of(detector, way, file, threads)
                for count in batch if way not in (*RUNTIMES, "int8") else [1]:
                    print(f"{way}, {count} at once ...", flush=True)
                    row, found = looks.time(contender, precision, count, repeats)
                    first = found if first is None else first
                    rows.append({"way": way, "batch": count, **row, "finds": agreement(first, found)})
            except (ValueError, ModuleNotFoundError, RuntimeError) as error:
                print(f"{way}: left out: {str(error).splitlines()[0]}")
    parts = {way: looks.parts(way, repeats) for way in ("fp32", "bf16") if way in chosen}
    known = {"checkpoint": str(checkpoint), "device": str(world.device), "threads": torch.get_num_threads()}
    known |= {"pictures": len(pictures), "network_sees": looks.seen(), "repeats": repeats}
    numbers = {**known, "ways": rows, "parts_ms": parts, "recommended": recommended(rows)}
    print(f"\n{report(numbers)}")
    if output:
        write_json(output, numbers, indent=1)
    return numbers


def read_bytes(detector: Detector, images: str | list[str] | None, size: int | None) -> list[Any]:
    """Pictures, as files, or one that is generated, as the bytes of a JPEG."""
    if images is not None:
        return find_images(images)[:MOST]
    if detector.pictures.channels not in (1, 3):
        raise ConfigError("images: name pictures of the model's channels: only grey and coloured ones are generated")
    side = size or 640
    small = np.random.default_rng(0).integers(0, 256, (side // 32, side // 24, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(small).resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(held, "JPEG", quality=90)
    return [held.getvalue()]


class Looks:
    """Looks of a detector at pictures that take turns."""

    def __init__(self, detector: Detector, pictures: Sequence[Any], wait: Callable[[], None]):
        self.detector, self.wait = detector, wait
        self.folder = tempfile.TemporaryDirectory()
        self.files = []
        for number, picture in enumerate(pictures):
            if isinstance(picture, bytes):
                path = Path(self.folder.name) / f"{number}.jpg"
                path.write_bytes(picture)
                picture = path
            self.files.append(picture)
        with config_errors("images"):
            self.arrays = [detector.pictures.read(file) for file in self.files]

    def seen(self) -> list[int]:
        """(height, width) of the first picture in the network."""
        return list(self.detector.preprocess(self.arrays[0]).image.shape[:2])

    def batch(self, number: int, count: int) -> list[int]:
        return [(number * count + i) % len(self.files) for i in range(count)]

    def time(
        self, detector: Detector, precision: str, count: int, repeats: int
    ) -> tuple[dict[str, float], list[Result]]:
        """Milliseconds of looks at `count` pictures at once, and what was found in the first ones."""
        taken, found = [], []
        for number in range(-WARM, repeats):
            chosen = self.batch(max(number, 0), count)
            self.wait()
            start = time.perf_counter()
            arrays = [detector.pictures.read(self.files[i]) for i in chosen]
            results = detector.predict_batch(arrays, threshold=self.least, precision=precision)
            self.wait()
            if number >= 0:
                taken.append(1000 * (time.perf_counter() - start))
            found = found or results[:1]
        p50, p95, p99 = np.percentile(taken, [50, 95, 99])
        row = {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "images_per_s": 1000 * count / p50}
        return {name: round(float(value), 3) for name, value in row.items()}, found

    @property
    def least(self) -> float:
        return float(np.max(self.detector.least_score("best")[0]))

    def parts(self, precision: str, repeats: int) -> dict[str, float]:
        """Median milliseconds of each part of a look at one picture."""
        detector, every = self.detector, []
        for number in range(-WARM, repeats):
            [index] = self.batch(max(number, 0), 1)
            watch = Stopwatch(self.wait)
            with watch.part("decode"):
                array = detector.pictures.read(self.files[index])
            with watch.part("resize"):
                as_batch(detector.model, [array], detector.preprocess)
            seconds = dict(watch.seconds)
            # all of predict, of which resizing, timed above, and the parts of the model are taken off: pasting is left
            with watch.of(detector.model), watch.part("paste"):
                detector.predict_batch([array], threshold=self.least, precision=precision)
            watch.seconds["paste"] = max(0.0, watch.seconds["paste"] - seconds["resize"])
            if number >= 0:
                every.append(watch.seconds)
        names = [name for name in PARTS if any(name in one for one in every)]
        return {name: round(1000 * float(np.median([one.get(name, 0.0) for one in every])), 3) for name in names}


def contender_of(detector: Detector, way: str, file: Path | None, threads: int | None) -> tuple[Detector, str]:
    """(the detector as this way has it, its precision)."""
    if file is not None:
        runtime = "openvino" if way == "openvino" else "onnxruntime"
        return dataclasses.replace(detector, model=Program(file, detector.model, runtime, threads)), "fp32"
    if way != "compile":
        return detector, way
    model = copy.deepcopy(detector.model)
    model.backbone.forward = torch.compile(model.backbone.forward)
    model.neck.forward = torch.compile(model.neck.forward)
    return dataclasses.replace(detector, model=model), "fp32"


def exported(detector: Detector, onnx: str | None, folder: str) -> Path:
    """The program as ONNX, exported once."""
    file = Path(onnx) if onnx else Path(folder) / "model.onnx"
    if onnx and not file.is_file():
        raise ConfigError(f"onnx = {onnx!r}: there is no such file; detector export writes one")
    if not file.is_file():
        print("exporting to ONNX ...", flush=True)
        model = copy.deepcopy(detector.model).cpu()
        save_onnx(export_program(model), output_names(model), file)
    return file


def agreement(reference: Sequence[Result], found: Sequence[Result]) -> float:
    """The share of the reference's objects that are found with their class and an IoU of 0.5 or more."""
    count = met = 0
    for one, other in zip(reference, found):
        count += len(one.boxes)
        if len(one.boxes) and len(other.boxes):
            same = (pairwise_iou(one.boxes[None], other.boxes[None])[0] >= 0.5) & (one.labels[:, None] == other.labels)
            met += int(same.any(1).sum())
    return round(met / count, 4) if count else 1.0


def recommended(rows: Sequence[Mapping[str, Any]]) -> str:
    """The fastest way for one picture at a time, of those that find what fp32 finds."""
    fit = [row for row in rows if row["batch"] == min(r["batch"] for r in rows) and row["finds"] >= 0.9]
    if not fit:
        return "no way finds what fp32 finds"
    best = min(fit, key=lambda row: row["p50_ms"])
    most = max((row for row in rows if row["finds"] >= 0.9), key=lambda row: row["images_per_s"])
    text = f"{best['p50_ms']:.1f} ms at {best['way']}: {best['images_per_s']:.0f} frames/s"
    if most["images_per_s"] > 1.1 * best["images_per_s"]:
        text += f"; {most['images_per_s']:.0f} frames/s at {most['way']}, {most['batch']} at once"
    return text


def report(numbers: Mapping[str, Any]) -> str:
    rows = [
        [row["way"], str(row["batch"]), *(f"{row[k]:.1f}" for k in ("p50_ms", "p95_ms", "p99_ms", "images_per_s"))]
        + [f"{100 * row['finds']:.0f} %"]
        for row in numbers["ways"]
    ]
    text = table(["way", "at once", "p50 ms", "p95 ms", "p99 ms", "images/s", "finds"], rows)
    parts = [[way, *(f"{values.get(name, 0):.1f}" for name in PARTS)] for way, values in numbers["parts_ms"].items()]
    if parts:
        text += "\n\n" + table(["one picture, ms", *PARTS], parts)
    height, width = numbers["network_sees"]
    text += f"\n\nthe network sees {height} x {width} px on {numbers['device']}, {numbers['threads']} CPU threads"
    return f"{text}\n{numbers['recommended']}"


main = as_program("bench", bench, __doc__)
