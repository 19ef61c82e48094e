"""Objects that are followed: ids that stay, with boxes alone and with RoI features, and after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from detector.commands.predict import predict_files
from detector.config import ConfigError
from detector.inference import tracks
from detector.inference.draw import draw
from detector.inference.tracks import NONE, Tracking, Tracks, Trails, check_tracker, packed, unpacked
from tests.inference.test_video import FEW, clip, entries  # noqa: F401  a fixture

RATE = 25.0


@pytest.fixture
def trackers():
    return pytest.importorskip("trackers", reason=f"the package trackers is not installed: {tracks.NEED}")


def crossing(frames: int = 40):
    """Boxes [2, 4] of two objects that pass through each other, the second hidden while they overlap."""
    for number in range(frames):
        x, y = 10 + 4.0 * number, 170 - 4.0 * number
        boxes = np.array([[x, 50, x + 30, 80], [y, 52, y + 30, 82]])
        hidden = abs(x - y) < 24
        yield (boxes[:1] if hidden else boxes), ([0] if hidden else [0, 1])


@pytest.mark.parametrize("name", tracks.TRACKERS)
def test_an_id_stays_with_its_object(trackers, name):
    followed = Tracks(name, RATE, 0.5)
    found = []
    for number in range(20):
        boxes = np.array([[10.0 + 2 * number, 10, 40 + 2 * number, 40], [200.0, 100 - number, 240, 140 - number]])
        found.append(followed.update(boxes, np.array([0.9, 0.8]), np.array([1, 2])))
    assert found[-1][0] != found[-1][1] and NONE not in found[-1]
    for column in zip(*found):
        assert len({*column} - {NONE}) == 1 and column.count(NONE) <= 3


def test_a_class_has_tracks_of_its_own_and_weak_detections_begin_none(trackers):
    followed = Tracks("bytetrack", RATE, [0.5, 0.9])
    box = np.array([[10.0, 10, 40, 40]])
    ids = [followed.update(box, np.array([0.6]), np.array([label])) for label in (1, 1, 1, 2, 2, 2, 1)]
    assert ids[2] == ids[6] != [NONE] and ids[3:6] == [[NONE]] * 3  # 0.6 is too little for class 2


def test_a_weak_detection_goes_on_with_a_track_of_bytetrack_alone(trackers):
    for name, goes_on in (("bytetrack", True), ("sort", False)):
        followed, box = Tracks(name, RATE, 0.5), np.array([[10.0, 10, 40, 40]])
        ids = [followed.update(box, np.array([score]), np.array([1]))[0] for score in (0.9, 0.9, 0.9, 0.9, 0.2)]
        assert (ids[4] == ids[3] != NONE) == goes_on


def test_roi_features_tell_objects_that_boxes_cannot(trackers):
    """Two objects of one class change places between two frames."""
    places, kinds = np.array([[50.0, 50, 80, 80], [72.0, 50, 102, 80]]), np.eye(2, 8) + 0.1
    for share, kept in ((0.0, False), (0.6, True)):
        followed = Tracks("bytetrack", RATE, 0.5, Tracking(appearance=share))
        scores, labels = np.array([0.9, 0.9]), np.array([1, 1])
        vectors = kinds if share else None
        for _ in range(5):
            before = followed.update(places, scores, labels, vectors)
        after = followed.update(places[::-1], scores, labels, vectors)  # the first object is where the second was
        assert (after == before) == kept and {*after} == {*before}


def test_an_object_is_found_again_behind_another(trackers):
    kinds = np.eye(2, 8) + 0.1
    followed, last = Tracks("bytetrack", RATE, 0.5, Tracking(appearance=0.5)), {}
    for boxes, who in crossing():
        ids = followed.update(boxes, np.full(len(boxes), 0.9), np.ones(len(boxes), int), kinds[who])
        for one, number in zip(who, ids):
            if number != NONE:
                assert last.setdefault(one, number) == number
    assert len(last) == 2


def test_frames_without_objects(trackers):
    followed, none = Tracks("sort", RATE, 0.5), np.zeros((0, 4))
    assert followed.update(none, np.zeros(0), np.zeros(0, int)) == []
    followed.update(np.array([[1.0, 1, 9, 9]]), np.array([0.9]), np.array([1]))
    assert followed.update(none, np.zeros(0), np.zeros(0, int), np.zeros((0, 1))) == []


def test_trails_and_numbers_are_drawn():
    trails = Trails(3)
    for x in range(5):
        ways = trails.after(np.array([[x, 0.0, x + 2, 4]]), [7])
    assert ways[0].tolist() == [[3, 4], [4, 4], [5, 4]]
    for _ in range(4):
        trails.after(np.zeros((0, 4)), [])
    assert not trails.ways
    image, box = np.zeros((800, 800, 3), np.uint8), np.array([[300, 300, 400, 400.0]])
    plain = draw(image, box, np.array([1]), ["cat"])
    followed = draw(image, box, np.array([1]), ["cat"], ids=[7], trails=[np.array([[10, 700], [350, 400.0]])])
    assert (plain[550, 180] == 0).all() and (followed[540:560, 160:200] > 0).any()  # the way


def test_vectors_travel_in_sixteen_bits():
    vector = np.random.default_rng(0).normal(size=5)
    assert (
        np.abs(unpacked(packed(vector)) - vector).max() < 2e-3 and unpacked(packed(unpacked(packed(vector)))).tolist()
    )


def test_settings_that_cannot_be(monkeypatch):
    for wrong in ({"lost": -1}, {"appearance": 1}, {"trail": -1}):
        with pytest.raises(ValueError, match="tracking"):
            Tracking(**wrong)
    with pytest.raises(ConfigError, match="track = 'deepsort': choose one of bytetrack, sort, ocsort"):
        check_tracker("deepsort")
    monkeypatch.setattr(tracks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package trackers is not installed: pip install"):
        check_tracker("sort")


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_video_with_tracks_goes_on_after_a_kill_with_the_same_ids(trackers, checkpoint, clip, tmp_path, share):  # noqa: F811
    def see(folder: str) -> list[dict]:
        settings = {"track": "bytetrack", "tracking": {"appearance": share}, "threshold": 0.1, "model": FEW}
        draws = folder == "drawn"
        predict_files(str(checkpoint), input=str(clip), output=str(tmp_path / folder), draw=draws, **settings)
        return entries(tmp_path / folder)

    whole = see("whole")
    ids = {one["track_id"] for entry in whole for one in entry["objects"]}
    assert len(ids - {NONE}) >= 1
    (tmp_path / "cut").mkdir()
    lines = (tmp_path / "whole" / "frames.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "frames.jsonl").write_text("".join(lines[:6]))
    assert see("cut") == whole
    if not share:
        assert see("drawn") == whole and (tmp_path / "drawn" / "video.mp4").is_file()
    coco = json.loads((tmp_path / "cut" / "predictions.json").read_text())
    assert all(one["track_id"] > 0 and "vector" not in one for one in coco["annotations"])
    rows = [line.split(",") for line in Path(tmp_path / "cut" / "tracks.txt").read_text().splitlines()]
    assert len(rows) == len(coco["annotations"]) and {len(row) for row in rows} == {10}
    first = next(one for one in coco["annotations"])
    assert [float(v) for v in rows[0][2:4]] == pytest.approx([first["bbox"][0] + 1, first["bbox"][1] + 1], abs=1e-3)
