"""Everything that the comparison of methods says, as one JSON-serialisable dict that report.py puts into words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from detector.comparison.runs import Method, Run
from detector.comparison.statistics import THRESHOLDS, Difference, Table, difference, draws, match, metrics, resample
from detector.data.annotations import Truth
from detector.data.several import shown
from detector.evaluation.coco import check_annotations, check_predictions, run_coco_eval, summarized
from detector.evaluation.evaluator import measurable
from detector.evaluation.tables import TITLES, limits_note
from detector.settings import COCO_LIMITS

INTERVALS = ("AP", "AP50", "AP75")  # numbers whose differences get intervals
TIDE = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
FEW_IMAGES, FEW_SEEDS = 100, 3


def compare(
    methods: Sequence[Method],
    truth: Truth,
    samples: int = 1000,
    seed: int = 0,
    boundary: bool = True,
    tick=lambda: None,
    max_detections: Sequence[int] = COCO_LIMITS,
):
    """Compare methods evaluated on one validation set, that of `truth`. tick() is called after each run.

    max_detections: as in coco_metrics.

    Returns a dict: validation, max_detections, methods, warnings, kinds, metrics, curves, precision_recall,
    differences, curve_differences, per_class, tide, training. Fractions of 1; None where COCO has no number.
    """
    kinds = kinds_of(methods, truth, boundary)
    weights = draws(len(truth), samples, seed)
    measured = {}
    for run in (run for method in methods for run in method.runs):
        measured[run.folder] = {kind: measure(run, truth, kind, weights, max_detections) for kind in kinds}
        tick()
    report: dict[str, Any] = {
        "validation": {
            "annotations": shown(methods[0].runs[0].truth),
            "images": len(truth),
            "objects": int((~truth.crowd).sum()),
            "categories": truth.categories,
        },
        "methods": [
            {"label": m.label, "settings": m.settings, "seeds": m.seeds, "runs": [str(r.folder) for r in m.runs]}
            for m in methods
        ],
        "samples": samples,
        "max_detections": list(max_detections),
        "warnings": warnings(methods, truth, max_detections),
        "kinds": list(kinds),
        "training": {m.label: [training_curve(run) for run in m.runs] for m in methods},
    }
    for name, build in (
        ("metrics", mean_metrics),
        ("curves", threshold_curves),
        ("precision_recall", precision_recall),
        ("differences", differences),
        ("curve_differences", curve_differences),
        ("per_class", class_differences),
        ("tide", tide),
    ):
        report[name] = {
            kind: build(methods, {folder: found[kind] for folder, found in measured.items()}) for kind in kinds
        }
    return without_nan(report)


def kinds_of(methods: Sequence[Method], truth: Truth, boundary: bool) -> list[str]:
    """The IoU types that all runs can be compared by: masks if none of them lacks some."""
    predictions = [run.predictions for method in methods for run in method.runs]
    masks = all("segmentation" in entry for entries in predictions for entry in entries[:1])
    predicted = {"bbox", "segm"} if masks and any(predictions) else {"bbox"}
    kinds = measurable(truth, predicted)
    return kinds + (["boundary"] if boundary and "segm" in kinds else [])


def measure(
    run: Run, truth: Truth, kind: str, weights: np.ndarray, limits: Sequence[int] = COCO_LIMITS
) -> dict[str, Any]:
    """A run's numbers of one IoU type, on the data set and on the draws."""
    results = check_predictions(run.predictions, check_annotations(truth, kind), kind)
    matches = match(truth, results, kind, limits[-1])
    found: dict[str, Any] = {"full": resample(matches), "drawn": resample(matches, weights, areas=(0,))}
    found["numbers"] = {
        name: values[0] for name, values in metrics(found["full"], limits[-1]).items() if name != "curve"
    }
    found["categories"] = matches.categories
    if kind != "boundary":
        evaluator, _ = run_coco_eval(truth, results, kind, max_detections=limits)
        found["numbers"] = {n: np.nan if v < 0 else v for n, v in summarized(evaluator, kind, limits).items()}
        precision = np.where(evaluator.eval["precision"] < 0, np.nan, evaluator.eval["precision"])[..., 0, -1]
        known = ~np.isnan(precision).all((0, 1))
        found["precision"] = precision[:, :, known].mean(2)  # [T, 101]
        found["tide"] = evaluator.tide_errors()["delta_ap"]
    return found


# -------------------------------------------------------------------------------------------------- parts of the report


def mean_metrics(methods, measured):
    """Mean and standard deviation over seeds of COCO's numbers."""
    report = {}
    for method in methods:
        runs = [measured[run.folder]["numbers"] for run in method.runs]
        report[method.label] = {name: mean_and_deviation([run[name] for run in runs]) for name in runs[0]}
    return report


def mean_and_deviation(values: Sequence[float]) -> dict[str, Any]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation, "values": list(map(float, values))}


def threshold_curves(methods, measured):
    """AP at each IoU threshold, mean and deviation over seeds."""
    report = {}
    for method in methods:
        curves = [metrics(measured[run.folder]["full"])["curve"][0] for run in method.runs]
        deviation = np.std(curves, axis=0, ddof=1).tolist() if len(curves) > 1 else None
        report[method.label] = {
            "thresholds": THRESHOLDS.tolist(),
            "mean": np.mean(curves, axis=0).tolist(),
            "deviation": deviation,
        }
    return report


def precision_recall(methods, measured):
    """Precision at COCO's 101 recalls for IoU 0.5 and 0.75, mean over classes and seeds."""
    report = {}
    for method in methods:
        curves = [measured[run.folder].get("precision") for run in method.runs]
        if curves[0] is not None:
            mean = np.mean(curves, axis=0)
            report[method.label] = {"0.50": mean[0].tolist(), "0.75": mean[5].tolist()}
    return report


def differences(methods, measured):
    """Every pair of methods, for the numbers of INTERVALS."""
    report = []
    for a, b in itertools.combinations(methods, 2):
        for name in INTERVALS:
            found = compare_pair(a, b, measured, lambda table, name=name: metrics(table)[name])
            report.append({"a": a.label, "b": b.label, "metric": name, **found._asdict(), "clear": found.clear})
    return report


def curve_differences(methods, measured):
    """Each other method against the first, at every IoU threshold."""
    report = []
    for other in methods[1:]:
        found = [
            compare_pair(methods[0], other, measured, lambda table, t=t: metrics(table)["curve"][:, t])
            for t in range(len(THRESHOLDS))
        ]
        columns = {key: [getattr(entry, key) for entry in found] for key in ("delta", "low", "high")}
        report.append({"a": methods[0].label, "b": other.label, "thresholds": THRESHOLDS.tolist(), **columns})
    return report


def class_differences(methods, measured):
    """AP of each class: the means, and for each other method the difference to the first with its interval."""
    categories = measured[methods[0].runs[0].folder]["categories"]
    report: dict[str, Any] = {"categories": categories, "mean": {}, "differences": {}}
    for method in methods:
        tables = [measured[run.folder]["full"] for run in method.runs]
        report["mean"][method.label] = np.mean([class_ap(table)[0] for table in tables], axis=0).tolist()
    for method in methods[1:]:
        report["differences"][method.label] = [
            compare_pair(methods[0], method, measured, lambda table, k=k: class_ap(table, k))._asdict()
            for k in range(len(categories))
        ]
    return report


def class_ap(table: Table, category: int | None = None) -> np.ndarray:
    """AP [B, K] of all classes, or [B] of one."""
    precision = table.precision[:, :, 0] if category is None else table.precision[:, category, 0]
    return precision.mean(-1)


def tide(methods, measured):
    """Mean over seeds of what AP50 would gain if each type of error were mended (Bolya et al., TIDE, ECCV 2020)."""
    report = {}
    for method in methods:
        errors = [measured[run.folder].get("tide") for run in method.runs]
        if errors[0] is not None:
            report[method.label] = {name: float(np.mean([e[name] for e in errors])) for name in TIDE}
    return report


def compare_pair(a: Method, b: Method, measured, value) -> Difference:
    """The difference b - a of value(Table) -> [B]."""
    full = [[value(measured[run.folder]["full"])[0] for run in method.runs] for method in (a, b)]
    drawn = [np.stack([value(measured[run.folder]["drawn"]) for run in method.runs]) for method in (a, b)]
    return difference(*full, *drawn, paired=a.seeds == b.seeds)


def training_curve(run: Run) -> dict[str, Any]:
    """What the log says over the iterations: the loss and the size of offsets; throughput and memory as medians."""
    lines = [line for line in run.log if "loss" in line]
    curves = {"iteration": [line["iteration"] for line in lines], "loss": [line["loss"] for line in lines]}
    for key in sorted({key for line in lines for key in line if key == "loss_offset" or "offsets_mean_norm" in key}):
        curves[key] = [line.get(key) for line in lines]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    memory = [line["memory_mb"] for line in lines if "memory_mb" in line]
    speed = {"images_per_second": float(np.median(rates)) if rates else None, "memory_mb": max(memory, default=None)}
    return {"seed": run.seed, **curves, **speed}


def warnings(methods: Sequence[Method], truth: Truth, limits: Sequence[int]) -> list[str]:
    """What limits the conclusions."""
    found = [note] if (note := limits_note(limits)) else []
    own = {run.limits for method in methods for run in method.runs}
    if own - {tuple(limits)}:
        shown = " and ".join(str(list(each)) for each in sorted(own))
        found.append(
            f"The runs were measured with max_detections = {shown}; here with {list(limits)}. A run's model may have "
            "kept fewer detections than count here."
        )
    if len(methods) == 1:
        found.append("There is one method only: nothing to compare.")
    if len(truth) < FEW_IMAGES:
        found.append(f"{len(truth)} validation images are few: intervals of AP need about {FEW_IMAGES}.")
    for method in methods:
        count = len(method.runs)
        if count == 1 and len(methods) > 1:
            found.append(
                f"{method.label}: one run. Its intervals cover the choice of images, not the luck of training."
            )
        elif count < FEW_SEEDS:
            found.append(f"{method.label}: {count} runs. Intervals over fewer than {FEW_SEEDS} seeds are very wide.")
    if len({repr(method.seeds) for method in methods}) > 1:
        found.append("The methods were trained with different seeds: their runs are not compared in pairs.")
    for method in methods:
        empty = [str(run.folder) for run in method.runs if not run.predictions]
        if empty:
            found.append(f"{method.label}: no detections at all in {', '.join(empty)}.")
    objects = set(truth.labels[~truth.crowd].tolist())
    absent = [name for label, name in enumerate(truth.categories, 1) if label not in objects]
    if absent:
        found.append(f"The validation set has no object of {', '.join(absent)}: left out of every mean.")
    return found


def sentence(kind: str, entry: dict) -> str:
    """A difference in words: "deformable - align: mask AP +0.8 [+0.1, +1.5]", in percent."""
    name = f"{TITLES[kind]} {entry['metric']}"
    if entry["delta"] is None or entry["low"] is None:
        return f"{entry['b']} − {entry['a']}: {name} cannot be compared"
    delta, low, high = (f"{100 * entry[key]:+.1f}".replace("-0.0", "+0.0") for key in ("delta", "low", "high"))
    return f"{entry['b']} − {entry['a']}: {name} {delta} [{low}, {high}]"


def without_nan(value: Any) -> Any:
    """NaN as None, numpy's numbers as Python's: what JSON can hold."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
