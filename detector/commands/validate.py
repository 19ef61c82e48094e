"""Look a data set over before time is spent on it.

    detector validate data=custom data.root=my_data

Takes what `detector train` takes and looks at the data that it would train on, with its image sizes and anchors. Prints
what it finds, and writes report.json and report.html with pictures. Exit codes: 0 nothing that would stop a run, 1
errors, 2 a setting cannot work or there is no data set to look at.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import html
import io
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import hotcoco
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from detector.config import ConfigError, build, compose, explain, make_folder
from detector.config.suggest import hydra_options
from detector.data import Annotations, Pipeline, read_coco, read_image
from detector.data.loader import build_transforms
from detector.data.read_coco import Problems
from detector.inference.draw import draw
from detector.roi import assign_levels

SHOWN = 10  # examples that a finding names
SIZES = (0, 8, 16, 32, 64, 96, 128, 256, 512, np.inf)  # limits of the histogram, sqrt(area) in network pixels


@dataclass
class Finding:
    severity: str  # "error": stops a run or spoils the evaluation; "warning": to be looked at
    split: str
    what: str
    count: int
    examples: list[str]


@dataclass
class Report:
    findings: list[Finding] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    pictures: list[tuple[str, np.ndarray]] = field(default_factory=list)

    def add(self, severity: str, split: str, what: str, examples: Iterable[Any]) -> None:
        examples = list(map(str, examples))
        if examples:
            self.findings.append(Finding(severity, split, what, len(examples), examples[:SHOWN]))

    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


def validate(cfg: DictConfig, images: bool = True, pictures: int = 6) -> Report:
    """The report on the data set of a training configuration. `images=False` leaves the image files unread.

    Raises ConfigError where there is no annotation file to read.
    """
    report, sets = Report(), {}
    for split in ("train", "val"):
        path = Path(cfg.data.root) / cfg.data[split].annotations
        problems = Problems(path, "skip")
        try:
            sets[split] = read_coco(path, masks=cfg.data.masks, max_pixels=cfg.data.max_pixels, problems=problems)
        except FileNotFoundError as error:
            raise ConfigError(f"data.{split}.annotations: {error}") from error
        except ValueError as error:
            report.add("error", split, "the annotation file cannot be used", [error])
        for (is_error, kind), places in problems.found.items():
            report.add("error" if is_error else "warning", split, kind, places)
    for split, found in sets.items():
        look_at_objects(report, split, found)
        look_with_hotcoco(report, split, Path(cfg.data.root) / cfg.data[split].annotations)
    if sets:
        look_at_sizes(report, cfg, sets)
    folders = {split: Path(cfg.data.root) / cfg.data[split].images for split in sets}
    digests = {}
    for split, found in sets.items():
        if images:
            digests[split] = look_at_images(report, split, found, folders[split], cfg.data.max_pixels)
        report.pictures += examples(split, found, folders[split], pictures)
    if len(sets) == 2:
        compare_splits(report, sets, digests)
    report.findings.sort(key=lambda finding: finding.severity)
    return report


def look_at_objects(report: Report, split: str, found: Annotations) -> None:
    """Counts, masks that disagree with boxes, crowded images."""
    per_image = np.diff(found.object_starts)
    objects = ~found.crowd
    images_of = np.repeat(np.arange(len(found)), per_image)
    report.statistics[split] = {
        "images": len(found),
        "images without objects": int((per_image == 0).sum()),
        "objects": int(objects.sum()),
        "crowd regions": int(found.crowd.sum()),
        "objects with a mask": int((np.diff(found.ring_starts) > 0).sum()),
        "most objects in an image": int(per_image.max()),
        "per category": {
            name: {
                "objects": int((own := objects & (found.labels == label)).sum()),
                "images": len(np.unique(images_of[own])),
            }
            for label, name in enumerate(found.categories, 1)
        },
    }
    report.add(
        "warning",
        split,
        "image with more than 100 objects: COCO's AP counts 100 detections of an image, data with many need more",
        (f"image {found.image_ids[i]}: {per_image[i]}" for i in np.flatnonzero(per_image > 100)),
    )
    outlined = np.flatnonzero(np.diff(found.ring_starts) > 0)
    if len(outlined):
        first = found.point_starts[found.ring_starts[outlined]]
        bounds = np.concatenate(
            [np.minimum.reduceat(found.points, first), np.maximum.reduceat(found.points, first)], axis=1
        )
        height, width = found.image_sizes[images_of[outlined]].T
        bounds = bounds.clip(0, np.stack([width, height, width, height], axis=1))
        boxes = found.boxes[outlined]
        side = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
        wrong = np.abs(bounds - boxes).max(axis=1) > np.maximum(2, 0.05 * side)
        report.add(
            "warning",
            split,
            "bbox and segmentation disagree by more than 2 px and a twentieth of the object",
            (
                f"annotation {found.object_ids[i]} (image {found.image_ids[images_of[i]]}): "
                f"bbox {boxes[k].round(1).tolist()}, around the segmentation {bounds[k].round(1).tolist()}"
                for k, i in enumerate(outlined)
                if wrong[k]
            ),
        )
    # the same box, label and image twice: the second can never be found
    keys = np.column_stack([images_of, found.labels, found.boxes.round(1)])
    _, inverse, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    again = np.flatnonzero(counts[inverse.ravel()] > 1)
    report.add(
        "warning",
        split,
        "the same box and category again in an image",
        (f"annotation {found.object_ids[i]} (image {found.image_ids[images_of[i]]})" for i in again),
    )


def look_with_hotcoco(report: Report, split: str, path: Path) -> None:
    """hotcoco's own health check; what it cannot load has been reported already."""
    with contextlib.suppress(ValueError, TypeError, KeyError, OSError), contextlib.redirect_stdout(io.StringIO()):
        checked = hotcoco.COCO(str(path)).healthcheck()
        for severity in ("error", "warning"):
            for item in checked[f"{severity}s"]:
                what = f"{item['code'].replace('_', ' ')} (hotcoco: {item['message']})"
                report.add(severity, split, what, item["affected_ids"])


def look_at_sizes(report: Report, cfg: DictConfig, sets: Mapping[str, Annotations]) -> None:
    """Objects against anchors and pyramid levels, at the size at which the network sees them."""
    model = build(without_weights(cfg), "model", num_classes=1)
    transforms = Pipeline(build_transforms(cfg.augment, "val"))
    for split, found in sets.items():
        boxes, sizes = network_boxes(found, transforms)
        side = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
        counts = np.histogram(side, SIZES)[0]
        names = [f"{low:g} to {high:g} px" for low, high in zip(SIZES, SIZES[1:])]
        statistics = report.statistics[split]
        statistics["size as the network sees it, sqrt(area)"] = dict(zip(names, counts.tolist()))
        best = best_anchor_iou(boxes, sizes, model.rpn.anchors)
        statistics["best anchor"] = {
            f"IoU below {cfg.model.rpn.negative_iou}": int((best < cfg.model.rpn.negative_iou).sum()),
            f"IoU below {cfg.model.rpn.positive_iou}": int((best < cfg.model.rpn.positive_iou).sum()),
            "of objects": len(best),
        }
        if len(best) and (unmatched := float((best < cfg.model.rpn.negative_iou).float().mean())) > 0.01:
            report.add(
                "warning",
                split,
                f"no anchor overlaps {unmatched:.1%} of the objects by IoU {cfg.model.rpn.negative_iou}: "
                "change model.rpn.anchor_sizes or the image size",
                (f"{w:.0f} x {h:.0f} px" for w, h in (boxes[:, 2:] - boxes[:, :2])[best < cfg.model.rpn.negative_iou]),
            )
        extractor = model.box_head.extractor
        rule = (extractor.strides, extractor.canonical_level, extractor.canonical_size, extractor.level_rule)
        levels = torch.bincount(assign_levels(boxes, *rule), minlength=len(extractor.strides)).tolist()
        statistics["pyramid level of the box head"] = {
            f"stride {stride:g}": count for stride, count in zip(extractor.strides, levels)
        }


def without_weights(cfg: DictConfig) -> dict:
    """The model's configuration, to be built without reading weights."""
    model = OmegaConf.to_container(cfg.model, resolve=True)
    model["backbone"].pop("weights", None)
    model.pop("weights", None)
    return model


def network_boxes(found: Annotations, transforms: Pipeline) -> tuple[Tensor, Tensor]:
    """Boxes [M, 4] and sizes (height, width) [M, 2] of their images as the network sees them, crowd left out."""
    sizes = {}
    for height, width in np.unique(found.image_sizes, axis=0).tolist():
        sizes[height, width] = transforms(np.zeros((height, width, 3), np.uint8)).image.shape[:2]
    after = np.array([sizes[tuple(size)] for size in found.image_sizes.tolist()])
    images_of = np.repeat(np.arange(len(found)), np.diff(found.object_starts))[~found.crowd]
    scale = (after / found.image_sizes)[images_of][:, ::-1]
    boxes = found.boxes[~found.crowd] * np.tile(scale, 2)
    return torch.from_numpy(boxes).float(), torch.from_numpy(after[images_of])


def best_anchor_iou(boxes: Tensor, sizes: Tensor, anchors: Any) -> Tensor:
    """[M] the largest IoU of each box with any anchor: per shape that is the anchor nearest to the box's centre."""
    best = torch.zeros(len(boxes))
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    for stride, cells in zip(anchors.strides, anchors.cells):
        last = (sizes.flip(1) - 1).div(stride, rounding_mode="floor") * stride
        nearest = ((centre / stride).round() * stride).clamp(min=0).minimum(last)
        for cell in cells:
            placed = torch.cat([nearest, nearest], dim=1) + cell
            low, high = torch.maximum(placed[:, :2], boxes[:, :2]), torch.minimum(placed[:, 2:], boxes[:, 2:])
            shared = (high - low).clamp(min=0).prod(dim=1)
            area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) + (cell[2:] - cell[:2]).prod()
            best = torch.maximum(best, shared / (area - shared))
    return best


def look_at_images(
    report: Report, split: str, found: Annotations, folder: Path, max_pixels: int
) -> dict[str, list[int]]:
    """Decode every image; returns the image ids by content."""

    def look(index: int) -> tuple[str | None, str | None]:
        path = folder / found.file_name(index)
        try:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            height, width = read_image(path, max_pixels).shape[:2]
        except (OSError, ValueError) as error:
            return None, str(error)
        if [height, width] != found.image_sizes[index].tolist():
            declared = f"width={found.image_sizes[index][1]} height={found.image_sizes[index][0]}"
            return digest, f"image {found.image_ids[index]} {path} is {width} x {height}, not {declared}"
        return digest, None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(tqdm(pool.map(look, range(len(found))), total=len(found), desc=f"read {split}", disable=None))
    report.add("error", split, "image that cannot be read, or is of another size", (e for _, e in results if e))
    by_content = defaultdict(list)
    for image_id, (digest, _) in zip(found.image_ids.tolist(), results):
        if digest:
            by_content[digest].append(image_id)
    report.add("warning", split, "the same image again", (f"images {ids}" for ids in by_content.values() if ids[1:]))
    return by_content


def compare_splits(report: Report, sets: Mapping[str, Annotations], digests: Mapping[str, Mapping]) -> None:
    train, val = (set(sets[split].categories) for split in ("train", "val"))
    report.add("error", "both", "category of val that train does not have", sorted(val - train))
    report.add("warning", "both", "category of train that val does not have", sorted(train - val))
    counts = {split: report.statistics[split]["per category"] for split in sets}
    never = [n for n in sorted(train & val) if counts["val"][n]["objects"] and not counts["train"][n]["objects"]]
    report.add("warning", "both", "category with objects in val but none in train", never)
    if digests:
        both = sorted(digests["train"].keys() & digests["val"].keys())
        report.add(
            "warning",
            "both",
            "image of val that is in train too: the evaluation is too good",
            (f"train {digests['train'][key]}, val {digests['val'][key]}" for key in both),
        )


def examples(split: str, found: Annotations, folder: Path, count: int) -> list[tuple[str, np.ndarray]]:
    """Titles and pictures of evenly spaced images with their objects."""
    pictures = []
    for index in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int):
        with contextlib.suppress(OSError, ValueError):
            objects = found.objects(index)
            picture = draw(read_image(folder / found.file_name(index)), objects.boxes, objects.labels, found.categories)
            scale = min(1, 800 / max(picture.shape))
            picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            pictures.append((f"{split} image {found.image_ids[index]}: {found.file_name(index)}", picture))
    return pictures


def as_json(report: Report) -> dict[str, Any]:
    return {"findings": [asdict(finding) for finding in report.findings], "statistics": report.statistics}


def as_text(report: Report) -> str:
    """For the terminal."""
    lines = []
    for split, numbers in report.statistics.items():
        plain = ", ".join(f"{value} {name}" for name, value in numbers.items() if not isinstance(value, dict))
        lines.append(f"{split}: {plain}")
    for finding in report.findings:
        lines.append(f"{finding.severity.upper()} {finding.split}: {finding.count} x {finding.what}")
        lines += [f"    {example}" for example in finding.examples[:3]]
    totals = Counter(finding.severity for finding in report.findings)
    lines.append(f"{totals['error']} kinds of errors, {totals['warning']} of warnings")
    return "\n".join(lines)


def as_html(report: Report) -> str:
    """A page that needs nothing else; every text that comes from the data is escaped."""

    def bars(numbers: Mapping[str, Any]) -> str:
        most = max([v["objects"] if isinstance(v, dict) else v for v in numbers.values()], default=0) or 1
        rows = ""
        for name, value in numbers.items():
            count = value["objects"] if isinstance(value, dict) else value
            text = f"{count} in {value['images']} images" if isinstance(value, dict) else count
            bar = f"<div class=bar style='width:{200 * count / most:.0f}px'></div>"
            rows += f"<tr><td>{html.escape(name)}<td>{bar}<td>{text}</tr>"
        return f"<table>{rows}</table>"

    body = "<h2>What was found</h2>" + ("" if report.findings else "<p>Nothing.</p>")
    for finding in report.findings:
        items = "".join(f"<li>{html.escape(example)}</li>" for example in finding.examples)
        title = f"{finding.severity}, {finding.split}: {finding.count} × {html.escape(finding.what)}"
        body += f"<details class={finding.severity}><summary>{title}</summary><ul>{items}</ul></details>"
    for split, numbers in report.statistics.items():
        body += f"<h2>{split}</h2><p>"
        body += ", ".join(f"{value} {name}" for name, value in numbers.items() if not isinstance(value, dict)) + "</p>"
        for name, value in numbers.items():
            if isinstance(value, dict):
                body += f"<h3>{html.escape(name)}</h3>{bars(value)}"
    body += "<h2>Examples</h2>"
    for title, picture in report.pictures:
        data = cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()
        source = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
        body += f"<figure><img src='{source}'><figcaption>{html.escape(title)}</figcaption></figure>"
    style = (
        "body{font:15px sans-serif;max-width:1100px;margin:2em auto}.bar{background:#0072b2;height:1em}"
        ".error summary{color:#b00}summary{cursor:pointer;margin:.4em 0}"
        "figure{display:inline-block;margin:.5em;width:30%}img{width:100%}td{padding:0 .6em}"
    )
    return f"<!doctype html><meta charset=utf-8><title>Data set</title><style>{style}</style><h1>Data set</h1>{body}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for `detector train`: data=..., data.root=..., experiment=...")
    parser.add_argument("--config-dir", type=Path, help="a folder with config options of your own")
    parser.add_argument("--output", type=Path, default=Path("runs/validation"), help="folder of the report")
    parser.add_argument("--no-images", action="store_true", help="do not read the image files")
    options = parser.parse_args()
    arguments = options.overrides + (["--config-dir", str(options.config_dir)] if options.config_dir else [])
    try:
        cfg = compose("train", options.overrides, hydra_options(arguments)[1])
    except Exception as error:
        print(f"error: {explain(error, 'train', arguments)}", file=sys.stderr)
        sys.exit(2)
    try:
        make_folder(options.output, "--output")
        report = validate(cfg, images=not options.no_images)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    (options.output / "report.json").write_text(json.dumps(as_json(report), indent=1) + "\n")
    (options.output / "report.html").write_text(as_html(report), encoding="utf-8")
    print(f"{as_text(report)}\n{options.output}: report.json, report.html")
    sys.exit(int(report.has_errors()))


if __name__ == "__main__":
    main()
