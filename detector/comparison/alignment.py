"""Misalignment, measured: what a RoI method and a box head make of an object that moves by less than a cell.

If image and RoI move together, pooled features and predicted boxes should move along and otherwise stay. A method that
rounds the RoI to whole cells sees another piece of the map instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detector.ops.boxes import of_label
from detector.roi import RoIExtractor, RoIPool, RoIWarp, assign_levels
from detector.roi.pool import bin_ranges, round_half_away
from detector.structures import Batch, to_device, with_image

FRACTIONS = np.linspace(0, 1, 17)  # of the stride of a RoI's level
PIXELS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)


@torch.inference_mode()
def feature_shift(
    model: nn.Module, boxes: Tensor, fractions: Sequence[float] = FRACTIONS, seed: int = 0
) -> list[float]:
    """Relative change of the box head's pooled features, |P(u) - P(0)| / |P(0)|, when map and RoI shift by u strides.

    The maps are a smooth function of the position, waves of 4 to 12 cells, so that the shift itself is exact and only
    the RoI method is measured. boxes [R, 4] in network pixels.
    """
    extractor = model.box_head.stages[0].extractor
    channels = model.neck.out_channels
    channels = channels if isinstance(channels, int) else channels[0]
    margin = 2 * max(extractor.strides)  # what happens at the map's border is not the question
    height, width = (int(v) + 3 * margin for v in boxes.reshape(-1, 2).max(0).values.flip(0))
    levels = assign_levels(
        boxes, extractor.strides, extractor.canonical_level, extractor.canonical_size, extractor.level_rule
    )
    stride = torch.tensor(extractor.strides, dtype=boxes.dtype, device=boxes.device)[levels]
    first, changes = None, []
    for fraction in fractions:
        maps = [
            waves(channels, -(-height // s), -(-width // s), float(fraction), seed).to(boxes)
            for s in map(int, extractor.strides)
        ]
        # levels are those of the unshifted RoI: its size does not change
        rois = with_image((boxes + margin + float(fraction) * stride[:, None])[None])[0]
        pooled = extractor.op(maps, rois, levels, extractor.strides).features
        first = pooled if first is None else first
        changes.append(float((pooled - first).norm() / first.norm()))
    return changes


def waves(channels: int, height: int, width: int, shift: float, seed: int) -> Tensor:
    """Maps [1, C, height, width] of plane waves of 4 to 12 cells, moved right and down by `shift` cells."""
    random = np.random.default_rng(seed)
    angle, length = random.uniform(0, 2 * np.pi, channels), random.uniform(4, 12, channels)
    phase = random.uniform(0, 2 * np.pi, channels)
    kx, ky = 2 * np.pi * np.cos(angle) / length, 2 * np.pi * np.sin(angle) / length
    x, y = np.arange(width) + 0.5 - shift, np.arange(height) + 0.5 - shift
    return torch.from_numpy(np.sin(kx[:, None, None] * x + ky[:, None, None] * y[:, None] + phase[:, None, None]))[None]


@torch.inference_mode()
def box_shift(model: nn.Module, image: np.ndarray, boxes: Tensor, labels: Tensor, pixels: Sequence[int] = PIXELS):
    """Mean distance in pixels [len(pixels)] between the boxes that the box head predicts for RoIs of an image and those
    that it predicts when image and RoIs move by whole pixels and the result is moved back.

    image: [H, W, C] uint8 as the network sees it; boxes [R, 4] RoIs in it, labels [R] the class whose box is decoded.
    The backbone's own dependence on the position is part of the number, the same for all methods.
    """
    device = next(model.parameters()).device
    margin, most = 32, max(pixels)
    height, width = (-(-(side + 2 * margin + most) // 64) * 64 for side in image.shape[:2])
    first, distances = None, []
    for shift in pixels:
        canvas = torch.zeros(1, image.shape[2], height, width, dtype=torch.uint8)
        top = margin + shift
        canvas[0, :, top : top + image.shape[0], top : top + image.shape[1]] = torch.from_numpy(image).permute(2, 0, 1)
        size, zero = torch.tensor([[height, width]]), torch.zeros(1, dtype=torch.int64)
        batch = Batch(*(t.to(device) for t in (canvas, size, size, zero, zero)))
        rois = with_image((boxes.to(device) + top)[None])[0]
        features = model.features(batch)[: model.neck.roi_levels]
        candidates, _ = model.box_head.candidates(features, rois, batch.image_sizes)
        found = of_label(candidates, labels.to(device)) - top
        first = found if first is None else first
        distances.append(float((found - first).abs().mean()))
    return distances


def area_error(model: nn.Module, boxes: Tensor) -> Tensor | None:
    """Relative error [R] of the area that the box head's method reads for RoIs [R, 4]; None if it does not round."""
    extractor = model.box_head.stages[0].extractor
    if not isinstance(extractor.op, (RoIPool, RoIWarp)):
        return None
    levels = assign_levels(
        boxes, extractor.strides, extractor.canonical_level, extractor.canonical_size, extractor.level_rule
    )
    cells = boxes / torch.tensor(extractor.strides, dtype=boxes.dtype)[levels][:, None]
    sides = []
    for start, end in ((cells[:, 0], cells[:, 2]), (cells[:, 1], cells[:, 3])):
        if isinstance(extractor.op, RoIPool):
            free = torch.full_like(start, 1e6)
            low, high = bin_ranges(start, end, 1, free, extractor.op.quantization)
            sides.append((high - low)[:, 0])
        else:
            start, end = round_half_away(start), round_half_away(end)
            sides.append(torch.maximum(end, start) + 1 - start)
    return sides[0] * sides[1] / ((cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1])) - 1


@torch.inference_mode()
def measure_offsets(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    """How far the learned offsets move the bins of the RoIs that inference pools, by head; {} for methods without.

    In pixels of the image files: {head: {"mean_px" (distance), "mean_abs_px" (along x, along y), "quantiles_px" (0, 5,
    ..., 100 % of the distances), "histogram" {"edges" [B + 1], "percent" [B] of the bins}, "mean_norm" (of the offsets
    themselves, before gamma and the RoI's size), "modulation" (its mean, or None), "modulation_histogram" (or None)}}.
    """
    moves: dict[str, list[Tensor]] = {}  # [M, 2]
    norms: dict[str, list[Tensor]] = {}
    modulations: dict[str, list[Tensor]] = {}
    scales = None  # [N, 2], pixels of the file for one of the network's, along x and y

    def keep(name: str):
        def hook(extractor, inputs, output):
            rois = inputs[1]
            if output.offsets is not None and len(output.offsets):
                sides = (rois[:, 3:] - rois[:, 1:3]) * scales[rois[:, 0].long()]
                offsets = output.offsets.float()
                moved = extractor.op.gamma * offsets * sides[:, :, None, None]
                moves.setdefault(name, []).append(moved.movedim(1, -1).reshape(-1, 2).cpu())
                norms.setdefault(name, []).append(offsets.norm(dim=1).flatten().cpu())
            if output.modulation is not None:
                modulations.setdefault(name, []).append(output.modulation.float().flatten().cpu())

        return hook

    extractors = {n.removesuffix(".extractor"): m for n, m in model.named_modules() if isinstance(m, RoIExtractor)}
    handles = [m.register_forward_hook(keep(name)) for name, m in extractors.items()]
    try:
        for batch in batches:
            batch = to_device(batch, next(model.parameters()).device)
            for image in zip(*(values.split(1) for values in batch)):  # as the model takes them: RoIs count from 0 each
                image = Batch(*image)
                scales = (image.original_sizes / image.image_sizes).flip(1).float()
                model(image)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, parts in moves.items():
        moved, modulation = torch.cat(parts), modulations.get(name)
        distances = moved.norm(dim=1).numpy()
        found[name] = {
            "mean_px": float(distances.mean()),
            "mean_abs_px": moved.abs().mean(0).tolist(),
            "quantiles_px": np.quantile(distances, np.linspace(0, 1, 21)).tolist(),
            "histogram": histogram(distances, max(float(np.quantile(distances, 0.995)), 0.01)),
            "mean_norm": float(torch.cat(norms[name]).mean()),
            "modulation": None if modulation is None else float(torch.cat(modulation).mean()),
            "modulation_histogram": None if modulation is None else histogram(torch.cat(modulation).numpy(), 1.0),
        }
    return found


def histogram(values: np.ndarray, top: float, count: int = 30) -> dict[str, list[float]]:
    """{"edges" [count + 1] from 0 to top, "percent" [count] of all values in between}; larger ones are in no bin."""
    counts, edges = np.histogram(values, bins=count, range=(0, top))
    return {"edges": edges.tolist(), "percent": (100 * counts / max(len(values), 1)).tolist()}


def measure_alignment(model: nn.Module, samples: Sequence[Any], rois: int = 300) -> dict[str, Any]:
    """feature_shift, box_shift and area_error on the objects of data set samples (detector.data.Sample) with boxes."""
    samples = [sample for sample in samples if len(sample.boxes)]
    boxes = torch.from_numpy(np.concatenate([sample.boxes for sample in samples]))[:rois]
    shifts = [
        box_shift(model, sample.image, torch.from_numpy(sample.boxes), torch.from_numpy(sample.labels))
        for sample in samples
    ]
    errors = area_error(model, boxes)
    return {
        "fractions": FRACTIONS.tolist(),
        "feature_shift": feature_shift(model, boxes.to(next(model.parameters()).device)),
        "pixels": list(PIXELS),
        "box_shift": np.average(shifts, axis=0, weights=[len(s.boxes) for s in samples]).tolist(),
        "area_error": None if errors is None else np.quantile(errors, np.linspace(0, 1, 21)).tolist(),
    }
