"""How well objects are followed: HOTA (Luiten et al. 2021), MOTA (Bernardin, Stiefelhagen 2008), IDF1 (Ristani et al.
2016), by the package `trackers`, whose numbers are TrackEval's.

Objects are compared with those of their class, by the IoU of boxes. Truth that does not count (crowd regions, MOT's
distractors) takes the results that lie on it out, as MOTChallenge does. Intervals are bootstraps over sequences.

Dimensions: G true objects in a frame, D found ones.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools
from scipy.optimize import linear_sum_assignment

from detector.data.formats.mot import mot_rows
from detector.ops.checks import ConfigError

NUMBERS = ("HOTA", "DetA", "AssA", "MOTA", "IDF1", "IDSW", "Frag")
INTERVALS = ("HOTA", "AssA", "MOTA", "IDF1")
SAME = 0.5  # IoU from which a result lies on truth that does not count
SAMPLES = 1000
NEED = "pip install 'two-stage-detector[tracks]' && pip install --no-deps trackers"
MOT_CLASS = "pedestrian"  # what class 1 of MOT's files is


@dataclass
class Film:
    """The objects of a video: by frame, rows of (track, class name, left, top, width, height, whether it counts)."""

    name: str
    frames: dict[int, list[tuple]] = field(default_factory=dict)


def read_films(source: Path, names: Mapping[int, str] | None = None) -> list[Film]:
    """Videos of a COCO-VID file, of a folder with such (predict's predictions.json, one or in folders), of MOT's text
    files, or of a folder of MOT sequences (SEQUENCE/gt/gt.txt, or SEQUENCE/gt.txt).

    Raises ConfigError that names file, record and field.
    """
    if source.is_file():
        return [_mot(source, source.stem)] if source.suffix == ".txt" else coco_vid(source)
    if not source.is_dir():
        raise ConfigError(f"{source}: there is no such file or folder")
    if files := sorted(source.glob("**/gt.txt")):
        return [_mot(file, file.parents[file.parent.name == "gt"].name) for file in files]
    if files := sorted({*source.glob("predictions.json"), *source.glob("*/predictions.json")}):
        return [film for file in files for film in coco_vid(file)]
    if files := sorted(source.glob("*.txt")):
        return [_mot(file, file.stem) for file in files]
    raise ConfigError(f"{source}: holds no predictions.json, no */gt.txt, no */gt/gt.txt and no *.txt of tracks")


def coco_vid(file: Path) -> list[Film]:
    """Of COCO with `videos`; images have video_id and frame_id, objects track_id (or instance_id)."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: is no JSON ({error})") from None
    lacks = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    if lacks or not isinstance(content.get("videos"), list):
        raise ConfigError(f"{file}: has no {', '.join(lacks or ['videos'])}: COCO-VID is expected, see docs/video.md")
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    films = {video["id"]: Film(str(video.get("name", video["id"]))) for video in content["videos"]}
    places = {}
    for image in content["images"]:
        for key, known in (("video_id", films), ("frame_id", None)):
            if key not in image or (known is not None and image[key] not in known):
                raise ConfigError(f"{file}: image {image.get('id')}: {key} = {image.get(key)!r} names nothing")
        places[image["id"]] = film, frame = films[image["video_id"]], int(image["frame_id"])
        film.frames.setdefault(frame, [])
    for one in content["annotations"]:
        track = one.get("track_id", one.get("instance_id"))
        ignored = bool(one.get("iscrowd") or one.get("ignore"))
        if track is None and not ignored:
            raise ConfigError(
                f"{file}: annotation {one.get('id')} has no track_id: objects that are followed are expected; "
                "detector predict input=... track=bytetrack gives them"
            )
        if one["image_id"] not in places or one["category_id"] not in names:
            raise ConfigError(f"{file}: annotation {one.get('id')}: its image_id or category_id names nothing")
        film, frame = places[one["image_id"]]
        film.frames[frame].append((track, names[one["category_id"]], *one["bbox"], not ignored))
    return list(films.values())


def _mot(file: Path, name: str) -> Film:
    """Of MOT's text, see `mot_rows`."""
    film, truth = Film(name), file.name == "gt.txt"
    try:
        for row in mot_rows(file):
            rows = film.frames.setdefault(row.frame, [])
            rows.append((row.track, MOT_CLASS, *row.box, row.counts or not truth))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return film


def pairs(truth: Film, found: Film | None, category: str | None) -> tuple[list, list, list]:
    """(true ids, found ids, IoU [G, D]) of each frame of the truth, of one class (None: all, as if they were one)."""
    numbers: dict[str, dict] = {"true": {}, "found": {}}
    every: tuple[list, list, list] = [], [], []
    for frame in sorted(truth.frames):
        true, seen = (
            [row for row in film.frames.get(frame, []) if category in (None, row[1])] if film else []
            for film in (truth, found)
        )
        boxes = [np.array([row[2:6] for row in rows], float).reshape(-1, 4) for rows in (true, seen)]
        iou = np.zeros((len(true), len(seen)))
        if len(true) and len(seen):
            iou = np.asarray(rle_tools.iou(boxes[1], boxes[0], np.zeros(len(true)))).T
        counts = np.array([row[6] for row in true], bool)
        keep = np.ones(len(seen), bool)
        if not counts.all():  # what lies on truth that does not count is neither right nor wrong
            rows, columns = linear_sum_assignment(np.where(iou >= SAME, iou, 0), maximize=True)
            keep[[c for r, c in zip(rows, columns) if iou[r, c] >= SAME and not counts[r]]] = False
        kinds = zip(("true", "found"), (true, seen), (counts, keep))
        ids = [
            np.array(
                [numbers[kind].setdefault(row[0], len(numbers[kind])) for row, stays in zip(rows, kept) if stays], int
            )
            for kind, rows, kept in kinds
        ]
        for held, values in zip(every, (*ids, iou[np.ix_(counts, keep)])):
            held.append(values)
    return every


def check_installed() -> None:
    """Raise ConfigError where the package that measures is missing."""
    if not importlib.util.find_spec("trackers"):
        raise ConfigError(f"tracks are measured by the package trackers, which is not installed: {NEED}")


def sequence_numbers(truth: Film, found: Film | None, category: str | None) -> tuple[dict, dict, dict]:
    """HOTA's, CLEAR's and identity's counts of one video."""
    from trackers.eval.clear import compute_clear_metrics
    from trackers.eval.hota import compute_hota_metrics
    from trackers.eval.identity import compute_identity_metrics

    given = pairs(truth, found, category)
    return compute_hota_metrics(*given), compute_clear_metrics(*given), compute_identity_metrics(*given)


def together(parts: Sequence[tuple[dict, dict, dict]]) -> dict[str, float]:
    """NUMBERS of several videos, or of several classes."""
    from trackers.eval.clear import aggregate_clear_metrics
    from trackers.eval.hota import aggregate_hota_metrics
    from trackers.eval.identity import aggregate_identity_metrics

    hota, clear, identity = zip(*parts)
    numbers = {
        **aggregate_hota_metrics(list(hota)),
        **aggregate_clear_metrics(list(clear)),
        **aggregate_identity_metrics(list(identity)),
    }
    return {name: float(numbers[name]) for name in NUMBERS}


@dataclass
class Measured:
    """numbers: of "all" classes and of each, over all videos. videos: of all classes, video by video. parts: the counts
    of each video and class, for samples of videos."""

    numbers: dict[str, dict[str, float]]
    videos: dict[str, dict[str, float]]
    parts: list[list[tuple[dict, dict, dict]]]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def measure(truth: Sequence[Film], found: Iterable[Film]) -> Measured:
    """Raises ConfigError for results of videos that the truth does not have, for two of one name, and without truth."""
    check_installed()
    for films, kind in ((truth, "truth"), (found := list(found), "results")):
        names = [film.name for film in films]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{kind}: several videos are called {twice[0]!r}")
    by_name = {film.name: film for film in found}
    if unknown := sorted({*by_name} - {film.name for film in truth}):
        known = ", ".join(sorted(film.name for film in truth)[:5])
        raise ConfigError(f"results: the truth has no video {unknown[0]!r}; it has {known}")
    classes = sorted({row[1] for film in truth for rows in film.frames.values() for row in rows if row[6]})
    if not classes:
        raise ConfigError("truth: no object counts")
    if classes == [MOT_CLASS]:  # COCO's name of it
        for rows in (rows for film in found for rows in film.frames.values()):
            rows[:] = [(row[0], MOT_CLASS if row[1] == "person" else row[1], *row[2:]) for row in rows]
    others = sorted({row[1] for film in found for rows in film.frames.values() for row in rows})
    if others and not {*others} & {*classes}:
        raise ConfigError(
            f"classes are matched by name: the truth has {', '.join(classes[:5])}, the results {', '.join(others[:5])}"
        )
    parts = [[sequence_numbers(film, by_name.get(film.name), kind) for kind in classes] for film in truth]
    numbers = {"all": together([one for video in parts for one in video])}
    numbers |= {kind: together([video[i] for video in parts]) for i, kind in enumerate(classes)}
    videos = {film.name: together(video) for film, video in zip(truth, parts)}
    return Measured(numbers, videos, parts)


def intervals(
    measured: Measured, against: Measured | None = None, samples: int = SAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals of INTERVALS over all classes, or of the differences to other results on the same videos: the
    videos are drawn anew, with replacement, the same ones for both. Of a single video there is none."""
    count = len(measured.parts)
    if count < 2:
        return {}
    random, drawn = np.random.default_rng(seed), []
    for _ in range(samples):
        chosen = random.integers(0, count, count)
        values = [together([one for i in chosen for one in m.parts[i]]) for m in (measured, against) if m is not None]
        drawn.append([values[0][n] - (values[1][n] if against is not None else 0) for n in INTERVALS])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(INTERVALS, low, high)}


def summary(measured: Measured) -> list[list[str]]:
    """Rows of a table, in percent."""
    return [[name, *_cells(numbers)] for name, numbers in measured.numbers.items()]


def _cells(numbers: Mapping[str, Any]) -> list[str]:
    return [f"{numbers[n]:.0f}" if n in ("IDSW", "Frag") else f"{100 * numbers[n]:.1f}" for n in NUMBERS]
