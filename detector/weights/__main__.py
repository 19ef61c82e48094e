"""python -m detector.weights convert SOURCE OUT: a foreign detector's weights as a checkpoint of ours."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from detector.weights.convert import convert
from detector.weights.loading import SOURCES


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: written; 2: it cannot be, and why."""
    parser = argparse.ArgumentParser(prog="python -m detector.weights", description=__doc__)
    command = parser.add_subparsers(required=True, metavar="convert").add_parser(
        "convert", help="write SOURCE's weights, with a complete config, to OUT"
    )
    command.add_argument("source", help="a .pth, .pt, .pkl or .safetensors file")
    command.add_argument("out", help="the checkpoint to write; detector.load, eval.py and predict.py take it")
    command.add_argument(
        "--framework", choices=SOURCES[:-1], help="where the weights are from; else recognised by the keys"
    )
    command.add_argument("--style", choices=("caffe", "pytorch"), help="of strides and pixel statistics; else guessed")
    command.add_argument("--categories", type=Path, help="a text file with one class name per line")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        names = args.categories.read_text().split("\n") if args.categories else None
        names = names and [name.strip() for name in names if name.strip()]
        config = convert(args.source, args.out, args.framework, args.style, names)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    backbone = config["model"]["backbone"]
    print(f"{args.out}: ResNet-{backbone['depth']}, {config['model']['num_classes']} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
