"""Every command line of data/README.md and docs/own_data.md, run as it is typed there."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hydra.core.hydra_config import HydraConfig
from PIL import Image

from detector import checkpoint as checkpoints
from detector.commands import main as program
from detector.engine import memory, setup
from detector.engine import train as loop
from detector.settings import Training
from tests.conftest import ROOT
from tests.data.coco_files import minimal, pack, write
from tests.data.test_split import films
from tests.data.test_tools import CVAT, RECTANGLE, labelme_shape, region, ring_and_parts, supervisely_object, task


def command_lines(*pages: Path) -> list[str]:
    """The lines of the pages' blocks that begin with the command, joined where they go on, without remarks, each once;
    tests/export does what `export` does, in minutes."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    lines = (line for line in text.splitlines() if re.match(r"(    )?detector (?!export)[a-z]", line))
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in lines))


LINES = command_lines(ROOT / "data" / "README.md", ROOT / "docs" / "own_data.md")


def save(path: str, content: object) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content if isinstance(content, str) else json.dumps(content))


def own_data() -> None:
    """my_data, with the two parts of "several annotation files"."""
    for name, file in (("train", "instances_train"), ("val", "instances_val"), ("lab", "lab"), ("field", "field")):
        coco, folder = minimal(), Path("my_data") / name
        coco["annotations"][1]["segmentation"] = [[30, 20, 40, 20, 40, 30, 30, 30]]
        folder.mkdir(parents=True)
        write(folder, coco).unlink()
        save(f"my_data/annotations/{file}.json", coco)


def many_channels() -> None:
    """The pictures of my_data with six bands; six numbers make up the colours."""
    for path in Path("my_data").glob("*/*.png"):
        pixels = np.asarray(Image.open(path))
        tifffile.imwrite(
            path, np.concatenate([pixels, 255 - pixels], 2), photometric="minisblack", planarconfig="contig"
        )


def yolo() -> None:
    """my_data in YOLO's layout."""
    shutil.rmtree("my_data")
    save("my_data/data.yaml", "train: images/train\nval: images/val\nnames: [cat, dog]\n")
    for split in ("train", "val"):
        Path(f"my_data/images/{split}").mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(f"my_data/images/{split}/a.png")
        save(f"my_data/labels/{split}/a.txt", "0 0.5 0.5 0.2 0.2\n")


def export(tool: str) -> None:
    """my_export or my_project, as a tool leaves it."""
    size = {"height": 40, "width": 60}
    if tool == "cvat":
        save("my_export/annotations.xml", CVAT)
    elif tool == "label_studio":
        save("my_export/project.json", [task([region("rectanglelabels", RECTANGLE, "cat")])])
    elif tool == "labelme":
        about = {"shapes": [labelme_shape("rectangle", [[1, 2], [9, 9]])], "imagePath": "a.png"}
        save("my_export/a.json", about | {"imageHeight": 40, "imageWidth": 60})
    elif tool == "supervisely":
        save("my_project/meta.json", {"classes": [{"title": "cat", "shape": "any"}]})
        box = supervisely_object("rectangle", "cat", points={"exterior": [[1, 2], [9, 9]], "interior": []})
        save("my_project/ds0/ann/a.png.json", {"size": size, "objects": [box]})


def with_test_set(state: dict) -> dict:
    """`state`, of a run on a data set that has a third split."""
    config = copy.deepcopy(state["config"])
    root = shutil.copytree(config["data"]["root"], "own_shapes", dirs_exist_ok=True)
    shutil.copytree(f"{root}/val", f"{root}/test", dirs_exist_ok=True)
    shutil.copy(f"{root}/annotations/instances_val.json", f"{root}/annotations/instances_test.json")
    config["data"]["root"] = root
    return state | {"config": config}


def predictions() -> None:
    found = ring_and_parts()
    for image in found["images"]:
        image["file_name"] = f"photos/{image['file_name']}"
        Path("photos").mkdir(exist_ok=True)
        Image.new("RGB", (image["width"], image["height"])).save(image["file_name"])
    save("predictions/predictions.json", found)


def only_prepared(cfg, **_) -> None:
    """What a training does before its first step."""
    setup.preflight(cfg, Training())
    train_set, val_set = setup.datasets(cfg)
    assert len(train_set) and len(val_set)


def test_the_page_has_them():
    assert len(LINES) > 20 and {line.split()[1] for line in LINES} >= {
        "train",
        "eval",
        "predict",
        "validate",
        "convert",
    }


@pytest.mark.parametrize("line", LINES)
def test_as_typed(line, tmp_path, monkeypatch, capsys, state):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    own_data()
    shutil.copytree("my_data/train", "slides")
    tifffile.imwrite("stack.tif", np.zeros((3, 40, 60, 3), np.uint8), photometric="rgb")
    if "data.channels=6" in words:
        many_channels()
    if ".tar" in line:
        pack(Path("my_data/train"), Path("my_data/shards"))
    if words[2] == "yolo":
        yolo()
    export(words[2])
    predictions()
    content = films()
    for image in content["images"]:
        image["file_name"] = image["file_name"].replace("_", "_frame")
    if words[2] == "split":
        save("my_export/annotations/cvat.json", content)
    for word in words:
        if word.endswith(".pt"):
            Path(word.rpartition("=")[2]).parent.mkdir(parents=True)
            checkpoints.save(with_test_set(state), Path(word.rpartition("=")[2]))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(loop, "train", only_prepared)
    monkeypatch.setattr("detector.commands.train.run_training", only_prepared)
    step = memory.Step("cpu", 2, 1.0, 0.1, 500, 900, 8000)  # of a ResNet-50: some seconds
    monkeypatch.setattr(memory, "measure_step", lambda *_: step)
    if words[1] in ("eval", "predict"):
        words += ["device=cpu"] + ["workers=0"] * (words[1] == "eval")
    code, printed = ran(words, monkeypatch, capsys)
    if "data.channels=6" in words:  # needs what it measures: an error until it is given
        advised = shlex.split(printed.out.partition("\nto train with: ")[2].splitlines()[0])
        assert code == 1 and {word.partition("=")[0] for word in advised} == {"model.pixel_mean", "model.pixel_std"}
        code, printed = ran([*words, *advised], monkeypatch, capsys)
    assert not code, printed
    shutil.rmtree(tmp_path / "my_data")


def ran(words: list[str], monkeypatch, capsys) -> tuple:
    """The exit code, and what was printed."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr(sys, "argv", words)
    try:
        code = program.main()
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr()
