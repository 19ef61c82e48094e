"""Compare training runs: which RoI method, or any other setting, is better, by how much, and how sure is that?

detector compare 'runs=runs/ablation-*'
detector compare 'runs=[runs/a,runs/b]' output=reports/a_b baseline=align
detector compare 'runs=runs/mine-*' trust=my_package         models with parts of your own

Runs that differ in nothing but the seed are one method. The report has AP with intervals, errors, classes, cost,
alignment, pictures, and the runs that were left out, with the reason.
Exit codes: 0 done, 1 failed, 2 a setting cannot work or no run can be used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from detector.commands.evaluate import evaluate_checkpoint
from detector.comparison.alignment import measure_alignment, measure_offsets
from detector.comparison.cost import measure_cost
from detector.comparison.pictures import f1_by_image, picture_of, read_picture
from detector.comparison.report import verdicts, write_report
from detector.comparison.runs import (
    Method,
    Run,
    Unusable,
    find_folders,
    fitting,
    group,
    read_run,
    same_validation_set,
    validation_truth,
)
from detector.comparison.summary import compare, without_nan
from detector.config import ConfigError, as_program, config_errors, make_folder
from detector.data import Pictures, build_dataset, collate_images
from detector.data.annotations import Truth
from detector.evaluation.coco import check_annotations, check_predictions
from detector.inference.draw import panel
from detector.inference.load import load
from detector.ops.text import one_line
from detector.runtime import start_ranks
from detector.settings import Runtime, check_limits

log = logging.getLogger(__name__)


def compare_runs(
    runs: str | list[str],
    *,
    output: str = "comparison",
    checkpoint: Literal["last", "best"] = "last",
    evaluate: bool = True,
    baseline: str | None = None,
    samples: int = 1000,
    seed: int = 0,
    boundary: bool = True,
    pictures: int = 6,
    max_detections: list[int] | None = None,
    probe_images: int = 8,
    device: str = "auto",
    batch_size: int = 8,
    workers: int | Literal["auto"] = "auto",
    trust: str | list[str] | None = None,
) -> dict[str, Any]:
    """Compare runs; returns what is in report.json. configs/compare.yaml says what the arguments mean.

    One run that cannot be used does not spoil the rest: it is named in the report with the reason.

    Raises ConfigError if none is left.
    """
    with config_errors("device"):
        world = start_ranks(Runtime(device=device))
    left_out: dict[Path, str] = {}
    usable: list[Run] = []

    def evaluate_run(weights: Path) -> None:
        options = {"device": device, "batch_size": batch_size, "workers": workers, "trust": trust}
        evaluate_checkpoint(str(weights), max_detections=max_detections, **options)

    for folder in find_folders(runs):
        try:
            usable.append(read_run(folder, checkpoint, evaluate_run if evaluate else None))
        except Unusable as error:
            left_out[folder] = str(error)
            log.warning("%s is left out: %s", folder, error)
    if not usable:
        raise ConfigError("runs: none can be used: " + "; ".join(f"{k}: {v}" for k, v in left_out.items()))
    usable, others = same_validation_set(usable)
    truth = validation_truth(usable[0])
    usable, wrong = fitting(usable, truth)
    if not usable:
        raise ConfigError("runs: none can be used: " + "; ".join(f"{k}: {v}" for k, v in (left_out | wrong).items()))
    with config_errors("max_detections"):  # of what the runs were measured with, the most
        limits = check_limits(max_detections or max((run.limits for run in usable), key=lambda own: own[-1]))
    methods, repeated = group(usable)
    if baseline is not None:
        if baseline not in (labels := [method.label for method in methods]):
            raise ConfigError(f"baseline = {baseline!r}: the methods are {', '.join(labels)}")
        methods.sort(key=lambda method: method.label != baseline)
    folder = make_folder(output, "output")
    with tqdm(total=sum(len(m.runs) for m in methods), desc="compare", unit="run", leave=False, disable=None) as bar:
        report = compare(methods, truth, samples, seed, boundary, bar.update, limits)
    report["left_out"] = {str(k): v for k, v in (left_out | others | wrong | repeated).items()}
    probed = {m.label: probe(m.runs[0], world.device, probe_images, trust) for m in methods if probe_images}
    for name in ("cost", "alignment", "offsets"):
        report[name] = {label: found[name] for label, found in probed.items() if found.get(name)}
    shown = disagreements(methods, truth, report, pictures) if len(methods) > 1 else []
    report = without_nan(report)
    write_report(report, folder, shown)
    for text, _ in verdicts(report):
        print(text)
    for text in report["warnings"]:
        print(f"note: {text}")
    for name, reason in report["left_out"].items():
        print(one_line(f"left out: {name}: {reason}"))
    print(f"{folder / 'report.html'} (report.md and report.json beside it)")
    return report


def probe(run: Run, device, images: int, trust: str | Sequence[str] | None = ()) -> dict[str, dict]:
    """Cost, alignment and offsets of a run's model on some validation images; {} if its checkpoint cannot be used."""
    try:
        detector = load(run.checkpoint, device, trust=trust)
        dataset = build_dataset(run.config["data"], "val", run.config["augment"], categories=detector.categories)
        samples = [dataset[i] for i in range(min(images, len(dataset)))]
    except (ValueError, OSError, KeyError) as error:
        log.warning("%s: cost and alignment are not measured: %s", run.folder, error)
        return {}
    model = detector.model
    batches = [collate_images([s.image], [s.original_size], [s.image_id], [s.key]) for s in samples]
    found = {"cost": measure_cost(model, batches), "offsets": measure_offsets(model, batches)}
    if model.box_head is not None and any(len(sample.boxes) for sample in samples):
        found["alignment"] = measure_alignment(model, samples)
    return found


def disagreements(methods: Sequence[Method], truth: Truth, report: Mapping, count: int) -> list[tuple[str, np.ndarray]]:
    """Pictures of the images on which the best and the worst method differ most in F1 at IoU 0.5.

    Of each method the detections are those above the score that makes its F1 over all images largest.
    """
    kind = "segm" if "segm" in report["kinds"] else "bbox"
    means = {name: numbers["AP"]["mean"] or 0 for name, numbers in report["metrics"][kind].items()}
    best, worst = (choose(methods, key=lambda m: means[m.label]) for choose in (max, min))
    if best is worst:
        best, worst = methods[:2]
    runs = [worst.runs[0], best.runs[0]]
    results = [check_predictions(run.predictions, check_annotations(truth, kind), kind) for run in runs]
    limits, scores = zip(*(f1_by_image(truth, found, kind, report["max_detections"][-1]) for found in results))
    gap = scores[1] - scores[0]
    by_id = np.argsort(truth.image_ids)  # the order of the scores
    pictures = []
    for index in np.argsort(-np.abs(gap), kind="stable")[:count]:
        if gap[index] == 0:
            break
        own = truth.select(by_id[[index]])
        image_id, name = int(own.image_ids[0]), own.file_name(0)
        try:
            image, size = read_picture(own, 0, runs[0].images, Pictures.of(runs[0].config["data"]))
        except (ValueError, OSError) as error:
            log.warning("no picture: %s", error)
            continue
        views = [picture_of(image, truth, own.to_coco()["annotations"], False, size)]
        for entries, limit in zip(results, limits):
            found = [p for p in entries if p["image_id"] == image_id and p["score"] >= limit]
            views.append(picture_of(image, truth, found, True, size))
        names = [f"{m.label}: F1 {s[index]:.2f}" for m, s in zip((worst, best), scores)]
        shown = " and ".join(f"{limit:.2f}" for limit in limits)
        caption = f"{name}: {', '.join(names)} (IoU 0.5; scores of at least {shown})"
        pictures.append((caption, panel(views, ["ground truth", *names])))
    return pictures


main = as_program("compare", compare_runs, __doc__)
