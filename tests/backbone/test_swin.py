"""Swin transformers as detectors have them; tests/weights/test_bodies.py compares them with an independent pass."""

from __future__ import annotations

import pytest
import torch

from detector.backbone import Swin, TimmBackbone, swin
from tests.tiny import small_swins

library = pytest.importorskip("timm")
NAME = "swin_tiny_patch4_window7_224"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small_swins(monkeypatch)


@torch.no_grad()
def test_timm_gives_the_same_where_windows_divide_the_map():
    """Of images of 224 px all but the last stage, whose single window timm does not move."""
    body = Swin(NAME).eval()
    whole = TimmBackbone(NAME).eval()
    whole.load_state_dict(
        {
            key.replace("layers.", "layers_"): value
            for key, value in body.state_dict().items()
            if key.startswith("model.")
        }
    )
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    maps, theirs = body(images), whole(images)
    for i in range(3):
        normed = torch.nn.functional.layer_norm(theirs[i].movedim(1, -1), theirs[i].shape[1:2]).movedim(-1, 1)
        torch.testing.assert_close(maps[i], normed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(body(images[..., :192])[0], whole(images[..., :192])[0], atol=1e-2)


def test_takes_other_strides_channels_and_sizes():
    body = Swin(NAME, strides=[8, 16], in_channels=5)
    assert (body.out_channels, body.strides, body.in_channels) == ([64, 128], [8, 16], 5)
    assert [tuple(m.shape) for m in body(torch.rand(2, 5, 100, 68))] == [(2, 64, 13, 9), (2, 128, 7, 5)]
    layers = body.layers()
    assert layers.keys() == dict(body.named_parameters()).keys()
    assert layers["model.patch_embed.proj.weight"] == 0 and layers["norms.1.bias"] == max(layers.values())
    assert layers["norms.0.weight"] == layers["model.layers.1.blocks.1.mlp.fc2.weight"]


def test_published_weights_leave_the_norms_of_maps_as_they_are(monkeypatch, tmp_path):
    theirs = library.create_model(NAME, embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
    torch.save(theirs.state_dict(), tmp_path / "whole.pth")
    small = swin.created

    def offline(name, pretrained=False, **settings):
        overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "whole.pth")}} if pretrained else {}
        return small(name, pretrained=pretrained, **overlay, **settings)

    monkeypatch.setattr(swin, "created", offline)
    body = Swin(NAME)
    body.load_state_dict(body.published("pretrained"))
    for key, value in body.model.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    assert torch.equal(body.norms[0].weight, torch.ones(32))
    with pytest.raises(ValueError, match="'IMAGENET1K_V1': expected 'pretrained'"):
        body.published("IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "swinv2_tiny_window8_256"},
            "no Swin transformer of the first version, but of timm.models.swin_transfor",
        ),
        ({"name": "swin_tinny"}, "timm has no model 'swin_tinny'"),
        ({"strides": [2, 4]}, r"strides=\[2, 4\]: expected some of \[4, 8, 16, 32\], finest first"),
        ({"strides": [8, 4]}, "finest first"),
    ],
)
def test_settings_that_make_no_swin(settings, message):
    with pytest.raises(ValueError, match=message):
        Swin(**{"name": NAME} | settings)


def test_statistics_stay_where_they_are_fixed(monkeypatch):
    monkeypatch.undo()
    fixed, plain = (TimmBackbone("regnetx_002", strides=[4], fixed_statistics=held).train() for held in (True, False))
    before = {key: value.clone() for key, value in fixed.named_buffers()}
    plain.load_state_dict(fixed.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fixed(images)[0], plain.eval()(images)[0]) and fixed.training
    assert all(torch.equal(value, before[key]) for key, value in fixed.named_buffers())
    assert not torch.equal(plain.train()(images)[0], fixed(images)[0])
