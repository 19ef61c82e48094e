"""Videos as a stream of frames: read ahead in one thread, drawn and written in another, a few at a time.

A source is a file or an address that OpenCV reads, a camera, or pictures in order. What was found stands in
frames.jsonl, one line for each frame, from which the annotated video can be drawn again: so a run that was killed goes
on behind its last whole line, and its output is that of one that was not.

Dimensions: H x W pixels, C channels. Frames count from 0, in the source. Times are seconds from its beginning.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from detector.data import Pictures
from detector.ops.checks import ConfigError, RunError

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".m2ts", ".ogv")
STREAMS = ("rtsp", "rtsps", "rtmp", "udp", "tcp", "rtp")  # addresses whose frames do not wait
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
USUAL_RATE = 25.0  # frames/s, where a source does not tell
PATIENCE = 10_000  # ms until an address counts as silent
CODECS = {"mp4v": ".mp4", "avc1": ".mp4", "hvc1": ".mp4", "VP80": ".webm", "VP90": ".webm", "MJPG": ".avi"}
PICTURE = (64, 64)  # px, of the video with which a codec is tried
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong with a file is said here, in one line


class Frame(NamedTuple):
    index: int
    time: float
    image: np.ndarray | None  # [H, W, C] uint8, of three channels RGB; None where it cannot be read
    name: str | None = None  # of its file
    problem: str = ""  # why it cannot be read


class Span(NamedTuple):
    """Which frames are wanted: from `start` to before `stop`, each `every`-th. Seconds, or frames as "120f"."""

    start: float | str | None = None
    stop: float | str | None = None
    every: int = 1

    def checked(self) -> Span:
        """Raises ConfigError for what cannot be."""
        if self.every < 1:
            raise ConfigError(f"every = {self.every}: must be at least 1: each frame")
        ends = [_moment("start", self.start), _moment("stop", self.stop)]
        if all(end is not None for end in ends) and ends[0][1] == ends[1][1] and ends[0][0] >= ends[1][0]:
            raise ConfigError(f"stop = {self.stop!r}: must come after start = {self.start!r}")
        return self

    def wanted(self, moments: Iterable[tuple[int, float]], skip: int) -> Iterator[tuple[int, float, bool]]:
        """Those of the frames, given by index and seconds, that are wanted; true where an image is: not of the first
        `skip`."""
        start, stop = (_moment(name, value) for name, value in (("start", self.start), ("stop", self.stop)))
        begun = 0
        for index, seconds in moments:
            if stop is not None and not _before(stop, index, seconds):
                return
            if _before(start, index, seconds):
                continue
            taken, between = divmod(begun, self.every)
            begun += 1
            if not between:
                yield index, seconds, taken >= skip

    def count(self, frames: int | None, rate: float) -> int | None:
        """How many frames that is of so many; None where nobody knows."""
        start, stop = (_moment(name, value) for name, value in (("start", self.start), ("stop", self.stop)))
        first = 0 if start is None else int(np.ceil(start[0] * (1 if start[1] else rate)))
        last = frames if stop is None else int(np.ceil(stop[0] * (1 if stop[1] else rate)))
        if last is None:
            return None
        return max(0, -(-((last if frames is None else min(last, frames)) - first) // self.every))


def _moment(name: str, value: float | str | None) -> tuple[float, bool] | None:
    """(number, whether it counts frames)."""
    if value is None:
        return None
    text = str(value)
    try:
        number, frames = (int(text[:-1]), True) if text.endswith("f") else (float(text), False)
    except ValueError:
        number, frames = -1, False
    if not (0 <= number < float("inf")):
        raise ConfigError(f"{name} = {value!r}: must be seconds, such as 2.5, or frames, such as 120f")
    return number, frames


def _before(moment: tuple[float, bool] | None, index: int, seconds: float) -> bool:
    return moment is not None and (index if moment[1] else seconds + 1e-6) < moment[0]


class Video:
    """A file, an address or a camera that OpenCV reads.

    Raises ConfigError, with what is wrong in one line, for what it cannot open.
    """

    def __init__(self, address: str, pictures: Pictures):
        self.address, self.channels = address, pictures.channels
        self.camera = address.isdecimal() and not os.path.exists(address)
        scheme = address.partition("://")[0].lower() if ADDRESS.match(address) else ""
        self.live = self.camera or scheme in STREAMS
        self.name = f"camera_{address}" if self.camera else re.sub(r"[^\w.-]+", "_", Path(address).stem) or "video"
        self.problem = ""  # what ended the frames before their time
        if self.channels not in (1, 3):
            raise ConfigError(
                f"input = {address!r}: a video has 3 channels, and the model takes {self.channels}: give the frames as "
                "a folder of pictures that have them"
            )
        self.scheme, self.capture = scheme, None
        capture = self._opened()
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.rate = rate if 0 < rate < 1000 else USUAL_RATE
        self.count = int(count) if not self.live and 0 < count < 2**31 else None
        width, height = (int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if self.live:
            self.capture = capture  # which may not answer twice
        else:
            capture.release()
        if width * height > pictures.max_pixels:
            raise ConfigError(
                f"input = {address!r}: {width} x {height} pixels are more than max_pixels={pictures.max_pixels}"
            )

    def _opened(self) -> cv2.VideoCapture:
        scheme = self.scheme
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        if self.camera:
            capture, kind = cv2.VideoCapture(int(self.address)), "no camera with this number answers"
        else:
            if not scheme and not os.path.isfile(self.address):
                raise ConfigError(f"input = {self.address!r}: there is no such file, folder, camera or pattern")
            if not scheme and not os.path.getsize(self.address):
                raise ConfigError(f"input = {self.address!r}: the file is empty")
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, PATIENCE, cv2.CAP_PROP_READ_TIMEOUT_MSEC, PATIENCE]
            capture = cv2.VideoCapture(self.address, cv2.CAP_FFMPEG, limits)
            kind = "nothing answers there, or no video" if scheme else "damaged, no video, or of an unknown codec"
        if not capture.isOpened():
            raise ConfigError(f"input = {self.address!r}: OpenCV cannot read it: {kind}")
        return capture

    def fingerprint(self) -> dict[str, Any]:
        """What tells this source from another one."""
        where = {"input": self.address}
        return where if not os.path.isfile(self.address) else where | {"bytes": os.path.getsize(self.address)}

    def frames(self, span: Span, skip: int = 0) -> Iterator[Frame]:
        """The wanted frames, the first `skip` of them without an image."""
        capture, self.capture = self.capture or self._opened(), None
        try:
            for index, seconds, looked_at in span.wanted(self._moments(capture), skip):
                if not looked_at:
                    yield Frame(index, seconds, None)
                    continue
                whole, image = capture.retrieve()
                if not whole:
                    yield Frame(index, seconds, None, problem="OpenCV cannot decode it")
                    continue
                to = cv2.COLOR_BGR2RGB if self.channels == 3 else cv2.COLOR_BGR2GRAY
                image = cv2.cvtColor(image, to)
                yield Frame(index, seconds, image if image.ndim == 3 else image[..., None])
        finally:
            capture.release()

    def _moments(self, capture: cv2.VideoCapture) -> Iterator[tuple[int, float]]:
        """Index and seconds of each frame, as it is grabbed; `problem` says if they end too early."""
        index, started = -1, time.monotonic()
        while capture.grab():
            index += 1
            seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if self.live:
                seconds = time.monotonic() - started
            elif not seconds > 0:  # some containers do not tell
                seconds = index / self.rate
            yield index, seconds
        if self.live:
            self.problem = f"{self.name} gave no more frames after {index + 1}: is it unplugged or unreachable?"
        elif index < 0:
            self.problem = "it holds no frame that can be decoded"
        elif self.count is not None and index + 1 < self.count:
            self.problem = f"it ends after {index + 1} of the {self.count} frames that it announces: cut short?"


class Pages:
    """Pictures, in order, as the frames of a video."""

    def __init__(self, name: str, paths: Sequence[Path], pictures: Pictures, rate: float):
        self.name, self.paths, self.pictures, self.rate, self.count = name, paths, pictures, rate, len(paths)
        self.live, self.problem = False, ""

    def fingerprint(self) -> dict[str, Any]:
        return {"input": [str(path) for path in self.paths[:1]], "frames": len(self.paths), "rate": self.rate}

    def frames(self, span: Span, skip: int = 0) -> Iterator[Frame]:
        moments = ((index, index / self.rate) for index in range(len(self.paths)))
        for index, seconds, looked_at in span.wanted(moments, skip):
            path = self.paths[index]
            if not looked_at:
                yield Frame(index, seconds, None, str(path))
                continue
            try:
                yield Frame(index, seconds, self.pictures.read(path), str(path))
            except (ValueError, OSError) as error:
                yield Frame(index, seconds, None, str(path), str(error))


def in_order(path: Path) -> list[Any]:
    """A key that sorts frame9 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def is_video(source: str) -> bool:
    """Whether a source names a video by its suffix or as an address."""
    return ADDRESS.match(source) is not None or Path(source).suffix.lower() in VIDEOS


class Ahead:
    """The items of an iterator, of which a thread of its own makes up to `size` before they are asked for.

    latest: where the taker is slow, the oldest ones are left out, and counted in `dropped`. An error of the iterator is
    raised where its item would come. `close` ends the thread.
    """

    _END = object()

    def __init__(self, items: Iterable, size: int, latest: bool = False):
        self.items, self.latest, self.dropped = items, latest, 0
        self.queue: queue.Queue = queue.Queue(max(size, 1))
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            for item in self.items:
                if not self._put((item, None), self.latest):
                    return
            self._put((self._END, None))
        except BaseException as error:  # it is raised in the thread that takes
            self._put((self._END, error))
        finally:
            if hasattr(self.items, "close"):
                self.items.close()

    def _put(self, item: Any, latest: bool = False) -> bool:
        while not self.closed.is_set():
            try:
                self.queue.put(item, block=not latest, timeout=0.05)
                return True
            except queue.Full:
                if latest:
                    with contextlib.suppress(queue.Empty):
                        self.queue.get_nowait()
                        self.dropped += 1
        return False

    def __iter__(self) -> Iterator:
        while True:
            item, error = self.queue.get()
            if error is not None:
                raise error
            if item is self._END:
                return
            yield item

    def close(self) -> None:
        self.closed.set()
        self.thread.join()


class Behind:
    """A thread that calls `work(item)` for what it is given, in order, with up to `size` waiting.

    An error of `work` is raised by the next `put` or by `close`.
    """

    def __init__(self, work: Callable[[Any], None], size: int):
        self.work, self.error = work, None
        self.queue: queue.Queue = queue.Queue(max(size, 1))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (item := self.queue.get()) is not None:
            if self.error is None:
                try:
                    self.work(item[0])
                except BaseException as error:
                    self.error = error

    def put(self, item: Any) -> None:
        self._check()
        self.queue.put((item,))

    def close(self) -> None:
        """Wait until everything is done."""
        if self.thread.is_alive():
            self.queue.put(None)
            self.thread.join()
        self._check()

    def _check(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error


class Writer:
    """An annotated video: pictures [h, w, 3] uint8 RGB of one size, the first one's; others are fitted into it.

    The file has its name when `close` has made it whole. Raises ConfigError for a codec that OpenCV lacks here,
    RunError for a file that could not be written whole.
    """

    def __init__(self, target: Path, codec: str, rate: float, keeps: bool = False):
        """keeps: the file can be read up to where a process was killed."""
        self.target, self.codec, self.rate = target.with_suffix(".mkv" if keeps else suffix_of(codec)), codec, rate
        self.partial = self.target if keeps else self.target.with_name(f".partial-{self.target.name}")
        self.writer: cv2.VideoWriter | None = None
        self.size, self.count, self.fitted = (0, 0), 0, 0

    def write(self, picture: np.ndarray) -> None:
        height, width = picture.shape[:2]
        if self.writer is None:
            self.size = width + width % 2, height + height % 2  # codecs halve the colours
            with _silence():
                self.writer = cv2.VideoWriter(str(self.partial), _fourcc(self.codec), self.rate, self.size)
            if not self.writer.isOpened():
                raise RunError(f"{self.partial}: OpenCV cannot write it with codec={self.codec} at {self.size}")
            self.first = width, height
        if (width, height) != self.first:
            self.fitted += 1
            scale = min(self.size[0] / width, self.size[1] / height)
            width, height = max(1, int(width * scale)), max(1, int(height * scale))
            picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        if (width, height) != self.size:
            edge = cv2.BORDER_REPLICATE if (width, height) == self.first else cv2.BORDER_CONSTANT
            right, below = self.size[0] - width, self.size[1] - height
            picture = cv2.copyMakeBorder(picture, 0, below, 0, right, edge)
        self.writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        self.count += 1

    def close(self) -> Path | None:
        """The file, whole; None where there was no picture."""
        if self.writer is None:
            return None
        self.writer.release()
        check = cv2.VideoCapture(str(self.partial), cv2.CAP_FFMPEG)
        held = int(check.get(cv2.CAP_PROP_FRAME_COUNT)) if check.isOpened() else 0
        check.release()
        if held < self.count:
            raise RunError(
                f"{self.partial} has {held} of {self.count} frames: is the disk full? What was found is kept: make "
                "room and start the same command again, it draws them anew"
            )
        os.replace(self.partial, self.target)
        return self.target


def suffix_of(codec: str) -> str:
    return CODECS.get(codec, ".mkv")


def _fourcc(codec: str) -> int:
    return cv2.VideoWriter.fourcc(*codec)


def check_codec(codec: str) -> None:
    """Raise ConfigError, naming those that work here, unless OpenCV can write a video with it."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    if len(codec) == 4 and _writes(codec):
        return
    there = ", ".join(name for name in CODECS if _writes(name))
    raise ConfigError(f"codec = {codec!r}: OpenCV cannot write it here; what it can: {there}")


def _writes(codec: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"try{suffix_of(codec)}"
        with _silence():
            writer = cv2.VideoWriter(str(file), _fourcc(codec), USUAL_RATE, PICTURE)
            opened = writer.isOpened()
            if opened:
                writer.write(np.zeros((*PICTURE[::-1], 3), np.uint8))
            writer.release()
        return opened and file.stat().st_size > 0


class _silence:
    """FFmpeg writes to the process's own stderr what a codec lacks; the answer is in the one line that is raised."""

    def __enter__(self):
        self.saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *_):
        os.dup2(self.saved, 2)
        os.close(self.saved)


class Journal:
    """frames.jsonl: a line on what was looked for, then one for each frame, written as it is found.

    A line: frame, time (s), height, width, file_name (of pictures), problem (of what could not be read), objects: COCO
    results, with track_id where objects are followed.
    """

    def __init__(self, file: Path, about: Mapping[str, Any], append: bool = False):
        """append: a live source's earlier frames stay, whatever they were looked for with.

        Raises ConfigError for a file of other settings.
        """
        self.file, self.done, self.last = file, 0, -1
        about = json.loads(json.dumps(about))
        if file.exists():
            self._cut()
        if file.exists() and file.stat().st_size:
            with open(file, encoding="utf-8") as lines:
                held = json.loads(next(lines)).get("video")
                for line in lines:
                    self.done += 1
                    self.last = json.loads(line).get("frame", self.last)
            other = sorted(k for k in {*held, *about} if held.get(k) != about.get(k)) if isinstance(held, dict) else []
            if not append and (other or held is None):
                was = "; ".join(f"{k} was {held.get(k)!r}, now {about.get(k)!r}" for k in other)
                raise ConfigError(
                    f"{file} holds what was found with other settings ({was}): give another output=, or remove the file"
                )
        self.lines = open(file, "a", encoding="utf-8")  # noqa: SIM115  it is written to while the video lasts
        if not file.stat().st_size:
            self._write({"video": about})

    def _cut(self) -> None:
        """Leave out what a killed process wrote of its last line."""
        good = 0
        with open(self.file, "rb+") as held:
            for line in held:
                try:
                    if not line.endswith(b"\n") or not isinstance(json.loads(line), dict):
                        break
                except ValueError:
                    break
                good += len(line)
            held.truncate(good)

    def _write(self, content: Mapping[str, Any]) -> None:
        try:
            self.lines.write(json.dumps(content, ensure_ascii=False) + "\n")
            self.lines.flush()
        except OSError as error:
            raise RunError(
                f"{self.file} cannot be written to ({error.strerror}); what was found before is kept"
            ) from error

    def add(self, entry: Mapping[str, Any]) -> None:
        self._write(entry)

    def close(self) -> None:
        self.lines.close()


def entries_of(file: Path) -> Iterator[dict[str, Any]]:
    """The frames in a journal, one after another."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if "frame" in entry:
                yield entry


def followed(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects of a frame; where they are followed, those in a track."""
    return [one for one in entry["objects"] if one.get("track_id", 0) >= 0]


def write_mot(journal: Path, target: Path) -> int:
    """A journal as MOTChallenge's text: frame, id, left, top, width, height, score, -1, -1, -1, where frames, left
    and top count from 1. Returns the number of tracks."""
    ids, lines = set(), []
    for entry in entries_of(journal):
        for one in followed(entry) if "objects" in entry else ():
            ids.add(one["track_id"])
            left, top, *sides = one["bbox"]
            numbers = [entry["frame"] + 1, one["track_id"], left + 1, top + 1, *sides, one["score"], -1, -1, -1]
            lines.append(",".join(f"{number:.10g}" for number in numbers))
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(partial, target)
    return len(ids)


def write_coco(journal: Path, target: Path, name: str, categories: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """A journal as COCO-VID (COCO with `videos`, frames as images with video_id and frame_id, objects with track_id
    where they have one), written frame by frame. Returns (frames, objects)."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    frames = objects = 0
    try:
        with open(partial, "w", encoding="utf-8") as out:
            video = {"id": 1, "name": name}
            out.write(f'{{"videos": [{json.dumps(video)}], "categories": {json.dumps(list(categories))}, "images": [')
            for entry in entries_of(journal):
                if entry.get("problem"):
                    continue
                frames += 1
                image = {"id": frames, "file_name": entry.get("file_name") or f"{name}#frame={entry['frame']}"}
                image |= {"height": entry["height"], "width": entry["width"], "video_id": 1, "frame_id": entry["frame"]}
                out.write(("," if frames > 1 else "") + "\n" + json.dumps(image | {"time": entry["time"]}))
            out.write('\n], "annotations": [')
            image_id = 0
            for entry in entries_of(journal):
                if entry.get("problem"):
                    continue
                image_id += 1
                for one in followed(entry):
                    objects += 1
                    one = {"id": objects, **one, "image_id": image_id, "video_id": 1}
                    one.pop("vector", None)
                    out.write(("," if objects > 1 else "") + "\n" + json.dumps(one))
            out.write("\n]}\n")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return frames, objects
