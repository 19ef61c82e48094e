"""Downloading and unpacking COCO, against a server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import stat
import threading
import zipfile

import pytest

from detector.commands import prepare_coco as coco
from tests.conftest import ROOT


@pytest.fixture
def server():
    """Serves `server.files`, understands ranges unless told otherwise, and can drop connections."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state = self.server
            start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
            state.requests.append((self.path, start))
            if state.failures:
                return self.send_error(state.failures.pop(0))
            data = state.files.get(self.path)
            if data is None:
                return self.send_error(404)
            if not state.ranges:
                start = 0
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                return self.end_headers()
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            body = data[start:]
            self.wfile.write(body[: state.drop_after.pop(0)] if state.drop_after else body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.failures, server.drop_after, server.ranges = {}, [], [], [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


CONTENT = bytes(range(256)) * 40


def test_plain_download(server, tmp_path):
    server.files["/x"] = CONTENT
    coco.download(f"{server.url}/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT and not (tmp_path / "x.part").exists()
    coco.download(f"{server.url}/x", tmp_path / "x")
    assert len(server.requests) == 1  # what is there is not fetched again


def test_goes_on_after_lost_connections(server, tmp_path):
    server.files["/x"], server.drop_after = CONTENT, [1000, 3000]
    coco.download(f"{server.url}/x", tmp_path / "x", pause=0)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert [start for _, start in server.requests] == [0, 1000, 4000]


def test_goes_on_where_an_earlier_run_was_killed(server, tmp_path):
    server.files["/x"] = CONTENT
    (tmp_path / "x.part").write_bytes(CONTENT[:500])
    coco.download(f"{server.url}/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT and server.requests == [("/x", 500)]


def test_complete_part_is_taken(server, tmp_path):
    server.files["/x"] = CONTENT
    (tmp_path / "x.part").write_bytes(CONTENT)
    coco.download(f"{server.url}/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_server_without_ranges_starts_again(server, tmp_path):
    server.files["/x"], server.ranges = CONTENT, False
    (tmp_path / "x.part").write_bytes(b"something else")
    coco.download(f"{server.url}/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_server_errors_are_tried_again_but_not_for_ever(server, tmp_path):
    server.files["/x"], server.failures = CONTENT, [503, 500]
    coco.download(f"{server.url}/x", tmp_path / "x", pause=0)
    assert (tmp_path / "x").read_bytes() == CONTENT
    server.failures = [503] * 10
    with pytest.raises(OSError, match="gave up after 3 attempts"):
        coco.download(f"{server.url}/x", tmp_path / "y", attempts=3, pause=0)


def test_missing_file_is_no_reason_to_try_again(server, tmp_path):
    with pytest.raises(ValueError, match="404"):
        coco.download(f"{server.url}/nothing", tmp_path / "x")
    assert len(server.requests) == 1


def test_wrong_checksum_removes_the_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    coco.verify(path, hashlib.md5(CONTENT).hexdigest())
    with pytest.raises(ValueError, match="MD5"):
        coco.verify(path, "0" * 32)
    assert not path.exists()


def archive(path, files):
    with zipfile.ZipFile(path, "w") as target:
        for name, content in files.items():
            target.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:/evil"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    path = archive(tmp_path / "x.zip", {"good": b"1", name: b"2"})
    with pytest.raises(ValueError, match="leads out"):
        coco.extract(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["x.zip"]  # nothing was written at all


def test_links_and_bombs_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as target:
        target.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="is a link"):
        coco.extract(tmp_path / "x.zip", tmp_path / "out")
    with pytest.raises(ValueError, match="unpacks to 100"):
        coco.extract(archive(tmp_path / "y.zip", {"a": b"0" * 100}), tmp_path / "out", max_bytes=99)


def test_unpacking_goes_on(tmp_path):
    path = archive(tmp_path / "x.zip", {"a": b"first", "d/b": b"second"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"FIRST")  # of the right size: taken as done
    (tmp_path / "out" / "d").mkdir()
    (tmp_path / "out" / "d" / "b").write_bytes(b"se")  # cut short
    coco.extract(path, tmp_path / "out")
    assert (tmp_path / "out" / "a").read_bytes() == b"FIRST"
    assert (tmp_path / "out" / "d" / "b").read_bytes() == b"second"


@pytest.fixture
def small_coco(server, tmp_path):
    """Three archives as COCO's, and their checksums."""

    def record(split):
        return json.dumps({"images": [{"id": 1, "file_name": f"{split}.jpg"}], "annotations": [], "categories": []})

    contents = {
        "zips/train2017.zip": {"train2017/train.jpg": b"picture"},
        "zips/val2017.zip": {"val2017/val.jpg": b"picture"},
        "annotations/annotations_trainval2017.zip": {
            f"annotations/instances_{split}2017.json": record(split) for split in ("train", "val")
        },
    }
    sums = {}
    for name, files in contents.items():
        data = archive(tmp_path / "source.zip", files).read_bytes()
        server.files[f"/{name}"], sums[name] = data, hashlib.md5(data).hexdigest()
    return sums


def test_everything(server, tmp_path, small_coco, capsys):
    out = tmp_path / "coco"
    coco.prepare(out, server.url, small_coco)
    assert (out / "train2017" / "train.jpg").read_bytes() == b"picture"
    assert "val2017: 1 images" in capsys.readouterr().out
    requests = len(server.requests)
    coco.prepare(out, server.url, small_coco, delete_archives=True)
    assert len(server.requests) == requests  # nothing to do
    (out / "val2017" / "val.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 images are missing, for example val\.jpg"):
        coco.prepare(out, server.url, small_coco)


def test_archives_can_be_deleted(server, tmp_path, small_coco):
    coco.prepare(tmp_path / "coco", server.url, small_coco, delete_archives=True)
    assert not list((tmp_path / "coco" / "archives").glob("*.zip"))
    coco.prepare(tmp_path / "coco", server.url, small_coco)
    assert len(server.requests) == 3


def test_configuration_fits_the_layout():
    text = (ROOT / "configs" / "data" / "coco.yaml").read_text()
    for name in ("train2017", "val2017", "instances_train2017.json", "instances_val2017.json"):
        assert name in text
