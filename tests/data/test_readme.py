"""Every command line of data/README.md, run as it is typed there."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from PIL import Image

from detector import checkpoint as checkpoints
from detector.commands import main as program
from detector.engine import memory, setup
from detector.engine import train as loop
from detector.settings import Training
from tests.conftest import ROOT
from tests.data.coco_files import minimal, write
from tests.data.test_split import films
from tests.data.test_tools import CVAT, RECTANGLE, labelme_shape, region, ring_and_parts, supervisely_object, task


def command_lines() -> list[str]:
    """The lines of the page's blocks that begin with the command, joined where they go on."""
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.startswith("    detector ")]


LINES = command_lines()


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
    export(words[2])
    predictions()
    content = films()
    for image in content["images"]:
        image["file_name"] = image["file_name"].replace("_", "_frame")
    if words[2] == "split":
        save("my_export/annotations/cvat.json", content)
    for word in words:
        if word.startswith("checkpoint="):
            Path(word.partition("=")[2]).parent.mkdir(parents=True)
            checkpoints.save(state, Path(word.partition("=")[2]))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr(loop, "train", only_prepared)
    monkeypatch.setattr("detector.commands.train.run_training", only_prepared)
    step = memory.Step("cpu", 2, 1.0, 0.1, 500, 900, 8000)  # of a ResNet-50: some seconds
    monkeypatch.setattr(memory, "measure_step", lambda *_: step)
    if words[1] in ("eval", "predict"):
        words += ["device=cpu"] + ["workers=0"] * (words[1] == "eval")
    monkeypatch.setattr(sys, "argv", words)
    try:
        code = program.main()
    except SystemExit as end:
        code = end.code
    assert not code, capsys.readouterr()
    shutil.rmtree(tmp_path / "my_data")
