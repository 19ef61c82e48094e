"""Detect objects in images with a trained model.

detector predict checkpoint=runs/quickstart/best.pt images=photos
detector predict checkpoint=... 'images=photos/*.jpg' threshold=0.3 output=found
detector predict checkpoint=... images=photos 'threshold={precision: 0.9}'    or {recall: 0.9}, per_class, best
detector predict checkpoint=... 'images=[a.png,b.png]' draw=false
detector predict checkpoint=... images=photos boxes=false scores=false       what the pictures show
detector predict checkpoint=... images=photos model.box_head.detections_per_image=300
detector predict checkpoint=... images=photos trust=my_package       a model with parts of your own
detector predict checkpoint=... input=clip.mp4       a video; or a camera (0), an address, a folder of frames
detector predict checkpoint=... input=clip.mp4 track=bytetrack             objects with ids that stay
detector predict checkpoint=... input=clip.mp4 every=2 start=10 stop=20    seconds, or frames: stop=600f

Writes annotated pictures, of a video another one, and predictions.json (COCO's format, with scores). In Python:

    detector.load(checkpoint).predict(image)

Exit codes: 0 done (unreadable files are named), 1 none of the files was readable, 2 a setting cannot work.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from detector.checkpoint import write_json
from detector.commands.predict_video import Follow, Look, Shown, predict_videos
from detector.commands.sources import DRAWN, find_images, sources_of
from detector.config import ConfigError, RunError, as_program, config_errors, make_folder
from detector.data import Pictures
from detector.evaluation.operating_point import check_threshold
from detector.inference.draw import draw as draw_objects
from detector.inference.draw import note
from detector.inference.load import load, merge
from detector.inference.result import Result, with_area
from detector.inference.tiles import Masks, find, tiles_of
from detector.inference.tracks import LEAST, Tracking, check_tracker
from detector.inference.video import USUAL_RATE, Span, is_video
from detector.runtime import chosen_precision, start_ranks
from detector.settings import Runtime
from detector.structures import Detections
from detector.structures import each as each_field

log = logging.getLogger(__name__)
DRAWN_SIDE = 2000  # px: large pictures that are seen tile by tile are drawn no larger


def predict_files(
    checkpoint: str,
    images: str | list[str] | None = None,
    *,
    input: str | list[str] | None = None,
    every: int = 1,
    start: float | str | None = None,
    stop: float | str | None = None,
    rate: float = USUAL_RATE,
    codec: str = "mp4v",
    track: str | None = None,
    tracking: dict[str, Any] | None = None,
    output: str = "predictions",
    threshold: float | str | dict[str, float] = "best",
    draw: bool = True,
    labels: bool = True,
    scores: bool = True,
    boxes: bool = True,
    masks: bool = True,
    tiles: dict[str, Any] | None = None,
    batch_size: int = 1,
    max_pixels: int | None = None,
    device: str = "auto",
    paste: Literal["aligned", "torchvision"] = "aligned",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32",
    threads: int | Literal["auto"] | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    trust: str | list[str] | None = None,
) -> int:
    """Detect in image files; returns how many could not be read. configs/predict.yaml says what the arguments mean.

    Writes into `output` one picture for each image, under the image's own path below the folder that all share, and
    predictions.json in COCO's format: categories, images (file_name, height, width) and annotations with a score. An
    unreadable file is named and left out; what is done before an interruption is kept. `output` may lie among the
    images: pictures drawn before are left out. With `tiles` pictures are seen, and read where their format allows,
    tile by tile.
    """
    check_threshold(threshold)
    if (images is None) == (input is None):
        raise ConfigError("give images=..., or input=..., a video: one of both")
    named = [images] if isinstance(images, str) else images
    if named and all(is_video(name) for name in named):
        images, input = None, images
    span = Span(start, stop, every).checked()
    if not 0 < rate < 1000:
        raise ConfigError(f"rate = {rate}: must be frames a second")
    if input is None and (span != Span() or track):
        raise ConfigError("every, start, stop and track are of videos: input=... names one")
    with config_errors("tracking"):
        tracks = Tracking(**{key: value for key, value in (tracking or {}).items() if value is not None})
    if track:
        check_tracker(track)
    paths = [] if images is None else find_images(images)
    with config_errors("runtime"):
        world = start_ranks(Runtime(device=device, threads=threads))
    precision = chosen_precision(world.device, precision)
    detector = load(checkpoint, world.device, model, trust)
    least, said = detector.least_score(threshold)
    box_head = detector.model.box_head
    head = box_head and box_head.stages[-1]
    if head is not None and np.min(least) < head.score_threshold and not isinstance(threshold, str):
        log.warning(
            "threshold = %g: the model gives no scores below %g; model.box_head.score_threshold=%g makes it",
            *(np.min(least), head.score_threshold, np.min(least)),
        )
    if not isinstance(threshold, (int, float)):
        print(f"{said}; threshold=0.3 and the like set another")
        detector.told.add(said)
    settings = {"max_pixels": max_pixels, **(data or {})}
    if each := settings.get("page") == "each":
        settings["page"] = None
    with config_errors("data"):
        pictures = Pictures.of(merge(detector.config.get("data") or {}, settings))
    with config_errors("tiles"):
        wanted = tiles_of(detector.config, tiles or {})
    if input is not None:
        if each:
            raise ConfigError("data.page = 'each': the pages of a file are no video; images=... takes them all")
        sources = sources_of(input, pictures, rate)
        settings = {"checkpoint": known_by(checkpoint), "threshold": np.asarray(least).tolist(), "paste": paste}
        settings |= {"precision": precision, "tiles": dataclasses.asdict(wanted), "data": data, "model": model}
        follow, seen = None, threshold
        if track:
            follow = Follow(track, least, tracks)
            settings |= {"track": track, "tracking": dataclasses.asdict(tracks)}
            if track == "bytetrack":  # it goes on with tracks by what it would not begin them with
                seen = min(LEAST, float(np.min(least)))
        options = {"threshold": seen, "paste": paste, "precision": precision, "tiles": dataclasses.asdict(wanted)}
        look = Look(detector, pictures, batch_size, settings, options)
        shown = Shown(draw, labels, scores, boxes, masks, codec)
        return predict_videos(sources, make_folder(output, "output"), look, shown, span, follow)
    shared = Path(os.path.commonpath([p.absolute().parent for p in paths]))
    folder, read, annotations, failed, full, several = make_folder(output, "output"), [], [], [], 0, 0
    about = PngInfo()
    about.add_text(*DRAWN)

    def picture_of(path: Path, page: int | None = None) -> Path:
        target = folder / path.absolute().relative_to(shared)
        return target.with_name(f"{target.stem}{f'_page{page}' if page else ''}{target.suffix}.png")

    if draw:  # and older versions' drawings carry no sign
        drawn = {picture_of(path).absolute() for path in paths}
        if old := [path for path in paths if path.absolute() in drawn]:
            log.warning("left out are %d pictures that are drawn anew, such as %s", len(old), old[0])
            paths = [path for path in paths if path.absolute() not in drawn]

    def pages_of(path: Path) -> list[int | None]:
        """The pages of a file that are images; None is the one that it is read for."""
        nonlocal several
        try:
            count = pictures.check(path).pages
        except (ValueError, OSError):
            return [None]  # what is wrong with it will be said
        several += count > 1 and not each and pictures.page is None
        return list(range(1, count + 1)) if each and count > 1 else [None]

    def record(path: Path, page: int | None, height: int, width: int, entries: Sequence[dict]) -> None:
        name = f"{path}#page={page}" if page else str(path)
        read.append({"id": len(read) + 1, "file_name": name, "height": height, "width": width})
        for entry in entries:
            annotations.append({"id": len(annotations) + 1, **entry, "image_id": len(read)})

    def finish(path: Path, page: int | None, image: np.ndarray, found: Result) -> None:
        record(path, page, *image.shape[:2], found.to_coco(0))
        arrays = each_field(lambda t: t.numpy(), Detections(*found))
        save_picture(picture_of(path, page), image, arrays, found.notes())

    def look_by_tiles(path: Path, page: int | None) -> bool:
        """Record what is found in a picture; whether there may be more."""
        options = {"paste": paste, "precision": precision, "batch_size": batch_size}
        with pictures.parts(path, page) as picture:
            found = find(detector.model, picture, wanted, detector.preprocess, threshold=least, **options)
            small = picture.reduced(DRAWN_SIDE) if draw else None
        entries = found.results(0, detector.category_ids)
        record(path, page, found.height, found.width, [with_area(e) for e in entries])
        if small is not None:
            seen = found.shrunk(*small.shape[:2])
            outlines = None if seen.windows is None else Masks(seen)
            arrays = seen.boxes, seen.scores, seen.labels, None, outlines, seen.keypoints
            save_picture(picture_of(path, page), small, Detections(*arrays), [note(entry) for entry in entries])
        return found.full

    def save_picture(target: Path, image: np.ndarray, found: Detections, notes: Sequence[str]) -> None:
        """found: arrays."""
        if draw:
            picture = draw_objects(
                *(pictures.rgb(image), found.boxes, found.labels, detector.categories),
                found.scores if scores else None,
                found.masks if masks else None,
                found.keypoints,
                with_boxes=boxes,
                with_labels=labels,
                notes=notes,
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(target, pnginfo=about)

    try:
        todo = [(path, page) for path in paths for page in pages_of(path)]
        if several:
            log.warning(
                "%d files have several pages, of which the first is taken; data.page=each takes all, data.page=2 that",
                several,
            )
        for path, page in tqdm(todo if wanted.size else [], unit="image", leave=False, disable=None):
            try:
                full += look_by_tiles(path, page)
            except (ValueError, OSError) as error:
                failed.append(path)
                tqdm.write(f"left out: {error}", file=sys.stderr)
        steps = range(0, 0 if wanted.size else len(todo), batch_size)
        for start in tqdm(steps, unit="batch", leave=False, disable=None):
            readable = []
            for path, page in todo[start : start + batch_size]:
                try:
                    readable.append((path, page, pictures.read(path, page)))
                except (ValueError, OSError) as error:
                    failed.append(path)
                    tqdm.write(f"left out: {error}", file=sys.stderr)
            arrays = [image for *_, image in readable]
            found = detector.predict_batch(arrays, threshold, paste, precision) if readable else []
            for (path, page, image), detections in zip(readable, found):
                full += head is not None and len(detections.boxes) >= head.detections_per_image
                finish(path, page, image, detections)
    finally:
        categories = [{"id": i, "name": name} for i, name in zip(detector.category_ids, detector.categories)]
        content = {"images": read, "categories": categories, "annotations": annotations}
        write_json(folder / "predictions.json", content)
    print(f"{len(annotations)} objects in {len(read)} images, {len(failed)} files unreadable; see {folder}")
    if full:
        print(
            f"{full} of the images have {head.detections_per_image} objects, the most that the model gives. There may "
            f"be more: set model.box_head.detections_per_image={3 * head.detections_per_image}"
        )
    if not read:
        raise RunError(f"none of the {len(failed)} files could be read")
    return len(failed)


def known_by(checkpoint: str) -> list[Any]:
    """What tells a checkpoint from another one of the same name."""
    return [str(checkpoint), os.path.getsize(checkpoint), round(os.path.getmtime(checkpoint), 3)]


main = as_program("predict", predict_files, __doc__)
