"""PointRend against plain loops."""

from __future__ import annotations

from math import floor

import pytest
import torch
import torch.nn.functional as F

import detector
from detector.explorer.page import collect
from detector.export.export import check_exportable
from detector.heads import PointRendHead
from detector.heads.box import SampledRoIs
from detector.roi import RoIAlign
from detector.structures import Detections, Targets
from tests.tiny import tiny_model
from tests.untrained import SMALL, configured, untrained

ROIS = torch.tensor([[0, 8.0, 8, 64, 60], [1, 20, 12, 76, 40], [0, 0, 0, 28, 30]])
LABELS = torch.tensor([2, 1, 3])


def head(**settings) -> PointRendHead:
    torch.manual_seed(0)
    small = {"output_size": 8, "fc_channels": [8], "point_channels": [6, 5], "points": 12, "subdivisions": 2}
    model = PointRendHead(4, [4, 8], 3, roi=RoIAlign, **small | {"subdivision_points": 5} | settings)
    for part in (model.coarse, model.points):
        torch.nn.init.normal_(part.mask_logits.weight)
    return model.eval()


def maps():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, 25, 25, generator=generator), torch.randn(2, 4, 13, 13, generator=generator)]


def read(grid, x: float, y: float, edge: bool) -> torch.Tensor:
    """[C] at (x, y) in cells of a grid [C, h, w], cell i from i to i + 1; beyond its centres the edge's value, or 0."""
    total, (height, width) = torch.zeros(len(grid)), grid.shape[1:]
    left, top = floor(x - 0.5), floor(y - 0.5)
    for row in (top, top + 1):
        for column in (left, left + 1):
            weight = (1 - abs(x - 0.5 - column)) * (1 - abs(y - 0.5 - row))
            if edge:
                total += weight * grid[:, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
            elif 0 <= row < height and 0 <= column < width:
                total += weight * grid[:, row, column]
    return total


def logits_at(model, finest, coarse, roi, x: float, y: float) -> torch.Tensor:
    """[K] of one point of one RoI, by the paper's words."""
    x1, y1, x2, y2 = roi[1:].tolist()
    fine = read(finest[int(roi[0])], (x1 + x * (x2 - x1)) / 4, (y1 + y * (y2 - y1)) / 4, edge=True)
    seen = read(coarse, x * coarse.shape[2], y * coarse.shape[1], edge=False)
    for layer in model.points.fc:
        fine = (layer.weight[:, :, 0] @ torch.cat([fine, seen]) + layer.bias).relu()
    last = model.points.mask_logits
    return last.weight[:, :, 0] @ torch.cat([fine, seen]) + last.bias


@torch.no_grad()
def test_the_least_certain_cells_are_made_anew_at_each_doubling():
    model, features = head(), maps()
    prediction = model(features, ROIS)
    assert prediction.coarse.shape == (3, 3, 4, 4)
    found = model.refined(prediction, LABELS)
    for coarse, roi, label, result in zip(prediction.coarse, ROIS, LABELS, found):
        mask = coarse[label - 1]
        for _ in range(2):
            mask = F.interpolate(mask[None, None], scale_factor=2, mode="bilinear", align_corners=False)[0, 0]
            side = len(mask)
            cells = sorted((abs(float(mask[i, j])), i, j) for i in range(side) for j in range(side))
            for _, i, j in cells[:5]:
                x, y = (j + 0.5) / side, (i + 0.5) / side
                mask[i, j] = logits_at(model, features[0], coarse, roi, x, y)[label - 1]
        torch.testing.assert_close(result, mask, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_doubling_whose_cells_will_all_be_made_anew_is_skipped():
    """4 x 4 to 16 x 16 with 256 points: the first step's would be lost."""
    model, features = head(subdivision_points=256), maps()
    calls, at = [], model.at
    model.at = lambda points, prediction: calls.append(points.shape[1]) or at(points, prediction)
    found = model.refined(model(features, ROIS), LABELS)
    assert calls == [256] and found.shape == (3, 16, 16)
    expected = [logits_at(model, features[0], model(features, ROIS).coarse[0], ROIS[0], *p)[1] for p in
                ((0.5 / 16, 0.5 / 16), (8.5 / 16, 3.5 / 16))]  # fmt: skip
    torch.testing.assert_close(found[0][[0, 3], [0, 8]], torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_points_to_learn_from_are_the_least_certain_of_many():
    model = head(points=8, oversample=4.0, importance=0.5)
    coarse = torch.randn(2, 4, 4)
    torch.manual_seed(3)
    points = model.uncertain_points(coarse)
    torch.manual_seed(3)
    drawn, random = torch.rand(2, 32, 2), torch.rand(2, 4, 2)
    for found, grid, many, others in zip(points, coarse, drawn, random):
        ranked = sorted(many.tolist(), key=lambda p: abs(float(read(grid[None], p[0] * 4, p[1] * 4, edge=False))))
        torch.testing.assert_close(found[:4], torch.tensor(ranked[:4]))
        assert torch.equal(found[4:], others)


def test_the_loss_at_points_is_that_of_the_objects_mask_there():
    model, features = head(), maps()
    yes = torch.ones(2, 2).bool()
    boxes = torch.tensor([[[10.0, 10, 60, 50], [2, 2, 30, 30]], [[20, 10, 80, 44], [0, 0, 9, 9]]])
    masks = torch.zeros(2, 2, 16, 16, dtype=torch.uint8)
    masks[..., 8:] = 1  # their right halves
    targets = Targets(boxes, yes.long(), yes, ~yes, masks, boxes, torch.tensor([[True, True], [False, True]]))
    rows = SampledRoIs(torch.tensor([1.0, 1, 1]), ROIS, LABELS, torch.tensor([0, 0, 1]))
    prediction = model(features, ROIS)
    points = torch.rand(3, 12, 2)
    model.uncertain_points = lambda coarse: points
    found = model.losses(prediction, rows, targets)
    terms = []
    for i, box in ((0, boxes[0, 0]), (2, boxes[0, 1])):  # the second object came without a mask
        x1, y1, x2, y2 = ROIS[i, 1:].tolist()
        for x, y in points[i].tolist():
            column = (x1 + x * (x2 - x1) - float(box[0])) / float(box[2] - box[0]) * 16
            row = (y1 + y * (y2 - y1) - float(box[1])) / float(box[3] - box[1]) * 16
            wanted = read(masks[0, :1].float(), column, row, edge=False)[0]
            logit = logits_at(model, features[0], prediction.coarse[i], ROIS[i], x, y)[LABELS[i] - 1]
            terms.append(F.binary_cross_entropy_with_logits(logit, wanted))
    torch.testing.assert_close(found["loss_point"], sum(terms) / len(terms), atol=1e-5, rtol=1e-4)
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_masks_of_detections_and_of_none():
    model = head()
    valid = torch.tensor([[True, False], [True, False]])
    boxes = torch.stack([ROIS[:2, 1:], torch.zeros(2, 4)], dim=1)
    found = Detections(boxes, valid.float(), torch.tensor([[2, 0], [1, 0]]), valid)
    masks = model.detect(maps(), found).masks
    assert masks.shape == (2, 2, 16, 16)
    torch.testing.assert_close(masks[:, 0], model.refined(model(maps(), ROIS[:2]), LABELS[:2]).sigmoid())
    assert model.detect(maps(), found._replace(valid=torch.zeros_like(valid))).masks.shape == (2, 2, 16, 16)


def test_programs_have_no_place_for_it():
    model = tiny_model(mask=False)
    model.mask_head = PointRendHead(16, model.neck.strides[:4], 3, roi=RoIAlign, output_size=8, fc_channels=[8])
    with pytest.raises(ValueError, match=r"mask_head is a PointRendHead.*\.safetensors"):
        check_exportable(model.eval())


def test_the_explorer_shows_the_level_that_it_reads(shapes_tiny):
    small = [text for text in SMALL if "mask_head" not in text] + ["model=pointrend_rcnn", "roi=deformable"]
    small += [f"model.{name}_head.roi.predictor_width=8" for name in ("box", "mask")]
    small += ["model.mask_head.fc_channels=[8]", "model.mask_head.point_channels=[8]", f"data.root={shapes_tiny}"]
    model = detector.load(untrained(configured(*small)))
    image = model.pictures.read(shapes_tiny / "val" / "000000.jpg")
    assert [len(collect(model, image, f"{name}_head", 8)["maps"]) for name in ("box", "mask")] == [4, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_size": 7}, "output_size=7: must be even"),
        ({"oversample": 0.5}, r"oversample=0\.5: must be at least 1"),
        ({"importance": 1.5}, "importance"),
        ({"subdivisions": 0}, "subdivisions"),
    ],
)
def test_settings_that_make_no_mask(settings, message):
    with pytest.raises(ValueError, match=message):
        head(**settings)
