"""The command `detector`: one word for each thing that there is to do. Also `python -m detector`."""

from __future__ import annotations

import difflib
import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {  # the module whose `main` the word runs, with which arguments before the user's, and what that is good for
    "train": ("commands.train", [], "train a detector, or go on where a run stopped; -m trains a grid of them"),
    "eval": ("commands.evaluate", [], "COCO's metrics of a checkpoint on a data set"),
    "predict": ("commands.predict", [], "detections in images, as pictures and as COCO's JSON"),
    "compare": ("commands.compare", [], "which of several runs is better, by how much, and how sure that is"),
    "bench": ("commands.bench", [], "how fast a model is here, way by way, and what takes the time"),
    "quantize": ("commands.quantize", [], "a checkpoint as ONNX in 8 bits, if that costs little AP"),
    "tracks": ("commands.tracks", [], "HOTA, MOTA and IDF1 of objects that were followed through videos"),
    "driving": ("commands.driving", [], "AP by how hard, high and far objects are, as KITTI has it"),
    "explore": ("commands.explore", [], "an HTML page that shows what each RoI method reads in an image"),
    "features": ("commands.features", [], "what a model makes of the boxes in a COCO file, as arrays in a .npz"),
    "validate": ("commands.validate", [], "look over a data set before time is spent on it"),
    "convert": ("data.convert", [], "data sets and exports of other tools as COCO files, and back; splits"),
    "shapes": ("commands.make_shapes", [], "generate the shapes data set, on which the quickstart trains"),
    "coco": ("commands.prepare_coco", [], "download COCO 2017"),
    "weights": ("commands.weights", [], "weights of torchvision, detectron2, mmdetection in; ours out"),
    "export": ("commands.weights", ["export"], "a checkpoint as safetensors, torch.export or ONNX"),
}
HELP = """Train and compare two-stage detectors with a swappable RoI feature extractor.

    detector COMMAND ...
    detector COMMAND --help

{commands}

From nothing to detections:

    detector shapes --out data/shapes
    detector train
    detector eval checkpoint=runs/quickstart/best.pt
    detector predict checkpoint=runs/quickstart/best.pt images=data/shapes/val

On several GPUs:            torchrun --nproc-per-node=2 -m detector train ...
In Python:                  detector.load("runs/quickstart/best.pt").predict("photo.jpg")
Without the command itself: python -m detector COMMAND ..."""


def main() -> int | None:
    """Run the command that sys.argv names; its exit code. 2: there is no such command."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(HELP.format(commands="\n".join(f"    {name:10}{use}" for name, (_, _, use) in COMMANDS.items())))
        return 0
    if name == "--version":
        print(installed_version())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        print(f"error: there is no command {name!r}{hint} There are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, first, _ = COMMANDS[name]
    sys.argv = [f"detector {name}", *first, *rest]
    return importlib.import_module(f"detector.{module}").main()


def installed_version() -> str:
    try:
        return version("two-stage-detector")
    except PackageNotFoundError:
        return "a checkout that is not installed"
