"""Keypoints against torchvision's functions."""

from __future__ import annotations

from functools import partial

import torch
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints, keypoints_to_heatmap

from detector.heads import ConvTrunk, KeypointHead
from detector.heads.box import SampledRoIs
from detector.heads.keypoint import from_heatmaps, to_cells
from detector.roi import RoIAlign
from detector.structures import Detections, Targets

BOXES = torch.tensor([[3.0, 5, 40.5, 66], [10, 10, 12, 90], [0, 0, 0.3, 0.4]])


def random_keypoints() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 17, 2, generator=generator) * 100
    visible = torch.randint(0, 3, (3, 17, 1), generator=generator).float()
    keypoints = torch.cat([points, visible], dim=-1)
    keypoints[0, 0] = torch.tensor([40.5, 66, 2])  # on the far corner
    keypoints[0, 1] = torch.tensor([3.0, 5, 2])
    return keypoints


def test_cells_of_keypoints():
    keypoints = random_keypoints()[:2]
    cells, inside = to_cells(keypoints, BOXES[:2], (56, 56))
    expected, valid = keypoints_to_heatmap(keypoints, BOXES[:2], 56)
    assert torch.equal(inside.long(), valid)
    assert torch.equal(cells * inside.long(), expected * valid)
    assert cells[0, 0] == 56 * 56 - 1 and inside[0, :2].all()


def test_keypoints_of_heatmaps():
    logits = torch.randn(3, 17, 56, 56, generator=torch.Generator().manual_seed(0))
    found = from_heatmaps(logits, BOXES, "logit")
    points, scores = heatmaps_to_keypoints(logits, BOXES)
    torch.testing.assert_close(found[..., :2], points[..., :2])
    torch.testing.assert_close(found[..., 2], scores)
    probability = from_heatmaps(logits, BOXES, "probability")[..., 2]
    peak = from_heatmaps(logits, BOXES, "logit")[..., 2].exp() / logits.exp().sum(dim=(2, 3))
    torch.testing.assert_close(probability, peak)


def head() -> KeypointHead:
    torch.manual_seed(0)
    trunk = partial(ConvTrunk, conv_channels=[8])
    return KeypointHead(4, [8], 1, RoIAlign, num_keypoints=17, trunk=trunk)


def test_the_loss_looks_at_labelled_keypoints_inside_the_roi():
    keypoints = random_keypoints()
    valid = torch.ones(1, 3, dtype=torch.bool)
    targets = Targets(BOXES[None], valid.long(), valid, ~valid, keypoints=keypoints[None])
    rois = torch.cat([torch.zeros(2, 1), BOXES[:2]], dim=1)
    positives = SampledRoIs(torch.ones(2), rois, torch.ones(2).long(), torch.tensor([0, 1]))
    model, features = head(), [torch.randn(1, 4, 12, 12)]
    prediction = model(features, rois)
    assert prediction.keypoint_logits.shape == (2, 17, 56, 56)
    expected, valid = keypoints_to_heatmap(keypoints[:2], BOXES[:2], 56)
    logits = prediction.keypoint_logits.flatten(2)[valid.bool()]
    expected = torch.nn.functional.cross_entropy(logits, expected[valid.bool()])
    torch.testing.assert_close(model.losses(prediction, positives, targets)["loss_keypoint"], expected)
    hidden = targets._replace(keypoints=targets.keypoints * torch.tensor([1.0, 1, 0]))
    assert model.losses(prediction, positives, hidden)["loss_keypoint"] == 0


def test_detections_get_keypoints():
    valid = torch.tensor([[True, True, False], [False, False, False]])
    boxes = BOXES[None].repeat(2, 1, 1)
    empty = Detections(boxes, torch.ones(2, 3), torch.ones(2, 3).long(), torch.zeros_like(valid))
    features = [torch.randn(2, 4, 12, 12)]
    with torch.no_grad():
        found = head().detect(features, empty._replace(valid=valid))
        assert found.keypoints.shape == (2, 3, 17, 3)
        assert (found.keypoints[0, 1, :, 0] >= 10).all() and (found.keypoints[0, 1, :, 0] <= 12).all()
        assert not found.keypoints[1].any()
        assert not head().detect(features, empty).keypoints.any()
