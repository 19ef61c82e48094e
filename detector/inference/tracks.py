"""Objects followed through a video: detections of one frame after another become tracks with ids that stay.

The trackers are those of the package `trackers` (Apache-2.0): ByteTrack (Zhang et al. 2022), SORT (Bewley et al. 2016),
OC-SORT (Cao et al. 2023). Each class has one of its own, so an object never changes its class. With `appearance` the
similarity of a track and a detection is, instead of their IoU alone,

    (1 - appearance) IoU + appearance max(0, cos(v_track - m, v_detection - m))

where v are the mean RoI features that the model's box head reads of them, a track's being a running mean, and m is the
mean over all detections so far; the cosine counts within REACH diagonals of the predicted box. So a track finds its
object again behind another one, where boxes no longer overlap.

Dimensions: D detections, T tracks, C channels of the RoI features.
"""

from __future__ import annotations

import base64
import importlib.util
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detector.ops.checks import ConfigError, require

TRACKERS = {"bytetrack": "ByteTrackTracker", "sort": "SORTTracker", "ocsort": "OCSORTTracker"}
NEED = "pip install 'two-stage-detector[tracks]' && pip install --no-deps trackers"
LEAST = 0.1  # score of detections that ByteTrack looks at to go on with a track
REACH = 2.0  # diagonals of a box within which the appearance counts
SLOW = 0.9  # share of a track's appearance that stays in a frame
NONE = -1  # the id of a detection that is in no track


@dataclass(frozen=True)
class Tracking:
    """Settings of `predict`'s `tracking`. Raises ValueError for what cannot be."""

    lost: float = 1.0  # seconds for which a track waits for its object
    appearance: float = 0.0  # share of the RoI features in the similarity; 0: boxes alone
    trail: float = 2.0  # seconds of the way behind an object that are drawn

    def __post_init__(self):
        require(self.lost >= 0, "tracking.lost", self.lost, "seconds, 0 or more")
        require(0 <= self.appearance < 1, "tracking.appearance", self.appearance, "a share from 0 to below 1")
        require(self.trail >= 0, "tracking.trail", self.trail, "seconds, 0 or more")


def check_tracker(name: str) -> None:
    """Raise ConfigError for a tracker that there is not, ModuleNotFoundError's advice where the package is missing."""
    if name not in TRACKERS:
        raise ConfigError(f"track = {name!r}: choose one of {', '.join(TRACKERS)}, or null")
    if not all(importlib.util.find_spec(package) for package in ("trackers", "supervision")):
        raise ConfigError(f"track = {name!r}: the package trackers is not installed: {NEED}")


class Tracks:
    """The objects of one video.

    Args:
        name: of TRACKERS. rate: frames a second. least: score from which on a detection begins a track, of all classes
            or of each label 1, 2, ... [K].
    """

    def __init__(self, name: str, rate: float, least: float | Sequence[float], settings: Tracking = Tracking()):
        check_tracker(name)
        self.name, self.rate, self.least, self.settings = name, rate, least, settings
        self.by_label: dict[int, Any] = {}
        self.ids: dict[tuple[int, int], int] = {}  # (label, the tracker's id) -> ours
        self.seen, self.total = 0, np.zeros(0)  # of vectors, for their mean

    def update(
        self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, vectors: np.ndarray | None = None
    ) -> list[int]:
        """The id of each detection of the next frame, NONE of those in no track.

        boxes: [D, 4] = (x1, y1, x2, y2). vectors: [D, C], with `appearance`.
        """
        import supervision

        if vectors is not None and len(vectors):
            self.total = vectors.sum(0) + (self.total if self.seen else 0)
            self.seen += len(vectors)
            vectors = vectors - self.total / self.seen
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        ids = np.full(len(boxes), NONE)
        for label in sorted({*self.by_label, *labels.tolist()}):
            if label not in self.by_label:
                self.by_label[label] = self._new(label)
            tracker, look = self.by_label[label]
            mine = np.flatnonzero((labels == label) & (scores >= self._floor(label)))
            look.begin(tracker, boxes[mine], vectors[mine] if vectors is not None and len(mine) else None)
            found = tracker.update(
                supervision.Detections(
                    xyxy=boxes[mine].astype(np.float64).reshape(-1, 4),
                    confidence=scores[mine],
                    class_id=np.full(len(mine), label),
                    data={"row": mine},
                )
            )
            if len(found):
                rows, own = np.asarray(found.data["row"], int), np.asarray(found.tracker_id, int)
                for row, one in zip(rows, own):
                    if one >= 0:
                        ids[row] = self.ids.setdefault((label, int(one)), len(self.ids) + 1)
                look.learn(tracker, {int(np.flatnonzero(mine == row)[0]): int(one) for row, one in zip(rows, own)})
        return ids.tolist()

    def _start(self, label: int) -> float:
        return float(self.least if np.ndim(self.least) == 0 else self.least[label - 1])

    def _floor(self, label: int) -> float:
        return min(LEAST, self._start(label)) if self.name == "bytetrack" else self._start(label)

    def _new(self, label: int) -> tuple[Any, Any]:
        import trackers

        look, start = _similarity(self.settings.appearance), self._start(label)
        settings = {"lost_track_buffer": round(30 * self.settings.lost), "frame_rate": self.rate, "iou": look}
        if self.name == "bytetrack":
            settings |= {"track_activation_threshold": start, "high_conf_det_threshold": start}
        elif self.name == "ocsort":
            settings |= {"high_conf_det_threshold": start}
        else:
            settings |= {"track_activation_threshold": start}
        return getattr(trackers, TRACKERS[self.name])(**settings), look


def _similarity(share: float) -> Any:
    """What a tracker compares with: a class, made here, for its base is of a package that may be missing."""
    from trackers import BaseIoU, IoU

    class Similarity(BaseIoU):
        plain = IoU()

        def __init__(self):
            self.known: dict[int, np.ndarray] = {}  # the tracker's id -> its object's appearance
            self.states: dict[bytes, int] = {}
            self.vectors: dict[bytes, np.ndarray] = {}
            self.rows: list[np.ndarray] = []
            self.tracker = None

        def begin(self, tracker: Any, boxes: np.ndarray, vectors: np.ndarray | None) -> None:
            """A new frame: boxes [D, 4] and vectors [D, C] of norm 1, or None."""
            self.tracker, self.rows = tracker, [] if vectors is None else list(vectors)
            self.vectors = {box.astype(np.float64).tobytes(): v for box, v in zip(boxes, self.rows)}

        def learn(self, tracker: Any, ids: Mapping[int, int]) -> None:
            """What the tracker decided: the id of each detection."""
            for row, one in ids.items():
                if one >= 0 and row < len(self.rows):
                    before = self.known.get(one)
                    mixed = self.rows[row] if before is None else SLOW * before + (1 - SLOW) * self.rows[row]
                    self.known[one] = mixed / max(np.linalg.norm(mixed), 1e-9)
            alive = {track.tracker_id for track in tracker.tracks}
            self.known = {one: vector for one, vector in self.known.items() if one in alive}

        def _compute(self, tracks: np.ndarray, boxes: np.ndarray) -> np.ndarray:
            iou = self.plain.compute(tracks, boxes)
            if not share or not self.vectors:
                return iou
            states = {track.get_state_bbox().astype(np.float64).tobytes(): track for track in self.tracker.tracks}
            out = iou.copy()
            for t, state in enumerate(tracks):
                track = states.get(state.astype(np.float64).tobytes())
                known = self.known.get(getattr(track, "tracker_id", NONE))
                if known is None:
                    continue
                for d, box in enumerate(boxes):
                    vector = self.vectors.get(box.astype(np.float64).tobytes())
                    if vector is None:
                        continue
                    apart = np.linalg.norm(state[:2] + state[2:] - box[:2] - box[2:]) / 2
                    near = apart <= REACH * np.linalg.norm(state[2:] - state[:2])
                    out[t, d] = (1 - share) * iou[t, d] + share * max(0.0, float(known @ vector)) * near
            return out

    return Similarity()


def appearance(features: np.ndarray) -> np.ndarray:
    """[D, C] float16 of RoI features [D, C, h, w]: their means."""
    return features.reshape(*features.shape[:2], -1).mean(2).astype(np.float16)


def packed(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f2").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)


class Trails:
    """The ways [(x, y), ...] of the objects of the last `count` frames, at the middle of their boxes' lower sides."""

    def __init__(self, count: int):
        self.count, self.frame = count, 0
        self.ways: dict[int, deque] = defaultdict(deque)

    def after(self, boxes: np.ndarray, ids: Sequence[int]) -> list[np.ndarray]:
        """The way [P, 2] of each object of the next frame."""
        self.frame += 1
        for box, one in zip(boxes, ids):
            self.ways[one].append((self.frame, (box[0] + box[2]) / 2, box[3]))
        for one in [*self.ways]:
            way = self.ways[one]
            while way and way[0][0] <= self.frame - max(self.count, 1):
                way.popleft()
            if not way:
                del self.ways[one]
        return [np.array([(x, y) for _, x, y in self.ways[one]]) for one in ids]
