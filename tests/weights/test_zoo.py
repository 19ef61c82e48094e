"""Published weights by name: the table is sound, a name finds its file and brings its model along."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from detector.commands import train, weights
from detector.config import CONFIGS, ConfigError, build, literal
from detector.weights import apply_presets, misfit, zoo
from detector.weights.loading import load_foreign, read_foreign
from detector.weights.transfer import placed
from tests.weights.server import serving
from tests.weights.test_layouts import LAYOUTS, read_layout


def test_the_table_is_sound():
    table = zoo.published()
    assert len(table) > 150 and {row.framework for row in table.values()} == {"detectron2", "mmdet", "torchvision"}
    assert len({row.url for row in table.values()}) == len(table)
    for key, row in table.items():
        assert zoo.find(key) == zoo.find(f"{row.framework}:{row.name}") == row, key
        assert row.digest and row.url.startswith("https://") and row.digest[1] in row.url, key
        assert all(re.fullmatch(r"(\d\d\.\d)?", getattr(row, column)) for column in zoo.COLUMNS), key
        for text in row.settings.split():  # options that there are
            group, _, option = text.partition("=")
            assert "." in group.partition("@")[0] or (CONFIGS / group.partition("@")[0] / f"{option}.yaml").is_file(), (
                text
            )


def test_names_are_found_in_the_words_of_either_version():
    assert zoo.find("detectron2:COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml").box == "41.0"
    assert zoo.find("detectron2:LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x").data == "LVIS v0.5"
    for name in LAYOUTS:  # mmdetection 3's
        framework, _, rest = name.partition("-")
        assert zoo.find(f"{framework}:{rest.replace('pascal_voc_', 'PascalVOC-Detection/')}"), name
    assert zoo.find("mmdet:mask-rcnn_r50_fpn_ms-poly-3x_coco").name == "mask_rcnn_r50_fpn_mstrain-poly_3x_coco"
    assert zoo.find("torchvision:MaskRCNN_ResNet50_FPN_Weights.COCO_V1").settings == "model=mask_rcnn"
    assert zoo.find("torchvision:resnet50").url.endswith("resnet50-11ad3fa6.pth")
    assert str(zoo.find("torchvision:maskrcnn_resnet50_fpn_v2")).startswith(
        "COCO-val2017, box AP 47.4, mask AP 41.8, BSD"
    )
    assert zoo.find("weights.pth") is None
    with pytest.raises(ValueError, match=r"detectron2 has no such weights.* did you mean mask_rcnn_R_50_FPN_3x or"):
        zoo.find("detectron2:mask_rcnn_R50_FPN_3x")
    with pytest.raises(ValueError, match=r"torchvision has no such weights.* did you mean maskrcnn_resnet50_fpn"):
        zoo.find("torchvision:maskrcnn_resnet50")


@pytest.mark.parametrize(
    "layout",
    [
        "detectron2-mask_rcnn_R_50_C4_1x",
        "detectron2-mask_rcnn_R_50_FPN_3x_gn",
        "mmdet-cascade-mask-rcnn_r50_fpn_1x_coco",
        "mmdet-faster-rcnn_r50_fpn_mdpool_1x_coco",
    ],
)
def test_the_settings_make_the_model_that_the_weights_are_of(shared, layout):
    framework, _, name = layout.partition("-")
    shapes = read_layout(shared, layout)["state_dict"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        settings = zoo.find(f"{framework}:{name}").settings.split()
        cfg = compose("train", ["experiment=finetune", *settings])
    with torch.device("meta"):
        (state, presets), *_ = read_foreign({key: torch.empty(shape) for key, shape in shapes.items()}, framework)
        config = OmegaConf.to_container(cfg.model, resolve=True)
        apply_presets(config, presets)
        model = build(OmegaConf.create(literal(config)), "model", num_classes=80)
    assert not misfit(model, placed(state, model.state_dict()))


def test_a_command_line_keeps_what_it_says():
    cascade = "model.weights=mmdet:cascade-mask-rcnn_r101_fpn_1x_coco"
    body = "backbone@model.backbone=resnet101"
    assert zoo.implied([cascade]) == ["model=cascade_mask_rcnn_per_stage", body, "weights.reset_heads=true"]
    assert zoo.implied([cascade, "model=cascade_rcnn"]) == [body, "weights.reset_heads=true"]
    assert zoo.implied([cascade, "backbone@model.backbone=resnet50", "weights.strict=true"])[1:] == []
    groie = "model.weights='mmdet:faster-rcnn_r50_fpn_groie_1x_coco'"
    assert "roi.attention=mmdetection" in zoo.implied([groie])
    assert zoo.implied([groie, "roi=pool", "weights.reset_heads=false"]) == ["model=faster_rcnn"]
    assert zoo.implied(["model.weights=file.pth"]) == zoo.implied(["data=custom"]) == []
    both = "model.weights=detectron2:mask_rcnn_R_50_FPN_1x,detectron2:mask_rcnn_R_50_FPN_3x"
    assert zoo.implied([both]) == ["model=mask_rcnn", "weights.reset_heads=true"]
    with pytest.raises(ConfigError, match="these are of several models"):
        zoo.implied([both.replace("R_50_FPN_3x", "R_50_C4_3x")])
    with pytest.raises(ConfigError, match=r"model\.weights: 'mmdet:nothing': mmdet has no such weights"):
        zoo.implied(["model.weights=mmdet:nothing"])


@pytest.fixture
def mirror(shared, tmp_path, monkeypatch):
    """A mirror that has one of detectron2's files, with zeros for weights, and an empty cache."""
    name = "detectron2:mask_rcnn_R_50_FPN_1x"
    shapes = read_layout(shared, name.replace(":", "-"))["state_dict"]
    content = pickle.dumps({"model": {key: np.zeros(shape, np.float16) for key, shape in shapes.items()}})
    row = zoo.find(name)
    url = f"{row.url.rpartition('_')[0]}_{hashlib.md5(content).hexdigest()[:6]}.pkl"
    table = zoo.published() | {name: dataclasses.replace(row, url=url)}
    monkeypatch.setattr(zoo, "published", lambda: table)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with serving() as server:
        monkeypatch.setenv("DETECTOR_ZOO", server.url)
        server.files[url.removeprefix("https:/")] = content
        yield server


def test_a_name_alone_starts_a_run(mirror, call, monkeypatch, caplog, capsys):
    """`experiment=finetune model.weights=NAME`: the model, its settings, all tensors; ImageNet's are not downloaded."""
    caught = []
    monkeypatch.setattr(train, "run_training", lambda cfg, **_: sys.exit(caught.append(cfg)))
    name = "detectron2:mask_rcnn_R_50_FPN_1x"
    assert call(train.main, "experiment=finetune", f"model.weights={name}") == (0, "", "")
    cfg = caught[0]
    assert cfg.weights.reset_heads and cfg.model.mask_head and cfg.model.backbone.weights == "IMAGENET1K_V1"
    start = build(cfg.weights, "weights")
    with caplog.at_level("INFO"):
        found = start.read(cfg)
        model = build(cfg.model, "model", num_classes=2)
        kept = start.load(model, found, ["person", "gadget"])
    assert f"{name}: COCO, box AP 38.6, mask AP 35.2, CC BY-SA 3.0; model=mask_rcnn" in caplog.text
    assert "model.backbone.weights=IMAGENET1K_V1 is not read" in caplog.text
    assert cfg.model.channel_order == "bgr" and not kept.anew and kept.classes.kept == ["person"]
    assert not any(value.any() for key, value in model.state_dict().items() if key.startswith("backbone."))
    assert len(mirror.asked) == 1
    with pytest.raises(ValueError, match="source='mmdet': detectron2:mask_rcnn_R_50_FPN_1x is detectron2's"):
        load_foreign(name, source="mmdet")
    assert weights.main(["get", name]) == 0  # from the cache
    assert capsys.readouterr().out.strip().endswith(".pkl") and len(mirror.asked) == 1


def test_commands_list_and_name_what_was_meant(call, capsys):
    assert weights.main(["list", "mask", "C4"]) == 0
    printed = capsys.readouterr().out
    assert "3 files. Licences: detectron2: CC BY-SA 3.0" in printed
    assert re.search(r"detectron2:mask_rcnn_R_101_C4_3x +42.6 +36.7 +COCO +model=mask_rcnn_c4 model.backbone", printed)
    for arguments, told in {
        ("list", "masc_rcnn_R_50_FPN"): "no published weights have 'masc_rcnn_R_50_FPN'; did you mean mask_rcnn_R_50",
        ("get", "mask_rcnn_R_50_FPN_3x"): "expected framework:name, hf://owner/repo or an address; did you mean",
        ("convert", "detectron2:mask_rcnn_R50_FPN_3x", "out.pt"): "did you mean mask_rcnn_R_50_FPN_3x",
    }.items():
        assert weights.main(list(arguments)) == 2
        assert told in capsys.readouterr().err
    code, _, error = call(train.main, "model.weights=detectron2:mask_rcnn_R50_FPN_3x")
    assert code == 2 and "did you mean mask_rcnn_R_50_FPN_3x" in error
