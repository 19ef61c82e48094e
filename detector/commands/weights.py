"""Weights in and out.

detector weights list [WORD ...]         published detectors that a run may start from, and their AP
detector weights get NAME                download one of them, hf://owner/repo[/file] or https://..., and print its path
detector weights convert SOURCE OUT      a foreign detector's weights, or our .safetensors, as a checkpoint of ours
detector weights export CHECKPOINT OUT   a checkpoint of ours as .safetensors, .pt2 (torch.export) or .onnx, or into a
                                         repository hf://owner/repo of the Hugging Face hub; also
detector export CHECKPOINT OUT
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from detector.commands.import_weights import convert
from detector.config.schema import near
from detector.evaluation.tables import table
from detector.ops.text import readable_streams
from detector.weights.downloads import is_address, located
from detector.weights.loading import SOURCES
from detector.weights.zoo import listing


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: written; 2: it cannot be, and why."""
    parser = argparse.ArgumentParser(
        prog="detector weights", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="list|get|convert|export")
    command = commands.add_parser("list", help="published detectors, with what was measured for them")
    command.add_argument("words", nargs="*", metavar="WORD", help="show those that have all of these in their line")
    command = commands.add_parser("get", help="download published weights into the cache")
    command.add_argument(
        "name", help="a name of `detector weights list`, hf://owner/repo[/file][@revision] or an address"
    )
    command = commands.add_parser("export", help="write CHECKPOINT for other programs")
    command.add_argument("checkpoint", help="of a run, like runs/quickstart/best.pt")
    command.add_argument("out", help="a name that ends in .safetensors, .pt2 or .onnx, or hf://owner/repo[@branch]")
    command.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="fix the canvas of .pt2 and .onnx; else any"
    )
    command.add_argument("--precision", default="fp32", help="of the layers in .pt2 and .onnx: fp32, bf16 or fp16")
    command.add_argument("--trust", nargs="+", default=(), metavar="MODULE", help="your own modules that it may name")
    command = commands.add_parser("convert", help="write SOURCE's weights, with a complete config, to OUT")
    command.add_argument("source", help="a .pth, .pt, .pkl or .safetensors file, or what `get` takes")
    command.add_argument("out", help="the checkpoint to write; detector.load, eval and predict take it")
    command.add_argument(
        "--framework", choices=SOURCES[:-1], help="where the weights are from; else recognised by the keys"
    )
    command.add_argument("--style", choices=("caffe", "pytorch"), help="of strides and pixel statistics; else guessed")
    command.add_argument("--categories", type=Path, help="a text file with one class name per line")
    args = parser.parse_args(arguments)
    readable_streams()
    level = logging.WARNING if args.command == "export" else logging.INFO  # ONNX's packages tell every step
    logging.basicConfig(level=level, format="%(message)s")
    try:
        if args.command == "list":
            print(zoo_table(" ".join(args.words)))
            return 0
        if args.command == "get":
            if not is_address(args.name):
                raise ValueError(
                    f"{args.name!r}: expected framework:name, hf://owner/repo or an address{meant(args.name)}"
                )
            print(located(args.name))
            return 0
        if args.command == "export":
            from detector.export.export import export

            if args.checkpoint.startswith("hf://") and args.out.startswith("checkpoint="):  # in the other order
                args.checkpoint, args.out = args.out.removeprefix("checkpoint="), args.checkpoint
            export(args.checkpoint, args.out, args.size and tuple(args.size), args.precision, args.trust)
            print(args.out)
            return 0
        names = args.categories.read_text(encoding="utf-8").split("\n") if args.categories else None
        names = names and [name.strip() for name in names if name.strip()]
        written = convert(args.source, args.out, args.framework, args.style, names)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    backbone = written["config"]["model"]["backbone"]
    body = f"ResNet-{backbone['depth']}" if "depth" in backbone else backbone.get("name", backbone["_target_"])
    print(f"{args.out}: {body}, {len(written['categories'])} classes")
    return 0


def meant(name: str) -> str:
    """'; did you mean ...?' for a name without its framework."""
    return near(name, [key for key, _ in listing()] + [key.partition(":")[2] for key, _ in listing()])


def padded(text: str) -> list[str]:
    """The lines of a text, all as long as the longest."""
    lines = text.split("\n")
    return [line.ljust(max(map(len, lines))) for line in lines]


def zoo_table(word: str) -> str:
    """The published weights that `word` is found in, a line for each; AP in percent, as published."""
    rows = listing(word)
    if not rows:
        raise ValueError(f"no published weights have {word!r}{meant(word)} Without a word all are shown")
    head = ["name", "box", "mask", "keypoints", "AR", "trained on"]
    lines = [[key, row.box, row.mask, row.keypoints, row.recall, row.data] for key, row in rows]
    settings = ["settings", "────────", *(row.settings for _, row in rows)]
    lines = [f"{line}  {text}" for line, text in zip(padded(table(head, lines)), settings)]
    licences = sorted({f"{row.framework}: {row.licence}" for _, row in rows})
    return "\n".join(lines) + f"\n{len(rows)} files. Licences: {'; '.join(licences)}"


if __name__ == "__main__":
    sys.exit(main())
