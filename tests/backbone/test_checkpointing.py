"""Activation checkpointing: the same losses, gradients and statistics to the bit, with less kept for them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from detector.backbone import ResNet, Swin, TimmBackbone, ViT
from detector.config import CONFIGS, ConfigError
from detector.engine.run_folder import compare_configs
from detector.engine.setup import preflight
from tests.runs import checked
from tests.tiny import small_swins

MINE = {
    "batch norm": (ResNet, {"depth": 18, "width": 8, "norm": "batch_norm", "frozen_stages": 0}),
    "frozen norm": (ResNet, {"depth": 50, "width": 8, "frozen_stages": 2}),
    "deformable": (ResNet, {"depth": 50, "width": 8, "norm": "batch_norm", "deform_stages": [4], "stages": [4]}),
}
TIMMS = {
    "ConvNeXt, drop path": (TimmBackbone, {"name": "test_convnext", "drop_path_rate": 0.5}),
    "ResNet of timm, batch norm": (TimmBackbone, {"name": "test_resnet"}),
    "Swin, drop path": (
        TimmBackbone,
        {"name": "swin_tiny_patch4_window7_224", "strides": [4], "drop_path_rate": 0.5},
    ),
    "Swin of detectors": (Swin, {"name": "swin_tiny_patch4_window7_224", "strides": [4], "drop_path_rate": 0.5}),
    "ViT, drop path, windows": (ViT, {"name": "test_vit", "window": 3, "drop_path_rate": 0.5}),
}
BODIES = MINE | (TIMMS if importlib.util.find_spec("timm") else {})


class Counted:
    """Bytes that autograd keeps meanwhile, those of parts that are computed again not among them."""

    def __enter__(self):
        self.bytes, self.known = 0, set()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda kept: kept)
        self.hooks.__enter__()
        return self

    def keep(self, x):
        if x.untyped_storage().data_ptr() not in self.known:
            self.known.add(x.untyped_storage().data_ptr())
            self.bytes += x.untyped_storage().nbytes()
        return x

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def step(body: nn.Module, held: bool) -> tuple[float, dict, dict, int, float]:
    """Two steps' last loss, all gradients, all buffers, bytes kept, and the next random number."""
    torch.manual_seed(3)
    images = torch.randn(2, 3, 96, 96)
    body.train()
    for _ in range(2):  # for the second one statistics of the first are there
        with Counted() as counted:
            maps = body(images)
        loss = sum((m * torch.linspace(-1, 1, m[0].numel()).view_as(m[0])).mean() for m in maps)
        body.zero_grad()
        loss.backward()
    gradients = {name: p.grad for name, p in body.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values()) and gradients
    return loss.item(), gradients, dict(body.named_buffers()), counted.bytes, torch.rand(1).item()


@pytest.mark.parametrize("kind, settings", BODIES.values(), ids=BODIES)
def test_changes_nothing_but_what_is_kept(kind, settings, monkeypatch):
    if "swin" in settings.get("name", ""):
        small_swins(monkeypatch)
    torch.manual_seed(0)
    plain = kind(**settings)
    tried = kind(**settings, checkpointing=True)
    tried.load_state_dict(plain.state_dict())
    loss, gradients, buffers, kept, after = step(plain, held=True)
    again, found, statistics, less, later = step(tried, held=False)
    assert (again, later) == (loss, after)
    assert found.keys() == gradients.keys() and statistics.keys() == buffers.keys()
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), name
    for name, value in buffers.items():
        assert torch.equal(statistics[name], value), name
    assert less < 0.75 * kept, (less, kept)  # timm keeps the first stage
    for model in (plain.eval(), tried.eval()):
        model.requires_grad_(False)
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 64)
        assert all(torch.equal(a, b) for a, b in zip(plain(images), tried(images)))


def test_every_backbone_has_the_setting_and_old_runs_go_on():
    for file in (CONFIGS / "backbone").glob("*.yaml"):
        assert "\ncheckpointing: false" in file.read_text(encoding="utf-8"), file
    cfg = checked("experiment=none", "model.backbone.checkpointing=true")
    old = {"model": {"backbone": {"_target_": cfg.model.backbone["_target_"]}}}
    new = {"model": {"backbone": old["model"]["backbone"] | {"checkpointing": True}}}
    compare_configs(old, new, chosen={"model.backbone.checkpointing"})
    compare_configs(new, old)


def test_not_with_compiled_layers(shapes_tiny):
    settings = ["model.backbone.checkpointing=true", f"data.root={shapes_tiny}", "runtime.compile=true"]
    cfg = checked("experiment=none", *settings)
    with pytest.raises(ConfigError, match=r"decide themselves what they keep; set it or runtime.compile to false"):
        preflight(cfg, None)
