"""Files from elsewhere arrive whole, once, with the right hash, or one line says what can be done."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import sys
from collections import namedtuple

import pytest

from detector.weights import downloads
from detector.weights.downloads import fetch, located
from tests.weights.server import breaks_off, lies, redirects, says, serving, without_ranges

DATA = bytes(range(256)) * 12_000  # 3 MB
DIGEST = ("sha256", hashlib.sha256(DATA).hexdigest()[:8])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of /model.pth, and an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DETECTOR_ZOO", raising=False)
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    with serving() as running:
        running.files["/model.pth"] = DATA
        yield running


def left(tmp_path) -> list[str]:
    """The names of the files in the cache, without locks."""
    files = (tmp_path / "cache").rglob("*")
    return sorted(file.name for file in files if file.is_file() and not file.name.endswith(".lock"))


def test_a_file_comes_once(server, tmp_path):
    place = fetch(f"{server.url}/model.pth", DIGEST)
    assert place == tmp_path / "cache" / "hub" / "checkpoints" / "model.pth" and place.read_bytes() == DATA
    assert fetch(f"{server.url}/model.pth", DIGEST) == place
    assert len(server.asked) == 1 and left(tmp_path) == ["model.pth"]
    # what lies in the cache and is not the file, such as a page that was saved by hand, is replaced
    place.write_bytes(b"<html>")
    assert fetch(f"{server.url}/model.pth", DIGEST).read_bytes() == DATA


def test_what_breaks_off_is_resumed(server, tmp_path):
    server.ways["/model.pth"] = [breaks_off(1_000_000), breaks_off(2_500_000)]
    assert fetch(f"{server.url}/model.pth", DIGEST).read_bytes() == DATA
    assert [asked for _, asked in server.asked] == [None, "bytes=1000000-", "bytes=2500000-"]


def test_what_breaks_off_for_good_is_resumed_by_the_next_command(server, tmp_path):
    server.ways["/model.pth"] = [breaks_off(1_000_000)] + [says(503)] * downloads.ATTEMPTS
    with pytest.raises(ValueError, match=r"the server says 503 .*after 1.0 MB. The same command goes on from there"):
        fetch(f"{server.url}/model.pth", DIGEST)
    assert left(tmp_path) == ["model.pth.part"]
    assert fetch(f"{server.url}/model.pth", DIGEST).read_bytes() == DATA
    assert server.asked[-1] == ("/model.pth", "bytes=1000000-") and left(tmp_path) == ["model.pth"]


def test_a_server_without_ranges_begins_anew(server):
    server.ways["/model.pth"] = [breaks_off(1_000_000), without_ranges]
    assert fetch(f"{server.url}/model.pth", DIGEST).read_bytes() == DATA


def test_a_beginning_of_another_file_is_thrown_away(server, tmp_path):
    part = downloads.place_of(f"{server.url}/model.pth").with_name("model.pth.part")
    part.parent.mkdir(parents=True)
    for junk in (b"junk" * 1000, b"junk" * len(DATA)):  # shorter, longer than the file
        part.write_bytes(junk)
        place = fetch(f"{server.url}/model.pth", DIGEST)
        assert place.read_bytes() == DATA and left(tmp_path) == ["model.pth"]
        place.unlink()


def test_a_wrong_hash_leaves_nothing(server, tmp_path):
    server.ways["/model.pth"] = [lies]
    with pytest.raises(ValueError, match=rf"not the published file, its sha256 is \w+, not {DIGEST[1]}\.\.\..*login"):
        fetch(f"{server.url}/model.pth", DIGEST)
    assert left(tmp_path) == []
    with pytest.raises(ValueError, match=r"sha256 is .*, not 00000000"):
        located(f"{server.url}/model.pth#sha256=00000000")
    assert located(f"{server.url}/model.pth#sha256={DIGEST[1]}").read_bytes() == DATA
    with pytest.raises(ValueError, match="'md5=1', expected sha256=HEX"):
        located(f"{server.url}/model.pth#md5=1")


def test_redirects_are_followed_and_the_range_goes_along(server):
    server.files["/old.pth"] = b""
    server.ways["/old.pth"] = [redirects("/model.pth")] * 3
    server.ways["/model.pth"] = [breaks_off(1_000_000)]
    assert fetch(f"{server.url}/old.pth", DIGEST).read_bytes() == DATA
    assert ("/model.pth", "bytes=1000000-") in server.asked
    server.ways["/old.pth"] = [redirects("/old.pth")] * 20
    with pytest.raises(ValueError, match="the server says 302"):
        located(f"{server.url}/old.pth")


def test_addresses_of_one_name_do_not_mix(server):
    server.files["/other/model.pth"] = b"another"
    a, b = located(f"{server.url}/model.pth"), located(f"{server.url}/other/model.pth")
    assert a.name == b.name == "model.pth" and a.read_bytes() == DATA and b.read_bytes() == b"another"


def test_what_cannot_be_had_says_where_it_may_be_put(server, tmp_path, monkeypatch):
    place = downloads.place_of(f"{server.url}/gone.pth")
    with pytest.raises(
        ValueError, match=f"the server says 404 Not Found; get the file elsewhere and put it at {place}"
    ):
        fetch(f"{server.url}/gone.pth")
    nobody = "http://127.0.0.1:9"
    place = downloads.place_of(f"{nobody}/gone.pth")
    with pytest.raises(ValueError, match=f"gone.pth cannot be reached .*put it at {place}, or name a mirror") as error:
        fetch(f"{nobody}/gone.pth", DIGEST)
    place.write_bytes(DATA)  # as it says
    assert fetch(f"{nobody}/gone.pth", DIGEST) == place
    place.unlink()
    # and the other way out
    assert "DETECTOR_ZOO=http://" in str(error.value)
    monkeypatch.setenv("DETECTOR_ZOO", f"{server.url}/mirror/")
    server.files["/mirror/127.0.0.1:9/gone.pth"] = DATA
    assert fetch(f"{nobody}/gone.pth", DIGEST) == place and place.read_bytes() == DATA
    monkeypatch.setenv("DETECTOR_ZOO", "/folder")
    with pytest.raises(ValueError, match="DETECTOR_ZOO=/folder: expected an address"):
        fetch(f"{nobody}/more.pth", DIGEST)


def test_no_space_is_said_before_and_while_it_is_written(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 1_000_000))
    with pytest.raises(ValueError, match="no space for 3 MB, 1 MB are free; TORCH_HOME=FOLDER names another cache"):
        fetch(f"{server.url}/model.pth", DIGEST)
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "append", full)
    with pytest.raises(ValueError, match=r"checkpoints: No space left on device; TORCH_HOME=FOLDER"):
        fetch(f"{server.url}/model.pth", DIGEST)
    assert left(tmp_path) == []


def test_of_several_processes_one_downloads(server):
    """As the ranks of a run do it, all at once."""
    context = multiprocessing.get_context("fork")
    server.ways["/model.pth"] = [breaks_off(1_000_000)]
    processes = [context.Process(target=fetch, args=(f"{server.url}/model.pth", DIGEST)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [asked for _, asked in server.asked] == [None, "bytes=1000000-"]


# ------------------------------------------------------------------------------------------------------ Hugging Face


def test_hub_repositories_are_downloaded_once(server, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    names = [{"type": "file", "path": name, "size": 1, "oid": "1"} for name in ("README.md", "a.safetensors")]
    server.files["/api/models/ours/one/tree/main"] = json.dumps(names).encode()  # huggingface_hub 2
    told = {"id": "ours/one", "sha": "0" * 40, "siblings": [{"rfilename": name["path"]} for name in names]}
    server.files["/api/models/ours/one"] = json.dumps(told).encode()  # and before
    for revision in ("main", "0" * 40):
        server.files[f"/ours/one/resolve/{revision}/a.safetensors"] = DATA
    for _ in range(2):
        assert located("hf://ours/one").read_bytes() == DATA
    assert sum("resolve" in path for path, _ in server.asked) == 1
    with pytest.raises(ValueError, match=r"hf://ours/one/gone\.safetensors: .*") as error:
        located("hf://ours/one/gone.safetensors")
    assert "\n" not in str(error.value)


def test_hub_repositories_are_read_from_the_cache_too(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    files = {
        "ours/one": ["detector.safetensors", "README.md"],
        "ours/two": ["a.safetensors", "b.safetensors"],
        "ours/usual": ["model.safetensors", "other.safetensors"],
        "ours/pickles": ["pytorch_model.bin", "README.md"],
        "ours/none": ["README.md"],
    }
    for repo, names in files.items():
        folder = tmp_path / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        for revision in ("main", "v1"):
            (folder / "refs" / revision).write_text(commit)
        for name in names:
            (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
            (folder / "snapshots" / commit / name).write_bytes(b"x")
    assert located("hf://ours/one").name == "detector.safetensors"
    assert located("hf://ours/one@v1").name == "detector.safetensors"
    assert located("hf://ours/usual").name == "model.safetensors"
    assert located("hf://ours/two/b.safetensors@main").name == "b.safetensors"
    assert located("hf://ours/pickles/pytorch_model.bin").name == "pytorch_model.bin"  # as the message says
    for text, message in {
        "hf://ours/two": r"several files of weights \(a.safetensors, b.safetensors\); name one, hf://ours/two/a.safetensors",
        "hf://ours/pickles": r"pickles \(pytorch_model.bin\).*Name one, hf://ours/pickles/pytorch_model.bin: it is",
        "hf://ours/pickles@v1": "Name one, hf://ours/pickles/pytorch_model.bin@v1: it is",
        "hf://ours/none": "it has no weights, only README.md",
        "hf://ours/gone": "hf://ours/gone: ",
        "hf://ours/one/gone.pt": "hf://ours/one/gone.pt: ",
        "hf://ours": r"expected hf://owner/repository\[/file\]\[@revision\]",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            located(text)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"needs huggingface_hub: pip install 'two-stage-detector\[hub\]'"):
        located("hf://ours/one")
