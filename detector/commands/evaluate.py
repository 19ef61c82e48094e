"""Evaluate a checkpoint with COCO's metrics.

detector eval checkpoint=runs/quickstart/best.pt
detector eval checkpoint=... evaluator=pycocotools           the reference implementation: the same numbers
detector eval checkpoint=... data.val.annotations=annotations/other.json data.val.images=other
detector eval checkpoint=... model.box_head.score_threshold=0.001
detector eval checkpoint=... 'max_detections=[1,10,300]'     crowded images: COCO's AP stops at 100 of a class
detector eval checkpoint=... flip=true 'scales=[0.75,1,1.25]'                  test-time augmentation
detector eval checkpoint=... 'operating_point={precision: 0.9}'   from which score on predict shows objects
detector eval checkpoint=... trust=my_package                a model with parts of your own
torchrun --nproc-per-node=2 -m detector eval checkpoint=...  each image on one of the ranks

Exit codes: 0 done, 1 failed, 2 a setting, the checkpoint or the data cannot work.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from detector.checkpoint import write_json
from detector.comparison.run_report import Evaluated, write_run_report
from detector.config import ConfigError, as_program, config_errors, make_folder
from detector.data import CocoDataset, build_dataset, build_loader
from detector.data.contents import contents, same, short_key
from detector.evaluation.evaluator import evaluate, ground_truth
from detector.evaluation.fit import attribute_groups, rehearse
from detector.evaluation.froc import FROC, write_froc
from detector.evaluation.operating_point import (
    OPERATING_POINT,
    check_criterion,
    describe,
    kept_matches,
    main_kind,
)
from detector.evaluation.operating_point import operating_point as find_operating_point
from detector.evaluation.proposals import without_classes
from detector.evaluation.tables import (
    SHOWN_CLASSES,
    attribute_csv,
    attribute_table,
    class_csv,
    class_table,
    summary_table,
)
from detector.inference.load import load, merge
from detector.inference.predict import Detector
from detector.inference.tiles import results_by_image, tiles_of
from detector.inference.tta import Augmented
from detector.runtime import chosen_precision, data_workers, start_ranks
from detector.settings import COCO_LIMITS, Runtime, check_limits
from detector.weights.downloads import is_address

log = logging.getLogger(__name__)


def evaluate_checkpoint(
    checkpoint: str,
    *,
    output: str | None = None,
    evaluator: Literal["hotcoco", "pycocotools"] = "hotcoco",
    iou_types: list[Literal["bbox", "segm", "boundary", "keypoints", "voc", "attributes"]] | None = None,
    sigmas: list[float] | None = None,
    max_detections: list[int] | None = None,
    batch_size: int = 8,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32",
    workers: int | Literal["auto"] = "auto",
    threads: int | Literal["auto"] | None = None,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    tiles: dict[str, Any] | None = None,
    froc: bool | None = None,
    operating_point: Literal["f1"] | dict[str, float] = "f1",
    paste: Literal["aligned", "torchvision"] = "aligned",
    trust: str | list[str] | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint; returns the metrics. configs/eval.yaml says what the arguments mean.

    Writes predictions.json (COCO results), metrics.json, table.txt, classes.csv, operating_point.json (the score from
    which on `predict` shows objects, if the folder is the usual one), report.html, and about.json (which checkpoint,
    which annotations) into the output folder; where `output` is None, that of `usual_folder`. Categories are matched by
    name: a data set with a category that the model does not know is refused, what the model finds of a category that
    the data set does not have is left out. The proposals of a model without a box head are measured whatever the
    category. What cannot be measured is refused before images are read.
    """
    settings = {**locals(), "checkpoint": str(checkpoint), "output": output and str(output)}  # for about.json
    criterion = check_criterion(operating_point)
    with config_errors("runtime"):
        runtime = Runtime(device=device, precision=precision, workers=workers, threads=threads)
    world = start_ranks(runtime)
    settings["precision"] = precision = chosen_precision(world.device, precision)
    detector = load(checkpoint, world.device, model, trust)
    data, network = merge(detector.config["data"], data or {}), detector.model
    proposals_only = network.box_head is None
    measured = detector.config.get("evaluation") or {}  # older checkpoints lack some
    sigmas = sigmas or measured.get("sigmas")
    with config_errors("max_detections"):
        limits = check_limits(max_detections or measured.get("max_detections") or COCO_LIMITS)
    keep_enough(network, limits[-1], ((model or {}).get("box_head") or {}).get("detections_per_image"))
    with config_errors("data"):
        categories = None if proposals_only else detector.categories
        known = {"categories": categories, "attributes": attribute_groups(network)}
        dataset = build_dataset(data, "val", detector.config["augment"], **known)
        options = {"keypoint_names": detector.keypoint_names, "max_detections": limits}
        kinds = list(rehearse(network, dataset, evaluator, iou_types, sigmas, **options))
        padding = {key: data[key] for key in ("group_by_aspect", "pad_multiple", "pad_to")}
        ranks = {"rank": world.rank, "world": world.size}
        loading = data_workers(world.device, workers)
        loader = build_loader(dataset, batch_size, loading, training=False, **ranks, **padding)
    with config_errors("tiles"):
        wanted = tiles_of(detector.config, tiles or {})
    detect = None
    if wanted.size:
        if flip or list(scales) != [1.0]:
            raise ConfigError("tiles.size: tiles are seen once each; flip=false scales=[1.0] goes with them")
        options = {"paste": paste, "precision": precision, "batch_size": batch_size, **ranks}
        detect = partial(results_by_image, dataset=dataset, tiles=wanted, **options)
    usual = usual_folder(checkpoint, settings["data"] or {}, detector, dataset)
    folder, key = make_folder(output or usual, "output"), short_key(contents(dataset))
    if output:
        refuse_other_results(folder, key)
    if flip or list(scales) != [1.0]:
        with config_errors("scales"):
            network = Augmented(network, scales, flip, dataset.mirrored)
    with contextlib.closing(loader):  # or its processes outlive an error
        metrics, results = evaluate(
            network,
            loader,
            dataset,
            world.device,
            precision=precision,
            evaluator=evaluator,
            iou_types=kinds,
            sigmas=sigmas,
            max_detections=limits,
            paste=paste,
            folder=folder,
            detect=detect,
        )
    if world.main:
        about = {"checkpoint": str(checkpoint), "settings": settings}
        files = {"annotations": dataset.annotation_files, "images": dataset.folders}
        about |= {name: str(paths[0]) if len(paths) == 1 else list(map(str, paths)) for name, paths in files.items()}
        about |= {"data": key, "max_detections": list(limits)}
        write_json(folder / "about.json", about, indent=1)
        truth = without_classes(ground_truth(dataset)) if proposals_only else ground_truth(dataset)
        if len(dataset.annotation_files) > 1:  # images and categories of predictions.json have the numbers of this
            write_json(folder / "annotations.json", ground_truth(dataset).to_coco())
        summary, written, points = summary_table(metrics, limits), ["metrics.json", "predictions.json"], None
        print(f"\n{summary}\n")
        (folder / "table.txt").write_text(f"{summary}\n", encoding="utf-8")
        with optional("table of classes"):
            (folder / "table.txt").write_text(f"{summary}\n\n{class_table(metrics, truth)}\n", encoding="utf-8")
            print(f"{class_table(metrics, truth, SHOWN_CLASSES)}\n")
        if "attributes" in metrics:
            found = attribute_table(metrics)
            print(f"{found}\n")
            with open(folder / "table.txt", "a", encoding="utf-8") as file:
                file.write(f"\n{found}\n")
            (folder / "attributes.csv").write_text(attribute_csv(metrics), encoding="utf-8")
            written.append("attributes.csv")
        if not proposals_only:
            with optional("operating point"):
                kind = main_kind(metrics)
                point = find_operating_point(kept_matches(truth, results, kind, limits[-1]), kind, criterion)
                write_json(folder / OPERATING_POINT, {"iteration": detector.iteration, **point})
                print(describe(point))
                points = point["classes"]
            if points and (measured.get("froc") if froc is None else froc):
                with optional("FROC"):
                    print(f"\n{write_froc(truth, results, kind, limits[-1], folder)}\n")
                    written.append(FROC)
        with optional("classes.csv"):
            (folder / "classes.csv").write_text(class_csv(metrics, truth, points), encoding="utf-8")
            written.append("classes.csv")
        if points and {"bbox", "segm"} & set(metrics):
            found = Evaluated(
                *(str(checkpoint), truth, results, metrics, point, limits, dataset.folders, dataset.pictures),
                *(Path(checkpoint).parent / "log.jsonl", detector.config),
            )
            written += ["report.html"] if write_run_report(found, folder / "report.html") else []
        print(f"{len(dataset)} images, {len(results)} detections; {folder}: {', '.join(written)}")
    if world.size > 1:
        dist.destroy_process_group()
    return metrics


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """A failure in here is a warning: what was measured is written and shown by then, and is not lost."""
    try:
        yield
    except Exception as error:
        log.warning("no %s: %s: %s", what, type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))


def refuse_other_results(folder: Path, key: str) -> None:
    """Raises ConfigError if the results in `folder` are those of a data set that holds something else."""
    try:
        before = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if before.get("data", key) != key:
        raise ConfigError(
            f"output: {folder} holds the results on {before['annotations']}, which is not what is evaluated now; "
            "name another folder, or remove that one"
        )


def keep_enough(model: nn.Module, limit: int, wanted: int | None) -> None:
    """Let the box head keep as many detections of an image as are counted, unless the user wants another number."""
    head = model.box_head and model.box_head.stages[-1]
    if head is None or limit <= COCO_LIMITS[-1] or head.detections_per_image >= limit:
        return
    if wanted is not None:
        log.warning("max_detections counts up to %d, but model.box_head.detections_per_image = %d", limit, wanted)
        return
    head.detections_per_image = limit


def usual_folder(checkpoint: str | Path, given: Mapping[str, Any], detector: Detector, dataset: CocoDataset) -> Path:
    """eval_<checkpoint> beside the checkpoint for the run's own validation set, wherever it lies now; for another one,
    which the settings of `data` that are given make, with its name and a key of what it holds, so that neither
    overwrites the other."""
    if is_address(str(checkpoint)):  # the hub's: here, in a folder of its name
        checkpoint = re.sub(r"[^\w.-]+", "-", str(checkpoint).partition("://")[2])
    name, files = f"eval_{Path(checkpoint).stem}", given.get("val") or {}
    if any(value is not None for value in (given.get("root"), *files.values())):
        now, own = contents(dataset), detector.contents and detector.contents["val"]
        stored = detector.config["data"]["val"]
        moved = all(files.get(key) in (None, stored[key]) for key in ("images", "annotations"))
        if not same(now, own) if own else not moved:  # older checkpoints do not tell
            name += f"_{dataset.annotation_files[0].stem[:60]}-{short_key(now)}"
    return Path(checkpoint).parent / name


main = as_program("eval", evaluate_checkpoint, __doc__)
