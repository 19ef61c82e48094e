"""RegNets and Swin transformers of detectron2 and mmdetection: keys by their published configs, against an independent
pass."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import detector
from detector.commands.import_weights import convert
from detector.config import CONFIGS, build
from detector.structures import Batch
from detector.weights import apply_presets, architecture, build_model, load_foreign, misfit, model_config, zoo
from detector.weights.loading import read_foreign
from detector.weights.presets import BGR, RGB
from tests.tiny import small_swins
from tests.weights import reference_detectron2, reference_mmdetection
from tests.weights.reference_parts import Found
from tests.weights.shapes import Shapes, detectron2_fpn, detectron2_heads, mmdet_heads, weights
from tests.weights.test_reference import LIMITS, check_masks, compare, compare_first_stage, limit

pytest.importorskip("timm")
SCALED = {"channel_order": "bgr", "pixel_mean": RGB["pixel_mean"][::-1], "pixel_std": RGB["pixel_std"][::-1]}
SMALL = (24, 56, 152, 368), (1, 1, 4, 7), 8  # RegNet-200MF: channels and blocks of the stages, channels of a group


def detectron2_regnet(size=SMALL, squeezes=False, wide=32) -> Shapes:
    """configs/new_baselines/mask_rcnn_regnet{x,y}_4gf_dds_FPN_*_LSJ.py, sync batch norm everywhere."""
    keys, entering = Shapes(), 32
    keys.layer("backbone.bottom_up.stem.conv", 32, 3, 3, 3, bias=False)
    keys.batch_norm("backbone.bottom_up.stem.bn", 32)
    for stage, (channels, blocks) in enumerate(zip(*size[:2]), 1):
        for i in range(1, blocks + 1):
            block = f"backbone.bottom_up.s{stage}.b{i}."
            for name, shape in {"a": [entering, 1, 1], "b": [size[2], 3, 3], "c": [channels, 1, 1]}.items():
                keys.layer(f"{block}f.{name}", channels, *shape, bias=False)
                keys.batch_norm(f"{block}f.{name}_bn", channels)
            if squeezes:
                keys.layer(f"{block}f.se.f_ex.0", round(entering / 4), channels, 1, 1)
                keys.layer(f"{block}f.se.f_ex.2", channels, round(entering / 4), 1, 1)
            if i == 1:
                keys.layer(f"{block}proj", channels, entering, 1, 1, bias=False)
                keys.batch_norm(f"{block}bn", channels)
            entering = channels
    detectron2_fpn(keys, size[0], wide, norm="batch")
    detectron2_heads(keys, wide, "batch")
    return keys


def mmdet_regnet(size=SMALL, cascade=False, wide=32) -> Shapes:
    """configs/regnet, whose RegNetX has the names of a ResNet."""
    keys, entering = Shapes(), 32
    keys.layer("backbone.conv1", 32, 3, 3, 3, bias=False)
    keys.batch_norm("backbone.bn1", 32)
    for stage, (channels, blocks) in enumerate(zip(*size[:2]), 1):
        for i in range(blocks):
            block = f"backbone.layer{stage}.{i}."
            for n, shape in enumerate(([entering, 1, 1], [size[2], 3, 3], [channels, 1, 1]), 1):
                keys.layer(f"{block}conv{n}", channels, *shape, bias=False)
                keys.batch_norm(f"{block}bn{n}", channels)
            if i == 0:
                keys.layer(f"{block}downsample.0", channels, entering, 1, 1, bias=False)
                keys.batch_norm(f"{block}downsample.1", channels)
            entering = channels
    mmdet_heads(keys, size[0], wide, cascade)
    return keys


def swin_body(keys: Shapes, stages: str, words: tuple[str, str, str, str], channels: int, depths) -> None:
    """Windows of 7 patches, 32 channels a head. words: for the patches' convolution, the attention, and the two linear
    layers."""
    (patches, attention, first, second), body = words, stages.rpartition(".")[0]
    keys.layer(f"{body}.patch_embed.{patches}", channels, 3, 4, 4)
    keys.layer(f"{body}.patch_embed.norm", channels)
    for stage, depth in enumerate(depths):
        wide = channels << stage
        for i in range(depth):
            block = f"{stages}.{stage}.blocks.{i}."
            keys.layer(f"{block}norm1", wide)
            keys.layer(f"{block}norm2", wide)
            keys[f"{block}{attention}.relative_position_bias_table"] = [13 * 13, wide // 32]
            keys[f"{block}{attention}.relative_position_index"] = [49, 49]
            keys.layer(f"{block}{attention}.qkv", 3 * wide, wide)
            keys.layer(f"{block}{attention}.proj", wide, wide)
            keys.layer(f"{block}{first}", 4 * wide, wide)
            keys.layer(f"{block}{second}", wide, 4 * wide)
        if stage < 3:
            keys.layer(f"{stages}.{stage}.downsample.reduction", 2 * wide, 4 * wide, bias=False)
            keys.layer(f"{stages}.{stage}.downsample.norm", 4 * wide)
        keys.layer(f"{body}.norm{stage}", wide)


def detectron2_swin(channels=32, depths=(2, 2, 2, 2), wide=32) -> Shapes:
    """projects/ViTDet/configs/COCO/cascade_mask_rcnn_swin_{b,l}_in21k_50ep.py"""
    keys = Shapes()
    swin_body(keys, "backbone.bottom_up.layers", ("proj", "attn", "mlp.fc1", "mlp.fc2"), channels, depths)
    detectron2_fpn(keys, [channels << i for i in range(4)], wide, norm="layer")
    detectron2_heads(keys, wide, "layer", cascade=True)
    return keys


def mmdet_swin(channels=32, depths=(2, 2, 2, 2), wide=32) -> Shapes:
    """configs/swin"""
    keys = Shapes()
    words = "projection", "attn.w_msa", "ffn.layers.0.0", "ffn.layers.1"
    swin_body(keys, "backbone.stages", words, channels, depths)
    mmdet_heads(keys, [channels << i for i in range(4)], wide)
    return keys


def of_detectron2(config: str, pixels: dict) -> dict:
    """What `reference_detectron2.run` wants to know of a layout."""
    numerics = {
        **{"pixel_mean": pixels["pixel_mean"], "pixel_std": pixels["pixel_std"], "stride_in_1x1": False},
        **{"anchor_sizes": [[32], [64], [128], [256], [512]], "aspect_ratios": [[0.5, 1.0, 2.0]]},
        **{"rpn_bbox_weights": [1.0] * 4, "box_bbox_weights": [10.0, 10.0, 5.0, 5.0], "box_pooler_resolution": 7},
    }
    return {"config": config, "numerics": numerics}


def of_mmdet(config: str, pixels: dict) -> dict:
    """What `reference_mmdetection.run` wants to know of a layout."""
    numerics = {
        "data_preprocessor": {
            **{"mean": pixels["pixel_mean"], "std": pixels["pixel_std"], "pad_size_divisor": 32},
            "bgr_to_rgb": pixels["channel_order"] == "rgb",
        },
        "backbone_style": "pytorch",
        "anchor_generator": {"strides": [4, 8, 16, 32, 64], "ratios": [0.5, 1.0, 2.0], "scales": [8]},
        "bbox_head": {"bbox_coder": {"target_stds": (0.1, 0.1, 0.2, 0.2)}},
        "bbox_roi_extractor": {"roi_layer": {"output_size": 7}},
    }
    return {"config": config, "numerics": numerics}


@pytest.fixture
def small_swin(monkeypatch):
    """Swin transformers of another size, and a name for it."""
    small_swins(monkeypatch)
    monkeypatch.setitem(architecture.SWINS, (32, 2, 7), "swin_tiny_patch4_window7_224")


@pytest.mark.parametrize(
    "config, shapes, pixels",
    [
        ("detectron2/mask_rcnn_regnetx_4gf_dds_FPN_100ep_LSJ", detectron2_regnet(), SCALED),
        ("detectron2/mask_rcnn_regnety_4gf_dds_FPN_100ep_LSJ", detectron2_regnet(squeezes=True), SCALED),
        ("detectron2/cascade_mask_rcnn_swin_b_in21k_50ep_FPN", detectron2_swin(), RGB),
        ("mmdet/mask-rcnn_regnetx-400MF_fpn_ms-poly-3x_coco", mmdet_regnet(), SCALED),
        ("mmdet/mask-rcnn_swin-t-p4-w7_fpn_1x_coco", mmdet_swin(), RGB),
    ],
)
def test_same_as_the_framework(config, shapes, pixels, small_swin):
    theirs, detectron2 = weights(shapes, gain=1.0), config.startswith("detectron2")
    reference = reference_detectron2 if detectron2 else reference_mmdetection
    layout = (of_detectron2 if detectron2 else of_mmdet)(config, pixels)
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([[90, 135], [96, 81]])  # windows of 7 patches divide the maps at no stride
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes.tolist()]
    ordered = detectron2 and pixels is RGB  # all others are given BGR
    expected = reference.run(layout, theirs, [image if ordered else image.flip(0) for image in images], LIMITS)
    model = build_model(load_foreign(theirs))
    assert model.channel_order == pixels["channel_order"]
    limit(model, reference.limits_of(layout))
    padded = torch.zeros(2, 3, 96, 160, dtype=torch.uint8)
    for row, image in zip(padded, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    found = compare_first_stage(model, Batch(padded, sizes, sizes, torch.arange(2), torch.arange(2)), expected)
    for i, wanted in enumerate(expected.detections):
        rows = found.valid[i]
        masks = None if found.masks is None else found.masks[i, rows]
        mine = Found(found.boxes[i, rows], found.scores[i, rows], found.labels[i, rows] - 1, masks)
        pairs = compare(mine, wanted)
        assert len(pairs) and (masks is not None) == (wanted.masks is not None) == ("mask" in config)
        if masks is not None:
            check_masks(mine, wanted, pairs, images[i].shape[1:])


def detectron2_resnet(blocks: list[int]) -> Shapes:
    """configs/new_baselines/mask_rcnn_R_{50,101}_FPN_*_LSJ.py"""
    keys, entering = Shapes(), 64

    def unit(name: str, *shape: int) -> None:
        keys.layer(name, *shape, bias=False)
        keys.batch_norm(f"{name}.norm", shape[0])

    unit("backbone.bottom_up.stem.conv1", 64, 3, 7, 7)
    for stage, count in enumerate(blocks, 2):
        inner = 16 << stage
        for i in range(count):
            block = f"backbone.bottom_up.res{stage}.{i}."
            unit(f"{block}conv1", inner, entering, 1, 1)
            unit(f"{block}conv2", inner, inner, 3, 3)
            unit(f"{block}conv3", 4 * inner, inner, 1, 1)
            if i == 0:
                unit(f"{block}shortcut", 4 * inner, entering, 1, 1)
            entering = 4 * inner
    detectron2_fpn(keys, [256, 512, 1024, 2048], 256, norm="batch")
    detectron2_heads(keys, 256, "batch")
    return keys


def with_masks(keys: Shapes) -> Shapes:
    """mmdetection's cascades have a mask head for each stage."""
    for stage in range(3):
        head = f"roi_head.mask_head.{stage}."
        for i in range(4):
            keys.layer(f"{head}convs.{i}.conv", 256, 256, 3, 3)
        keys |= {f"{head}upsample.weight": [256, 256, 2, 2], f"{head}upsample.bias": [256]}
        keys.layer(f"{head}conv_logits", 80, 256, 1, 1)
    return keys


REGNETY_4GF, REGNETX_400MF = ((128, 192, 512, 1088), (2, 6, 12, 2), 64), ((32, 64, 160, 384), (1, 2, 7, 12), 16)


@pytest.mark.parametrize(
    "name, shapes, pixels",
    [
        ("detectron2:mask_rcnn_R_101_FPN_400ep_LSJ", detectron2_resnet([3, 4, 23, 3]), BGR),
        ("detectron2:mask_rcnn_regnety_4gf_dds_FPN_100ep_LSJ", detectron2_regnet(REGNETY_4GF, True, wide=256), SCALED),
        ("detectron2:cascade_mask_rcnn_swin_l_in21k", detectron2_swin(192, (2, 2, 18, 2), wide=256), RGB),
        (
            "mmdet:cascade-mask-rcnn_regnetx-400MF_fpn_ms-3x_coco",
            with_masks(mmdet_regnet(REGNETX_400MF, cascade=True, wide=256)),
            SCALED,
        ),
        ("mmdet:mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco", mmdet_swin(96, (2, 2, 18, 2), wide=256), RGB),
    ],
)
def test_names_bring_the_model(name, shapes, pixels):
    """All keys at their published sizes have their place in the model that the name chooses, and in the one that the
    weights tell by themselves."""
    framework = name.partition(":")[0]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["experiment=finetune", *zoo.find(name).settings.split()])
    with torch.device("meta"):
        (state, presets), source, *_ = read_foreign({key: torch.empty(shape) for key, shape in shapes.items()})
        config = OmegaConf.to_container(cfg.model, resolve=True)
        apply_presets(config, presets)
        model = build(config, "model", num_classes=80)
        read = model_config(state, presets)
    assert source == framework and not misfit(model, state)
    assert {key: presets[key] for key in pixels} == pixels
    assert presets["rpn.post_nms_top_n"] == [2000 if "mmdet:cascade" in name else 1000, 1000]
    body, told = config["backbone"], read["backbone"]
    assert (body["_target_"], body.get("name", "").partition(".")[0]) == (told["_target_"], told.get("name", ""))
    trunk = model.box_head.trunk if hasattr(model.box_head, "trunk") else model.box_head.stages[0].trunk
    assert len(trunk.conv) == len(widths := read["box_head"]["trunk"]["conv_channels"]) and widths in ([], [256] * 4)
    assert bool(model.backbone.fixed_statistics if "regnet" in name else False) == (
        "mmdet:" in name and "regnet" in name
    )


def test_convert_pads_detectron2s_swin_to_squares(tmp_path, small_swin):
    torch.save({"model": weights(detectron2_swin())}, tmp_path / "model_final.pth")
    convert(tmp_path / "model_final.pth", tmp_path / "ours.pt")
    config = detector.checkpoint.load(tmp_path / "ours.pt")["config"]
    assert config["data"]["pad_multiple"] == 1024 and config["model"]["size_divisibility"] is None
    assert [config["augment"]["val"][0][key] for key in ("size", "max_size")] == [1024, 1024]


def test_settings_in_the_file_win():
    """mmdetection's RegNets of the mstrain-poly recipes were trained on RGB, which their config text says."""
    text = "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)"
    _, presets = load_foreign({"state_dict": weights(mmdet_regnet()), "meta": {"config": text}})
    assert {key: presets[key] for key in RGB} == RGB and presets["backbone.fixed_statistics"]


@pytest.mark.parametrize("body, theirs", [("convnext_tiny", "stride_in_1x1"), ("resnet50", "fixed_statistics")])
def test_settings_of_one_kind_of_body_are_none_of_another(body, theirs):
    """Weights that start a model with another backbone (weights.strict=false) leave its settings alone."""
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / "backbone" / f"{body}.yaml"))
    apply_presets({"backbone": config}, {f"backbone.{theirs}": True})
    assert theirs not in config


def test_other_bodies_are_refused():
    deformable = mmdet_regnet() | {"backbone.layer2.0.conv2.conv_offset.weight": [27, 56, 3, 3]}
    with pytest.raises(ValueError, match="mmdet weights: a RegNet with deformable convolutions, which timm's RegNets"):
        load_foreign(weights(deformable))
    with pytest.raises(
        ValueError, match=r"no RegNetX of the family: \(1, 1, 4, 3\) blocks .* regnetx_004, regnetx_006"
    ):
        build_model(load_foreign(weights(mmdet_regnet((SMALL[0], (1, 1, 4, 3), 8)))))
    with pytest.raises(ValueError, match=r"no Swin .*: 32 channels, \[2, 2, 4, 2\] blocks .* of 7; expected swin_tiny"):
        build_model(load_foreign(weights(mmdet_swin(32, (2, 2, 4, 2)))))
