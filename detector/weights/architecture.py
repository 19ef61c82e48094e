"""The model config that a set of weights belongs to, read off their names (ours) and shapes."""

from __future__ import annotations

import math
import re
from typing import Any

import hydra
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detector.weights.loading import ForeignWeights
from detector.weights.presets import groups, has, is_swin, is_timms, is_vit
from detector.weights.transfer import load_into

DEPTHS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
VITS = {  # timm's names by channels; heads follow from them
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
REGNETS = {  # timm's names by blocks of the stages: RegNetX, and RegNetY, which squeezes and excites
    False: {
        (1, 1, 4, 7): "regnetx_002",
        (1, 2, 7, 12): "regnetx_004",
        (1, 3, 5, 7): "regnetx_006",
        (1, 3, 7, 5): "regnetx_008",
        (2, 4, 10, 2): "regnetx_016",
        (2, 6, 15, 2): "regnetx_032",
        (2, 5, 14, 2): "regnetx_040",
        (2, 4, 10, 1): "regnetx_064",
        (2, 5, 15, 1): "regnetx_080",
        (2, 5, 11, 1): "regnetx_120",
    },
    True: {(1, 1, 4, 7): "regnety_002", (2, 6, 12, 2): "regnety_040"},
}
SWINS = {  # timm's names by channels, blocks of the third stage, and side of the windows; the other stages have two
    (96, 6, 7): "swin_tiny_patch4_window7_224",
    (96, 18, 7): "swin_small_patch4_window7_224",
    (128, 18, 7): "swin_base_patch4_window7_224",
    (192, 18, 7): "swin_large_patch4_window7_224",
    (128, 18, 12): "swin_base_patch4_window12_384",
    (192, 18, 12): "swin_large_patch4_window12_384",
}
BODIES = {"backbone.stride_in_1x1": ".ResNet", "backbone.fixed_statistics": ".TimmBackbone"}  # that have the setting
PYRAMID_SIZES, SINGLE_SIZES = [[32], [64], [128], [256], [512]], [[32, 64, 128, 256, 512]]


def model_config(state: dict[str, Tensor], presets: dict[str, Any]) -> dict[str, Any]:
    """A complete model config, to be instantiated as it is, for weights under our names.

    Raises ValueError where they are no detector or not one of the family.
    """
    if not has(state, "rpn.head."):
        raise ValueError("these weights are a backbone, not a detector: give the model config they start")
    c4, pyramid = not has(state, "backbone.layer4.") and not is_timms(state), has(state, "neck.lateral.")
    single = {"_target_": "detector.backbone.SingleLevel", "_partial_": True}
    config: dict[str, Any] = {
        "_target_": "detector.model.TwoStageDetector",
        "num_classes": 1,
        # layouts and norms as the others run them: the same sums in the same order, so that near-ties fall as there
        "channels_last": False,
        "backbone": timms(state) if is_timms(state) else backbone(state, c4, pyramid),
        "neck": neck(state) if pyramid else single,
        "rpn": {
            **part("rpn.RPN"),
            "anchor_sizes": PYRAMID_SIZES if pyramid else SINGLE_SIZES,
            "conv_channels": [state[key].shape[0] for key in sorted(fits(state, r"rpn\.head\.conv\.\d+\.0\.weight"))],
        },
    }
    if has(state, "box_head."):
        config["box_head"], config["num_classes"] = box_head(state, c4)
    if has(state, "mask_head."):
        config["mask_head"] = mask_head(state)
        if c4:
            config["share_trunk"] = True
            del config["mask_head"]["trunk"]
    if has(state, "keypoint_head."):
        config["keypoint_head"] = keypoint_head(state)
    apply_presets(config, presets)
    return config


def build_model(weights: ForeignWeights) -> nn.Module:
    """The detector that the weights are of, filled with them, in evaluation mode."""
    with SkipInit():
        model = hydra.utils.instantiate(model_config(*weights), _convert_="all")
    load_into(model, weights.state_dict)
    return model.eval()


class SkipInit(TorchFunctionMode):
    """Inside, no random numbers are drawn for weights that are loaded at once: seconds, for the largest heads."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("uniform_", "normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def part(name: str) -> dict[str, Any]:
    return {"_target_": f"detector.{name}", "_partial_": True}


def fits(state: dict[str, Tensor], pattern: str) -> list[str]:
    return [key for key in state if re.fullmatch(pattern, key)]


def widths(state: dict[str, Tensor], prefix: str) -> list[int]:
    """Output channels of `prefix`0, `prefix`1, ... in order."""
    found = {}
    for key in fits(state, re.escape(prefix) + r"(\d+)(\.0)?\.weight"):
        found[int(key[len(prefix) :].split(".")[0])] = state[key].shape[0]
    return [found[i] for i in sorted(found)]


def norm_of(state: dict[str, Tensor], prefix: str, frozen: bool = False) -> str | None:
    """The norm at `prefix`: 'group_norm' has no running statistics, and 'layer_norm' with a transformer; None if there
    is none at all."""
    if f"{prefix}.weight" not in state:
        return None
    if f"{prefix}.running_mean" not in state:
        return "layer_norm" if is_vit(state) or is_swin(state) else "group_norm"
    return "plain_frozen_batch_norm" if frozen else "batch_norm"


def backbone(state: dict[str, Tensor], c4: bool, pyramid: bool) -> dict[str, Any]:
    blocks = tuple(
        len({key.split(".")[i + 2] for key in state if key.startswith(f"{prefix}layer{stage}.")})
        for stage, prefix, i in [
            *((s, "backbone.", 0) for s in (1, 2, 3)),
            (4, "box_head.trunk.", 1) if has(state, "box_head.trunk.layer4.") else (4, "backbone.", 0),
        ]
    )
    if blocks[3] == 0:  # proposals of a C4 model: no ResNet of the family differs in stage 5 alone
        blocks = next((known for known in DEPTHS if known[:3] == blocks[:3]), blocks)
    bottleneck = has(state, "backbone.layer1.0.conv3.")
    depth = 34 if blocks == (3, 4, 6, 3) and not bottleneck else DEPTHS.get(blocks)
    if depth is None or "backbone.conv1.weight" not in state:
        raise ValueError(f"the backbone is not a ResNet of the family: {blocks} blocks in its stages")
    config: dict[str, Any] = {
        "_target_": "detector.backbone.ResNet",
        "depth": depth,
        "norm": norm_of(state, "backbone.bn1", frozen=True),
        "stages": [4] if c4 else [2, 3, 4, 5] if pyramid else [5],
        "dilate_last": not c4 and not pyramid,
    }
    if groups(state) > 1:
        width = state["backbone.layer1.0.conv2.weight"].shape[1]
        config |= {"groups": groups(state), "width_per_group": width}
    offsets = fits(state, r"backbone\.layer\d\.0\.conv2\.offset\.weight")
    if offsets:
        config["deform_stages"] = sorted(int(key[14]) + 1 for key in offsets)
        # of a 3 x 3 kernel's points x and y, and in v2 the modulation, for each group
        channels = state[offsets[0]].shape[0]
        config["deform_modulated"] = channels % 27 == 0
        config["deform_groups"] = channels // (27 if channels % 27 == 0 else 18)
    return config


def timms(state: dict[str, Tensor]) -> dict[str, Any]:
    """A backbone of timm's parts."""
    if is_vit(state):
        return vit(state)
    return swin(state) if is_swin(state) else regnet(state)


def regnet(state: dict[str, Tensor]) -> dict[str, Any]:
    squeezes = any(".se." in key for key in state)
    blocks = tuple(
        len({key.split(".")[3] for key in state if key.startswith(f"backbone.model.s{s}.")}) for s in (1, 2, 3, 4)
    )
    name = REGNETS[squeezes].get(blocks)
    if name is None:
        raise ValueError(
            f"the backbone is no RegNet{'XY'[squeezes]} of the family: {blocks} blocks in its stages, expected those "
            f"of {', '.join(REGNETS[squeezes].values())}"
        )
    return {"_target_": "detector.backbone.TimmBackbone", "name": name}


def swin(state: dict[str, Tensor]) -> dict[str, Any]:
    prefix = "backbone.model."
    blocks = [
        len({key.split(".")[5] for key in state if key.startswith(f"{prefix}layers.{s}.blocks.")}) for s in range(4)
    ]
    table = state.get(f"{prefix}layers.0.blocks.0.attn.relative_position_bias_table")
    kind = state[f"{prefix}patch_embed.proj.weight"].shape[0], blocks[2], (math.isqrt(len(table)) + 1) // 2
    if kind not in SWINS or blocks != [2, 2, blocks[2], 2]:
        raise ValueError(
            f"the backbone is no Swin transformer of the family: {kind[0]} channels, {blocks} blocks in its stages, "
            f"windows of {kind[2]}; expected {', '.join(SWINS.values())}"
        )
    return {"_target_": "detector.backbone.Swin", "name": SWINS[kind]}


def vit(state: dict[str, Tensor]) -> dict[str, Any]:
    """A ViT with the tables of relative positions by which its windows are known: ViTDet's."""
    prefix = "backbone.model."
    kernel, position = state[f"{prefix}patch_embed.proj.weight"], state.get(f"{prefix}pos_embed")
    blocks = 1 + max(int(key.split(".")[3]) for key in state if key.startswith(f"{prefix}blocks."))
    sides = [state.get(f"{prefix}blocks.{i}.attn.rel_pos_h", kernel[:0]).shape[0] // 2 + 1 for i in range(blocks)]
    name = VITS.get(kernel.shape[0])
    if name is None or position is None or f"{prefix}blocks.0.attn.rel_pos_h" not in state:
        raise ValueError(
            "the backbone is not a ViT of the family: expected a position embedding, tables of relative positions, and "
            f"{', '.join(map(str, VITS))} channels; it has {kernel.shape[0]}"
        )
    patch = kernel.shape[2]
    config = {
        "_target_": "detector.backbone.ViT",
        "name": name,
        "patch_size": patch,
        "image_size": round(position.shape[1] ** 0.5) * patch,
        "depth": blocks,
        "relative_positions": max(sides) * patch,
        "tokens": False,
    }
    if min(sides) < max(sides):
        everywhere = [i for i, side in enumerate(sides) if side == max(sides)]
        config |= {"window": min(sides), "global_blocks": everywhere}
    return config


def neck(state: dict[str, Tensor]) -> dict[str, Any]:
    if has(state, "neck.scale."):
        channels = state["neck.lateral.0.0.weight"].shape[0]
        return {**part("backbone.SimplePyramid"), "out_channels": channels, "norm": norm_of(state, "neck.output.0.1")}
    name = "PAFPN" if has(state, "neck.bottom_up.") else "FPN"
    return {
        **part(f"backbone.{name}"),
        "out_channels": state["neck.output.0.0.weight"].shape[0],
        "norm": norm_of(state, "neck.output.0.1"),
        "top": "conv" if len(widths(state, "neck.output.")) > len(widths(state, "neck.lateral.")) else "max_pool",
    }


def box_head(state: dict[str, Tensor], c4: bool) -> tuple[dict[str, Any], int]:
    cascade = has(state, "box_head.stages.")
    first = "box_head.stages.0." if cascade else "box_head."
    num_classes = state[f"{first}predictor.class_logits.weight"].shape[0] - 1
    # with a single class the two kinds have the same shape, and are the same thing
    agnostic = num_classes > 1 and state[f"{first}predictor.box_deltas.weight"].shape[0] == 4
    trunk = {
        **part("heads.FCTrunk"),
        "conv_channels": widths(state, f"{first}trunk.conv."),
        "fc_channels": widths(state, f"{first}trunk.fc."),
        "norm": norm_of(state, f"{first}trunk.conv.0.1"),
    }
    config = {
        **part("heads.CascadeBoxHead" if cascade else "heads.BoxHead"),
        "roi": roi(state, "box_head"),
        "output_size": 14 if c4 else 7,
        "trunk": stage_trunk(state) if c4 else trunk,
    }
    if not cascade:
        config["class_agnostic"] = agnostic
    return config, num_classes


def stage_trunk(state: dict[str, Tensor]) -> dict[str, Any]:
    """Stage 5 of the ResNet, applied to RoIs."""
    blocks = len({key.split(".")[3] for key in state if key.startswith("box_head.trunk.layer4.")})
    config = {
        **part("heads.ResNetTrunk"),
        "blocks": blocks,
        "norm": norm_of(state, "box_head.trunk.layer4.0.bn1", True),
    }
    if groups(state) > 1:
        config |= {"groups": groups(state), "width_per_group": state["backbone.layer1.0.conv2.weight"].shape[1]}
    return config


def mask_head(state: dict[str, Tensor]) -> dict[str, Any]:
    if has(state, "mask_head.points."):
        return {
            **part("heads.PointRendHead"),
            "roi": roi(state, "mask_head"),
            "output_size": 14,
            "fc_channels": widths(state, "mask_head.coarse.fc."),
            "point_channels": widths(state, "mask_head.points.fc."),
        }
    cascade = has(state, "mask_head.stages.")
    first = "mask_head.stages.0." if cascade else "mask_head."
    masks = state[f"{first}predictor.mask_logits.weight"].shape[0]
    trunk = {
        **part("heads.ConvTrunk"),
        "conv_channels": widths(state, f"{first}trunk.conv."),
        "norm": norm_of(state, f"{first}trunk.conv.0.1"),
    }
    config = {
        **part("heads.CascadeMaskHead" if cascade else "heads.MaskHead"),
        "roi": roi(state, "mask_head"),
        "output_size": 14,
        "trunk": trunk,
        "upsample_channels": state[f"{first}predictor.mask_logits.weight"].shape[1],
        "class_agnostic": masks == 1,
    }
    if has(state, "mask_head.flow."):
        config |= part("heads.HybridMaskHead")
    if has(state, "mask_head.scorer."):
        config |= part("heads.MaskScoringHead")
        config["score_channels"] = widths(state, "mask_head.scorer.conv.")
        config["score_fc"] = widths(state, "mask_head.scorer.fc.")
    return config


def keypoint_head(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        **part("heads.KeypointHead"),
        "roi": roi(state, "keypoint_head"),
        "output_size": 14,
        "trunk": {**part("heads.ConvTrunk"), "conv_channels": widths(state, "keypoint_head.trunk.conv.")},
        "num_keypoints": state["keypoint_head.predictor.weight"].shape[1],
    }


def roi(state: dict[str, Tensor], head: str) -> dict[str, Any]:
    if has(state, f"{head}.extractor.op.after."):  # mmdetection's GRoIE
        kernel = state[f"{head}.extractor.op.before.0.weight"].shape[2]
        op = {**part("roi.RoIAlign"), "sampling_ratio": 2, "exact": True}
        return {**part("roi.GRoIE"), "op": op, "kernel": kernel, "attention": "mmdetection"}
    prefix = f"{head}.extractor.op.offset_predictor."
    if not has(state, prefix):
        return {**part("roi.RoIAlign"), "exact": True}
    levels = len({key.split(".")[4] for key in state if key.startswith(prefix)})
    return {  # mmdetection's packs
        **part("roi.DeformableRoIPool"),
        "sampling_ratio": 0,
        "modulated": has(state, f"{prefix}0.modulation."),
        "predictor": "per_level" if levels > 1 else "shared",
        "predictor_width": state[f"{prefix}0.offsets.0.weight"].shape[0],
    }


def apply_presets(config: dict[str, Any], presets: dict[str, Any]) -> None:
    """Put the presets into a model config; those of parts that it does not have, or of another kind of backbone, are
    left out."""
    for path, value in presets.items():
        *parents, leaf = path.split(".")
        node = config
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if node is not None and not node.get("_target_", "").endswith(BODIES.get(path, "")):
            continue
        # a RoI method of the user's choice is not what the weights were trained with: it keeps its own settings
        if node is not None and (parents[-1:] != ["roi"] or node["_target_"].endswith(".RoIAlign")):
            node[leaf] = value
