"""Pascal VOC: one XML file for each image (Everingham et al. 2010).

VOC counts pixels from 1 and includes the last one: xmin..xmax becomes the continuous box from xmin - 1 to xmax. Objects
marked difficult become `iscrowd: 1`: neither objects nor background are learnt there, and COCO's and VOC's AP ignore
them. hotcoco parses the files.
"""

from __future__ import annotations

from pathlib import Path

from hotcoco import COCO


def read_voc(root: Path, split: str) -> dict:
    """COCO instances of a split of VOC data.

    Args:
        root: VOCdevkit, or one data set laid out like VOC2007.
        split: like "VOC2007/trainval" (or "trainval" where root is VOC2007 itself), named in ImageSets/Main; or a
            folder that holds XML files and images side by side.

    Raises:
        FileNotFoundError: neither the list nor the folder exists.
        ValueError: an XML file is wrong, or one that the list names is missing.
    """
    folder, name = (root / split).parent, (root / split).name
    listing = folder / "ImageSets" / "Main" / f"{name}.txt"
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
    prefix = images.relative_to(root)
    content["images"] = [
        {**image, "file_name": (prefix / image["file_name"]).as_posix()} for image in content["images"]
    ]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    return content


def _parse(folder: Path) -> dict:
    try:
        return COCO.from_voc(str(folder)).dataset
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder}: {error}") from None
