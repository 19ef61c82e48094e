"""MOTChallenge sequences (Milan et al. 2016): SPLIT/SEQUENCE/gt/gt.txt, img1 and seqinfo.ini, as COCO-VID.

A line of gt.txt: frame (from 1), id, left, top, width, height, whether it counts, class, visibility. Left and top
count from 1. Pedestrians are class 1; what does not count, and what is of another class, becomes `iscrowd: 1`. MOT15
has ten numbers in a line, of which the last three are a place in the world, or -1: all are pedestrians.
"""

from __future__ import annotations

import configparser
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from detector.data.formats.common import Notes


class Row(NamedTuple):
    """A line of MOT's text."""

    frame: int  # from 0
    track: int
    box: tuple[float, float, float, float]  # left, top, width, height, from 0
    counts: bool  # as truth: a pedestrian that is to be found
    visibility: float | None
    where: str  # file and line


def mot_rows(file: Path) -> Iterator[Row]:
    """The lines of gt.txt, or of results, which have a score where the truth says whether it counts.

    Raises ValueError that names file and line.
    """
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            values = [float(part) for part in line.replace(",", " ").split()]
            frame, track, (left, top, width, height) = int(values[0]), int(values[1]), values[2:6]
            if not all(map(math.isfinite, values[:6])):
                raise ValueError
        except (ValueError, IndexError, OverflowError):
            raise ValueError(f"{where}: {line[:60]!r} is not frame, id, left, top, width, height, ...") from None
        kind, visibility = (values[7], values[8]) if len(values) == 9 else (values[7] if len(values) == 8 else -1, None)
        counts = (len(values) < 7 or values[6] > 0) and kind in (1, -1)
        yield Row(frame - 1, track, (left - 1, top - 1, width, height), counts, visibility, where)


def read_mot(root: Path, split: str, notes: Notes | None = None) -> dict:
    """COCO-VID instances of the sequences in the folder SPLIT below root: images have video_id and frame_id, objects
    track_id.

    Raises FileNotFoundError where there are none, ValueError that names file and line for what cannot be read.
    """
    files = sorted((root / split).glob("*/gt/gt.txt"))
    if not files:
        raise FileNotFoundError(f"{root / split}/*/gt/gt.txt: no such files: root must hold the folders as unpacked")
    videos, images, annotations = [], [], []
    for number, file in enumerate(files, 1):
        sequence = file.parents[1]
        held = configparser.ConfigParser()
        held.read(sequence / "seqinfo.ini", encoding="utf-8-sig")
        info = dict(held["Sequence"]) if held.has_section("Sequence") else {}
        folder = sequence / info.get("imdir", "img1")
        pictures = {int(p.stem): p for p in sorted(folder.glob("*")) if p.stem.isdecimal()}
        if not pictures:
            raise ValueError(f"{folder}: holds no pictures called 000001.jpg and so on, the frames of {file}")
        with Image.open(pictures[min(pictures)]) as picture:
            width, height = picture.size
        videos.append({"id": number, "name": sequence.name})
        ids = {}
        for frame, path in sorted(pictures.items()):
            ids[frame] = len(images) + 1
            image = {"id": ids[frame], "file_name": path.relative_to(root).as_posix(), "height": height, "width": width}
            images.append(image | {"video_id": number, "frame_id": frame - 1})
        for row in mot_rows(file):
            if row.frame + 1 not in ids:
                raise ValueError(f"{row.where}: frame {row.frame + 1} has no picture in {folder}")
            _, _, wide, high = row.box
            entry = {"id": len(annotations) + 1, "image_id": ids[row.frame + 1], "category_id": 1}
            entry |= {"track_id": row.track, "bbox": list(row.box), "area": wide * high, "iscrowd": int(not row.counts)}
            annotations.append(entry | ({} if row.visibility is None else {"visibility": row.visibility}))
    categories = [{"id": 1, "name": "pedestrian"}]
    return {"videos": videos, "images": images, "annotations": annotations, "categories": categories}
