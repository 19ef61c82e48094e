"""What eval.py does: a checkpoint and a data set in, tables and files out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from detector.checkpoint import write_json
from detector.config import ConfigError, config_errors, make_folder
from detector.data import CocoDataset, build_dataset, build_loader
from detector.data.contents import contents, same, short_key
from detector.evaluation.evaluator import evaluate, ground_truth
from detector.evaluation.fit import rehearse
from detector.evaluation.proposals import without_classes
from detector.evaluation.tables import class_table, summary_table
from detector.inference.load import load, merge
from detector.inference.predict import Detector
from detector.inference.tta import Augmented
from detector.runtime import start_ranks
from detector.settings import Runtime


def evaluate_checkpoint(cfg: DictConfig) -> dict:
    """Evaluate `cfg.checkpoint` as configs/eval.yaml says; returns the metrics.

    Writes predictions.json (COCO results), metrics.json, table.txt and about.json (which checkpoint, which annotations)
    into the output folder; where `cfg.output` is None, that of `usual_folder`. Categories are matched by name: a data
    set with a category that the model does not know is refused, what the model finds of a category that the data set
    does not have is left out. The proposals of a model without a box head are measured whatever the category. What
    cannot be measured is refused before images are read.
    """
    changes = OmegaConf.to_container(cfg, resolve=True)
    with config_errors("runtime"):
        runtime = Runtime(device=cfg.device, precision=cfg.precision, workers=cfg.workers, threads=cfg.threads)
    world = start_ranks(runtime)
    detector = load(cfg.checkpoint, world.device, changes["model"], changes["trust"])
    model = detector.model
    data = merge(detector.config["data"], changes["data"])
    proposals_only = model.box_head is None
    sigmas = changes["sigmas"] or (detector.config.get("evaluation") or {}).get("sigmas")
    with config_errors("data"):
        categories = None if proposals_only else detector.categories
        dataset = build_dataset(data, "val", detector.config["augment"], categories=categories)
        names = detector.keypoint_names
        kinds = list(rehearse(model, dataset, cfg.evaluator, changes["iou_types"], sigmas, keypoint_names=names))
        padding = {key: data[key] for key in ("group_by_aspect", "pad_multiple", "pad_to")}
        ranks = {"rank": world.rank, "world": world.size}
        loader = build_loader(dataset, cfg.batch_size, cfg.workers, training=False, **ranks, **padding)
    folder = make_folder(cfg.output or usual_folder(cfg, detector, dataset), "output")
    key = short_key(contents(dataset))
    if cfg.output:
        refuse_other_results(folder, key)
    plain = not cfg.flip and list(cfg.scales) == [1.0]
    with config_errors("scales"):
        network = model if plain else Augmented(model, list(cfg.scales), cfg.flip, dataset.mirrored)
    with contextlib.closing(loader):  # or its processes outlive an error
        metrics, results = evaluate(
            network,
            loader,
            dataset,
            world.device,
            precision=cfg.precision,
            evaluator=cfg.evaluator,
            iou_types=kinds,
            sigmas=sigmas,
            paste=cfg.paste,
            folder=folder,
        )
    if world.main:
        about = {"checkpoint": str(cfg.checkpoint), "settings": changes}
        about |= {"annotations": str(dataset.annotation_file), "images": str(dataset.folder), "data": key}
        write_json(folder / "about.json", about, indent=1)
        truth = without_classes(ground_truth(dataset)) if proposals_only else ground_truth(dataset)
        summary, classes = summary_table(metrics), class_table(metrics, truth)
        (folder / "table.txt").write_text(f"{summary}\n\n{classes}\n", encoding="utf-8")
        print(f"\n{summary}\n\n{classes if len(dataset.categories) <= 100 else 'per class: see table.txt'}\n")
        print(f"{len(dataset)} images, {len(results)} detections; {folder}: metrics.json, predictions.json, table.txt")
    if world.size > 1:
        dist.destroy_process_group()
    return metrics


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


def usual_folder(cfg: DictConfig, detector: Detector, dataset: CocoDataset) -> Path:
    """eval_<checkpoint> beside the checkpoint for the run's own validation set, wherever it lies now; for another one
    with its name and a key of what it holds, so that neither overwrites the other."""
    name = f"eval_{Path(cfg.checkpoint).stem}"
    if any(value is not None for value in (cfg.data.root, cfg.data.val.images, cfg.data.val.annotations)):
        now, own = contents(dataset), detector.contents and detector.contents["val"]
        stored = detector.config["data"]["val"]
        moved = all(cfg.data.val[key] in (None, stored[key]) for key in ("images", "annotations"))
        if not same(now, own) if own else not moved:  # older checkpoints do not tell
            name += f"_{dataset.annotation_file.stem[:60]}-{short_key(now)}"
    return Path(cfg.checkpoint).parent / name
