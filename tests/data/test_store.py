"""Annotations kept on disk: the same as parsed, safe against changes, faults and other processes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest

from detector.data import Annotations, CocoDataset, open_coco, read_coco, several
from detector.data import store as store_module
from detector.data.annotations import Truth
from detector.data.store import open_truth
from tests.data.coco_files import minimal, write


def assert_same(one, other):
    for item in dataclasses.fields(Annotations if isinstance(one, Annotations) else Truth):
        left, right = getattr(one, item.name), getattr(other, item.name)
        if isinstance(left, Truth):
            assert_same(left, right)
        elif isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right


@pytest.fixture
def open_again(tmp_path, monkeypatch):
    """open_coco with a store; `parsed` counts how often the file was really read."""
    parsed = []

    def counted(*args, **kwargs):
        parsed.append(1)
        return read_coco(*args, **kwargs)

    monkeypatch.setattr(several, "read_coco", counted)

    def open_it(path, **options):
        return open_coco(path, cache=tmp_path / "cache", small=0, **options)

    open_it.parsed = parsed
    return open_it


@pytest.mark.parametrize("masks", [True, False])
def test_stored_equals_parsed(tmp_path, open_again, masks):
    path = write(tmp_path, minimal())
    plain = read_coco(path, masks=masks)
    for _ in range(3):
        found = open_again(path, masks=masks)
        assert_same(found, plain)
        np.testing.assert_array_equal(found.objects(0).boxes, plain.objects(0).boxes)
    assert len(open_again.parsed) == 1
    assert type(found.boxes) is np.ndarray and not found.boxes.flags.owndata  # mapped


@pytest.mark.slow
def test_real_data(shared, open_again):
    for name in ("coco_cc_sample", "nuclei_dsb2018", "bccd"):
        path = shared / "data" / name / "annotations" / "instances_val.json"
        for _ in range(2):
            assert_same(open_again(path), read_coco(path))
    assert len(open_again.parsed) == 3


def test_changes_and_options_make_another_store(tmp_path, open_again):
    path = write(tmp_path, minimal())
    open_again(path)
    open_again(path, masks=False)
    open_again(path, categories=["cat", "dog"])
    assert len(open_again.parsed) == 3
    coco = minimal()
    coco["annotations"][1]["bbox"] = [30, 20, 10, 11]  # as long as before
    path.write_text(json.dumps(coco))
    assert open_again(path).boxes[1, 3] == 31 and len(open_again.parsed) == 4
    assert open_again(path, categories=["cat", "dog"]).categories == ["cat", "dog"]


def test_an_old_file_is_not_read_again_but_a_changed_one_is(tmp_path, open_again, monkeypatch):
    path = write(tmp_path, minimal())
    read = []
    digest = store_module.hashlib.file_digest
    monkeypatch.setattr(store_module.hashlib, "file_digest", lambda *args: read.append(1) or digest(*args))
    os.utime(path, (1, 1))
    open_again(path)
    open_again(path)
    assert len(read) == 1 and len(open_again.parsed) == 1
    path.write_text(json.dumps(minimal() | {"more": 1}))
    open_again(path)
    assert len(read) == 2 and len(open_again.parsed) == 2


def test_what_is_wrong_is_said_every_time(tmp_path, open_again, caplog):
    coco = minimal()
    coco["annotations"][1]["bbox"] = [1, 1, 0, 0]
    path = write(tmp_path, coco)
    for _ in range(2):
        caplog.clear()
        open_again(path)
        assert len(caplog.records) == 1 and "annotation 2" in caplog.text


def test_errors_leave_no_store_but_skipping_does(tmp_path, open_again, caplog):
    coco = minimal()
    coco["annotations"][1]["category_id"] = 99
    path = write(tmp_path, coco)
    for _ in range(2):
        with pytest.raises(ValueError, match="category_id=99"):
            open_again(path)
    assert not list((tmp_path / "cache").glob("instances*"))
    assert len(open_again(path, on_error="skip").boxes) == 1
    with pytest.raises(ValueError, match="category_id=99"):  # from the store
        open_again(path)
    assert len(open_again.parsed) == 3


def test_small_files_and_no_cache_are_parsed(tmp_path):
    path = write(tmp_path, minimal())
    open_coco(path, cache=tmp_path / "cache")
    open_coco(path, cache=None, small=0)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, caplog):
    path = write(tmp_path, minimal())
    (tmp_path / "file").write_text("in the way")
    found = open_coco(path, cache=tmp_path / "file", small=0)
    assert len(found.boxes) == 2 and "cannot be stored" in caplog.text


def test_damaged_store_is_named(tmp_path, open_again):
    path = write(tmp_path, minimal())
    open_again(path)
    boxes = next((tmp_path / "cache").glob("*/boxes.npy"))
    boxes.write_bytes(boxes.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"damaged .* remove this folder"):
        open_again(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_coco(tmp_path / "nowhere.json", cache=tmp_path)


def test_the_truth_is_read_from_the_store_that_any_program_left(tmp_path, open_again, caplog):
    """Whatever categories it was opened with; another mask setting, or a store of before, is read anew."""
    coco = minimal()
    coco["annotations"][1]["bbox"] = [1, 1, 0, 0]
    path, cache = write(tmp_path, coco), tmp_path / "cache"
    open_again(path, categories=["cat", "dog"])
    open_again(path, truth=False)
    caplog.clear()
    assert_same(open_truth(path, cache=cache, small=0), read_coco(path).truth)
    assert len(open_again.parsed) == 2 and "annotation 2" in caplog.text
    assert not len(open_truth(path, masks=False, cache=cache, small=0).points) and len(open_again.parsed) == 3
    for file in cache.glob("*/options.json"):
        file.unlink()
    for _ in range(2):
        assert_same(open_truth(path, cache=cache, small=0), read_coco(path).truth)
    assert len(open_again.parsed) == 4
    next(file for file in cache.glob("*/truth/boxes.npy") if file.parents[1].joinpath("options.json").exists()).unlink()
    with pytest.raises(ValueError, match=r"damaged .* remove this folder"):
        open_truth(path, cache=cache, small=0)


def test_other_processes_get_the_name_not_the_content(tmp_path, open_again):
    found = open_again(write(tmp_path, minimal()))
    message = pickle.dumps(found)
    assert len(message) < 500
    assert_same(pickle.loads(message), found)


def _open(path, cache, barrier, results):
    barrier.wait()
    results.put(open_coco(path, cache=cache, small=0).boxes.tolist())


def test_several_processes_at_once(tmp_path):
    coco = minimal()
    coco["annotations"] += [dict(coco["annotations"][0], id=10 + i) for i in range(3000)]
    path, context = write(tmp_path, coco), multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_open, args=(path, tmp_path / "cache", barrier, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [read_coco(path).boxes.tolist()] * 4
    assert len([name for name in os.listdir(tmp_path / "cache") if "key" not in name]) == 1  # no drafts left


def test_data_set_with_a_store(tmp_path, monkeypatch):
    monkeypatch.setattr(
        store_module.open_coco, "__defaults__", (*store_module.open_coco.__defaults__[:-3], 0, True, None)
    )
    path = write(tmp_path, minimal())
    plain = CocoDataset(tmp_path, path)
    for _ in range(2):
        stored = CocoDataset(tmp_path, path, cache=tmp_path / "cache")
        np.testing.assert_array_equal(stored[0].masks, plain[0].masks)
        np.testing.assert_array_equal(stored[0].image, plain[0].image)
    assert (tmp_path / "cache").is_dir()
