"""Driving: KITTI's objects (Geiger et al. 2012) and BDD100K (Yu et al. 2020), as COCO.

KITTI's label_2/000123.txt, a line an object: type, truncated 0..1, occluded 0..3, alpha, left, top, right, bottom,
height, width, length, x, y, z, rotation. Its benchmark measures cars, pedestrians and cyclists; vans and sitting
persons are near enough to be neither right nor wrong for the first two, and so is anything in a DontCare region.

BDD100K's det_20/det_SPLIT.json is a list of frames {"name", "labels": [{"category", "box2d", "attributes"}]};
box_track_20/SPLIT/*.json has "videoName", "frameIndex" and ids that stay, and becomes COCO-VID.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from detector.data.formats.common import Notes, read_text

KITTI = {"Car": 1, "Pedestrian": 2, "Cyclist": 3}
NEAR = {"Van": (1,), "Person_sitting": (2,), "DontCare": (1, 2, 3)}  # of which categories they are no error
KITTI_FIELDS = 15
BDD = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle", "traffic light", "traffic sign")
BDD_OLD = {"person": "pedestrian", "motor": "motorcycle", "bike": "bicycle"}  # of its first release
BDD_CROWD = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}  # ignored by its benchmark


def read_kitti(root: Path, split: str, notes: Notes | None = None) -> dict:
    """COCO instances of root/training, those that ImageSets/SPLIT.txt lists (`training`: all of them).

    Objects have occluded, truncated and distance (m, along the camera's axis).

    Raises FileNotFoundError where there are no labels, ValueError that names file, line and field.
    """
    labels, pictures = root / "training" / "label_2", root / "training" / "image_2"
    files = sorted(labels.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"{labels}/*.txt: no such files: root must hold training/label_2 and training/image_2")
    if split != "training":
        known = [root / "ImageSets" / f"{split}.txt", root / f"{split}.txt"]
        listed = next((file for file in known if file.is_file()), None)
        if listed is None:
            raise FileNotFoundError(
                f"{known[0]}: no such file: it lists the numbers of a split; `training` takes all labelled pictures"
            )
        files = [labels / f"{name}.txt" for name in read_text(listed).split()]
    images, annotations = [], []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing, which {split}.txt lists")
        picture = next((p for p in (pictures / f"{file.stem}{end}" for end in (".png", ".jpg")) if p.is_file()), None)
        if picture is None:
            raise ValueError(f"{pictures / file.stem}.png is missing, the picture of {file}")
        image = {"id": len(images) + 1, "file_name": picture.relative_to(root).as_posix()} | _size(picture)
        images.append(image)
        for number, line in enumerate(read_text(file).splitlines(), 1):
            if not line.strip():
                continue
            where, (kind, *rest) = f"{file}, line {number}", line.split()
            try:
                values = [float(value) for value in rest]
            except ValueError:
                values = []
            if len(values) not in (KITTI_FIELDS - 1, KITTI_FIELDS):
                raise ValueError(f"{where}: {line[:60]!r} is not type and {KITTI_FIELDS - 1} numbers")
            left, top, right, bottom = values[3:7]
            if right <= left or bottom <= top:
                raise ValueError(f"{where}: the box {values[3:7]} has no size")
            if kind not in KITTI and kind not in NEAR:
                if notes is not None:
                    notes.add(f"{kind} objects are left out, which the benchmark does not measure", where)
                continue
            entry = {"image_id": image["id"], "bbox": [left, top, right - left, bottom - top]}
            entry |= {"area": (right - left) * (bottom - top), "truncated": values[0], "occluded": int(values[1])}
            entry |= {"distance": values[12]} if kind != "DontCare" else {}
            for category in (KITTI[kind],) if kind in KITTI else NEAR[kind]:
                known = {"id": len(annotations) + 1, "category_id": category, "iscrowd": int(kind in NEAR)}
                annotations.append(known | entry)
    categories = [{"id": i, "name": name} for name, i in KITTI.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def read_bdd100k(root: Path, split: str, notes: Notes | None = None) -> dict:
    """COCO instances of labels/det_20/det_SPLIT.json, or COCO-VID of labels/box_track_20/SPLIT/*.json.

    Pictures lie in images/100k/SPLIT or images/track/SPLIT/VIDEO. Raises FileNotFoundError where there are no labels,
    ValueError that names file, frame and field.
    """
    names = (f"det_20/det_{split}.json", f"det_{split}.json", f"bdd100k_labels_images_{split}.json")
    file = next((root / "labels" / name for name in names if (root / "labels" / name).is_file()), None)
    tracks = sorted((root / "labels" / "box_track_20" / split).glob("*.json"))
    if file is None and not tracks:
        raise FileNotFoundError(
            f"{root / 'labels' / names[0]}: no such file, nor box_track_20/{split}/*.json: unpack the labels there"
        )
    content: dict[str, Any] = {"images": [], "annotations": []}
    if file is None:
        content = {"videos": [], **content}
    for source in [file] if file is not None else tracks:
        try:
            frames = json.loads(read_text(source))
        except ValueError as error:
            raise ValueError(f"{source} is no JSON ({error})") from None
        if not isinstance(frames, list):
            raise ValueError(f"{source}: a list of frames is expected, this is a {type(frames).__name__}")
        if file is None:
            content["videos"].append({"id": len(content["videos"]) + 1, "name": source.stem})
        for place, frame in enumerate(frames):
            _bdd_frame(root, split, source, place, frame, file is None, content, notes)
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(BDD, 1)]
    return content


def _bdd_frame(root, split, source, place, frame, followed, content, notes) -> None:
    where = f"{source}, frame {place}"
    if not isinstance(frame, dict) or not isinstance(frame.get("name"), str):
        raise ValueError(f"{where}: has no name")
    picture = root / "images" / "100k" / split / frame["name"]
    if followed:
        picture = root / "images" / "track" / split / str(frame.get("videoName", source.stem)) / frame["name"]
    if not picture.is_file():
        raise ValueError(f"{where}: {picture} is missing: unpack the pictures beside the labels")
    image = {"id": len(content["images"]) + 1, "file_name": picture.relative_to(root).as_posix()} | _size(picture)
    if followed:
        image |= {"video_id": content["videos"][-1]["id"], "frame_id": int(frame.get("frameIndex", place))}
    content["images"].append(image)
    for number, label in enumerate(frame.get("labels") or []):
        box = label.get("box2d")
        if box is None:
            continue  # lanes and areas
        kind, attributes = label.get("category"), label.get("attributes") or {}
        if kind in BDD_OLD and notes is not None:
            notes.add(f"{kind} is called {BDD_OLD[kind]} now", where)
        kind = BDD_OLD.get(kind, kind)
        crowd = kind in BDD_CROWD or bool(attributes.get("crowd"))
        name = BDD_CROWD.get(kind, kind)
        if name not in BDD:
            raise ValueError(f"{where}, label {number}: category = {kind!r}: is none of {', '.join(BDD)}")
        try:
            left, top, right, bottom = (float(box[key]) for key in ("x1", "y1", "x2", "y2"))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{where}, label {number}: box2d = {box!r}: x1, y1, x2, y2 are expected") from None
        entry = {"id": len(content["annotations"]) + 1, "image_id": image["id"], "category_id": BDD.index(name) + 1}
        entry |= {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
        entry |= {"iscrowd": int(crowd), "occluded": int(bool(attributes.get("occluded", attributes.get("Occluded"))))}
        entry |= {"truncated": float(bool(attributes.get("truncated", attributes.get("Truncated"))))}
        content["annotations"].append(entry | ({"track_id": label.get("id")} if followed else {}))


def _size(picture: Path) -> dict[str, int]:
    try:
        with Image.open(picture) as image:
            return {"height": image.height, "width": image.width}
    except OSError as error:
        raise ValueError(f"{picture} cannot be read ({error})") from None
