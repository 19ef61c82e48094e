"""What `detector predict input=...` does with a video: frames in, an annotated video and a line for each frame out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools
from tqdm import tqdm

from detector.config import RunError
from detector.data import Pictures
from detector.inference.draw import draw as draw_objects
from detector.inference.draw import note
from detector.inference.predict import Detector
from detector.inference.result import Result
from detector.inference.tracks import NONE, Tracking, Tracks, Trails, appearance, packed, unpacked
from detector.inference.video import (
    Ahead,
    Behind,
    Frame,
    Journal,
    Pages,
    Span,
    Video,
    Writer,
    check_codec,
    entries_of,
    write_coco,
    write_mot,
)
from detector.structures import Detections

log = logging.getLogger(__name__)
JOURNAL, VIDEO = "frames.jsonl", "video"
WAITING = 2  # batches between the threads


@dataclass
class Look:
    """How frames are looked at."""

    detector: Detector
    pictures: Pictures
    batch_size: int = 1
    about: Mapping[str, Any] = field(default_factory=dict)  # settings that change what is found
    options: Mapping[str, Any] = field(default_factory=dict)  # of `Detector.predict`

    def at(self, frames: Sequence[Frame]) -> list[Result]:
        arrays = [self.pictures.of_array(frame.image) for frame in frames]
        return self.detector.predict(arrays, batch_size=self.batch_size, **self.options) if arrays else []


@dataclass(frozen=True)
class Follow:
    """How objects are followed: see inference/tracks.py."""

    name: str
    least: float | np.ndarray  # score from which on a detection begins a track
    settings: Tracking


@dataclass
class Shown:
    """What the annotated video shows."""

    draw: bool = True
    labels: bool = True
    scores: bool = True
    boxes: bool = True
    masks: bool = True
    codec: str = "mp4v"


def predict_videos(
    sources: Sequence[Video | Pages], folder: Path, look: Look, shown: Shown, span: Span, follow: Follow | None = None
) -> int:
    """Detect in videos, one after another; returns how many frames could not be read. Each has its own folder where
    there are several."""
    span.checked()
    if shown.draw:
        check_codec(shown.codec)
    failed, taken = 0, set()
    for source in sources:
        own = folder
        if len(sources) > 1:
            name = source.name
            while name in taken:
                name += "_"
            taken.add(name)
            own = folder / name
            own.mkdir(exist_ok=True)
        failed += _one(source, own, look, shown, span, follow)
    return failed


def _one(
    source: Video | Pages, folder: Path, look: Look, shown: Shown, span: Span, follow: Follow | None = None
) -> int:
    about = {**source.fingerprint(), "start": span.start, "stop": span.stop, "every": span.every, **look.about}
    journal = Journal(folder / JOURNAL, about, append=source.live)
    known, total = journal.done, span.count(source.count, source.rate)
    if source.live:
        first, known = journal.last + 1, 0
    else:
        first = 0
        if known:
            what = "the video is drawn anew up to there" if shown.draw else "these are passed over"
            print(f"{known} frames are found already in {journal.file}: {what}")
    writer = None
    if shown.draw:
        target = folder / VIDEO
        for number in range(2, 10_000 if source.live else 0):
            if not target.with_suffix(".mkv").exists():
                break
            target = folder / f"{VIDEO}_{number}"
        writer = Writer(target.with_suffix(".x"), shown.codec, source.rate / span.every, keeps=source.live)
    rate = source.rate / span.every
    tracks = Tracks(follow.name, rate, follow.least, follow.settings) if follow else None
    work = Work(look, shown, writer, journal, first, tracks)
    started, stopped = time.monotonic(), False
    recorded = entries_of(journal.file) if known else iter(())
    skip = 0 if shown.draw else known
    ahead = Ahead(source.frames(span, skip), WAITING * look.batch_size, latest=source.live)
    behind = Behind(work.finish, WAITING * look.batch_size)
    bar = tqdm(total=total, unit="frame", leave=False, disable=None)
    try:
        frames = iter(ahead)
        for frame, entry in zip(islice(frames, known), recorded):
            if frame.index != entry["frame"]:
                raise RunError(f"{journal.file} does not belong to {source.name}: remove it to begin anew")
            work.follow(entry)
            behind.put((frame, entry, False))
            bar.update()
        while batch := list(islice(frames, look.batch_size)):
            for frame, entry in zip(batch, work.look_at(batch)):
                behind.put((frame, entry, True))
                bar.update()
    except KeyboardInterrupt:
        stopped = True
    finally:
        bar.close()
        ahead.close()
        try:
            behind.close()
        finally:
            journal.close()
            drawn = writer.close() if writer else None
    return _report(source, folder, look, work, drawn, ahead.dropped, stopped, time.monotonic() - started)


def _report(source, folder, look, work, drawn, dropped, stopped, seconds) -> int:
    detector = look.detector
    categories = [{"id": i, "name": name} for i, name in zip(detector.category_ids, detector.categories)]
    frames, objects = write_coco(folder / JOURNAL, folder / "predictions.json", source.name, categories)
    if work.tracks:
        count = write_mot(folder / JOURNAL, folder / "tracks.txt")
        print(f"{count} tracks")
    rate = f", {work.new / seconds:.1f} frames/s" if work.new and seconds else ""
    print(f"{objects} objects in {frames} frames{rate}; see {folder}")
    if drawn:
        print(f"{drawn.name} has the source's rate and no sound")
    if work.writer and work.writer.fitted:
        log.warning("%d frames have another size than the first: they were fitted into it", work.writer.fitted)
    if dropped:
        log.warning("%d frames came faster than they could be looked at, and were left out", dropped)
    if work.failed:
        log.warning("%d frames could not be read, such as %d: %s", *(len(work.failed), *work.failed[0]))
    if stopped and not source.live:
        print("stopped; the same command goes on from here")
        raise SystemExit(130)
    if source.problem and not stopped:
        if source.live or not frames:
            raise RunError(f"input: {source.problem}; what was found until then is kept in {folder}")
        log.warning("%s: %s What was found until there is kept", source.name, source.problem)
    if not frames and not stopped:
        raise RunError(f"input: {source.name} has no frame between start and stop that could be read")
    return len(work.failed)


class Work:
    """What is done with a frame."""

    def __init__(
        self,
        look: Look,
        shown: Shown,
        writer: Writer | None,
        journal: Journal,
        first: int,
        tracks: Tracks | None = None,
    ):
        self.look, self.shown, self.writer, self.journal, self.first = look, shown, writer, journal, first
        self.tracks = tracks
        self.trails = Trails(round(tracks.settings.trail * tracks.rate)) if tracks else None
        self.labels = {number: label for label, number in enumerate(look.detector.category_ids, 1)}
        self.new, self.failed, self.before = 0, [], None

    def look_at(self, frames: Sequence[Frame]) -> Iterator[dict[str, Any]]:
        """The journal's entry of each frame."""
        found = iter(self.look.at([frame for frame in frames if frame.image is not None]))
        for frame in frames:
            entry = {"frame": frame.index + self.first, "time": round(frame.time, 6)}
            entry |= {} if frame.name is None else {"file_name": frame.name}
            if frame.image is None:
                yield entry | {"problem": frame.problem}
                continue
            height, width = frame.image.shape[:2]
            objects = [*map(_rounded, next(found).to_coco(0))]
            entry |= {"height": height, "width": width, "objects": objects}
            if self.tracks and self.tracks.settings.appearance and objects:
                boxes = self.arrays(entry).boxes
                regions = self.look.detector.region_features(self.look.pictures.of_array(frame.image), boxes)
                for one, vector in zip(objects, appearance(regions.features.numpy())):
                    one["vector"] = packed(vector)
            self.follow(entry)
            yield entry

    def follow(self, entry: dict[str, Any]) -> None:
        """Give the objects of the next frame their ids. Those of a journal get the ids that they had."""
        if self.tracks is None or entry.get("problem"):
            return
        found, objects = self.arrays(entry), entry["objects"]
        vectors = None
        if self.tracks.settings.appearance:
            vectors = np.array([unpacked(one["vector"]) for one in objects]) if objects else np.zeros((0, 1))
        for one, number in zip(objects, self.tracks.update(found.boxes, found.scores, found.labels, vectors)):
            one["track_id"] = number

    def finish(self, item: tuple[Frame, dict[str, Any], bool]) -> None:
        """Draw a frame, write it, and note what was found in it if that is new."""
        frame, entry, new = item
        if entry.get("problem"):
            self.failed.append((entry["frame"], entry["problem"]))
        if new:
            self.journal.add(entry)
            self.new += 1
        if self.writer is None:
            return
        picture = self.before if frame.image is None or entry.get("problem") else self.drawn(frame.image, entry)
        if picture is not None:  # of a frame that cannot be read the one before stands still
            self.writer.write(picture)
            self.before = picture

    def drawn(self, image: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
        shown, ids, trails = self.shown, None, None
        if self.tracks:
            entry = {**entry, "objects": [one for one in entry["objects"] if one["track_id"] != NONE]}
            ids = [one["track_id"] for one in entry["objects"]]
        found = self.arrays(entry)
        if self.tracks and self.tracks.settings.trail:
            trails = self.trails.after(found.boxes, ids)
        return draw_objects(
            *(self.look.pictures.rgb(self.look.pictures.of_array(image)), found.boxes, found.labels),
            self.look.detector.categories,
            found.scores if shown.scores else None,
            found.masks if shown.masks else None,
            found.keypoints,
            with_boxes=shown.boxes,
            with_labels=shown.labels,
            ids=ids,
            trails=trails,
            notes=[note(one) for one in entry["objects"]],
        )

    def arrays(self, entry: Mapping[str, Any]) -> Detections:
        """The objects of an entry as arrays."""
        objects = entry["objects"]
        boxes = np.array([one["bbox"] for one in objects], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = np.array([one["score"] for one in objects], np.float32)
        labels = np.array([self.labels[one["category_id"]] for one in objects], np.int64)
        masks = points = None
        if objects and "segmentation" in objects[0]:
            masks = rle_tools.decode([one["segmentation"] for one in objects]).transpose(2, 0, 1).astype(bool)
        if objects and "keypoints" in objects[0]:
            points = np.array([one["keypoints"] for one in objects], np.float32).reshape(len(objects), -1, 3)
            points[..., :2] += 0.5  # COCO counts from the centre of the first pixel
        return Detections(boxes, scores, labels, np.ones(len(objects), bool), masks, points)


def _rounded(entry: dict[str, Any]) -> dict[str, Any]:
    """A COCO result without the image's id, in a thousandth of a pixel."""
    entry = {key: value for key, value in entry.items() if key != "image_id"}
    return entry | {"bbox": [round(v, 3) for v in entry["bbox"]], "score": round(entry["score"], 6)}
