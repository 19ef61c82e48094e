"""The pictures and videos that `images` and `input` of `detector predict` name."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from PIL import Image

from detector.config import ConfigError
from detector.data import ARRAYS, Pictures, image_suffixes
from detector.inference.video import ADDRESS, Pages, Video, in_order, is_video

log = logging.getLogger(__name__)
DRAWN = ("Software", "two-stage-detector: predict")  # stands in every picture that is drawn here


def find_images(sources: str | Sequence[str], key: str = "images") -> list[Path]:
    """The image files that files, folders (with what is below them) and patterns name, each once, in order.

    What a folder or a pattern has beside them is left out, with a warning that counts it: files of other kinds, arrays
    beside a picture of the same name, and pictures that predict.py has drawn itself.

    Raises ConfigError for a source that names nothing.
    """
    found: dict[Path, None] = {}
    for source in [sources] if isinstance(sources, str) else sources:
        path, others = Path(source), []
        if path.is_dir():
            every = sorted(p for p in path.rglob("*") if p.is_file())
            pictures = {p.with_suffix("") for p in every if p.suffix.lower() in image_suffixes()}
            files = [
                p for p in every if is_picture(p) and (p.suffix not in ARRAYS or p.with_suffix("") not in pictures)
            ]
            others = sorted({*every} - {*files})
        else:
            files = (
                [path] if path.is_file() else sorted(p for p in map(Path, glob(source, recursive=True)) if p.is_file())
            )
        paths = [p for p in files if p == path or not is_drawing(p)]
        counts = Counter(p.suffix.lower() or "without a suffix" for p in others)
        counts["pictures that predict.py drew"] = len(files) - len(paths)
        kinds = [f"{count} {kind}" for kind, count in counts.most_common() if count]
        if not paths:
            beside = f" (but {', '.join(kinds)})" if kinds else ""
            raise ConfigError(f"{key}: {source!r} is no file, no folder with images, and matches nothing{beside}")
        if kinds:
            log.warning("%s: left out are %s", source, ", ".join(kinds))
        found |= dict.fromkeys(paths)
    return list(found)


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in image_suffixes() or path.suffix.lower() in ARRAYS


def is_drawing(path: Path) -> bool:
    """Whether `predict_files` has made this picture, whose name is then that of an image and .png."""
    if path.suffix != ".png" or not is_picture(Path(path.stem)):
        return False
    try:
        with Image.open(path) as picture:
            return picture.info.get(DRAWN[0]) == DRAWN[1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False  # what is wrong with it will be said


def sources_of(given: str | Sequence[str], pictures: Pictures, rate: float) -> list[Video | Pages]:
    """The videos that `input` names, each readable: files, addresses, cameras; pictures in order are one.

    Raises ConfigError for what is nothing of these.
    """
    names = [given] if isinstance(given, str) else list(given)
    if len(names) == 1 and Path(names[0]).is_dir():
        held = sorted((str(p) for p in Path(names[0]).rglob("*") if p.is_file() and is_video(str(p))), key=in_order)
        names = held or names
    elif len(names) == 1 and not Path(names[0]).exists() and not ADDRESS.match(names[0]):
        names = sorted(glob(names[0], recursive=True), key=in_order) or names
    if len(names) == 1 and names[0].lower().endswith(".txt") and Path(names[0]).is_file():
        return [_listed(Path(names[0]), pictures, rate)]
    videos = [name for name in names if is_video(name) or name.lower().endswith(".gif") or _is_camera(name)]
    if videos and len(videos) < len(names):
        other = next(name for name in names if name not in videos)
        raise ConfigError(f"input: {videos[0]!r} is a video, {other!r} is none: give videos, or the frames of one")
    if not videos and len(names) == 1 and Path(names[0]).is_file() and not is_picture(Path(names[0])):
        videos = names  # of a suffix that nobody knows: OpenCV may
    if not videos and all(Path(name).is_dir() for name in names):
        folders = [folder for name in names for folder in _folders(Path(name))]
        if folders:  # one that lies alone in a folder keeps its own name
            return [
                Pages(name or "frames", sorted(find_images(str(folder), "input"), key=in_order), pictures, rate)
                for name, folder in folders
            ]
    if not videos:
        paths = find_images(names, "input")
        if len(names) == 1:
            paths.sort(key=in_order)
        return [Pages(paths[0].parent.name or "frames", paths, pictures, rate)]
    if len(videos) == 1:
        return [Video(videos[0], pictures)]
    found = []
    for name in videos:
        try:
            found.append(Video(name, pictures))
        except ConfigError as error:
            log.warning("left out: %s", error)
    if not found:
        raise ConfigError(f"input: none of the {len(videos)} videos can be read")
    return found


def _folders(root: Path) -> list[tuple[str, Path]]:
    """(name, folder) of each folder of frames: `root` itself, or where it holds no picture those in it that do."""
    if any(is_picture(path) for path in root.iterdir()):
        return [(root.name, root)]
    held = sorted({path.parent for path in root.rglob("*") if path.is_file() and is_picture(path)}, key=in_order)
    return [(folder.parent.name if folder.name == "img1" else folder.name, folder) for folder in held]


def _is_camera(name: str) -> bool:
    return name.isdecimal() and not Path(name).exists()


def _listed(file: Path, pictures: Pictures, rate: float) -> Pages:
    """The pictures that a text file names, one in a line, beside it or by their whole paths."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ConfigError(f"input = {str(file)!r}: is no list of pictures in UTF-8") from None
    paths = [file.parent / line for line in lines if line and not line.startswith("#")]
    if not paths:
        raise ConfigError(f"input = {str(file)!r}: names no picture; one in a line is expected")
    if missing := [path for path in paths if not path.is_file()]:
        raise ConfigError(f"input = {str(file)!r}: {len(missing)} of its files are missing, such as {missing[0]}")
    return Pages(file.stem, paths, pictures, rate)
