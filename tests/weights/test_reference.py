"""Every published layout against an independent pass over the same tensors, in small: features, proposals, detections.

The passes (reference_detectron2, reference_mmdetection) know nothing of the package. They are themselves held against
what the frameworks recorded (test_parity) and, for mmdetection, against mmdetection 3.3 run aside.
"""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detector.ops.paste import paste_masks
from detector.structures import Batch, Detections
from detector.weights import build_model, load_foreign
from tests.weights import reference_detectron2, reference_mmdetection
from tests.weights.reference_parts import Found, Limits, paste
from tests.weights.test_layouts import LAYOUTS, read_layout, read_stand_in

LIMITS = Limits(pre_nms=300, post_nms=16, detections=6, score=0.02)
NEAR_TIES = 1  # of an image's 16 proposals or 6 detections
LARGE = 1 << 21  # more numbers than this are repeated ones
CALM = ("rpn_cls", "objectness_logits")  # logits of these layers in hundreds would all be the probability 1
DELTAS = ("anchor_deltas", "bbox_pred", "rpn_reg", "fc_reg")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_same_as_the_framework(shared, name):
    check_layout(shared, name)


@pytest.mark.parametrize("name", ["detectron2-faster_rcnn_R_50_FPN_1x", "mmdet-faster-rcnn_r50_fpn_1x_coco"])
def test_same_where_boxes_go_far(shared, name):
    """Beyond the limits of growing and shrinking, and out of the image."""
    check_layout(shared, name, deltas=20.0)


def test_groie_as_mmdetection_has_it(shared):
    """Not among the layouts, but published: these keys are faster-rcnn_r50_fpn_groie_1x_coco's."""
    extractor = {
        "pre_module.conv.weight": [256, 256, 5, 5],
        "pre_module.conv.bias": [256],
        "post_module.query_conv.weight": [252, 256, 1, 1],
        "post_module.value_conv.weight": [252, 256, 1, 1],
        "post_module.appr_geom_fc_x.weight": [252, 128],
        "post_module.appr_geom_fc_y.weight": [252, 128],
        "post_module.proj_conv.weight": [256, 252, 1, 1],
        "post_module.proj_conv.bias": [256],
        "post_module.gamma": [1],
    }
    keys = {f"roi_head.bbox_roi_extractor.{key}": shape for key, shape in extractor.items()}
    check_layout(shared, "mmdet-faster-rcnn_r50_fpn_1x_coco", more=keys)


@torch.no_grad()
def compare_first_stage(model, batch: Batch, expected) -> Detections:
    """Features and proposals with those expected; returns what the model detects."""
    features = model.features(batch)
    proposals, _ = model.rpn(features, batch)
    for level, wanted in zip(features, expected.features, strict=True):
        torch.testing.assert_close(level, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    for i, wanted in enumerate(expected.proposals):
        valid = proposals.valid[i]
        assert valid.sum() > 10
        compare(Found(proposals.boxes[i, valid], proposals.scores[i, valid]), wanted)
    return model.detect(features, batch)


def check_layout(shared, name: str, deltas: float = 1.0, more: dict | None = None) -> None:
    layout, source = read_layout(shared, name), name.split("-")[0]
    layout["state_dict"] |= more or {}
    weights = quick_weights(shared, layout, deltas)
    images = read_images(shared, large="dpool" in name)  # that has weights of its own for each level
    reference = reference_detectron2 if source == "detectron2" else reference_mmdetection
    expected = reference.run(layout, weights, images, LIMITS)
    model = build_model(load_foreign(weights, source=source))
    limit(model, reference.limits_of(layout))
    batch = as_batch(images)
    found = compare_first_stage(model, batch, expected)
    for i, wanted in enumerate(expected.detections):
        rows = found.valid[i]
        assert rows.any()
        mine = Found(
            found.boxes[i, rows],
            found.scores[i, rows],
            found.labels[i, rows] - 1,
            None if found.masks is None else found.masks[i, rows],
            None if found.keypoints is None else found.keypoints[i, rows],
        )
        pairs = compare(mine, wanted)
        assert (mine.masks is None) == ("mask" not in name) and (mine.keypoints is None) == ("keypoint" not in name)
        if mine.masks is not None:
            check_masks(mine, wanted, pairs, images[i].shape[1:])
        if mine.keypoints is not None:
            # two cells of a heat map may tie
            points, others = mine.keypoints[pairs[:, 0]], wanted.keypoints[pairs[:, 1]]
            same = ((points - others)[..., :2].abs() < 0.01).all(-1)
            assert (~same).sum() <= 2
            torch.testing.assert_close(points[same][:, 2], others[same][:, 2], atol=1e-3, rtol=1e-3)
    assert len(expected.detections) == (0 if "rpn" in layout["config"].split("/")[1].split("_") else len(images))


def compare(mine: Found, wanted: Found) -> torch.Tensor:
    """Rows [M, 2] (mine, wanted) of the same box within 0.01 px, score within 1e-3, and label: all but near-ties."""
    assert abs(len(mine.boxes) - len(wanted.boxes)) <= NEAR_TIES
    far = (mine.boxes[:, None] - wanted.boxes).abs().amax(2)
    same = (far < 0.01) & ((mine.scores[:, None] - wanted.scores).abs() < 1e-3)
    if wanted.labels is not None:
        same &= mine.labels[:, None] == wanted.labels
    assert (~same.any(dim=0)).sum() <= NEAR_TIES and (~same.any(dim=1)).sum() <= NEAR_TIES
    rows = same.any(dim=1).nonzero()[:, 0]
    return torch.stack([rows, torch.where(same, far, torch.inf).argmin(dim=1)[rows]], dim=1)


def check_masks(mine: Found, wanted: Found, pairs: torch.Tensor, size) -> None:
    masks, others = mine.masks[pairs[:, 0]], wanted.masks[pairs[:, 1]]
    torch.testing.assert_close(masks, others, atol=1e-3, rtol=0)
    pixels = paste(others, wanted.boxes[pairs[:, 1]], tuple(size)).numpy()
    differing = pixels != paste_masks(masks, mine.boxes[pairs[:, 0]], *size)
    assert pixels.any() and differing.mean() < 1e-3


def limit(model, published: Limits) -> None:
    """Let less through, as LIMITS says, than the published model does and this one did."""
    assert (model.rpn.pre_nms_top_n[1], model.rpn.post_nms_top_n[1]) == (published.pre_nms, published.post_nms)
    model.rpn.pre_nms_top_n, model.rpn.post_nms_top_n = (LIMITS.pre_nms,) * 2, (LIMITS.post_nms,) * 2
    for part in model.modules():
        if hasattr(part, "detections_per_image"):
            assert (part.detections_per_image, part.score_threshold) == (published.detections, published.score)
            part.detections_per_image, part.score_threshold = LIMITS.detections, LIMITS.score


def quick_weights(shared, layout: dict, deltas: float = 1.0) -> dict[str, torch.Tensor]:
    """The stand-in weights, with box deltas so many times larger; of the largest a million are drawn and repeated."""
    stand_in, weights = read_stand_in(shared), {}
    for key, shape in layout["state_dict"].items():
        if np.prod(shape) > LARGE:
            piece = stand_in.weight(key, (997, 1009)) * np.sqrt(1009 / np.prod(shape[1:]), dtype=np.float32)
            value = np.resize(piece, shape)
        else:
            value = stand_in.weight(key, shape)
        weights[key] = torch.as_tensor(value)
        if key.split(".")[-2] in CALM:
            weights[key] *= 0.05
        if key.split(".")[-2] in DELTAS:
            weights[key] *= deltas
    return weights


def read_images(shared, large: bool) -> list[torch.Tensor]:
    """Two cuttings of different sizes, or a large one, BGR."""
    image = cv2.imread(str(shared / "data" / "coco_cc_sample" / "images" / "000000000030.jpg"))
    parts = [image[100:390, 150:550]] if large else [image[100:190, 200:335], image[150:245, 340:421]]
    return [torch.from_numpy(part).permute(2, 0, 1) for part in parts]


def as_batch(images: list[torch.Tensor]) -> Batch:
    """RGB, padded to a multiple of 32."""
    sizes = torch.tensor([list(image.shape[1:]) for image in images])
    height, width = (-(-sizes.amax(dim=0) // 32) * 32).tolist()
    padded = [F.pad(image.flip(0), (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    return Batch(torch.stack(padded), sizes, sizes, torch.arange(len(images)), torch.arange(len(images)))
