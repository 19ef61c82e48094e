"""Pascal VOC: one XML file for each image (Everingham et al. 2010).

VOC counts pixels from 1 and includes the last one: xmin..xmax becomes the continuous box from xmin - 1 to xmax. Objects
marked difficult become `iscrowd: 1`: neither objects nor background are learnt there, and COCO's and VOC's AP ignore
them. hotcoco parses the files. Objects get masks where SegmentationObject has a picture: its pixels number the objects.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hotcoco import COCO
from PIL import Image
from pycocotools import mask as rle_tools


def read_voc(root: Path, split: str) -> dict:
    """COCO instances of a split of VOC data.

    Args:
        root: VOCdevkit, or one data set laid out like VOC2007.
        split: like "VOC2007/trainval" (or "trainval" where root is VOC2007 itself), named in ImageSets/Main; like
            "VOC2012/Segmentation/val", named in ImageSets/Segmentation; or a folder that holds XML files and images
            side by side.

    Raises:
        FileNotFoundError: neither the list nor the folder exists.
        ValueError: an XML file is wrong, or one that the list names is missing.
    """
    folder, name, kind = (root / split).parent, (root / split).name, "Main"
    if folder.name == "Segmentation":
        folder, kind = folder.parent, folder.name
    listing = folder / "ImageSets" / kind / f"{name}.txt"
    if listing.is_file():
        content, images = _parse(folder), folder / "JPEGImages"
        lines = (line.split() for line in listing.read_text().splitlines())
        wanted = {line[0] for line in lines if line}
        if missing := sorted(wanted - {Path(image["file_name"]).stem for image in content["images"]}):
            raise ValueError(
                f"{listing}: {len(missing)} images have no XML file in {folder / 'Annotations'}: {missing[:5]}"
            )
        content["images"] = [image for image in content["images"] if Path(image["file_name"]).stem in wanted]
    elif (root / split).is_dir():
        content, images = _parse(root / split), root / split
        images = images / "JPEGImages" if (images / "JPEGImages").is_dir() else images
    else:
        raise FileNotFoundError(f"split {split!r}: there is neither a list {listing} nor a folder {root / split}")
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    add_masks(content, folder / "SegmentationObject")
    prefix = images.relative_to(root)
    content["images"] = [
        {**image, "file_name": (prefix / image["file_name"]).as_posix()} for image in content["images"]
    ]
    return content


def add_masks(content: dict, folder: Path) -> None:
    """Put RLE masks, and their areas, into the annotations of images that have a picture of objects in `folder`.

    Raises ValueError for a picture of another size than its image.
    """
    by_image: dict[int, list[dict]] = {}
    for entry in content["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry)
    for image in content["images"]:
        path = folder / f"{Path(image['file_name']).stem}.png"
        if not path.is_file():
            continue
        pixels = np.array(Image.open(path))  # indices of a palette; 255 lies between objects
        if pixels.shape != (image["height"], image["width"]):
            size = f"{image['height']} x {image['width']}"
            raise ValueError(f"{path}: expected one number for each of {size} pixels, got {list(pixels.shape)}")
        for number, entry in enumerate(by_image.get(image["id"], []), 1):
            rle = rle_tools.encode(np.asfortranarray(pixels == number, np.uint8))
            if area := int(rle_tools.area(rle)):
                entry |= {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}, "area": area}


def _parse(folder: Path) -> dict:
    try:
        return COCO.from_voc(str(folder)).dataset
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder}: {error}") from None
