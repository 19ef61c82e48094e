"""Metrics as text: a row for each IoU type, or for each class."""

from __future__ import annotations

from collections.abc import Sequence

from detector.data.annotations import Truth
from detector.evaluation.coco import check_annotations
from detector.ops.text import one_line, width
from detector.settings import COCO_LIMITS

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
TITLES = {"bbox": "box", "segm": "mask", "boundary": "boundary", "keypoints": "keypoint", "voc": "VOC box"}


def summary_table(metrics: dict, limits: Sequence[int] = COCO_LIMITS) -> str:
    """One row per IoU type, in percent; a line below says so where other `limits` than COCO's were measured."""
    columns = (*COLUMNS, f"AR{limits[-1]}")
    rows = [
        [TITLES[kind]] + [percent(values.get(c, values.get("AR"))) for c in columns]
        for kind, values in metrics.items()
        if kind in TITLES
    ]
    note = limits_note(limits)
    return table(["", *columns], rows) + (f"\n{note}" if note else "")


def limits_note(limits: Sequence[int]) -> str:
    """What to know about AP with other limits than COCO's; "" for COCO's."""
    if tuple(limits) == COCO_LIMITS:
        return ""
    return (
        f"AP and AR count up to {limits[-1]} detections of a class in an image, COCO's {COCO_LIMITS[-1]}: "
        "compare only numbers of the same limit."
    )


def class_table(metrics: dict, annotations: dict | Truth) -> str:
    """One row per class: how many objects and images hold it, then AP, AP50, AP75 of each IoU type, in percent."""
    kinds = list(metrics["per_class"])
    header = ["class", "images", "objects"] + [f"{TITLES[k]} {c}" for k in kinds for c in COLUMNS[:3]]
    truth = check_annotations(annotations)
    images_of = truth.images_of()
    rows = []
    for label, name in enumerate(truth.categories, 1):
        images = images_of[(truth.labels == label) & ~truth.crowd]
        numbers = [percent(metrics["per_class"][k][name].get(c)) for k in kinds for c in COLUMNS[:3]]
        rows.append([one_line(name), str(len(set(images.tolist()))), str(len(images)), *numbers])
    return table(header, rows)


def percent(fraction: float | None) -> str:
    return "-" if fraction is None or fraction < 0 else f"{100 * fraction:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text with aligned columns: the first to the left, numbers to the right."""
    widths = [max(width(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells):
        pads = [" " * (w - width(c)) for c, w in zip(cells, widths)]
        return "  ".join(c + pad if i == 0 else pad + c for i, (c, pad) in enumerate(zip(cells, pads))).rstrip()

    return "\n".join([line(header), "  ".join("─" * w for w in widths), *map(line, rows)])
