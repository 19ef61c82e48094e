"""The kernels of ops on a GPU: all cases of the interpreter, and suppression at the sizes of a training step."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from detector.ops.boxes import nms_by_image, survivors
from tests.ops.triton_cases import *  # noqa: F403

pytestmark = pytest.mark.cuda


def candidates(images=4, levels=5, count=2000):
    """Boxes [images, levels * count, 4] around few places, scores and levels, as an RPN gives them."""
    generator = torch.Generator().manual_seed(0)
    size = images, levels * count
    centre = torch.randint(0, 40, (*size, 2), generator=generator) * 20 + torch.randn(*size, 2, generator=generator) * 4
    side = 20 * torch.exp(torch.rand(*size, 2, generator=generator) * 2)
    boxes = torch.cat([centre - side / 2, centre + side / 2], -1).clamp(min=0)
    return boxes, torch.randn(size, generator=generator), torch.arange(levels).repeat_interleave(count).expand(size)


def test_survivors_of_a_training_step_are_the_cpus_and_the_host_never_waits():
    boxes, scores, levels = candidates()
    wanted = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.95
    args = torch.arange(len(boxes)), levels, nms_by_image, 0.7, len(boxes), 1000
    expected = survivors(boxes, scores, wanted, *args)
    boxes, scores, wanted, image, group = (t.cuda() for t in (boxes, scores, wanted, *args[:2]))
    survivors(boxes, scores, wanted, image, group, *args[2:])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = survivors(boxes, scores, wanted, image, group, *args[2:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours.cpu(), theirs)


def test_classes_of_a_table_that_is_mostly_empty():
    """What a box head suppresses: rows of RoIs, columns of classes, more than take part."""
    generator = torch.Generator().manual_seed(0)
    boxes, scores, _ = candidates(1, 1, 4000)
    boxes, scores = boxes[0][:, None].expand(-1, 80, -1), torch.rand(4000, 80, generator=generator)
    image, group = torch.arange(4000) // 1000, torch.arange(80).expand(4000, 80)
    args = scores > 0.98, image, group, nms_by_image, 0.5, 4, 100
    expected = survivors(boxes, scores, *args)
    given = (t.cuda() if isinstance(t, torch.Tensor) else t for t in (boxes, scores, *args))
    for ours, theirs in zip(survivors(*given), expected):
        assert torch.equal(ours.cpu(), theirs)
