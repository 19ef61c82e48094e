"""Pictures in tar shards and behind addresses: the same samples as from a folder, and what bad ones end with."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import tarfile
import tomllib
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest
import torch

from detector.commands.evaluate import main as evaluate
from detector.commands.validate import main as validate
from detector.comparison.runs import read_run, validation_truth
from detector.data import CocoDataset, Pictures, build_loader, places
from detector.data.contents import changes, contents, same
from detector.data.places import Shards, as_places, cleaned, expanded
from detector.engine.train import train
from tests.data.coco_files import minimal, pack, write
from tests.data.web import serving
from tests.runs import curve

aiohttp = pytest.importorskip("aiohttp")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(places, "PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # where servers elsewhere are reached through one


@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    with serving(tmp_path / "web") as server:
        yield server


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of eight pictures, all of its minimal annotations' sizes, beside instances.json."""
    coco = minimal()
    coco["images"] += [{"id": 20 + i, "file_name": f"more {i}#.png", "width": 50, "height": 40} for i in range(6)]
    folder = tmp_path / "pictures"
    folder.mkdir()
    write(folder, coco).rename(tmp_path / "instances.json")
    return folder


def samples(images, pictures, **options) -> list[np.ndarray]:
    dataset = CocoDataset(images, pictures.parent / "instances.json", **options)
    return [dataset[0, i].image for i in range(len(dataset))]


def assert_alike(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other):
        np.testing.assert_array_equal(left, right)


# ------------------------------------------------------------------------------------------------------- where they lie


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_hold_what_the_folder_holds(pictures, tmp_path, form):
    (pictures / ("long" * 40 + "é.png")).write_bytes(b"a name that needs a header of its own")
    if form == tarfile.USTAR_FORMAT:
        (pictures / ("long" * 40 + "é.png")).unlink()
    pattern, plain = pack(pictures, tmp_path / "shards", 3, form), samples(pictures, pictures)
    for way in (pattern, str(tmp_path / "shards" / "*.tar"), tmp_path / "shards", Shards(pattern)):
        assert_alike(samples(way, pictures), plain)
    (place,) = as_places(pattern)
    for file in pictures.iterdir():
        assert (place / file.name).read_bytes() == file.read_bytes() and (place / file.name).is_file()
    assert not (place / "nowhere.png").is_file() and place.is_dir() and not Shards("nowhere.tar").is_dir()


def test_addresses_hold_what_the_folder_holds(pictures, tmp_path, web, memory):
    plain = samples(pictures, pictures)
    shutil.copytree(pictures, web.folder / "a b")
    pack(pictures, web.folder / "shards")
    for file in pictures.iterdir():
        memory.pipe(f"/set/{file.name}", file.read_bytes())
    for file in (web.folder / "shards").iterdir():
        memory.pipe(f"/shards/{file.name}", file.read_bytes())
    ways = [f"{web.address}/a b", f"{web.address}/a%20b/", f"{web.address}/shards/train-{{000000,000001}}.tar"]
    ways += ["memory://set", "memory://shards/train-{000000..000001}.tar", "memory://shards/*.tar"]
    for way in ways:
        assert_alike(samples(way, pictures), plain)


def test_every_kind_of_picture_is_read_from_shards_as_from_a_folder(tmp_path):
    """TIFF, arrays and DICOM too, whole and part by part, and their headers alone."""
    import tifffile

    folder, rng = tmp_path / "kinds", np.random.default_rng(0)
    folder.mkdir()
    deep = rng.integers(0, 60_000, (64, 48), np.uint16)
    cv2.imwrite(str(folder / "a.jpg"), rng.integers(0, 255, (64, 48, 3), np.uint8))
    cv2.imwrite(str(folder / "b.png"), deep)
    np.save(folder / "c.npy", deep)
    tifffile.imwrite(folder / "d.tif", deep)
    tifffile.imwrite(folder / "e.tif", deep, tile=(16, 16), compression="zlib")
    tifffile.imwrite(folder / "f.tif", rng.integers(0, 255, (64, 48, 3), np.uint8), photometric="rgb")
    header = f"P5 {48} {64} 4095\n".encode()
    (folder / "g.pgm").write_bytes(header + (deep % 4096).astype(">u2").tobytes())
    (place,) = as_places(pack(folder, tmp_path / "shards"))
    settings = Pictures(intensity=[0, 60_000])
    for file in folder.iterdir():
        member, own = (
            place / file.name,
            settings if file.suffix not in (".jpg",) and file.name != "f.tif" else Pictures(),
        )
        np.testing.assert_array_equal(own.read(member), own.read(file))
        one, other = own.check(member), own.check(file)
        assert (one.height, one.width, one.dtype, one.pages) == (other.height, other.width, other.dtype, other.pages)
        with own.parts(member) as parts, own.parts(file) as wanted:
            np.testing.assert_array_equal(
                parts.region(slice(10, 40), slice(5, 30)), wanted.region(slice(10, 40), slice(5, 30))
            )


def test_dicom_is_read_from_shards(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    file = Path(get_testdata_file("CT_small.dcm"))
    folder = tmp_path / "scans"
    folder.mkdir()
    shutil.copy(file, folder / "scan.dcm")
    (place,) = as_places(pack(folder, tmp_path / "shards", 1))
    settings = Pictures(channels=1, intensity="type")
    assert pydicom.dcmread(file).Rows == settings.check(place / "scan.dcm").height
    np.testing.assert_array_equal(settings.read(place / "scan.dcm"), settings.read(file))
    with pytest.raises(ValueError, match="DICOM series are read from folders"):
        Pictures(channels=3, neighbours=1, intensity=[0, 9]).read(place / "scan.dcm")


def test_only_what_is_needed_is_fetched(pictures, web):
    """A picture of a shard is one request for its bytes; of a large file only the header is looked at."""
    pack(pictures, web.folder, 1)
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), np.uint8)
    cv2.imwrite(str(web.folder / "large.png"), noise)
    (place,) = as_places(f"{web.address}/train-000000.tar")
    assert len(place.index.sizes) == 8
    web.asked.clear()
    web.sent = 0
    assert (place / "a.png").read_bytes() == (pictures / "a.png").read_bytes()
    assert web.asked == {"/train-000000.tar": 1} and web.sent == (pictures / "a.png").stat().st_size
    web.sent = 0
    (place,) = as_places(web.address)
    assert Pictures().check(place / "large.png").height == 700
    assert web.sent < 200_000 < (web.folder / "large.png").stat().st_size


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("a-{0..2}.tar", ["a-0.tar", "a-1.tar", "a-2.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}-{0..1}.tar", ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]),
        ("one.tar", ["one.tar"]),
        ("{one,one}.tar", ["one.tar"]),
    ],
)
def test_patterns(pattern, wanted):
    assert expanded(pattern) == (wanted, [])


def test_a_folder_with_pictures_is_none_of_shards(pictures, tmp_path):
    pack(pictures, pictures)
    assert as_places(pictures) == (pictures,)
    pack(tmp_path / "pictures", tmp_path / "shards")
    (tmp_path / "shards" / "notes.txt").write_text("what they are")
    assert as_places(tmp_path / "shards") == (Shards(str(tmp_path / "shards" / "*.tar")),)
    assert as_places(["a", "b"], "root") == (Path("root/a"), Path("root/b"))


# ---------------------------------------------------------------------------------------------- the index and processes


def test_the_index_is_made_once_and_anew_for_other_shards(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "SMALL", 0)
    pattern, cache, made = pack(pictures, tmp_path / "shards"), tmp_path / "cache", []
    real = places.make_index
    monkeypatch.setattr(places, "make_index", lambda *args: made.append(1) or real(*args))
    plain = samples(pictures, pictures)
    for _ in range(2):
        assert_alike(samples(pattern, pictures, cache=cache), plain)
    assert len(made) == 1 and len(list(cache.glob("shards-*"))) == 1
    (place,) = as_places(pattern, cache=cache)
    assert place.is_dir() and len(pickle.dumps(place)) < 500 and type(place.index.offsets) is np.ndarray
    assert (pickle.loads(pickle.dumps(place)) / "a.png").read_bytes() == (pictures / "a.png").read_bytes()
    (pictures / "a.png").write_bytes((pictures / "b.png").read_bytes())
    pack(pictures, tmp_path / "shards")
    (place,) = as_places(pattern, cache=cache)
    assert (place / "a.png").read_bytes() == (pictures / "b.png").read_bytes() and len(made) == 2
    next(cache.glob("shards-*/offsets.npy")).write_bytes(b"")
    next(cache.glob("shards-*/about.json")).write_text("")
    for file in cache.glob("shards-*/about.json"):
        file.write_text("")
    (place,) = as_places(pattern, cache=cache)
    with pytest.raises(ValueError, match=r"shards-\w+ is damaged .* remove this folder"):
        place.check()


def test_an_index_that_cannot_be_stored_is_no_obstacle(pictures, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(places, "SMALL", 0)
    (tmp_path / "file").write_text("in the way")
    (place,) = as_places(pack(pictures, tmp_path / "shards"), cache=tmp_path / "file")
    assert (place / "a.png").is_file() and "cannot be stored" in caplog.text
    assert (pickle.loads(pickle.dumps(place)) / "a.png").read_bytes() == (pictures / "a.png").read_bytes()


def test_workers_read_at_once(pictures, web):
    """Batches of two workers are those of none, after this process has used its own connections and files."""
    pack(pictures, web.folder)
    for images in (str(web.folder / "*.tar"), f"{web.address}/train-{{000000..000001}}.tar"):
        dataset = CocoDataset(images, pictures.parent / "instances.json", masks=False)
        alone = [batch.images for batch, _ in build_loader(dataset, 2, 0, training=False)]
        loader = build_loader(dataset, 2, 2, training=False)
        try:
            assert_alike([batch.images for batch, _ in loader], alone)
        finally:
            loader.close()


# ------------------------------------------------------------------------------------------------------------ bad input


def problem(images, pictures, kind=ValueError, **options) -> str:
    with pytest.raises(kind) as error:
        samples(images, pictures, **options)
    return str(error.value)


def test_a_missing_member_names_the_file_and_the_shards(pictures, tmp_path, caplog):
    coco = json.loads((tmp_path / "instances.json").read_text())
    coco["images"].append({"id": 90, "file_name": "gone.png", "width": 50, "height": 40})
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    pattern = pack(pictures, tmp_path / "shards")
    text = problem(pattern, pictures)
    assert f"image 90 file_name='gone.png', which is not in {pattern} (2 shards)" in text
    assert len(samples(pattern, pictures, on_error="skip")) == 8 and "gone.png" in caplog.text
    for image in coco["images"]:
        image["file_name"] = image["file_name"].replace(".png", ".jpg")
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    text = problem(pattern, pictures)
    assert f"{pattern}: none of 9; 'a.jpg' is the first, and it holds 'a.png'" in text


def test_names_are_found_as_in_a_folder(pictures, tmp_path, memory, caplog):
    """In another case, or below a folder that the shards do not have."""
    coco = json.loads((tmp_path / "instances.json").read_text())
    coco["images"][0]["file_name"], coco["images"][1]["file_name"] = "train2017/a.png", "B.PNG"
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    plain = samples(pictures, pictures)
    for file in pictures.iterdir():
        memory.pipe(f"/set/{file.name}", file.read_bytes())
    for images in (pack(pictures, tmp_path / "shards"), "memory://set"):
        caplog.clear()
        assert_alike(samples(images, pictures), plain)
        assert "2 x file_name that is written in another way" in caplog.text


def test_a_name_in_two_shards_names_both(pictures, tmp_path):
    pattern = pack(pictures, tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "train-000001.tar", "a") as tar:
        tar.add(pictures / "a.png", "a.png")
    shards = [str(tmp_path / "shards" / f"train-00000{number}.tar") for number in (0, 1)]
    assert f"image 7 file_name='a.png' is in {shards[0]} and in {shards[1]}: which" in problem(pattern, pictures)
    with tarfile.open(shards[0], "a") as tar:  # within one the last counts, as of tar itself
        tar.add(pictures / "b.png", "a.png")
    (place,) = as_places(shards[0])
    assert (place / "a.png").read_bytes() == (pictures / "b.png").read_bytes()


@pytest.mark.parametrize("how", ["cut in a picture", "cut in a header", "a header overwritten", "no tar", "empty"])
def test_damaged_shards_are_told_and_skipped(pictures, tmp_path, how, caplog):
    pattern = pack(pictures, tmp_path / "shards")
    shard = tmp_path / "shards" / "train-000001.tar"
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    content, last = bytearray(shard.read_bytes()), members[-2]
    if how == "cut in a picture":
        content = content[: last.offset_data + last.size // 2]
    elif how == "cut in a header":
        content = content[: last.offset + 100]
    elif how == "a header overwritten":
        content[last.offset : last.offset + 512] = b"x" * 512
    else:
        content = b"" if how == "empty" else b"something else" * 1000
    shard.write_bytes(content)
    text = problem(pattern, pictures)
    whole = 0 if how in ("no tar", "empty") else 6
    assert f"{shard} is no whole tar (" in text and f"its first {whole} files are there" in text
    caplog.clear()
    assert len(samples(pattern, pictures, on_error="skip")) == (4 if not whole else 7)
    assert f"{shard} is no whole tar" in caplog.text


def test_missing_shards_are_told(pictures, tmp_path):
    pattern = pack(pictures, tmp_path / "shards")
    (tmp_path / "shards" / "train-000001.tar").unlink()
    text = problem(pattern, pictures)
    assert "shard that is damaged or missing: " in text and "train-000001.tar does not exist" in text
    assert "shards/nowhere.tar: no shard fits" in problem(str(tmp_path / "shards/nowhere.tar"), pictures, OSError)
    assert "shards/n*.tar: no shard fits" in problem(str(tmp_path / "shards/n*.tar"), pictures, OSError)
    assert "{000000} names no shards: {000000..000009} or {a,b} does" in problem("a-{000000}.tar", pictures)


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tgz", "pictures.zip", "memory://set/{0..9}.tar.zst"])
def test_compressed_shards_are_refused(pictures, name):
    assert f"{name}: pictures cannot be read one by one from what is compressed: unpack it" in problem(name, pictures)


def test_a_member_that_is_no_picture_is_named_with_its_shard(pictures, tmp_path, memory):
    (pictures / "a.png").rename(pictures / "a.what")
    (pictures / "a.what").write_bytes(b"no picture")
    content = (tmp_path / "instances.json").read_text().replace("a.png", "a.what")
    (tmp_path / "instances.json").write_text(content)
    for file in pictures.iterdir():
        memory.pipe(f"/set/{file.name}", file.read_bytes())
    shard = tmp_path / "shards" / "train-000000.tar"
    for images, name in ((pack(pictures, shard.parent), f"{shard}/a.what"), ("memory://set", "memory://set/a.what")):
        assert f"image {name} cannot be read: it is in no format of a picture" in problem(images, pictures)


def test_a_shard_that_shrinks_is_told(pictures, tmp_path):
    pattern = pack(pictures, tmp_path / "shards", 1)
    dataset = CocoDataset(pattern, tmp_path / "instances.json")
    os.truncate(tmp_path / "shards" / "train-000000.tar", 100)
    with pytest.raises(ValueError, match=r"train-000000.tar/a.png cannot be read: .* bytes before the end"):
        dataset[0, 0]


def test_a_server_that_fails_for_a_moment_is_asked_again(pictures, web):
    shutil.copytree(pictures, web.folder / "set")
    plain = samples(pictures, pictures)
    web.fail = {f"/set/{name}": (2, 503) for name in ("a.png", "b.png")}
    assert_alike(samples(f"{web.address}/set", pictures), plain)
    assert web.asked["/set/b.png"] == 4  # three times for its header


def test_what_a_server_refuses_is_said_once_and_what_lasts_after_some_tries(pictures, web):
    shutil.copytree(pictures, web.folder / "set")
    web.fail = {"/set/a.png": (9, 403)}
    text = problem(f"{web.address}/set", pictures)
    assert f"image {web.address}/set/a.png cannot be read: {web.address}/set/a.png: ClientResponseError: 403" in text
    web.fail = {"/set/a.png": (9, 500)}
    web.asked.clear()
    text = problem(f"{web.address}/set", pictures)
    assert f"{web.address}/set/a.png: ClientResponseError: 500" in text and "(4 tries)" in text
    assert web.asked["/set/a.png"] == 8  # four times for its header
    web.fail = {}
    (web.folder / "set" / "b.png").unlink()
    assert f"image 9 file_name={web.address}/set/b.png" in problem(f"{web.address}/set", pictures)
    assert f"{web.address}/other: none of 8" in problem(f"{web.address}/other", pictures)


def test_a_server_without_parts_of_files_serves_pictures_but_no_shards(pictures, web):
    web.parts = False
    shutil.copytree(pictures, web.folder / "set")
    pack(pictures, web.folder, 1)
    assert_alike(samples(f"{web.address}/set", pictures), samples(pictures, pictures))
    assert "the server does not send parts of files (HTTP Range)" in problem(
        f"{web.address}/train-000000.tar", pictures, OSError
    )


def test_unreachable_addresses_are_named(pictures, memory):
    text = problem("http://127.0.0.1:9/set", pictures, OSError)
    assert "http://127.0.0.1:9/set/a.png: ClientConnectorError: " in text and "(4 tries)" in text
    text = problem("http://127.0.0.1:9/{0..1}.tar", pictures, OSError)
    assert "http://127.0.0.1:9/0.tar: ClientConnectorError: " in text and "(4 tries)" in text
    assert "memory://set: no such folder, or nothing in it" in problem("memory://set", pictures, OSError)
    assert "Protocol not known: nowhere" in problem("nowhere://set", pictures)


def test_what_is_not_installed_is_named_with_the_line_that_installs_it(pictures, monkeypatch):
    """... and that line brings it."""
    for name in ("aiohttp", "s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    fsspec.filesystem.__globals__["_registry"].pop("s3", None)
    mend = "pip install 'two-stage-detector[remote]'"
    for address in ("https://host/set", "s3://bucket/set"):
        assert f"{address}: {address.split(':')[0]}:// needs a package that is not installed: {mend}" in problem(
            address, pictures
        )
    assert "gcsfs" in problem("gs://bucket/set", pictures)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {re.split(r"\W", text)[0] for text in extras["remote"]} >= {"aiohttp", "s3fs", "huggingface_hub"}


@pytest.mark.parametrize("address", ["https://me:secret@host/set", "https://host/set?key=secret", "s3://me:secret@b/s"])
def test_keys_in_addresses_are_refused_without_a_word_of_them(pictures, address):
    text = problem(address, pictures)
    assert "AWS_ACCESS_KEY_ID" in text and "secret" not in text


def test_messages_hold_no_keys():
    text = (
        "403, url='https://me:secret@host/a.png?X-Amz-Signature=secret' from s3://bucket/a?b=secret, and https://host/a"
    )
    assert cleaned(text) == "403, url='https://host/a.png' from s3://bucket/a, and https://host/a"


# ------------------------------------------------------------------------------------------------------- whole programs


def test_what_a_data_set_holds_is_the_same_wherever_it_lies(pictures, tmp_path, memory):
    for file in pictures.iterdir():
        memory.pipe(f"/set/{file.name}", file.read_bytes())
    pattern, file = pack(pictures, tmp_path / "shards"), tmp_path / "instances.json"
    sets = [CocoDataset(images, file) for images in (pictures, pattern, "memory://set")]
    held = [contents(dataset) for dataset in sets]
    assert same(held[0], held[1]) and same(held[0], held[2]) and (held[1]["sums"] >= 0).all()
    (pictures / "b.png").write_bytes((pictures / "b.png").read_bytes() + b" ")
    now = contents(CocoDataset(pack(pictures, tmp_path / "shards"), file))
    assert changes(held[0], now, sets[1], "train")[0].startswith("data.train.images: 1 of 8 files")


def test_training_resumes_to_the_bit_wherever_the_pictures_lie(run, shapes_tiny, tmp_path, web):
    """Begun in folders, ended with shards and a server: the losses and weights of a run that saw the folders alone."""
    shutil.copytree(shapes_tiny / "val", web.folder / "val")
    common = ["schedule.max_iterations=6", "runtime.checkpoint_every=4"]
    whole = run(*common, f"run_dir={tmp_path / 'whole'}")
    part = shutil.copytree(whole, tmp_path / "part")
    (part / "last.pt").unlink()
    (part / "best.pt").unlink()
    (part / "iteration_0000004.pt").rename(part / "last.pt")
    images = [pack(shapes_tiny / "train", tmp_path / "shards", 3), f"{web.address}/val"]
    elsewhere = [f"data.{split}.images='{text}'" for split, text in zip(("train", "val"), images)]
    run(*common, f"run_dir={part}", *elsewhere)
    assert curve(part) == curve(whole) and len(curve(part)) == 6
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (part, whole))
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in other["model"])
    assert one["metrics"] == other["metrics"] and sum(web.asked.values()) >= 8


@pytest.mark.slow
def test_all_programs_open_pictures_in_one_place(config, tmp_path, shapes_tiny, call):
    """eval, validate, compare and their pictures, with pictures in shards."""
    images = {split: pack(shapes_tiny / split, tmp_path / split) for split in ("train", "val")}
    given = [f"data.{split}.images='{pattern}'" for split, pattern in images.items()]
    train(config(*given))
    code, out, err = call(evaluate, f"checkpoint={tmp_path / 'run' / 'last.pt'}", "device=cpu")
    about = json.loads((tmp_path / "run" / "eval_last" / "about.json").read_text())
    assert code == 0 and about["images"] == images["val"], err
    assert (tmp_path / "run" / "eval_last" / "report.html").read_text().count("<img") > 2
    found = read_run(tmp_path / "run", "last")
    assert found.images == (Shards(images["val"]),) and len(validation_truth(found)) == 8
    data = ["data=custom", f"data.root={shapes_tiny}", *(text.replace("'", "") for text in given)]  # as it is typed
    code, out, err = call(validate, *data, "--no-step", "--output", str(tmp_path / "report"))
    assert "cannot be read" not in out and "8 images" in out, out
