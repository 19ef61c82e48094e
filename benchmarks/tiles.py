"""Large pictures seen by tiles: AP against the single pictures that they are composed of, and peak memory.

    python benchmarks/tiles.py compose --data data/shapes --out data/large
    detector train experiment=quickstart run_dir=runs/crops schedule.max_iterations=300 data=custom \
        data.root=data/large augment=crops augment.size=160 evaluation.tiles.size=320 evaluation.tiles.overlap=0.4 \
        model.weights=runs/quickstart/best.pt
    python benchmarks/tiles.py ap --json benchmarks/results/tiles_ap.json
    python benchmarks/tiles.py memory --count 16 --batch 2 --formats tif --json benchmarks/results/tiles_memory.json

`compose` puts pictures of a data set side by side into large ones, each in a frame of the colour that the network sees
as zero, and writes a data set of these. `ap` compares what is found in them by tiles with what is found in each single
picture, in the same frame and so in the same surroundings. Same pixels, same objects, same network: what differs is the
tiles. The network should have learnt from crops of such pictures, or it
takes the edge of a picture in its frame for an object. `memory` runs predict and eval on one picture of 10,000 x 10,000
and on one of the size of a tile, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from pycocotools import mask as rle_tools

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from detector.commands.evaluate import evaluate_checkpoint
from detector.commands.predict import predict_files
from detector.config import arguments
from detector.data import Pictures, read_image
from detector.data.annotations import Truth
from detector.data.read_coco import read_truth
from detector.evaluation.coco import as_rle, coco_metrics
from detector.inference.load import load
from detector.inference.tiles import Found, find
from detector.ops.paste import encode_window
from detector.settings import Tiles

FRAME = 16  # px around each single picture: neighbours are twice as far apart
GROUND = (124, 116, 104)  # the mean of ImageNet, which the network subtracts


def framed(image: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] in its frame."""
    height, width = image.shape[:2]
    out = np.full((height + 2 * FRAME, width + 2 * FRAME, 3), GROUND, np.uint8)
    out[FRAME : FRAME + height, FRAME : FRAME + width] = image
    return out


def moved(entry: dict, mask: np.ndarray, y: int, x: int, height: int, width: int) -> dict:
    """A COCO object (or result) with its mask at (y, x) of a larger picture."""
    left, top, w, h = entry["bbox"]
    return {**entry, "bbox": [left + x, top + y, w, h], "segmentation": encode_window(mask, y, x, height, width)}


class Set:
    """The pictures of a split of a data set in the layout of `detector shapes`, all of one size."""

    def __init__(self, root: Path, split: str, count: int | None = None):
        self.root, self.split = root, split
        self.truth: Truth = read_truth(root / "annotations" / f"instances_{split}.json", masks=True)
        content = self.truth.to_coco(segmentation=True)
        self.categories, self.images = content["categories"], content["images"][:count]
        self.objects: dict[int, list[dict]] = defaultdict(list)
        for entry in content["annotations"]:
            self.objects[entry["image_id"]].append(entry)
        self.sides = {(image["height"], image["width"]) for image in self.images}
        if len(self.sides) != 1:
            raise SystemExit(f"{root}: the pictures of {split} have {len(self.sides)} sizes; they must have one")

    def pixels(self, image: dict) -> np.ndarray:
        return read_image(self.root / self.split / image["file_name"])

    def single(self) -> dict:
        """The annotations of the pictures in their frames."""
        (height, width), content = next(iter(self.sides)), {"categories": self.categories}
        size = {"height": height + 2 * FRAME, "width": width + 2 * FRAME}
        content["images"] = [image | size for image in self.images]
        content["annotations"] = [
            moved(entry, drawn(entry, image), FRAME, FRAME, size["height"], size["width"])
            for image in self.images
            for entry in self.objects[image["id"]]
        ]
        return content

    def large(self, side: int) -> Iterator[tuple[np.ndarray, dict, list[dict]]]:
        """Large pictures of `side` x `side` single ones: pixels, image and objects."""
        height, width = (length + 2 * FRAME for length in next(iter(self.sides)))
        for number, start in enumerate(range(0, len(self.images), side * side), 1):
            canvas = np.full((side * height, side * width, 3), GROUND, np.uint8)
            about = {"id": number, "file_name": f"{number:06d}.png", "height": len(canvas), "width": canvas.shape[1]}
            objects = []
            for place, image in enumerate(self.images[start : start + side * side]):
                y, x = place // side * height, place % side * width
                canvas[y : y + height, x : x + width] = framed(self.pixels(image))
                for entry in self.objects[image["id"]]:
                    new = moved(entry, drawn(entry, image), y + FRAME, x + FRAME, *canvas.shape[:2])
                    objects.append(new | {"image_id": number})
            yield canvas, about, objects


def drawn(entry: dict, image: dict) -> np.ndarray:
    """The mask [H, W] bool of an object of an image."""
    return rle_tools.decode(as_rle(entry["segmentation"], (image["height"], image["width"]), "mask")).astype(bool)


def numbered(objects: Sequence[dict]) -> list[dict]:
    return [entry | {"id": number} for number, entry in enumerate(objects, 1)]


def compose(args: argparse.Namespace) -> None:
    for split in ("train", "val"):
        source, images, objects = Set(args.data, split, args.count), [], []
        (args.out / split).mkdir(parents=True, exist_ok=True)
        for canvas, about, own in source.large(args.side):
            Image.fromarray(canvas).save(args.out / split / about["file_name"])
            images.append(about)
            objects += own
        content = {"images": images, "annotations": numbered(objects), "categories": source.categories}
        (args.out / "annotations").mkdir(exist_ok=True)
        file = args.out / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        print(f"{file}: {len(images)} pictures of {images[0]['width']} x {images[0]['height']}, {len(objects)} objects")


def average_precision(content: dict, results: list[dict], most: int) -> dict[str, float]:
    options = {"max_detections": (1, 10, most)}
    return {
        kind: round(100 * coco_metrics(content, results, kind, **options)["AP"], 2)
        for kind in ("bbox", "segm")
        if results and kind.replace("segm", "segmentation") in results[0]
    }


def ap(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    changes = {"box_head": {"detections_per_image": 300}}  # of a look: a tile holds more objects than a single picture
    detector, source = load(args.checkpoint, args.device, changes), Set(args.data, "val", args.count)
    options = {"batch_size": args.batch, "precision": "fp32"}

    def see(image: np.ndarray, tiles: Tiles) -> Found:
        with Pictures().parts_of(image) as parts:
            return find(detector.model, parts, tiles, detector.preprocess, **options)

    single = source.single()
    found = []
    for image in source.images:
        found += see(framed(source.pixels(image)), Tiles(max(next(iter(source.sides))) + 2 * FRAME)).results(
            image["id"], detector.category_ids
        )
    figures = {"single pictures": average_precision(single, found, 100)}
    content = {"images": [], "annotations": [], "categories": source.categories}
    ways = {"tiles": Tiles(args.size, args.overlap, False), "tiles and whole": Tiles(args.size, args.overlap, True)}
    results: dict[str, list[dict]] = {name: [] for name in ways}
    for canvas, about, objects in source.large(args.side):
        content["images"].append(about)
        content["annotations"] += objects
        for name, tiles in ways.items():
            results[name] += see(canvas, tiles).results(about["id"], detector.category_ids)
    content["annotations"] = numbered(content["annotations"])
    for name, entries in results.items():
        figures[name] = average_precision(content, entries, 100 * args.side**2)
    rows = [[name, *values.values(), *(round(values[k] - figures["single pictures"][k], 2) for k in values)]
            for name, values in figures.items()]  # fmt: skip
    kinds = list(figures["tiles"])
    print(harness.table(["", *(f"{kind} AP" for kind in kinds), *(f"{kind} difference" for kind in kinds)], rows))
    about = {"pictures": len(source.images), "side": args.side, "tiles": {"size": args.size, "overlap": args.overlap}}
    harness.save(args.json, args.device, **about, ap=figures)


def memory(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    source, figures = Set(args.data, "val", args.count), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        canvas, about, objects = next(source.large(args.side))
        for side in (args.size, args.large):
            repeats = -(-side // len(canvas))
            picture = np.tile(canvas, (repeats, repeats, 1))[:side, :side]
            entry = about | {"id": 1, "height": side, "width": side}
            boxes = [
                {"image_id": 1, "category_id": own["category_id"], "iscrowd": own["iscrowd"], "bbox": [x, y, w, h]}
                for own in objects
                for x, y, w, h in [own["bbox"]]
                if x + w <= side and y + h <= side
            ]
            for suffix in args.formats:
                (folder / f"{suffix}_{side}").mkdir()
                file = folder / f"{suffix}_{side}" / f"a.{suffix}"
                if suffix == "tif":
                    tifffile.imwrite(file, picture, photometric="rgb", tile=(256, 256), compression="zlib")
                else:
                    Image.fromarray(picture).save(file, quality=95)
                content = {"images": [entry | {"file_name": file.name}], "annotations": numbered(boxes)}
                content["categories"] = source.categories
                (file.parent / "truth.json").write_text(json.dumps(content), encoding="utf-8")
            del picture
        tiles = f"tiles={{size: {args.size}, overlap: 0.2, whole: true}}"
        common = [f"checkpoint={args.checkpoint}", f"device={args.device}", tiles, f"batch_size={args.batch}"]
        for suffix in args.formats:
            for side in (args.size, args.large):
                here = folder / f"{suffix}_{side}"
                pixels = max(2 * args.large**2, 10**8)
                predict = [*common, f"images={here}/a.{suffix}", f"output={here}/found", f"max_pixels={pixels}"]
                evaluate = [*common, f"output={here}/eval", "workers=0", "threads=1", "iou_types=[bbox]"]
                evaluate += [f"data.root={here}", "data.val.images=.", "data.val.annotations=truth.json"]
                evaluate += [f"data.max_pixels={pixels}"]
                works = {
                    "predict": partial(predict_files, **arguments("predict", predict)),
                    "eval": partial(evaluate_checkpoint, **arguments("eval", evaluate)),
                }
                for name, work in works.items():
                    figures[f"{name} {suffix} {side}"] = round(harness.peak_memory(work, args.device, turns=1))
    rows = [[name, mib] for name, mib in figures.items()]
    print(harness.table(["", "peak MiB"], rows))
    harness.save(args.json, args.device, size=args.size, batch=args.batch, peak_mib=figures)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = options.add_subparsers(dest="part", required=True)
    made = parts.add_parser("compose")
    made.add_argument("--out", type=Path, default=Path("data/large"))
    for name in ("ap", "memory"):
        part = parts.add_parser(
            name, parents=[harness.parser("", repeats=1)], conflict_handler="resolve", add_help=False
        )
        part.add_argument("--checkpoint", default="runs/crops/last.pt")
        part.add_argument("--size", type=int, default=320 if name == "ap" else 1024, help="of a tile")
        part.add_argument("--overlap", type=float, default=0.4)
        part.add_argument("--batch", type=int, default=4, help="tiles in a pass of the network")
        part.add_argument("--large", type=int, default=10_000, help="side of the large picture")
        part.add_argument(
            "--formats", nargs="+", default=["tif", "jpg"], help="of the large picture: tif is read by tiles"
        )
    for part in parts.choices.values():
        part.add_argument("--data", type=Path, default=Path("data/shapes"))
        part.add_argument("--count", type=int, help="single pictures; all by default")
        part.add_argument("--side", type=int, default=4, help="single pictures along a side of a large one")
    args = options.parse_args()
    {"compose": compose, "ap": ap, "memory": memory}[args.part](args)


if __name__ == "__main__":
    main()
