"""A setting that cannot work ends the program at once, with one line that says which and why."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from detector import config
from detector.checkpoint import flatten
from detector.commands import compare, evaluate, explore, features, predict, train
from detector.commands.main import COMMANDS, main
from detector.config import CONFIGS, ConfigError, build, check, explain, suggest
from detector.config.program import check_heads, share_roi
from detector.config.schema import check_model_config, fits, near
from detector.config.suggest import ELSEWHERE, elsewhere, leaves, list_options
from tests.untrained import arguments


def compose(*overrides: str):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def complaint(*overrides: str) -> str:
    """What the program would print for these overrides, '' if nothing is wrong."""
    try:
        cfg = compose(*overrides)
    except Exception as error:
        return explain(error, "train", overrides)
    try:
        check(cfg)
    except ConfigError as error:
        return str(error)
    return ""


EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml") if path.stem != "small")
OPTIONS = [
    f"{group}={path.stem}"
    for group in ("optimizer", "schedule", "runtime", "augment", "roi", "model", "data")
    for path in sorted((CONFIGS / group).glob("*.yaml"))
    if path.stem not in ("base", "custom", "roboflow", "yolo")
]
OPTIONS += [f"class_loss@model.box_head.class_loss={path.stem}" for path in sorted(CONFIGS.glob("class_loss/*.yaml"))]


@pytest.mark.parametrize("override", [f"experiment={name}" for name in EXPERIMENTS] + OPTIONS)
def test_every_configuration_passes(override):
    assert complaint(*([] if "experiment" in override else ["experiment=none"]), override) == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "there is no 'optimizer.lrr'; did you mean optimizer.lr"),
        ("trainin.batch_size=4", "there is no 'trainin.batch_size'; did you mean training.batch_size"),
        ("model.rpn.nms_treshold=0.5", "did you mean model.rpn.nms_threshold"),
        ("roi=deformabel", "configs/roi has no 'deformabel'; did you mean deformable"),
        ("roi=pool,algin", "configs/roi has no 'algin'; did you mean align"),
        ("roi@model.boxhead.roi=pool", "did you mean roi@model.box_head.roi"),
        ("experiment=quikstart", "did you mean quickstart"),
        ("optimiser=sgd", "there is no 'optimiser'; did you mean optimizer"),
        ("lr=0.01", r"there is no 'lr'; here that is optimizer\.lr=0\.01$"),
        ("epochs=3", r"here that is schedule\.max_epochs=3 schedule\.max_iterations=null$"),
        ("batch_size=4", r"here that is training\.batch_size=4 or evaluation\.batch_size=4$"),
        ("imgsz=640", r"here that is augment=default augment\.short_edge=640 augment\.max_size=640$"),
        ("backbone=resnet18", r"no 'backbone' in this configuration; here that is backbone@model\.backbone=resnet18\."),
        ("gpus=2", "here that is torchrun --nproc-per-node=2 before the command$"),
        ("optimizer=[", "no viable alternative"),
        ("+model.backbone.wdth=8", "detector.backbone.ResNet has no 'wdth'; did you mean width?"),
        ("+optimizer.fusde=true", "optimizer.fusde: \\S+ has no 'fusde'; did you mean fused?"),
        ("model.neck.top=3", "model.neck.top = 3"),
        ("optimizer.lr=fast", "optimizer.lr = 'fast': \\S+ takes float"),
        ("optimizer.lr=null", "optimizer.lr = None"),
        ("optimizer.lr=nan", "optimizer.lr = nan"),
        ("runtime.keep=2.5", "runtime.keep = 2.5: .* takes int here, not float"),
        ("runtime.keep=true", "runtime.keep = True: .* takes int here, not bool"),
        ("training.accumulate=true", "training.accumulate = True: .* takes int here, not bool"),  # 1 == True
        ("runtime.precision=fp8", "runtime.precision = 'fp8': .*'fp32', 'bf16', 'fp16'"),
        ("model.box_head.trunk.fc_channels=[a]", "model.box_head.trunk.fc_channels = "),
        ("model.backbone=null", "model.backbone = None"),
        ("model.backbone._target_=detector.backbone.ResNt", "cannot be imported .*did you mean ResNet"),
        ("data=custom", "data.root has no value"),
        ("seed=${sed}", "Interpolation key 'sed' not found"),
    ],
)
def test_one_line_names_key_value_and_near_matches(override, message):
    found = complaint(override)
    assert re.search(message, found), found
    assert "\n" not in found.split(" There are:")[0]


def test_a_text_with_a_sign_of_hydras_is_told_its_quotes_which_work():
    found = explain(ValueError("as Hydra says it"), "compare", ["runs=x", "baseline=align, width=64"])
    (advice,) = shlex.split(found.partition("it wants quotes: ")[2])
    assert suggest.compose("compare", ["runs=x", advice]).baseline == "align, width=64"


def test_a_group_of_another_program_names_the_keys_of_this_one():
    found = explain(ValueError("as Hydra says it"), "eval", ["checkpoint=x", "data=nuclei"])
    assert "data is no choice of a file here; its keys are data.root, data.val.images, data.val.annotations" in found


def test_words_of_other_frameworks():
    """What is named instead of such a word is an override of that program, and every entry is one of some program."""
    offered = set()
    for program, chosen in (("train", ["experiment=none"]), ("eval", []), ("predict", [])):
        names = leaves(suggest.compose(program, chosen))
        keys = set(names)
        slots = ["backbone@model.backbone", "neck@model.neck", "class_loss@model.box_head.class_loss"]
        names += slots if program == "train" else []
        shown = {elsewhere(word, names) for words in ELSEWHERE.values() for word in words} - {""}
        overrides = {text for line in shown for text in line.removeprefix("; here that is ").split(" or ")}
        offered |= overrides
        together: dict[str, str] = {}  # of different keys; a choice, which brings keys of its own, stands alone
        for override in sorted(one for one in overrides if not one.startswith("torchrun")):
            pairs = dict(text.replace("...", "1").split("=", 1) for text in override.split())
            if pairs.keys() <= keys and together.keys().isdisjoint(pairs):
                together |= pairs
            else:
                suggest.compose(program, [*chosen, *map("=".join, pairs.items())])
        suggest.compose(program, [*chosen, *map("=".join, together.items())])
    assert set(ELSEWHERE) <= offered


def test_optional_argument_without_a_value_hints_at_plus():
    assert complaint("model.backbone.groups=2").endswith("add one with +model.backbone.groups=2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=0", r"training: batch_size = 0: must be at least 1"),
        ("training.accumulate=3", r"training: accumulate = 3: must be a divisor of batch_size"),
        ("training.ema_decay=1.0", r"training: ema_decay = 1.0: must be in \(0, 1\)"),
        ("training.lr_multipliers.backbone=-1", r"training: lr_multipliers.backbone = -1"),
        ("runtime.device=gpu", r"runtime: device = 'gpu': must be auto, cpu"),
        ("runtime.checkpoint_every=soon", r"runtime: checkpoint_every = 'soon'"),
        ("evaluation.metric=box.AP", r"evaluation: metric = 'box.AP'"),
        ("schedule.max_epochs=3", r"schedule: max_iterations = \d+, max_epochs = 3.*exactly one"),
        ("schedule.max_iterations=-3", r"schedule: max_iterations = -3: must be above 0"),
    ],
)
def test_ranges_are_prefixed_with_the_path(override, message):
    cfg = compose(override)
    check(cfg)
    node = override.split(".")[0]
    with pytest.raises(ConfigError, match=message):
        build(cfg[node], node)


class Box:
    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"size = {size}: must be positive")


class Shelf:
    def __init__(self, box: Box, factory: Callable[[], Box] | None = None):
        if factory:
            factory()


def test_build_names_the_nested_node():
    bad = {"_target_": "tests.config.test_config.Box", "size": 0}
    with pytest.raises(ConfigError, match=r"^shelf\.box: size = 0"):
        build({"_target_": "tests.config.test_config.Shelf", "box": bad}, "shelf")
    good = {**bad, "size": 1}
    with pytest.raises(ConfigError, match=r"^shelf: size = 0"):
        build(
            {"_target_": "tests.config.test_config.Shelf", "box": good, "factory": {**bad, "_partial_": True}}, "shelf"
        )


def offline():
    raise URLError("no route to host")


def test_a_download_that_fails_says_what_to_do():
    with pytest.raises(ConfigError, match=r"^model: .*no route to host.*get the file elsewhere and give its path"):
        build({"_target_": "tests.config.test_config.offline"}, "model")


def test_build_lets_bugs_through():
    with pytest.raises(ZeroDivisionError):
        build({"_target_": "operator.truediv", "_args_": [1, 0]}, "bug")


@pytest.mark.parametrize(
    ("value", "hint", "answer"),
    [
        (1, float, True),
        (1.0, int, False),
        (True, int, False),
        (1, bool, False),
        ("a", str, True),
        ("a", Path, True),
        (None, int | None, True),
        (None, int, False),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ([1, "a"], Sequence[int], False),
        ([[1], [2]], Sequence[Sequence[int]], True),
        ({"a": 1.5}, dict[str, float], True),
        ({"a": "b"}, dict[str, float], False),
        ("x", Literal["x", "y"], True),
        (1, Literal[True], False),
        ({"_target_": "a.b"}, Callable[[], Any], True),
        (3, Callable[[], Any], False),
        ({"_target_": "a.b"}, nn.Module, True),
        ("resnet", nn.Module, False),
        ("anything", Any, True),
    ],
)
def test_fits(value, hint, answer):
    assert fits(value, hint) is answer


COMPOSED = OmegaConf.to_container(compose(), resolve=True)


@pytest.mark.slow
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), st.lists))
def test_no_value_crashes_the_check(value):
    """Any YAML value for any setting: accepted or refused by name."""
    for path in ("optimizer.lr", "runtime.workers", "data.pad_to", "training.lr_multipliers"):
        node, key = path.split(".")
        cfg = {node: {**COMPOSED[node], key: value}}
        try:
            check(OmegaConf.create(cfg), train.train)
        except ConfigError as error:
            assert path in str(error)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "detector.config.program.subprocess.run",
        "torch.hub.load",
        "torch.nn.modules.module.warnings.warn",
        "torchvision.datasets.utils.download_url",
        "detector.model.losses.torch.load",
        "detector.checkpoint.save",
    ],
)
def test_stored_config_builds_models_only(target):
    node = {"_target_": "detector.model.TwoStageDetector", "backbone": [{"_target_": target}]}
    with pytest.raises(ConfigError, match=r"model\.backbone\.0\._target_"):
        check_model_config(node)


@pytest.mark.parametrize("roi", ["align", "deformable", "pool"])
def test_stored_config_of_our_models_is_trusted(roi):
    check_model_config(OmegaConf.to_container(compose(f"roi={roi}").model, resolve=True))


def test_near():
    assert near("bacth", ["batch", "x"]) == "; did you mean batch?"
    assert near("bacth", ["y"]) == "."


def folder_of(*overrides: str) -> str:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    try:
        return cfg.run_dir
    finally:
        HydraConfig.instance().cfg = None


def test_run_folders():
    assert folder_of() == "runs/quickstart"
    assert folder_of("runtime.workers=0", "resume=none", "experiment=quickstart") == "runs/quickstart"
    assert folder_of("seed=1", "roi=pool") == folder_of("roi=pool", "seed=1") == "runs/quickstart-roi=pool,seed=1"
    assert folder_of("roi@model.box_head.roi=warp") == "runs/quickstart-roi@model.box_head.roi=warp"
    assert folder_of("run_dir=here", "seed=1") == "here"
    assert folder_of("data.root=/a b/c") == "runs/quickstart-data.root=_a_b_c"
    long = folder_of(*(f"+training.lr_multipliers.part{i}=0.5" for i in range(20)))
    assert len(Path(long).name) <= 120
    assert long == folder_of(*(f"+training.lr_multipliers.part{i}=0.5" for i in range(20)))


@pytest.mark.parametrize(
    "override", ["optimizer.lrr=1", "roi=deformabel", "optimizer.lr=fast", "data.root=nowhere", "training.batch_size=0"]
)
def test_program_ends_with_code_2_and_no_traceback(call, override):
    code, shown, errors = call(train.main, override, "runtime.device=cpu", "run_dir=runs/never")
    assert code == 2 and not shown
    assert errors.startswith("error: ") and "Traceback" not in errors
    assert override.split("=")[0].split(".")[-1] in errors
    assert len(errors.splitlines()) <= 2


@pytest.mark.slow
def test_missing_data_set_names_the_command():
    """The program itself, in a process of its own."""
    command = [sys.executable, "train.py", "data.root=nowhere/shapes", "runtime.device=cpu", "run_dir=runs/never"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "make it with: detector shapes --out nowhere/shapes" in done.stderr
    assert not (CONFIGS.parent / "runs" / "never").exists()


COMMAND_OF = {
    "train": train.train,
    "eval": evaluate.evaluate_checkpoint,
    "predict": predict.predict_files,
    "compare": compare.compare_runs,
    "explorer": explore.explore,
    "features": features.write_features,
}


@pytest.mark.parametrize("name", COMMAND_OF)
def test_a_command_takes_what_its_config_has_and_means_the_same_by_default(name):
    """In Python and on the command line; null in all of a node is the same as no node."""
    parameters = inspect.signature(COMMAND_OF[name]).parameters
    settings = arguments(name, [])
    assert list(settings.keys() - parameters.keys()) == list(parameters.keys() - settings.keys()) == []
    for key, parameter in parameters.items():
        value, default = settings[key], parameter.default
        if default is inspect.Parameter.empty:
            assert value == "???" or name == "train", key
        elif isinstance(value, dict):
            assert default is None and set(flatten(value).values()) == {None}, key
        else:
            assert value == (list(default) if isinstance(default, tuple) else default), key


def test_configs_are_where_the_programs_look():
    assert (config.CONFIGS / "train.yaml").is_file()


def shared_roi(*overrides: str):
    cfg = config.compose("train", overrides)
    share_roi(cfg, cfg.hydra)
    return cfg


def test_settings_of_roi_reach_every_head_with_that_method():
    cfg = shared_roi("roi=deformable", "roi.gamma=0.5", "model.mask_head.roi.sampling_ratio=4")
    assert cfg.model.box_head.roi == cfg.roi and cfg.roi.gamma == 0.5
    assert cfg.model.mask_head.roi == {**cfg.roi, "sampling_ratio": 4}


def test_a_heads_own_method_and_settings_stay():
    cfg = shared_roi("roi=align", "roi.sampling_ratio=3", "roi@model.mask_head.roi=deformable")
    assert cfg.model.box_head.roi.sampling_ratio == 3
    assert cfg.model.mask_head.roi == OmegaConf.load(CONFIGS / "roi" / "deformable.yaml")
    cfg = shared_roi("roi=deformable", "roi.gamma=0.5", "model.mask_head.roi.gamma=0.2")
    assert (cfg.model.box_head.roi.gamma, cfg.model.mask_head.roi.gamma) == (0.5, 0.2)


def test_small_heads_reach_every_head_or_are_refused():
    cfg = config.compose("train", ["model=keypoint_rcnn"])  # of the quickstart, whose heads are small
    check_heads(cfg.hydra)
    assert cfg.model.keypoint_head.trunk.conv_channels == [64]
    cfg = config.compose("train", ["experiment=none", "heads=small", "model=mask_rcnn_c4"])
    with pytest.raises(ConfigError, match=r"heads=small model=mask_rcnn_c4: there are no such heads.* keypoint_rcnn"):
        check_heads(cfg.hydra)
    check_heads(config.compose("train", ["experiment=none", "heads=full", "model=mask_rcnn_c4"]).hydra)  # as it advises


def test_pictures_are_turned_only_where_they_have_no_up_and_down():
    """A set of one's own may have: digits turned by quarters cost two thirds of the AP (docs/results.md)."""
    names = [path.stem for path in (CONFIGS / "experiment").glob("*.yaml")]
    steps = {name: OmegaConf.to_yaml(compose(f"experiment={name}").get("augment") or {}) for name in names}
    turned = {name for name, text in steps.items() if "albumentations.D4" in text}
    ablations = {f"ablation_{name}" for name in ("roi", "shapes", "shapes_start", "nuclei", "nuclei_start")}
    assert turned == {"quickstart", "mask_rcnn_nuclei", "faster_rcnn_bccd", *ablations}


@pytest.mark.parametrize("arguments", [(), ("-m",)])
def test_train_gives_settings_of_roi_to_the_heads(call, shapes_tiny, arguments, tmp_path):
    """The value is wrong for the heads, and they say so."""
    settings = ["roi.sampling_ratio=many", f"run_dir={tmp_path}", f"data.root={shapes_tiny}"]
    code, out, errors = call(train.main, *arguments, *settings)
    assert code and "model.box_head.roi.sampling_ratio" in out + errors


def test_arguments_in_python_give_settings_of_roi_to_the_heads():
    model = config.arguments("train", ["experiment=none", "roi.sampling_ratio=4"])["model"]
    assert [model[head]["roi"]["sampling_ratio"] for head in ("box_head", "mask_head")] == [4, 4]


# ------------------------------------------------------------------------------------------------- a project of its own

EXAMPLE = CONFIGS.parent / "examples" / "own_roi_method"


def test_options_of_a_folder_of_ones_own(call, monkeypatch):
    """--config-dir and hydra.searchpath: found, suggested, listed by --help."""
    monkeypatch.syspath_prepend(EXAMPLE)
    for folder in (["--config-dir", EXAMPLE / "configs"], [f"hydra.searchpath=[file://{EXAMPLE / 'configs'}]"]):
        code, _, errors = call(train.main, *folder, "experiment=shifted_shapes", "roi.gama=1")
        assert code == 2 and "there is no 'roi.gama'; did you mean roi.gamma" in errors
        code, _, errors = call(train.main, *folder, "roi=shiftd")
        assert code == 2 and "did you mean shifted?" in errors
    code, _, errors = call(train.main, "roi=shifted")
    assert code == 2 and "configs/roi has no 'shifted'" in errors and "(--config-dir DIR adds your own)" in errors
    assert "shifted_shapes" in list_options("train", ["--config-dir", str(EXAMPLE / "configs")])


def test_a_file_of_ones_own_under_a_name_of_ours_is_refused(call, tmp_path):
    """Hydra takes the first that it finds, which is ours."""
    (tmp_path / "roi").mkdir()
    (tmp_path / "roi" / "align.yaml").write_text("_target_: mine.Align\n")
    code, _, errors = call(train.main, "--config-dir", tmp_path, "roi=align")
    assert code == 2 and f"{tmp_path / 'roi' / 'align.yaml'}: the detector has a config of this name" in errors


@pytest.mark.parametrize("program", [train, evaluate, predict, compare, explore, features])
def test_help_fits_a_screen(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detector", "--help"])
    monkeypatch.setenv("COLUMNS", "120")
    program.main()
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 60 and max(map(len, shown.splitlines())) <= 120
    assert shown.startswith(program.__doc__.splitlines()[0]) and "Exit codes" in shown


def test_keys_and_options_that_help_names_exist():
    shown = train.__doc__
    keys = re.findall(r"^ {4}([a-z_.]+)=", shown, re.MULTILINE)
    assert len(keys) == 10
    others = ["schedule.max_iterations", "runtime.device", "runtime.workers", "run_dir", "name", "resume"]
    assert {*keys, *others} <= {*leaves(compose())}
    listed = list_options("train", [])
    for group in ("experiment", "data", "model", "roi", "augment", "optimizer", "schedule", "heads"):
        options = re.search(rf"^    {group}= (.*?)(?=^    \S|\Z)", listed, re.MULTILINE | re.DOTALL)[1]
        assert re.findall(r"[\w-]+", options) == sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def test_every_command_that_makes_a_data_set_is_a_command():
    for path in (CONFIGS / "data").glob("*.yaml"):
        command = (OmegaConf.to_container(OmegaConf.load(path)).get("prepare") or "detector shapes").split()
        assert command[0] == "detector" and command[1] in COMMANDS, path


def test_a_command_that_there_is_not(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detector", "trian"])
    assert main() == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err
