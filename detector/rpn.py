"""Region proposal network (Faster R-CNN, Ren et al. 2015; on pyramids: FPN, Lin et al. 2017).

Dimensions: N images, L levels, C channels, A anchors per cell, T candidates kept before NMS, P proposals per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.ops import losses
from detector.ops.boxes import BoxCoder, Survivors, clip, nms_by_image, nms_like_mmcv, survivors, take
from detector.ops.checks import check_counts, check_fractions
from detector.ops.layers import conv_block, init_normal
from detector.ops.sampling import check_thresholds, match, sample
from detector.structures import Batch, Proposals, Targets


class AnchorGenerator(nn.Module):
    """Anchors of all levels.

    Args:
        strides: stride in image pixels of each level.
        sizes: for each level the anchor sizes, sqrt(area) in image pixels; one list serves all levels.
        aspect_ratios: height / width.
        rounding: round the corners of the cell's anchors to whole pixels, as torchvision does.

    At each cell the order is ratio by ratio, and size by size within a ratio.
    """

    cells: Tensor  # [L, A, 4], around the origin

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        rounding: bool = False,
    ):
        super().__init__()
        sizes = list(sizes) * len(strides) if len(sizes) == 1 else list(sizes)
        if len(sizes) != len(strides):
            hint = "; of the one map of a plain ViT neck@model.neck=simple_pyramid makes five levels"
            raise ValueError(
                f"anchor sizes for {len(sizes)} levels, but the neck gives {len(strides)} (sizes={sizes})"
                + hint * (len(strides) <= 2 and len(sizes) == 5)
            )
        if len({len(level) for level in sizes}) != 1 or min(min(level) for level in sizes) <= 0:
            raise ValueError(f"anchor sizes={sizes}: expected the same number of positive sizes on each level")
        if min(aspect_ratios) <= 0:
            raise ValueError(f"aspect_ratios={list(aspect_ratios)}: must be positive")
        self.strides = list(strides)
        self.num_anchors = len(sizes[0]) * len(aspect_ratios)
        cells = torch.stack([self._cell(level, aspect_ratios, rounding) for level in sizes])
        self.register_buffer("cells", cells, persistent=False)

    @staticmethod
    def _cell(sizes: Sequence[float], ratios: Sequence[float], rounding: bool) -> Tensor:
        shapes = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in ratios for size in sizes]
        cell = torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in shapes])
        return cell.round() if rounding else cell

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Anchors [Hl * Wl * A, 4] of each level of features [N, C, Hl, Wl], row by row."""
        anchors = []
        for level, stride, cell in zip(features, self.strides, self.cells):
            height, width = level.shape[-2:]
            y = torch.arange(height, device=level.device, dtype=torch.float32) * stride
            x = torch.arange(width, device=level.device, dtype=torch.float32) * stride
            y, x = torch.meshgrid(y, x, indexing="ij")
            corner = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            anchors.append((corner + cell).reshape(-1, 4))
        return anchors


class RPNHead(nn.Module):
    """One 3 x 3 (or several) and two 1 x 1 convolutions, shared by the levels."""

    def __init__(self, in_channels: int, num_anchors: int, conv_channels: Sequence[int]):
        super().__init__()
        channels = [in_channels, *conv_channels]
        self.conv = nn.Sequential(*(conv_block(a, b, 3) for a, b in zip(channels, channels[1:])))
        self.objectness_logits = nn.Conv2d(channels[-1], num_anchors, 1)
        self.deltas = nn.Conv2d(channels[-1], 4 * num_anchors, 1)
        init_normal(self, std=0.01)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: objectness logits [N, Hl * Wl * A] and deltas [N, Hl * Wl * A, 4], in the anchors' order."""
        hidden = [self.conv(level) for level in features]
        logits = [self.objectness_logits(h).permute(0, 2, 3, 1).flatten(1) for h in hidden]
        deltas = [self.deltas(h).permute(0, 2, 3, 1).reshape(len(h), -1, 4) for h in hidden]
        return logits, deltas

    def at(self, features: Sequence[Tensor], anchors: Tensor) -> tuple[Tensor, Tensor]:
        """What forward gives for the anchors [N, S], numbered over all levels: logits [N, S] and deltas [N, S, 4].

        Only their cells are computed, from the windows of the maps that they see. So the backward pass of a loss on a
        sample costs next to nothing, where that of the convolution over whole maps is a tenth of a training step.
        """
        num_anchors = self.objectness_logits.out_channels
        cells = torch.div(anchors.flatten(), num_anchors, rounding_mode="floor")
        image = torch.arange(len(anchors), device=anchors.device).repeat_interleave(anchors.shape[1])
        hidden, inside = windows(features, image, cells, radius=len(self.conv))
        for conv in self.conv.modules():
            if isinstance(conv, nn.Conv2d):  # beyond the map is zero, not bias
                hidden = hidden * inside[:, None]
                conv2d = F.conv2d if hidden.shape[-1] > 3 else on_one_cell
                hidden = conv2d(hidden, conv.weight, conv.bias).relu_()
                inside = inside[:, 1:-1, 1:-1]
        which = (anchors.flatten() % num_anchors)[:, None]
        logits, deltas = (
            on_one_cell(hidden, c.weight, c.bias).flatten(1) for c in (self.objectness_logits, self.deltas)
        )
        deltas = take(deltas.view(len(hidden), num_anchors, 4), which)
        return logits.gather(1, which).view(anchors.shape), deltas.view(*anchors.shape, 4)


def on_one_cell(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias) of x [S, C, k, k] with weight [O, C, k, k], [S, O, 1, 1]: as a matrix product, whose
    gradient takes a tenth of the time on a CPU."""
    x, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (x, weight))
    return F.linear(x, weight, bias)[:, :, None, None]


def windows(features: Sequence[Tensor], image: Tensor, cells: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Windows [S, C, k, k], k = 2 radius + 1, of features (levels [N, C, Hl, Wl]) around cells [S], numbered row by row
    and level by level, of image [S]; and whether they are inside the map, [S, k, k] bool. What is not has any value."""
    start, height, width = (torch.zeros_like(cells) for _ in range(3))
    total = 0
    for level in features:
        reached = cells >= total
        for of_cell, of_level in zip((start, height, width), (total, *level.shape[-2:])):
            of_cell.masked_fill_(reached, of_level)
        total += level.shape[-2] * level.shape[-1]
    reach = torch.arange(-radius, radius + 1, device=cells.device)
    y = (torch.div(cells - start, width, rounding_mode="floor")[:, None] + reach)[:, :, None]
    x = (((cells - start) % width)[:, None] + reach)[:, None, :]
    height, width, start = (t[:, None, None] for t in (height, width, start + image * total))
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    table = torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in features], 1).flatten(0, 1)
    found = F.embedding(torch.where(inside, start + y * width + x, 0), table)
    return found.permute(0, 3, 1, 2), inside


class RPN(nn.Module):
    """Proposals from features, and the losses of making them.

    Args:
        in_channels, strides: of the levels that come in.
        anchor_sizes, aspect_ratios, anchor_rounding: see AnchorGenerator.
        conv_channels: widths of the 3 x 3 convolutions; empty widths default to one of in_channels.
        pre_nms_top_n: best candidates of each level that enter NMS, (training, inference).
        post_nms_top_n: best survivors of an image that leave it, (training, inference).
        nms_threshold: IoU above which the weaker box of the same level goes.
        min_size: candidates with a shorter side, in pixels, are dropped.
        rank_by: 'logit', or 'probability': mmdetection's, where logits above 17 or so tie in float32, with mmcv's NMS.
        clamp_shrinking: see BoxCoder.
        batch_size_per_image, positive_fraction: anchors that enter the loss.
        positive_iou, negative_iou: matching thresholds, with low-quality matches.
        box_loss, beta: see losses.BoxLoss.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        anchor_sizes: Sequence[Sequence[float]] = ((32,), (64,), (128,), (256,), (512,)),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        anchor_rounding: bool = False,
        conv_channels: Sequence[int] | None = None,
        pre_nms_top_n: tuple[int, int] = (2000, 1000),
        post_nms_top_n: tuple[int, int] = (2000, 1000),
        nms_threshold: float = 0.7,
        min_size: float = 0.0,
        rank_by: str = "logit",
        clamp_shrinking: bool = False,
        batch_size_per_image: int = 256,
        positive_fraction: float = 0.5,
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        box_loss: str = "smooth_l1",
        beta: float = 1.0 / 9,
    ):
        super().__init__()
        check_thresholds(negative_iou, positive_iou)
        check_fractions(nms_threshold=nms_threshold, positive_fraction=positive_fraction)
        check_counts(
            batch_size_per_image=batch_size_per_image,
            pre_nms_top_n=min(pre_nms_top_n),
            post_nms_top_n=min(post_nms_top_n),
        )
        if rank_by not in ("logit", "probability"):
            raise ValueError(f"rank_by={rank_by!r}: expected 'logit' or 'probability'")
        self.anchors = AnchorGenerator(strides, anchor_sizes, aspect_ratios, anchor_rounding)
        self.head = RPNHead(in_channels, self.anchors.num_anchors, conv_channels or [in_channels])
        self.coder = BoxCoder(clamp_shrinking=clamp_shrinking)
        self.box_loss = losses.BoxLoss(self.coder, box_loss, beta)
        self.pre_nms_top_n, self.post_nms_top_n = tuple(pre_nms_top_n), tuple(post_nms_top_n)
        self.nms_threshold, self.min_size, self.rank_by = nms_threshold, min_size, rank_by
        self.batch_size_per_image, self.positive_fraction = batch_size_per_image, positive_fraction
        self.positive_iou, self.negative_iou = positive_iou, negative_iou

    def forward(
        self, features: Sequence[Tensor], batch: Batch, targets: Targets | None = None
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals of features [N, C, Hl, Wl] over L levels; with targets also loss_objectness, loss_rpn_box_reg."""
        anchors = self.anchors(features)
        with torch.no_grad():  # proposals are constants to the heads, and the losses look at a sample only
            logits, deltas = self.head(features)
            proposals = self.propose(logits, deltas, anchors, batch.image_sizes)
        return proposals, {} if targets is None else self.losses(features, torch.cat(anchors), batch, targets)

    @torch.no_grad()
    def propose(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        image_sizes: Tensor,
        suppress: Callable[..., Survivors] = survivors,
    ) -> Proposals:
        """Decode, clip and suppress; logits, deltas and anchors per level as RPNHead and AnchorGenerator give them.

        suppress: `ops.boxes.survivors`, or what stands for it in an exported program.
        """
        pre, post = self.pre_nms_top_n[not self.training], self.post_nms_top_n[not self.training]
        candidates = []
        for level, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors)):
            score, index = self.best(logit.float(), torch.sym_min(pre, logit.shape[1]))
            candidates.append((take(delta, index), anchor[index], score, torch.full_like(index, level)))
        moves, places, scores, levels = (torch.cat(of_levels, 1) for of_levels in zip(*candidates))
        boxes = clip(self.coder.decode(moves, places), image_sizes)

        large = (boxes[..., 2:] - boxes[..., :2] > self.min_size).all(-1)
        image = torch.arange(len(image_sizes), device=boxes.device)
        nms = nms_by_image if self.rank_by == "logit" else nms_like_mmcv
        args = (image, levels, nms, self.nms_threshold, len(image_sizes), post)
        found = suppress(boxes, scores, large & scores.isfinite(), *args)
        scores = found.scores.sigmoid() * found.valid if self.rank_by == "logit" else found.scores
        return Proposals(found.of(boxes), scores, found.valid)

    def best(self, logits: Tensor, count: int | torch.SymInt) -> tuple[Tensor, Tensor]:
        """The `count` highest of logits [N, A], or all of them, and where they are, both [N, count]."""
        scores = logits if self.rank_by == "logit" else logits.sigmoid()
        if self.rank_by == "logit" or torch.compiler.is_exporting():  # a program does not know how many there will be
            return scores.topk(count, dim=1)
        if count == scores.shape[1]:  # theirs sorts only to leave some out, unstably: the order of ties counts
            return scores, torch.arange(count, device=scores.device).expand_as(scores)
        scores, index = scores.sort(dim=1, descending=True)
        return scores[:, :count], index[:, :count]

    def losses(self, features: Sequence[Tensor], anchors: Tensor, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """Losses of the head's predictions on a random sample of the anchors [A, 4] of all levels."""
        with torch.no_grad():
            matches = match(anchors, targets, self.negative_iou, self.positive_iou, low_quality=True)
            args = batch.sample_keys, self.batch_size_per_image, self.positive_fraction
            samples = sample(matches.verdict, *args, stage=0)
            gt_boxes = take(targets.boxes, take(matches.matched_idxs, samples.indices))
            count = losses.global_mean_count(samples.valid.sum())
        logits, deltas = self.head.at(features, samples.indices)
        positive = samples.positive.float()
        return {
            "loss_objectness": losses.objectness(logits, positive, samples.valid.float(), count),
            "loss_rpn_box_reg": self.box_loss(deltas, gt_boxes, anchors[samples.indices], positive, count),
        }
