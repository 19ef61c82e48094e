"""What the explorer's page carries, and the page itself.

Dimensions: L levels, C channels, R RoIs, D detections.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import ceil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detector.config import ConfigError, make_folder
from detector.inference.predict import Detector
from detector.roi import (
    BorderAlign,
    ContextRoIPool,
    DeformableAttentionPool,
    DeformableRoIPool,
    PositionSensitiveRoIAlign,
    PreciseRoIPool,
    RoIAlign,
    RoIExtractor,
    RoIOp,
    RoIPool,
    RoIWarp,
    RotatedRoIAlign,
    SemanticRoIAlign,
    SumLevels,
    assign_levels,
)
from detector.structures import each, rois_from_boxes

log = logging.getLogger(__name__)

SHOWN = 30  # detections that the page lists, best first
SCRIPTS = ("methods.js", "examples.js", "panel.js", "page.js")


def write_page(
    detector: Detector,
    image: np.ndarray,
    output: str | Path,
    image_name: str = "",
    checkpoint: str = "",
    head: str = "box_head",
    max_mb: float = 8,
) -> Path:
    """Write the page for what `detector.load` returns and an image [H, W, C] uint8.

    Args:
        image_name, checkpoint: what the page calls them.
        head: the head whose features, levels and offset predictor are shown.
        max_mb: about how large the page may be. Where it would be larger float32 becomes float16, predictors int8, and
            at last the network sees a smaller image; the page says so. Maps take at least half of it, and a predictor
            is never left out: that of a large model comes on top.
    Raises: ConfigError for a head that the model has not got, or that has no RoI method.
    """
    if max_mb <= 0:
        raise ConfigError(f"max_mb = {max_mb}: must be positive")
    content = collect(detector, image, head, max_mb)
    content |= {"name": Path(image_name).name or "image", "checkpoint": checkpoint}
    output = Path(output)
    make_folder(output.parent, "output")
    output.write_text(render(content), encoding="utf-8", errors="replace")
    return output


def render(content: Mapping[str, Any]) -> str:
    """The page with `content` in it. Names from the data are text everywhere: no browser takes them for markup."""
    here = files(__package__)
    script = "\n".join((here / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "title": html.escape(f"{content['name']} · RoI explorer"),
        "style": (here / "page.css").read_text(encoding="utf-8"),
        "data": json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "script": script,
    }
    template = (here / "page.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], template)


@torch.inference_mode()
def collect(detector: Detector, image: np.ndarray, head: str, max_mb: float) -> dict[str, Any]:
    """What the page needs to know, ready for JSON."""
    model = detector.model
    extractor = find_extractor(model, head)
    allowed = max_mb * 1e6 * 3 / 4  # base64 writes four letters for three bytes
    learned = encode_predictors(extractor.op, allowed)
    left = max(allowed - size_of(learned), allowed / 2)

    batch = detector.as_batch([image])
    features = model.features(batch)
    whole, scale, wanted = batch.image_sizes[0].tolist(), 1.0, None
    while (needed := 2 * sum(f[0].numel() for f in features[: len(extractor.strides)])) > left:
        wanted = wanted or (needed + size_of(learned)) * 4 / 3
        scale *= min((left / needed) ** 0.5, 0.95)  # padding does not shrink along
        if scale * min(whole) < 16:
            break
        batch = detector.as_batch([image], scale)
        features = model.features(batch)
    found = model.detect(features, batch)
    found = each(lambda t: t[0][found.valid[0]][:SHOWN].cpu(), found)
    features = [f[:1].float().cpu() for f in features[: len(extractor.strides)]]
    maps = [encode(f[0], left * 0.9 * f.numel() / sum(f.numel() for f in features)) for f in features]

    height, width = batch.image_sizes[0].tolist()
    if wanted:
        seen = f"{width} x {height} instead of {whole[1]} x {whole[0]} pixels"
        log.warning("the network sees the image at %s; max_mb=%d would keep its size", seen, ceil(wanted / 1e6))
    picture = detector.pictures.rgb(batch.images[0, :, :height, :width].permute(1, 2, 0).cpu().numpy())
    own = describe(extractor.op)
    if learned is not None and learned["kind"] == "deformable":
        learned["error_px"] = offset_error(extractor, learned, features, maps, probe_rois(found.boxes, height, width))
    return {
        "width": batch.images.shape[3],
        "height": batch.images.shape[2],
        "picture": {"source": data_url(picture), "width": width, "height": height},
        "file_size": [image.shape[1], image.shape[0]],
        "usual_size": whole[::-1],
        "maps": [{"stride": stride, **map_} for stride, map_ in zip(extractor.strides, maps)],
        "levels": {
            "rule": extractor.level_rule,
            "canonical_level": extractor.canonical_level,
            "canonical_size": extractor.canonical_size,
        },
        "boxes": [
            {"name": detector.categories[label - 1], "score": score, "box": box}
            | ({} if found.masks is None else {"outlines": outlines(found.masks[k].float().numpy(), box)})
            for k, (box, score, label) in enumerate(
                zip(*(t.tolist() for t in (found.boxes, found.scores, found.labels)))
            )
        ],
        "head": head,
        "own": {
            "name": type(extractor.op).__name__,
            "size": list(extractor.op.output_size),
            "parameters": sum(p.numel() for p in extractor.op.parameters()),
            **(own or {}),
        },
        "learned": learned,
    }


def outlines(mask: np.ndarray, box: Sequence[float]) -> list[list[float]]:
    """The outlines of a predicted mask [M, M], probabilities in its box's frame, as polygons [x, y, ...] in pixels."""
    fine = 4 * len(mask)
    object_ = (cv2.resize(mask, (fine, fine), interpolation=cv2.INTER_LINEAR) >= 0.5).astype(np.uint8)
    found, _ = cv2.findContours(object_, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    start, extent = np.array(box[:2]), np.array(box[2:]) - box[:2]
    polygons = [start + (contour[:, 0] + 0.5) / fine * extent for contour in found if len(contour) > 2]
    return [polygon.round(2).ravel().tolist() for polygon in polygons]


def find_extractor(model: nn.Module, head: str) -> RoIExtractor:
    """The extractor of a head, of a cascade the first one's; ConfigError where there is none."""
    heads = {n.removesuffix(".extractor"): m for n, m in model.named_modules() if isinstance(m, RoIExtractor)}
    for name in (head, f"{head}.stages.0"):
        if name in heads:
            return heads[name]
    raise ConfigError(f"head = {head!r}: the model's heads with a RoI method are {', '.join(heads) or 'none'}")


def describe(op: RoIOp) -> dict[str, Any] | None:
    """{"method", "settings"} as methods.js calls them, or None for an op that the page does not show.

    Of a method with layers of its own what those read: the page pools the maps, not what layers make of them.
    """
    if isinstance(op, (SumLevels, PositionSensitiveRoIAlign)):
        inner = describe(op.op if isinstance(op, SumLevels) else op.align)
        what = "on every level" if isinstance(op, SumLevels) else "on maps of its own, each bin on other channels"
        return inner and {**inner, "note": f"The checkpoint's {type(op).__name__} reads these points {what}."}
    if isinstance(op, ContextRoIPool):
        return {"method": "context", "settings": {"scale": op.scale}}
    if isinstance(op, BorderAlign):
        return {"method": "border", "settings": {"sides": op.points}}
    if isinstance(op, SemanticRoIAlign):
        return {"method": "semantic", "settings": {"samples": op.samples}}
    if isinstance(op, RotatedRoIAlign):
        return op.learner and {"method": "rotated", "settings": {}}
    if isinstance(op, DeformableAttentionPool):
        return describe(op.op) and {"method": "attention", "settings": {}}
    if isinstance(op, DeformableRoIPool):
        if describe(op.base) is None:
            return None
        modulated = op.offset_predictor[0].modulation is not None
        return {"method": "modulated_deformable" if modulated else "deformable", "settings": {}}
    if isinstance(op, RoIPool):
        return {"method": f"pool_{op.quantization}", "settings": {}}
    if isinstance(op, PreciseRoIPool):
        return {"method": "precise_aligned" if op.aligned else "precise", "settings": {}}
    if isinstance(op, RoIAlign):
        if op.per_level or op.per_size or not (op.aligned or op.kernel == "bilinear"):
            return None
        name = "warp" if isinstance(op, RoIWarp) else "align" if op.aligned else "align_legacy"
        name = name if op.kernel == "bilinear" else f"align_{op.kernel}"
        settings = {"ratio": op.sampling_ratio, "reduction": op.reduction, "placement": op.placement}
        return {"method": name, "settings": settings}
    return None


# ------------------------------------------------------------------------------------------------------ numbers as text


def encode(values: Tensor, allowed: float, coarsest: str = "float16") -> dict[str, Any]:
    """Numbers [C, H, W] or [outputs, inputs] in base64, as exact as `allowed` bytes let them be.

    int8 has one scale for each row, so that the largest of the row is 127.
    """
    array = values.detach().float().cpu().numpy()
    shape = {"shape": list(array.shape)}
    if array.nbytes <= allowed or np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        return {**shape, "type": "float32", "data": to_base64(array)}
    if array.nbytes / 2 <= allowed or coarsest == "float16":
        return {**shape, "type": "float16", "data": to_base64(array.astype(np.float16))}
    scale = np.maximum(np.abs(array).max(axis=1), 1e-30) / 127
    rounded = np.round(array / scale[:, None]).astype(np.int8)
    return {**shape, "type": "int8", "data": to_base64(rounded), "scale": to_base64(scale.astype(np.float32))}


def decode(found: Mapping[str, Any]) -> Tensor:
    """What the page reads out of `encode`'s result, [C, H, W] or [outputs, inputs] float32."""
    array = np.frombuffer(base64.b64decode(found["data"]), found["type"]).astype(np.float32).reshape(found["shape"])
    if "scale" in found:
        array *= np.frombuffer(base64.b64decode(found["scale"]), np.float32)[:, None]
    return torch.from_numpy(array)


def to_base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))).decode()


def size_of(content: Any) -> float:
    """Bytes behind the base64 in nested dicts and lists."""
    if isinstance(content, str):
        return len(content) * 3 / 4
    children = content.values() if isinstance(content, Mapping) else content if isinstance(content, Sequence) else ()
    return sum(map(size_of, children))


def data_url(picture: np.ndarray) -> str:
    """An image [H, W, 3] uint8 as PNG, or as JPEG where that is large."""
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90})):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, kind, **options)
        if buffer.tell() <= 300_000:
            break
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------------ learned offsets


def encode_predictors(op: RoIOp, allowed: float) -> dict[str, Any] | None:
    """The layers that say where an op reads, with what the page needs to run them; None for an op without."""
    kinds = {DeformableRoIPool: "deformable", RotatedRoIAlign: "rotated", DeformableAttentionPool: "attention"}
    kind = next((kind for cls, kind in kinds.items() if isinstance(op, cls)), None)
    if kind is None or not describe(op):
        return None
    parts = {"deformable": ["offset_predictor"], "rotated": ["learner"], "attention": ["offsets", "weights"]}[kind]
    total = sum(p.numel() for part in parts for p in getattr(op, part).parameters())

    def stack(layers: Sequence[nn.Module] | None) -> list[dict[str, Any]] | None:
        linear = [layer for layer in layers or () if isinstance(layer, nn.Linear)]
        share = {layer: 0.5 * allowed * layer.weight.numel() / total for layer in linear}
        return linear and [
            {**encode(layer.weight, share[layer], "int8"), "bias": to_base64(layer.bias.detach().float().cpu().numpy())}
            for layer in linear
        ]

    if kind != "deformable":
        layers = {part: stack([getattr(op, part)]) for part in parts}
        common = {
            "kind": kind,
            "size": list(op.output_size),
            "base": describe(op.align if kind == "rotated" else op.op),
        }
        if kind == "rotated":
            return {**common, **layers, "ratio": op.align.sampling_ratio}
        return {**common, **layers, **dict(zip(("heads", "levels", "count"), op.shape))}
    return {
        "kind": kind,
        "gamma": op.gamma,
        "ratio": op.align.sampling_ratio,
        "size": list(op.output_size),
        "perPoint": op.per_point,
        "base": describe(op.base),
        "predictors": [{"offsets": stack(p.offsets), "modulation": stack(p.modulation)} for p in op.offset_predictor],
    }


def probe_rois(boxes: Tensor, height: int, width: int) -> Tensor:
    """The detections and some random boxes, [R, 5]."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(32, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([width, height])
    boxes = torch.cat([boxes, corners.flatten(1)])[None]
    return rois_from_boxes(boxes, torch.ones(boxes.shape[:2], dtype=torch.bool))


def offset_error(
    extractor: RoIExtractor, learned: Mapping, features: Sequence[Tensor], maps: Sequence[Mapping], rois: Tensor
) -> float:
    """By how many pixels of the image the page's offsets are off at most, because its numbers are rounded."""
    op = copy.deepcopy(extractor.op).cpu().float()
    rounded = copy.deepcopy(op)
    for predictor, found in zip(rounded.offset_predictor, learned["predictors"]):
        for layers, entries in ((predictor.offsets, found["offsets"]), (predictor.modulation, found["modulation"])):
            linear = [layer for layer in layers or () if isinstance(layer, nn.Linear)]
            for layer, entry in zip(linear, entries or ()):
                layer.weight.data.copy_(decode(entry))
    rule = extractor.canonical_level, extractor.canonical_size, extractor.level_rule
    levels = assign_levels(rois[:, 1:], extractor.strides, *rule)
    exact = op(features, rois, levels, extractor.strides).offsets
    shown = rounded([decode(m)[None] for m in maps], rois, levels, extractor.strides).offsets
    sides = rois[:, 3:] - rois[:, 1:3]
    return float((op.gamma * (exact - shown).abs() * sides[:, :, None, None]).max())
