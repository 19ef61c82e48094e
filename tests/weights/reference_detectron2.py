"""What detectron2 0.6 computes at inference, from its own keys: Faster, Mask, Cascade and Keypoint R-CNN and RPN, with
FPN, C4 and DC5, of ResNets, RegNets, ViTs and Swin transformers. Written from its sources' behaviour; it stands in for
the framework in tests.

Dimensions: N images, A anchors per cell, R RoIs, K classes, D detections, P keypoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from tests.weights import reference_parts as parts
from tests.weights.reference_parts import Found, Limits, Outputs, Weights

CASCADE = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
PARTS = {"norm": "conv{}.norm", "conv": "conv{}"}


def neck_of(layout: dict) -> str:
    return next(neck for neck in ("C4", "DC5", "FPN") if neck in layout["config"])


def limits_of(layout: dict) -> Limits:
    """The published config's."""
    if neck_of(layout) != "FPN":
        return Limits(6000, 1000)
    return Limits(1000, 2000 if "/rpn_" in layout["config"] else 1000)


@torch.no_grad()
def run(layout: dict, w: Weights, images: list[Tensor], limits: Limits | None = None) -> Outputs:
    """Features, proposals and detections of BGR images, uint8 [3, H, W]."""
    limits, neck, numerics = limits or limits_of(layout), neck_of(layout), layout["numerics"]
    sizes = [tuple(image.shape[1:]) for image in images]
    batch = preprocess(images, numerics, multiple=32 if neck == "FPN" else 1)
    caffe = numerics["stride_in_1x1"]
    if "backbone.net.pos_embed" in w:
        features = simple_pyramid(w, plain_vit(w, batch, numerics))
    else:
        maps = body(w, batch, caffe, dilated=neck == "DC5")
        features = pyramid(w, maps) if neck == "FPN" else maps[-1:]
    strides = [4, 8, 16, 32, 64] if neck == "FPN" else [16]
    proposals = propose(w, features, strides, numerics, sizes, limits)
    if "/rpn_" in layout["config"]:
        return Outputs(features, proposals, [])
    maps, strides = (features[:4], strides[:4]) if neck == "FPN" else (features, strides)
    detections = cascade if "cascade" in layout["config"] else detect
    found = detections(w, maps, strides, proposals, numerics, sizes, limits)
    return Outputs(features, proposals, [with_shapes(w, maps, strides, f, i, caffe) for i, f in enumerate(found)])


def preprocess(images: list[Tensor], numerics: dict, multiple: int) -> Tensor:
    """Normalised, then padded with zeros below and to the right: C4 and DC5 models only as far as the largest image."""
    mean, std = (torch.tensor(numerics[key])[:, None, None] for key in ("pixel_mean", "pixel_std"))
    height, width = (-(-max(i.shape[d] for i in images) // multiple) * multiple for d in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    for row, image in zip(batch, images):
        row[:, : image.shape[1], : image.shape[2]] = (image - mean) / std
    return batch


def residual_stage(w: Weights, prefix: str, x: Tensor, stride: int, dilation: int, caffe: bool) -> Tensor:
    names = {"offset": "conv2_offset", "shortcut": "shortcut", "shortcut_norm": "shortcut.norm", "squeeze": "none"}
    names |= {f"{part}{i}": name.format(i) for part, name in PARTS.items() for i in (1, 2, 3)}
    block = 0
    while f"{prefix}.{block}.conv1.weight" in w:

        def at(part: str, block: int = block) -> str:
            return f"{prefix}.{block}.{names[part]}"

        x = parts.bottleneck(w, at, x, stride if block == 0 else 1, dilation, caffe)
        block += 1
    return x


def stages(w: Weights, prefix: str, x: Tensor, last: int, caffe: bool, dilated: bool = False) -> list[Tensor]:
    """Maps of res2 to `last`; a dilated res5 does not stride, and all its 3 x 3 convolutions have dilation 2."""
    x = parts.norm(w, f"{prefix}stem.conv1.norm", parts.conv(w, f"{prefix}stem.conv1", x, 2)).relu()
    x, maps = F.max_pool2d(x, 3, 2, 1), []
    for stage in range(2, last + 1):
        stride, dilation = (1, 2) if dilated and stage == 5 else (1 if stage == 2 else 2, 1)
        x = residual_stage(w, f"{prefix}res{stage}", x, stride, dilation, caffe)
        maps.append(x)
    return maps


def body(w: Weights, x: Tensor, caffe: bool, dilated: bool) -> list[Tensor]:
    """Maps of the stages, whatever makes them."""
    if "backbone.bottom_up.stem.conv.weight" in w:
        return regnet(w, x)
    if "backbone.bottom_up.norm0.weight" in w:
        return swin(w, x)
    if "backbone.bottom_up.stem.conv1.weight" in w:
        return stages(w, "backbone.bottom_up.", x, 5, caffe)
    return stages(w, "backbone.", x, 5 if dilated else 4, caffe, dilated)


def regnet(w: Weights, x: Tensor) -> list[Tensor]:
    """Every stage halves the map, and so does the stem."""
    stem, maps = "backbone.bottom_up.stem", []
    x = parts.norm(w, f"{stem}.bn", parts.conv(w, f"{stem}.conv", x, 2)).relu()
    names = {"shortcut": "proj", "shortcut_norm": "bn", "offset": "none", "squeeze": "f.se.f_ex.0"}
    names |= {"excite": "f.se.f_ex.2"}
    names |= {f"conv{i}": f"f.{c}" for i, c in enumerate("abc", 1)} | {
        f"norm{i}": f"f.{c}_bn" for i, c in enumerate("abc", 1)
    }
    for stage in range(1, 5):
        block = 1
        while f"backbone.bottom_up.s{stage}.b{block}.f.a.weight" in w:

            def at(part: str, prefix: str = f"backbone.bottom_up.s{stage}.b{block}.") -> str:
                return prefix + names[part]

            x, block = parts.bottleneck(w, at, x, 2 if block == 1 else 1, 1, caffe=False), block + 1
        maps.append(x)
    return maps


def swin(w: Weights, x: Tensor) -> list[Tensor]:
    """Patches of 4 px, and between the stages four cells, column by column, become one; each stage's map has a norm."""
    names = {"norm1": "norm1", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "qkv": "attn.qkv"}
    names |= {"proj": "attn.proj", "table": "attn.relative_position_bias_table"}

    def merge(x: Tensor) -> Tensor:
        return torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=3)

    body = "backbone.bottom_up"
    return parts.swin(w, x, f"{body}.patch_embed.proj", f"{body}.norm", f"{body}.layers", names, merge)


def unit(w: Weights, key: str, x: Tensor) -> Tensor:
    """A convolution, and its norm if it has one."""
    x = parts.conv(w, key, x)
    return parts.norm(w, f"{key}.norm", x) if f"{key}.norm.weight" in w else x


def pyramid(w: Weights, maps: list[Tensor]) -> list[Tensor]:
    levels, top = [], 0
    for stage in (5, 4, 3, 2):
        top = unit(w, f"backbone.fpn_lateral{stage}", maps[stage - 2]) + top
        levels.insert(0, unit(w, f"backbone.fpn_output{stage}", top))
        top = F.interpolate(top, scale_factor=2.0, mode="nearest")
    return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


def plain_vit(w: Weights, x: Tensor, numerics: dict) -> Tensor:
    """ViTDet's body [N, C, H / 16, W / 16]: a block attends in windows, but for those whose tables are larger."""
    x = F.conv2d(x, w["backbone.net.patch_embed.proj.weight"], w["backbone.net.patch_embed.proj.bias"], 16)
    position = w["backbone.net.pos_embed"][:, 1:]  # the class token's comes first
    side = math.isqrt(position.shape[1])
    square = position.transpose(1, 2).unflatten(2, (side, side))
    x = (x + F.interpolate(square, x.shape[2:], mode="bicubic")).permute(0, 2, 3, 1)
    i = 0
    while (block := f"backbone.net.blocks.{i}.") + "norm1.weight" in w:
        window = len(w[f"{block}attn.rel_pos_h"]) // 2 + 1
        y = parts.layer_norm(w, f"{block}norm1", x, 1e-6)
        if window == numerics["window"]:
            height, width = y.shape[1:3]
            padded = F.pad(y, (0, 0, 0, -width % window, 0, -height % window))
            for top in range(0, height, window):
                for left in range(0, width, window):
                    cell = padded[:, top : top + window, left : left + window]
                    padded[:, top : top + window, left : left + window] = self_attention(
                        w, f"{block}attn.", cell, numerics
                    )
            y = padded[:, :height, :width]
        else:
            y = self_attention(w, f"{block}attn.", y, numerics)
        x = x + y
        y = F.gelu(parts.linear(w, f"{block}mlp.fc1", parts.layer_norm(w, f"{block}norm2", x, 1e-6)))
        x, i = x + parts.linear(w, f"{block}mlp.fc2", y), i + 1
    return x.permute(0, 3, 1, 2)


def self_attention(w: Weights, prefix: str, x: Tensor, numerics: dict) -> Tensor:
    """Of a map [N, H, W, C], with decomposed relative positions of the query that is not scaled."""
    height, width, channels = x.shape[1:]
    q, k, v = parts.linear(w, f"{prefix}qkv", x.flatten(1, 2)).unflatten(2, (3, numerics["heads"], -1)).unbind(2)
    logits = torch.einsum("nqhc,nkhc->nhqk", q * q.shape[-1] ** -0.5, k)
    tables = []
    for name, length in (("h", height), ("w", width)):
        table = F.interpolate(w[f"{prefix}rel_pos_{name}"].T[None], 2 * length - 1, mode="linear")[0].T
        place = torch.arange(length)
        tables.append(table[place[:, None] - place[None] + length - 1])
    cells = q.unflatten(1, (height, width))
    down = torch.einsum("nyxhc,ykc->nhyxk", cells, tables[0])[..., :, None]
    right = torch.einsum("nyxhc,xkc->nhyxk", cells, tables[1])[..., None, :]
    weights = (logits + (down + right).flatten(2, 3).flatten(3)).softmax(-1)
    mixed = torch.einsum("nhqk,nkhc->nqhc", weights, v).reshape(len(x), height, width, channels)
    return parts.linear(w, f"{prefix}proj", mixed)


def simple_pyramid(w: Weights, x: Tensor) -> list[Tensor]:
    """ViTDet's levels 2 to 5 of one map, and every second cell of the last."""

    def enlarged(key: str, y: Tensor) -> Tensor:
        return F.conv_transpose2d(y, w[f"{key}.weight"], w[f"{key}.bias"], stride=2)

    fine = F.gelu(parts.norm(w, "backbone.simfp_2.1", enlarged("backbone.simfp_2.0", x)))
    maps = enlarged("backbone.simfp_2.3", fine), enlarged("backbone.simfp_3.0", x), x, F.max_pool2d(x, 2)
    levels = []
    for level, first, y in zip((2, 3, 4, 5), (4, 1, 0, 1), maps):
        levels.append(unit(w, f"backbone.simfp_{level}.{first + 1}", unit(w, f"backbone.simfp_{level}.{first}", y)))
    return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


def anchors_of(feature: Tensor, stride: int, sizes: list[float], ratios: list[float]) -> Tensor:
    """[H * W * A, 4]: around each cell's upper left corner, size by size and ratio (height / width) by ratio."""
    shapes = [(math.sqrt(s * s / r), r * math.sqrt(s * s / r)) for s in sizes for r in ratios]
    cell = torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in shapes])
    y, x = (torch.arange(side) * float(stride) for side in feature.shape[2:])
    y, x = torch.meshgrid(y, x, indexing="ij")
    return (torch.stack([x, y, x, y], dim=2)[:, :, None] + cell).reshape(-1, 4)


def move(boxes: Tensor, deltas: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Boxes [R, 4] moved by deltas [R, k * 4]: [R, k, 4]. Growth is limited, shrinking is not."""
    d = deltas.unflatten(1, (-1, 4)) / torch.tensor(weights)
    size = (boxes[:, 2:] - boxes[:, :2])[:, None]
    centre = boxes[:, None, :2] + 0.5 * size
    centre = d[..., :2] * size + centre
    size = d[..., 2:].clamp(max=parts.MAX_LOG_SCALE).exp() * size
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=2)


def propose(w: Weights, features, strides, numerics: dict, sizes, limits: Limits) -> list[Found]:
    """RPN; its scores are given as probabilities."""
    head, per_level = "proposal_generator.rpn_head", []
    for i, (feature, stride) in enumerate(zip(features, strides)):
        hidden = feature
        for conv in ("conv", "conv.conv0", "conv.conv1"):  # the last two where RPN.CONV_DIMS has two entries
            hidden = parts.conv(w, f"{head}.{conv}", hidden).relu() if f"{head}.{conv}.weight" in w else hidden
        logits = parts.conv(w, f"{head}.objectness_logits", hidden).permute(0, 2, 3, 1).flatten(1)
        deltas = (
            parts.conv(w, f"{head}.anchor_deltas", hidden).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        )
        anchors = anchors_of(feature, stride, numerics["anchor_sizes"][i], numerics["aspect_ratios"][0])
        per_level.append((logits, deltas, anchors))
    found = []
    for n, size in enumerate(sizes):
        boxes, logits, levels = [], [], []
        for level, (logit, delta, anchor) in enumerate(per_level):
            best, rows = logit[n].topk(min(limits.pre_nms, logit.shape[1]))
            boxes.append(move(anchor[rows], delta[n, rows], tuple(numerics["rpn_bbox_weights"]))[:, 0])
            logits.append(best)
            levels.append(torch.full_like(rows, level))
        boxes, logits, levels = parts.clip(torch.cat(boxes), size), torch.cat(logits), torch.cat(levels)
        filled = nonempty(boxes)
        boxes, logits, levels = boxes[filled], logits[filled], levels[filled]
        keep = batched_nms(boxes, logits, levels, 0.7)[: limits.post_nms]
        found.append(Found(boxes[keep], logits[keep].sigmoid()))
    return found


def nonempty(boxes: Tensor) -> Tensor:
    return ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)


def levels_of(boxes: Tensor, maps) -> Tensor:
    """FPN's equation 1, with 1e-8 inside the logarithm."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (
        (4 + torch.log2(area.sqrt() / 224 + 1e-8)).floor().clamp(2, 5).long() - 2 if len(maps) > 1 else area.long() * 0
    )


def box_trunk(w: Weights, prefix: str, pooled: Tensor, caffe: bool) -> Tensor:
    """[R, C]: stage 5 and the mean over cells, or convolutions (of GN's head) and two linear layers."""
    if f"{prefix}res5.0.conv1.weight" in w:
        return residual_stage(w, f"{prefix}res5", pooled, 2, 1, caffe).mean(dim=(2, 3))
    i = 1
    while f"{prefix}conv{i}.weight" in w:
        pooled, i = unit(w, f"{prefix}conv{i}", pooled).relu(), i + 1
    x, i = pooled.flatten(1), 1
    while f"{prefix}fc{i}.weight" in w:
        x, i = parts.linear(w, f"{prefix}fc{i}", x).relu(), i + 1
    return x


def detect(w: Weights, maps, strides, proposals: list[Found], numerics: dict, sizes, limits: Limits) -> list[Found]:
    rois = parts.with_image([p.boxes for p in proposals])
    pooled = parts.align(maps, strides, rois, levels_of(rois[:, 1:], maps), numerics["box_pooler_resolution"])
    prefix = "roi_heads." if "roi_heads.res5.0.conv1.weight" in w else "roi_heads.box_head."
    hidden = box_trunk(w, prefix, pooled, numerics["stride_in_1x1"])
    scores = parts.linear(w, "roi_heads.box_predictor.cls_score", hidden).softmax(dim=1)
    deltas = parts.linear(w, "roi_heads.box_predictor.bbox_pred", hidden)
    boxes = move(rois[:, 1:], deltas, tuple(numerics["box_bbox_weights"]))
    images = range(len(sizes))
    return [select(boxes[rois[:, 0] == n], scores[rois[:, 0] == n], sizes[n], limits) for n in images]


def cascade(w: Weights, maps, strides, proposals: list[Found], numerics: dict, sizes, limits: Limits) -> list[Found]:
    """Three stages, each on the last one's boxes, clipped; probabilities are averaged."""
    boxes, total = [p.boxes for p in proposals], 0
    for stage, weights in enumerate(CASCADE):
        rois = parts.with_image([parts.clip(b, size) for b, size in zip(boxes, sizes)])
        pooled = parts.align(maps, strides, rois, levels_of(rois[:, 1:], maps), numerics["box_pooler_resolution"])
        hidden = box_trunk(w, f"roi_heads.box_head.{stage}.", pooled, numerics["stride_in_1x1"])
        total = total + parts.linear(w, f"roi_heads.box_predictor.{stage}.cls_score", hidden).softmax(dim=1)
        deltas = parts.linear(w, f"roi_heads.box_predictor.{stage}.bbox_pred", hidden)
        moved = move(rois[:, 1:], deltas, weights)
        boxes = [moved[rois[:, 0] == n, 0] for n in range(len(sizes))]
    scores = total / len(CASCADE)
    return [select(boxes[n][:, None], scores[rois[:, 0] == n], sizes[n], limits) for n in range(len(sizes))]


def select(boxes: Tensor, scores: Tensor, size: tuple[int, int], limits: Limits) -> Found:
    """The best of boxes [R, K or 1, 4] with scores [R, K + 1], background last. Empty boxes take part in the NMS."""
    scores = scores[:, :-1]
    boxes = parts.clip(boxes, size).expand(-1, scores.shape[1], 4)
    rows, labels = torch.nonzero(scores > limits.score, as_tuple=True)
    boxes, scores = boxes[rows, labels], scores[rows, labels]
    keep = batched_nms(boxes, scores, labels, 0.5)[: limits.detections]
    return Found(boxes[keep], scores[keep], labels[keep])


def with_shapes(w: Weights, maps, strides, found: Found, image: int, caffe: bool) -> Found:
    """Masks and keypoints for the detections of one image, if the model has such heads; then empty boxes go."""
    rois = torch.cat([torch.full_like(found.boxes[:, :1], image), found.boxes], dim=1)
    if "roi_heads.mask_head.predictor.weight" in w:
        pooled = parts.align(maps, strides, rois, levels_of(found.boxes, maps), 14)
        if "roi_heads.res5.0.conv1.weight" in w:
            pooled = residual_stage(w, "roi_heads.res5", pooled, 2, 1, caffe)
        i = 1
        while f"roi_heads.mask_head.mask_fcn{i}.weight" in w:
            pooled, i = unit(w, f"roi_heads.mask_head.mask_fcn{i}", pooled).relu(), i + 1
        deconv = [w[f"roi_heads.mask_head.deconv.{part}"] for part in ("weight", "bias")]
        logits = parts.conv(w, "roi_heads.mask_head.predictor", F.conv_transpose2d(pooled, *deconv, stride=2).relu())
        found = found._replace(masks=logits[torch.arange(len(rois)), found.labels].sigmoid())
    if "roi_heads.keypoint_head.score_lowres.weight" in w:
        pooled, i = parts.align(maps, strides, rois, levels_of(found.boxes, maps), 14), 1
        while f"roi_heads.keypoint_head.conv_fcn{i}.weight" in w:
            pooled, i = parts.conv(w, f"roi_heads.keypoint_head.conv_fcn{i}", pooled).relu(), i + 1
        deconv = [w[f"roi_heads.keypoint_head.score_lowres.{part}"] for part in ("weight", "bias")]
        logits = F.conv_transpose2d(pooled, *deconv, stride=2, padding=1)
        logits = F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)
        found = found._replace(keypoints=keypoints_of(logits, found.boxes))
    filled = nonempty(found.boxes)
    return Found(*(None if field is None else field[filled] for field in found))


def keypoints_of(logits: Tensor, boxes: Tensor) -> Tensor:
    """[D, P, 3]: the highest cell of each map [D, P, H, W] resized to the pixels of its box, at least one; its score is
    a softmax normalised over the map as it was before."""
    points = []
    for maps, (x1, y1, x2, y2) in zip(logits, boxes.tolist()):
        width, height = max(x2 - x1, 1), max(y2 - y1, 1)
        columns, rows = math.ceil(width), math.ceil(height)
        large = F.interpolate(maps[None], (rows, columns), mode="bicubic", align_corners=False)[0].flatten(1)
        place = large.argmax(dim=1)
        top = large.amax(dim=1)
        score = 1 / (maps.flatten(1) - top[:, None]).exp().sum(dim=1)
        x = x1 + (place % columns + 0.5) * (width / columns)
        y = y1 + (place // columns + 0.5) * (height / rows)
        points.append(torch.stack([x, y, score], dim=1))
    return torch.stack(points) if points else logits.new_zeros(0, logits.shape[1], 3)
