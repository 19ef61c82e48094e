"""The exact layouts of published detectron2 and mmdetection models: every key finds its place, with its shape."""

from __future__ import annotations

import importlib.util
import json

import hydra
import pytest
import torch

from detector.weights import build_model, load_foreign, misfit, model_config
from detector.weights.loading import read_foreign

LAYOUTS = [
    "detectron2-cascade_mask_rcnn_R_50_FPN_1x",
    "detectron2-faster_rcnn_R_50_C4_1x",
    "detectron2-faster_rcnn_R_50_DC5_1x",
    "detectron2-faster_rcnn_R_50_FPN_1x",
    "detectron2-faster_rcnn_X_101_32x8d_FPN_3x",
    "detectron2-keypoint_rcnn_R_50_FPN_1x",
    "detectron2-mask_rcnn_R_101_FPN_3x",
    "detectron2-mask_rcnn_R_50_C4_1x",
    "detectron2-mask_rcnn_R_50_DC5_1x",
    "detectron2-mask_rcnn_R_50_FPN_1x",
    "detectron2-mask_rcnn_R_50_FPN_1x_dconv_c3-c5",
    "detectron2-mask_rcnn_R_50_FPN_3x_gn",
    "detectron2-pascal_voc_faster_rcnn_R_50_C4",
    "detectron2-rpn_R_50_FPN_1x",
    "mmdet-cascade-mask-rcnn_r50_fpn_1x_coco",
    "mmdet-cascade-rcnn_r50_fpn_1x_coco",
    "mmdet-faster-rcnn_r50-caffe-c4_ms-1x_coco",
    "mmdet-faster-rcnn_r50-caffe-dc5_1x_coco",
    "mmdet-faster-rcnn_r50_fpn_1x_coco",
    "mmdet-faster-rcnn_r50_fpn_dpool_1x_coco",
    "mmdet-faster-rcnn_r50_fpn_mdpool_1x_coco",
    "mmdet-faster-rcnn_r50_pafpn_1x_coco",
    "mmdet-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco",
    "mmdet-mask-rcnn_r50_fpn_1x_coco",
    "mmdet-rpn_r50_fpn_1x_coco",
]


def read_layout(shared, name: str) -> dict:
    folder = shared / "parity" / "layouts"
    if not folder.is_dir():
        pytest.skip(f"no published layouts: {folder} is missing")
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_key_is_used_once_and_fits(shared, name):
    layout = read_layout(shared, name)
    shapes = layout["state_dict"]
    with torch.device("meta"):
        theirs = {key: torch.empty(shape) for key, shape in shapes.items()}
        (state, presets), source, *_ = read_foreign(theirs)
        config = model_config(state, presets)
        model = hydra.utils.instantiate(config, _convert_="all")
    assert len(state) == len(theirs)
    assert not misfit(model, state)
    # parameters and buffers, as the layout counts them: frozen norms are buffers in detectron2
    assert sum(t.numel() for k, t in state.items() if not k.endswith("num_batches_tracked")) == sum(
        torch.Size(shape).numel() for key, shape in shapes.items() if not key.endswith("num_batches_tracked")
    )
    check_numerics(layout["numerics"], presets, config)
    assert source == name.split("-")[0]
    single, cascade = "C4" in name.upper() or "DC5" in name.upper(), "cascade" in name
    assert presets["rpn.pre_nms_top_n"][0] == (12000 if single else 2000)
    assert presets["rpn.post_nms_top_n"][0] == (2000 if single or cascade else 1500 if "keypoint" in name else 1000)


def model_of(shapes: dict[str, list[int]]) -> torch.nn.Module:
    """The model, without memory, that every one of mmdetection's tensors of these names and shapes has a place in."""
    with torch.device("meta"):
        (state, presets), source, *_ = read_foreign({key: torch.empty(shape) for key, shape in shapes.items()})
        model = hydra.utils.instantiate(model_config(state, presets), _convert_="all")
    assert source == "mmdet" and len(state) == len(shapes) and not misfit(model, state)
    return model


def test_mmdetections_mask_scoring(shared):
    """Its keys beside those of Mask R-CNN, as MaskIoUHead names them: convolutions, layers, an IoU per class."""
    shapes = read_layout(shared, "mmdet-mask-rcnn_r50_fpn_1x_coco")["state_dict"]
    convs = {f"convs.{i}": [256, 257 if i == 0 else 256, 3, 3] for i in range(4)}
    layers = convs | {"fcs.0": [1024, 256 * 49], "fcs.1": [1024, 1024], "fc_mask_iou": [80, 1024]}
    for name, shape in layers.items():
        shapes |= {f"roi_head.mask_iou_head.{name}.weight": shape, f"roi_head.mask_iou_head.{name}.bias": shape[:1]}
    model = model_of(shapes)
    assert type(model.mask_head).__name__ == "MaskScoringHead"


def test_mmdetections_point_rend(shared):
    """Its keys in the place of Mask R-CNN's, as CoarseMaskHead and MaskPointHead name them."""
    shapes = read_layout(shared, "mmdet-mask-rcnn_r50_fpn_1x_coco")["state_dict"]
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith("roi_head.mask_head.")}
    layers = {"mask_head.downsample_conv.conv": [256, 256, 2, 2], "mask_head.fcs.0": [1024, 256 * 49]}
    layers |= {"mask_head.fcs.1": [1024, 1024], "mask_head.fc_logits": [80 * 49, 1024]}
    layers |= {f"point_head.fcs.{i}.conv": [256, 336, 1] for i in range(3)} | {"point_head.fc_logits": [80, 336, 1]}
    for name, shape in layers.items():
        shapes |= {f"roi_head.{name}.weight": shape, f"roi_head.{name}.bias": shape[:1]}
    model = model_of(shapes)
    assert type(model.mask_head).__name__ == "PointRendHead"


def test_mmdetections_hybrid_task_cascade(shared):
    """Its keys beside Cascade Mask R-CNN's, as HTCMaskHead names them: what flows into the other two heads."""
    shapes = read_layout(shared, "mmdet-cascade-mask-rcnn_r50_fpn_1x_coco")["state_dict"]
    for k in (1, 2):
        name = f"roi_head.mask_head.{k}.conv_res.conv"
        shapes |= {f"{name}.weight": [256, 256, 1, 1], f"{name}.bias": [256]}
    model = model_of(shapes)
    assert type(model.mask_head).__name__ == "HybridMaskHead" and len(model.mask_head.flow) == 2


def check_numerics(numerics: dict, presets: dict, config: dict) -> None:
    """The settings that the layout lists are those that come along."""
    box = config.get("box_head", {})
    if "format" in numerics:  # detectron2
        assert presets["channel_order"] == numerics["format"].lower()
        assert presets["pixel_mean"] == numerics["pixel_mean"] and presets["pixel_std"] == numerics["pixel_std"]
        assert presets["backbone.stride_in_1x1"] == numerics["stride_in_1x1"]
        assert config["rpn"]["anchor_sizes"] == numerics["anchor_sizes"]
        if box:
            assert config["num_classes"] == numerics["num_classes"]
            assert box["output_size"] == numerics["box_pooler_resolution"]
            assert box["roi"]["sampling_ratio"] == numerics["box_sampling_ratio"] and box["roi"]["aligned"]
            weights = box["coder_weights"]
            assert numerics["box_bbox_weights"] == (weights if isinstance(weights[0], float) else weights[0])
        return
    preprocessor = numerics["data_preprocessor"]
    assert presets["channel_order"] == ("rgb" if preprocessor["bgr_to_rgb"] else "bgr")
    assert presets["pixel_mean"] == preprocessor["mean"] and presets["pixel_std"] == preprocessor["std"]
    assert presets["size_divisibility"] == preprocessor["pad_size_divisor"]
    assert presets["backbone.stride_in_1x1"] == (numerics["backbone_style"] == "caffe")
    generator = numerics["anchor_generator"]
    sizes = [[scale * stride for scale in generator["scales"]] for stride in generator["strides"]]
    assert config["rpn"]["anchor_sizes"] == sizes
    if box:
        heads = numerics["bbox_head"]
        heads = heads if isinstance(heads, list) else [heads]
        weights = box["coder_weights"] if len(heads) > 1 else [box["coder_weights"]]
        for head, weight in zip(heads, weights, strict=True):
            assert [1 / w for w in weight] == pytest.approx(head["bbox_coder"]["target_stds"])
        assert box["output_size"] == numerics["bbox_roi_extractor"]["roi_layer"]["output_size"]


def stand_in_model(shared, name: str) -> torch.nn.Module:
    """The model of a layout with the parity data's stand-in weights."""
    return build_model(load_foreign(stand_in_weights(shared, name), source=name.split("-")[0]))


def stand_in_weights(shared, name: str) -> dict[str, torch.Tensor]:
    """The parity data's stand-in weights of a layout, by their own keys."""
    stand_in, shapes = read_stand_in(shared), read_layout(shared, name)["state_dict"]
    return {key: torch.as_tensor(stand_in.weight(key, shape)) for key, shape in shapes.items()}


def read_stand_in(shared):
    """The parity data's module that makes every tensor from its key."""
    spec = importlib.util.spec_from_file_location("stand_in", shared / "parity" / "stand_in.py")
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    return stand_in
