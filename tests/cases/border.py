"""One small data set, and what becomes of variations of its annotation file: opened, validated, trained on, measured.

`Border.outcome` takes an annotation file from the first look to both evaluators. What is right is told by pycocotools
itself, run on a clean file: `plain`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from omegaconf import OmegaConf
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detector.commands.validate import Report, report_on
from detector.config import ConfigError
from detector.data import CocoDataset, build_dataset, collate
from detector.engine import setup
from detector.evaluation import coco_metrics
from detector.evaluation.coco import BACKENDS, BOX_METRICS
from detector.evaluation.evaluator import ground_truth, measure
from detector.settings import Evaluation
from tests.runs import TINY, checked
from tests.tiny import tiny_model

KINDS = ("bbox", "segm")
SIZES = {1: (64, 64), 2: (48, 64), 3: (64, 48), 4: (64, 64), 5: (48, 48), 6: (64, 64)}  # height, width by image id


def drawn(polygons: list[list[float]], size: tuple[int, int]) -> dict:
    """Polygons as compressed run lengths that JSON can hold."""
    rle = rle_tools.merge(rle_tools.frPyObjects(polygons, *size))
    return {"size": list(size), "counts": rle["counts"].decode()}


def rectangle(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def clean() -> dict:
    """Six images of two categories: polygons of one and of two rings, run lengths in all three forms, a crowd region,
    an image without objects."""
    chance = np.random.default_rng(5)
    annotations = []
    for image, size in list(SIZES.items())[:5]:
        for number in range(3):
            w, h = chance.integers(12, 24, 2) + 0.5 * (number == 1)
            x, y = chance.integers(1, min(size) - 26, 2) + 0.25 * (number == 1)
            polygons = [rectangle(float(x), float(y), float(w), float(h))]
            if number == 1:
                polygons.append([float(x), float(y), float(x) + 5, float(y) + 1, float(x) + 1, float(y) + 6])
            rle = drawn(polygons, size)
            mask = rle_tools.decode(rle)
            segmentation = polygons
            if number == 2:
                ends = np.flatnonzero(np.diff(mask.ravel("F"), prepend=0)).tolist()
                counts = np.diff([0, *ends, mask.size]).tolist()
                segmentation = rle if image % 2 else {"size": list(size), "counts": counts}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": 1 + (number + image) % 2,
                    "bbox": [float(x), float(y), float(w), float(h)] if number < 2 else rle_tools.toBbox(rle).tolist(),
                    "area": float(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
    annotations[5]["iscrowd"] = 1
    images = [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in SIZES.items()]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def detections() -> list[dict]:
    """COCO results that find most objects more or less well, some twice, some as another category, and some of nothing."""
    chance = np.random.default_rng(6)
    found = []
    for entry in clean()["annotations"]:
        size = SIZES[entry["image_id"]]
        for _ in range(1 + chance.integers(0, 2)):
            x, y, w, h = np.array(entry["bbox"]) + chance.normal(0, 1.2, 4)
            category = entry["category_id"] if chance.random() < 0.9 else 3 - entry["category_id"]
            box = [float(v) for v in (x, y, max(w, 2), max(h, 2))]
            found.append(
                {
                    "image_id": entry["image_id"],
                    "category_id": category,
                    "bbox": box,
                    "score": round(float(chance.random()), 2),
                    "segmentation": drawn([rectangle(*box)], size),
                }
            )
    found.append({"image_id": 6, "category_id": 1, "bbox": [3.0, 3.0, 20.0, 20.0], "score": 0.4})
    found[-1]["segmentation"] = drawn([rectangle(3, 3, 20, 20)], SIZES[6])
    return found


def plain(truth: dict, results: list[dict], kind: str) -> dict[str, float]:
    """pycocotools alone, on a file that it can read."""
    with contextlib.redirect_stdout(io.StringIO()):
        real = COCO()
        real.dataset = copy.deepcopy(truth)
        real.createIndex()
        evaluator = COCOeval(real, real.loadRes(copy.deepcopy(results)), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return dict(zip(BOX_METRICS, map(float, evaluator.stats)))


@dataclass
class Outcome:
    """error: why a run would not start, None where it does. said: the warnings, one text for each. numbers: {kind: the
    twelve numbers}, the same from both backends and from the file alone."""

    error: str | None
    report: Report
    said: list[str]
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    train: CocoDataset | None = None
    val: CocoDataset | None = None


class Border:
    """The data set's folder and all that variations of its annotation file share."""

    def __init__(self, folder: Path):
        self.folder = folder
        chance = np.random.default_rng(7)
        (folder / "images").mkdir()
        for image, (height, width) in SIZES.items():
            cv2.imwrite(str(folder / "images" / f"{image}.png"), chance.integers(0, 255, (height, width, 3), np.uint8))
        settings = [f"data.{split}.{key}" for split in ("train", "val") for key in ("images", "annotations")]
        values = ["images", "file.json"] * 2
        self.cfg = checked(
            *TINY, "data=custom", f"data.root={folder}", f"run_dir={folder / 'run'}", "augment=none",
            *map("{}={}".format, settings, values), "data.cache=null",
        )  # fmt: skip
        self.settings = {k: OmegaConf.merge(self.cfg, {"data": {"on_error": k}}) for k in ("raise", "skip")}
        self.model = tiny_model(num_classes=2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.learnt: set[bytes] = set()
        self.known: dict[bytes, dict] = {}  # numbers by what they are made of
        self.evaluation = Evaluation()

    def outcome(self, content: Any, results: list[dict], on_error: str = "raise", step: bool = True) -> Outcome:
        """Write the file, or bytes, and do with it what a run does, and what validate and coco_metrics do."""
        path = self.folder / "file.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        cfg = self.settings[on_error]
        with listening() as said:
            try:
                train, val = (build_dataset(cfg.data, split, cfg.augment) for split in ("train", "val"))
                setup.fit(cfg, train, val, self.evaluation)
                error = None
            except (ConfigError, ValueError) as found:  # as setup.datasets turns it into words
                error = str(found)
        with listening():
            report = report_on(cfg, images=False, pictures=0, suggest=False)
        assert report.has_errors() == (error is not None), (error, report.findings)
        outcome = Outcome(error, report, list(said))
        if error is None:
            outcome.train, outcome.val = train, val
            outcome.numbers = self.measured(path, val, results, on_error)
            if step:
                self.train_on(train)
        return outcome

    def measured(self, path: Path, val: CocoDataset, results: list[dict], on_error: str) -> dict:
        """The numbers of both backends, which are the same, and those of the file by itself."""
        truth = ground_truth(val)
        learnt = np.isin(truth.object_ids, val.annotations.object_ids)
        (height, width), (x, y, w, h) = truth.image_sizes[truth.images_of()[~learnt]].T, truth.boxes[~learnt].T
        assert (
            (w < 0.01) | (h < 0.01) | (x >= width - 0.01) | (y >= height - 0.01) | (x + w < 0.01) | (y + h < 0.01)
        ).all()
        arrays = [value.tobytes() for value in vars(truth).values() if isinstance(value, np.ndarray)]
        key = b"".join([*arrays, repr([truth.category_ids, truth.federated, results]).encode()])
        if key not in self.known:
            found = [measure(truth, results, KINDS, backend, False) for backend in BACKENDS]
            assert found[0] == found[1]
            self.known[key] = found[0]
        if on_error == "raise" and not truth.federated:
            assert {kind: coco_metrics(path, results, kind) for kind in KINDS} == self.known[key]
        return self.known[key]

    def train_on(self, dataset: CocoDataset) -> None:
        """One step, unless the same objects have been learnt from before."""
        found = dataset.annotations
        key = b"".join(a.tobytes() for a in (found.boxes, found.labels, found.crowd, found.points, found.object_starts))
        if key in self.learnt:
            return
        self.learnt.add(key)
        batch, targets = collate([dataset[i] for i in range(len(dataset))])
        losses = self.model.train()(batch, targets)
        assert all(torch.isfinite(loss) for loss in losses.values())
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()


@contextlib.contextmanager
def listening():
    """The warnings that are logged meanwhile, one text for each; nothing is printed."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING and record.getMessage() not in said:
                said.append(record.getMessage())

    logger, ear = logging.getLogger("detector"), Ear()
    propagate = logger.propagate
    logger.addHandler(ear)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(ear)
        logger.propagate = propagate


def each(change: Callable[[dict], Any], only: set[int] | None = None) -> Callable[[dict], None]:
    """A change of every annotation, or of those at some places."""

    def apply(data: dict) -> None:
        for i, entry in enumerate(data["annotations"]):
            if only is None or i in only:
                change(entry)

    return apply


def put(key: str, value: Any, only: set[int] | None = None) -> Callable[[dict], None]:
    return each(lambda entry: entry.__setitem__(key, copy.deepcopy(value)), only)


def convert(key: str, how: Callable[[Any], Any], only: set[int] | None = None) -> Callable[[dict], None]:
    return each(lambda entry: entry.__setitem__(key, how(entry[key])), only)


def drop(key: str, only: set[int] | None = None) -> Callable[[dict], None]:
    return each(lambda entry: entry.pop(key), only)


def records(kind: str, key: str, how: Callable[[Any], Any]) -> Callable[[dict], None]:
    """A change of a field of all images or categories."""

    def apply(data: dict) -> None:
        for record in data[kind]:
            record[key] = how(record.get(key))

    return apply
