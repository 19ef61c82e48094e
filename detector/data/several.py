"""Several annotation files as one data set: categories joined by name, images numbered anew, problems named by file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from detector.data.annotations import Annotations, Images, Truth, starts_of
from detector.data.attributes import join, recode
from detector.data.read_coco import Problems, labels_of, read_coco, read_truth

Paths = str | os.PathLike | Sequence[str | os.PathLike]


def as_paths(given: Paths) -> tuple[Path, ...]:
    """One path or several, as several."""
    return (Path(given),) if isinstance(given, (str, os.PathLike)) else tuple(map(Path, given))


def shown(paths: Iterable[object]) -> str:
    """What messages call these files or folders together."""
    return " and ".join(dict.fromkeys(map(str, paths)))


def read_several(
    paths: Paths, categories: Sequence[str] | None = None, *, problems: Problems, truth: bool = True, **options
) -> Annotations:
    """`read_coco` of each file, joined; of one file just that.

    categories: as in read_coco; by default those of all files, in the order in which they occur. Images and categories
    get ids 1, 2, ... in the order of the files; objects keep those of their file. A file may have no objects as long as
    another has some. options: of read_coco. What is wrong is added to `problems`, with the name of its file.

    Raises as read_coco, and ValueError for keypoints or categories that do not fit.
    """
    paths = as_paths(paths)
    if len(paths) == 1:
        return read_coco(paths[0], categories, problems=problems, truth=truth, **options)
    parts = []
    for path in paths:
        with problems.of_file(path):
            parts.append(read_coco(path, problems=problems, truth=truth, alone=False, **options))
    if not sum(len(part.labels) for part in parts):
        raise ValueError(f"{shown(paths)}: no usable objects in any of the files")
    points = [part.keypoint_names for part in parts if part.keypoint_names]
    if any(names != points[0] for names in points):
        raise ValueError(
            f"{shown(paths)}: the keypoints differ: {'; '.join(map(str, points))}: join only files of one kind"
        )
    known = _union([part.categories for part in parts])
    ids = dict(zip(known, range(1, len(known) + 1)))
    if categories is not None:  # each file by its name, where it has what nobody asked for
        for path, part in zip(paths, parts):
            labels_of(str(path), part.categories, part.category_ids, categories, quiet=True)
    names, own_ids = labels_of(shown(paths), known, list(ids.values()), categories)
    label_of = {name: label for label, name in enumerate(names, 1)}
    return _joined(
        parts,
        categories=names,
        category_ids=own_ids,
        keypoint_names=points[0] if points else [],
        labels=_relabelled([part.labels for part in parts], [part.categories for part in parts], label_of),
        truth=_join_truths([part.truth for part in parts], problems) if truth else None,
    )


def read_truths(paths: Paths, masks: bool = True, keypoints: bool = False) -> Truth:
    """`read_truth` of each file, joined as by `read_several`."""
    parts = [read_truth(path, masks, keypoints) for path in as_paths(paths)]
    return parts[0] if len(parts) == 1 else _join_truths(parts, Problems(shown(as_paths(paths))))


def _join_truths(parts: Sequence[Truth], problems: Problems) -> Truth:
    known = _union([part.categories for part in parts])
    federated = [part.federated for part in parts]
    if any(federated) and not all(federated):
        where = "the others are complete for every category: no federated AP is measured"
        problems.notice("file with LVIS's lists of checked categories among others without", where)
    frequency: dict[str, str | None] = {}
    for part in parts:
        for name, value in zip(part.categories, part.frequencies):
            frequency[name] = frequency.get(name) or value
    label_of = {name: label for label, name in enumerate(known, 1)}
    own = [part.categories for part in parts]
    lists = {key: _relabelled([getattr(part, key) for part in parts], own, label_of) for key in ("negative", "unsure")}
    return _joined(
        parts,
        categories=known,
        category_ids=list(label_of.values()),
        frequencies=[frequency[name] for name in known],
        federated=all(federated),
        labels=_relabelled([part.labels for part in parts], own, label_of),
        **lists,
    )


def _joined(parts: Sequence[Images], **values) -> Images:
    """Their arrays one after the other; values: of the fields that are no arrays, or need more than that."""
    most = max(part.keypoints.shape[1] for part in parts)
    groups = join([part.attribute_groups for part in parts])
    recoded = [recode(part.attributes, part.attribute_groups, groups) for part in parts]
    values |= {"attribute_groups": groups, "attributes": np.concatenate(recoded)}
    for item in fields(parts[0]):
        columns = [getattr(part, item.name) for part in parts]
        if item.name in values or not isinstance(columns[0], np.ndarray):
            continue
        if item.name.endswith("_starts"):
            values[item.name] = starts_of(np.concatenate([np.diff(column) for column in columns]))
        elif item.name in ("series", "tracks"):
            values[item.name] = _apart(columns)
        elif item.name == "keypoints":  # a file without objects has none
            columns = [np.pad(c, ((0, 0), (0, most - c.shape[1]), (0, 0))) for c in columns]
            values[item.name] = np.concatenate(columns)
        else:
            values[item.name] = np.concatenate(columns)
    counts = [len(part) for part in parts]
    values["image_ids"] = np.arange(1, sum(counts) + 1, dtype=np.int64)
    values["sources"] = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
    return replace(parts[0], **values)


def _apart(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers of each file, from 0, as numbers of all files together; negative ones stay."""
    firsts = starts_of([column.max(initial=-1) + 1 for column in columns])
    return np.concatenate([np.where(c < 0, c, c + first).astype(c.dtype) for c, first in zip(columns, firsts)])


def _relabelled(columns: Sequence[np.ndarray], names: Sequence[Sequence[str]], label_of: dict[str, int]) -> np.ndarray:
    """Labels of each file, by its own names, as labels of all files together."""
    return np.concatenate(
        [np.array([0, *(label_of[name] for name in own)], np.int32)[column] for column, own in zip(columns, names)]
    )


def _union(names: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for own in names for name in own))
