"""Metrics as text: a row for each IoU type, or for each class."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from detector.data.annotations import Truth
from detector.evaluation.coco import check_annotations
from detector.ops.text import one_line, width
from detector.settings import COCO_LIMITS

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SHOWN_CLASSES = 20  # on the terminal: the best and the worst
TITLES = {"bbox": "box", "segm": "mask", "boundary": "boundary", "keypoints": "keypoint", "voc": "VOC box"}


def summary_table(metrics: dict, limits: Sequence[int] = COCO_LIMITS) -> str:
    """One row per IoU type, in percent; a line below says so where other `limits` than COCO's were measured."""
    columns = (*COLUMNS, f"AR{limits[-1]}")
    rows = [numbers_row(kind, values, columns) for kind, values in metrics.items() if kind in TITLES]
    note = limits_note(limits)
    return table(["", *columns], rows) + (f"\n{note}" if note else "")


def numbers_row(kind: str, values: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    """The IoU type's title and `columns` of its numbers. Keypoints have one AR, of 20 detections, for AR100."""
    return [TITLES[kind], *(percent(values.get(c, values.get("AR") if c[:2] == "AR" else None)) for c in columns)]


def limits_note(limits: Sequence[int]) -> str:
    """What to know about AP with other limits than COCO's; "" for COCO's."""
    if tuple(limits) == COCO_LIMITS:
        return ""
    return (
        f"AP and AR count up to {limits[-1]} detections of a class in an image, COCO's {COCO_LIMITS[-1]}: "
        "compare only numbers of the same limit."
    )


def class_table(metrics: dict, annotations: dict | Truth, most: int | None = None) -> str:
    """One row per class, the best first: how many objects and images hold it, then AP, AP50, AP75 of each IoU type, in
    percent. Of more than `most` classes the best and the worst, and a word on the rest."""
    kinds = list(metrics["per_class"])
    header = ["class", "images", "objects"] + [f"{TITLES[k]} {c}" for k in kinds for c in COLUMNS[:3]]
    rows = [
        [one_line(name), str(images), str(objects), *(percent(numbers[k].get(c)) for k in kinds for c in COLUMNS[:3])]
        for name, images, objects, numbers in by_class(metrics, annotations)
    ]
    if most is None or len(rows) <= most:
        return table(header, rows)
    first = (most + 1) // 2
    shown = table(header, rows[:first] + rows[len(rows) - most + first :]).splitlines()
    shown.insert(2 + first, f"... {len(rows) - most} classes in between; all are in classes.csv")
    return "\n".join(shown)


def by_class(metrics: dict, annotations: dict | Truth) -> list[tuple[str, int, int, dict[str, dict]]]:
    """(class, images that hold it, its objects, {iou type: numbers}), by the AP of the last IoU type, best first."""
    per_class, truth = metrics["per_class"], check_annotations(annotations)
    images_of, rows = truth.images_of(), []
    for label, name in enumerate(truth.categories, 1):
        images = images_of[(truth.labels == label) & ~truth.crowd]
        numbers = {kind: per_class[kind][name] for kind in per_class}
        rows.append((name, len(set(images.tolist())), len(images), numbers))

    def quality(row: tuple) -> float:
        numbers = [*row[3].values()][-1]
        return numbers.get("AP", numbers.get("AP50", -1.0))

    return sorted(rows, key=quality, reverse=True)


ATTRIBUTE_COLUMNS = ("objects", "positives", "AP", "accuracy")


def attribute_rows(metrics: dict) -> list[list]:
    """Of each attribute, and of each word that one can be, its name and the numbers of ATTRIBUTE_COLUMNS."""
    return [[name, *(row.get(key) for key in ATTRIBUTE_COLUMNS)] for name, row in metrics["per_attribute"].items()]


def attribute_table(metrics: dict) -> str:
    """A line with the mean over all attributes and the share of the objects that were found, and a row for each."""
    mean = metrics["attributes"]
    rows = [
        [one_line(name), str(objects), "" if positives is None else str(positives), *map(percent, numbers)]
        for name, objects, positives, *numbers in attribute_rows(metrics)
    ]
    return "\n".join(
        [
            f"attributes: AP {percent(mean['AP'])}, accuracy {percent(mean['accuracy'])}, of the "
            f"{percent(mean['found'])} % of the objects that were found",
            table(["attribute", *ATTRIBUTE_COLUMNS], rows),
        ]
    )


def attribute_csv(metrics: dict) -> str:
    """The same as CSV, fractions of 1, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["attribute", *ATTRIBUTE_COLUMNS])
    for name, *values in attribute_rows(metrics):
        writer.writerow([name, *("" if value is None or value < 0 else value for value in values)])
    return out.getvalue()


def class_csv(metrics: dict, annotations: dict | Truth, points: Mapping[str, Mapping] | None = None) -> str:
    """The table of `class_table` as CSV with all numbers, as fractions of 1, empty where there is none.

    points: of each class, from `operating_point`: their score with its interval, and F1, precision and recall there.
    """
    rows = by_class(metrics, annotations)
    columns = [(kind, key) for kind in metrics["per_class"] for key in next(iter(metrics["per_class"][kind].values()))]
    names = ("threshold", "f1", "precision", "recall") if points else ()
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    places = ("", "_low", "_high")
    header = ["class", "images", "objects", *(f"{kind}_{key}" for kind, key in columns)]
    writer.writerow([*header, *(f"{name}{place}" for name in names for place in places)])
    for name, images, objects, numbers in rows:
        values = [numbers[kind].get(key) for kind, key in columns]
        values = ["" if value is None or value < 0 else value for value in values]
        for key in names:
            values += [""] * 3 if points[name][key] is None else points[name][key]
        writer.writerow([name, images, objects, *values])
    return out.getvalue()


def percent(fraction: float | None) -> str:
    return "-" if fraction is None or fraction < 0 else f"{100 * fraction:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text with aligned columns: the first to the left, numbers to the right."""
    widths = [max(width(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells):
        pads = [" " * (w - width(c)) for c, w in zip(cells, widths)]
        return "  ".join(c + pad if i == 0 else pad + c for i, (c, pad) in enumerate(zip(cells, pads))).rstrip()

    return "\n".join([line(header), "  ".join("─" * w for w in widths), *map(line, rows)])
