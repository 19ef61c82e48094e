"""Convolutions with what follows them, in one pass and layer by layer: values and gradients must agree."""

from __future__ import annotations

import copy

import torch
from torch import nn

from detector.ops import layers

KINDS = ("conv", "conv, relu", "norm", "norm, relu", "norm, relu, shortcut")


def parts(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    if "norm" not in kind:
        return layers.conv_block(8, 16, 3, relu="relu" in kind)
    norm = layers.FrozenBatchNorm(16)
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        values.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), norm)


def check_against_layers(kind: str, dtype: torch.dtype, device: str) -> None:
    fused = parts(kind).to(device, memory_format=torch.channels_last)
    plain, found = copy.deepcopy(fused), {}
    x, more = (
        torch.randn(2, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
        for channels, side in ((8, 9), (16, 5))
    )
    for name, module in (("fused", fused), ("plain", plain)):
        inputs = [t.clone().requires_grad_() for t in ((x, more) if "shortcut" in kind else (x,))]
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            added = inputs[1].to(dtype) if "shortcut" in kind else None
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
