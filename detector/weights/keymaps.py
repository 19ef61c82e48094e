"""What other frameworks call our parameters.

A table has one line per kind of key, `theirs: ours`. `{i}` stands for a number, `{i-1}`, `{i+1}` and `{i/2}` for one
less, one more and half, `*` for the rest of the key. A key is renamed by the first line that fits the whole of it.
"""

from __future__ import annotations

import re

Table = dict[str, str]


def resnet(theirs: str, ours: str) -> Table:
    """torchvision's and mmdet's ResNets (with group norm mmdet says gn; a deformable conv2 carries its conv_offset)."""
    return {
        f"{theirs}conv1.weight": f"{ours}conv1.weight",
        f"{theirs}bn1.*": f"{ours}bn1.*",
        f"{theirs}gn1.*": f"{ours}bn1.*",
        f"{theirs}layer{{s}}.{{i}}.conv{{n}}.weight": f"{ours}layer{{s}}.{{i}}.conv{{n}}.weight",
        f"{theirs}layer{{s}}.{{i}}.conv2.conv_offset.*": f"{ours}layer{{s}}.{{i}}.conv2.offset.*",
        f"{theirs}layer{{s}}.{{i}}.bn{{n}}.*": f"{ours}layer{{s}}.{{i}}.bn{{n}}.*",
        f"{theirs}layer{{s}}.{{i}}.gn{{n}}.*": f"{ours}layer{{s}}.{{i}}.bn{{n}}.*",
        f"{theirs}layer{{s}}.{{i}}.downsample.*": f"{ours}layer{{s}}.{{i}}.downsample.*",
    }


def detectron2_resnet(theirs: str, ours: str) -> Table:
    block, layer = f"{theirs}res{{s}}.{{i}}.", f"{ours}layer{{s-1}}.{{i}}."
    return {
        f"{theirs}stem.conv1.weight": f"{ours}conv1.weight",
        f"{theirs}stem.conv1.norm.*": f"{ours}bn1.*",
        f"{block}conv{{n}}.weight": f"{layer}conv{{n}}.weight",
        f"{block}conv{{n}}.norm.*": f"{layer}bn{{n}}.*",
        f"{block}conv2_offset.*": f"{layer}conv2.offset.*",
        f"{block}shortcut.weight": f"{layer}downsample.0.weight",
        f"{block}shortcut.norm.*": f"{layer}downsample.1.*",
    }


TORCHVISION: Table = {
    **resnet("backbone.body.", "backbone."),
    "backbone.fpn.inner_blocks.{i}.{j}.*": "neck.lateral.{i}.{j}.*",
    "backbone.fpn.inner_blocks.{i}.*": "neck.lateral.{i}.0.*",  # before 0.13
    "backbone.fpn.layer_blocks.{i}.{j}.*": "neck.output.{i}.{j}.*",
    "backbone.fpn.layer_blocks.{i}.*": "neck.output.{i}.0.*",
    "rpn.head.conv.{i}.0.*": "rpn.head.conv.{i}.0.*",
    "rpn.head.conv.*": "rpn.head.conv.0.0.*",  # before 0.13
    "rpn.head.cls_logits.*": "rpn.head.objectness_logits.*",
    "rpn.head.bbox_pred.*": "rpn.head.deltas.*",
    "roi_heads.box_head.fc6.*": "box_head.trunk.fc.0.*",
    "roi_heads.box_head.fc7.*": "box_head.trunk.fc.1.*",
    "roi_heads.box_head.{i}.{j}.*": "box_head.trunk.conv.{i}.{j}.*",
    "roi_heads.box_head.{i}.*": "box_head.trunk.fc.0.*",
    "roi_heads.box_predictor.cls_score.*": "box_head.predictor.class_logits.*",
    "roi_heads.box_predictor.bbox_pred.*": "box_head.predictor.box_deltas.*",
    "roi_heads.mask_head.{i}.{j}.*": "mask_head.trunk.conv.{i}.{j}.*",
    "roi_heads.mask_head.mask_fcn{i}.*": "mask_head.trunk.conv.{i-1}.0.*",  # before 0.13
    "roi_heads.mask_predictor.conv5_mask.*": "mask_head.predictor.upsample.*",
    "roi_heads.mask_predictor.mask_fcn_logits.*": "mask_head.predictor.mask_logits.*",
    "roi_heads.keypoint_head.{i}.*": "keypoint_head.trunk.conv.{i/2}.0.*",
    "roi_heads.keypoint_predictor.kps_score_lowres.*": "keypoint_head.predictor.*",
}


def simple_pyramid() -> Table:
    """detectron2's levels 2 to 5 of ViTDet: layers that rescale, a 1 x 1 and a 3 x 3 convolution, counted together."""
    table: Table = {}
    for i, rescaling in enumerate(((0, 1, 3), (0,), (), ())):  # those with parameters
        theirs, first = f"backbone.simfp_{i + 2}.", (4, 1, 0, 1)[i]
        table |= {f"{theirs}{j}.*": f"neck.scale.{i}.{j}.*" for j in rescaling}
        for j, ours in ((first, f"neck.lateral.{i}."), (first + 1, f"neck.output.{i}.")):
            table |= {f"{theirs}{j}.norm.*": f"{ours}1.*", f"{theirs}{j}.*": f"{ours}0.*"}
    return table


def detectron2_regnet() -> Table:
    """By timm's names of RegNets."""
    block, ours = "backbone.bottom_up.s{s}.b{b}.", "backbone.model.s{s}.b{b}."
    return {
        "backbone.bottom_up.stem.conv.weight": "backbone.model.stem.conv.weight",
        "backbone.bottom_up.stem.bn.*": "backbone.model.stem.bn.*",
        f"{block}f.{{abc}}.weight": f"{ours}conv{{abc}}.conv.weight",
        f"{block}f.{{abc}}_bn.*": f"{ours}conv{{abc}}.bn.*",
        f"{block}f.se.f_ex.0.*": f"{ours}se.fc1.*",
        f"{block}f.se.f_ex.2.*": f"{ours}se.fc2.*",
        f"{block}proj.weight": f"{ours}downsample.conv.weight",
        f"{block}bn.*": f"{ours}downsample.bn.*",
    }


def swin(theirs: str, stages: str, patches: str, parts: dict[str, str]) -> Table:
    """Both frameworks' Swin transformers, which merge patches at the end of a stage, and timm at the start of the next.

    stages, patches: their words for the list of stages and for the convolution of the patches; parts: for the attention
    and for the two linear layers of a block.
    """
    block, ours = f"{theirs}{stages}.{{s}}.blocks.{{b}}.", "backbone.model.layers.{s}.blocks.{b}."
    return {
        f"{theirs}patch_embed.{patches}.*": "backbone.model.patch_embed.proj.*",
        f"{theirs}patch_embed.norm.*": "backbone.model.patch_embed.norm.*",
        f"{theirs}norm{{s}}.*": "backbone.norms.{s}.*",
        f"{theirs}{stages}.{{s}}.downsample.*": "backbone.model.layers.{s+1}.downsample.*",
        f"{block}norm{{n}}.*": f"{ours}norm{{n}}.*",
        **{f"{block}{part}.*": f"{ours}{name}.*" for name, part in parts.items()},
    }


DETECTRON2: Table = {
    "backbone.net.*": "backbone.model.*",  # a ViT, whose layers have timm's names
    **swin("backbone.bottom_up.", "layers", "proj", {name: name for name in ("attn", "mlp.fc1", "mlp.fc2")}),
    **simple_pyramid(),
    **detectron2_resnet("backbone.bottom_up.", "backbone."),
    **detectron2_resnet("backbone.", "backbone."),
    **detectron2_regnet(),
    **detectron2_resnet("roi_heads.", "box_head.trunk."),  # C4: stage 5 works on RoIs
    "backbone.fpn_lateral{s}.norm.*": "neck.lateral.{s-2}.1.*",
    "backbone.fpn_lateral{s}.*": "neck.lateral.{s-2}.0.*",
    "backbone.fpn_output{s}.norm.*": "neck.output.{s-2}.1.*",
    "backbone.fpn_output{s}.*": "neck.output.{s-2}.0.*",
    "proposal_generator.rpn_head.conv.conv{i}.*": "rpn.head.conv.{i}.0.*",  # RPN.CONV_DIMS with several entries
    "proposal_generator.rpn_head.conv.*": "rpn.head.conv.0.0.*",
    "proposal_generator.rpn_head.objectness_logits.*": "rpn.head.objectness_logits.*",
    "proposal_generator.rpn_head.anchor_deltas.*": "rpn.head.deltas.*",
    "roi_heads.box_head.conv{i}.norm.*": "box_head.trunk.conv.{i-1}.1.*",
    "roi_heads.box_head.conv{i}.*": "box_head.trunk.conv.{i-1}.0.*",
    "roi_heads.box_head.fc{i}.*": "box_head.trunk.fc.{i-1}.*",
    "roi_heads.box_predictor.cls_score.*": "box_head.predictor.class_logits.*",
    "roi_heads.box_predictor.bbox_pred.*": "box_head.predictor.box_deltas.*",
    # Cascade R-CNN
    "roi_heads.box_head.{k}.conv{i}.norm.*": "box_head.stages.{k}.trunk.conv.{i-1}.1.*",
    "roi_heads.box_head.{k}.conv{i}.*": "box_head.stages.{k}.trunk.conv.{i-1}.0.*",
    "roi_heads.box_head.{k}.fc{i}.*": "box_head.stages.{k}.trunk.fc.{i-1}.*",
    "roi_heads.box_predictor.{k}.cls_score.*": "box_head.stages.{k}.predictor.class_logits.*",
    "roi_heads.box_predictor.{k}.bbox_pred.*": "box_head.stages.{k}.predictor.box_deltas.*",
    "roi_heads.mask_head.mask_fcn{i}.norm.*": "mask_head.trunk.conv.{i-1}.1.*",
    "roi_heads.mask_head.mask_fcn{i}.*": "mask_head.trunk.conv.{i-1}.0.*",
    "roi_heads.mask_head.deconv.*": "mask_head.predictor.upsample.*",
    "roi_heads.mask_head.predictor.*": "mask_head.predictor.mask_logits.*",
    "roi_heads.keypoint_head.conv_fcn{i}.*": "keypoint_head.trunk.conv.{i-1}.0.*",
    "roi_heads.keypoint_head.score_lowres.*": "keypoint_head.predictor.*",
}


def mmdet_box_head(theirs: str, ours: str) -> Table:
    return {
        f"{theirs}shared_convs.{{i}}.conv.*": f"{ours}trunk.conv.{{i}}.0.*",
        f"{theirs}shared_convs.{{i}}.bn.*": f"{ours}trunk.conv.{{i}}.1.*",
        f"{theirs}shared_convs.{{i}}.gn.*": f"{ours}trunk.conv.{{i}}.1.*",
        f"{theirs}shared_fcs.{{i}}.*": f"{ours}trunk.fc.{{i}}.*",
        f"{theirs}fc_cls.*": f"{ours}predictor.class_logits.*",
        f"{theirs}fc_reg.*": f"{ours}predictor.box_deltas.*",
    }


def mmdet_mask_head(theirs: str, ours: str) -> Table:
    return {
        f"{theirs}convs.{{i}}.conv.*": f"{ours}trunk.conv.{{i}}.0.*",
        f"{theirs}convs.{{i}}.bn.*": f"{ours}trunk.conv.{{i}}.1.*",
        f"{theirs}convs.{{i}}.gn.*": f"{ours}trunk.conv.{{i}}.1.*",
        f"{theirs}upsample.*": f"{ours}predictor.upsample.*",
        f"{theirs}conv_logits.*": f"{ours}predictor.mask_logits.*",
    }


def mmdet_convs(theirs: str, ours: str) -> Table:
    return {f"{theirs}.{{i}}.{part}.*": f"{ours}.{{i}}.{j}.*" for part, j in (("conv", 0), ("bn", 1), ("gn", 1))}


def mmdet_groie(theirs: str, ours: str) -> Table:
    """GenericRoIExtractor: a convolution before the sum over levels, and attention by position ('0100') after it."""
    after = {
        "query_conv": "query",
        "value_conv": "value",
        "appr_geom_fc_x": "distance_x",
        "appr_geom_fc_y": "distance_y",
        "proj_conv": "project",
    }
    return {
        f"{theirs}pre_module.conv.*": f"{ours}before.0.*",
        **{f"{theirs}post_module.{theirs_}.*": f"{ours}after.{ours_}.*" for theirs_, ours_ in after.items()},
        f"{theirs}post_module.gamma": f"{ours}after.gamma",
    }


MMDET_REGNET: Table = {  # whose own names are those of a ResNet
    "backbone.conv1.*": "backbone.model.stem.conv.*",
    "backbone.bn1.*": "backbone.model.stem.bn.*",
    "backbone.layer{s}.{b}.conv{n}.weight": "backbone.model.s{s}.b{b+1}.conv{n}.conv.weight",
    "backbone.layer{s}.{b}.bn{n}.*": "backbone.model.s{s}.b{b+1}.conv{n}.bn.*",
    "backbone.layer{s}.{b}.downsample.0.*": "backbone.model.s{s}.b{b+1}.downsample.conv.*",
    "backbone.layer{s}.{b}.downsample.1.*": "backbone.model.s{s}.b{b+1}.downsample.bn.*",
}

MMDET: Table = {
    **resnet("backbone.", "backbone."),
    **swin(
        "backbone.",
        "stages",
        "projection",
        {"attn": "attn.w_msa", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"},
    ),
    **resnet("roi_head.shared_head.", "box_head.trunk."),  # C4: stage 5 works on RoIs
    **mmdet_convs("neck.lateral_convs", "neck.lateral"),
    **mmdet_convs("neck.fpn_convs", "neck.output"),
    **mmdet_convs("neck.downsample_convs", "neck.downsample"),  # PAFPN
    **mmdet_convs("neck.pafpn_convs", "neck.bottom_up"),
    **{
        f"{head}.{theirs}.*": f"rpn.head.{ours}.*"
        for head in ("rpn_head", "bbox_head")  # an RPN on its own is mmdet's "bbox_head"
        for theirs, ours in (
            ("rpn_conv.{i}.conv", "conv.{i}.0"),
            ("rpn_conv", "conv.0.0"),
            ("rpn_cls", "objectness_logits"),
            ("rpn_reg", "deltas"),
        )
    },
    **{  # deformable RoI pooling
        f"roi_head.{theirs}.roi_layers.{{l}}.{fc}.*": f"{ours}.extractor.op.offset_predictor.{{l}}.{part}.*"
        for theirs, ours in (("bbox_roi_extractor", "box_head"), ("mask_roi_extractor", "mask_head"))
        for fc, part in (("offset_fc", "offsets"), ("mask_fc", "modulation"))
    },
    **mmdet_groie("roi_head.bbox_roi_extractor.", "box_head.extractor.op."),
    **mmdet_groie("roi_head.mask_roi_extractor.", "mask_head.extractor.op."),
    **mmdet_box_head("roi_head.bbox_head.", "box_head."),
    **mmdet_box_head("roi_head.bbox_head.{k}.", "box_head.stages.{k}."),  # Cascade R-CNN
    **mmdet_mask_head("roi_head.mask_head.", "mask_head."),
    "roi_head.mask_iou_head.convs.{i}.*": "mask_head.scorer.conv.{i}.*",  # Mask Scoring R-CNN
    "roi_head.mask_head.downsample_conv.conv.*": "mask_head.coarse.downsample.*",  # PointRend
    "roi_head.mask_head.fcs.{i}.*": "mask_head.coarse.fc.{i}.*",
    "roi_head.mask_head.fc_logits.*": "mask_head.coarse.mask_logits.*",
    "roi_head.point_head.fcs.{i}.conv.*": "mask_head.points.fc.{i}.*",
    "roi_head.point_head.fc_logits.*": "mask_head.points.mask_logits.*",
    "roi_head.mask_iou_head.fcs.{i}.*": "mask_head.scorer.fc.{i}.*",
    "roi_head.mask_iou_head.fc_mask_iou.*": "mask_head.scorer.mask_iou.*",
    **mmdet_mask_head("roi_head.mask_head.{k}.", "mask_head.stages.{k}."),
    "roi_head.mask_head.{k}.conv_res.conv.*": "mask_head.flow.{k-1}.*",  # Hybrid Task Cascade
}

# Caffe2's names as Detectron wrote them; "gn" where the norm is a group norm. bn_rm, bn_riv: running mean and variance.
CAFFE2_TO_DETECTRON2: Table = {
    "conv1_w": "backbone.stem.conv1.weight",
    "res_conv1_bn_{norm}": "backbone.stem.conv1.norm.{norm}",
    "conv1_gn_{norm}": "backbone.stem.conv1.norm.{norm}",
    "res{s}_{i}_branch1_w": "backbone.res{s}.{i}.shortcut.weight",
    "res{s}_{i}_branch1_bn_{norm}": "backbone.res{s}.{i}.shortcut.norm.{norm}",
    "res{s}_{i}_branch1_gn_{norm}": "backbone.res{s}.{i}.shortcut.norm.{norm}",
    "res{s}_{i}_branch2{abc}_w": "backbone.res{s}.{i}.conv{abc}.weight",
    "res{s}_{i}_branch2{abc}_bn_{norm}": "backbone.res{s}.{i}.conv{abc}.norm.{norm}",
    "res{s}_{i}_branch2{abc}_gn_{norm}": "backbone.res{s}.{i}.conv{abc}.norm.{norm}",
}

# Keys that carry nothing the model needs: classifiers, anchors and pixel statistics, which the config holds.
UNUSED = (
    r"(backbone\.|backbone\.bottom_up\.|backbone\.body\.)?(fc|linear|pred|fc1000)[._].*",
    r"pixel_(mean|std)",
    r"proposal_generator\.anchor_generator\..*",
    r"data_preprocessor\..*",
    r"backbone\..*\.relative_position_index",  # of Swin transformers: follows from the size of the window
    r"conv1_b",  # Caffe2: zero
)

WORDS = {"norm": r"\w+", "abc": "[abc]"}
NORM = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var", "gamma": "weight", "beta": "bias"}


def compile_table(table: Table) -> list[tuple[re.Pattern, str]]:
    """The lines of a table as (regular expression, template)."""

    def to_regex(theirs: str) -> str:
        text = re.escape(theirs).replace(r"\*", "(?P<rest>.+)")
        return re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?P<{m[1]}>{WORDS.get(m[1], r'[0-9]+')})", text)

    return [(re.compile(to_regex(theirs)), ours) for theirs, ours in table.items()]


def rename(key: str, lines: list[tuple[re.Pattern, str]]) -> str | None:
    """Our name of `key`, or None if no line fits."""
    for pattern, template in lines:
        match = pattern.fullmatch(key)
        if match is None:
            continue

        def fill(slot: re.Match, match: re.Match = match) -> str:
            name, operation = slot[1], slot[2]
            value = match[name]
            if name == "norm":
                return NORM.get(value, value)
            if name == "abc":
                return str("abc".index(value) + 1)
            number = int(value)
            return str(number // 2 if operation == "/2" else number + int(operation or 0))

        return re.sub(r"\{(\w+?)([-+]\d|/2)?\}", fill, template).replace("*", match.groupdict().get("rest") or "")
    return None
