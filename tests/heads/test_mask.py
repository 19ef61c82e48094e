"""The mask predictor against the plain transposed convolution and 1 x 1 logits of all classes."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import roi_align

from detector.data.outlines import grids
from detector.heads.box import SampledRoIs
from detector.heads.mask import MaskPredictor, mask_targets
from detector.ops.boxes import of_label
from detector.structures import Targets
from tests.data.coco_files import outlines_of


@pytest.mark.parametrize("num_masks", [1, 5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_predictor_equals_convolutions(num_masks, memory_format):
    torch.manual_seed(0)
    predictor = MaskPredictor(6, 4, num_masks).double()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(7, 6, 3, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    labels = torch.tensor([1, 5, 2, 3, 4, 5, 1])

    every = predictor.mask_logits(predictor.upsample(hidden).relu())
    expected, found = of_label(every, labels), predictor(hidden, labels)
    assert found.shape == (7, 6, 10)
    weight = torch.randn_like(expected)
    inputs = [hidden, *predictor.parameters()]
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    gradients = torch.autograd.grad((found * weight).sum(), inputs)
    torch.testing.assert_close([found, *gradients], [expected, *wanted])


def test_no_rois():
    assert MaskPredictor(6, 4, 3)(torch.empty(0, 6, 14, 14), torch.empty(0, dtype=torch.long)).shape == (0, 28, 28)


def test_targets_are_those_of_pycocotools_masks():
    """Through RoIs that are somewhat off, as proposals are: as pycocotools' masks of the whole image give them.

    Objects have 8 to 400 px, so that some are larger than the grid; bars of 3 px or so are the hardest.
    """
    rng, overlaps = np.random.default_rng(0), {"polygon": [], "bar": []}
    height, width, size = 480, 640, (28, 28)
    for index in range(60):
        side, (x, y) = rng.uniform(8, 400), rng.uniform([210, 210], [width - 210, height - 210])
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        kind = "polygon" if index % 3 else "bar"
        radius = rng.uniform(0.4, 1.0, 9) * side / 2 if index % 3 else np.full(9, side / 2)
        ring = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1).round(2)
        if kind == "bar":
            turn = np.array([[np.cos(angles[0]), np.sin(angles[0])], [-np.sin(angles[0]), np.cos(angles[0])]])
            ring = (np.array([[-side, -3], [side, -3], [side, 3], [-side, 3]]) / 2 @ turn + [x, y]).round(2)
        box = np.concatenate([ring.min(0), ring.max(0)])
        masks, windows = grids(outlines_of([[ring]]), box[None], 112)
        sides = (box[2:] - box[:2])[[0, 1, 0, 1]]
        roi = torch.from_numpy(np.r_[0, box + rng.uniform(-0.15, 0.15, 4) * sides]).float()[None]
        targets = Targets(*(torch.zeros(1, 1),) * 4, torch.from_numpy(masks)[None], torch.from_numpy(windows)[None])
        seen = SampledRoIs(torch.ones(1), roi, torch.ones(1), torch.zeros(1, dtype=torch.int64))
        ours = mask_targets(seen, targets, size, 0.5)[0] > 0
        full = coco_mask.decode(coco_mask.frPyObjects([ring.ravel().tolist()], height, width))[..., 0]
        theirs = roi_align(torch.from_numpy(full).float()[None, None], roi, size, 1.0, -1, True)[0, 0] >= 0.5
        overlaps[kind].append(
            float((ours & theirs).sum() / (ours | theirs).sum().clamp(min=1)) if theirs.any() else 1.0
        )
    assert np.mean(overlaps["polygon"]) >= 0.998
    assert np.mean(overlaps["bar"]) >= 0.93
