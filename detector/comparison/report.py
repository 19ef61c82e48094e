"""report.html, report.md and report.json of a comparison.

The HTML is one file that opens offline: styles, charts (SVG) and pictures (JPEG in base64) are in it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from detector.checkpoint import write_json
from detector.comparison.charts import bar_chart, interval_chart, line_chart
from detector.comparison.summary import TIDE, sentence
from detector.evaluation.tables import COLUMNS, TITLES, percent
from detector.ops.text import one_line

TIDE_NAMES = {
    "Cls": "class",
    "Loc": "place",
    "Both": "both",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}
LONG_WORD = 12  # characters
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #666; --rule: #d9d9d9; --shade: #f4f4f4;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; --c6: #8a7a00; --c7: #555; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181b; --soft: #a5a5a5; --rule: #3a3d42;
  --shade: #202327; --c0: #4aa3df; --c1: #ff8c42; --c2: #2fc79a; --c3: #e59ac4; --c4: #f2bc45; --c5: #8fd0f5;
  --c6: #f0e442; --c7: #bbb; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1060px;
  margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1.02rem; margin: 1.2rem 0 .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
td { white-space: nowrap; } .wide { overflow-x: auto; }
th { min-width: 3rem; vertical-align: bottom; } th.long { overflow-wrap: anywhere; }
td:first-child { white-space: normal; min-width: 7rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; } td small { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: .5rem 2rem; }
.charts.broad { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); } .charts > * { margin: 0; }
figcaption, .note { color: var(--soft); font-size: .88rem; } figure img { max-width: 100%; }
.verdict li { margin: .15rem 0; } .clear { font-weight: 600; }
.warn { background: var(--shade); border-left: 4px solid var(--c4); padding: .4rem 1rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg .name { font-size: 12px; } svg .grid { stroke: var(--rule); stroke-width: .6; } svg .axis { stroke: var(--ink); }
svg .line { fill: none; stroke-width: 2; } svg .band { opacity: .16; stroke: none; } svg .zero { stroke: var(--soft); }
svg .whisker { stroke-width: 3; stroke: var(--soft); } svg .whisker.clear { stroke: var(--c0); }
svg .dot { fill: var(--ink); } svg .head { font-weight: 600; } svg .mat { fill: var(--paper); }
""" + "".join(
    f"svg .line.s{i} {{ stroke: var(--c{i}); }} svg .band.s{i}, svg .bar.s{i} {{ fill: var(--c{i}); }}\n"
    for i in range(8)
)


def write_report(report: Mapping, folder: Path, pictures: Sequence[tuple[str, np.ndarray]] = ()) -> None:
    """Write report.json, report.md and report.html. report: as comparison.compare returns it, and what compare.py adds
    (left_out, cost, alignment, offsets); pictures: (caption, [H, W, 3] uint8)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report, indent=1)
    (folder / "report.md").write_text(markdown(report), encoding="utf-8", errors="backslashreplace")
    (folder / "report.html").write_text(html(report, pictures), encoding="utf-8", errors="backslashreplace")


def verdicts(report: Mapping) -> list[tuple[str, bool]]:
    """One sentence for each pair and IoU type, and whether its interval leaves out zero."""
    found = []
    for kind in report["kinds"]:
        for entry in report["differences"][kind]:
            if entry["metric"] == "AP":
                words = "" if entry["low"] is None else ", clear" if entry["clear"] else ", could be chance"
                found.append((sentence(kind, entry) + words, bool(entry["clear"])))
    return found


def columns(report: Mapping) -> list[str]:
    return [*COLUMNS, f"AR{report['max_detections'][-1]}"]


def metric_rows(report: Mapping, kind: str) -> list[list[str]]:
    rows = []
    for name, numbers in report["metrics"][kind].items():
        cells = []
        for column in columns(report):
            entry = numbers[column]
            text = percent(entry["mean"])
            deviation = entry["deviation"] if text != "-" else None
            cells.append(text if deviation is None else f"{text} ± {100 * deviation:.1f}")
        rows.append([name, str(len(numbers["AP"]["values"])), *cells])
    return rows


def cost_rows(report: Mapping) -> list[list[str]]:
    rows = []
    for method in report["methods"]:
        name = method["label"]
        cost, curves = report.get("cost", {}).get(name, {}), report["training"][name]
        rates = [curve["images_per_second"] for curve in curves if curve["images_per_second"] is not None]
        memory = [curve["memory_mb"] for curve in curves if curve["memory_mb"] is not None]
        cells = [
            number(cost.get("parameters"), 1e-6, 2),
            number(cost.get("roi_parameters"), 1e-6, 2),
            number(cost.get("gflops"), 1, 2),
            number(cost.get("roi_gflops"), 1, 2),
            number(np.median(rates) if rates else None, 1, 1),
            number(cost.get("ms"), 1, 1),
            number(cost.get("roi_ms"), 1, 1),
            number(max(memory) if memory else None, 1, 0),
        ]
        rows.append([name, *cells])
    return rows


COST_HEADER = [
    "method",
    "parameters, M",
    "of RoI methods, M",
    "GFLOP / image",
    "of RoI methods",
    "training images/s",
    "inference ms/image",
    "of RoI methods",
    "training memory, MB",
]


def number(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def explain(report: Mapping) -> str:
    return (
        f"Differences are in points of percent with 95 % intervals from {report['samples']} bootstrap draws of the "
        f"{report['validation']['images']} validation images; where methods have several runs, the spread over seeds "
        "is part of the interval. An interval that leaves out zero is called clear. Of many intervals about one in "
        "twenty misses by chance."
    )


# ------------------------------------------------------------------------------------------------------------ markdown


def markdown(report: Mapping) -> str:
    validation = report["validation"]
    lines = ["# Comparison of methods", ""]
    lines += [
        f"{validation['images']} images, {validation['objects']} objects, {len(validation['categories'])} classes."
    ]
    lines += [explain(report), ""]
    lines += [f"> {warning}" for warning in report["warnings"]] + [""]
    lines += [f"- {'**' if clear else ''}{text}{'**' if clear else ''}" for text, clear in verdicts(report)] + [""]
    for kind in report["kinds"]:
        lines += [
            f"## {TITLES[kind]} AP",
            "",
            *md_table(["method", "runs", *columns(report)], metric_rows(report, kind)),
            "",
        ]
    lines += ["## Cost", "", *md_table(COST_HEADER, cost_rows(report)), ""]
    if report.get("left_out"):
        lines += ["## Left out", "", *(f"- {run}: {reason}" for run, reason in report["left_out"].items()), ""]
    return "\n".join(lines)


def md_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return [f"| {' | '.join(map(md_text, cells))} |" for cells in (header, align, *rows)]


def md_text(text: str) -> str:
    """A text as one line that is no markup of a table or of HTML."""
    return one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|") if text else text


# ---------------------------------------------------------------------------------------------------------------- HTML


def html(report: Mapping, pictures: Sequence[tuple[str, np.ndarray]] = ()) -> str:
    validation = report["validation"]
    labels = [method["label"] for method in report["methods"]]
    parts = [f"<h1>{escape(' · '.join(labels))}</h1>"]
    parts.append(
        f"<p>{validation['images']} validation images, {validation['objects']} objects of "
        f"{len(validation['categories'])} classes. {escape(explain(report))}</p>"
    )
    if report["warnings"]:
        parts.append(f'<div class="warn">{"".join(f"<p>{escape(text)}</p>" for text in report["warnings"])}</div>')
    parts += [section("Which is better?", answers(report)), section("Average precision", precision(report))]
    parts += [
        section("Classes", classes(report)),
        section("Errors", errors(report)),
        section("Alignment", alignment(report)),
        section("Cost", html_table(COST_HEADER, cost_rows(report)) + COST_NOTE),
        section("Training", training(report)),
        section("Learned offsets", offsets(report)),
        section("Where they disagree most", "".join(figure(caption, image) for caption, image in pictures)),
        section("Runs", runs(report)),
    ]
    return document(" · ".join(labels), parts)


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """A page that needs nothing else. style: CSS beside what all pages have."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><body>{''.join(parts)}</body></html>\n"
    )


COST_NOTE = (
    '<p class="note">FLOP count multiplications and additions of convolutions, matrix products and weighted sums of '
    "cells; times are medians over single images on the machine that made this report; training figures are the "
    "log's.</p>"
)


def section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def charts(*entries: tuple[str, str], broad: bool = False) -> str:
    """Figures (svg or table, caption) side by side; those without data are left out."""
    figures = [f"<figure><h3>{escape(caption)}</h3>{content}</figure>" for content, caption in entries if content]
    return f'<div class="charts{" broad" * broad}">{"".join(figures)}</div>' if figures else ""


def title(kind: str) -> str:
    return f"{TITLES[kind].capitalize()} AP"


def header_cell(text: str) -> str:
    """Words stay whole unless they are names so long that they would make the column wide."""
    is_long = max(map(len, text.split()), default=0) > LONG_WORD
    return f"<th{' class=long' if is_long else ''}>{escape(text)}</th>"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(map(header_cell, header))
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def answers(report: Mapping) -> str:
    items = "".join(f"<li{' class=clear' if clear else ''}>{escape(text)}</li>" for text, clear in verdicts(report))
    figures = []
    for kind in report["kinds"]:
        rows, pair = [], None
        for entry in report["differences"][kind]:
            if pair != (pair := f"{entry['b']} − {entry['a']}"):
                rows.append(pair)
            rows.append((entry["metric"], *(scaled(entry[key]) for key in ("delta", "low", "high"))))
        if rows:
            figures.append((interval_chart(rows, "difference, points"), f"{title(kind)}, 95 % intervals"))
    return (f'<ul class="verdict">{items}</ul>' if items else "") + charts(*figures, broad=True)


def scaled(value: float | None) -> float | None:
    return None if value is None else 100 * value


def precision(report: Mapping) -> str:
    parts = []
    for kind in report["kinds"]:
        table = html_table(["method", "runs", *columns(report)], metric_rows(report, kind))
        curves = report["curves"][kind]
        over = {name: (c["thresholds"], [scaled(v) for v in c["mean"]]) for name, c in curves.items()}
        bands = {
            n: around(over[n][1], [scaled(v) for v in c["deviation"]]) for n, c in curves.items() if c["deviation"]
        }
        figures = [(line_chart(over, "IoU threshold", "AP, %", bands, True, 480), "AP at each IoU threshold")]
        gains, bands = {}, {}
        for entry in report["curve_differences"][kind]:
            name = f"{entry['b']} − {entry['a']}"
            gains[name] = entry["thresholds"], [scaled(v) for v in entry["delta"]]
            if None not in entry["low"]:
                bands[name] = [(scaled(low), scaled(high)) for low, high in zip(entry["low"], entry["high"])]
        figures.append((line_chart(gains, "IoU threshold", "difference of AP, points", bands, width=480), CURVE_TITLE))
        recall = [i / 100 for i in range(101)]
        for threshold in ("0.50", "0.75"):
            found = {name: (recall, c[threshold]) for name, c in report["precision_recall"][kind].items()}
            chart = line_chart(found, "recall", "precision", width=400, x_range=(0, 1), y_range=(0, 1))
            figures.append((chart, f"Precision and recall at IoU {threshold}"))
        parts.append(f"<h3>{title(kind)}, %</h3>{table}{charts(*figures, broad=True)}")
    if "boundary" in report["kinds"]:
        parts.append(
            '<p class="note">Boundary AP takes min(mask IoU, boundary IoU), the boundary being the mask within 2 % of '
            "the image's diagonal of its outline (Cheng et al., CVPR 2021).</p>"
        )
    return "".join(parts)


CURVE_TITLE = "The difference at each IoU threshold, 95 %"


def around(values: Sequence[float | None], widths: Sequence[float]) -> list[tuple[float, float]]:
    """Bands of half width `widths` around quantities that are never negative."""
    middles = [value or 0.0 for value in values]
    return [(max(middle - width, 0.0), middle + width) for middle, width in zip(middles, widths)]


def classes(report: Mapping) -> str:
    categories = report["validation"]["categories"]
    if len(categories) < 2:
        return ""
    figures, tables = [], []
    for kind in report["kinds"]:
        found = report["per_class"][kind]
        names = list(found["mean"])
        order = sorted(range(len(categories)), key=lambda k: -(found["mean"][names[0]][k] or 0))
        rows = [[categories[k], *(percent(found["mean"][name][k]) for name in names)] for k in order]
        tables.append(f"<h3>{title(kind)}, %</h3>{html_table(['class', *names], rows)}")
        for other, entries in found["differences"].items():
            order = sorted(range(len(categories)), key=lambda k: -abs(entries[k]["delta"] or 0))[:20]
            order.sort(key=lambda k: -(entries[k]["delta"] or 0))
            rows = [(categories[k], *(scaled(entries[k][key]) for key in ("delta", "low", "high"))) for k in order]
            figures.append((interval_chart(rows, "difference, points"), f"{title(kind)}: {other} − {names[0]}"))
    return "".join(tables) + charts(*figures, broad=True)


def errors(report: Mapping) -> str:
    figures = []
    for kind in report["kinds"]:
        groups = {
            name: {TIDE_NAMES[key]: 100 * values[key] for key in TIDE} for name, values in report["tide"][kind].items()
        }
        caption = f"{TITLES[kind].capitalize()}: what mending each error would gain (TIDE)"
        figures.append((bar_chart(groups, "AP50 to gain, points"), caption))
    return charts(*figures, broad=True)


def alignment(report: Mapping) -> str:
    found = report.get("alignment")
    if not found:
        return ""
    features = {name: (e["fractions"], e["feature_shift"]) for name, e in found.items()}
    boxes = {name: (e["pixels"], e["box_shift"]) for name, e in found.items()}
    shares = [i / 20 for i in range(21)]
    areas = {
        name: ([scaled(v) for v in e["area_error"]], shares) if e["area_error"] else ([-1, 0, 0, 1], [0, 0, 1, 1])
        for name, e in found.items()
    }
    return charts(
        (
            line_chart(features, "shift of image and RoI, cells", "relative change", None, True, noise=1e-4),
            "How far pooled features change",
        ),
        (
            line_chart(boxes, "shift of image and RoI, px", "mean move, px", None, True, noise=1e-3),
            "How far predicted boxes move",
        ),
        (
            line_chart(areas, "error of the RoI's area, %", "share of RoIs below", None, True),
            "Area that the method reads",
        ),
    ) + (
        '<p class="note">Left: smooth maps that are shifted exactly, so that only the RoI method is measured; 0 is '
        "perfect. Middle: the image itself is shifted and the result moved back; the backbone's part is the same for "
        "all. Right: rounded RoIs against real ones over the validation boxes, as a cumulative share.</p>"
    )


def training(report: Mapping) -> str:
    return charts(training_chart(report, {label: (label, "loss") for label in report["training"]}, "loss", "Loss"))


def training_chart(report: Mapping, lines: Mapping[str, tuple[str, str]], y_name: str, caption: str) -> tuple[str, str]:
    """What was logged: mean over a method's runs, with a shade of one standard deviation.

    lines: {name: (method, key of the log)}. Runs whose lines are at other iterations than the first one's are left out.
    """
    series, bands = {}, {}
    for name, (label, key) in lines.items():
        curves = report["training"][label]
        curves = [c for c in curves if key in c and c["iteration"] == curves[0]["iteration"]]
        values = np.array([c[key] for c in curves], float)  # None, for what was infinite, becomes NaN
        series[name] = curves[0]["iteration"], [None if np.isnan(v) else v for v in values.mean(0).tolist()]
        if len(curves) > 1:
            bands[name] = around(series[name][1], np.nan_to_num(values.std(0, ddof=1)).tolist())
    spread = " (mean of the runs, shade: standard deviation)" if bands else ""
    return line_chart(series, "iteration", y_name, bands, True), caption + spread


def offsets(report: Mapping) -> str:
    sizes, penalties = {}, {}
    for label, curves in report["training"].items():
        for key in curves[0]:
            if key.endswith("offsets_mean_norm"):
                sizes[f"{label}: {key.split('/')[0]}"] = label, key
            elif key == "loss_offset":
                penalties[label] = label, key
    heads = {
        f"{label}: {head}": f for label, by_head in report.get("offsets", {}).items() for head, f in by_head.items()
    }
    rows = []
    for name, found in heads.items():
        pixels = [number(value, 1, 2) for value in (found["mean_px"], *found["mean_abs_px"])]
        rows.append([name, *pixels, number(found["mean_norm"], 1, 3), number(found["modulation"], 1, 2)])
    moves = {name: steps(found["histogram"]) for name, found in heads.items()}
    weights = {
        name: steps(found["modulation_histogram"]) for name, found in heads.items() if found["modulation_histogram"]
    }
    return (html_table(OFFSETS_HEADER, rows) + OFFSETS_NOTE if rows else "") + charts(
        training_chart(report, sizes, "mean norm", "Norm of the offsets (dx, dy) in training"),
        training_chart(report, penalties, "loss", "L2 loss of the offsets, weighted"),
        (line_chart(moves, "move of a bin, px", "% of bins per px", None, True), "Histogram of the moves"),
        (line_chart(weights, "modulation", "% of bins per unit", None, True), "Histogram of the modulation"),
    )


OFFSETS_HEADER = ["head", "mean move, px", "mean |x|, px", "mean |y|, px", "mean norm", "mean modulation"]
OFFSETS_NOTE = (
    '<p class="note">Moves of bins in pixels of the image files, over the RoIs that inference pools in some validation '
    "images, by the first run of each method; the norm is that of the offsets themselves, shares of the RoI's sides "
    "before gamma.</p>"
)


def steps(histogram: Mapping[str, Sequence[float]]) -> tuple[list[float], list[float]]:
    """The outline of a histogram as (x, y), y in percent per unit of x."""
    edges = histogram["edges"]
    heights = [share / (right - left) for share, left, right in zip(histogram["percent"], edges, edges[1:])]
    return [x for pair in zip(edges, edges[1:]) for x in pair], [y for height in heights for y in (height, height)]


def runs(report: Mapping) -> str:
    rows = [
        [method["label"], str(seed), run]
        for method in report["methods"]
        for seed, run in zip(method["seeds"], method["runs"])
    ]
    parts = [html_table(["method", "seed", "folder"], rows)]
    settings = {key for method in report["methods"] for key in method["settings"]}
    if settings:
        rows = [[key, *(str(method["settings"].get(key)) for method in report["methods"])] for key in sorted(settings)]
        parts.append("<h3>Settings in which they differ</h3>")
        parts.append(html_table(["setting", *(method["label"] for method in report["methods"])], rows))
    if report.get("left_out"):
        parts.append("<h3>Left out</h3>" + html_table(["run", "reason"], list(map(list, report["left_out"].items()))))
    return "".join(parts)


def figure(caption: str, image: np.ndarray, side: int = 1800) -> str:
    """A picture, no larger than `side` pixels."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(buffer, "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    caption = escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/jpeg;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )
