"""Box heads of other kinds: the Double-Head, and that of Dynamic R-CNN."""

from __future__ import annotations

import statistics
from functools import partial

import pytest
import torch
from torchvision.ops import box_iou

from detector.heads import BoxHead, CascadeBoxHead, DoubleBoxHead, DynamicBoxHead, FCTrunk, ResidualTrunk
from detector.roi import RoIAlign
from detector.structures import Batch, Proposals, Targets

SMALL = {"roi": RoIAlign, "trunk": partial(FCTrunk, fc_channels=[8])}


def double(**settings):
    torch.manual_seed(0)
    trunk = partial(ResidualTrunk, channels=16, blocks=1)
    return DoubleBoxHead(4, [4, 8], 3, box_trunk=trunk, **SMALL | settings).eval()


def test_the_double_heads_boxes_see_a_wider_roi_than_its_classes():
    head = double(box_scale=2.0)
    features = [torch.randn(1, 4, 24, 24), torch.randn(1, 4, 12, 12)]
    rois = torch.tensor([[0, 30.0, 30, 50, 60]])
    before = head(features, rois)
    assert before.class_logits.shape == (1, 4) and before.box_deltas.shape == (1, 3, 4)
    for level, stride in zip(features, (4, 8)):  # a ring that only the RoI of 10..70 by 15..75 sees
        level[:, :, 72 // stride - 1 : 84 // stride] += 1
        level[:, :, :, 64 // stride : 72 // stride] += 1
    after = head(features, rois)
    assert torch.equal(before.class_logits, after.class_logits)
    assert (before.box_deltas - after.box_deltas).abs().max() > 1e-6
    assert after.roi_features.features.shape == (1, 4, 7, 7)


def test_trunks_of_the_double_head_are_those_of_the_paper():
    """Figure 5: the box trunk widens 256 channels to 1024, then has four bottlenecks of 256."""
    with torch.device("meta"):
        head = DoubleBoxHead(256, [4], 80, roi=RoIAlign)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in head.named_children()}
    norms = 2 * (256 + 1024 + 1024) + 4 * 2 * (256 + 256 + 1024)
    widening = 256 * 256 * 9 + 2 * 256 * 1024
    assert counts["box_trunk"] == widening + 4 * (2 * 1024 * 256 + 256 * 256 * 9) + norms
    assert counts["trunk"] == 256 * 49 * 1024 + 1024 + 1024 * 1024 + 1024
    assert counts["predictor"] == 1025 * 81 + 1025 * 320


@pytest.mark.parametrize("kind", [BoxHead, CascadeBoxHead, DoubleBoxHead, DynamicBoxHead])
def test_predictors_start_small_or_by_their_inputs(kind):
    """Normal with 0.01 and 0.001, or uniform within one over the root of the trunk's 400 channels, biases too."""
    torch.manual_seed(0)
    trunks = {"trunk": partial(FCTrunk, fc_channels=[400])}
    if kind is DoubleBoxHead:
        trunks["box_trunk"] = partial(ResidualTrunk, channels=400, blocks=1)
    for init in ("small", "fan_in"):
        head = kind(4, [4], 50, roi=RoIAlign, predictor_init=init, **trunks)
        for stage in head.stages:
            for layer, std in ((stage.predictor.class_logits, 0.01), (stage.predictor.box_deltas, 0.001)):
                largest = layer.weight.abs().max().item()
                if init == "small":
                    assert layer.weight.std().item() == pytest.approx(std, rel=0.1) and not layer.bias.any()
                else:
                    assert largest == pytest.approx(1 / 20, rel=0.02) and largest <= 1 / 20 and layer.bias.any()


def test_an_unknown_start_of_predictors_is_refused():
    with pytest.raises(ValueError, match="predictor_init must be one of 'small', 'fan_in', got 'zero'"):
        double(predictor_init="zero")


def test_a_box_scale_without_extent_is_refused():
    with pytest.raises(ValueError, match=r"box_scale=0\.0: must be positive"):
        double(box_scale=0.0)


def one_step(head: DynamicBoxHead, seed: int) -> tuple[float, float]:
    """Of random proposals and objects: what the head should write down, by plain loops over the paper's words."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, 30, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 10 + 30 * torch.rand(2, 30, 2, generator=generator)], 2)
    targets = Targets(
        boxes[:, :4] + 2 * torch.rand(2, 4, 4, generator=generator),
        torch.ones(2, 4, dtype=torch.long),
        torch.tensor([[True] * 4, [True, True, False, False]]),
        torch.zeros(2, 4, dtype=torch.bool),
    )
    valid = torch.rand(2, 30, generator=generator) > 0.1
    sizes, keys = torch.tensor([[100, 100]] * 2), torch.arange(2)
    batch = Batch(torch.zeros(2, 3, 100, 100, dtype=torch.uint8), sizes, sizes, keys, keys)
    sampled, _ = head.sample(Proposals(boxes, torch.ones(2, 30), valid), batch, targets)
    prediction = head([torch.randn(2, 4, 25, 25)], sampled.rois)
    sum(head.losses(prediction, sampled, targets).values()).backward()

    reached, lacking = [], []
    for image in range(2):
        objects = targets.boxes[image][targets.valid[image]]
        candidates = torch.cat([boxes[image][valid[image]], objects])
        best = box_iou(candidates, objects).amax(1).sort(descending=True).values
        reached.append(float(best[head.iou_rank - 1]))
    for roi, label, row, weight in zip(sampled.rois, sampled.labels, sampled.matched_idxs, sampled.weight):
        if label and weight:
            target = targets.boxes[int(roi[0]), row]
            sides = roi[3:] - roi[1:3]
            away = ((target[:2] + target[2:]) / 2 - (roi[1:3] + roi[3:]) / 2).abs() / sides * 10
            lacking.append(float(away.mean()))
    return statistics.mean(reached), sorted(lacking)[min(2 * head.beta_rank, len(lacking)) - 1]


def test_threshold_and_beta_follow_the_last_steps():
    head = DynamicBoxHead(
        4, [4], 1, iou_rank=5, beta_rank=3, interval=3, initial_iou=0.3, batch_size_per_image=16, **SMALL
    )
    for start in (0, 3):
        held = float(head.iou), float(head.beta)
        seen = []
        for seed in range(start, start + 3):
            assert (float(head.iou), float(head.beta)) == held  # until the interval is over
            seen.append(one_step(head, seed))
        ious, betas = zip(*seen)
        assert float(head.iou) == pytest.approx(max(0.3, statistics.mean(ious)), abs=1e-6)
        assert float(head.beta) == pytest.approx(min(1.0, statistics.median(betas)), rel=1e-4)
        assert (float(head.iou), float(head.beta)) != held


def test_what_a_dynamic_head_has_learnt_travels_and_plain_weights_fit():
    head = DynamicBoxHead(4, [4], 1, interval=2, iou_rank=5, **SMALL)
    one_step(head, 0)
    again = DynamicBoxHead(4, [4], 1, interval=2, iou_rank=5, **SMALL)
    again.load_state_dict(head.state_dict())
    for seed in (1, 2):
        one_step(head, seed), one_step(again, seed)
        assert float(head.iou) == float(again.iou) and float(head.beta) == float(again.beta)
    plain = BoxHead(4, [4], 1, **SMALL)
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again.trunk.fc[0].weight, plain.trunk.fc[0].weight)


def test_steps_without_positives_leave_beta_alone():
    head = DynamicBoxHead(4, [4], 1, interval=1, beta=0.7, **SMALL)
    nothing = Targets(
        torch.zeros(1, 1, 4), *(torch.zeros(1, 1, dtype=kind) for kind in (torch.long, torch.bool, torch.bool))
    )
    sizes, key = torch.tensor([[40, 40]]), torch.zeros(1, dtype=torch.long)
    batch = Batch(torch.zeros(1, 3, 40, 40, dtype=torch.uint8), sizes, sizes, key, key)
    proposals = Proposals(torch.tensor([[[0.0, 0, 9, 9]]]), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
    sampled, _ = head.sample(proposals, batch, nothing)
    losses = head.losses(head([torch.randn(1, 4, 10, 10)], sampled.rois), sampled, nothing)
    assert all(loss.isfinite() for loss in losses.values())
    assert float(head.beta) == pytest.approx(0.7) and float(head.iou) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "must be positive"),
        ({"box_loss": "giou"}, "box_loss"),
        ({"interval": 0}, "interval"),
    ],
)
def test_settings_that_a_dynamic_head_cannot_follow(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicBoxHead(4, [4], 1, **SMALL | settings)
