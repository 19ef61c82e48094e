"""What the kernels of ops must compute. Not collected by itself: test_triton.py runs this file on the CPU under
Triton's interpreter, tests/gpu on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from detector.ops import layers
from detector.ops.triton_finish import finish, finishes
from detector.ops.triton_nms import below, nms_fused

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
    assert finishes(x, shortcut)
    plain, positive = x.clone(), x.clone()
    finish(plain, bias, shortcut, relu=False)
    finish(positive, bias, shortcut, relu=True)
    settings = {"equal_nan": True, "rtol": 0 if dtype == torch.float32 else 2**-7, "atol": 1e-6}  # it cuts off bits
    torch.testing.assert_close(plain, expected.to(dtype), **settings)
    torch.testing.assert_close(positive, expected.relu().to(dtype), **settings)


def test_what_cannot_be_finished():
    x = torch.zeros(2, 4, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    assert not finishes(x.contiguous(), None) and not finishes(x.double(), None)
    assert not finishes(x, x.contiguous()) and not finishes(x, x.bfloat16())


def parts(kind: str) -> tuple[nn.Module, bool]:
    """A convolution with what follows it, and whether a shortcut is added."""
    torch.manual_seed(0)
    if kind in ("conv", "conv, relu"):
        return layers.conv_block(8, 16, 3, relu="relu" in kind), False
    norm = layers.FrozenBatchNorm(16)
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        values.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), norm), "shortcut" in kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["conv", "conv, relu", "norm", "norm, relu", "norm, relu, shortcut"])
def test_convolutions_and_what_follows_them(kind, dtype, monkeypatch):
    """Values and gradients are those of the layers one by one."""
    monkeypatch.setattr(layers, "finishes_in_one_pass", lambda x: True)
    fused, shortcut = parts(kind)
    fused = fused.to(DEVICE, memory_format=torch.channels_last)
    plain, found = copy.deepcopy(fused), {}
    x = torch.randn(2, 8, 9, 9, device=DEVICE).contiguous(memory_format=torch.channels_last)
    more = torch.randn(2, 16, 5, 5, device=DEVICE).contiguous(memory_format=torch.channels_last) if shortcut else None
    for name, module in (("fused", fused), ("plain", plain)):
        inputs = [t.clone().requires_grad_() for t in (x, more) if t is not None]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            added = inputs[1].to(dtype) if shortcut else None
            if name == "fused" and "norm" in kind:
                out = layers.conv_norm(inputs[0], *module, relu="relu" in kind, shortcut=added)
            elif name == "fused":
                out = module(inputs[0])
            else:
                out = nn.Sequential.forward(module, inputs[0])
                out = out if added is None else out + added
                out = out.relu() if "norm" in kind and "relu" in kind else out
        assert name == "plain" or out.dtype == dtype
        out.float().pow(2).sum().backward()
        grads = [t.grad for t in inputs] + [p.grad for p in module.parameters()]
        assert all(grad.dtype == torch.float32 for grad in grads)
        found[name] = [out.detach().float(), *grads]
    for ours, theirs in zip(found["fused"], found["plain"], strict=True):
        assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * theirs.norm()
