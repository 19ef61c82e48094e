"""Mask Scoring R-CNN against plain loops, and its scores in mask AP alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from detector.evaluation import coco_metrics
from detector.evaluation.operating_point import kept_matches
from detector.evaluation.results import detections_to_coco
from detector.heads import ConvTrunk, MaskHead, MaskScoringHead
from detector.heads.box import SampledRoIs
from detector.inference.tta import Augmented
from detector.roi import RoIAlign
from detector.structures import Detections, Targets
from tests.data.coco_files import minimal
from tests.tiny import random_batch, tiny_model

SETTINGS = {"roi": RoIAlign, "trunk": partial(ConvTrunk, conv_channels=[8]), "upsample_channels": 8}
SCORES = {"score_channels": [8, 8], "score_fc": [16]}


def head(**settings) -> MaskScoringHead:
    torch.manual_seed(0)
    return MaskScoringHead(4, [4], 3, **SETTINGS | SCORES | settings)


ROIS = torch.tensor([[0, 8.0, 8, 64, 64], [0, 20, 12, 76, 40], [0, 0, 0, 28, 28], [0, 70, 70, 98, 98]])
OBJECTS = torch.tensor([[10.0, 10, 60, 50], [12, 4, 50, 60], [0, 0, 20, 30], [2, 2, 9, 9]])


def targets(side: int = 64) -> Targets:
    """Right halves of boxes, each cell of the mask known."""
    masks = torch.zeros(1, 4, side, side, dtype=torch.uint8)
    masks[..., side // 2 :] = 1
    yes = torch.ones(1, 4).bool()
    return Targets(OBJECTS[None], yes.long(), yes, ~yes, masks, OBJECTS[None], yes)


def test_the_iou_counts_the_whole_object_not_only_what_the_roi_shows():
    """Pixel by pixel of a fine grid over the image: what the mask covers inside its RoI, against the whole object."""
    torch.manual_seed(1)
    logits = F.interpolate(torch.randn(4, 1, 4, 4), size=28, mode="nearest")[:, 0]
    rows = SampledRoIs(torch.ones(4), ROIS, torch.ones(4).long(), torch.arange(4))
    found = head().true_iou(logits, rows, targets())
    fine = 8  # to a pixel
    x = ((torch.arange(100 * fine) + 0.5) / fine).expand(100 * fine, -1)
    y = x.T
    for iou, cells, roi, (x1, y1, x2, y2) in zip(found, logits, ROIS[:, 1:], OBJECTS):
        truth = (x >= (x1 + x2) / 2) & (x < x2) & (y >= y1) & (y < y2)
        column, row = ((v - low) / (high - low) * 28 for v, low, high in ((x, roi[0], roi[2]), (y, roi[1], roi[3])))
        inside = (column >= 0) & (column < 28) & (row >= 0) & (row < 28)
        mask = inside & (cells[row.long().clamp(0, 27), column.long().clamp(0, 27)] > 0)
        expected = (mask & truth).sum() / (mask | truth).sum()
        assert float(iou) == pytest.approx(float(expected), abs=0.02)
    assert (found > 0).sum() >= 2 and found[3] == 0


def test_the_loss_is_the_squared_error_of_masks_that_meet_their_object():
    model = head(iou_weight=2.0)
    rows = SampledRoIs(torch.tensor([1.0, 1, 0, 1]), ROIS, torch.tensor([1, 3, 2, 1]), torch.arange(4))
    prediction = model([torch.randn(1, 4, 25, 25)], ROIS)
    found = model.losses(prediction, rows, targets())
    logits = model.predictor(prediction.hidden, rows.labels)
    true, errors = model.true_iou(logits, rows, targets()), []
    table = model.scorer(prediction.roi_features.features, logits)
    assert table.shape == (4, 3)
    for i in range(4):
        if rows.weight[i] and true[i] > 0:
            errors.append((table[i, rows.labels[i] - 1] - true[i]) ** 2)
    assert 0 < len(errors) < 4
    torch.testing.assert_close(found["loss_mask_iou"], 2 * sum(errors) / len(errors))
    plain = MaskHead(4, [4], 3, **SETTINGS)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("scorer.")})
    assert plain.losses(prediction, rows, targets())["loss_mask"] == found["loss_mask"]
    found["loss_mask_iou"].backward()
    assert all(p.grad is not None for p in model.scorer.parameters())


def test_a_masks_score_is_its_boxs_times_the_iou():
    model = head().eval()
    valid = torch.tensor([[True, True, False]])
    boxes = torch.tensor([[[8.0, 8, 60, 60], [20, 12, 80, 40], [0, 0, 0, 0]]])
    found = Detections(boxes, torch.tensor([[0.9, 0.4, 0.0]]), torch.tensor([[2, 3, 0]]), valid)
    maps = [torch.randn(1, 4, 25, 25)]
    with torch.no_grad():
        masks = model.detect(maps, found)
        rois = torch.tensor([[0, 8.0, 8, 60, 60], [0, 20, 12, 80, 40]])
        seen = model(maps, rois)
        logits = model.predictor(seen.hidden, torch.tensor([2, 3]))
        hidden = torch.cat([seen.roi_features.features, F.max_pool2d(logits.sigmoid()[:, None], 2)], 1)
        for layer in model.scorer.conv:
            hidden = layer(hidden).relu()
        assert hidden.shape[2:] == (7, 7)
        hidden = model.scorer.fc[0](hidden.flatten(1)).relu()
        ious = model.scorer.mask_iou(hidden)[[0, 1], [1, 2]]
    torch.testing.assert_close(masks.extra["mask_score"], torch.cat([found.scores[0, :2] * ious, torch.zeros(1)])[None])
    torch.testing.assert_close(masks.masks[0, :2], logits.sigmoid())
    none = found._replace(valid=torch.zeros_like(valid))
    assert model.detect(maps, none).masks.shape == (1, 3, 28, 28)


def test_mask_ap_ranks_by_the_masks_score_and_thresholds_do_not():
    coco = minimal()
    coco["annotations"][1] |= {"category_id": 5, "segmentation": [[30, 20, 40, 20, 40, 30, 30, 30]]}
    right, wrong = ([[5, 6, 25, 6, 25, 16, 5, 16]], [5, 6, 20, 10]), ([[1, 30, 4, 30, 4, 38, 1, 38]], [1, 30, 3, 8])
    entries = [
        {"image_id": 7, "category_id": 5, "segmentation": mask, "bbox": box, "score": score, "mask_score": own}
        for (mask, box), score, own in ((right, 0.3, 0.9), (wrong, 0.8, 0.1))
    ]
    without = [{key: value for key, value in entry.items() if key != "mask_score"} for entry in entries]
    for backend in ("hotcoco", "pycocotools"):
        ap = {kind: coco_metrics(coco, entries, kind, backend)["AP"] for kind in ("bbox", "segm")}
        assert ap["bbox"] == coco_metrics(coco, without, "bbox", backend)["AP"] < ap["segm"]
        assert coco_metrics(coco, without, "segm", backend)["AP"] < ap["segm"] == pytest.approx(51 / 101)
    assert sorted(kept_matches(coco, entries, "segm").score.tolist()) == pytest.approx([0.3, 0.8])
    with pytest.raises(ValueError, match=r"predictions\[0\]: mask_score is 'high'; it must be a finite number"):
        coco_metrics(coco, [entries[0] | {"mask_score": "high"}], "segm")


def test_a_model_writes_it_and_several_looks_average_it():
    model = tiny_model(mask=False, box_head={"detections_per_image": 5, "score_threshold": 0.0})
    model.mask_head = MaskScoringHead(16, model.neck.strides[:4], 3, **SETTINGS | SCORES)
    batch, truth = random_batch()
    assert {"loss_mask", "loss_mask_iou"} <= set(model(batch, truth))
    with torch.inference_mode():
        found = model.eval()(batch)
        entry = detections_to_coco(found, batch, [1, 2, 3])[0]
        assert entry["mask_score"] == pytest.approx(found.extra["mask_score"][0, 0].item(), rel=1e-5)
        one = batch._replace(**{name: value[:1] for name, value in batch._asdict().items()})
        twice = Augmented(model, scales=[1.0, 1.0], flip=False)(one)
    torch.testing.assert_close(twice.extra["mask_score"], found.extra["mask_score"][:1])


@pytest.mark.parametrize("settings", [{"score_channels": []}, {"score_fc": []}, {"iou_weight": 0.0}])
def test_settings_that_leave_no_score(settings):
    with pytest.raises(ValueError, match=r"at least one layer of each|must be positive"):
        head(**settings)
