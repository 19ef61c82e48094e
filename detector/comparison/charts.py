"""Charts as SVG text that lives in an HTML page: its colours are the page's, dark or light.

Series are told apart by colour (CSS classes s0, s1, ..., set by the page to a palette for the colour-blind), by dash
pattern and by their names. Numbers come in as data; None leaves a gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 340, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 14, 44
LETTER = 6.4  # px, about, of the labels
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2 1 2")


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]],
    x_name: str,
    y_name: str,
    bands: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    from_zero: bool = False,
    width: int = WIDTH,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    noise: float = 0.0,
) -> str:
    """Curves {name: (x, y)} with their legend. bands: {name: (low, high) at each point}, drawn as a shade.

    x_range, y_range: what the axes show; None: what the data need. With both of them the axes are of equal length.
    noise: curves that stay within it are drawn as what they are, zero, on an axis to 1.
    """
    bands = bands or {}
    points = [(x, y) for xs, ys in series.values() for x, y in zip(xs, ys) if y is not None]
    if not points:
        return ""
    heights = [y for _, y in points] + [v for band in bands.values() for pair in band for v in pair]
    if max(map(abs, heights)) <= noise:
        y_range = y_range or (0.0, 1.0)
    equal = x_range is not None and y_range is not None
    x_range = x_range or (min(p[0] for p in points), max(p[0] for p in points))
    y_ticks = ticks(*(y_range or (min([0.0] * from_zero + heights), max([0.0] * from_zero + heights))))
    left = room(y_ticks)
    height = width - left - RIGHT + TOP + BOTTOM if equal else HEIGHT
    frame = Frame(x_range, y_range or (y_ticks[0], y_ticks[-1]), len(series), width, height, left)
    parts = [frame.axes(ticks(*x_range, 5 if equal else 4), y_ticks, x_name, y_name)]
    if y_ticks[0] < 0 < y_ticks[-1]:
        zero = f"{frame.y(0):.1f}"
        parts.append(f'<line class="zero" x1="{frame.left}" x2="{frame.right}" y1="{zero}" y2="{zero}"/>')
    for i, (name, (xs, ys)) in enumerate(series.items()):
        if band := [(frame.x(x), *pair) for x, y, pair in zip(xs, ys, bands.get(name, ())) if y is not None]:
            edge = [f"{x:.1f},{frame.y(high):.1f}" for x, _, high in band]
            edge += [f"{x:.1f},{frame.y(low):.1f}" for x, low, _ in reversed(band)]
            parts.append(f'<polygon class="band s{i % 8}" points="{" ".join(edge)}"/>')
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(xs, ys) if y is not None)
        parts.append(f'<polyline class="line s{i % 8}" stroke-dasharray="{DASHES[i % 6]}" points="{path}"/>')
    return frame.svg(parts + frame.legend(list(series)), f"{y_name} over {x_name}")


def interval_chart(rows: Sequence[tuple[str, float | None, float | None, float | None] | str], x_name: str) -> str:
    """One line per (name, middle, low, high): a dot with its interval, against zero. A plain text is a heading."""
    known = [v for row in rows if not isinstance(row, str) for v in row[1:] if v is not None]
    if not known:
        return ""
    x_ticks = ticks(min(0, *known), max(0, *known))
    left = min(230, 14 + round(6.3 * max(len(row[0]) for row in rows if not isinstance(row, str))))
    frame = Frame((x_ticks[0], x_ticks[-1]), (0, 1), 0, height=TOP + BOTTOM + 22 * len(rows), left=left, width=500)
    parts = [frame.axes(x_ticks, [], x_name, "")]
    parts.append(f'<line class="zero" x1="{frame.x(0):.1f}" x2="{frame.x(0):.1f}" y1="{TOP}" y2="{frame.bottom}"/>')
    for i, row in enumerate(rows):
        y = TOP + 22 * i + 11
        if isinstance(row, str):
            parts.append(f'<rect class="mat" x="0" y="{y - 11}" width="{frame.width}" height="22"/>')
            parts.append(f'<text class="head" x="2" y="{y + 5}">{escape(shorten(row, 76))}</text>')
            continue
        name, middle, low, high = row
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(shorten(name, 34))}</text>'
        )
        if middle is None:
            continue
        if low is not None:
            clear = "clear" if low > 0 or high < 0 else "unclear"
            parts.append(
                f'<line class="whisker {clear}" x1="{frame.x(low):.1f}" x2="{frame.x(high):.1f}" y1="{y}" y2="{y}"/>'
            )
        parts.append(f'<circle class="dot" cx="{frame.x(middle):.1f}" cy="{y}" r="4"/>')
    return frame.svg(parts, x_name)


def bar_chart(groups: Mapping[str, Mapping[str, float | None]], y_name: str) -> str:
    """Bars {series: {category: value}}, the categories side by side."""
    categories = list(next(iter(groups.values()), {}))
    values = [v for bars in groups.values() for v in bars.values() if v is not None]
    if not values:
        return ""
    y_ticks = ticks(min(0, *values), max(0, *values))
    alone = len(groups) == 1  # which needs no legend
    frame = Frame(
        (0, len(categories)), (y_ticks[0], y_ticks[-1]), 0 if alone else len(groups), width=500, left=room(y_ticks)
    )
    letters = max(3, int((frame.right - frame.left) / len(categories) / LETTER))
    parts = [frame.axes([], y_ticks, "", y_name)]
    wide = 0.8 / len(groups)
    for c, category in enumerate(categories):
        parts.append(
            f'<text class="tick" x="{frame.x(c + 0.5):.1f}" y="{frame.bottom + 16}" text-anchor="middle">'
            f"{escape(shorten(category, letters))}</text>"
        )
        for i, (name, bars) in enumerate(groups.items()):
            value = bars[category]
            if value is None:
                continue
            x, top, zero = frame.x(c + 0.1 + i * wide), frame.y(max(value, 0)), frame.y(min(value, 0))
            parts.append(
                f'<rect class="bar s{i % 8}" x="{x:.1f}" y="{top:.1f}" width="{frame.x(wide) - frame.x(0) - 1:.1f}" '
                f'height="{max(zero - top, 0.5):.1f}">'
                f"<title>{escape(f'{name}, {category}: {value:.3g}')}</title></rect>"
            )
    return frame.svg(parts + ([] if alone else frame.legend(list(groups), bars=True)), y_name)


class Frame:
    """From data to the picture's coordinates, and what surrounds the data."""

    def __init__(self, x_range, y_range, entries: int, width: int = WIDTH, height: int = HEIGHT, left: int = LEFT):
        self.x_range, self.y_range, self.left, self.right = x_range, y_range, left, width - RIGHT
        self.bottom = height - BOTTOM
        self.width, self.height = width, height + 18 * entries

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / ((high - low) or 1) * (self.bottom - TOP)

    def axes(self, x_ticks, y_ticks, x_name: str, y_name: str) -> str:
        middle = (TOP + self.bottom) / 2
        parts = [
            f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"/>',
            f'<text class="name" x="{(self.left + self.right) / 2}" y="{self.bottom + 34}" text-anchor="middle">'
            f"{escape(x_name)}</text>",
            f'<text class="name" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_name)}</text>",
        ]
        for value in x_ticks:
            if self.x_range[0] - 1e-9 <= value <= self.x_range[1] + 1e-9:
                x = f"{self.x(value):.1f}"
                parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{self.bottom}"/>')
                parts.append(f'<text class="tick" x="{x}" y="{self.bottom + 16}" text-anchor="middle">{value:g}</text>')
        for value in y_ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        return "".join(parts)

    def legend(self, names: Sequence[str], bars: bool = False) -> list[str]:
        parts = []
        for i, name in enumerate(names):
            y = self.bottom + 54 + 18 * i
            if bars:
                parts.append(f'<rect class="bar s{i % 8}" x="{self.left}" y="{y - 10}" width="26" height="10"/>')
            else:
                parts.append(
                    f'<line class="line s{i % 8}" stroke-dasharray="{DASHES[i % 6]}" x1="{self.left}" '
                    f'x2="{self.left + 30}" y1="{y - 5}" y2="{y - 5}"/>'
                )
            text = shorten(name, int((self.width - self.left - 38) / LETTER))
            parts.append(
                f'<text class="tick" x="{self.left + 38}" y="{y}"><title>{escape(name)}</title>{escape(text)}</text>'
            )
        return parts

    def svg(self, parts: Sequence[str], title: str) -> str:
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" style="max-width:{self.width}px">'
            f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
        )


def room(values: Sequence[float]) -> int:
    """Pixels left of an axis for its labels, and its name before them."""
    return max(LEFT, 26 + round(LETTER * max(len(f"{value:g}") for value in values)))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that enclose [low, high], about `count` steps."""
    if high <= low:
        high = low + (abs(low) or 1)
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
