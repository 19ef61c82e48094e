"""Dynamic R-CNN (Zhang et al. 2020): a box head that asks more of the proposals as they get better.

Both the IoU from which a proposal is positive and the beta of smooth L1 follow what the last iterations have seen.
Dimensions: N images, P proposals per image, R RoIs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from detector.heads.box import BoxHead, BoxPrediction, SampledRoIs
from detector.ops import losses
from detector.ops.checks import check_choice, check_counts
from detector.ops.sampling import Matches, match
from detector.structures import Targets

SMALLEST = 1e-6  # beta: where all positives fit exactly


class DynamicBoxHead(BoxHead):
    """A box head whose `iou` and `beta` are set anew every `interval` training steps, alike on all ranks.

    Args:
        initial_iou: matching threshold at first, and the least that it gets.
        iou_rank: K_I of the paper: the threshold becomes the mean, over images, of the K_I-th largest IoU.
        beta: of smooth L1 at first, and the most that it gets.
        beta_rank: K_beta for each image: beta becomes the median, over steps, of the so-many-th smallest mean offset
            that positives still lack, in units of the deltas.
        interval: C, training steps.
        settings: see BoxHead; positive_iou and negative_iou are `iou` here.
    """

    iou: Tensor
    beta: Tensor
    step: Tensor
    ious: Tensor
    betas: Tensor

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        initial_iou: float = 0.4,
        iou_rank: int = 75,
        beta: float = 1.0,
        beta_rank: int = 10,
        interval: int = 100,
        box_loss: str = "smooth_l1",
        **settings: Any,
    ):
        own: dict[str, Any] = {"positive_iou": initial_iou, "negative_iou": initial_iou, "beta": beta}
        super().__init__(in_channels, strides, num_classes, box_loss=box_loss, **own, **settings)
        check_choice("box_loss", box_loss, ("smooth_l1",))
        check_counts(iou_rank=iou_rank, beta_rank=beta_rank, interval=interval)
        if beta <= 0:
            raise ValueError(f"beta={beta}: must be positive, it becomes smaller by itself")
        self.initial_iou, self.initial_beta = initial_iou, beta
        self.iou_rank, self.beta_rank = iou_rank, beta_rank
        self.register_buffer("iou", torch.tensor(initial_iou))
        self.register_buffer("beta", torch.tensor(beta))
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("ious", torch.zeros(interval))  # of the last steps, a ring
        self.register_buffer("betas", torch.full((interval,), torch.nan))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Start from what other frameworks or plain box heads know, which have no such buffers."""
        for name, value in self.named_buffers(recurse=False):
            if name not in self._non_persistent_buffers_set:
                state_dict.setdefault(prefix + name, value.clone())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def match(self, boxes: Tensor, valid: Tensor, targets: Targets) -> Matches:
        """At the present threshold; what the proposals [N, P] reach is written down."""
        matches = match(boxes, targets, self.iou, self.iou)
        best = torch.where(valid, matches.iou, 0).clamp(min=0)
        reached = best.topk(min(self.iou_rank, best.shape[1]), dim=1).values[:, -1].mean()
        self.ious[self.step % len(self.ious)] = losses.global_mean(reached)
        return matches

    def losses(self, prediction: BoxPrediction, sampled: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """See BoxHead, with the present beta; ends the step."""
        # a copy: the backward pass comes after the change below
        self.box_loss.loss = partial(losses.smooth_l1, beta=self.beta.clone())
        found = super().losses(prediction, sampled, targets)
        with torch.no_grad():
            positive = (sampled.weight > 0) & (sampled.labels > 0)
            lacking = self.coder.encode(sampled.of_targets(targets.boxes), sampled.rois[:, 1:])[:, :2].abs().mean(1)
            ordered = torch.where(positive, lacking, torch.inf).sort().values
            rank = positive.sum().clamp(max=self.beta_rank * len(targets.boxes))
            value = torch.where(rank > 0, ordered[(rank - 1).clamp(min=0)], torch.nan)
            self.betas[self.step % len(self.betas)] = losses.global_mean(value)
            self.step += 1
            due = self.step % len(self.ious) == 0
            beta = self.betas.nanmedian().clamp(SMALLEST, self.initial_beta).nan_to_num(self.initial_beta)
            self.iou.copy_(torch.where(due, self.ious.mean().clamp(min=self.initial_iou), self.iou))
            self.beta.copy_(torch.where(due, beta, self.beta))
        return found
