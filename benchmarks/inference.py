"""Inference of Mask R-CNN R50-FPN against torchvision's: the same weights and images, 100 detections an image.

    python benchmarks/inference.py                                  batches of 1 and 4 images of 480 x 640 on the CPU
    python benchmarks/inference.py --programs                       both exported too, in ONNX Runtime and OpenVINO
    python benchmarks/inference.py --mmdetection                    mmdetection's too; peers.py says how to install it
    python benchmarks/inference.py --dtype bf16                     torchvision in fp32 too, as it is by itself
    python benchmarks/inference.py --device cuda --batch 1 8 --size 800 1333 --dtype bf16

Ours ends with COCO results: masks pasted where they are visible and run-length encoded. torchvision's ends with
full-size soft masks, as its model returns them, mmdetection's with full-size bool masks; "with RLE" goes on to the same
results with pycocotools. The detections of both are compared too, mmdetection's with those of "ours as mmdetection",
which has its settings: adaptive RoI Align, level rule, anchors, NMS. mmdetection's operators refuse bf16: then it runs
in fp32 only. All take turns, each in a process of its own with the settings that its users have. Programs are exported
by each with its own tools: ours by `detector export`'s, torchvision's by torch.onnx, which traces it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_tools
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.peers import MMDetection, mask_rcnn_pair, mmdetection_data, require_mmdetection, synthetic_batch
from benchmarks.train_step import DTYPES, dtype_of
from detector.evaluation.results import detections_to_coco
from detector.export.export import export_program, output_names, save_onnx
from detector.export.programs import RUNTIMES, Program, installed, open_program
from detector.ops.layers import to_preferred_layout
from detector.runtime import keep_freed_memory
from detector.threads import share_cores

CATEGORIES = list(range(1, 81))


def encode(found: list[dict]) -> list[dict]:
    """COCO results of torchvision's detections, and of mmdetection's, whose masks are bool."""
    results = []
    for image, one in enumerate(found):
        masks = one["masks"][:, 0]
        masks = (masks if masks.dtype == torch.bool else masks > 0.5).permute(1, 2, 0).cpu().numpy()
        rles = rle_tools.encode(np.asfortranarray(masks.astype(np.uint8)))
        rows = zip(one["boxes"].tolist(), one["scores"].tolist(), one["labels"].tolist(), rles)
        for (x1, y1, x2, y2), score, label, rle in rows:
            entry = {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            results.append(entry | {"segmentation": rle})
    return results


def difference(ours: list[dict], theirs: list[dict]) -> dict[str, float]:
    """How the results differ, pairing those of an image and category by the nearest box; px, scores, IoU of masks."""
    if len(ours) != len(theirs):
        raise SystemExit(f"{len(ours)} detections of ours against {len(theirs)} of theirs")
    box, score, iou = 0.0, 0.0, 1.0
    for one in theirs:
        kind = one["image_id"], one["category_id"]
        near = min(
            (other for other in ours if (other["image_id"], other["category_id"]) == kind),
            key=lambda other: np.abs(np.subtract(other["bbox"], one["bbox"])).max(),
        )
        box = max(box, np.abs(np.subtract(near["bbox"], one["bbox"])).max())
        score = max(score, abs(near["score"] - one["score"]))
        iou = min(iou, float(rle_tools.iou([near["segmentation"]], [one["segmentation"]], [0])[0, 0]))
    return {
        "detections": len(ours),
        "box_px": round(float(box), 4),
        "score": round(score, 6),
        "mask_iou": round(iou, 4),
    }


def our_program(model: nn.Module, runtime: str, threads: int) -> Program:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ours.onnx"
        save_onnx(export_program(model), output_names(model), file)
        return Program(file, model, runtime, threads)


def their_program(model: nn.Module, images: list[torch.Tensor], runtime: str, threads: int) -> Callable[[], list]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: the program is for images of this size only
        file = str(Path(folder) / "torchvision.onnx")
        torch.onnx.export(model, (images,), file, opset_version=18, dynamo=False)
        run = open_program(file, runtime, threads)
    arrays = [image.numpy() for image in images]

    def detect() -> list:
        return [len(masks) for masks in run(arrays)[3::4]]  # boxes, labels, scores, masks of each image

    return detect


def build(name: str, batch: int, args: argparse.Namespace) -> Callable[[], list]:
    """One contender's way from images to detections."""
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), dtype_of(name, args)
    settings = "mmdet" if name == "ours as mmdetection" else "torchvision"
    ours, theirs = mask_rcnn_pair(args.device, args.size, confident=True, settings=settings)
    data = synthetic_batch(batch, args.size, 10, args.device)
    inputs: Any = data.images
    if name in ("ours", "ours as mmdetection"):  # as eval.py has it
        if device.type == "cpu":
            keep_freed_memory()
            share_cores()
        model, inputs = to_preferred_layout(ours, device).eval().requires_grad_(False), data.batch
    elif name.startswith("mmdetection"):
        model = MMDetection(ours).to(device).eval()
        inputs = mmdetection_data(data)
    else:
        model = theirs.eval()
    program = name.partition(" in ")[2]
    if program and name.startswith("ours"):
        model, inputs = our_program(ours.eval(), program, args.threads), data.batch
    elif program:
        return their_program(theirs.eval(), data.images, program, args.threads)
    del ours, theirs

    def detect() -> list:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            found = model(inputs)
            if name.startswith("ours"):
                paste = "aligned" if settings == "mmdet" else "torchvision"
                return detections_to_coco(found, data.batch, CATEGORIES, paste=paste)
            return encode(found) if name.endswith("with RLE") else [len(one["masks"]) for one in found]

    return detect


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    options.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    options.add_argument("--dtype", choices=DTYPES, default="fp32")
    options.add_argument("--programs", action="store_true", help="both as exported programs too; on the CPU, in fp32")
    options.add_argument("--mmdetection", action="store_true", help="mmdetection's too, where it is installed")
    args = options.parse_args()
    if args.mmdetection:
        require_mmdetection()
    rows, saved, names = [], [], ["ours", "torchvision", "torchvision with RLE"]
    compared = {"difference": ("ours", "torchvision with RLE")}
    if args.mmdetection and args.dtype == "fp32":
        names += ["ours as mmdetection", "mmdetection", "mmdetection with RLE"]
        compared["mmdetection_difference"] = ("ours as mmdetection", "mmdetection with RLE")
    if args.dtype != "fp32":
        names += ["torchvision, fp32", *["ours as mmdetection", "mmdetection, fp32"] * args.mmdetection]
        compared = {}  # boxes near a threshold come and go
    if args.programs:
        runtimes = [runtime for runtime in RUNTIMES if installed(runtime)]
        names += [f"ours in {runtime}" for runtime in runtimes]
        names += [f"torchvision in {runtime}" for runtime in runtimes if runtime != "openvino"]
    for batch in args.batch:
        builders = {name: partial(build, name, batch, args) for name in names}
        seconds, results, _ = harness.apart(builders, args.repeats, args.device)
        same = {key: difference(results[ours][0], results[theirs][0]) for key, (ours, theirs) in compared.items()}
        figures = harness.summary(seconds, reference="torchvision")
        for name, row in figures.items():
            row["images_per_s"] = round(1000 * batch / row["median_ms"], 3)
            rows.append([batch, name, row["median_ms"], row["images_per_s"], row["speedup"]])
        saved.append({"batch": batch, "figures": figures, **same})
    print(harness.table(["batch", "", "median ms", "images/s", "speed-up"], rows))
    for key, (ours, theirs) in compared.items():
        found = "; ".join(f"batch {one['batch']}: {one[key]}" for one in saved)
        print(f"\nlargest differences of {ours} and {theirs.removesuffix(' with RLE')}: {found}")
    harness.save(args.json, args.device, size=list(args.size), dtype=args.dtype, inference=saved)


if __name__ == "__main__":
    main()
