"""Pictures of boxes, masks, names and scores that can be read on images of 100 and of 5,000 pixels.

Line widths and letters scale with the image, small images are enlarged first. Colours can be told apart by the
colour-blind: one per class, or one per object where there is a single class. Labels keep off the edge and each other.
Names that matplotlib's font lacks letters of are written in a font of the system that has them; without one as the
label's number and escapes. Pillow's own font has the letters of English alone, cannot say which it has, and finds no
others; servers and containers have no fonts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detector.data import Pictures
from detector.ops.paste import paste_masks
from detector.ops.text import JOINERS, escaped, one_line
from detector.structures import RESULT_FIELDS, Batch, Detections, Targets

log = logging.getLogger(__name__)

# Okabe and Ito, "Color Universal Design" (2008), without black; further rounds are lighter and darker
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
VIEW = 800  # px: images whose longer side is less are enlarged to at least this
LONGEST = 40  # letters of a name
CROWDED = 25  # with more objects, lines and letters are finer, and labels that would hide something are left out
HIDES = 0.15  # share of a label that may lie on other objects there
USUAL_FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
INK, PAPER = (20, 20, 20), (250, 250, 250)


def color(index: int) -> tuple[int, int, int]:
    """The RGB colour of class or object 0, 1, ..."""
    rgb, turn = np.array(PALETTE[index % len(PALETTE)], float), index // len(PALETTE) % 3
    mixed = rgb if turn == 0 else 0.5 * (rgb + 255) if turn == 1 else 0.75 * rgb
    return tuple(int(v) for v in mixed.round())


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    categories: Sequence[str],
    scores: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    keypoints: np.ndarray | None = None,
    with_boxes: bool = True,
    with_labels: bool = True,
    ids: Sequence[int] | None = None,
    trails: Sequence[np.ndarray] | None = None,
    notes: Sequence[str] = (),
) -> np.ndarray:
    """The picture [h, w, 3] uint8 of an image [H, W, 3] uint8 RGB with its objects, enlarged by an integer if small.

    boxes: [D, 4] (x1, y1, x2, y2) in the image's pixels; labels: [D], 1..K; categories: the K names;
    scores: [D]; masks: [D, H, W] bool; keypoints: [D, P, 3] (x, y, visibility or score), drawn where above 0.
    with_boxes, with_labels: whether frames, and names with scores, are drawn. Where objects are many a label stays
    only where it hides no other object, but each class is named once. ids: [D] of objects that are followed, each with
    a colour of its own and its number before its name; trails: the way [P, 2] of each. notes: [D] or none, what stands
    behind the names.
    """
    zoom = ceil(VIEW / max(image.shape[:2]))
    picture = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC) if zoom > 1 else image.copy()
    boxes, labels = np.asarray(boxes, float).reshape(-1, 4) * zoom, np.asarray(labels, int)
    scale = max(picture.shape[:2]) / VIEW
    crowded = len(labels) > CROWDED
    line = max(1 if crowded else 2, round((1 if crowded else 2) * scale))
    colors = [color(int(k) - 1 if len(categories) > 1 else d) for d, k in enumerate(labels)]
    if ids is not None:
        colors = [color(int(one) - 1) for one in ids]
    order = np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")  # small ones on top
    if masks is not None:
        for d in order:
            _draw_mask(picture, masks[d], zoom, colors[d], line)
    for d in order if with_boxes else ():
        corners = [tuple(int(v) for v in corner) for corner in np.round(boxes[d] - 0.5).reshape(2, 2)]
        if masks is None:  # a dark rim keeps the line visible on any ground
            cv2.rectangle(picture, *corners, INK, 2 * line, cv2.LINE_AA)
        cv2.rectangle(picture, *corners, colors[d], line, cv2.LINE_AA)
    for d in order if trails is not None else ():
        way = np.round(np.asarray(trails[d]) * zoom).astype(np.int32).reshape(-1, 1, 2)
        cv2.polylines(picture, [way], False, INK, 2 * line, cv2.LINE_AA)
        cv2.polylines(picture, [way], False, colors[d], line, cv2.LINE_AA)
    for d in order if keypoints is not None else ():
        for x, y, _ in keypoints[d][keypoints[d][:, 2] > 0]:
            centre = round(float(x) * zoom - 0.5), round(float(y) * zoom - 0.5)
            cv2.circle(picture, centre, 2 * line, INK, cv2.FILLED, cv2.LINE_AA)
            cv2.circle(picture, centre, 2 * line - 1, colors[d], cv2.FILLED, cv2.LINE_AA)
    if not with_labels:
        return picture
    short = len(categories) == 1 and crowded and scores is not None
    texts = [_name(categories, k) for k in labels] if not short else [""] * len(labels)
    if ids is not None:
        texts = [f"{one} {text}".strip() for one, text in zip(ids, texts)]
    if scores is not None:
        texts = [f"{text} {score:.2f}".strip() for text, score in zip(texts, scores)]
    if any(notes):
        texts = [" ".join(filter(None, pair)) for pair in zip(texts, map(_legible, notes))]
    return _draw_labels(picture, boxes, texts, colors, scale, labels)


def note(entry: Mapping[str, Any]) -> str:
    """What a result says of an object in fields of probabilities by name, as text: names of at least 0.5, and of those
    that exclude each other, in a mapping of their own, the likeliest."""
    found = []
    for key, field in entry.items():
        for name, value in field.items() if isinstance(field, Mapping) and key not in RESULT_FIELDS else ():
            if isinstance(value, Mapping):
                found.append(max(value, key=value.get))
            elif isinstance(value, (int, float)) and value >= 0.5:
                found.append(name)
    return ", ".join(found)


def _name(categories: Sequence[str], label: int) -> str:
    if not 1 <= label <= len(categories):
        return f"label {label}"
    name = categories[label - 1]
    return _legible(name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…", f"{label}: ")


def _draw_mask(picture: np.ndarray, mask: np.ndarray, zoom: int, rgb: tuple[int, int, int], line: int) -> None:
    """Tint the mask's pixels and draw its outline; works in the mask's own window."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    if w == 0:
        return
    window = np.repeat(np.repeat(mask[y : y + h, x : x + w].astype(np.uint8), zoom, 0), zoom, 1)
    part = picture[y * zoom : (y + h) * zoom, x * zoom : (x + w) * zoom]
    tinted = cv2.addWeighted(part, 0.55, np.full_like(part, rgb), 0.45, 0)
    np.copyto(part, tinted, where=window[..., None] > 0)
    outlines, _ = cv2.findContours(window, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, rgb, line, cv2.LINE_AA, offset=(x * zoom, y * zoom))


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font for a text of what `_legible` returned and numbers."""
    return _load_font(_font_file(frozenset(text)), size)


@cache
def _load_font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@cache
def _legible(text: str, number: str = "") -> str:
    """The text as one line that some font has all letters of; `number` goes before one that has to be escaped."""
    text = one_line(text)
    if _font_file(frozenset(text)):
        return text
    _warn_of_escapes()
    return number + "".join(letter if letter in _letters_of(USUAL_FONT) else escaped(letter) for letter in text)


@cache
def _warn_of_escapes() -> None:
    log.warning(
        "pictures: no font here has the letters of all names; those without are shown by number and \\u...; "
        "a font of the system that has them, such as Noto Sans CJK, is found by itself"
    )


@cache
def _font_file(letters: frozenset[str]) -> str | None:
    """The usual font if it has these letters, else one of the system's that has; None if there is none."""
    letters = letters.difference(JOINERS).union("0123456789. ")
    if letters <= _letters_of(USUAL_FONT):
        return USUAL_FONT
    return next((file for file in _system_fonts() if letters <= _letters_of(file)), None)


@cache
def _system_fonts() -> list[str]:
    from matplotlib.font_manager import findSystemFonts  # slow to import, and seldom needed

    return sorted(findSystemFonts())


@cache
def _letters_of(file: str) -> frozenset[str]:
    """What a font can draw at any size."""
    try:
        ImageFont.truetype(file, 17)  # fonts of bitmaps have a few sizes only
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def _draw_labels(
    picture: np.ndarray, boxes: np.ndarray, texts: list[str], colors: list, scale: float, labels: Sequence[int] = ()
) -> np.ndarray:
    """Labels in the order of the objects, each where it hides least: other labels first, then other objects, then its
    own. labels: the classes, for where objects are many."""
    canvas, crowded, named = Image.fromarray(picture), len(texts) > CROWDED, set()
    pen, size = ImageDraw.Draw(canvas), max(10, round((12 if crowded else 15) * scale))
    pad, placed = max(1, round(2 * scale)), np.zeros((0, 4))
    for d, (text, rgb) in enumerate(zip(texts, colors)):
        font = _font(text, size)
        width, height = font.getlength(text) + 2 * pad, sum(font.getmetrics()) + pad
        places = _places(boxes[d], width, height, canvas.size)
        hidden_labels = _overlap(places, placed[_near(places, placed)]).sum(1)
        near = _near(places, boxes)
        hidden_objects = _overlap(places, boxes[near[near != d]]).sum(1)
        own = _overlap(places, boxes[[d]])[:, 0] * width * height / max(np.prod(boxes[d, 2:] - boxes[d, :2]), 1.0)
        best = int((20 * hidden_labels + hidden_objects + 0.5 * own + np.arange(len(places)) * 0.01).argmin())
        kind = labels[d] if len(labels) else 0
        hides = hidden_objects[best] > HIDES and kind in named
        if crowded and (hidden_labels[best] > 0 or hides):
            continue
        named.add(kind)
        place = places[best]
        placed = np.vstack([placed, place])
        pen.rounded_rectangle(tuple(place), radius=2 * pad, fill=rgb)
        dark = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 125
        pen.text((place[0] + pad, place[1]), text, font=font, fill=PAPER if dark else INK)
    return np.asarray(canvas)


def _places(box: np.ndarray, width: float, height: float, size: tuple[int, int]) -> np.ndarray:
    """Label rectangles [P, 4] for a box, the favourite first, all inside the picture as far as they fit."""
    x1, y1, x2, y2 = box
    corners = [(x1, y1 - height), (x1, y2), (x2 - width, y1 - height), (x2 - width, y2)]  # outside
    corners += [(x1, y1), (x1, y2 - height), (x2 - width, y1), (x2 - width, y2 - height)]  # inside
    corners += [(x2, y1), (x1 - width, y1), ((x1 + x2 - width) / 2, (y1 + y2 - height) / 2)]
    left = np.clip([c[0] for c in corners], 0, max(size[0] - width, 0))
    top = np.clip([c[1] for c in corners], 0, max(size[1] - height, 0))
    return np.stack([left, top, left + width, top + height], axis=1)


def _near(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Indices of the boxes [N, 4] that may overlap one of the places [P, 4]: of thousands, a few."""
    low, high = places[:, :2].min(0), places[:, 2:].max(0)
    return np.flatnonzero(
        (boxes[:, 0] < high[0]) & (boxes[:, 1] < high[1]) & (boxes[:, 2] > low[0]) & (boxes[:, 3] > low[1])
    )


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection areas [A, B] as a share of a's areas."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clip(0).prod(-1) / ((a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1]))[:, None]


def panel(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Pictures of one size side by side under their titles, [h, w, 3] uint8."""
    height, width = pictures[0].shape[:2]
    size = max(12, round(len(pictures) * width / 80))
    gap, head = size // 2, 2 * size
    canvas = Image.new("RGB", (len(pictures) * (width + gap) - gap, head + height), PAPER)
    pen = ImageDraw.Draw(canvas)
    for i, (picture, title) in enumerate(zip(pictures, titles)):
        canvas.paste(Image.fromarray(picture), (i * (width + gap), head))
        title = _legible(title)
        pen.text((i * (width + gap) + gap, size // 3), title, font=_font(title, size), fill=INK)
    return np.asarray(canvas)


def beside_truth(
    batch: Batch,
    targets: Targets,
    detections: Detections,
    categories: Sequence[str],
    index: int = 0,
    threshold: float = 0.5,
    pictures: Pictures = Pictures(),  # noqa: B008  it is frozen
) -> np.ndarray:
    """Image `index` of a batch as the network saw it: detections of at least `threshold` beside the ground truth.

    pictures: says which channels are shown.
    """
    height, width = batch.image_sizes[index].tolist()
    image = pictures.rgb(batch.images[index, :, :height, :width].permute(1, 2, 0).contiguous().cpu().numpy())
    keep = detections.valid[index] & (detections.scores[index] >= threshold)
    boxes, scores, labels = (_array(t[index][keep]) for t in (detections.boxes, detections.scores, detections.labels))
    masks = None
    if detections.masks is not None:
        masks = paste_masks(_array(detections.masks[index][keep]), boxes, height, width)
    real = targets.valid[index] & ~targets.crowd[index]
    truth_masks = None
    if targets.masks is not None:
        truth_masks = paste_windows(
            _array(targets.masks[index][real]), _array(targets.mask_windows[index][real]), height, width
        )
    points = None if detections.keypoints is None else _array(detections.keypoints[index][keep])
    truth_points = None if targets.keypoints is None else _array(targets.keypoints[index][real])
    crowd = targets.valid[index] & targets.crowd[index]
    marked = _shaded(image, targets, index, crowd)
    known = _array(targets.boxes[index][real]), _array(targets.labels[index][real])
    truth = draw(marked, *known, categories, masks=truth_masks, keypoints=truth_points)
    found = draw(image, boxes, labels, categories, scores, masks, points)
    regions = f", {int(crowd.sum())} crowd regions hatched" if crowd.any() else ""
    titles = [f"predicted ({len(boxes)}, score ≥ {threshold:g})", f"ground truth ({int(real.sum())}{regions})"]
    return panel([found, truth], titles)


def _shaded(image: np.ndarray, targets: Targets, index: int, crowd: Tensor) -> np.ndarray:
    """The image with a hatching on its crowd regions [G] bool, in which nothing counts: on their masks, else boxes."""
    boxes = _array(targets.boxes[index][crowd])
    regions = np.zeros((len(boxes), *image.shape[:2]), bool)
    if targets.masks is not None and len(boxes):
        windows = _array(targets.mask_windows[index][crowd])
        regions = paste_windows(_array(targets.masks[index][crowd]), windows, *image.shape[:2])
    for region, (x1, y1, x2, y2) in zip(regions, boxes.round().astype(int)):
        if not region.any():
            region[max(y1, 0) : y2, max(x1, 0) : x2] = True
    rows, columns = np.indices(image.shape[:2])
    period = max(6, max(image.shape[:2]) // 60)
    lines = regions.any(0) & ((rows + columns) % period < max(2, period // 3))
    return np.where(lines[..., None], np.uint8(PAPER), image)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def paste_windows(masks: np.ndarray, windows: np.ndarray, height: int, width: int) -> np.ndarray:
    """Full-size masks [G, height, width] bool of ground-truth cells [G, S, S] that cover `windows` [G, 4]."""
    image = np.zeros((len(masks), height, width), dtype=bool)
    for out, mask, (x1, y1, x2, y2) in zip(image, masks, windows):
        columns = (np.arange(width) + 0.5 - x1) / max(x2 - x1, 1e-6) * mask.shape[1]
        rows = (np.arange(height) + 0.5 - y1) / max(y2 - y1, 1e-6) * mask.shape[0]
        inside_x, inside_y = ((v >= 0) & (v < s) for v, s in ((columns, mask.shape[1]), (rows, mask.shape[0])))
        out[np.ix_(inside_y, inside_x)] = mask[np.ix_(rows[inside_y].astype(int), columns[inside_x].astype(int))] >= 0.5
    return image
