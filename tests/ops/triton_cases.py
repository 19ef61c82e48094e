"""What the kernels of ops must compute. Not collected by itself: test_triton.py runs this file on the CPU under
Triton's interpreter, tests/gpu on a GPU."""

from __future__ import annotations

import pytest
import torch

from detector.ops import layers
from detector.ops.triton_finish import finish, takes
from detector.ops.triton_nms import below, nms_fused
from tests.ops.convolutions import KINDS, check_against_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def greedy(boxes, scores, image, group, threshold, images, limit):
    """Suppression as it is defined, one box after the other, in float32 as torchvision's on the CPU."""
    order = scores.argsort(descending=True, stable=True).tolist()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = [[] for _ in range(images)]
    for row in order:
        if image[row] == images:
            continue
        mine = kept[image[row]]
        better = torch.tensor([other for other in mine if group[other] == group[row]], dtype=torch.long)
        low, high = torch.maximum(boxes[better, :2], boxes[row, :2]), torch.minimum(boxes[better, 2:], boxes[row, 2:])
        width, height = (high - low).clamp(min=0).unbind(1)
        common = width * height
        iou = common / (area[better] + area[row] - common)
        if not (iou.double() > threshold).any():
            mine.append(row)
    return [rows[:limit] for rows in kept]


@pytest.mark.parametrize(
    ("count", "side", "threshold"), [(0, 50, 0.5), (1, 50, 0.5), (60, 30, 0.5), (300, 60, 0.7), (300, 15, 0.3)]
)
def test_nms_is_greedy_suppression_to_the_box(count, side, threshold):
    """Groups of more than two blocks, equal scores, IoUs at the threshold, rows that take no part."""
    generator = torch.Generator().manual_seed(count + side)
    corner = (torch.rand(count, 2, generator=generator) * 40).round()
    boxes = torch.cat([corner, corner + 1 + (torch.rand(count, 2, generator=generator) * side).round()], 1)
    scores = (torch.rand(count, generator=generator) * 50).round() / 50
    image = torch.randint(0, 3, (count,), generator=generator).clamp(max=1) * 2  # of three images one is empty
    image[torch.rand(count, generator=generator) < 0.1] = 3
    group = torch.randint(0, 2, (count,), generator=generator)
    expected = greedy(boxes, scores, image, group, threshold, 3, 40)
    boxes[image == 3] = torch.nan
    given = (t.to(DEVICE) for t in (boxes, scores, image, group))
    rows, valid = nms_fused(*given, threshold, 3, 40)
    assert rows.shape == valid.shape == (3, 40)
    assert [row[there].tolist() for row, there in zip(rows.cpu(), valid.cpu())] == expected


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.1, 0.6000000238418579])
def test_a_float32_is_above_the_one_as_it_is_above_the_other(threshold):
    nearest = torch.tensor(threshold, dtype=torch.float32)
    for step in (-torch.inf, torch.inf):
        value = torch.nextafter(nearest, torch.tensor(step))
        for one in (value, nearest):
            assert (one > torch.tensor(below(threshold))).item() == (one.double() > threshold).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 64, 300])
@pytest.mark.parametrize("more", [False, True])
def test_bias_shortcut_and_relu_in_one_pass(dtype, channels, more):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 5, 7, device=DEVICE).to(dtype, memory_format=torch.channels_last)
    x[0, 0, 0, 0] = torch.nan
    bias = torch.randn(channels, device=DEVICE)
    shortcut = torch.randn_like(x) if more else None
    expected = x.float() + bias.view(-1, 1, 1) + (shortcut.float() if more else 0)
    assert takes(x, shortcut)
    plain, positive = x.clone(), x.clone()
    finish(plain, bias, shortcut, relu=False)
    finish(positive, bias, shortcut, relu=True)
    settings = {"equal_nan": True, "rtol": 0 if dtype == torch.float32 else 2**-7, "atol": 1e-6}  # it cuts off bits
    torch.testing.assert_close(plain, expected.to(dtype), **settings)
    torch.testing.assert_close(positive, expected.relu().to(dtype), **settings)


def test_what_the_kernel_does_not_take_is_added_one_by_one():
    x = torch.randn(2, 4, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    bias, half = torch.randn(4, device=DEVICE), x.bfloat16()
    for values, shortcut in ((x.contiguous(), None), (x.double(), None), (x, x.contiguous()), (x, half)):
        assert not takes(values, shortcut)
        expected = (values + bias.view(-1, 1, 1) + (0 if shortcut is None else shortcut)).relu()
        torch.testing.assert_close(finish(values.clone(), bias, shortcut, relu=True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_and_what_follows_them(kind, dtype, monkeypatch):
    monkeypatch.setattr(layers, "finishes_in_one_pass", lambda x: True)
    if DEVICE == "cpu":  # there the kernel runs under the interpreter
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    check_against_layers(kind, dtype, DEVICE)
