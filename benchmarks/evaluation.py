"""From masks in boxes to COCO's numbers: paste, encode, match and accumulate.

    python benchmarks/evaluation.py [--images 5000]

Paste and encode 100 masks of 28 x 28 in an image of 640 x 480, against torchvision's paste with pycocotools' encoding.
Then box and mask AP of that many images with 100 detections each, against pycocotools, and faster-coco-eval where it is
installed, on a tenth of them.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle_tools
from torchvision.models.detection.roi_heads import paste_masks_in_image

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from detector.evaluation import coco_metrics
from detector.ops.paste import encode_window, paste_window

HEIGHT, WIDTH, DETECTIONS, CATEGORIES = 480, 640, 100, 80


def objects(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [count, 4] of 8 to 400 px inside the image and soft discs [count, 28, 28] in them."""
    centre, size = (
        rng.uniform(0, 1, (count, 2)) * [WIDTH, HEIGHT],
        np.exp(rng.uniform(np.log(8), np.log(400), (count, 2))),
    )
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1).astype(np.float32)
    boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clip(0, WIDTH), boxes[:, 1::2].clip(0, HEIGHT)
    axis = np.linspace(-1, 1, 28)
    disc = 1 / (1 + np.exp(-8 * (0.8 - np.hypot(*np.meshgrid(axis, axis)))))
    return boxes, (disc * rng.uniform(0.6, 1.2, (count, 1, 1))).clip(0, 1).astype(np.float32)


def ours(boxes: np.ndarray, masks: np.ndarray) -> list[dict]:
    return [encode_window(*paste_window(m, b, HEIGHT, WIDTH), HEIGHT, WIDTH) for m, b in zip(masks, boxes)]


def peers(boxes: np.ndarray, masks: np.ndarray) -> list[dict]:
    full = paste_masks_in_image(torch.from_numpy(masks)[:, None], torch.from_numpy(boxes), (HEIGHT, WIDTH))[:, 0] > 0.5
    return rle_tools.encode(np.asfortranarray(full.permute(1, 2, 0).numpy().astype(np.uint8)))


def data_set(rng: np.random.Generator, images: int) -> tuple[dict, list[dict]]:
    """Ground truth of 7 objects an image, and 100 detections, some of which are near them."""
    boxes, masks = objects(rng, 800)
    wide = (boxes[:, 2:] - boxes[:, :2] >= 2).all(1)
    boxes, rles = boxes[wide], ours(boxes[wide], masks[wide])
    sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).round(2).tolist()
    truth = {
        "images": [{"id": i, "width": WIDTH, "height": HEIGHT} for i in range(images)],
        "categories": [{"id": k, "name": f"category {k}"} for k in range(1, CATEGORIES + 1)],
        "annotations": [],
    }
    results = []
    for image in range(images):
        picked, labels = rng.integers(0, len(boxes), DETECTIONS), rng.integers(1, CATEGORIES + 1, DETECTIONS).tolist()
        scores = rng.random(DETECTIONS).tolist()
        for i, (which, label, score) in enumerate(zip(picked, labels, scores)):
            entry = {"image_id": image, "category_id": label, "bbox": sides[which], "segmentation": rles[which]}
            results.append(entry | {"score": score})
            if i < 7:
                more = {"id": image * 10 + i + 1, "iscrowd": 0, "area": entry["bbox"][2] ** 2}
                truth["annotations"].append(entry | more)
    return truth, results


def evaluators(truth: dict, results: list[dict], kind: str) -> dict[str, Callable[[], object]]:
    """Box or mask AP by hotcoco, by pycocotools, and by faster-coco-eval where it is installed."""
    found = {name: partial(coco_metrics, truth, results, kind, name) for name in ("hotcoco", "pycocotools")}
    if find_spec("faster_coco_eval"):
        from faster_coco_eval import COCO, COCOeval_faster

        their_truth, theirs = copy.deepcopy((truth, results))  # loadRes writes into them

        def faster() -> None:
            reference = COCO(their_truth)
            evaluation = COCOeval_faster(reference, reference.loadRes(theirs), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()

        found["faster-coco-eval"] = faster
    return found


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--images", type=int, default=2000)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)

    boxes, masks = objects(rng, DETECTIONS)
    contenders = {"ours": lambda: ours(boxes, masks), "torchvision + pycocotools": lambda: peers(boxes, masks)}
    pasted = harness.summary(harness.interleave(contenders, args.repeats), "torchvision + pycocotools")
    print(f"paste and encode {DETECTIONS} masks")
    rows = [[name, row["median_ms"], f"{row['speedup']:.1f} x"] for name, row in pasted.items()]
    print(harness.table(["", "ms", "speed"], rows))

    few, many = data_set(rng, max(1, args.images // 10)), data_set(rng, args.images)
    seconds: dict[str, dict[str, float]] = {}
    for kind in ("bbox", "segm"):
        times = harness.interleave(evaluators(*few, kind), min(args.repeats, 3))
        start = time.perf_counter()
        coco_metrics(*many, kind)
        whole = time.perf_counter() - start
        seconds[kind] = {name: statistics.median(values) for name, values in times.items()} | {"whole": whole}
    print(f"\nchecks, matching and accumulation, seconds: {len(few[1])} detections, {len(many[1])} with hotcoco too")
    rows = [[kind, *(f"{v:.2f}" for v in row.values())] for kind, row in seconds.items()]
    header = ["", *seconds["bbox"]]
    print(harness.table([*header[:-1], f"hotcoco, {args.images} images"], rows))
    harness.save(args.json, "cpu", paste_and_encode=pasted, images=args.images, metrics_seconds=seconds)


if __name__ == "__main__":
    main()
