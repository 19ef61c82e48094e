"""detector predict input=...: videos, cameras, folders of frames; what goes wrong, and how a killed run goes on."""

from __future__ import annotations

import functools
import http.server
import json
import os
import signal
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from PIL import Image

import detector
from detector.commands import predict as program
from detector.commands import predict_video
from detector.commands.predict import predict_files
from detector.commands.sources import sources_of
from detector.config import ConfigError, RunError
from detector.data import Pictures
from detector.inference import video as videos
from detector.inference.video import Ahead, Behind, Span, Video, Writer, check_codec, in_order, suffix_of
from tests.runs import forks

SIZE, RATE, COUNT = (96, 64), 12.5, 12  # (width, height)
FEW = {"box_head": {"detections_per_image": 3}}


def frame(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """[H, W, 3] uint8 with a bright square that moves to the right."""
    image = np.full((size[1], size[0], 3), 60, np.uint8)
    image[20:40, 4 * number : 4 * number + 20] = (250, 200, 40)
    return image


def write_clip(path: Path, count: int = COUNT, codec: str = "mp4v") -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), RATE, SIZE)
    for number in range(count):
        writer.write(frame(number)[..., ::-1])
    writer.release()
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture
def frames(tmp_path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(COUNT):
        Image.fromarray(frame(number)).save(folder / f"f{number}.png")  # f10 sorts before f2 as text
    return folder


@pytest.fixture
def see(checkpoint, tmp_path):
    """see(input, **options): predict into tmp_path/out; returns the entries of its journal."""

    def go(source, **options) -> list[dict]:
        given = {"output": str(tmp_path / "out"), "threshold": 0.0, "draw": False, "model": FEW} | options
        predict_files(str(checkpoint), input=source if isinstance(source, list) else str(source), **given)
        return entries(Path(given["output"]))

    return go


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "frames.jsonl").read_text().splitlines()[1:]]


def decoded(path: Path) -> tuple[list[np.ndarray], float]:
    capture, images = cv2.VideoCapture(str(path)), []
    rate = capture.get(cv2.CAP_PROP_FPS)
    while (read := capture.read())[0]:
        images.append(read[1])
    return images, rate


def test_a_video_is_seen_frame_by_frame(see, clip, checkpoint, tmp_path, capsys):
    found = see(clip, draw=True, batch_size=5)
    assert [entry["frame"] for entry in found] == list(range(COUNT))
    np.testing.assert_allclose([entry["time"] for entry in found], np.arange(COUNT) / RATE, atol=1e-3)
    images, rate = decoded(tmp_path / "out" / "video.mp4")
    assert len(images) == COUNT and rate == RATE and max(images[0].shape) >= 800
    assert "no sound" in capsys.readouterr().out
    model = detector.load(checkpoint, changes=FEW)
    for image, entry in zip(decoded(clip)[0], found):
        [alone] = model.predict([image], threshold=0.0, order="BGR")
        np.testing.assert_allclose([one["score"] for one in entry["objects"]], alone.scores, atol=1e-4)
    coco = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(coco["images"]) == COUNT and coco["images"][3]["frame_id"] == 3 and coco["videos"][0]["name"] == "clip"
    assert len(coco["annotations"]) == sum(len(entry["objects"]) for entry in found)
    assert {one["image_id"] for one in coco["annotations"]} == {image["id"] for image in coco["images"]}


def test_a_folder_a_list_and_a_pattern_are_frames_in_the_order_of_their_numbers(see, frames, tmp_path):
    found = see(frames, rate=10)
    names = [Path(entry["file_name"]).name for entry in found]
    assert names == [f"f{number}.png" for number in range(COUNT)] and found[3]["time"] == 0.3
    for number, source in enumerate([f"{frames}/*.png", [f"{frames}/f{i}.png" for i in range(COUNT)]]):
        again = see(source, rate=10, output=str(tmp_path / f"{number}"))
        assert [entry["objects"] for entry in again] == [entry["objects"] for entry in found]
    (tmp_path / "list.txt").write_text("# two\nframes/f3.png\nframes/f1.png\n")
    some = see(tmp_path / "list.txt", output=str(tmp_path / "listed"))
    assert [entry["objects"] for entry in some] == [found[3]["objects"], found[1]["objects"]]


def test_every_start_and_stop(see, clip, tmp_path):
    found = see(clip, every=3, start="2f", stop=0.8, draw=True)
    assert [entry["frame"] for entry in found] == [2, 5, 8]
    images, rate = decoded(tmp_path / "out" / "video.mp4")
    assert len(images) == 3 and rate == pytest.approx(RATE / 3, abs=0.01)  # it lasts as long as what it shows
    assert Span("2f", 0.8, 3).count(COUNT, RATE) == 3


@pytest.mark.parametrize(
    "span, message",
    [
        (Span(every=0), "every = 0"),
        (Span(start="soon"), "start = 'soon': must be seconds, such as 2.5, or frames, such as 120f"),
        (Span(stop=-1), "stop = -1"),
        (Span(start=3, stop=2), "stop = 2: must come after start = 3"),
    ],
)
def test_spans_that_cannot_be(span, message):
    with pytest.raises(ConfigError, match=message):
        span.checked()


def test_images_that_are_videos_are_taken_as_such(checkpoint, clip, tmp_path, call):
    code, _, _ = call(
        program.main, f"checkpoint={checkpoint}", f"images={clip}", f"output={tmp_path / 'o'}", "draw=false", "stop=2f"
    )
    assert code == 0 and len(entries(tmp_path / "o")) == 2
    code, _, error = call(program.main, f"checkpoint={checkpoint}", f"output={tmp_path / 'o'}")
    assert code == 2 and "give images=..., or input=" in error
    code, _, error = call(program.main, f"checkpoint={checkpoint}", "images=x.png", "every=2")
    assert code == 2 and "input=... names one" in error


def test_several_videos_have_their_own_folders(see, clip, tmp_path, caplog):
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "bad.mp4").write_bytes(b"nothing of a video" * 100)
    names = [str(clip), str(tmp_path / "bad.mp4"), str(tmp_path / "clip.mp4")]
    with pytest.raises(FileNotFoundError):
        see(names, stop="2f")  # which has no journal itself
    assert "left out: input" in caplog.text and "bad.mp4" in caplog.text
    assert len(entries(tmp_path / "out" / "clip")) == len(entries(tmp_path / "out" / "clip_")) == 2


def test_what_is_no_video_is_one_line(see, clip, frames, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"nothing of a video" * 100)
    (tmp_path / "empty.avi").touch()
    for source, message in [
        (tmp_path / "bad.mp4", "bad.mp4': OpenCV cannot read it: damaged, no video, or of an unknown codec"),
        (tmp_path / "empty.avi", "the file is empty"),
        (tmp_path / "none.mp4", "there is no such file"),
        ("63", "no camera with this number answers"),
        ("rtsp://127.0.0.1:9/x", "nothing answers there"),
        ([str(clip), str(frames / "f1.png")], "is a video, .* is none"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            see(source)
        assert "\n" not in str(caught.value)


def test_a_video_that_is_cut_short_keeps_what_it_had(see, tmp_path, caplog):
    whole = write_clip(tmp_path / "whole.avi", 30, "MJPG").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    found = see(tmp_path / "cut.avi")
    assert 0 < len(found) < 30 and f"it ends after {len(found)} of the 30 frames" in caplog.text
    assert (tmp_path / "out" / "predictions.json").is_file()


def test_frames_of_other_sizes_and_damaged_ones(see, frames, tmp_path, caplog):
    Image.fromarray(frame(1, (50, 81))).save(frames / "f1.png")
    (frames / "f3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    found = see(frames, draw=True)
    assert found[1]["height"] == 81 and "cannot be read" in found[3]["problem"] and "objects" not in found[3]
    images, _ = decoded(tmp_path / "out" / "video.mp4")
    assert len(images) == COUNT and len({image.shape for image in images}) == 1
    assert "another size than the first" in caplog.text and "1 frames could not be read, such as 3" in caplog.text


def test_a_video_that_is_larger_than_the_limit(see, clip):
    with pytest.raises(ConfigError, match="96 x 64 pixels are more than max_pixels=6000"):
        see(clip, max_pixels=6000)


def test_a_codec_that_is_missing_is_answered_with_those_that_there_are(see, clip, tmp_path):
    with pytest.raises(
        ConfigError, match=r"codec = 'xxxx': OpenCV cannot write it here; what it can: .*mp4v"
    ) as caught:
        see(clip, draw=True, codec="xxxx")
    assert not (tmp_path / "out" / "frames.jsonl").exists()
    for codec in str(caught.value).rpartition(": ")[2].split(", "):
        check_codec(codec)
    see(clip, draw=True, codec=codec, stop="2f", output=str(tmp_path / codec))
    assert len(decoded(tmp_path / codec / f"video{suffix_of(codec)}")[0]) == 2


def test_an_address_is_read(see, clip):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(clip.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert len(see(f"http://127.0.0.1:{server.server_port}/clip.mp4", stop="3f")) == 3
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def camera(monkeypatch, clip):
    """Camera 0 plays the clip, and is gone then."""
    real = cv2.VideoCapture

    def opened(which, *options):
        return real(str(clip)) if which == 0 else real(which, *options)

    monkeypatch.setattr(cv2, "VideoCapture", opened)


def test_a_camera_that_goes_away(see, camera, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_video, "WAITING", 50)  # nothing is left out
    for number in (1, 2):
        with pytest.raises(RunError, match=r"camera_0 gave no more frames after 12: .* is kept in"):
            see("0", draw=True)
        assert [entry["frame"] for entry in entries(tmp_path / "out")] == list(range(number * COUNT))
    parts = sorted(path.name for path in (tmp_path / "out").glob("*.mkv"))
    assert parts == ["video.mkv", "video_2.mkv"] and len(decoded(tmp_path / "out" / parts[1])[0]) == COUNT


def test_what_a_camera_sends_faster_than_it_can_be_seen_is_left_out_and_counted():
    ahead = Ahead(range(1000), 3, latest=True)
    while ahead.dropped < 997:
        time.sleep(0.001)
    taken = [*ahead]
    assert taken == [997, 998, 999] and ahead.dropped == 997


def predict_in_a_process(checkpoint, clip, out) -> None:
    predict_files(str(checkpoint), input=str(clip), output=str(out), threshold=0.0, model=FEW)


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_and_the_output_is_whole(see, checkpoint, tmp_path, capsys, monkeypatch):
    clip = write_clip(tmp_path / "long.mp4", 30)
    whole = see(clip, draw=True, output=str(tmp_path / "whole"))
    process = forks().Process(target=predict_in_a_process, args=(checkpoint, clip, tmp_path / "out"))
    process.start()
    journal, until = tmp_path / "out" / "frames.jsonl", time.monotonic() + 60
    while time.monotonic() < until and not (journal.exists() and journal.read_bytes().count(b"\n") > 8):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    held = len(entries(tmp_path / "out")) if journal.read_bytes().endswith(b"\n") else 8
    assert 7 < held < 30 and not (tmp_path / "out" / "video.mp4").exists()
    with open(journal, "a") as lines:
        lines.write('{"frame": 99, "objects": [')  # cut in mid-line
    seen, at = [], predict_video.Look.at
    monkeypatch.setattr(predict_video.Look, "at", lambda self, batch: seen.extend(batch) or at(self, batch))
    capsys.readouterr()
    assert see(clip, draw=True) == whole and len(seen) <= 30 - held + 1
    assert "frames are found already" in capsys.readouterr().out
    for one, other in zip(decoded(tmp_path / "out" / "video.mp4")[0], decoded(tmp_path / "whole" / "video.mp4")[0]):
        assert np.array_equal(one, other)
    assert len(decoded(tmp_path / "out" / "video.mp4")[0]) == 30
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["images"][29]["frame_id"] == 29


def test_without_pictures_frames_that_are_known_are_not_even_decoded(see, clip, tmp_path):
    whole = see(clip)
    journal = tmp_path / "out" / "frames.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:6]))
    assert see(clip) == whole


def test_interrupted_by_hand_it_closes_its_files(see, clip, tmp_path, monkeypatch, capsys):
    at, calls = predict_video.Look.at, []

    def stopped(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return at(self, batch)

    monkeypatch.setattr(predict_video.Look, "at", stopped)
    with pytest.raises(SystemExit) as ended:
        see(clip, draw=True)
    assert ended.value.code == 130 and "the same command goes on" in capsys.readouterr().out
    assert len(decoded(tmp_path / "out" / "video.mp4")[0]) == 3
    assert len(see(clip, draw=True)) == COUNT and len(decoded(tmp_path / "out" / "video.mp4")[0]) == COUNT


def test_other_settings_are_refused_and_both_ways_out_work(see, clip, tmp_path):
    see(clip, stop="2f")
    with pytest.raises(ConfigError, match=r"stop was '2f', now '3f'.* another output=, or remove the file"):
        see(clip, stop="3f")
    assert len(see(clip, stop="3f", output=str(tmp_path / "other"))) == 3
    (tmp_path / "out" / "frames.jsonl").unlink()
    assert len(see(clip, stop="3f")) == 3


def test_a_model_of_one_channel_and_of_four(clip):
    video = Video(str(clip), Pictures(channels=1))
    assert next(video.frames(Span())).image.shape == (64, 96, 1)
    with pytest.raises(ConfigError, match="a video has 3 channels, and the model takes 4"):
        Video(str(clip), Pictures(channels=4))


def test_a_video_that_cannot_be_written_whole_says_so(tmp_path):
    writer = Writer(tmp_path / "video.x", "mp4v", RATE)
    for number in range(3):
        writer.write(frame(number))
    writer.count += 2  # as if the disk had been full
    with pytest.raises(RunError, match=r"has 3 of 5 frames: is the disk full\?"):
        writer.close()
    assert not (tmp_path / "video.mp4").exists()


def test_errors_of_the_threads_arrive(tmp_path):
    def items():
        yield 1
        raise RunError("the reader's")

    ahead = Ahead(items(), 2)
    with pytest.raises(RunError, match="the reader's"):
        list(ahead)
    behind = Behind(lambda item: 1 / item, 2)
    behind.put(0)
    with pytest.raises(ZeroDivisionError):
        behind.close()


def test_memory_does_not_grow_with_the_length():
    """What waits between the threads is bounded: a reader that is far ahead stops."""
    made = []

    def items():
        for number in range(10_000):
            made.append(number)
            yield np.zeros((64, 64, 3), np.uint8)

    ahead = Ahead(items(), 4)
    taken = iter(ahead)
    for _ in range(10):
        next(taken)
    time.sleep(0.2)
    assert len(made) <= 10 + 4 + 2
    before = psutil.Process().memory_info().rss
    for _ in zip(range(5000), taken):
        pass
    ahead.close()
    assert psutil.Process().memory_info().rss - before < 20e6


def test_order():
    assert sorted(["f10", "f9", "a2b10", "a2b9"], key=in_order) == ["a2b9", "a2b10", "f9", "f10"]
    assert videos.is_video("rtsp://camera/1") and videos.is_video("A.MP4") and not videos.is_video("a.png")


def test_a_video_that_lies_alone_in_a_folder_keeps_its_own_name(tmp_path):
    """So that it is met again in the data set's annotations."""
    (tmp_path / "val" / "0007").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "val" / "0007" / "000000.jpg")
    for given in (tmp_path / "val", tmp_path / "val" / "0007"):
        [source] = sources_of(str(given), Pictures(), 25.0)
        assert source.name == "0007"
