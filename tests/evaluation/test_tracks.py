"""HOTA, MOTA and IDF1 of videos in COCO-VID and MOT's files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from detector.commands import tracks as program
from detector.config import ConfigError
from detector.data import convert as converter
from detector.evaluation import tracks
from detector.evaluation.tracks import Film, coco_vid, intervals, measure, pairs, read_films


@pytest.fixture(autouse=True)
def trackers():
    pytest.importorskip("trackers", reason=f"the package trackers is not installed: {tracks.NEED}")


def films(count: int = 3, frames: int = 10) -> list[Film]:
    """Two cats and a dog that move to the right."""
    rows = lambda f: [(i, kind, 10.0 * f + 50 * i, 40.0 * i, 30.0, 30.0, True) for i, kind in enumerate("ccd")]  # noqa: E731
    return [Film(f"v{n}", {f: rows(f) for f in range(frames)}) for n in range(count)]


def changed(source: list[Film], change) -> list[Film]:
    """change(video, frame, row) -> the row as it was found, or None."""
    return [
        Film(one.name, {f: [r for row in rows if (r := change(n, f, row))] for f, rows in one.frames.items()})
        for n, one in enumerate(source)
    ]


def test_what_is_found_as_it_is_is_perfect():
    numbers = measure(films(), changed(films(), lambda n, f, row: (row[0] + 100, *row[1:]))).numbers
    assert set(numbers) == {"all", "c", "d"}
    for row in numbers.values():
        assert [row[k] for k in ("HOTA", "DetA", "AssA", "MOTA", "IDF1")] == pytest.approx([1] * 5) and row["IDSW"] == 0


def test_an_exchange_of_ids_costs_association_alone():
    """CLEAR MOT and IDF1 by hand: 30 true objects of class c, all found; ids of two are exchanged from frame 5 on."""
    swap = lambda n, f, row: ({0: 1, 1: 0}.get(row[0], 2) if f >= 5 else row[0], *row[1:])  # noqa: E731
    numbers = measure(films(1), changed(films(1), swap)).numbers
    assert numbers["c"]["DetA"] == pytest.approx(1) and numbers["c"]["IDSW"] == 2
    assert numbers["c"]["MOTA"] == pytest.approx(1 - 2 / 20) and numbers["c"]["IDF1"] == pytest.approx(0.5)
    assert numbers["c"]["AssA"] == pytest.approx(5 / 15)  # each association: 5 of 10 + 10 - 5
    assert numbers["d"]["HOTA"] == pytest.approx(1) and numbers["all"]["MOTA"] == pytest.approx(1 - 2 / 30)


def test_misses_and_false_ones():
    lose = lambda n, f, row: None if row[1] == "d" and f % 2 else row  # noqa: E731
    numbers = measure(films(1), changed(films(1), lose)).numbers
    assert numbers["d"]["MOTA"] == pytest.approx(0.5) and numbers["c"]["MOTA"] == pytest.approx(1)
    assert measure(films(2), changed(films(1), lambda *a: a[2])).numbers["all"]["MOTA"] == pytest.approx(0.5)


def test_results_on_truth_that_does_not_count_are_taken_out():
    truth = changed(films(1), lambda n, f, row: (*row[:6], row[0] != 1))
    assert measure(truth, films(1)).numbers["c"]["MOTA"] == pytest.approx(1)
    true, found, iou = pairs(truth[0], films(1)[0], "c")
    assert len(true[0]) == len(found[0]) == 1 and iou[0].shape == (1, 1)


def test_intervals_hold_the_number_and_differences_are_of_the_same_videos():
    worse = changed(films(6), lambda n, f, row: None if f % 3 == n % 2 else row)
    good, bad = measure(films(6), films(6)), measure(films(6), worse)
    low, high = intervals(bad, samples=200)["HOTA"]
    assert low <= bad.numbers["all"]["HOTA"] <= high
    low, high = intervals(good, bad, samples=200)["MOTA"]
    assert 0 < low <= good.numbers["all"]["MOTA"] - bad.numbers["all"]["MOTA"] <= high
    assert intervals(measure(films(1), films(1))) == {}


def vid(found: list[Film], key: str = "track_id") -> dict:
    kinds, images, annotations = ["c", "d"], [], []
    for n, film in enumerate(found):
        for f, rows in film.frames.items():
            image = {"id": len(images) + 1, "file_name": "x", "height": 200, "width": 300, "video_id": n, "frame_id": f}
            images.append(image)
            for track, kind, *box, _ in rows:
                entry = {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": kinds.index(kind),
                    key: track,
                }
                annotations.append(entry | {"bbox": box, "score": 0.9})
    categories = [{"id": i, "name": name} for i, name in enumerate(kinds)]
    videos = [{"id": n, "name": film.name} for n, film in enumerate(found)]
    return {"videos": videos, "images": images, "annotations": annotations, "categories": categories}


def test_the_command_compares_results(tmp_path, call):
    (tmp_path / "truth.json").write_text(json.dumps(vid(films(), "instance_id")))
    for name, found in (("a", films()), ("b", changed(films(), lambda n, f, row: None if f > 6 + n else row))):
        for film in found:
            (tmp_path / name / film.name).mkdir(parents=True)
            (tmp_path / name / film.name / "predictions.json").write_text(json.dumps(vid([film])))
    code, out, error = call(
        program.main, f"truth={tmp_path / 'truth.json'}", f"found=[{tmp_path / 'a'},{tmp_path / 'b'}]", "samples=100",
        f"output={tmp_path / 'numbers.json'}",
    )  # fmt: skip
    assert code == 0, error
    assert "HOTA" in out and "against the first: HOTA -" in out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    first, second = numbers.values()
    assert first["numbers"]["all"]["HOTA"] == pytest.approx(1) and second["difference_to_the_first"]["MOTA"][0] < 0
    assert set(first["videos"]) == {"v0", "v1", "v2"}


def test_files_that_cannot_be_measured_are_named(tmp_path):
    file, good = tmp_path / "t.json", vid(films(1))
    for change, message in [
        (lambda c: c.pop("videos"), "has no videos: COCO-VID is expected"),
        (lambda c: c["images"][3].pop("frame_id"), "image 4: frame_id = None"),
        (lambda c: c["annotations"][2].pop("track_id"), "annotation 3 has no track_id"),
        (lambda c: c["annotations"][2].update(category_id=9), "annotation 3: its image_id or category_id"),
    ]:
        content = json.loads(json.dumps(good))
        change(content)
        file.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            coco_vid(file)
    (tmp_path / "s.txt").write_text("1,1,2,3,4,5,1\n2,1,x\n")
    with pytest.raises(ConfigError, match=r"s.txt, line 2: '2,1,x' is not frame, id"):
        read_films(tmp_path / "s.txt")
    with pytest.raises(ConfigError, match="the truth has no video 'v0'; it has other"):
        measure([Film("other", films(1)[0].frames)], films(1))
    with pytest.raises(ConfigError, match="the truth has c, d, the results cow"):
        measure(films(1), changed(films(1), lambda n, f, row: (row[0], "cow", *row[2:])))


@pytest.fixture
def mot(tmp_path):
    """A MOT folder of one sequence: two pedestrians, a distractor and a row that does not count."""
    folder = tmp_path / "MOT" / "train" / "MOT-01"
    (folder / "img1").mkdir(parents=True)
    (folder / "gt").mkdir()
    (folder / "seqinfo.ini").write_text("[Sequence]\nname=MOT-01\nimDir=img1\nframeRate=30\n")
    lines = []
    for frame in (1, 2, 3):
        Image.fromarray(np.zeros((60, 100, 3), np.uint8)).save(folder / "img1" / f"{frame:06d}.jpg")
        for track, (x, counts, kind) in enumerate([(1, 1, 1), (40, 1, 1), (70, 1, 8), (80, 0, 1)], 1):
            lines.append(f"{frame},{track},{x + frame},11,10,20,{counts},{kind},1")
    (folder / "gt" / "gt.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "MOT"


def test_mot_is_read_and_converted(mot, capsys):
    [film] = read_films(mot / "train")
    assert film.name == "MOT-01" and [row[6] for row in film.frames[0]] == [True, True, False, False]
    assert film.frames[0][0] == (1, "pedestrian", 1, 10, 10, 20, True)  # from 0, as ours
    assert converter.main(["mot", str(mot), "--train", "train", "--val", "train"]) == 0
    [again] = coco_vid(mot / "annotations" / "mot_train.json")
    counting = lambda one: {f: [r for r in rows if r[6]] for f, rows in one.frames.items()}  # noqa: E731
    assert counting(again) == counting(film)
    content = json.loads((mot / "annotations" / "mot_train.json").read_text())
    assert content["images"][0]["file_name"] == "train/MOT-01/img1/000001.jpg" and content["images"][0]["width"] == 100
    assert sum(one["iscrowd"] for one in content["annotations"]) == 6
    persons = [Film("MOT-01", {f: [(t, "person", *r) for t, _, *r in rows[:2]] for f, rows in film.frames.items()})]
    assert measure([film], persons).numbers["all"]["HOTA"] == pytest.approx(1)


@pytest.mark.parametrize("world", ["4.4852,5.5016,0", "-1,-1,-1"])
def test_ten_numbers_are_mot15_s_whose_last_three_are_no_class(mot, world):
    """Places in the world (TUD-Stadtmitte has them), or -1. The file may lie in the sequence's own folder."""
    gt = mot / "train" / "MOT-01" / "gt" / "gt.txt"
    lines = [f"{frame},{track},{20 * track},9,10,20,1,{world}" for frame in (1, 2, 3) for track in (1, 2)]
    gt.write_text("\n".join([*lines, f"3,3,80,9,10,20,0,{world}"]))
    [film] = read_films(mot / "train")
    assert [row[6] for rows in film.frames.values() for row in rows] == [True] * 6 + [False]
    found = [Film("MOT-01", {frame: rows[:2] for frame, rows in film.frames.items()})]
    assert measure([film], found).numbers["all"]["MOTA"] == pytest.approx(1)
    content = converter.convert("mot", mot, ["train"])
    assert [one["iscrowd"] for one in content["annotations"]] == [0] * 6 + [1]
    gt.rename(mot / "train" / "MOT-01" / "gt.txt")
    assert [(one.name, one.frames) for one in read_films(mot / "train")] == [("MOT-01", film.frames)]


def test_mot_that_cannot_be_read(mot):
    gt = mot / "train" / "MOT-01" / "gt" / "gt.txt"
    gt.write_text("9,1,2,3,4,5,1,1,1\n")
    with pytest.raises(ValueError, match="line 1: frame 9 has no picture"):
        converter.convert("mot", mot, ["train"])
    gt.write_text("1,1,2\n")
    with pytest.raises(ValueError, match=r"gt.txt, line 1: '1,1,2' is not frame, id"):
        converter.convert("mot", mot, ["train"])
    with pytest.raises(FileNotFoundError, match="no such files"):
        converter.convert("mot", mot, ["val"])
