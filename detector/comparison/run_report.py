"""report.html of one run: how well, from which score on, where it errs, and which labels may be wrong.

One file that opens offline, of the parts that the comparison of runs is made of. What COCO's matching tells is
hotcoco's: the confusion of classes, calibration, TIDE's errors, and labels that look wrong.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from detector.checkpoint import atomically
from detector.comparison import report as pages
from detector.comparison.charts import bar_chart, line_chart
from detector.comparison.pictures import f1_at, picture_of, read_picture
from detector.comparison.runs import Method, Run
from detector.comparison.statistics import draws, metrics
from detector.comparison.summary import (
    class_ap,
    mean_metrics,
    measure,
    precision_recall,
    threshold_curves,
    tide,
    training_curve,
    without_nan,
)
from detector.data import Pictures
from detector.data.annotations import Truth
from detector.data.places import Folder
from detector.evaluation.coco import Results, run_coco_eval
from detector.evaluation.operating_point import SCORES, Counts, describe, kept_matches
from detector.evaluation.tables import TITLES, by_class, limits_note, numbers_row, percent
from detector.inference.draw import panel
from detector.ops.text import one_line
from detector.settings import COCO_LIMITS

log = logging.getLogger(__name__)
SAMPLES = 200  # bootstrap draws
MATRIX = 20  # classes of a confusion matrix; of more the pairs that are confused most
WORST, BEST, SUSPECTS = 4, 2, 6  # pictures
SIDE = 1000  # px of a picture
FAULTS = {
    "missing_annotation": "an object without annotation?",
    "wrong_label": "another class?",
    "location": "another box?",
}


@dataclass
class Evaluated:
    """What an evaluation leaves. metrics: with "per_class"; point: see evaluation/operating_point.py."""

    title: str
    truth: Truth
    results: list[dict] = field(repr=False)
    metrics: Mapping[str, Any]
    point: Mapping[str, Any]
    limits: Sequence[int] = COCO_LIMITS
    folders: Sequence[Folder] = ()  # of the images
    pictures: Pictures = Pictures()  # noqa: RUF009  it is frozen
    log_file: Path | None = None  # of the training
    config: Mapping[str, Any] = field(default_factory=dict)


def write_run_report(found: Evaluated, file: Path) -> Path | None:
    """Write the page; None, and a warning, where it cannot be made: what was measured is kept whatever happens here."""
    try:
        write_page(found, file)
    except Exception as error:
        log.warning("no report: %s: %s", type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))
        return None
    return file


def write_page(found: Evaluated, file: Path) -> None:
    page = html(diagnose(found), shown_pictures(found), suspects(found))
    atomically(file, lambda out: out.write(page.encode("utf-8", errors="backslashreplace")))


def diagnose(found: Evaluated) -> dict[str, Any]:
    """All numbers of the page, as the comparison has them of one method that has one run."""
    truth, limits = found.truth, found.limits
    kinds = [kind for kind in ("bbox", "segm") if kind in found.metrics]
    results = Results(found.results)
    log_lines = read_log(found.log_file)
    run = Run(Path(found.title), dict(found.config), Path(), (), (), results, log_lines, limits=tuple(limits))
    methods, weights = [Method(found.title, {}, [run])], draws(len(truth), SAMPLES)
    measured = {kind: measure(run, truth, kind, weights, limits) for kind in kinds}
    kind = found.point["iou_type"]
    drawn = measured[kind]["drawn"]
    ap = class_ap(drawn)  # [B, K]
    evaluator, _ = run_coco_eval(truth, results, kind, max_detections=limits)
    least = usual_score(found.point)
    confusion = evaluator.confusion_matrix(min_score=least)
    report: dict[str, Any] = {
        "title": found.title,
        "validation": {"images": len(truth), "objects": int((~truth.crowd).sum()), "categories": truth.categories},
        "max_detections": list(limits),
        "kinds": kinds,
        "kind": kind,
        "numbers": {name: found.metrics[name] for name in found.metrics if name in TITLES},
        "interval": quantiles(metrics(drawn)["AP"]),
        "class_intervals": dict(zip(truth.categories, map(quantiles, ap.T))),
        "classes": by_class(found.metrics, truth),
        "point": found.point,
        "confusion": {"names": confusion["cat_names"], "matrix": confusion["matrix"].astype(int).tolist()},
        "calibration": evaluator.calibration(n_bins=10, iou_threshold=0.5),
        "training": {found.title: [training_curve(run)]},
        "log": log_lines,
        "curve_differences": {name: [] for name in kinds},
    }
    for name, build in (
        ("metrics", mean_metrics),
        ("curves", threshold_curves),
        ("precision_recall", precision_recall),
        ("tide", tide),
    ):
        report[name] = {k: build(methods, {run.folder: values}) for k, values in measured.items()}
    return without_nan(report)


def usual_score(point: Mapping[str, Any]) -> float:
    return point["all"]["threshold"][0] if point["all"]["threshold"] else 0.5


def quantiles(values: np.ndarray) -> list[float] | None:
    values = values[~np.isnan(values)]
    return np.quantile(values, (0.025, 0.975)).tolist() if len(values) > 1 else None


def read_log(file: Path | None) -> list[dict]:
    """The lines of a log.jsonl; those that cannot be read are left out."""
    lines = []
    if file is not None and file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


# ------------------------------------------------------------------------------------------------------------ pictures


def shown_pictures(found: Evaluated) -> list[tuple[str, np.ndarray]]:
    """The images with the lowest and the highest F1 at the operating point: (caption, truth beside what was found)."""
    kind, least = found.point["iou_type"], usual_score(found.point)
    kept = kept_matches(found.truth, Results(found.results), kind, found.limits[-1])
    f1, wrong = f1_at(kept, least)
    order = np.lexsort((-wrong, f1))  # worst first
    by_id = np.argsort(found.truth.image_ids)  # the order of the matches
    worst = [index for index in order[:WORST] if wrong[index]]
    best = [index for index in order[::-1] if not wrong[index] and kept.objects[index].sum()]
    best.sort(key=lambda index: -kept.objects[index].sum())
    shown = []
    for word, indices in (("worst", worst), ("best", best[:BEST])):
        for index in indices:
            caption = f"{word}: F1 {f1[index]:.2f}, {wrong[index]} errors (IoU 0.5; scores of at least {least:.3f})"
            if picture := beside(found, int(by_id[index]), least, caption):
                shown.append(picture)
    return shown


def beside(
    found: Evaluated, row: int, least: float, caption: str, only: dict | None = None
) -> tuple[str, np.ndarray] | None:
    """An image's truth beside what was found there, or one detection of it; None where it cannot be read."""
    own = found.truth.select(np.array([row]))
    try:
        image, size = read_picture(own, 0, found.folders, found.pictures)
    except (ValueError, OSError) as error:
        log.warning("no picture: %s", error)
        return None
    image_id = int(own.image_ids[0])
    entries = [only] if only else [r for r in found.results if r["image_id"] == image_id and r["score"] >= least]
    views = [
        picture_of(image, found.truth, own.to_coco()["annotations"], False, size),
        picture_of(image, found.truth, entries, True, size),
    ]
    return f"{own.file_name(0)}: {caption}", panel(views, ["ground truth", "found"])


def suspects(found: Evaluated) -> tuple[list[list[str]], list[tuple[str, np.ndarray]]]:
    """Annotations that may be wrong, by confident detections that contradict them: rows of a table, and pictures."""
    kind, results = found.point["iou_type"], Results(found.results)
    evaluator, _ = run_coco_eval(found.truth, results, kind, max_detections=found.limits)
    least = max(usual_score(found.point), 0.5)
    candidates = evaluator.image_diagnostics(iou_thr=0.5, score_thr=least)["label_errors"]
    candidates = sorted(candidates, key=lambda c: -c["dt_score"])
    by_id = np.argsort(found.truth.image_ids)  # hotcoco's ids are places in this order, and of results
    rows, pictures = [], []
    for candidate in candidates[:30]:
        row = int(by_id[candidate["image_id"] - 1])
        name, fault = found.truth.file_name(row), FAULTS.get(candidate["type"], candidate["type"])
        labelled = candidate["gt_category"] or "nothing"
        rows.append([name, fault, candidate["dt_category"], f"{candidate['dt_score']:.2f}", labelled])
        if len(pictures) < SUSPECTS:
            caption = f"{fault} {candidate['dt_category']} {candidate['dt_score']:.2f}, labelled {labelled}"
            if picture := beside(found, row, least, caption, results[candidate["dt_id"] - 1]):
                pictures.append(picture)
    return rows, pictures


# ---------------------------------------------------------------------------------------------------------------- HTML


def html(
    report: Mapping[str, Any],
    pictures: Sequence[tuple[str, np.ndarray]] = (),
    suspicious: tuple[Sequence[Sequence[str]], Sequence[tuple[str, np.ndarray]]] = ((), ()),
) -> str:
    validation = report["validation"]
    parts = [
        f"<h1>{escape(one_line(report['title']))}</h1>",
        f"<p>{validation['images']} validation images, {validation['objects']} objects of "
        f"{len(validation['categories'])} classes. Intervals are of 95 %, from bootstrap draws of the images.</p>",
    ]
    if note := limits_note(report["max_detections"]):
        parts.append(f'<div class="warn"><p>{escape(note)}</p></div>')
    parts += [
        pages.section("Average precision", numbers(report) + precision(report)),
        pages.section("From which score on", threshold(report)),
        pages.section("Classes", classes(report)),
        pages.section("Confusion", confusion(report)),
        pages.section("Errors", pages.errors(report)),
        pages.section("Calibration", calibration(report)),
        pages.section("Training", training(report)),
        pages.section("Learned offsets", pages.offsets(report)),
        pages.section("Worst and best images", figures(pictures)),
        pages.section("Labels that may be wrong", suspicions(*suspicious)),
    ]
    return pages.document(report["title"], parts)


def numbers(report: Mapping[str, Any]) -> str:
    names = pages.columns(report)
    rows = [numbers_row(kind, values, names) for kind, values in report["numbers"].items()]
    text = ""
    if report["interval"]:
        low, high = (100 * value for value in report["interval"])
        text = f'<p class="note">{TITLES[report["kind"]].capitalize()} AP: 95 % interval {low:.1f} to {high:.1f}.</p>'
    return pages.html_table(["%", *names], rows) + text


def precision(report: Mapping[str, Any]) -> str:
    over, recall = {}, [i / 100 for i in range(101)]
    falls: dict[str, dict] = {"0.50": {}, "0.75": {}}
    for kind in report["kinds"]:
        (curve,), (found,) = report["curves"][kind].values(), report["precision_recall"][kind].values()
        over[TITLES[kind]] = curve["thresholds"], [pages.scaled(value) for value in curve["mean"]]
        for key, lines in falls.items():
            lines[TITLES[kind]] = recall, found[key]
    unit = {"x_range": (0, 1), "y_range": (0, 1)}
    return pages.charts(
        (line_chart(over, "IoU threshold", "AP, %", None, True), "AP at each IoU threshold"),
        *(
            (line_chart(lines, "recall", "precision", **unit), f"Precision and recall at IoU {key}")
            for key, lines in falls.items()
        ),
    )


def threshold(report: Mapping[str, Any]) -> str:
    point, table = report["point"], report["point"]["counts"]
    found = Counts(*(np.sum([*table[key].values()], axis=0) for key in ("true", "false", "objects"))).numbers()
    names = {"f1": "F1", "precision": "precision", "recall": "recall"}
    lines = {
        names[key]: (SCORES.tolist(), [None if np.isnan(value) else value for value in values])
        for key, values in found.items()
    }
    chart = line_chart(lines, "least score", "share", x_range=(0, 1), y_range=(0, 1), width=400)
    own = {
        name: (SCORES.tolist(), values.tolist())
        for name in list(table["true"])[:8]
        if not np.isnan(values := Counts(*(np.array(table[k][name]) for k in table)).numbers()["f1"]).all()
    }
    by_name = line_chart(own, "least score", "F1", x_range=(0, 1), y_range=(0, 1), width=400) if len(own) > 1 else ""
    return (
        f"<p>{escape(describe(point))}.</p>"
        + pages.charts((chart, "All classes"), (by_name, "F1 of each class"), broad=True)
        + '<p class="note"><code>detector predict</code> shows objects from this score on; <code>threshold=0.3</code>, '
        "<code>per_class</code>, <code>{precision: 0.9}</code> and <code>{recall: 0.9}</code> are other choices.</p>"
    )


def classes(report: Mapping[str, Any]) -> str:
    kind, points = report["kind"], report["point"]["classes"]
    rows = []
    for name, images, objects, found in report["classes"]:
        interval, own = report["class_intervals"].get(name), found[kind]
        span = f"{percent(interval[0])} to {percent(interval[1])}" if interval else "-"
        cells = [one_line(name), str(images), str(objects), percent(own["AP"]), span]
        cells += [percent(own.get("AP50")), percent(own.get("AP75"))]
        point = points.get(name, {})
        for key, form in (("threshold", "{:.2f}"), ("f1", "{:.2f}"), ("precision", "{:.2f}"), ("recall", "{:.2f}")):
            values = point.get(key)
            cells.append("-" if not values else form.format(values[0]))
        f1 = point.get("f1")
        cells[8:9] = [cells[8], f"{f1[1]:.2f} to {f1[2]:.2f}" if f1 and f1[1] is not None else "-"]
        rows.append(cells)
    title = TITLES[kind]
    header = ["class", "images", "objects", f"{title} AP, %", "95 %", "AP50", "AP75"]
    return pages.html_table([*header, "score", "F1", "95 %", "precision", "recall"], rows)


def confusion(report: Mapping[str, Any]) -> str:
    names, matrix = report["confusion"]["names"], np.array(report["confusion"]["matrix"])
    rest = [*names, "nothing"]
    note = (
        '<p class="note">Rows: what there is; columns: what was found there, of the scores above, at IoU 0.5. The last '
        "column counts objects that were missed, the last row detections where nothing is.</p>"
    )
    if len(names) <= MATRIX:
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        head = "".join(pages.header_cell(one_line(name)) for name in rest)
        body = ""
        for r, name in enumerate(rest):
            cells = "".join(
                f'<td style="background:color-mix(in srgb, var(--c{0 if r == c else 1}) {60 * share[r, c]:.0f}%, '
                f'transparent)">{matrix[r, c] or ""}</td>'
                for c in range(len(rest))
            )
            body += f"<tr><td>{escape(one_line(name))}</td>{cells}</tr>"
        table = f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>"
        return f'<div class="wide"><table class="matrix">{table}</table></div>{note}'
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    off[-1], off[:, -1] = 0, 0
    places = [divmod(int(i), len(rest)) for i in np.argsort(-off, axis=None, kind="stable")[:MATRIX]]
    rows = [
        [one_line(rest[r]), one_line(rest[c]), str(off[r, c]), percent(off[r, c] / max(matrix[r].sum(), 1))]
        for r, c in places
        if off[r, c]
    ]
    return pages.html_table(["class", "taken for", "times", "% of its objects"], rows) if rows else ""


def calibration(report: Mapping[str, Any]) -> str:
    found = report["calibration"]
    bins = [entry for entry in found["bins"] if entry["count"]]
    if not bins:
        return ""
    lines = {
        "found": ([entry["avg_confidence"] for entry in bins], [entry["avg_accuracy"] for entry in bins]),
        "perfect": ([0, 1], [0, 1]),
    }
    heights = {"detections": {f"{e['bin_lower']:.1f}": float(e["count"]) for e in found["bins"]}}
    chart = line_chart(lines, "score", "share that is right", x_range=(0, 1), y_range=(0, 1), width=400)
    note = (
        f'<p class="note">At IoU 0.5, of {found["num_detections"]} detections. The expected calibration error, the '
        f"mean gap between score and share, is {found['ece']:.3f}; the largest gap {found['mce']:.3f}.</p>"
    )
    return (
        pages.charts((chart, "How often a score is right"), (bar_chart(heights, "detections"), "Scores"), broad=True)
        + note
    )


def training(report: Mapping[str, Any]) -> str:
    lines = [line for line in report["log"] if "loss" in line]
    measured = [line for line in report["log"] if "metrics" in line]
    names = sorted({key for line in lines for key in line if key.startswith("loss")})
    losses = {
        name.removeprefix("loss_"): ([line["iteration"] for line in lines], [line.get(name) for line in lines])
        for name in names
    }
    aps = {
        TITLES[kind]: (
            [line["iteration"] for line in measured],
            [pages.scaled(line["metrics"].get(kind, {}).get("AP")) for line in measured],
        )
        for kind in TITLES
        if any("AP" in line["metrics"].get(kind, {}) for line in measured)
    }
    return pages.charts(
        (line_chart(losses, "iteration", "loss", None, True, 480) if lines else "", "Loss"),
        (line_chart(aps, "iteration", "AP, %", None, True, 480) if len(measured) > 1 else "", "AP while it trained"),
        broad=True,
    )


def figures(pictures: Sequence[tuple[str, np.ndarray]]) -> str:
    return "".join(pages.figure(caption, image, SIDE) for caption, image in pictures)


def suspicions(rows: Sequence[Sequence[str]], pictures: Sequence[tuple[str, np.ndarray]]) -> str:
    if not rows:
        return ""
    note = (
        '<p class="note">Confident detections that the annotations contradict, the surest first: the model may be '
        "wrong, or the label.</p>"
    )
    table = pages.html_table(["image", "what", "found", "score", "labelled"], [[one_line(c) for c in r] for r in rows])
    return note + figures(pictures) + table
