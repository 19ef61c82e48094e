"""Charts: what is drawn lies inside the picture, labels do not collide, and zeros are zeros."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from detector.comparison.charts import LETTER, bar_chart, interval_chart, line_chart
from detector.comparison.report import header_cell

LONG = "modulated_deformable_position_sensitive_pooling_of_everything, gamma=0.1"


def spans(svg: str) -> list[tuple[float, float, float]]:
    """(left, right, y) of every label, by the width that letters have about."""
    root, found = ElementTree.fromstring(svg), []
    for element in root.iter("text"):
        if element.get("x") is None:
            continue
        shown = (element.text or "") + "".join(child.tail or "" for child in element)
        x, y, long = float(element.get("x")), float(element.get("y")), LETTER * len(shown)
        left = x - {"middle": long / 2, "end": long}.get(element.get("text-anchor"), 0)
        found.append((left, left + long, y))
    return found


@pytest.mark.parametrize("values", [[1e-5, 3e-5], [120000, 240000], [-0.0025, 0.0025], [0, 1]])
def test_labels_stay_inside_and_apart(values):
    svg = line_chart({LONG: ([0, 123456], values), "b": ([0, 123456], values)}, "iteration", "value")
    width = float(re.search(r'viewBox="0 0 (\d+)', svg)[1])
    found = spans(svg)
    assert all(left >= 14 and right <= width + 2 for left, right, _ in found), found
    for left, right, y in found:
        others = [o for o in found if abs(o[2] - y) < 8 and o != (left, right, y)]
        assert all(o[0] >= right - 1 or o[1] <= left + 1 for o in others), (left, right, y)


def test_axes_of_precision_and_recall_are_equal():
    svg = line_chart({"a": ([0, 0.5], [0.9, 0.2])}, "recall", "precision", width=400, x_range=(0, 1), y_range=(0, 1))
    lines = [
        {k: float(v) for k, v in e.attrib.items() if k in ("x1", "x2", "y1", "y2")}
        for e in ElementTree.fromstring(svg).iter("line")
        if e.get("class") == "grid"
    ]
    upright = [e for e in lines if e["x1"] == e["x2"]]
    flat = [e for e in lines if e["y1"] == e["y2"]]
    assert len(upright) == len(flat) == 6
    assert upright[-1]["x1"] - upright[0]["x1"] == pytest.approx(abs(flat[-1]["y1"] - flat[0]["y1"]), abs=0.2)


def test_zeros_and_noise_lie_on_the_axis():
    for values, noise in (([0, 0], 0.0), ([1e-7, 3e-7], 1e-4)):
        svg = line_chart({"a": ([0, 1], values)}, "x", "y", None, True, noise=noise)
        axis = float(re.search(r'class="axis"[^>]*y1="([\d.]+)"', svg)[1])
        points = re.search(r'class="line s0"[^>]*points="([^"]*)"', svg)[1].split()
        assert [float(p.split(",")[1]) for p in points] == pytest.approx([axis, axis], abs=0.1)
        assert ">1</text>" in svg and "e-0" not in svg
    small = line_chart({"a": ([0, 1], [1e-7, 3e-7])}, "x", "y", None, True)
    assert "e-07" in small
    zeros = bar_chart({"a": {"class": 0.0, "place": 0.0}, "b": {"class": 0.0, "place": 0.0}}, "points")
    assert zeros.count('<rect class="bar') == 6 and ">1</text>" in zeros


def test_one_series_of_bars_needs_no_legend():
    assert "name_of_it" not in re.sub(r"<title>.*?</title>", "", bar_chart({"name_of_it": {"a": 1.0}}, "y"))
    two = bar_chart({"name_of_it": {"a": 1.0}, "other": {"a": 2.0}}, "y")
    assert "name_of_it" in re.sub(r"<title>.*?</title>", "", two)


def test_headings_hide_the_lines_behind_them():
    svg = interval_chart(["b − a", ("AP", 1.0, -1.0, 3.0)], "points")
    mat = re.search(r'class="mat"[^>]* y="([\d.]+)"[^>]* height="(\d+)"', svg)
    top = re.search(r'class="zero"[^>]* y1="(\d+)"', svg)
    assert float(mat[1]) <= float(top[1]) and int(mat[2]) == 22


def test_words_of_headings_stay_whole_but_long_names_do_not():
    assert header_cell("GFLOP / image") == "<th>GFLOP / image</th>"
    assert header_cell("modulated_deformable") == "<th class=long>modulated_deformable</th>"
