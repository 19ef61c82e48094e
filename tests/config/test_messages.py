"""What messages advise exists, and works when it is obeyed."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from detector.commands import evaluate
from detector.config import ConfigError, build, explain, suggest
from detector.engine import setup
from tests.runs import checked

PACKAGE = Path(suggest.__file__).parents[1]
OVERRIDE = re.compile(r"(?<![\w.@'/=-])((?:[a-z]\w*[.@])*[a-z]\w*)=([\w.\[\]]+|\{\}|%[sg])")
PROGRAMS = [("train", ["experiment=none", "augment=default", f"model={m}"]) for m in ("mask_rcnn", "keypoint_rcnn")]
PROGRAMS += [("train", ["experiment=none", "augment=copy_paste"])]
PROGRAMS += [
    (name, []) for name in ("eval", "predict", "compare", "explorer", "features", "bench", "quantize", "tracks")
]


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The texts in a module, docstrings left out, with {} for what is put in."""
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts | docs:
            yield node.lineno, node.value


@pytest.mark.slow
def test_every_setting_that_a_message_names_exists():
    """Keys below a section of the configs, and the options of groups."""
    composed = [suggest.compose(*program) for program in PROGRAMS]
    known = {key for cfg in composed for key in suggest.leaves(cfg)}
    known |= {slot.removeprefix("/") for cfg in composed for slot in cfg.hydra.runtime.choices}
    sections = {key.partition(".")[0] for key in known if "." in key}
    groups, found = suggest.options_of_groups(()), 0
    for file in sorted(PACKAGE.glob("**/*.py")):
        for line, text in messages(ast.parse(file.read_text(encoding="utf-8"))):
            for key, value in OVERRIDE.findall(text):
                where = f"{file}:{line}: {key}={value}"
                if "." in key and key.partition(".")[0] in sections:
                    found += 1
                    assert key in known, where
                if key in groups and key not in ("model", "data") and value[0] not in "{%.[":
                    assert value in groups[key], where
    assert found > 30


def answer(*overrides: str) -> str | DictConfig:
    """What `detector train` says before it looks at images; its config if nothing is wrong."""
    try:
        cfg = checked(*overrides)
        training = build(cfg.training, "training")
        for name in ("runtime", "evaluation", "schedule"):
            built = build(cfg[name], name)
        built.factor(100)
        setup.preflight(cfg, training)
    except ConfigError as error:
        return str(error)
    except Exception as error:
        return explain(error, "train", overrides)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        ("lr0=0.01", ["optimizer.lr"]),
        ("epochs=3", ["schedule.max_epochs"]),
        ("schedule.max_epochs=3", ["schedule.max_epochs"]),
        ("batch_size=4", ["training.batch_size", "evaluation.batch_size"]),
        ("imgsz=640", ["augment.max_size"]),
        ("backbone=resnet18", []),
        ("model.backbone=vit", []),
        ("schedule.warmup=2", ["schedule.peak"]),
        ("schedule.warmup=2 epochs", ["schedule.peak"]),
        ("gpu=0", ["runtime.device"]),
    ],
)
def test_what_the_answer_to_a_word_of_another_framework_says_works(shapes_tiny, typed, keys):
    """As typed with the quickstart; where there are several ways, each."""
    data = f"data.root={shapes_tiny}"
    said = answer(data, typed)
    found = re.search(r"(?:here that is|set|exactly one of them;) (.+?)(?:\. There are:.*| leaves the other)?$", said)
    assert found, said
    both = [typed] * ("exactly one" in said)
    for way in found[1].split(" or "):
        cfg = answer(data, *both, *shlex.split(way))
        assert not isinstance(cfg, str), way
        value = typed.partition("=")[2]
        ours = [str(OmegaConf.select(cfg, name, default=None)) for name in keys]
        assert {"0": "cuda:0"}.get(value, value) in ours or both or "@" in way


def test_ranks_are_answered_with_the_launcher():
    assert suggest.elsewhere("gpus", [], "2") == "; here that is torchrun --nproc-per-node=2 before the command"


def test_a_choice_is_answered_with_what_goes_with_it():
    said = suggest.elsewhere("backbone", ["backbone@model.backbone"], "vit")
    assert said == "; here that is backbone@model.backbone=vit neck@model.neck=simple_pyramid"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "iou_types=[mask]",
            r"iou_types\[0\] = 'mask': .* takes bbox, segm, boundary, keypoints, voc, attributes here$",
        ),
        (
            "iou_types=segm",
            r"iou_types = 'segm': .* takes a list of bbox, segm, boundary, keypoints, voc, attributes here$",
        ),
    ],
)
def test_words_that_are_allowed_are_told(call, typed, message):
    code, _, said = call(evaluate.main, "checkpoint=never.pt", typed)
    assert code == 2 and re.search(message, said.strip()), said
