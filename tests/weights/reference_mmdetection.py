"""What mmdetection 3.3 computes at inference, from its own keys: Faster, Mask and Cascade R-CNN and RPN, with FPN,
PAFPN, C4, DC5, deformable RoI pooling and GRoIE, of ResNets, RegNets and Swin transformers. Written from its sources'
behaviour; it stands in for the framework in tests.

Dimensions: N images, A anchors per cell, R RoIs, C channels, K classes, D detections.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms, roi_align

from tests.weights import reference_parts as parts
from tests.weights.reference_parts import Found, Limits, Outputs, Weights

GAMMA = 0.1  # of deformable RoI pooling


def is_single(layout: dict) -> bool:
    return len(layout["numerics"]["anchor_generator"]["strides"]) == 1


def limits_of(layout: dict) -> Limits:
    """The published config's."""
    if is_single(layout):
        return Limits(6000, 1000)
    return Limits(2000 if layout["config"].startswith("rpn/") else 1000, 1000)


@torch.no_grad()
def run(layout: dict, w: Weights, images: list[Tensor], limits: Limits | None = None) -> Outputs:
    """Features, proposals and detections of BGR images, uint8 [3, H, W]."""
    limits, numerics = limits or limits_of(layout), layout["numerics"]
    sizes = [tuple(image.shape[1:]) for image in images]
    strides = numerics["anchor_generator"]["strides"]
    maps = backbone(
        w, preprocess(images, numerics["data_preprocessor"]), numerics["backbone_style"] == "caffe", strides
    )
    features = maps[-1:] if len(strides) == 1 else pyramid(w, maps)
    proposals = propose(w, features, strides, numerics["anchor_generator"], sizes, limits)
    if layout["config"].startswith("rpn/"):
        return Outputs(features, proposals, [])
    levels, strides = features[:4], strides[:4]
    found = detect(w, levels, strides, proposals, numerics, sizes, limits)
    return Outputs(features, proposals, [with_masks(w, levels, strides, f, i) for i, f in enumerate(found)])


def preprocess(images: list[Tensor], settings: dict) -> Tensor:
    """Normalised, then padded with zeros below and to the right to a multiple of 32."""
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    multiple = settings["pad_size_divisor"]
    height, width = (-(-max(i.shape[d] for i in images) // multiple) * multiple for d in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    for row, image in zip(batch, images):
        pixels = image.flip(0) if settings["bgr_to_rgb"] else image
        row[:, : image.shape[1], : image.shape[2]] = (pixels - mean) / std
    return batch


def residual_stage(w: Weights, prefix: str, x: Tensor, stride: int, dilation: int, caffe: bool) -> Tensor:
    names = {
        "offset": "conv2.conv_offset",
        "shortcut": "downsample.0",
        "shortcut_norm": "downsample.1",
        "squeeze": "none",
    }
    names |= {f"conv{i}": f"conv{i}" for i in (1, 2, 3)} | {f"norm{i}": f"bn{i}" for i in (1, 2, 3)}
    block = 0
    while f"{prefix}.{block}.conv1.weight" in w:

        def at(part: str, block: int = block) -> str:
            return f"{prefix}.{block}.{names[part]}"

        x = parts.bottleneck(w, at, x, stride if block == 0 else 1, dilation, caffe)
        block += 1
    return x


def backbone(w: Weights, x: Tensor, caffe: bool, strides: list[int]) -> list[Tensor]:
    """Maps of the stages that there are; with a single stride of 16 a fourth one is dilated instead. A RegNet's stem is
    3 x 3, and it halves the map in its first stage instead of pooling."""
    if "backbone.norm0.weight" in w:
        return swin(w, x)
    regnet, maps = w["backbone.conv1.weight"].shape[2] == 3, []
    x = parts.norm(w, "backbone.bn1", parts.conv(w, "backbone.conv1", x, 2)).relu()
    x = x if regnet else F.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        if f"backbone.layer{stage}.0.conv1.weight" in w:
            stride, dilation = (1, 2) if stage == 4 and strides == [16] else (1 if stage == 1 and not regnet else 2, 1)
            x = residual_stage(w, f"backbone.layer{stage}", x, stride, dilation, caffe)
            maps.append(x)
    return maps


def swin(w: Weights, x: Tensor) -> list[Tensor]:
    """Patches of 4 px, and between the stages four cells become one, as F.unfold lays them out; each stage's map has a
    norm."""
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "fc1": "ffn.layers.0.0",
        "fc2": "ffn.layers.1",
        "qkv": "attn.w_msa.qkv",
    }
    names |= {"proj": "attn.w_msa.proj", "table": "attn.w_msa.relative_position_bias_table"}

    def merge(x: Tensor) -> Tensor:
        cells = x.shape[1] // 2, x.shape[2] // 2
        return F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2).unflatten(1, cells)

    return parts.swin(w, x, "backbone.patch_embed.projection", "backbone.norm", "backbone.stages", names, merge)


def pyramid(w: Weights, maps: list[Tensor]) -> list[Tensor]:
    """FPN; PAFPN's way back up if it is there, on the sums before their last convolution; every second cell on top."""
    merged = [parts.conv(w, f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in (3, 2, 1):
        merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[2:], mode="nearest")
    levels = [parts.conv(w, f"neck.fpn_convs.{i}.conv", x) for i, x in enumerate(merged)]
    if "neck.pafpn_convs.0.conv.weight" in w:
        for i in range(3):
            levels[i + 1] = levels[i + 1] + parts.conv(w, f"neck.downsample_convs.{i}.conv", levels[i], 2)
        levels[1:] = [parts.conv(w, f"neck.pafpn_convs.{i}.conv", x) for i, x in enumerate(levels[1:])]
    return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


def anchors_of(feature: Tensor, stride: int, generator: dict) -> Tensor:
    """[H * W * A, 4]: around each cell's upper left corner, ratio (height / width) by ratio and scale by scale."""
    shapes = [(s * stride / r**0.5, s * stride * r**0.5) for r in generator["ratios"] for s in generator["scales"]]
    cell = torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in shapes])
    y, x = (torch.arange(side) * float(stride) for side in feature.shape[2:])
    y, x = torch.meshgrid(y, x, indexing="ij")
    return (torch.stack([x, y, x, y], dim=2)[:, :, None] + cell).reshape(-1, 4)


def move(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...]) -> Tensor:
    """Boxes [R, 4] moved by deltas [R, k * 4]: [R, k, 4]. Growth and shrinking are limited."""
    d = deltas.unflatten(1, (-1, 4)) * torch.tensor(stds)
    size = (boxes[:, 2:] - boxes[:, :2])[:, None]
    centre = (boxes[:, None, :2] + boxes[:, None, 2:]) * 0.5 + size * d[..., :2]
    size = size * d[..., 2:].clamp(-parts.MAX_LOG_SCALE, parts.MAX_LOG_SCALE).exp()
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=2)


def suppress(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
    """Rows that mmcv's NMS keeps, best first: groups are moved apart, an unstable sort orders equal scores."""
    if len(boxes) == 0:
        return group
    apart = boxes + (group * (boxes.max() + 1))[:, None]
    order = scores.sort(descending=True)[1]
    return order[nms(apart[order], torch.arange(len(order), 0, -1).float(), threshold)]


def propose(w: Weights, features, strides, generator: dict, sizes, limits: Limits) -> list[Found]:
    head = "rpn_head" if "rpn_head.rpn_conv.weight" in w else "bbox_head"
    per_level = []
    for feature, stride in zip(features, strides):
        hidden = parts.conv(w, f"{head}.rpn_conv", feature).relu()
        scores = parts.conv(w, f"{head}.rpn_cls", hidden).permute(0, 2, 3, 1).flatten(1).sigmoid()
        deltas = parts.conv(w, f"{head}.rpn_reg", hidden).permute(0, 2, 3, 1).reshape(len(hidden), -1, 4)
        per_level.append((scores, deltas, anchors_of(feature, stride, generator)))
    found = []
    for n, size in enumerate(sizes):
        boxes, scores, levels = [], [], []
        for level, (score, delta, anchor) in enumerate(per_level):
            rows = torch.arange(score.shape[1])
            if len(rows) > limits.pre_nms:
                rows = score[n].sort(descending=True)[1][: limits.pre_nms]
            boxes.append(move(anchor[rows], delta[n, rows], (1.0, 1.0, 1.0, 1.0))[:, 0])
            scores.append(score[n, rows])
            levels.append(torch.full_like(rows, level))
        boxes, scores, levels = parts.clip(torch.cat(boxes), size), torch.cat(scores), torch.cat(levels)
        filled = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        boxes, scores, levels = boxes[filled], scores[filled], levels[filled]
        keep = suppress(boxes, scores, levels, 0.7)[: limits.post_nms]
        found.append(Found(boxes[keep], scores[keep]))
    return found


def levels_of(rois: Tensor, maps) -> Tensor:
    """FPN's equation 1 from the finest level's 56 px, with 1e-6 inside the logarithm."""
    scale = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    return torch.floor(torch.log2(scale / 56 + 1e-6)).clamp(0, len(maps) - 1).long()


def extract(w: Weights, maps, strides, rois: Tensor, size: int) -> Tensor:
    """The box head's RoI features: RoI Align, or what the layers of its extractor say, if it has any."""
    levels = levels_of(rois, maps)
    if "roi_head.bbox_roi_extractor.pre_module.conv.weight" in w:
        return generic(w, "roi_head.bbox_roi_extractor", maps, strides, rois, size)
    if "roi_head.bbox_roi_extractor.roi_layers.0.offset_fc.0.weight" not in w:
        return parts.align(maps, strides, rois, levels, size)
    out = maps[0].new_zeros(len(rois), maps[0].shape[1], size, size)
    for level, (feature, stride) in enumerate(zip(maps, strides)):
        rows = (levels == level).nonzero()[:, 0]
        if len(rows):
            prefix = f"roi_head.bbox_roi_extractor.roi_layers.{level}"
            out[rows] = deformable(w, prefix, feature, stride, rois[rows], size)
    return out


def deformable(w: Weights, prefix: str, feature: Tensor, stride: int, rois: Tensor, size: int) -> Tensor:
    """Pooled once without offsets, which predicts them (and a factor for every bin), then with them."""
    plain = torch.stack([sample(feature, roi, stride, size, torch.zeros(2, size, size)) for roi in rois])
    offsets = mlp(w, f"{prefix}.offset_fc", plain.flatten(1)).view(-1, 2, size, size)
    moved = torch.stack([sample(feature, roi, stride, size, shift) for roi, shift in zip(rois, offsets)])
    if f"{prefix}.mask_fc.0.weight" in w:
        moved = moved * mlp(w, f"{prefix}.mask_fc", plain.flatten(1)).sigmoid().view(-1, 1, size, size)
    return moved


def mlp(w: Weights, prefix: str, x: Tensor) -> Tensor:
    """Linear layers, which have the even numbers, with ReLU between."""
    last = max(i for i in (0, 2, 4) if f"{prefix}.{i}.weight" in w)
    for i in range(0, last + 1, 2):
        x = parts.linear(w, f"{prefix}.{i}", x)
        x = x if i == last else x.relu()
    return x


def sample(feature: Tensor, roi: Tensor, stride: int, size: int, offsets: Tensor) -> Tensor:
    """[C, size, size]: means over adaptive grids in the bins of a roi [5], each moved by offsets [2, size, size] =
    (dx, dy) in tenths of the roi's width and height."""
    x1, y1, x2, y2 = (roi[1:] / stride - 0.5).unbind()
    places = []
    for start, end, shift, axis in ((x1, x2, offsets[0], 1), (y1, y2, offsets[1], 0)):
        length = end - start
        count = max(math.ceil(length / size), 1)
        points = start + (torch.arange(size * count) + 0.5) * (length / (size * count))
        points = points.view(size, count)
        points = points[None, :, None, :] if axis == 1 else points[:, None, :, None]
        places.append(points + (GAMMA * length * shift)[:, :, None, None])  # [size, size, rows or 1, columns or 1]
    x, y = torch.broadcast_tensors(*places)
    return bilinear(feature[int(roi[0])], y, x).mean(dim=(3, 4))


def bilinear(feature: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """feature [C, H, W] at (y, x) [...]: [C, ...]; cells end at the border, which counts up to one cell beyond."""
    height, width = feature.shape[1:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.floor().long(), x.floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    down, across = y - top, x - left
    above = feature[:, top, left] * (1 - across) + feature[:, top, right] * across
    below = feature[:, bottom, left] * (1 - across) + feature[:, bottom, right] * across
    return (above * (1 - down) + below * down) * inside


def generic(w: Weights, prefix: str, maps, strides, rois: Tensor, size: int) -> Tensor:
    """GRoIE: a convolution on every level's RoI Align (2 x 2 samples), their sum, and attention "0100" of 6 heads
    to every second bin, whose vertical part takes the transposed bin's query."""
    pooled = [
        roi_align(feature, rois, size, 1 / s, sampling_ratio=2, aligned=True) for feature, s in zip(maps, strides)
    ]
    x = sum(parts.conv(w, f"{prefix}.pre_module.conv", p).relu() for p in pooled)
    post, places = f"{prefix}.post_module", torch.arange(size).float()
    waves = 1000 ** (torch.arange(x.shape[1] // 4) * 4 / x.shape[1])
    angles = (places[:, None, None] - places[::2, None]) / waves
    waves = torch.cat([angles.sin(), angles.cos()], dim=2)
    across, down = (F.linear(waves, w[f"{post}.appr_geom_fc_{a}.weight"]).unflatten(2, (6, -1)) / 2**0.5 for a in "xy")
    query = (
        parts.conv(w, f"{post}.query_conv", x).unflatten(1, (6, -1)).permute(0, 1, 3, 4, 2)
    )  # [R, 6, row, column, d]
    by_column = (query[:, :, :, :, None] * across.permute(2, 0, 1, 3)[:, None]).sum(-1)  # [R, 6, row, column, other]
    by_row = (query.transpose(2, 3)[:, :, :, :, None] * down.permute(2, 0, 1, 3)[:, :, None]).sum(-1)
    energy = by_row[..., :, None] + by_column[..., None, :]
    value = (
        parts.conv(w, f"{post}.value_conv", F.avg_pool2d(x, 1, 2)).unflatten(1, (6, -1)).flatten(3)
    )  # [R, 6, d, others]
    mixed = energy.flatten(4).softmax(dim=4).flatten(2, 3) @ value.mT  # [R, 6, bins, d]
    return (
        w[f"{post}.gamma"] * parts.conv(w, f"{post}.proj_conv", mixed.mT.flatten(1, 2).unflatten(2, (size, size))) + x
    )


def box_head(w: Weights, prefix: str, pooled: Tensor, caffe: bool) -> tuple[Tensor, Tensor]:
    """Class logits [R, K + 1], background last, and deltas [R, K * 4 or 4]."""
    if "roi_head.shared_head.layer4.0.conv1.weight" in w:
        x = residual_stage(w, "roi_head.shared_head.layer4", pooled, 2, 1, caffe).mean(dim=(2, 3))
    else:
        x = pooled.flatten(1)
        for i in (0, 1):
            x = parts.linear(w, f"{prefix}shared_fcs.{i}", x).relu()
    return parts.linear(w, f"{prefix}fc_cls", x), parts.linear(w, f"{prefix}fc_reg", x)


def detect(w: Weights, maps, strides, proposals: list[Found], numerics: dict, sizes, limits: Limits) -> list[Found]:
    """One box head, or a cascade: each stage on the last one's boxes, clipped; the logits are averaged."""
    cascade = isinstance(numerics["bbox_head"], list)
    heads = numerics["bbox_head"] if cascade else [numerics["bbox_head"]]
    rois, total = parts.with_image([p.boxes for p in proposals]), 0
    image = rois[:, 0].long()
    limit = torch.tensor([[w, h, w, h] for h, w in sizes])[image][:, None]
    for stage, head in enumerate(heads):
        pooled = extract(w, maps, strides, rois, numerics["bbox_roi_extractor"]["roi_layer"]["output_size"])
        prefix = f"roi_head.bbox_head.{stage}." if cascade else "roi_head.bbox_head."
        logits, deltas = box_head(w, prefix, pooled, numerics["backbone_style"] == "caffe")
        total = total + logits
        boxes = move(rois[:, 1:], deltas, tuple(head["bbox_coder"]["target_stds"])).clamp(min=0).minimum(limit)
        rois = torch.cat([rois[:, :1], boxes[:, 0]], dim=1) if cascade else rois
    scores = (total / len(heads)).softmax(dim=1)[:, :-1]
    found = []
    for n in range(len(sizes)):
        of_image = boxes[image == n].expand(-1, scores.shape[1], 4)
        rows, labels = torch.nonzero(scores[image == n] > limits.score, as_tuple=True)
        best, score = of_image[rows, labels], scores[image == n][rows, labels]
        keep = suppress(best, score, labels, 0.5)[: limits.detections]
        found.append(Found(best[keep], score[keep], labels[keep]))
    return found


def with_masks(w: Weights, maps, strides, found: Found, image: int) -> Found:
    """The mean of the mask heads' probabilities for the detections of one image, if there are any."""
    rois = torch.cat([torch.full_like(found.boxes[:, :1], image), found.boxes], dim=1)
    prefixes = ["roi_head.mask_head."] + [f"roi_head.mask_head.{stage}." for stage in range(3)]
    masks = []
    for prefix in (p for p in prefixes if f"{p}conv_logits.weight" in w):
        x = parts.align(maps, strides, rois, levels_of(rois, maps), 14)
        for i in range(4):
            x = parts.conv(w, f"{prefix}convs.{i}.conv", x).relu()
        deconv = [w[f"{prefix}upsample.{part}"] for part in ("weight", "bias")]
        logits = parts.conv(w, f"{prefix}conv_logits", F.conv_transpose2d(x, *deconv, stride=2).relu())
        masks.append(logits[torch.arange(len(rois)), found.labels].sigmoid())
    return found._replace(masks=torch.stack(masks).mean(dim=0)) if masks else found
