"""With the same weights, images, objects and sampled RoIs: the losses and gradients of torchvision's Mask R-CNN.

Tolerances: losses 1e-4 relative; gradients 1e-3 of each tensor's largest entry. tests/weights compares detections.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import Data, mask_rcnn_pair, synthetic_batch
from detector.structures import Targets

EVERYTHING = 10**7


def at_native_scale(data: Data, side: int = 256) -> Targets:
    """The targets with torchvision's full-size masks, cut out where the objects are but not resized."""
    windows, masks = data.targets.boxes.clone(), []
    windows[..., 2:] = windows[..., :2] + side
    for image, row in zip(data.their_targets, data.targets.boxes.int().tolist()):
        padded = F.pad(image["masks"], (0, side, 0, side))
        masks += [mask[y : y + side, x : x + side] for mask, (x, y, _, _) in zip(padded, row)]
    masks = torch.stack(masks).unflatten(0, data.targets.labels.shape)
    return data.targets._replace(masks=masks, mask_windows=windows)


@pytest.mark.slow
def test_losses_and_gradients_equal_torchvisions():
    size = (192, 256)
    ours, theirs = mask_rcnn_pair("cpu", size)
    data = synthetic_batch(2, size, 4, "cpu")
    targets = at_native_scale(data)
    # Both draw all candidates: then the samples are the same whatever the order of the draw.
    for sampler in (theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = EVERYTHING, 1.0
    for stage in (ours.rpn, ours.box_head):
        stage.batch_size_per_image, stage.positive_fraction = EVERYTHING, 1.0

    losses = ours.train()(data.batch, targets)
    expected = theirs.train()(data.images, data.their_targets)
    assert set(losses) == set(expected)
    for name in expected:
        torch.testing.assert_close(
            losses[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )

    sum(losses.values()).backward()
    sum(expected.values()).backward()
    pairs = {
        "backbone.layer2.0.conv1.weight": "backbone.body.layer2.0.conv1.weight",
        "backbone.layer4.2.conv3.weight": "backbone.body.layer4.2.conv3.weight",
        "neck.output.0.0.weight": "backbone.fpn.layer_blocks.0.0.weight",
        "rpn.head.deltas.weight": "rpn.head.bbox_pred.weight",
        "box_head.trunk.fc.0.weight": "roi_heads.box_head.fc6.weight",
        "mask_head.trunk.conv.0.0.weight": "roi_heads.mask_head.0.0.weight",
    }
    for name, their_name in pairs.items():
        gradient, wanted = ours.get_parameter(name).grad, theirs.get_parameter(their_name).grad
        assert wanted.abs().max() > 0
        difference = (gradient.reshape(wanted.shape) - wanted).abs().max() / wanted.abs().max()
        assert difference < 1e-3, (name, float(difference))
