"""MOTChallenge sequences (Milan et al. 2016): SPLIT/SEQUENCE/gt/gt.txt, img1 and seqinfo.ini, as COCO-VID.

A line of gt.txt: frame (from 1), id, left, top, width, height, whether it counts, class, visibility. Left and top
count from 1. Pedestrians are class 1; what does not count, and what is of another class, becomes `iscrowd: 1`.
"""

from __future__ import annotations

import configparser
from pathlib import Path

from PIL import Image

from detector.data.formats.common import Notes


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
        for line_number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{file}, line {line_number}"
            try:
                values = [float(part) for part in line.split(",")]
                frame, track, (left, top, wide, high) = int(values[0]), int(values[1]), values[2:6]
            except ValueError:
                raise ValueError(f"{where}: {line[:60]!r} is not frame, id, left, top, width, height, ...") from None
            if frame not in ids:
                raise ValueError(f"{where}: frame {frame} has no picture in {folder}")
            counts = (len(values) < 7 or values[6] > 0) and (len(values) < 8 or int(values[7]) == 1)
            entry = {"id": len(annotations) + 1, "image_id": ids[frame], "category_id": 1, "track_id": track}
            entry |= {"bbox": [left - 1, top - 1, wide, high], "area": wide * high, "iscrowd": int(not counts)}
            annotations.append(entry | ({"visibility": values[8]} if len(values) > 8 else {}))
    categories = [{"id": 1, "name": "pedestrian"}]
    return {"videos": videos, "images": images, "annotations": annotations, "categories": categories}
