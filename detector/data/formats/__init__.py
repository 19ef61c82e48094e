"""Data sets in other formats, read as COCO instances: one reader for each, `read(root, split, notes)`.

Each gives a COCO dict, and counts in `notes` what it read although it is not as the format says. Exports of annotation
tools have no splits: TOOLS, `read(source, images, notes)`.

File names of the images are relative to the root, those of tools to `images`. `detector convert` writes what a reader
gives as JSON. WRITERS go the other way.
"""

from detector.data.formats.cityscapes import read_cityscapes
from detector.data.formats.common import Notes
from detector.data.formats.cvat import read_cvat
from detector.data.formats.driving import read_bdd100k, read_kitti
from detector.data.formats.label_studio import read_label_studio
from detector.data.formats.labelme import read_labelme
from detector.data.formats.lvis import read_lvis
from detector.data.formats.mot import read_mot
from detector.data.formats.supervisely import read_supervisely
from detector.data.formats.voc import read_voc
from detector.data.formats.writers import write_coco, write_csv, write_cvat, write_label_studio, write_yolo
from detector.data.formats.yolo import read_yolo

READERS = {
    "voc": read_voc,
    "cityscapes": read_cityscapes,
    "kitti": read_kitti,
    "bdd100k": read_bdd100k,
    "lvis": read_lvis,
    "yolo": read_yolo,
    "mot": read_mot,
}
TOOLS = {
    "cvat": read_cvat,
    "label_studio": read_label_studio,
    "labelme": read_labelme,
    "supervisely": read_supervisely,
}
WRITERS = {
    "to_coco": write_coco,
    "to_csv": write_csv,
    "to_cvat": write_cvat,
    "to_label_studio": write_label_studio,
    "to_yolo": write_yolo,
}

__all__ = [
    "READERS",
    "TOOLS",
    "WRITERS",
    "Notes",
    "read_bdd100k",
    "read_cityscapes",
    "read_cvat",
    "read_kitti",
    "read_label_studio",
    "read_labelme",
    "read_lvis",
    "read_mot",
    "read_supervisely",
    "read_voc",
    "read_yolo",
]
