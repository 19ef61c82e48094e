"""A trained detector as an ONNX program in 8 bits, if that costs no more AP than it may.

detector quantize checkpoint=runs/quickstart/best.pt output=detector_int8.onnx
detector quantize checkpoint=... output=... most_lost=0.02 calibrate=200 data.root=my_data

The ranges of the maps are learnt from images of the training set; AP is measured on the validation set, with the
program in float32 and in 8 bits. What costs more than `most_lost` is refused: the file is not written. Boxes, masks and
scores come out as of detector export; detector bench int8=FILE says how fast it is.

Exit codes: 0 written, 1 refused, 2 a setting, the checkpoint or the data cannot work.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from detector.checkpoint import atomically
from detector.config import ConfigError, RunError, as_program, config_errors, make_folder
from detector.data import build_dataset, build_loader
from detector.evaluation.evaluator import evaluate
from detector.evaluation.tables import TITLES, table
from detector.export.export import export_program, output_names, save_onnx
from detector.export.programs import Program, quantize
from detector.inference.load import load, merge
from detector.runtime import start_ranks
from detector.settings import Runtime


def quantize_checkpoint(
    checkpoint: str,
    *,
    output: str = "detector_int8.onnx",
    onnx: str | None = None,
    calibrate: int = 100,
    most_lost: float = 0.01,
    keep: list[str] = [],  # noqa: B006  it is read
    threads: int | None = None,
    trust: str | list[str] | None = None,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the program in 8 bits; returns {"AP": {"fp32" and "int8": {iou type: AP}}, "lost": {iou type: AP}}.
    configs/quantize.yaml says what the arguments mean."""
    if calibrate < 1 or not 0 <= most_lost <= 1:
        raise ConfigError(f"calibrate = {calibrate}: must be at least 1; most_lost = {most_lost}: from 0 to 1")
    if Path(output).suffix != ".onnx":
        raise ConfigError(f"output = {output!r}: the name must end in .onnx")
    if onnx and not Path(onnx).is_file():
        raise ConfigError(f"onnx = {onnx!r}: there is no such file; detector export writes one")
    make_folder(Path(output).parent, "output")
    start_ranks(Runtime(device="cpu", threads=threads))
    detector = load(checkpoint, "cpu", trust=trust)
    model, settings = detector.model, merge(detector.config["data"], data or {})
    with config_errors("data"):
        seen, dataset = (
            build_dataset(settings, split, detector.config["augment"], categories=detector.categories)
            for split in ("train", "val")
        )
    with tempfile.TemporaryDirectory() as folder:
        file, small = Path(onnx or f"{folder}/model.onnx"), Path(folder) / "int8.onnx"
        if not onnx:
            print("exporting to ONNX ...", flush=True)
            save_onnx(export_program(model), output_names(model), file)
        step = max(1, len(seen) // calibrate)
        images = (seen.read(i) for i in range(0, len(seen), step)[:calibrate])
        count = quantize(file, small, model, detector.preprocess, images, keep)
        print(f"ranges learnt from {count} images", flush=True)
        found, rows = {}, []
        for name, path in (("fp32", file), ("int8", small)):
            program, started = Program(path, model, threads=threads), time.perf_counter()
            loader = build_loader(dataset, 1, 0, training=False, rank=0, world=1, pad_multiple=model.pad_multiple)
            metrics, _ = evaluate(program, loader, dataset, torch.device("cpu"), per_class=False)
            taken = (time.perf_counter() - started) / len(dataset)
            found[name] = {kind: values["AP"] for kind, values in metrics.items() if kind in TITLES}
            size = os.path.getsize(path) / 2**20
            rows.append(
                [name, *(f"{100 * ap:.2f}" for ap in found[name].values()), f"{1000 * taken:.0f}", f"{size:.1f}"]
            )
        kinds = [f"{TITLES[kind]} AP" for kind in found["fp32"]]
        print("\n" + table(["", *kinds, "ms an image", "MiB"], rows))
        lost = {kind: found["fp32"][kind] - found["int8"][kind] for kind in found["fp32"]}
        worst = max(lost, key=lost.get)
        if lost[worst] > most_lost:
            raise RunError(
                f"8 bits cost {100 * lost[worst]:.2f} {TITLES[worst]} AP, more than most_lost={most_lost:g} allows: "
                f"{output} is not written. calibrate={4 * calibrate} sees more images; "
                f"most_lost={lost[worst] + 0.001:.3f} takes it"
            )
        atomically(Path(output), lambda written: written.write(small.read_bytes()))
    print(f"{output}: {100 * lost[worst]:.2f} {TITLES[worst]} AP lost")
    return {"AP": found, "lost": lost}


main = as_program("quantize", quantize_checkpoint, __doc__)
