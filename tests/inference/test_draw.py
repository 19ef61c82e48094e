"""Pictures of detections: what is drawn, where, and that it can be read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont

from detector.inference import draw as drawing
from detector.inference.draw import (
    PALETTE,
    _draw_labels,
    _overlap,
    _places,
    beside_truth,
    color,
    draw,
    panel,
    paste_windows,
)
from detector.structures import Batch, Detections, Targets

GREY = np.full((160, 120, 3), 128, np.uint8)
BOX = np.array([[30.0, 40, 80, 100]])


def test_small_images_are_enlarged_and_large_ones_stay():
    for side, expected in ((160, 800), (640, 1280), (798, 1596), (800, 800), (4000, 4000)):
        image = np.zeros((side, side // 2, 3), np.uint8)
        assert draw(image, np.zeros((0, 4)), [], ["a"]).shape == (expected, expected // 2, 3)


def test_box_mask_and_background():
    mask = np.zeros((1, 160, 120), bool)
    mask[0, 50:90, 40:70] = True
    picture, zoom = draw(GREY, BOX, [2], ["a", "b"], [0.9], mask), 5
    assert picture.shape == (800, 600, 3) and picture.dtype == np.uint8
    tint = np.round(0.55 * 128 + 0.45 * np.array(color(1)))
    np.testing.assert_allclose(
        picture[55 * zoom : 85 * zoom, 45 * zoom : 65 * zoom], np.broadcast_to(tint, (150, 100, 3)), atol=1
    )
    assert (picture[70 * zoom, 30 * zoom - 1 : 30 * zoom + 1] == color(1)).all()  # the box's left side
    assert (picture[120 * zoom :] == 128).all() and (picture[45 * zoom, 32 * zoom : 38 * zoom] == 128).all()
    assert (GREY == 128).all()


def test_line_width_follows_the_image():
    def widest(side):
        image = np.full((side, side, 3), 128, np.uint8)
        box = np.array([[0.25, 0.25, 0.75, 0.75]]) * side
        row = draw(image, box, [1], ["a"], masks=np.zeros((1, side, side), bool))[side // 2]
        return (row != 128).any(1).sum() / 2

    assert 2 <= widest(800) <= 5 and 8 <= widest(4000) <= 14


def test_a_class_has_one_colour_and_a_single_class_one_per_object():
    boxes = np.array([[10.0, 10, 40, 40], [60, 60, 90, 90]])

    def corners(categories, labels):
        picture = draw(GREY, boxes, labels, categories, masks=np.zeros((2, 160, 120), bool))
        return [tuple(picture[round(y) * 5 + 60, round(x) * 5]) for x, y, *_ in boxes]

    assert corners(["a", "b"], [2, 2]) == [color(1), color(1)]
    assert corners(["a"], [1, 1]) == [color(0), color(1)]
    assert len({color(i) for i in range(21)}) == 21


@pytest.mark.parametrize(
    "matrix",
    [  # Machado et al. 2009, severity 1
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ],
    ids=["protanopia", "deuteranopia"],
)
def test_colours_differ_for_the_colour_blind(matrix):
    linear = (np.array(PALETTE) / 255) ** 2.2
    seen = (linear @ np.array(matrix).T).clip(0, 1) ** (1 / 2.2) * 255
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 30


def test_label_places_are_inside_the_picture():
    rng = np.random.default_rng(0)
    for _ in range(200):
        corner, size = rng.uniform(-50, 300, 2), rng.uniform(1, 200, 2)
        places = _places(np.concatenate([corner, corner + size]), 60, 18, (300, 200))
        assert (places[:, :2] >= 0).all() and (places[:, 2:] <= (300, 200)).all()


def test_labels_avoid_each_other():
    """Boxes in a heap: every label is drawn, each one in its own colour and uncovered."""
    boxes = np.array([[40, 60, 200, 150], [42, 61, 202, 151], [44, 62, 204, 152], [46, 63, 206, 153]], float)
    picture = _draw_labels(np.zeros((300, 400, 3), np.uint8), boxes, ["label"] * 4, [color(i) for i in range(4)], 1.0)
    areas = [(picture == color(i)).all(2).sum() for i in range(4)]
    assert min(areas) > 0.9 * max(areas) and min(areas) > 400


def test_in_a_crowd_labels_hide_nothing_and_each_class_is_named():
    """Forty objects side by side leave no room for labels: those of classes that are named already are left out."""
    boxes = np.array(
        [[10 + 20 * (i % 8), 20 + 14 * (i // 8), 29 + 20 * (i % 8), 33 + 14 * (i // 8)] for i in range(40)]
    )
    labels = [1 + (i == 20) for i in range(40)]
    image = np.full((800, 800, 3), 128, np.uint8)
    bare = draw(image, boxes, labels, ["ab", "cd"], with_labels=False)
    picture = draw(image, boxes, labels, ["ab", "cd"], np.full(40, 0.5))
    hidden = (picture != bare).any(2)
    inside = np.zeros((800, 800), bool)
    inside[20:89, 10:170] = True
    areas = {kind: (hidden & (picture == color(kind)).all(2)).sum() for kind in (0, 1)}
    assert areas[1] > 100 and areas[0] > 1000  # both classes have labels
    assert (hidden & inside).sum() < 0.15 * inside.sum()
    everywhere = _draw_labels(bare, boxes[:20].astype(float), ["ab 0.50"] * 20, [color(0)] * 20, 1.0)
    assert ((everywhere != bare).any(2) & inside).sum() > 0.3 * inside.sum()  # few enough objects: all have labels


def test_overlap():
    a, b = np.array([[0, 0, 10, 10]], float), np.array([[5, 0, 15, 10], [20, 20, 30, 30]], float)
    np.testing.assert_allclose(_overlap(a, b), [[0.5, 0]])


def test_unknown_label_and_no_objects_are_drawn():
    assert (draw(GREY, BOX, [7], ["a"], [0.5]) != draw(GREY, np.zeros((0, 4)), [], ["a"])).any()


NAMES = [
    "a\nb\r",
    "\x00\x1b[31m",
    "",
    "  ",
    "מרחבא",
    "👩\u200d🚀",
    "猫",
    "<b>&",
    "\ud800",
    "x" * 500,
    "\ufffe",
    "e\u0301",
]


def test_any_name_is_drawn():
    """As a label, in the pictures of a training run, and as a title."""
    boxes = np.tile(BOX, (len(NAMES), 1))
    picture = draw(GREY, boxes, range(1, len(NAMES) + 1), NAMES, np.full(len(NAMES), 0.5))
    for name in NAMES:
        assert (draw(GREY, BOX, [1], [name, "b"]) != draw(GREY, BOX, [1], ["", "b"])).any() or not name
        assert panel([picture], [name]).shape[1] == picture.shape[1]


@pytest.fixture
def fonts(monkeypatch):
    """fonts(*files): let these be the system's fonts."""

    def go(*files) -> None:
        monkeypatch.setattr(drawing, "_system_fonts", lambda: list(map(str, files)))
        for part in (drawing._font_file, drawing._legible, drawing._warn_of_escapes):
            part.cache_clear()

    yield go
    monkeypatch.undo()
    for part in (drawing._font_file, drawing._legible):
        part.cache_clear()


def test_letters_without_a_font_are_escaped_behind_the_classs_number(fonts, caplog):
    fonts()
    assert drawing._name(["a", "黒い cat"], 2) == "2: \\u9ed2\\u3044 cat" and drawing._name(["猫"], 1) == "1: \\u732b"
    assert caplog.text.count("no font here has the letters") == 1


def test_a_font_of_the_system_that_has_the_letters_is_taken(fonts, caplog, tmp_path):
    font = tmp_path / "cat.ttf"
    usual = TTFont(drawing.USUAL_FONT)
    for part in usual["cmap"].tables:
        if part.isUnicode():
            part.cmap[ord("猫")] = "A"  # a font in which a cat looks like an A
    usual.save(font)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    fonts(tmp_path / "broken.ttf", font)
    assert drawing._name(["猫"], 1) == "猫" and not caplog.text
    assert drawing._font("猫 0.50", 20).path == str(font) and drawing._font("A 0.50", 20).path == drawing.USUAL_FONT
    assert (draw(GREY, BOX, [1], ["猫", "b"]) == draw(GREY, BOX, [1], ["A", "b"])).all()


def test_panel_puts_pictures_side_by_side_under_their_titles():
    a, b = np.full((90, 100, 3), 10, np.uint8), np.full((90, 100, 3), 200, np.uint8)
    joined = panel([a, b], ["left", "right"])
    assert joined.shape[1] > 200 and (joined[-90:, :100] == 10).all() and (joined[-90:, -100:] == 200).all()
    assert (joined[:-90, :60] < 100).any() and (joined[:-90, -90:] < 100).any()


def test_ground_truth_windows():
    """Cells of a window at native scale, and of one that squeezes a larger object."""
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[0, :3, :2] = 1
    masks[1, :, :4] = 1
    full = paste_windows(masks, np.array([[5, 6, 13, 14], [0, 0, 16, 24]], np.float32), 20, 18)
    expected = np.zeros((2, 20, 18), bool)
    expected[0, 6:9, 5:7] = True
    expected[1, :20, :8] = True
    np.testing.assert_array_equal(full, expected)


def test_beside_truth():
    images = torch.full((1, 3, 96, 96), 128, dtype=torch.uint8)
    size = torch.tensor([[80, 90]])
    batch = Batch(images, size, size, torch.tensor([1]), torch.tensor([0]))
    boxes = torch.tensor([[[10.0, 10, 40, 50], [20, 20, 60, 60]]])
    labels, yes = torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)
    targets = Targets(boxes, labels, yes, ~yes, torch.ones(1, 2, 8, 8, dtype=torch.uint8), boxes, yes)
    detections = Detections(boxes, torch.tensor([[0.9, 0.2]]), labels, yes, torch.ones(1, 2, 28, 28))
    picture = beside_truth(batch, targets, detections, ["a", "b"])
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    assert picture.shape[0] > 80 * 9 and picture.shape[1] > 2 * 90 * 9
    assert not (left == color(1)).all(2).any() and (right == color(1)).all(2).any()  # 0.2 is below the threshold
    assert (left == color(0)).all(2).any() and (right == color(0)).all(2).any()
    no_masks = beside_truth(
        batch, targets._replace(masks=None), detections._replace(masks=None), ["a", "b"], threshold=0.95
    )
    assert not (no_masks[:, : picture.shape[1] // 2] == color(0)).all(2).any()
