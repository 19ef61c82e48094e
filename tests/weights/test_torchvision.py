"""torchvision's own detectors, with random weights, against ours with the imported ones: the same detections."""

from __future__ import annotations

import hydra
import pytest
import torch
from torchvision.models import detection

from detector.ops.paste import paste_masks
from detector.structures import Batch
from detector.weights import load_foreign, load_into, model_config

SIZE = (128, 160)  # (height, width), already what torchvision's transform would make of it


def batch_of(images: torch.Tensor) -> Batch:
    sizes = torch.tensor([images.shape[-2:]] * len(images))
    return Batch(images, sizes, sizes, torch.arange(len(images)), torch.arange(len(images)))


def build_theirs(name: str, **settings) -> torch.nn.Module:
    """A torchvision detector whose scores are spread out, so that no order hangs on rounding."""
    torch.manual_seed(0)
    settings = {"min_size": SIZE[0], "max_size": SIZE[1], "box_detections_per_img": 12, **settings}
    model = getattr(detection, name)(weights=None, weights_backbone=None, **settings).eval()
    spread = {"rpn.head.cls_logits.weight": 0.1, "cls_score.weight": 0.5, "bbox_pred.weight": 0.02}
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif key.endswith("running_mean"):
                value.normal_(std=0.1)
            elif key.endswith("bn3.weight"):
                value.fill_(0.2)  # keeps sums over residual blocks small, hence rounding errors too
            elif std := next((std for end, std in spread.items() if key.endswith(end)), None):
                value.normal_(std=std)
    return model


def build_ours(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    weights = load_foreign(state, source="torchvision")
    config = model_config(*weights)
    config["box_head"]["detections_per_image"] = 12  # masks and keypoints cost time
    model = hydra.utils.instantiate(config, _convert_="all")
    load_into(model, weights.state_dict)
    return model.eval()


BUILDERS = {
    "fasterrcnn_resnet50_fpn": {},
    "fasterrcnn_resnet50_fpn_v2": {"num_classes": 7},
    "maskrcnn_resnet50_fpn": {"num_classes": 12},
    "maskrcnn_resnet50_fpn_v2": {"num_classes": 4},
    "keypointrcnn_resnet50_fpn": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_same_detections(name):
    theirs = build_theirs(name, **BUILDERS[name])
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours = build_ours(theirs.state_dict())
    with torch.no_grad():
        expected = theirs(list(images / 255.0))
        found = ours(batch_of(images))
    for i, wanted in enumerate(expected):
        mine = [t[i][found.valid[i]] for t in (found.boxes, found.scores, found.labels)]
        assert len(mine[0]) == len(wanted["boxes"]) > 5
        pairs = pair_up(mine, [wanted["boxes"], wanted["scores"], wanted["labels"]])
        if "mask" in name:
            assert found.masks.shape[2:] == (28, 28)
            pasted = paste_masks(found.masks[i][pairs], found.boxes[i][pairs], *SIZE, paste="torchvision")
            differing = (wanted["masks"][:, 0] > 0.5) != torch.as_tensor(pasted).bool()
            assert differing.float().mean() < 1e-4
        if "keypoint" in name:
            keypoints = found.keypoints[i][found.valid[i]][pairs]
            torch.testing.assert_close(keypoints[..., :2], wanted["keypoints"][..., :2], rtol=0, atol=1e-4)
            torch.testing.assert_close(keypoints[..., 2], wanted["keypoints_scores"], rtol=0, atol=1e-4)


def pair_up(mine, wanted) -> torch.Tensor:
    """For each wanted detection the row of ours: same label, box and score within 1e-4; ties may swap."""
    (boxes, scores, labels), (wanted_boxes, wanted_scores, wanted_labels) = mine, wanted
    far = (wanted_boxes[:, None] - boxes).abs().amax(-1)
    far = torch.maximum(far, (wanted_scores[:, None] - scores).abs())
    far = torch.where(wanted_labels[:, None] == labels, far, torch.inf)
    best = far.min(dim=1)
    assert best.values.max() < 1e-4
    assert len(best.indices.unique()) == len(boxes)
    return best.indices
