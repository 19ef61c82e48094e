"""What every RoI method keeps: shapes, layouts, dtypes, empty input, gradients, refusals, no state."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import hydra
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from detector.roi import (
    AdaptivePooling,
    BorderAlign,
    ContextRoIPool,
    DeformableAttentionPool,
    DeformablePositionSensitiveRoIPool,
    DeformableRoIPool,
    GRoIE,
    LightHeadRoIAlign,
    PositionSensitiveRoIAlign,
    PositionSensitiveRoIPool,
    PreciseRoIPool,
    RoIAlign,
    RoIExtractor,
    RoIOp,
    RoIPool,
    RoIWarp,
    RotatedRoIAlign,
    SemanticRoIAlign,
    SoftLevels,
    SumLevels,
    align,
    bag,
    make_op,
)
from tests.roi.common import STRIDES, levels_of, make_awkward, make_features, make_rois

CHANNELS, SIZE = 12, (2, 3)
OPS = {
    "align": RoIAlign,
    "align_adaptive": partial(RoIAlign, sampling_ratio=0),
    "align_max": partial(RoIAlign, reduction="max"),
    "align_max_adaptive": partial(RoIAlign, sampling_ratio=0, reduction="max"),
    "align_bicubic": partial(RoIAlign, kernel="bicubic"),
    "align_lanczos": partial(RoIAlign, kernel="lanczos", sampling_ratio=1),
    "align_per_level": partial(RoIAlign, sampling_ratio=[3, 2, 1, 1]),
    "align_per_size": partial(RoIAlign, sampling_ratio=[[0, 3], [20, 2], [60, 1]]),
    "pool": RoIPool,
    "pool_floor": partial(RoIPool, quantization="floor"),
    "pool_uniform": partial(RoIPool, quantization="uniform"),
    "warp": RoIWarp,
    "precise": PreciseRoIPool,
    "deformable": partial(DeformableRoIPool, predictor_width=8),
    "deformable_adaptive": partial(DeformableRoIPool, predictor_width=8, sampling_ratio=0),
    "deformable_points": partial(DeformableRoIPool, predictor_width=8, offset_granularity="point"),
    "deformable_per_level": partial(DeformableRoIPool, predictor_width=8, predictor="per_level"),
    "modulated": partial(DeformableRoIPool, predictor_width=8, modulated=True),
    "modulated_points": partial(DeformableRoIPool, predictor_width=8, modulated=True, offset_granularity="point"),
    "position_sensitive_pool": PositionSensitiveRoIPool,
    "position_sensitive_align": PositionSensitiveRoIAlign,
    "deformable_position_sensitive": partial(DeformablePositionSensitiveRoIPool, sampling_ratio=2),
    "sum_levels": SumLevels,
    "groie": GRoIE,
    "groie_position": partial(GRoIE, attention="position"),
    "adaptive_pooling": AdaptivePooling,
    "adaptive_pooling_sum": partial(AdaptivePooling, fusion="sum"),
    "soft_levels": SoftLevels,
    "context": ContextRoIPool,
    "border": partial(BorderAlign, border_channels=2, points=5),
    "attention": partial(DeformableAttentionPool, heads=3, points=2),
    "semantic": partial(SemanticRoIAlign, samples=10, width=8),
    "rotated": RotatedRoIAlign,
    "position_sensitive_layer": partial(PositionSensitiveRoIAlign, out_channels=2),
    "position_sensitive_groups": partial(PositionSensitiveRoIPool, group_size=(1, 2), out_channels=2),
    "deformable_position_sensitive_layer": partial(
        DeformablePositionSensitiveRoIPool, sampling_ratio=2, out_channels=2, group_size=1
    ),
    "light_head_position_sensitive": partial(
        LightHeadRoIAlign, out_channels=2, group_size=None, middle_channels=2, kernel=3
    ),
}
POSITION_SENSITIVE = {name for name in OPS if "position_sensitive" in name}
BOX_GRADIENTS = [
    "align_bicubic",
    "align_lanczos",
    "align_per_size",
    "align",
    "align_adaptive",
    "align_max",
    "precise",
    "deformable",
    "modulated_points",
    "soft_levels",
    "context",
]


def build(op: str | partial, dtype=torch.float64, size=SIZE) -> RoIOp:
    """The method, by name or as a factory, with random parameters, its offsets far from zero."""
    torch.manual_seed(0)
    op = make_op(OPS[op] if isinstance(op, str) else op, size, CHANNELS, len(STRIDES)).to(dtype)
    for parameter in op.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return op


def run(op: RoIOp, features, rois) -> torch.Tensor:
    return op(features, rois, levels_of(rois), STRIDES).features


@pytest.mark.parametrize("name", OPS)
def test_shape_and_channels(name):
    op, rois = build(name), make_rois(9)
    result = op(make_features(CHANNELS), rois, levels_of(rois), STRIDES)
    channels = CHANNELS // 6 if name in POSITION_SENSITIVE else CHANNELS
    assert result.features.shape == (9, channels, *SIZE)
    assert op.output_channels(CHANNELS) == channels
    assert op.output_size == SIZE
    points = (4, 6) if "points" in name else SIZE
    if "deformable" in name or "modulated" in name:
        assert result.offsets.shape == (9, 2, *points)
        assert result.offsets.abs().max() > 0.1
    else:
        assert result.offsets is None
    if "modulated" in name:
        assert result.modulation.shape == (9, *points)
        assert 0 < result.modulation.min() < result.modulation.max() < 1
    else:
        assert result.modulation is None


@pytest.mark.parametrize("name", OPS)
def test_no_rois(name):
    op = build(name)
    features = [f.requires_grad_() for f in make_features(CHANNELS)]
    rois = make_rois(3)[:0].requires_grad_()
    result = op(features, rois, levels_of(rois), STRIDES)
    channels = CHANNELS // 6 if name in POSITION_SENSITIVE else CHANNELS
    assert result.features.shape == (0, channels, *SIZE)
    result.features.sum().backward()  # ranks without RoIs take part in the backward pass
    assert all(p.grad is not None and not p.grad.any() for p in op.parameters())


@pytest.mark.parametrize("name", OPS)
def test_layouts_do_not_matter(name):
    """Contiguous, channels_last and sliced maps give the same values and gradients."""
    op, rois = build(name), make_rois(9)
    results = []
    for layout in ("contiguous", "channels_last", "sliced", "sliced_rois"):
        maps = [f.requires_grad_() for f in make_features(CHANNELS)]
        used = maps
        if layout == "channels_last":
            used = [f.to(memory_format=torch.channels_last) for f in maps]
        elif layout == "sliced":
            used = [torch.stack([f, -f], 4)[..., 0] for f in maps]
        given_rois = torch.stack([rois, -rois], 2)[..., 0] if layout == "sliced_rois" else rois
        out = run(op, used, given_rois)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach()] + [f.grad for f in maps])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPS)
def test_low_precision(name, dtype):
    """The result has the maps' dtype and is as near the float64 one as rounding of maps and result allows: coordinates,
    too large for 8 or 11 bits, stay in float32."""
    rois = make_rois(20, extent=160)
    maps = [f.to(dtype) for f in make_features(CHANNELS)]
    with torch.autocast("cpu", enabled=False):
        op = build(name).to(dtype)
        exact = build(name)
        for a, b in zip(exact.parameters(), op.parameters()):
            a.data = b.data.double()
        actual = run(op, maps, rois.float())
        expected = run(exact, [f.double() for f in maps], rois)
    assert actual.dtype == dtype
    learned = any(True for _ in op.parameters())  # then the layers' own rounding moves the points
    step = torch.finfo(dtype).eps
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 8 * step, torch.float16: 8 * step}[dtype] * (30 if learned else 1)
    error = (actual.double() - expected).abs()
    scale = expected.abs().mean() + expected.abs()
    assert (error / scale).quantile(0.98) < tolerance
    if not learned:
        assert (error / scale).max() < 20 * tolerance


def test_autocast_keeps_boxes_in_float32():
    """bf16 holds 8 bits: coordinates rounded to it would move by whole pixels."""
    features = [f.bfloat16() for f in make_features(CHANNELS)]
    rois = make_rois(20).float()
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(RoIAlign(SIZE), features, rois)
    expected = run(RoIAlign(SIZE), [f.double() for f in features], rois.double())
    torch.testing.assert_close(actual.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", OPS)
def test_images_and_levels_are_independent(name):
    """N = 1 and N = 8, all RoIs on one level (the others empty), one RoI at a time: the same rows."""
    op = build(name)
    features, rois = make_features(CHANNELS, images=8, size=(17, 23)), make_rois(12, images=8, extent=80)
    for levels in (levels_of(rois), torch.zeros(12, dtype=torch.int64), torch.full((12,), 3)):
        together = op(features, rois, levels, STRIDES).features
        for r in (0, 5, 11):
            image = int(rois[r, 0])
            one = rois[r : r + 1].clone()
            one[:, 0] = 0
            alone = op([f[image : image + 1] for f in features], one, levels[r : r + 1], STRIDES).features
            torch.testing.assert_close(together[r : r + 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPS)
def test_awkward_rois_give_finite_values_and_gradients(name):
    op, rois = build(name, torch.float32), make_awkward(torch.float32).requires_grad_()
    features = [f.requires_grad_() for f in make_features(CHANNELS, dtype=torch.float32)]
    out = run(op, features, rois)
    assert out.isfinite().all()
    out.square().sum().backward()
    assert all(f.grad.isfinite().all() for f in features)
    assert all(p.grad.isfinite().all() for p in op.parameters())
    if rois.grad is not None:
        assert rois.grad.isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_gradients_of_features_and_parameters(name):
    op = build(name)
    rois = make_rois(4, images=1, extent=60)[:, :]
    features = [f.requires_grad_() for f in make_features(CHANNELS, images=1, size=(9, 11))]
    levels = torch.tensor([0, 1, 1, 3])

    def function(*maps):
        return op(maps, rois, levels, STRIDES).features

    assert torch.autograd.gradcheck(function, features, fast_mode=True)
    for parameter in op.parameters():
        assert torch.autograd.gradcheck(lambda _: function(*features), (parameter,), fast_mode=True)


@pytest.mark.parametrize("name", BOX_GRADIENTS)
def test_gradients_of_boxes(name):
    op, rois = build(name), make_rois(5, images=1, extent=60)
    features = make_features(CHANNELS, images=1, size=(13, 15))
    levels = torch.tensor([0, 1, 1, 0, 2])

    def function(boxes):
        return op(features, torch.cat([rois[:, :1], boxes], 1), levels, STRIDES).features

    boxes = rois[:, 1:].clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (boxes,), fast_mode=True)
    function(boxes).square().sum().backward()
    assert boxes.grad.abs().max() > 1e-3


@pytest.mark.parametrize("granularity", ["bin", "point"])
def test_gradients_of_offsets_and_modulation(granularity):
    rois = make_rois(4, images=1, extent=60)
    op = DeformableRoIPool(SIZE, CHANNELS, offset_granularity=granularity, modulated=True, predictor_width=4)
    features = make_features(CHANNELS, images=1, size=(13, 15))
    points = SIZE if granularity == "bin" else (4, 6)
    generator = torch.Generator().manual_seed(3)
    offsets = torch.randn(4, 2, *points, generator=generator, dtype=torch.float64).requires_grad_()
    modulation = torch.rand(4, *points, generator=generator, dtype=torch.float64).requires_grad_()
    levels = torch.tensor([0, 1, 1, 2])

    def function(o, m):
        return op.pool(features, rois, levels, STRIDES, o, m)

    assert torch.autograd.gradcheck(function, (offsets, modulation), fast_mode=True)


@given(
    st.lists(st.tuples(*[st.floats(-300, 300, width=32)] * 4), min_size=1, max_size=6),
    st.sampled_from(["align", "align_adaptive", "align_max", "pool", "pool_floor", "pool_uniform", "warp", "precise"]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
@settings(max_examples=60)
def test_values_stay_between_zero_and_the_extremes(boxes, name, size):
    """Every bin is a mean or a maximum of cells, or of zeros outside: never beyond them, for any box and map size."""
    rois = torch.tensor([[0, *box] for box in boxes], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    feature = torch.rand(1, 4, *size, generator=generator, dtype=torch.float64) + 1
    out = make_op(OPS[name], SIZE, 4)([feature], rois, torch.zeros(len(rois), dtype=torch.int64), [8]).features
    assert out.min() >= 0
    assert out.max() <= feature.max() + 1e-9


@given(st.floats(-3, 3), st.floats(-3, 3), st.sampled_from(["align", "align_adaptive", "precise", "deformable_points"]))
@settings(max_examples=30)
def test_linear_in_the_features(a, b, name):
    op, rois = build(name), make_rois(5)
    if name == "deformable_points":
        for parameter in op.parameters():
            torch.nn.init.zeros_(parameter)
    f, g = make_features(CHANNELS), [m.flip(2) for m in make_features(CHANNELS)]
    mixed = run(op, [a * x + b * y for x, y in zip(f, g)], rois)
    torch.testing.assert_close(mixed, a * run(op, f, rois) + b * run(op, g, rois), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", OPS)
def test_same_input_same_result_and_no_state(name):
    """A call leaves nothing behind, and repeats to the bit."""
    op, rois = build(name, torch.float32), make_rois(9, dtype=torch.float32)
    before = set(vars(op)), [b.clone() for b in op.state_dict().values()]
    grads = []
    for _ in range(2):
        features = [f.requires_grad_() for f in make_features(CHANNELS, dtype=torch.float32)]
        run(op, features, rois).square().sum().backward()
        grads.append([f.grad for f in features])
        run(op, features, rois[:3])
    assert set(vars(op)) == before[0]
    assert all(torch.equal(a, b) for a, b in zip(op.state_dict().values(), before[1]))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


BAD = {
    "features are one tensor": (lambda f, r, le, s: (f[0], r, le, s), TypeError, "features must be a non-empty list"),
    "no features": (lambda f, r, le, s: ([], r, le, []), TypeError, "features must be a non-empty list"),
    "feature of 3 dimensions": (lambda f, r, le, s: ([f[0][0], *f[1:]], r, le, s), ValueError, r"features\[0\]"),
    "empty map": (lambda f, r, le, s: ([*f[:3], f[3][:, :, :0]], r, le, s), ValueError, r"features\[3\]"),
    "integer map": (lambda f, r, le, s: ([f[0].int(), *f[1:]], r, le, s), TypeError, r"features\[0\]"),
    "channels differ": (lambda f, r, le, s: ([f[0], f[1][:, :6], *f[2:]], r, le, s), ValueError, r"features\[1\]"),
    "images differ": (lambda f, r, le, s: ([f[0], f[1][:1], *f[2:]], r, le, s), ValueError, r"features\[1\]"),
    "dtypes differ": (lambda f, r, le, s: ([f[0], f[1].float(), *f[2:]], r, le, s), TypeError, r"features\[1\]"),
    "devices differ": (lambda f, r, le, s: ([f[0], f[1].to("meta"), *f[2:]], r, le, s), TypeError, r"features\[1\]"),
    "stride missing": (lambda f, r, le, s: (f, r, le, s[:3]), ValueError, "strides"),
    "stride of 0": (lambda f, r, le, s: (f, r, le, (4, 8, 16, 0)), ValueError, "strides"),
    "boxes instead of rois": (lambda f, r, le, s: (f, r[:, 1:], le, s), ValueError, r"rois must have shape \[R, 5\]"),
    "integer rois": (lambda f, r, le, s: (f, r.long(), le, s), TypeError, "rois"),
    "rois elsewhere": (lambda f, r, le, s: (f, r.to("meta"), le, s), ValueError, "rois must be on cpu"),
    "levels elsewhere": (lambda f, r, le, s: (f, r, le.to("meta"), s), ValueError, "levels must be on cpu"),
    "too few levels": (lambda f, r, le, s: (f, r, le[:3], s), ValueError, r"levels must have shape \[9\]"),
    "float levels": (lambda f, r, le, s: (f, r, le.float(), s), TypeError, "levels"),
    "level 4 of 4": (lambda f, r, le, s: (f, r, le * 0 + 4, s), ValueError, r"levels must lie in 0\.\.3"),
    "level -1": (lambda f, r, le, s: (f, r, le * 0 - 1, s), ValueError, r"levels must lie in 0\.\.3"),
    "image 2 of 2": (lambda f, r, le, s: (f, r + 2, le, s), ValueError, r"rois\[0, 0\] is batch index"),
    "image -1": (lambda f, r, le, s: (f, r * 0 - 1, le, s), ValueError, r"rois\[0, 0\] is batch index -1"),
    "half an image": (lambda f, r, le, s: (f, r * 0 + 0.5, le, s), ValueError, r"rois\[0, 0\] is batch index 0\.5"),
    "no images": (lambda f, r, le, s: ([m[:0] for m in f], r, le, s), ValueError, "the features hold no image"),
    "image NaN": (lambda f, r, le, s: (f, r * float("nan"), le, s), ValueError, r"rois\[0, 0\] is batch index nan"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["align", "pool", "precise", "deformable", "position_sensitive_pool", "sum_levels"])
def test_bad_input_is_refused(name, case):
    change, error, message = BAD[case]
    rois = make_rois(9)
    arguments = change(make_features(CHANNELS), rois, levels_of(rois), STRIDES)
    with pytest.raises(error, match=message):
        build(name)(*arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoIAlign(0), "output_size"),
        (lambda: RoIAlign((7, 7, 7)), "output_size"),
        (lambda: RoIAlign((7, 2.5)), "output_size"),
        (lambda: RoIAlign(7, sampling_ratio=-1), "sampling_ratio"),
        (lambda: RoIAlign(7, sampling_ratio=[]), "sampling_ratio must be an int >= 0"),
        (lambda: RoIAlign(7, sampling_ratio=[2, -1]), "a list of them, one per level"),
        (
            lambda: RoIAlign(7, sampling_ratio=[[8, 2]]),
            r"pairs of sizes, from 0 upwards, and ratios .* got \[\[8, 2\]\]",
        ),
        (lambda: RoIAlign(7, sampling_ratio=[[0, 2], [0, 1]]), "sampling_ratio"),
        (lambda: RoIAlign(7, sampling_ratio=[2, [0, 1]]), "sampling_ratio"),
        (lambda: RoIAlign(7, sampling_ratio="2"), "sampling_ratio"),
        (lambda: RoIAlign(7, kernel="cubic"), "kernel must be one of 'bilinear', 'bicubic', 'lanczos', got 'cubic'"),
        (lambda: run(RoIAlign(7, [2, 2]), make_features(), make_rois(2)), "one entry per level, of which there are 4"),
        (lambda: RoIAlign(7, reduction="sum"), "reduction must be one of 'avg', 'max', got 'sum'"),
        (lambda: RoIAlign(7, placement="corner"), "placement"),
        (lambda: RoIPool(7, "ceil"), "quantization"),
        (lambda: PositionSensitiveRoIPool(7, "floor"), "quantization"),
        (lambda: DeformableRoIPool(7, 4, offset_granularity="cell"), "offset_granularity"),
        (lambda: DeformableRoIPool(7, 4, predictor="none"), "predictor"),
        (lambda: DeformablePositionSensitiveRoIPool(7, 100), "100 channels, expected a multiple of h"),
        (lambda: RoIExtractor(RoIAlign(7), STRIDES, level_rule="fpn"), "level_rule"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_channels_that_do_not_divide():
    rois = make_rois(3)
    for op in (PositionSensitiveRoIAlign(SIZE), PositionSensitiveRoIPool(SIZE)):
        with pytest.raises(ValueError, match="features have 7 channels, expected a multiple of h \\* w = 6"):
            run(op, make_features(7), rois)


def test_extractor_refuses_bad_input():
    extractor = RoIExtractor(RoIAlign(7), STRIDES)
    with pytest.raises(ValueError, match="one map per stride"):
        extractor(make_features()[:3], make_rois(2))
    with pytest.raises(ValueError, match=r"rois must have shape \[R, 5\]"):
        extractor(make_features(), make_rois(2)[:, 1:])


def test_make_op_passes_what_a_method_asks_for():
    assert make_op(RoIAlign, (3, 4), 16, 2).output_size == (3, 4)
    assert make_op(partial(RoIAlign, output_size=5), 7).output_size == (5, 5)
    op = make_op(partial(DeformableRoIPool, predictor="per_level", predictor_width=4), 3, 16, 2)
    assert len(op.offset_predictor) == 2
    assert op.offset_predictor[0].offsets[0].in_features == 16 * 9
    with pytest.raises(TypeError, match="factory"):
        make_op(RoIAlign(7), 7)


@pytest.mark.parametrize("name", OPS)
def test_chunks_do_not_matter(name, monkeypatch):
    """Few cells at a time: the same result and gradients, and never many more entries than asked for."""
    op, rois = build(name), torch.cat([make_rois(12), make_awkward()])
    results, entries = [], []
    plain = bag.F.embedding_bag
    for limit in (bag.CHUNK, 2000):
        monkeypatch.setattr(bag, "CHUNK", limit)
        monkeypatch.setattr(align, "CHUNK", limit)
        monkeypatch.setattr(bag.F, "embedding_bag", lambda i, *a, **k: (entries.append(len(i)), plain(i, *a, **k))[1])
        features = [f.requires_grad_() for f in make_features(CHANNELS)]
        entries.clear()
        out = run(op, features, rois)
        out.square().sum().backward()
        results.append([out.detach()] + [f.grad for f in features])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    one_roi = 6 * 40 * 56  # at most the whole map in every bin
    assert 0 <= max(entries, default=0) <= 2000 + one_roi


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "roi").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_a_method_that_trains(path):
    op, channels = make_op(hydra.utils.instantiate(OmegaConf.load(path)), (2, 3), 24, len(STRIDES)), 24
    assert isinstance(op, RoIOp)
    features = [f.requires_grad_() for f in make_features(channels, dtype=torch.float32)]
    out = RoIExtractor(op, STRIDES)(features, make_rois(9, dtype=torch.float32)).features
    assert out.shape == (9, op.output_channels(channels), 2, 3)
    out.square().sum().backward()
    assert sum(f.grad.abs().sum() for f in features) > 0
    assert all(p.grad is not None for p in op.parameters())
