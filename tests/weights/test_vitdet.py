"""detectron2's ViTDet models: keys by its published configs, in small, against an independent pass."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import detector
from detector.commands.import_weights import convert
from detector.config import CONFIGS, build
from detector.structures import Batch
from detector.weights import apply_presets, build_model, load_foreign, misfit, zoo
from detector.weights.loading import read_foreign
from tests.weights import reference_detectron2
from tests.weights.reference_parts import Found
from tests.weights.shapes import Shapes, detectron2_heads, weights
from tests.weights.test_reference import LIMITS, check_masks, compare, compare_first_stage, limit

pytest.importorskip("timm")
WINDOW, EVERYWHERE = 14, (1, 3)


def layout(channels=192, depth=4, heads=3, everywhere=EVERYWHERE, wide=32, cascade=False) -> dict[str, list]:
    """Shapes by detectron2's keys."""
    net, keys = "backbone.net.", Shapes()
    keys[f"{net}pos_embed"] = [1, 14 * 14 + 1, channels]
    keys |= {f"{net}patch_embed.proj.weight": [channels, 3, 16, 16], f"{net}patch_embed.proj.bias": [channels]}
    for i in range(depth):
        block = f"{net}blocks.{i}."
        for norm in ("norm1", "norm2"):
            keys.layer(f"{block}{norm}", channels)
        side = 64 if i in everywhere else WINDOW
        for table in ("rel_pos_h", "rel_pos_w"):
            keys[f"{block}attn.{table}"] = [2 * side - 1, channels // heads]
        keys.layer(f"{block}attn.qkv", 3 * channels, channels)
        keys.layer(f"{block}attn.proj", channels, channels)
        keys.layer(f"{block}mlp.fc1", 4 * channels, channels)
        keys.layer(f"{block}mlp.fc2", channels, 4 * channels)
    for name, shape in (("2.0", [channels, channels // 2]), ("2.3", [channels // 2, channels // 4])):
        keys[f"backbone.simfp_{name}.weight"], keys[f"backbone.simfp_{name}.bias"] = [*shape, 2, 2], [shape[1]]
    keys.layer("backbone.simfp_2.1", channels // 2)
    keys |= {"backbone.simfp_3.0.weight": [channels, channels // 2, 2, 2], "backbone.simfp_3.0.bias": [channels // 2]}
    for level, first, share in ((2, 4, 4), (3, 1, 2), (4, 0, 1), (5, 1, 1)):
        keys.unit(f"backbone.simfp_{level}.{first}", wide, channels // share, 1, 1, norm="layer")
        keys.unit(f"backbone.simfp_{level}.{first + 1}", wide, wide, 3, 3, norm="layer")
    detectron2_heads(keys, wide, "layer", cascade)
    return keys


NUMERICS = {
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
    "stride_in_1x1": False,
    "anchor_sizes": [[32], [64], [128], [256], [512]],
    "aspect_ratios": [[0.5, 1.0, 2.0]],
    "rpn_bbox_weights": [1.0] * 4,
    "box_bbox_weights": [10.0, 10.0, 5.0, 5.0],
    "box_pooler_resolution": 7,
    "window": WINDOW,
    "heads": 3,
}


@pytest.mark.parametrize("cascade", [False, True])
def test_same_as_detectron2(cascade):
    theirs = weights(layout(cascade=cascade))
    name = {"config": f"ViTDet/COCO/{'cascade_' * cascade}mask_rcnn_vitdet_b_FPN", "numerics": NUMERICS}
    generator = torch.Generator().manual_seed(1)  # 17 x 16 patches: windows that do not divide them
    shapes = (3, 272, 250), (3, 200, 256)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
    expected = reference_detectron2.run(name, theirs, images, LIMITS)
    model = build_model(load_foreign(theirs))
    assert tuple(model.rpn.post_nms_top_n) == (1000, 1000) and model.channel_order == "rgb"
    limit(model, reference_detectron2.limits_of(name))
    sizes = torch.tensor([image.shape[1:] for image in images])
    padded = torch.zeros(2, 3, 288, 256, dtype=torch.uint8)
    for row, image in zip(padded, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    batch = Batch(padded, sizes, sizes, torch.arange(2), torch.arange(2))
    found = compare_first_stage(model, batch, expected)
    for i, wanted in enumerate(expected.detections):
        rows = found.valid[i]
        assert rows.any()
        mine = Found(found.boxes[i, rows], found.scores[i, rows], found.labels[i, rows] - 1, found.masks[i, rows])
        check_masks(mine, wanted, compare(mine, wanted), images[i].shape[1:])


@pytest.mark.parametrize(
    "name, sizes",
    {
        "mask_rcnn_vitdet_b": {"channels": 768, "depth": 12, "heads": 12, "everywhere": (2, 5, 8, 11)},
        "mask_rcnn_vitdet_h": {"channels": 1280, "depth": 32, "heads": 16, "everywhere": (7, 15, 23, 31)},
        "cascade_mask_rcnn_vitdet_b": {"channels": 768, "depth": 12, "heads": 12, "everywhere": (2, 5, 8, 11)},
    }.items(),
)
def test_names_bring_the_model(name, sizes):
    """All keys at their published sizes have their place in the model that the name chooses."""
    shapes = layout(**sizes, wide=256, cascade="cascade" in name)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["experiment=finetune", *zoo.find(f"detectron2:{name}").settings.split()])
    with torch.device("meta"):
        (state, presets), source, *_ = read_foreign({key: torch.empty(shape) for key, shape in shapes.items()})
        config = OmegaConf.to_container(cfg.model, resolve=True)
        apply_presets(config, presets)
        model = build(config, "model", num_classes=80)
    assert source == "detectron2" and not misfit(model, state)
    assert model.backbone.global_blocks == list(sizes["everywhere"]) and model.backbone.window == WINDOW


def test_convert_pads_to_squares(tmp_path):
    torch.save({"model": weights(layout(depth=2, everywhere=(1,)))}, tmp_path / "model_final.pth")
    convert(tmp_path / "model_final.pth", tmp_path / "ours.pt")
    model = detector.load(tmp_path / "ours.pt")
    assert model.model.divisor == 1024 and model.categories[0] == "person"
    val = model.config["augment"]["val"][0]
    assert (val["size"], val["max_size"], val["interpolation"]) == (1024, 1024, "pillow")


def test_another_vit_is_refused():
    theirs = {key: value for key, value in weights(layout(depth=1)).items() if "rel_pos" not in key}
    with pytest.raises(ValueError, match=r"is not a ViT of the family: expected .* relative positions, and 192, 384"):
        build_model(load_foreign(theirs))
