"""What eval.py does: a checkpoint and a data set in, tables and files out."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from detector.checkpoint import write_json
from detector.config import config_errors, make_folder
from detector.data import build_dataset, build_loader
from detector.evaluation.evaluator import evaluate, ground_truth
from detector.evaluation.proposals import without_classes
from detector.evaluation.tables import class_table, summary_table
from detector.inference.load import load, merge
from detector.inference.tta import Augmented
from detector.runtime import start_ranks
from detector.settings import Runtime


def evaluate_checkpoint(cfg: DictConfig) -> dict:
    """Evaluate `cfg.checkpoint` as configs/eval.yaml says; returns the metrics.

    Writes predictions.json (COCO results), metrics.json, table.txt and about.json (which checkpoint, which annotations)
    into the output folder. Categories are matched by name: a data set with a category that the model does not know is
    refused, what the model finds of a category that the data set does not have is left out. The proposals of a model
    without a box head are measured whatever the category.
    """
    changes = OmegaConf.to_container(cfg, resolve=True)
    with config_errors("runtime"):
        runtime = Runtime(device=cfg.device, precision=cfg.precision, workers=cfg.workers, threads=cfg.threads)
    world = start_ranks(runtime)
    model = load(cfg.checkpoint, world.device, changes["model"], changes["trust"])
    data = merge(model.config["data"], changes["data"])
    proposals_only = model.box_head is None
    with config_errors("data"):
        categories = None if proposals_only else model.categories
        dataset = build_dataset(data, "val", model.config["augment"], categories=categories)
        padding = {key: data[key] for key in ("group_by_aspect", "pad_multiple", "pad_to")}
        ranks = {"rank": world.rank, "world": world.size}
        loader = build_loader(dataset, cfg.batch_size, cfg.workers, training=False, **ranks, **padding)
    folder = cfg.output or Path(cfg.checkpoint).parent / f"eval_{Path(cfg.checkpoint).stem}"
    folder = make_folder(folder, "output")
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
            iou_types=cfg.iou_types and list(cfg.iou_types),
            paste=cfg.paste,
            folder=folder,
        )
    if world.main:
        about = {"checkpoint": str(cfg.checkpoint), "settings": changes}
        about |= {"annotations": str(dataset.annotation_file), "images": str(dataset.folder)}
        write_json(folder / "about.json", about, indent=1)
        truth = without_classes(ground_truth(dataset)) if proposals_only else ground_truth(dataset)
        summary, classes = summary_table(metrics), class_table(metrics, truth)
        (folder / "table.txt").write_text(f"{summary}\n\n{classes}\n", encoding="utf-8")
        print(f"\n{summary}\n\n{classes if len(dataset.categories) <= 100 else 'per class: see table.txt'}\n")
        print(f"{len(dataset)} images, {len(results)} detections; {folder}: metrics.json, predictions.json, table.txt")
    if world.size > 1:
        dist.destroy_process_group()
    return metrics
