"""Methods with layers of their own against their oracles, with random weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from detector.roi import (
    AdaptivePooling,
    BorderAlign,
    ContextRoIPool,
    DeformableAttentionPool,
    PositionSensitiveRoIAlign,
    PositionSensitiveRoIPool,
    RoIAlign,
    RoIExtractor,
    RotatedRoIAlign,
    SemanticRoIAlign,
    SoftLevels,
    assign_levels,
    reference,
)
from detector.roi.geometry import Regions
from detector.roi.light_head import LargeSeparableConv
from tests.roi.common import STRIDES, levels_of, make_awkward, make_features, make_rois
from tests.roi.test_contract import CHANNELS, build

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SIZE = (2, 3)
ROIS = {"ordinary": make_rois(8), "awkward": make_awkward()}


def run(op, features, rois):
    with torch.no_grad():
        return op(features, rois, levels_of(rois), STRIDES).features


def of_levels(features, rois):
    """L x [R, C, h, w]: RoI Align of every RoI on every level."""
    every = range(len(features))
    return [
        reference.over_rois(reference.roi_align, features, rois, torch.full((len(rois),), level), STRIDES, size=SIZE)
        for level in every
    ]


@pytest.mark.parametrize("kind", ROIS)
@pytest.mark.parametrize("fusion", ["max", "sum"])
def test_adaptive_pooling(fusion, kind):
    op, features, rois = build(partial(AdaptivePooling, fusion=fusion)), make_features(CHANNELS), ROIS[kind]
    weights, biases = zip(*((layer.weight.detach(), layer.bias.detach()) for layer in op.layers))
    rows = zip(*of_levels(features, rois))
    expected = [reference.adaptive_pooling(levels, weights, biases, fusion) for levels in rows]
    torch.testing.assert_close(run(op, features, rois), torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("kind", ROIS)
def test_soft_levels(kind):
    op, features, rois = build(SoftLevels), make_features(CHANNELS), ROIS[kind]
    layers = [(layer.weight.detach(), layer.bias.detach()) for layer in (op.selector[0], op.selector[2])]
    expected = [reference.soft_levels(levels, *layers) for levels in zip(*of_levels(features, rois))]
    torch.testing.assert_close(run(op, features, rois), torch.stack(expected), **CLOSE)


def test_soft_levels_start_as_half_the_sum():
    features, rois = make_features(CHANNELS), make_rois(4)
    op = SoftLevels(SIZE, CHANNELS).double()
    torch.testing.assert_close(run(op, features, rois), sum(of_levels(features, rois)) / 2, **CLOSE)


@pytest.mark.parametrize("kind", ROIS)
def test_context(kind):
    op, features, rois = build(partial(ContextRoIPool, scale=1.7)), make_features(CHANNELS), ROIS[kind]
    settings = {"around": op.around.weight.detach()[..., 0, 0], "image": op.image.weight.detach(), "scale": 1.7}
    expected = reference.over_rois(
        reference.context, features, rois, levels_of(rois), STRIDES, size=SIZE, sampling_ratio=2, **settings
    )
    torch.testing.assert_close(run(op, features, rois), expected, **CLOSE)


def test_context_starts_as_roi_align():
    features, rois = make_features(CHANNELS), make_rois(9)
    op = ContextRoIPool(SIZE, CHANNELS).double()
    assert torch.equal(run(op, features, rois), run(RoIAlign(SIZE), features, rois))


@pytest.mark.parametrize("kind", ROIS)
def test_border(kind):
    op, features, rois = build(partial(BorderAlign, points=5, border_channels=3)), make_features(CHANNELS), ROIS[kind]
    maps, mix = [op.maps(f).detach().relu() for f in features], op.mix.weight.detach()
    levels = levels_of(rois)
    own = reference.over_rois(reference.roi_align, features, rois, levels, STRIDES, size=SIZE)
    for r, (image, *box) in enumerate(rois.tolist()):
        sides = maps[levels[r]][int(image)].unflatten(0, (3, 4)).transpose(0, 1)
        own[r] += (mix @ reference.border_align(sides, box, STRIDES[levels[r]], 5).flatten())[:, None, None]
    torch.testing.assert_close(run(op, features, rois), own, **CLOSE)


@pytest.mark.parametrize("kind", ROIS)
def test_attention(kind):
    op, features, rois = build("attention"), make_features(CHANNELS), ROIS[kind]
    rois = rois[~(rois[:, 3].abs() >= 1e19)]  # lies beyond what locate reads; the equation knows no such bound
    linear = partial(torch.nn.functional.linear)
    own = reference.over_rois(reference.roi_align, features, rois, levels_of(rois), STRIDES, size=SIZE)
    expected = []
    for (image, *box), queries in zip(rois.tolist(), own.flatten(2).mT):
        offsets = linear(queries, op.offsets.weight, op.offsets.bias).view(6, 3, 4, 2, 2).detach()
        logits = linear(queries, op.weights.weight, op.weights.bias).view(6, 3, 8).detach()
        weights = (logits.exp() / logits.exp().sum(2, keepdim=True)).view(6, 3, 4, 2)
        values = [op.value(f).detach()[int(image)].unflatten(0, (4, 3)).transpose(0, 1) for f in features]
        mixed = reference.deformable_attention(values, box, STRIDES, offsets, weights, SIZE)  # [M, D, h, w]
        mixed = mixed.transpose(0, 1).flatten(0, 1)
        expected.append(torch.einsum("dc,chw->dhw", op.project.weight.detach(), mixed) + op.project.bias[:, None, None])
    torch.testing.assert_close(run(op, features, rois), own + torch.stack(expected).detach(), **CLOSE)


@pytest.mark.parametrize("kind", ROIS)
def test_semantic(kind):
    op, features, rois = build("semantic"), make_features(CHANNELS), ROIS[kind]
    rois = rois[~(rois[:, 3].abs() >= 1e19) & rois.isfinite().all(1)]

    def embed(area):
        return (op.area.weight @ area + op.area.bias).detach()

    def attend(value, mean):
        hidden = op.local.weight @ value + op.local.bias + op.whole.weight @ mean
        return (op.attention.weight @ hidden.clamp(min=0) + op.attention.bias).detach()

    settings = {"embed": embed, "attend": attend, "size": SIZE, "samples": 10}
    expected = reference.over_rois(reference.semantic_roi_align, features, rois, levels_of(rois), STRIDES, **settings)
    torch.testing.assert_close(run(op, features, rois), expected, **CLOSE)


@pytest.mark.parametrize("box, grid", [((0, 0, 30, 30), (8, 8)), ((0, 0, 40, 10), (4, 16)), ((0, 0, 1, 900), (64, 1))])
def test_the_sampler_follows_the_aspect_ratio(box, grid):
    cells, there = SemanticRoIAlign(7, 4).grid(Regions(torch.tensor([box], dtype=torch.float32), *[None] * 4))
    assert reference.semantic_grid(box, 64) == grid
    assert int(there.sum()) == grid[0] * grid[1]
    sides = (cells[0, :, 2:] - cells[0, :, :2])[there[0]]
    torch.testing.assert_close(sides, torch.tensor([[1 / grid[1], 1 / grid[0]]]).expand_as(sides))
    assert cells[0][there[0]].min() == 0 and cells[0][there[0]].max() == 1


def rotated_rois(count=12):
    upright, generator = make_rois(count), torch.Generator().manual_seed(5)
    centres, sides = (upright[:, 1:3] + upright[:, 3:]) / 2, upright[:, 3:] - upright[:, 1:3]
    return torch.cat([upright[:, :1], centres, sides, torch.rand(count, 1, generator=generator).double() * 9 - 4], 1)


class TestRotated:
    @pytest.mark.parametrize("ratio", [1, 2, 3])
    def test_equals_oracle(self, ratio):
        features, rois = make_features(), rotated_rois()
        extractor = RoIExtractor(RotatedRoIAlign(SIZE, sampling_ratio=ratio), STRIDES, canonical_size=14)
        levels = assign_levels(torch.cat([0 * rois[:, 3:5], rois[:, 3:5]], 1), STRIDES, canonical_size=14)
        settings = {"size": SIZE, "sampling_ratio": ratio}
        expected = reference.over_rois(reference.roi_align_rotated, features, rois, levels, STRIDES, **settings)
        assert levels.unique().numel() > 2
        torch.testing.assert_close(extractor(features, rois).features, expected, **CLOSE)

    @pytest.mark.parametrize("kind", ROIS)
    def test_without_rotation_it_is_roi_align(self, kind):
        features, rois = make_features(CHANNELS), ROIS[kind]
        expected = run(RoIAlign(SIZE), features, rois)
        torch.testing.assert_close(run(RotatedRoIAlign(SIZE, CHANNELS).double(), features, rois), expected, **CLOSE)

    def test_a_quarter_turn_turns_the_output(self):
        """x turns towards y: the row of bins becomes a column, from top to bottom."""
        feature = torch.arange(64, dtype=torch.float64).view(1, 1, 8, 8)
        op, level = RotatedRoIAlign(4, sampling_ratio=1), torch.zeros(1, dtype=torch.int64)
        roi = torch.tensor([[0, 4.0, 4.0, 4.0, 4.0, 0.0]], dtype=torch.float64)
        assert op([feature], roi, level, [1]).features[0, 0].tolist() == feature[0, 0, 2:6, 2:6].tolist()
        roi[0, 5] = torch.pi / 2
        turned = op([feature], roi, level, [1]).features[0, 0]
        torch.testing.assert_close(turned, feature[0, 0, 2:6, 2:6].T.flip(0), **CLOSE)
        assert turned[0].tolist() == pytest.approx([21, 29, 37, 45])

    def test_learner(self):
        """t = (1/4, -1/2, log 2, log 1/2, 1/8) on a box of 40 x 20 at (30, 50)."""
        op = RotatedRoIAlign(SIZE, CHANNELS).double()
        op.learner.bias.data = torch.tensor([0.25, -0.5, 0, 0, 0.125], dtype=torch.float64)
        op.learner.bias.data[2:4] = torch.tensor([2.0, 0.5]).log()
        rois = torch.tensor([[1, 10.0, 40.0, 50.0, 60.0]], dtype=torch.float64)
        learned = op.learn(make_features(CHANNELS), rois, levels_of(rois), STRIDES)
        assert learned[0].tolist() == pytest.approx([1, 40, 40, 80, 10, torch.pi / 4])

    def test_gradients_of_rotated_rois(self):
        features, rois = make_features(CHANNELS, images=1, size=(13, 15)), rotated_rois(5)
        op, levels = RotatedRoIAlign(SIZE), torch.tensor([0, 1, 1, 0, 2])

        def function(boxes):
            return op(features, torch.cat([0 * boxes[:, :1], boxes], 1), levels, STRIDES).features

        boxes = (rois[:, 1:] / rois.new_tensor([4, 4, 4, 4, 1])).requires_grad_()
        assert torch.autograd.gradcheck(function, (boxes,), fast_mode=True)
        function(boxes).square().sum().backward()
        assert (boxes.grad.abs().amax(0) > 1e-3).all()

    def test_awkward(self):
        features = [f.requires_grad_() for f in make_features(CHANNELS)]
        values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e20, 0.0, -7.0], dtype=torch.float64)
        rois = rotated_rois(30)
        for column in range(1, 6):
            rois[(column - 1) * 6 : column * 6, column] = values
        rois[:, 0] = rois[:, 0].clamp(0, 1)
        rois.requires_grad_()
        out = RotatedRoIAlign(SIZE)(features, rois, torch.zeros(30, dtype=torch.int64), STRIDES).features
        assert out.isfinite().all() and not out[:4].any()
        out.square().sum().backward()
        assert rois.grad.isfinite().all() and all(f.grad.isfinite().all() for f in features[:1])

    def test_who_takes_angles(self):
        features, rois = make_features(CHANNELS), rotated_rois(3)
        with pytest.raises(ValueError, match=r"rois must have shape \[R, 5\] = \(batch_index, x1, y1, x2, y2\), got"):
            RoIExtractor(RoIAlign(SIZE), STRIDES)(features, rois)
        with pytest.raises(
            ValueError, match=r"or \[R, 6\] = \(batch_index, cx, cy, width, height, angle\), got \[3, 4\]"
        ):
            RoIExtractor(RotatedRoIAlign(SIZE), STRIDES)(features, rois[:, :4])
        with pytest.raises(ValueError, match=r"rois must be \[R, 6\], with an angle, .*, got \[3, 5\]"):
            RoIExtractor(RotatedRoIAlign(SIZE), STRIDES)(features, rois[:, :5])


class TestPositionSensitiveLayer:
    @pytest.mark.parametrize("groups", [None, (1, 2), (2, 2), (4, 3)])
    @pytest.mark.parametrize(
        "make, method, settings",
        [
            (PositionSensitiveRoIAlign, reference.roi_align, {}),
            (PositionSensitiveRoIPool, reference.average_pool, {"quantization": "rfcn"}),
        ],
    )
    def test_equals_oracle(self, make, method, settings, groups):
        op, features, rois = (
            build(partial(make, out_channels=2, group_size=groups)),
            make_features(CHANNELS),
            make_rois(8),
        )
        assert op.output_channels(CHANNELS) == 2
        maps = [op.maps(f).detach() for f in features]
        oracle = partial(reference.position_sensitive, method=method, size=SIZE, groups=groups, **settings)
        expected = reference.over_rois(oracle, maps, rois, levels_of(rois), STRIDES)
        torch.testing.assert_close(run(op, features, rois), expected, **CLOSE)

    def test_large_separable_convolution(self):
        layer, x = LargeSeparableConv(3, 2, 4, 5).double(), make_features()[2][0]
        (down, along), (first, second) = layer.branches
        one = torch.nn.functional.conv2d(x[None], down.weight, down.bias, padding=(2, 0))
        one = torch.nn.functional.conv2d(one, along.weight, along.bias, padding=(0, 2))
        other = torch.nn.functional.conv2d(x[None], first.weight, first.bias, padding=(0, 2))
        other = torch.nn.functional.conv2d(other, second.weight, second.bias, padding=(2, 0))
        torch.testing.assert_close(layer(x[None]), one + other, **CLOSE)

    def test_the_message_says_what_to_do(self):
        features, rois = make_features(CHANNELS + 1), make_rois(3)
        with pytest.raises(ValueError, match="out_channels=10 makes 60 of them"):
            run(PositionSensitiveRoIAlign(SIZE), features, rois)
        op = PositionSensitiveRoIAlign(SIZE, channels=CHANNELS + 1, out_channels=10).double()
        assert op.maps.out_channels == 60 and run(op, features, rois).shape == (3, 10, *SIZE)


class TestByHand:
    """A RoI of one bin that covers cell 1 of maps of one channel."""

    rois = torch.tensor([[0, 1.0, 1.0, 2.0, 2.0]], dtype=torch.float64)
    level = torch.zeros(1, dtype=torch.int64)

    def pool(self, op, *maps):
        maps = [torch.tensor(m, dtype=torch.float64)[None, None] for m in maps]
        with torch.no_grad():
            return op.double()(maps, self.rois, self.level, [1] * len(maps)).features.item()

    def grid(self, value):
        """3 x 3 cells with `value` in the middle of zeros, without a slope there: its neighbours have it too."""
        return [[value] * 3] * 3

    def test_adaptive_pooling(self):
        """Levels with 3 and 5; layers 2 x + 1 and -x + 9: the larger of 7 and 4, and their sum."""
        for fusion, expected in (("max", 7), ("sum", 11)):
            op = AdaptivePooling(1, 1, levels=2, fusion=fusion, kernel=1)
            for layer, weight, bias in zip(op.layers, (2.0, -1.0), (1.0, 9.0)):
                torch.nn.init.constant_(layer.weight, weight)
                torch.nn.init.constant_(layer.bias, bias)
            assert self.pool(op, self.grid(3.0), self.grid(5.0)) == pytest.approx(expected)

    def test_soft_levels(self):
        """Levels with 3 and 5; logits 0 and log 3: 1/2 of the one and 3/4 of the other."""
        op = SoftLevels(1, 1, levels=2)
        op.selector[-1].bias.data[1] = torch.tensor(3.0).log()
        assert self.pool(op, self.grid(3.0), self.grid(5.0)) == pytest.approx(0.5 * 3 + 0.75 * 5)

    def test_context(self):
        """The RoI reads 4, the one of 3 x 3 cells around it with one point the same 4, the map's mean is 20 / 9."""
        op = ContextRoIPool(1, 1, scale=3.0, op=partial(RoIAlign, sampling_ratio=1))
        torch.nn.init.constant_(op.around.weight, 0.5)
        torch.nn.init.constant_(op.image.weight, 2.0)
        value = self.pool(op, [[2.0, 2.0, 2.0], [2.0, 4.0, 2.0], [2.0, 2.0, 2.0]])
        assert value == pytest.approx(4 + 0.5 * 4 + 2 * 20 / 9)

    def test_border(self):
        """Sides of cell 1 of a map f(x, y) = 3 x + 5 y, 2 points each: the maxima lie at (0.5, 1), (1, 0.5), ..."""
        op = BorderAlign(1, 1, points=2, border_channels=1)
        torch.nn.init.constant_(op.maps.weight, 1.0)
        torch.nn.init.zeros_(op.maps.bias)
        op.mix.weight.data = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
        value = self.pool(op, [[3.0 * x + 5.0 * y for x in range(3)] for y in range(3)])
        assert value == pytest.approx(8 + (1.5 + 5) + 10 * (3 + 2.5) + 100 * (4.5 + 5) + 1000 * (3 + 7.5))

    def test_attention(self):
        """One head and point on one level: all weight on it, half a bin to the right, where f = 3 x + 5 y is 9.5."""
        op = DeformableAttentionPool(1, 1, levels=1, heads=1, points=1)
        assert op.offsets.bias.tolist() == [1, 0]
        torch.nn.init.constant_(op.value.weight, 1.0)
        torch.nn.init.constant_(op.project.weight, 2.0)
        value = self.pool(op, [[3.0 * x + 5.0 * y for x in range(3)] for y in range(3)])
        assert value == pytest.approx(8 + 2 * (3 * 1.5 + 5))

    def test_semantic(self):
        """Two points, at x = 0.75 and 1.25, of a map f = 8 x; logits log 3 times as large on the second."""
        op = SemanticRoIAlign(1, 1, samples=4, width=1)
        for layer in (op.area, op.whole, op.attention, op.local):
            torch.nn.init.zeros_(layer.weight)
        for layer in (op.area, op.attention, op.local):
            torch.nn.init.zeros_(layer.bias)
        torch.nn.init.constant_(op.local.weight, 1.0)
        torch.nn.init.constant_(op.attention.weight, torch.tensor(3.0).log().item() / 4)  # f differs by 4
        value = self.pool(op, [[8.0 * x for x in range(3)]] * 3)  # a square: 2 x 2 points
        assert value == pytest.approx(0.25 * 6 + 0.75 * 10)


def test_what_does_not_fit_is_refused():
    features, rois = make_features(CHANNELS), make_rois(2)
    for make in (AdaptivePooling, SoftLevels):
        with pytest.raises(
            ValueError, match=r"features must hold 2 maps, as the method was built with levels=2, got 4"
        ):
            run(make(SIZE, CHANNELS, levels=2).double(), features, rois)
    with pytest.raises(ValueError, match="fusion must be one of 'max', 'sum', got 'mean'"):
        AdaptivePooling(SIZE, CHANNELS, fusion="mean")
    with pytest.raises(ValueError, match="scale = 1: must be above 1"):
        ContextRoIPool(SIZE, CHANNELS, scale=1)
