"""The numbers beside the weights: what each framework does a little differently, by the model config's own keys.

Facts from the sources and model-zoo configs of torchvision (`models/detection`), detectron2 0.6 and mmdetection 3.3.
What all three share is the default of our configs: boxes grow by at most 1000 / 16 in a step, NMS at 0.7 and 0.5,
scores from 0.05, 100 detections, deltas weighted by 10, 10, 5, 5 (in mmdetection: standard deviations 0.1 and 0.2).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

RGB_MEAN, RGB_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
BGR = {"channel_order": "bgr", "pixel_mean": RGB_MEAN[::-1], "pixel_std": [1.0, 1.0, 1.0]}  # Caffe's
RGB = {"channel_order": "rgb", "pixel_mean": RGB_MEAN, "pixel_std": RGB_STD}
SCALED_STD = RGB_STD[::-1]  # of the BGR images that detectron2's X-101 and all RegNets are trained on

CASCADE_WEIGHTS = {
    "detectron2": [[10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0], [30.0, 30.0, 15.0, 15.0]],
    "mmdet": [
        [1 / s for s in stds] for stds in ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    ],
}
LEVEL_RULE = {"torchvision": "torchvision", "detectron2": "detectron2", "mmdet": "mmdetection"}


def presets_of(source: str, state: dict[str, Tensor], style: str | None = None) -> dict[str, Any]:
    """Numeric settings {key of the model config: value} for weights under our names.

    Args:
        source: 'torchvision', 'detectron2' or 'mmdet'.
        style: 'caffe' or 'pytorch' where the weights alone do not tell; None guesses as `guess_style` says.
    """
    style = style or guess_style(source, state)
    squares = in_squares(source, state)
    presets: dict[str, Any] = dict(BGR if style == "caffe" else RGB)
    # models whose strides are PyTorch's, but whose backbone was trained with Caffe2 on BGR images
    resnext = groups(state) > 1 and (source == "detectron2" or state["backbone.layer1.0.conv2.weight"].shape[1] == 8)
    regnet = is_regnet(state)
    if (source == "detectron2" and not squares) or (source == "mmdet" and (resnext or regnet or group_norm(state))):
        presets |= BGR
        if resnext or regnet:
            presets["pixel_std"] = SCALED_STD
    if not is_timms(state):
        presets["backbone.stride_in_1x1"] = style == "caffe"
    if regnet and source == "mmdet":
        presets["backbone.fixed_statistics"] = True
    if has(state, "box_head.trunk.layer4."):
        presets["box_head.trunk.stride_in_1x1"] = style == "caffe"
    if not any(key.startswith("rpn.") for key in state):
        return presets  # a backbone alone

    pyramid, heads = (
        has(state, "neck.lateral."),
        [h for h in ("box_head", "mask_head", "keypoint_head") if has(state, h)],
    )
    cascade = has(state, "box_head.stages.") and not squares
    trained_on = 2000 if source == "torchvision" or not pyramid or cascade else 1000
    if source == "detectron2" and "keypoint_head" in heads:
        trained_on = 1500
    presets |= {
        # windows reach into the padding: data.pad_multiple says how large the canvas is
        "size_divisibility": None if squares else 1 if source == "detectron2" and not pyramid else 32,
        "rpn.anchor_rounding": source == "torchvision",
        "rpn.pre_nms_top_n": [2000, 1000] if pyramid else [12000, 6000],
        "rpn.post_nms_top_n": [trained_on, 1000],
        "rpn.nms_threshold": 0.7,
        "rpn.min_size": 1e-3 if source == "torchvision" else 0.0,
        "rpn.rank_by": "probability" if source == "mmdet" else "logit",
        "rpn.clamp_shrinking": source == "mmdet",
    }
    if not heads and not pyramid:  # proposals are the result: more of them go through
        presets |= {"rpn.pre_nms_top_n": [12000, 12000], "rpn.post_nms_top_n": [2000, 2000]}
    elif not heads:
        presets |= {"rpn.pre_nms_top_n": [2000, 2000]} if source == "mmdet" else {"rpn.post_nms_top_n": [1000, 2000]}
    point_rend = has(state, "mask_head.points.")
    for head in heads:
        if head == "mask_head" and point_rend:  # the finest level alone, read at the centres of bins
            presets |= {"mask_head.roi.sampling_ratio": 1, "mask_head.roi.aligned": True}
            continue
        presets[f"{head}.level_rule"] = LEVEL_RULE[source]
        if not has(state, f"{head}.extractor.op."):  # RoI Align
            presets[f"{head}.roi.sampling_ratio"] = 2 if source == "torchvision" else 0
            presets[f"{head}.roi.aligned"] = source != "torchvision"
    if "box_head" in heads:
        presets |= {
            "box_head.score_threshold": 0.05,
            "box_head.nms_threshold": 0.5,
            "box_head.detections_per_image": 100,
            "box_head.min_size": {"torchvision": 1e-2, "detectron2": 0.0, "mmdet": -1.0}[source],
            "box_head.min_size_last": source == "detectron2",
            "box_head.clamp_shrinking": source == "mmdet",
            "box_head.nms": "mmcv" if source == "mmdet" else "hard",
        }
        if has(state, "box_head.stages."):
            presets["box_head.coder_weights"] = CASCADE_WEIGHTS[source]
            presets["box_head.average"] = "logit" if source == "mmdet" else "probability"
        else:
            presets["box_head.coder_weights"] = [10.0, 10.0, 5.0, 5.0]
    if "keypoint_head" in heads:
        presets["keypoint_head.score"] = "logit" if source == "torchvision" else "probability"
    return presets


# settings of data.ResizeShortestEdge: how each framework resizes images; torchvision cuts off fractions of the sides;
# 1 is bilinear, without averaging
RESIZING: dict[str, dict[str, str | int]] = {
    "torchvision": {"rounding": "floor", "interpolation": 1},
    "detectron2": {"interpolation": "pillow"},
    "mmdet": {"interpolation": 1},
    "detector": {},
}


def guess_style(source: str, state: dict[str, Tensor]) -> str:
    """Where the strides of bottlenecks are, and with it how images are normalised.

    detectron2's ResNets are Caffe's (MSRA) but for ResNeXt and group norm; other bodies have no style.
    mmdetection's published models are PyTorch's but for those without a pyramid (C4, DC5) and those whose norms have no
    statistics.
    """
    if source == "detectron2":
        return "pytorch" if groups(state) > 1 or group_norm(state) or is_timms(state) else "caffe"
    if source == "mmdet" and has(state, "rpn."):
        # Caffe's norms came without statistics, and mmdetection keeps those frozen at a mean of 0
        means = [value for key, value in state.items() if key.endswith("running_mean") and not value.is_meta]
        if not has(state, "neck.") or (means and not any(mean.any() for mean in means)):
            return "caffe"
    return "pytorch"


def has(state: dict[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state)


def is_timms(state: dict[str, Tensor]) -> bool:
    """Whether the backbone is made of timm's parts."""
    return has(state, "backbone.model.")


def is_vit(state: dict[str, Tensor]) -> bool:
    """Whether the backbone is a plain ViT."""
    return has(state, "backbone.model.blocks.")


def is_swin(state: dict[str, Tensor]) -> bool:
    """Whether the backbone is a Swin transformer."""
    return has(state, "backbone.model.layers.")


def is_regnet(state: dict[str, Tensor]) -> bool:
    """Whether the backbone is a RegNet."""
    return has(state, "backbone.model.s1.")


def in_squares(source: str, state: dict[str, Tensor]) -> bool:
    """Whether images are padded to squares of 1024 px, as for the models of the ViTDet paper, which take RGB."""
    return source == "detectron2" and (is_vit(state) or is_swin(state))


def group_norm(state: dict[str, Tensor]) -> bool:
    """Whether the backbone's norms have no running statistics."""
    return "backbone.bn1.weight" in state and "backbone.bn1.running_mean" not in state


def groups(state: dict[str, Tensor]) -> int:
    """Groups of the bottlenecks' 3 x 3 convolutions; 1 where there are no bottlenecks."""
    inner, narrow = state.get("backbone.layer1.0.conv2.weight"), state.get("backbone.layer1.0.conv1.weight")
    return narrow.shape[0] // inner.shape[1] if inner is not None and narrow is not None else 1
