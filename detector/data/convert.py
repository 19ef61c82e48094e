"""Data sets of other formats and tools as COCO annotation files, and back; one file as several splits.

    detector convert voc data/VOCdevkit        then: detector train experiment=pascal_voc
    detector convert voc my_data --train trainval --val test
    detector convert voc data/VOCdevkit --train VOC2012/Segmentation/train --val VOC2012/Segmentation/val
    detector convert cityscapes data/cityscapes
    detector convert lvis data/coco
    detector convert yolo my_data
    detector convert kitti data/kitti --train train --val val     the lists in ImageSets, or training: all
    detector convert bdd100k data/bdd100k
    detector convert mot MOT17 --train train --val train

write ROOT/annotations/FORMAT_train.json and FORMAT_val.json; the pictures stay where they are.

    detector convert cvat my_export            annotations.xml, "CVAT for images 1.1"
    detector convert label_studio my_export    its JSON or JSON-MIN
    detector convert labelme my_export         a folder of JSON files
    detector convert supervisely my_project    meta.json, DATASET/ann, DATASET/img

write SOURCE/annotations/TOOL.json, one file with all pictures, for:

    detector convert split my_export/annotations/cvat.json --val 0.2
    detector convert split all.json --val 0.15 --test 0.15 --by patient

And out again: annotations, or what `detector predict` and `detector eval` found.

    detector convert to_yolo my_data/annotations/instances_train.json my_yolo --images my_data/train
    detector convert to_cvat predictions/predictions.json found.xml --images photos --score 0.5
    detector convert to_label_studio predictions/predictions.json tasks.json --images photos
    detector convert to_coco predictions/predictions.json polygons.json
    detector convert to_csv predictions/predictions.json found.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detector.checkpoint import write_json
from detector.data.formats import READERS, TOOLS, WRITERS, Notes
from detector.data.formats.writers import TOLERANCE, load_found
from detector.data.split import split_coco
from detector.ops.text import readable_streams

SPLITS = {"voc": (["VOC2007/trainval", "VOC2012/trainval"], ["VOC2007/test"])}


def convert(kind: str, root: str | Path, splits: Sequence[str], notes: Notes | None = None) -> dict:
    """COCO instances of several splits of one data set together; categories are joined by name.

    kind: one of `detector.data.formats.READERS`. root, splits: see the readers there.
    notes: counts what is read although it is not as the format says.

    Raises ValueError for an unknown kind, no splits or file names that are no text, and what the reader raises.
    """
    if kind not in READERS:
        raise ValueError(f"format {kind!r} is unknown; choose one of {', '.join(READERS)}")
    if not splits:
        raise ValueError("splits: there are none")
    parts = [READERS[kind](Path(root), split, notes) for split in splits]
    for image in (image for part in parts for image in part["images"]):
        if not _is_text(image["file_name"]):
            raise ValueError(f"the file name {image['file_name']!a} is not UTF-8: rename the file")
    if len(parts) == 1:
        return parts[0]
    names = list(dict.fromkeys(category["name"] for part in parts for category in part["categories"]))
    joined = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate(names, 1)]}
    for part in parts:
        image_ids = {image["id"]: len(joined["images"]) + i for i, image in enumerate(part["images"], 1)}
        if "videos" in part:
            before = len(joined.setdefault("videos", []))
            joined["videos"] += [{**video, "id": before + video["id"]} for video in part["videos"]]
            part["images"] = [{**image, "video_id": before + image["video_id"]} for image in part["images"]]
        ids = {category["id"]: names.index(category["name"]) + 1 for category in part["categories"]}
        joined["images"] += [{**image, "id": image_ids[image["id"]]} for image in part["images"]]
        first = len(joined["annotations"]) + 1
        for number, entry in enumerate(part["annotations"], first):
            own = {"id": number, "image_id": image_ids[entry["image_id"]], "category_id": ids[entry["category_id"]]}
            joined["annotations"].append(entry | own)
    return joined


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: written; 2: it cannot be, and why."""
    args = _parser().parse_args(arguments)
    readable_streams()
    notes = Notes()
    try:
        lines = args.task(args, notes)
    except (ValueError, OSError) as error:
        lines, failure = [], error
    else:
        failure = None
    for line in notes.lines():
        print(line, file=sys.stderr)
    for line in lines:
        print(line)
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
    return 0 if failure is None else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="detector convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name in READERS:
        kind = kinds.add_parser(name, help="a data set of this format as COCO files")
        kind.add_argument("root", type=Path, help="the folder of the data set")
        kind.add_argument("--train", nargs="+", metavar="SPLIT", help="splits to train on (VOC: VOC2007/trainval ...)")
        kind.add_argument("--val", nargs="+", metavar="SPLIT", help="splits to evaluate on")
        kind.set_defaults(task=_convert_splits)
    for name in TOOLS:
        kind = kinds.add_parser(name, help="an export of this tool as a COCO file")
        kind.add_argument("source", type=Path, help="the folder of the export, or its file")
        kind.add_argument("--images", type=Path, help="the folder of the pictures, where it is another than usual")
        kind.add_argument("--output", type=Path, help="the file to write; SOURCE/annotations/FORMAT.json by default")
        kind.set_defaults(task=_convert_export)
    kind = kinds.add_parser("split", help="one COCO file as several, for training, validation, test")
    kind.add_argument("source", type=Path, help="the COCO file; NAME_train.json, NAME_val.json are written beside it")
    kind.add_argument("--val", type=float, default=0.2, help="share of the images to evaluate on (0.2)")
    kind.add_argument("--test", type=float, default=0.0, help="share of the images for a test set (none)")
    kind.add_argument(
        "--by", default="image", help="a field of the images, such as patient: equal values stay together"
    )
    kind.add_argument("--pattern", help="instead, a regular expression for file names: what its group matches")
    kind.add_argument("--seed", type=int, default=0, help="of what chance decides")
    kind.set_defaults(task=_split)
    for name in WRITERS:
        kind = kinds.add_parser(name, help="annotations or predictions as this")
        kind.add_argument("source", type=Path, help="a COCO file, or predictions.json")
        kind.add_argument("target", type=Path, help="the folder to write" if name == "to_yolo" else "the file to write")
        kind.add_argument(
            "--annotations", type=Path, help="the COCO file that the predictions of `detector eval` are on"
        )
        kind.add_argument("--images", type=Path, help="the folder of the pictures, from which names are to start")
        kind.add_argument("--score", type=float, default=0.0, help="the least score of a detection")
        if name == "to_coco":
            kind.add_argument(
                "--tolerance", type=float, default=TOLERANCE, help="pixels by which outlines are smoothed"
            )
        if name == "to_label_studio":
            kind.add_argument(
                "--prefix", default="/data/local-files/?d=", help="what its server puts before file names"
            )
            kind.add_argument("--from-name", default="label", help="name of its label tags")
            kind.add_argument("--to-name", default="image", help="name of its image tag, and of the data that it shows")
        if name == "to_yolo":
            kind.add_argument("--split", default="train", help="name of the split: train, val, ...")
            kind.add_argument("--boxes", action="store_true", help="leave outlines away")
        kind.set_defaults(task=_write)
    return parser


def _convert_splits(args: argparse.Namespace, notes: Notes) -> list[str]:
    train, val = SPLITS.get(args.format, (["train"], ["val"]))
    contents = {}
    for name, splits in (("train", args.train or train), ("val", args.val or val)):  # all before any is written
        own = Notes()
        try:
            contents[name] = convert(args.format, args.root, splits, own)
        finally:
            notes.found |= {f"{name}: {kind}": places for kind, places in own.found.items()}
        if not contents[name]["annotations"]:
            count = len(contents[name]["images"])
            raise ValueError(f"{name}: none of the {count} images has an object: use a split that is annotated")
    return [
        _written(args.root / "annotations" / f"{args.format}_{name}.json", content)
        for name, content in contents.items()
    ]


def _convert_export(args: argparse.Namespace, notes: Notes) -> list[str]:
    if not args.source.exists():
        raise FileNotFoundError(f"{args.source} does not exist")
    content = TOOLS[args.format](args.source, args.images, notes)
    folder = args.source if args.source.is_dir() else args.source.parent
    return [_written(args.output or folder / "annotations" / f"{args.format}.json", content)]


def _split(args: argparse.Namespace, notes: Notes) -> list[str]:
    shares = {"train": 1 - args.val - args.test, "val": args.val} | ({"test": args.test} if args.test else {})
    parts = split_coco(load_found(args.source), shares, args.by, args.pattern, args.seed, notes)
    return [
        _written(args.source.with_name(f"{args.source.stem}_{name}.json"), content) for name, content in parts.items()
    ]


def _write(args: argparse.Namespace, notes: Notes) -> list[str]:
    content = load_found(args.source, args.annotations, None if args.format == "to_yolo" else args.images, args.score)
    others = ("tolerance", "prefix", "from_name", "to_name", "split", "boxes")
    options = {key: value for key, value in vars(args).items() if key in others}
    if args.format == "to_yolo":
        options["images"] = args.images
    else:
        args.target.parent.mkdir(parents=True, exist_ok=True)
    return [f"{args.target}: {WRITERS[args.format](content, args.target, notes, **options)}"]


def _written(path: Path, content: dict) -> str:
    write_json(path, content)
    images, objects, categories = (len(content[key]) for key in ("images", "annotations", "categories"))
    return f"{path}: {images} images, {objects} objects of {categories} categories"


if __name__ == "__main__":
    sys.exit(main())
