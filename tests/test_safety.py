"""Files of strangers: checkpoints, annotations, pictures and archives may be wrong or hostile, and must not act."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from detector import checkpoint
from detector.commands import prepare_coco
from detector.config import CONFIGS, ConfigError
from detector.config.schema import check_model_config, check_transforms_config
from detector.data import read_coco, read_image
from detector.inference.load import load, validation_transforms
from detector.weights import load_foreign
from tests.data.coco_files import minimal, write

RESIZE = {"_target_": "albumentations.Resize", "height": 64, "width": 64}


# ---------------------------------------------------------------------------------------------------- stored configs


def touch(path: Path) -> dict:
    """A node that, instantiated, creates a file."""
    return {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(path)]}]}


def created(path: Path) -> str:
    """The same as text that OmegaConf would make such a node of."""
    return "${oc.create:{_target_: os.mkdir, path: %s}}" % path  # noqa: UP031


HIDING_PLACES = {
    "a step": lambda node: [node],
    "an argument": lambda node: [RESIZE | {"height": node}],
    "a list in an argument": lambda node: [{"_target_": "albumentations.Compose", "transforms": [RESIZE, node]}],
    "beside a sound step": lambda node: [RESIZE, {"_target_": "albumentations.OneOf", "transforms": [[node]]}],
}


@pytest.mark.parametrize("make", [touch, created])
@pytest.mark.parametrize("place", HIDING_PLACES)
def test_stored_transforms_build_transforms_only(tmp_path, place, make):
    steps = HIDING_PLACES[place](make(tmp_path / "attacked"))
    with pytest.raises(ConfigError, match="not trusted"):
        validation_transforms({"augment": {"val": steps}})
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    "target",
    [
        "albumentations.core.utils.os.system",
        "albumentations.core.serialization.Path",
        "albumentations.load",
        "detector.data.dataset.os.system",
        "detector.data.transforms.os.remove",
        "detector.data.CocoDataset",
        "detector.data.read_image",
        "albumentations.nothing",
    ],
)
def test_names_below_allowed_packages_must_be_transforms(target):
    with pytest.raises(ConfigError, match=r"augment\.val\.0\._target_"):
        check_transforms_config([{"_target_": target}])


@pytest.mark.parametrize("path", sorted((CONFIGS / "augment").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_transforms_are_trusted(path):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", ["experiment=none", f"augment={path.stem}"])
    augment = OmegaConf.to_container(cfg.augment, resolve=True)
    check_transforms_config(augment["train"])
    check_transforms_config(augment["val"])


@pytest.mark.parametrize("make", [touch, created])
def test_a_checkpoints_model_is_a_model_down_to_the_last_argument(tmp_path, make):
    node = {
        "_target_": "detector.model.TwoStageDetector",
        "rpn": {"anchors": [1, {"deep": make(tmp_path / "attacked")}]},
    }
    with pytest.raises(ConfigError, match=r"model\.rpn\.anchors\.1\.deep"):
        check_model_config(node)
    state = {"config": {"model": node | {"backbone": {}}}, "categories": ["a"], "category_ids": [1], "ema": None}
    with pytest.raises(ConfigError, match="not trusted"):
        load(state | {"model": {}})
    assert not (tmp_path / "attacked").exists()


# ------------------------------------------------------------------------------------------ modules of the user's own

OWN = """
import os
import torch
from torch import nn
from torch.nn import Linear
from detector.checkpoint import save
marker = open(__file__ + ".imported", "w")
class Part(nn.Module): pass
class Other: pass
def make(): return Part()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The file that shows that the module safety_own was imported."""
    (tmp_path / "safety_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "safety_own", raising=False)
    return tmp_path / "safety_own.py.imported"


def test_a_module_of_ones_own_is_named_and_only_then_imported(own):
    node = {"_target_": "safety_own.Part"}
    with pytest.raises(ConfigError, match=r"not trusted\. If safety_own is yours .*: trust=safety_own on the command"):
        check_model_config(node)
    with pytest.raises(ConfigError, match=r"If safety_own is yours"):
        check_model_config(node, trust=["safety", "safety_own.deeper", ""])
    assert not own.exists()
    check_model_config(node, trust="safety_own")
    check_model_config(node, trust=["other", "safety_own"])
    with pytest.raises(ConfigError, match="not a transform"):
        check_transforms_config([node], trust="safety_own")


@pytest.mark.parametrize("name", ["os.system", "Other", "make", "Linear", "save", "torch.nn.Linear", "marker.close"])
def test_trust_is_in_classes_that_the_module_defines(own, name):
    with pytest.raises(ConfigError, match=r"not trusted|not callable"):
        check_model_config({"_target_": f"safety_own.{name}"}, trust="safety_own")


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "detector.checkpoint.save", "numpy.load"])
def test_nobody_is_asked_to_trust_what_is_no_ones_own(name):
    with pytest.raises(ConfigError, match=r"not trusted$"):
        check_model_config({"_target_": name})
    with pytest.raises(ConfigError, match=r"not trusted$"):
        check_model_config({"_target_": name}, trust=name.partition(".")[0])


def test_a_checkpoint_cannot_name_its_own_trust(own):
    node = {"_target_": "safety_own.Part", "backbone": {}, "trust": "safety_own"}
    config = {"model": node, "trust": "safety_own", "augment": {"trust": ["safety_own"]}}
    state = {
        "config": config,
        "trust": ["safety_own"],
        "categories": ["a"],
        "category_ids": [1],
        "ema": None,
        "model": {},
    }
    with pytest.raises(ConfigError, match="If safety_own is yours"):
        load(state | {"model": {}})
    assert not own.exists()


class Evil:
    def __reduce__(self):
        return (open, ("attacked", "w"))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl"])
def test_weights_are_read_without_running_code(tmp_path, monkeypatch, suffix):
    """As a checkpoint to continue or to evaluate, and as foreign weights to start from."""
    monkeypatch.chdir(tmp_path)
    contents = {"format": checkpoint.FORMAT, "model": {"conv.weight": torch.zeros(1), "evil": Evil()}}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path)
    for reader in (checkpoint.load, load, load_foreign):
        with pytest.raises(ValueError, match="weights"):
            reader(path)
    assert not (tmp_path / "attacked").exists()


# ------------------------------------------------------------------------------------------------------------ pictures


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of the given size in a few KB: one colour, compressed a thousand times."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_unopened(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bomb(15_000, 10_000))
    assert path.stat().st_size < 60_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read: 15000 x 10000 pixels are more than max_pixels"):
        read_image(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    path.write_bytes(png_bomb(200, 100))
    assert read_image(path, max_pixels=20_000).shape == (100, 200, 3)
    with pytest.raises(ValueError, match="max_pixels=19999"):
        read_image(path, max_pixels=19_999)


@pytest.mark.parametrize("size", [(10**9, 10**9), (2**31, 1), (1, 2**63), (0, 5), (-5, -5)])
def test_declared_sizes_are_limited(tmp_path, size):
    """No array is made of a size that only the annotation file claims."""
    coco = minimal()
    coco["images"][1] |= {"width": size[0], "height": size[1]}
    path = tmp_path / "instances.json"
    write(tmp_path, minimal())
    path.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="image 9"):
        read_coco(path)
    rle = minimal()
    rle["annotations"][0]["segmentation"] = {"size": [40, 60], "counts": [0, 10**15]}
    path.write_text(json.dumps(rle))
    with pytest.raises(ValueError, match="annotation 1"):
        read_coco(path)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, '{"images": [' + "9" * 5000 + "]}"])
def test_json_bombs(tmp_path, text):
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"instances\.json: not JSON"):
        read_coco(path)


# ------------------------------------------------------------------------------------------------------------ archives


def test_archives_that_lie_about_their_size(tmp_path):
    """No more than the declared bytes are written, and their checksum does not fit."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("a.jpg", bytes(1_000_000))
    data = bytearray(packed.getvalue())
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):  # the uncompressed size in both headers
        place = data.index(signature) + offset
        data[place : place + 4] = struct.pack("<I", 10)
    (tmp_path / "liar.zip").write_bytes(data)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        prepare_coco.extract(tmp_path / "liar.zip", tmp_path / "out", max_bytes=100)
    assert not (tmp_path / "out" / "a.jpg").exists()
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= 10


def test_the_limit_of_archives_can_be_set(tmp_path, monkeypatch, capsys):
    (tmp_path / "coco" / "archives").mkdir(parents=True)
    archive = tmp_path / "coco" / "archives" / "train2017.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("a.jpg", bytes(3 << 20))
    monkeypatch.setattr(prepare_coco, "verify", lambda *_: None)
    arguments = ["prepare_coco", "--out", str(tmp_path / "coco"), "--max-unpacked"]
    monkeypatch.setattr(sys, "argv", [*arguments, "0.001"])
    with pytest.raises(SystemExit, match=r"unpacks to 3145728 bytes, more than 1073741 \(--max-unpacked\)"):
        prepare_coco.main()
    assert not (tmp_path / "coco" / "a.jpg").exists()
    monkeypatch.setattr(sys, "argv", [*arguments, "1", "--source", "http://127.0.0.1:9/nowhere"])
    monkeypatch.setattr(prepare_coco, "download", lambda url, target: target.exists() or sys.exit("the next one"))
    with pytest.raises(SystemExit, match="the next one"):
        prepare_coco.main()
    assert (tmp_path / "coco" / "a.jpg").stat().st_size == 3 << 20
