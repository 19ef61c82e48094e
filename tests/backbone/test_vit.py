"""Plain ViTs and the simple pyramid: equal to an independent forward pass, and to timm's where timm has the same."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import detector
from detector import checkpoint
from detector.backbone import SimplePyramid, TimmBackbone, ViT, vit
from detector.config import ConfigError, build
from detector.data import read_image
from detector.engine.train import train
from detector.explorer import write_page
from tests.runs import TINY, checked

timm = pytest.importorskip("timm")
IMAGES = (3, 80, 112)  # 5 x 7 patches


def lively(model):
    """In evaluation mode, with weights that all matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def images(*shape, seed=1):
    return torch.randn(2, *(shape or IMAGES), generator=torch.Generator().manual_seed(seed))


def plain_forward(w, x, heads, blocks, window, everywhere, tokens, rope=None):
    """A plain ViT from its tensors by name, window by window, query by query: ViTDet's section 3, MViTv2's equation 4.
    Images [N, 3, 16 H, 16 W] -> [N, C, H, W]."""
    found = []
    for image in x:
        columns = F.unfold(image[None], 16, stride=16)[0].T  # [H W, 3 16 16]
        height, width = image.shape[1] // 16, image.shape[2] // 16
        patches = columns @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
        y = patches.view(height, width, -1)
        leading = torch.cat([w[key][0] for key in ("cls_token", "reg_token") if key in w]) if tokens else y.new_zeros(0)
        if "pos_embed" in w:
            position = w["pos_embed"][0]
            if tokens:
                leading, position = leading + position[:tokens], position[tokens:]
            side = math.isqrt(len(position))
            square = position.T.view(1, -1, side, side)
            y = y + F.interpolate(square, (height, width), mode="bicubic")[0].permute(1, 2, 0)
        for i in range(blocks):
            b = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items() if key.startswith(f"blocks.{i}.")}
            gammas = [b.get(f"gamma_{k}", torch.ones(())) for k in (1, 2)]
            normed = partial(layer_norm, b, w["eps"])
            first, rest = (normed("norm1", leading) if tokens else leading), normed("norm1", y)
            of_tokens, of_patches = [], torch.zeros_like(rest)
            step = max(height, width) if window is None or i in everywhere else window
            tall, wide = (height, width) if window is None or i in everywhere else (window, window)
            for top in range(0, height, step):
                for left in range(0, width, step):
                    inside = torch.zeros(tall, wide, y.shape[-1])
                    angles = None if rope is None else torch.zeros(tall, wide, rope(1, 1).shape[-1])
                    part = rest[top : top + tall, left : left + wide]
                    inside[: part.shape[0], : part.shape[1]] = part
                    if rope is not None:
                        of_window = rope(height, width).view(height, width, -1)[top : top + tall, left : left + wide]
                        angles[: part.shape[0], : part.shape[1]] = of_window
                    out = attention(b, first, inside, heads, angles)
                    of_tokens.append(out[:tokens])
                    new = out[tokens:].view(tall, wide, -1)
                    of_patches[top : top + tall, left : left + wide] = new[: part.shape[0], : part.shape[1]]
            if tokens:
                leading = leading + gammas[0] * torch.stack(of_tokens).mean(0)
            y = y + gammas[0] * of_patches
            if tokens:
                leading = leading + gammas[1] * mlp(b, normed("norm2", leading))
            y = y + gammas[1] * mlp(b, normed("norm2", y))
        found.append(y.permute(2, 0, 1))
    return torch.stack(found)


def layer_norm(b, eps, name, x):
    return F.layer_norm(x, x.shape[-1:], b[f"{name}.weight"], b[f"{name}.bias"], eps)


def mlp(b, x):
    hidden = F.gelu(F.linear(x, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
    return F.linear(hidden, b["mlp.fc2.weight"], b["mlp.fc2.bias"])


def attention(b, tokens, patches, heads, angles):
    """[T + h w, C] of tokens [T, C] and patches [h, w, C]."""
    height, width, channels = patches.shape
    x = torch.cat([tokens, patches.view(-1, channels)])
    bias = b.get("attn.qkv.bias")
    if bias is None and "attn.q_bias" in b:
        bias = torch.cat([b["attn.q_bias"], torch.zeros(channels), b["attn.v_bias"]])
    q, k, v = F.linear(x, b["attn.qkv.weight"], bias).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
    if angles is not None:
        q, k = (rotated(part, len(tokens), angles.view(height * width, -1)) for part in (q, k))
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if "attn.rel_pos_h" in b:
        logits = logits + relative(b, q, height, width)
    mixed = (logits.softmax(-1) @ v).transpose(0, 1).reshape(len(x), channels)
    return F.linear(mixed, b["attn.proj.weight"], b["attn.proj.bias"])


def relative(b, q, height, width):
    """q . h at the distance down + q . w at the distance right, query by query, the tables interpolated to the map."""
    tables = [
        F.interpolate(b[f"attn.rel_pos_{name}"].T[None], 2 * length - 1, mode="linear")[0].T
        for name, length in (("h", height), ("w", width))
    ]
    found = torch.zeros(q.shape[0], height * width, height * width)
    for i in range(height):
        for j in range(width):
            for k in range(height):
                for m in range(width):
                    along = tables[0][i - k + height - 1] + tables[1][j - m + width - 1]
                    found[:, i * width + j, k * width + m] = q[:, i * width + j] @ along
    return found


def rotated(x, leading, angles):
    """Rotary positions: each half of a row of x turned by its angle; angles [h w, 2 D] = (sin, cos)."""
    sin, cos = angles.chunk(2, -1)
    rest, half = x[:, leading:], x.shape[-1] // 2
    turned = torch.cat([-rest[..., half:], rest[..., :half]], -1)
    return torch.cat([x[:, :leading], rest * cos + turned * sin], 1)


CASES = {
    "all global": {},
    "windows": {"window": 3, "global_blocks": [1]},
    "windows, without tokens": {"window": 3, "tokens": False},
    "relative positions": {"window": 3, "global_blocks": [1], "tokens": False, "relative_positions": 96},
    "rotary positions": {"name": "vit_tiny_patch16_dinov3_qkvb"},
    "rotary positions, windows": {"name": "vit_tiny_patch16_dinov3_qkvb", "window": 4, "global_blocks": [0]},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@torch.no_grad()
def test_equal_to_an_independent_forward_pass(settings):
    settings = {"name": "test_vit", "depth": 2} | settings
    body = lively(ViT(**settings))
    neck = lively(SimplePyramid(body.out_channels, body.strides, out_channels=8))
    model, rope = body.model, getattr(body.model, "rope", None)
    found = body(images())
    w = model.state_dict() | {"eps": model.blocks[0].norm1.eps}
    angles = None if rope is None else lambda height, width: rope.get_embed(shape=[height, width])
    heads = model.embed_dim // (model.embed_dim // 3 if rope else 32)
    everywhere = settings.get("global_blocks", [0, 1])  # of two blocks each ends a quarter or two
    expected = plain_forward(w, images(), heads, 2, body.window, everywhere, body.tokens, angles)
    assert (body.tokens > 0) == settings.get("tokens", True)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=2e-5)
    levels = neck(found)
    for level, wanted in zip(levels, pyramid(neck.state_dict(), expected), strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-3, atol=1e-4)
    assert [level.shape[-2:] for level in levels] == [(20, 28), (10, 14), (5, 7), (2, 3), (1, 2)]
    assert neck.strides == [4, 8, 16, 32, 64] and neck.roi_levels == 4


def pyramid(w, x):
    """ViTDet's figure 2 and appendix A.2, from tensors by name."""

    def enlarged(key, y):
        return F.conv_transpose2d(y, w[f"scale.{key}.weight"], w[f"scale.{key}.bias"], stride=2)

    def norm(key, y):
        mean, var = y.mean(1, keepdim=True), y.var(1, keepdim=True, unbiased=False)
        y = (y - mean) / (var + 1e-6).sqrt()
        return y * w[f"{key}.weight"][:, None, None] + w[f"{key}.bias"][:, None, None]

    maps = [
        enlarged("0.3", F.gelu(norm("scale.0.1", enlarged("0.0", x)))),
        enlarged("1.0", x),
        x,
        F.max_pool2d(x, 2),
    ]
    levels = []
    for i, y in enumerate(maps):
        y = norm(f"lateral.{i}.1", F.conv2d(y, w[f"lateral.{i}.0.weight"]))
        levels.append(norm(f"output.{i}.1", F.conv2d(y, w[f"output.{i}.0.weight"], padding=1)))
    return [*levels, levels[-1][:, :, ::2, ::2]]


@pytest.mark.parametrize(
    ("name", "side"),
    [("test_vit", 160), ("test_vit2", 160), ("eva02_tiny_patch14_224", 256), ("vit_tiny_patch16_dinov3_qkvb", 96)],
)
@torch.no_grad()
def test_timm_gives_the_same(name, side):
    """Whole models with tokens and layer scale, at the size that their position embeddings are of."""
    body = lively(ViT(name, depth=2, final_norm=True))
    whole = timm.create_model(name, depth=2, **body.settings, dynamic_img_size=True).eval()
    whole.load_state_dict(body.model.state_dict(), strict=False)
    whole.norm = body.model.norm  # of some it stands after the mean
    x = images(3, side, side)
    (expected,) = whole.forward_intermediates(x, indices=[1], norm=True, intermediates_only=True)
    torch.testing.assert_close(body(x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [True, False])
def test_published_weights_are_resized_to_the_patches(monkeypatch, tmp_path, tokens):
    """DINOv2's patches of 14 px become ones of 16, its position embedding keeps its grid."""
    name = "vit_small_patch14_reg4_dinov2.lvd142m" if tokens else "test_vit2"
    whole = timm.create_model(name, depth=1)
    torch.nn.init.normal_(whole.norm.weight if tokens else whole.fc_norm.weight)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    create = timm.create_model

    def offline(name, pretrained=False, **settings):
        overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "whole.pth")}} if pretrained else {}
        return create(name, pretrained=pretrained, **overlay, **settings | ({"depth": 1} if pretrained else {}))

    monkeypatch.setattr(timm, "create_model", offline)
    body = ViT(name, depth=1, tokens=tokens, final_norm=True)
    state, theirs = body.published("pretrained"), whole.state_dict()
    assert set(state) == set(body.state_dict())
    body.load_state_dict(state)
    kernel, position = body.model.patch_embed.proj.weight, body.model.pos_embed
    assert kernel.shape[-2:] == (16, 16)
    if tokens:
        resample = timm.layers.resample_patch_embed
        torch.testing.assert_close(kernel, resample(theirs["patch_embed.proj.weight"], [16, 16]))
        assert torch.equal(position, theirs["pos_embed"]) and position.shape[1] == 37 * 37
    else:
        assert torch.equal(kernel, theirs["patch_embed.proj.weight"])
        assert torch.equal(position, theirs["pos_embed"][:, -100:]) and "model.cls_token" not in state
    assert torch.equal(body.model.norm.weight, theirs["norm.weight" if tokens else "fc_norm.weight"])


def test_drop_path_rises_to_the_last_block():
    body = ViT("test_vit", drop_path_rate=0.5)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in body.model.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(6)])
    x = images()
    first, second = body.train()(x)[0], body(x)[0]
    assert not torch.equal(first, second)
    assert torch.equal(body.eval()(x)[0], body(x)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vit_bse_patch16_224"}, "timm has no model 'vit_bse_patch16_224'"),
        ({"name": "test_vit.mae"}, "timm publishes no weights 'mae' of test_vit: it has r160_in1k"),
        ({"name": "swin_tiny_patch4_window7_224"}, "swin_tiny_patch4_window7_224 is no plain ViT .*=timm"),
        ({"name": "samvit_base_patch16"}, "is no plain ViT"),
        ({"patch_size": 14}, "patch_size=14: expected one of 8, 16, 32"),
        ({"image_size": 100}, "image_size=100: expected a multiple of patch_size=16"),
        ({"depth": 7}, "depth=7: test_vit has 6 blocks"),
        ({"window": 1}, "window=1: expected at least 2"),
        ({"global_blocks": [1]}, "global_blocks=.1.: without a window all are global"),
        ({"window": 4, "global_blocks": [6]}, "global_blocks=.6.: 6 is none of the 6 blocks 0 to 5"),
        ({"relative_positions": 96}, "relative_positions: class and register tokens .* set tokens=false"),
    ],
)
def test_settings_that_make_no_vit(settings, message):
    with pytest.raises(ValueError, match=message):
        ViT(**{"name": "test_vit"} | settings)


def test_settings_that_make_no_simple_pyramid():
    with pytest.raises(ValueError, match=r"a simple pyramid is made of one map, .* take neck@model.neck=fpn"):
        SimplePyramid([8, 16], [8, 16])
    with pytest.raises(ValueError, match=r"levels=\[64\]: of 4, 8, 16, 32, finest first, some"):
        SimplePyramid([8], [16], levels=[64])
    with pytest.raises(ValueError, match="top='conv': expected 'max_pool' or 'none'"):
        SimplePyramid([8], [16], top="conv")
    assert SimplePyramid([8], [16], levels=[8, 16], top="none").strides == [8, 16]


def test_a_plain_vit_on_another_neck_is_told_which_it_needs():
    cfg = checked("experiment=none", "backbone@model.backbone=vit", "model.backbone.name=test_vit")
    with pytest.raises(ConfigError, match=r"the neck gives 2 .*; .* neck@model.neck=simple_pyramid makes five levels"):
        build(cfg.model, "model", num_classes=2)


def test_maps_at_several_strides_are_advised_to_take_this():
    with pytest.raises(ValueError, match=r"backbone@model.backbone=vit neck@model.neck=simple_pyramid"):
        TimmBackbone("test_vit")


def test_quarters():
    assert vit.global_ones(12, 14, None) == [2, 5, 8, 11]
    assert vit.global_ones(32, 14, None) == [7, 15, 23, 31]
    assert vit.global_ones(3, 14, None) == [0, 1, 2]
    assert vit.global_ones(12, 14, []) == [] and vit.global_ones(2, None, None) == [0, 1]


def test_trains_freezes_predicts_and_explores(shapes_tiny, tmp_path):
    """Like any other model: frozen until a thaw, layers slower by depth, from a checkpoint to detections and a page."""
    overrides = [
        *(text for text in TINY if "backbone" not in text),
        *("backbone@model.backbone=vit", "neck@model.neck=simple_pyramid", "model.backbone.name=test_vit"),
        *("model.backbone.depth=3", "model.backbone.window=3", "model.backbone.weights=null"),
        *("training.freeze=[backbone]", "training.thaw_at=2", "training.layer_decay=0.7"),
        *("schedule.max_iterations=3", "schedule.warmup=0", "runtime.checkpoint_every=1", "runtime.keep=3"),
    ]
    train(checked(*overrides, f"data.root={shapes_tiny}", f"run_dir={tmp_path / 'run'}"))
    states = [checkpoint.load(tmp_path / "run" / f"iteration_000000{i}.pt")["model"] for i in (1, 2, 3)]
    changed = [
        {key.partition(".")[0] for key in old if not torch.equal(old[key], new[key])}
        for old, new in zip(states, states[1:])
    ]
    assert "backbone" not in changed[0] and {"backbone", "neck", "rpn"} <= changed[1]
    photo = sorted((shapes_tiny / "val").iterdir())[0]
    model = detector.load(tmp_path / "run" / "last.pt")
    assert len(model.predict(photo, 0).boxes) > 0
    assert write_page(model, read_image(photo), tmp_path / "page.html", photo.name).stat().st_size > 10_000
