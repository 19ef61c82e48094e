"""Hybrid Task Cascade: what flows from head to head, and on which boxes each of them learns."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchvision.ops import box_iou

from detector.export.export import check_exportable
from detector.heads import CascadeBoxHead, ConvTrunk, FCTrunk, HybridMaskHead
from detector.heads.box import SampledRoIs
from detector.model import TwoStageDetector
from detector.roi import RoIAlign
from detector.structures import Batch, Detections, Proposals, Targets
from tests.tiny import random_batch, tiny_model

MASKS = {"roi": RoIAlign, "trunk": partial(ConvTrunk, conv_channels=[6]), "upsample_channels": 8}
BOXES = {"roi": RoIAlign, "trunk": partial(FCTrunk, fc_channels=[8]), "batch_size_per_image": 24}


def head(**settings) -> HybridMaskHead:
    torch.manual_seed(0)
    return HybridMaskHead(4, [4], 3, **MASKS | settings)


def by_hand(model, pooled, count: int) -> torch.Tensor:
    """Figure 2d: F_i = M_i(RoI features + G_i(F_{i-1}))."""
    flowing = model.stages[0].trunk(pooled)
    for i in range(1, count):
        weight, bias = model.flow[i - 1].weight[:, :, 0, 0], model.flow[i - 1].bias
        joined = pooled + (torch.einsum("oc,rchw->rohw", weight, flowing) + bias[:, None, None]).relu()
        flowing = model.stages[i].trunk(joined)
    return flowing


@torch.no_grad()
def test_each_head_sees_what_the_one_before_made_of_its_own_rois():
    model, maps = head(), [torch.randn(1, 4, 25, 25)]
    rois = torch.tensor([[0, 8.0, 8, 64, 64], [0, 20, 12, 76, 40], [0, 0, 0, 28, 28]])
    found = model(maps, rois)
    for stage, prediction in enumerate(found.stages):
        pooled = model.stages[stage].extractor(maps, rois[stage : stage + 1]).features
        torch.testing.assert_close(prediction.hidden, by_hand(model, pooled, stage + 1))
    assert found.roi_features.features.shape[0] == 3


@torch.no_grad()
def test_masks_are_the_mean_of_all_heads():
    model, maps = head(), [torch.randn(1, 4, 25, 25)]
    valid = torch.tensor([[True, True, False]])
    boxes = torch.tensor([[[8.0, 8, 60, 60], [20, 12, 80, 40], [0, 0, 0, 0]]])
    found = Detections(boxes, torch.ones(1, 3), torch.tensor([[2, 3, 0]]), valid)
    masks = model.detect(maps, found).masks
    pooled = model.stages[-1].extractor(maps, torch.tensor([[0, 8.0, 8, 60, 60], [0, 20, 12, 80, 40]])).features
    expected = [
        stage.predictor(by_hand(model, pooled, i + 1), torch.tensor([2, 3])).sigmoid()
        for i, stage in enumerate(model.stages)
    ]
    torch.testing.assert_close(masks[0, :2], sum(expected) / 3)
    assert (masks[0, 2] == 0).all()
    assert model.detect(maps, found._replace(valid=torch.zeros_like(valid))).masks.shape == (1, 3, 28, 28)


def sampled_step():
    """A cascade's step on random proposals near two objects."""
    torch.manual_seed(4)
    boxes = CascadeBoxHead(4, [4], 3, **BOXES)
    for stage in boxes.stages:
        torch.nn.init.normal_(stage.predictor.box_deltas.weight, std=1.0)
    objects = torch.tensor([[[10.0, 10, 60, 50], [30, 40, 90, 90]]])
    yes = torch.ones(1, 2).bool()
    masks = torch.ones(1, 2, 28, 28, dtype=torch.uint8)
    targets = Targets(objects, torch.tensor([[1, 3]]), yes, ~yes, masks, objects, yes)
    around = objects.repeat(1, 20, 1) + 8 * torch.randn(1, 40, 4)
    sizes, key = torch.tensor([[100, 100]]), torch.zeros(1, dtype=torch.long)
    batch = Batch(torch.zeros(1, 3, 100, 100, dtype=torch.uint8), sizes, sizes, key, key)
    sampled, _ = boxes.sample(Proposals(around, torch.ones(1, 40), torch.ones(1, 40).bool()), batch, targets)
    return boxes, boxes([torch.randn(1, 4, 25, 25)], sampled.rois), sampled, targets


def test_masks_learn_on_the_boxes_that_their_stage_has_refined():
    boxes, prediction, sampled, targets = sampled_step()
    model = head()
    rows = model.interleaved(boxes, prediction, sampled, targets)
    size, learnt = len(rows.rois) // 3, []
    for t, iou in enumerate((0.5, 0.6, 0.7)):
        own = SampledRoIs(*(values[t * size : (t + 1) * size] for values in rows))
        deltas = prediction.stages[t].box_deltas[:, 0]
        refined = boxes.stages[t].coder.decode(deltas, prediction.rois[t][:, 1:]).clamp(0, 100)
        overlaps = box_iou(refined, targets.boxes[0])
        expected = {
            (*(round(v, 3) for v in box.tolist()), int(best))
            for box, best, most in zip(refined, overlaps.argmax(1), overlaps.amax(1))
            if most >= iou
        }
        on = own.weight > 0
        found = {
            (*(round(v, 3) for v in box.tolist()), int(i)) for box, i in zip(own.rois[on, 1:], own.matched_idxs[on])
        }
        assert found == expected
        assert (own.labels[on] == targets.labels[0, own.matched_idxs[on]]).all()
        learnt.append(len(found))
    assert size == max(learnt) and len(set(learnt)) > 1


def test_losses_are_summed_with_the_stages_weights():
    boxes, prediction, sampled, targets = sampled_step()
    model = head(stage_weights=[1.0, 0.5, 0.25])
    rows = model.interleaved(boxes, prediction, sampled, targets)
    found = model([torch.randn(1, 4, 25, 25)], rows.rois)
    size = len(rows.rois) // 3
    terms = [
        weight * stage.losses(p, SampledRoIs(*(v[t * size : (t + 1) * size] for v in rows)), targets)["loss_mask"]
        for t, (stage, p, weight) in enumerate(zip(model.stages, found.stages, (1.0, 0.5, 0.25)))
    ]
    loss = model.losses(found, rows, targets)["loss_mask"]
    torch.testing.assert_close(loss, sum(terms))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_padding_of_a_stage_does_not_count_in_norms():
    """A stage has fewer boxes than another, and padding instead: the layers learn from its boxes alone."""
    maps = [torch.randn(1, 4, 25, 25)]
    rois = torch.tensor([[0, 8.0, 8, 64, 64], [0, 20, 12, 76, 40], [0, 4, 30, 28, 90]])
    found = []
    for padding in (0, 3):
        model = head(trunk=partial(ConvTrunk, conv_channels=[6], norm="batch_norm"))
        of_stage = torch.cat([rois, torch.zeros(padding, 5)])
        stages = model(maps, of_stage.repeat(3, 1)).stages
        sum(stage.hidden[:3].square().sum() for stage in stages).backward()
        assert all(len(stage.hidden) == 3 + padding for stage in stages)
        found.append([*model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found)


def hybrid():
    model = tiny_model(mask=False)
    arguments = 16, model.neck.strides[:4], 3
    model.box_head = CascadeBoxHead(*arguments, **BOXES)
    model.mask_head = HybridMaskHead(*arguments, **MASKS)
    return model


def test_a_step_and_a_step_without_objects():
    model, (batch, targets) = hybrid(), random_batch()
    losses, stats = model(batch, targets, stats=True)
    sum(losses.values()).backward()
    assert losses["loss_mask"] > 0 and len(stats["mask_head/roi_sizes"]) > 0
    nothing = targets._replace(valid=torch.zeros_like(targets.valid))
    again = model(batch, nothing)
    assert set(again) == set(losses) and again["loss_mask"] == 0
    with pytest.raises(ValueError, match=r"mask_head is a HybridMaskHead.*\.safetensors"):
        check_exportable(model.eval())


def test_stages_that_do_not_fit_are_named():
    made, plain = hybrid(), tiny_model()
    parts = made.neck, made.rpn, plain.box_head, made.mask_head
    with pytest.raises(ValueError, match=r"mask_head has 3 stages and box_head 1: .*model=htc"):
        TwoStageDetector(3, made.backbone, *(lambda *_, part=part: part for part in parts))
