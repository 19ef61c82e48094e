"""Data sets in other formats, read as COCO instances: one reader for each, `read(root, split, notes)`.

Each gives a COCO dict, and counts in `notes` what it read although it is not as the format says.

File names of the images are relative to the root. `detector convert` writes what a reader gives as JSON.
"""

from detector.data.formats.cityscapes import read_cityscapes
from detector.data.formats.common import Notes
from detector.data.formats.lvis import read_lvis
from detector.data.formats.voc import read_voc
from detector.data.formats.yolo import read_yolo

READERS = {"voc": read_voc, "cityscapes": read_cityscapes, "lvis": read_lvis, "yolo": read_yolo}

__all__ = ["READERS", "Notes", "read_cityscapes", "read_lvis", "read_voc", "read_yolo"]
