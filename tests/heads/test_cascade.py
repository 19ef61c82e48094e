"""Cascade R-CNN: what each stage sees and is asked for, and how the stages vote."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from detector.heads import CascadeBoxHead, CascadeMaskHead, ConvTrunk, FCTrunk, MaskHead
from detector.heads.box import SampledRoIs
from detector.heads.cascade import relabel
from detector.roi import DeformableRoIPool, RoIAlign
from detector.structures import Batch, Proposals, Targets

STRIDES = [8, 16]


def features() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 8, 96 // s, 128 // s, generator=generator) for s in STRIDES]


def cascade(**settings) -> CascadeBoxHead:
    torch.manual_seed(0)
    trunk = partial(FCTrunk, fc_channels=[16])
    head = CascadeBoxHead(8, STRIDES, 3, **{"roi": RoIAlign, "trunk": trunk, "score_threshold": 0.0, **settings})
    for stage in head.stages:
        torch.nn.init.normal_(stage.predictor.class_logits.weight, std=1.0)
        torch.nn.init.normal_(stage.predictor.box_deltas.weight, std=0.5)
    return head


def inputs() -> tuple[Batch, Proposals]:
    boxes = torch.tensor([[[8.0, 8, 60, 70], [50, 20, 120, 76]], [[20, 30, 90, 78], [1, 2, 30, 40]]])
    sizes = torch.tensor([[96, 128], [80, 100]])
    images = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
    batch = Batch(images, sizes, sizes, torch.arange(2), torch.arange(2))
    return batch, Proposals(boxes, torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool))


def test_each_stage_sees_the_boxes_of_the_one_before():
    head, (batch, proposals) = cascade(), inputs()
    rois = torch.cat([torch.tensor([0.0, 0, 1, 1])[:, None], proposals.boxes.flatten(0, 1)], dim=1)
    prediction = head(features(), rois, batch.image_sizes)
    for i in (0, 1):
        stage, seen = head.stages[i], prediction.rois[i]
        boxes = stage.coder.decode(stage(features(), seen).box_deltas[:, 0], seen[:, 1:])
        limits = torch.tensor([[128.0, 96], [128, 96], [100, 80], [100, 80]]).repeat(1, 2)
        torch.testing.assert_close(prediction.rois[i + 1][:, 1:], torch.minimum(boxes.clamp(min=0), limits))
    assert torch.equal(prediction.rois[0], rois)
    assert head.stages[1].coder.weights == (20.0, 20.0, 10.0, 10.0)


def test_later_stages_are_labelled_anew():
    targets = Targets(
        torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40]]]),
        torch.tensor([[2, 3]]),
        torch.tensor([[True, True]]),
        torch.tensor([[False, False]]),
    )
    rois = torch.tensor([[0.0, 0, 0, 10, 9], [0, 0, 0, 10, 6.5], [0, 21, 20, 40, 40], [0, 60, 60, 80, 80]])
    before = SampledRoIs(torch.ones(4), rois, torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    after = relabel(before, rois, targets, iou=0.7)
    assert after.labels.tolist() == [2, 0, 3, 0]
    assert after.matched_idxs[[0, 2]].tolist() == [0, 1]
    assert relabel(before, rois, targets, iou=0.6).labels.tolist() == [2, 2, 3, 0]


def test_losses_are_the_weighted_sum_of_the_stages():
    head, (batch, proposals) = cascade(), inputs()
    targets = Targets(
        proposals.boxes + 2.0,
        torch.tensor([[1, 2], [3, 1]]),
        proposals.valid,
        torch.zeros_like(proposals.valid),
    )
    sampled, _ = head.sample(proposals, batch, targets)
    prediction = head(features(), sampled.rois, batch.image_sizes)
    found = head.losses(prediction, sampled, targets)
    expected = {"loss_classifier": 0.0, "loss_box_reg": 0.0}
    for i, weight in enumerate((1.0, 0.5, 0.25)):
        rows = sampled if i == 0 else relabel(sampled, prediction.rois[i], targets, (0.5, 0.6, 0.7)[i])
        for key, value in head.stages[i].losses(prediction.stages[i], rows, targets).items():
            expected[key] = expected[key] + weight * value
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_the_stages_vote_by_probability_or_by_logit():
    batch, proposals = inputs()
    for average in ("probability", "logit"):
        head = cascade(average=average, nms_threshold=1.0)
        found = head.detect(features(), proposals, batch)
        rois = torch.cat([torch.tensor([0.0, 0, 1, 1])[:, None], proposals.boxes.flatten(0, 1)], dim=1)
        logits = torch.stack([s.class_logits for s in head(features(), rois, batch.image_sizes).stages])
        scores = logits.softmax(-1).mean(0) if average == "probability" else logits.mean(0).softmax(-1)
        expected = scores[:2, 1:].flatten().sort(descending=True).values
        torch.testing.assert_close(found.scores[0][found.valid[0]], expected)


def test_masks_of_all_stages_are_averaged():
    torch.manual_seed(0)
    settings = {"roi": RoIAlign, "trunk": partial(ConvTrunk, conv_channels=[4]), "upsample_channels": 4}
    head = CascadeMaskHead(8, STRIDES, 3, **settings)
    batch, proposals = inputs()
    detections = cascade().detect(features(), proposals, batch)
    alone = [stage.detect(features(), detections).masks for stage in head.stages]
    torch.testing.assert_close(head.detect(features(), detections).masks, sum(alone) / 3)
    assert isinstance(head.stages[2], MaskHead)


def test_offsets_of_all_stages_are_regularised():
    head = cascade(roi=partial(DeformableRoIPool, predictor_width=8))
    rois = torch.tensor([[0.0, 8, 8, 60, 70]])
    prediction = head(features(), rois)
    assert prediction.roi_features.offsets.shape == (1, 2, 3 * 7, 7)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="of one length"):
        cascade(positive_iou=[0.5, 0.6])
    with pytest.raises(ValueError, match="average"):
        cascade(average="vote")
