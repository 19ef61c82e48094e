"""Data sets in other formats as COCO annotation files beside their pictures, which stay where they are.

    detector convert voc data/VOCdevkit        then: detector train experiment=pascal_voc
    detector convert voc my_data --train trainval --val test
    detector convert voc data/VOCdevkit --train VOC2012/Segmentation/train --val VOC2012/Segmentation/val
    detector convert cityscapes data/cityscapes
    detector convert lvis data/coco
    detector convert yolo my_data

Writes ROOT/annotations/FORMAT_train.json and FORMAT_val.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detector.checkpoint import write_json
from detector.data.formats import READERS, Notes
from detector.ops.text import readable_streams

SPLITS = {"voc": (["VOC2007/trainval", "VOC2012/trainval"], ["VOC2007/test"])}


def convert(kind: str, root: str | Path, splits: Sequence[str], notes: Notes | None = None) -> dict:
    """COCO instances of several splits of one data set together; categories are joined by name.

    kind: voc, cityscapes, lvis or yolo; see `detector.data.formats`. root, splits: see the readers there.
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
    parser = argparse.ArgumentParser(
        prog="detector convert", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("format", choices=READERS)
    parser.add_argument("root", type=Path, help="the folder of the data set")
    parser.add_argument("--train", nargs="+", metavar="SPLIT", help="splits to train on (VOC: VOC2007/trainval ...)")
    parser.add_argument("--val", nargs="+", metavar="SPLIT", help="splits to evaluate on")
    args = parser.parse_args(arguments)
    readable_streams()
    train, val = SPLITS.get(args.format, (["train"], ["val"]))
    try:
        contents = {}
        for name, splits in (("train", args.train or train), ("val", args.val or val)):  # all before any is written
            notes = Notes()
            contents[name] = convert(args.format, args.root, splits, notes)
            for line in notes.lines():
                print(f"{name}: {line}", file=sys.stderr)
            if not contents[name]["annotations"]:
                count = len(contents[name]["images"])
                raise ValueError(f"{name}: none of the {count} images has an object: use a split that is annotated")
        for name, content in contents.items():
            path = args.root / "annotations" / f"{args.format}_{name}.json"
            write_json(path, content)
            images, objects, categories = (len(content[key]) for key in ("images", "annotations", "categories"))
            print(f"{path}: {images} images, {objects} objects of {categories} categories")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
