"""What arrives in the configuration is the path that was typed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from detector.commands import validate
from detector.comparison.runs import find_folders
from detector.config import CONFIGS, as_typed, compose, literal
from detector.config import program as config_program
from detector.config.typed import PATHS

NASTY = [
    "runs/ablation/roi=pool,seed=0/best.pt",
    *("it's here.pt", '"quoted"', "'a'", "[a]/b.png", "a,b", "(1)", "f(x,y=2)", "#1", "~", "~/x", "a~b", "007", "%s"),
    *("$HOME", "${seed}", "${oc.env:HOME}", "${", "\\${a}", "a\\", "\\'", " a ", "true", "1e3", "nan", "{a: b}", "a:b"),
    *("-m", "--cfg", "猫/é.png", "שלום", "a\nb", "!x", "*", "a?b", "=", ",", "@", "./null", "<b>&|"),
]
SPLITS = [f"data.{split}.{name}" for split in ("train", "val") for name in ("images", "annotations")]
TRAINING = ["data.root", "data.cache", *SPLITS, "model.weights", "model.backbone.weights", "resume", "run_dir"]
PROGRAMS = {  # its module, and the keys that are paths
    "train": ("train", TRAINING),
    "eval": ("evaluate", ["checkpoint", "output", *SPLITS[2:]]),
    "predict": ("predict", ["checkpoint", "images", "input", "output"]),
    "compare": ("compare", ["runs", "output"]),
    "bench": ("bench", ["checkpoint", "images", "onnx", "int8", "output"]),
    "tracks": ("tracks", ["truth", "found", "output"]),
    "driving": ("driving", ["annotations", "predictions", "output"]),
    "quantize": ("quantize", ["checkpoint", "output", "onnx", "data.root", *SPLITS]),
    "explorer": ("explore", ["checkpoint", "image", "output"]),
    "features": ("features", ["checkpoint", "annotations", "images", "output"]),
    "validate": ("validate", TRAINING),
}
CODE = ("augment.", "model.", "optimizer.", "roi.", "runtime.", "schedule.", "training.")  # arguments of constructors
NO_PATHS = {  # settings that are texts, or may be, and no paths: a new one stands here or in PATHS
    "operating_point",  # f1, or a wished precision or recall
    "threshold",  # best, per_class
    *("start", "stop", "codec", "track"),  # of a video
    *("size", "ways", "froc", "tracking.appearance", "tracking.lost", "tracking.trail"),  # numbers
    *(
        "baseline",
        "data.attributes",
        "data.intensity",
        "data.page",
        "data.sampling",
        "data.shown",
        "evaluation.tiles.size",
        "max_detections",
        "data.keypoints",
        "data.max_pixels",
        "data.on_error",
        "data.pad_to",
        "data.prepare",
        "device",
    ),
    *("evaluation.evaluator", "evaluation.every", "evaluation.metric", "evaluation.sigmas", "evaluator", "head"),
    *(
        "dtype",
        "iou_types",
        "max_pixels",
        "name",
        "on_error",
        "paste",
        "precision",
        "sigmas",
        "threads",
        "workers",
        "trust",
        "weights.categories",
        "weights.source",
    ),
    *("tiles.overlap", "tiles.size", "tiles.whole", "weights.first_conv", "weights.style"),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def received(monkeypatch):
    """received(program, *arguments) -> the configurations that its work was started with."""

    def go(program: str, *arguments: str) -> list[dict]:
        found: list[dict] = []

        def take(*given, **_):
            found.append(OmegaConf.to_container(given[-1], resolve=True))
            return validate.Report()

        monkeypatch.setattr(config_program, "start", take)
        monkeypatch.setattr(validate, "report_on", take)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        try:
            importlib.import_module(f"detector.commands.{PROGRAMS[program][0]}").main()
        except SystemExit as end:
            assert not end.code
        return found

    return go


def value(cfg: dict, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_takes_paths_as_typed(received, program):
    """Each name in some key, each key with some names."""
    keys = PROGRAMS[program][1]
    assert PATHS.issuperset(keys)
    for start in range(0, len(NASTY), max(len(keys), 5)):
        typed = {key: NASTY[(start + i) % len(NASTY)] for i, key in enumerate(keys)}
        required = ["checkpoint=x"] * ("checkpoint" in keys) if "checkpoint" not in typed else []
        [cfg] = received(program, *required, *(f"{key}={name}" for key, name in typed.items()))
        assert {key: value(cfg, key) for key in keys} == typed


LETTERS = [*"ab1=,()[]{}'\"\\#~$ :;&!*?@%|<>\t\n猫é\u05d0", "${", "${seed}", "\\'", "\\${", ", ", "null", "1e3"]
NAMES = st.lists(st.sampled_from(LETTERS), min_size=1, max_size=9).map("".join)


@given(NAMES.filter(lambda name: name not in ("null", "???")))
@settings(max_examples=150)
def test_any_name_arrives(name):
    """Through Hydra's parser, the sweeper's text, OmegaConf, and a setting that refers to it."""
    cfg = OmegaConf.create({"run_dir": None, "other": "in ${run_dir}"})
    [override] = as_typed([f"run_dir={name}"])
    parsed = OverridesParser.create().parse_override(override)
    again = OverridesParser.create().parse_override(f"run_dir={parsed.get_value_element_as_str()}")
    OmegaConf.update(cfg, "run_dir", again.value())
    assert cfg.run_dir == name and cfg.other == f"in {name}"
    assert OmegaConf.create(literal({"a": [name]})).a[0] == name


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("data.root=/a/b_c.d", "data.root=/a/b_c.d"),  # as Hydra takes it itself: folders of runs keep their names
        ("model.weights=null", "model.weights=null"),
        ("+model.weights=a=b", "+model.weights='a=b'"),
        ("images=???", "images='./???'"),
        ("images=[a.png,b c.png, 'd,e']", "images=[a.png,b c.png,'d,e']"),
        ("output=", "output="),
        ("batch_size=3", "batch_size=3"),
        ("~model.weights", "~model.weights"),
        ("--cfg", "--cfg"),
    ],
)
def test_overrides(typed, expected):
    assert as_typed([typed]) == [expected]


def test_lists_are_split_where_files_end(tmp_path, received):
    """Our own names of run folders hold commas."""
    for name in ("x/roi=pool,seed=0", "x/roi=pool,seed=1", "b", "b,c", "c"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    [cfg] = received("compare", "runs=[runs/x/roi=pool,seed=0,runs/x/roi=pool,seed=1, runs/b]")
    assert cfg["runs"] == ["runs/x/roi=pool,seed=0", "runs/x/roi=pool,seed=1", "runs/b"]
    [cfg] = received("compare", "runs=[runs/b,c,'gone,too',${seed}]")  # the longest that exists; quotes hold together
    assert cfg["runs"] == ["runs/b,c", "gone,too", "${seed}"]
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
    [cfg] = received("compare", "runs=[b,c]")
    assert cfg["runs"] == ["b", "c"]  # and no pattern of one letter
    (tmp_path / "[b,c]").mkdir()
    [cfg] = received("compare", "runs=[b,c]")
    assert cfg["runs"] == "[b,c]"


def test_quotes_around_a_path_that_exists_without_them(tmp_path, received):
    (tmp_path / "a=b.pt").touch()
    [cfg] = received("eval", "checkpoint='a=b.pt'")
    assert cfg["checkpoint"] == "a=b.pt"
    (tmp_path / "'a=b.pt'").touch()
    [cfg] = received("eval", "checkpoint='a=b.pt'")
    assert cfg["checkpoint"] == "'a=b.pt'"


def test_sweeps_over_paths(tmp_path, received):
    """Commas separate, except within a path that exists; what is written is never split."""
    for name in ("a.pt", "b.pt", "roi=pool,seed=0", "data/x,y.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def values(key: str, *typed: str, program: str = "train") -> list:
        return [value(cfg, key) for cfg in received(program, "-m", *typed)]

    assert values("checkpoint", "checkpoint=a.pt,b.pt", program="eval") == ["a.pt", "b.pt"]
    assert values("checkpoint", "checkpoint=a.pt,roi=pool,seed=0", program="eval") == ["a.pt", "roi=pool,seed=0"]
    both = values("checkpoint", "checkpoint=roi=pool,seed=0", "batch_size=1,2", program="eval")
    assert both == ["roi=pool,seed=0"] * 2
    once = values(
        "data.val.annotations", "checkpoint=x", "data.root=data", "data.val.annotations=x,y.json", program="eval"
    )
    assert once == ["x,y.json"]
    names = "model.backbone.weights=null,IMAGENET1K_V1"
    assert as_typed(["-m", names]) == ["-m", names]
    folders = values("run_dir", "run_dir=runs/roi=${name},${/${seed}", "seed=3,4")
    assert folders == ["runs/roi=quickstart,${/3", "runs/roi=quickstart,${/4"]


def test_every_text_setting_is_a_path_or_known_to_be_none():
    """So that a new key that holds a path is not forgotten."""
    for program in (
        "train",
        "eval",
        "predict",
        "compare",
        "explorer",
        "features",
        "bench",
        "quantize",
        "tracks",
        "driving",
    ):
        cfg = compose(program)
        tree = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]))
        unknown = {key for key in texts(tree) if key not in PATHS | NO_PATHS and not key.startswith(CODE)}
        assert not unknown


def texts(node, path: str = ""):
    """Keys of values that are texts or null, or still to be given."""
    for key, child in node.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(child, dict):
            yield from texts(child, where)
        elif (child is None or isinstance(child, str)) and key != "_target_":
            yield where


def test_folders_named_like_patterns(tmp_path):
    for name in ("a[1]", "a1", "b*"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("", encoding="utf-8")
    assert find_folders("a[1]") == [Path("a[1]")] and find_folders("b*") == [Path("b*")]
    assert find_folders("a?") == [Path("a1")] and (CONFIGS / "train.yaml").exists()
