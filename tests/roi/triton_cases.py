"""What the Triton kernels must compute, checked against plain formulas in float64.

Not collected by itself: test_triton.py runs this file on the CPU under Triton's interpreter, tests/gpu on a GPU.
"""

from __future__ import annotations

import math
from pathlib import Path

import hydra
import pytest
import torch
import torchvision
from omegaconf import OmegaConf

from detector.roi import make_op
from detector.roi.base import use_path
from detector.roi.triton_align import roi_align_fused
from detector.roi.triton_bag import max_bag_cuda, weighted_bag_cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # a few units in the last place
STRIDES = (4, 8, 16)
CONFIGS = Path(__file__).parents[2] / "configs" / "roi"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_(grad)


def maps(channels=6, dtype=torch.float32, images=2):
    """Three levels of odd sizes, channels_last."""
    sizes = [(11, 14), (6, 7), (3, 4)]
    return [
        torch.randn(images, channels, h, w, device=DEVICE).to(dtype, memory_format=torch.channels_last).requires_grad_()
        for h, w in sizes
    ]


def boxes(*rows):
    return torch.tensor([[float(v) for v in row] for row in rows], device=DEVICE)


# Small RoIs: the interpreter takes a millisecond for each cell that a program walks over.
ROIS = boxes((0, 5, 3, 14, 16), (1, 30.5, 8, 44, 17), (1, 2, 2, 31, 35), (0, -9, 10, 20, 60))
LEVELS = torch.tensor([0, 0, 1, 2], device=DEVICE)
ODD_ROIS = boxes(
    (0, 10, 10, 10, 10), (1, 30, 25, 12, 6), (0, -40, -40, -30, -30), (1, 100, 100, 140, 130), (0, -50, -70, 300, 200)
)  # without extent, reversed, outside on either side, larger than the image


def close(actual, expected, dtype=torch.float32, slack=1):
    """Within a few roundings of the largest value; NaN is never close."""
    largest = expected.abs().max().item() if expected.numel() else 0
    tolerance = slack * TOLERANCE[dtype] * max(1.0, largest)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def plain_align(features, rois, levels, size, sampling_ratio, aligned, offsets=None, modulation=None, gamma=0.1):
    """RoI Align as its equation: every point weighs the whole map with the bilinear kernel. float64, differentiable."""
    h, w = size
    result = []
    for r, (roi, level) in enumerate(zip(rois.double().tolist(), levels.tolist())):
        image = features[level].double()[int(roi[0])]
        shift = 0.5 if aligned else 0.0
        x1, y1, x2, y2 = (v / STRIDES[level] - shift for v in roi[1:])
        extent_x, extent_y = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        points_y = sampling_ratio or max(math.ceil(extent_y / h), 0)
        points_x = sampling_ratio or max(math.ceil(extent_x / w), 0)
        for i in range(h):
            for j in range(w):
                value = image.new_zeros(image.shape[0])
                for n in range(points_y):
                    for m in range(points_x):
                        y = torch.tensor(y1 + (i + (n + 0.5) / points_y) * extent_y / h, dtype=torch.float64)
                        x = torch.tensor(x1 + (j + (m + 0.5) / points_x) * extent_x / w, dtype=torch.float64)
                        factor = 1.0
                        per_point = offsets is not None and offsets.shape[2] != h
                        at = (i * points_y + n, j * points_x + m) if per_point else (i, j)
                        if offsets is not None:
                            x = x.to(DEVICE) + gamma * extent_x * offsets.double()[(r, 0, *at)]
                            y = y.to(DEVICE) + gamma * extent_y * offsets.double()[(r, 1, *at)]
                        if modulation is not None:
                            factor = modulation.double()[(r, *at)]
                        value = value + factor * interpolate(image, y.to(DEVICE), x.to(DEVICE))
                result.append(value / max(points_y * points_x, 1))
    return torch.stack(result).view(len(rois), h, w, -1).permute(0, 3, 1, 2)


def interpolate(image, y, x):
    """Bilinear value [C] of [C, H, W] at a point: sum over cells of max(0, 1 - |cell - y|) max(0, 1 - |cell - x|)."""
    weights = []
    for position, cells in ((y, image.shape[1]), (x, image.shape[2])):
        inside = -1 <= position <= cells
        position = position.clamp(0, cells - 1)
        distance = torch.arange(cells, device=image.device) - position
        weights.append((1 - distance.abs()).clamp(min=0) * inside)
    return torch.einsum("chw,h,w->c", image, *weights)


def gradients(output, inputs, grad):
    inputs = [t for t in inputs if t is not None]
    return torch.autograd.grad(output, inputs, grad.to(output.dtype), materialize_grads=True)


def close_gradients(out, expected, inputs, slack=1):
    """The gradients of both with respect to all inputs, for one random gradient of the output."""
    grad = torch.randn(out.shape, device=DEVICE).to(out.dtype)
    for ours, theirs in zip(gradients(out, inputs, grad), gradients(expected, inputs, grad)):
        close(ours, theirs.to(ours.dtype), ours.dtype, slack)


# --- the bag ---


def plain_bag(table, indices, weights):
    inside = (indices >= 0) & (indices < len(table))
    rows = table.double()[indices.long().clamp(0, len(table) - 1)]
    return ((weights.double() * inside)[..., None] * rows).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bag_is_the_weighted_sum_of_rows_with_gradients_to_both(dtype):
    table, weights = random(11, 20, dtype=dtype), random(19, 5)
    indices = torch.randint(-1, 13, (19, 5), device=DEVICE)  # some outside of the table
    out, expected = weighted_bag_cuda(table, indices, weights), plain_bag(table, indices, weights)
    assert out.dtype == dtype
    close(out, expected, dtype)
    close_gradients(out, expected, (table, weights))


def test_bag_takes_any_number_of_channels_and_int32_indices():
    table, weights = random(7, 261), random(3, 2)
    indices = torch.randint(0, 7, (3, 2), device=DEVICE, dtype=torch.int32)
    out, expected = weighted_bag_cuda(table, indices, weights), plain_bag(table, indices, weights)
    close(out, expected)
    close_gradients(out, expected, (table, weights))


@pytest.mark.parametrize("bags, entries", [(0, 4), (3, 0)])
def test_bag_of_nothing_is_zero_and_has_zero_gradients(bags, entries):
    table, weights = random(5, 8), random(bags, entries)
    indices = torch.zeros(bags, entries, dtype=torch.int64, device=DEVICE)
    out = weighted_bag_cuda(table, indices, weights)
    assert out.shape == (bags, 8) and not out.any()
    table_grad, weights_grad = gradients(out, (table, weights), torch.ones_like(out))
    assert table_grad.shape == table.shape and not table_grad.any()
    assert weights_grad.shape == weights.shape


def test_deterministic_bag_sums_in_fixed_point(deterministic):
    table, weights = random(4, 20), random(16, 5)
    indices = torch.randint(0, 4, (16, 5), device=DEVICE)  # twenty terms per cell
    out, expected = weighted_bag_cuda(table, indices, weights), plain_bag(table, indices, weights)
    grad = torch.randn(out.shape, device=DEVICE)
    ours, theirs = gradients(out, (table,), grad)[0], gradients(expected, (table,), grad)[0]
    close(ours, theirs)
    for row in torch.randperm(16).split(8):  # any order of the bags gives the same bits
        order = torch.cat([row.to(DEVICE), torch.tensor([i for i in range(16) if i not in row], device=DEVICE)])
        again = gradients(weighted_bag_cuda(table, indices[order], weights[order]), (table,), grad[order])[0]
        assert torch.equal(again, ours)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_deterministic_gradient_shows_that_it_is_not_finite(deterministic, bad):
    table = random(4, 8)
    out = weighted_bag_cuda(table, torch.zeros(3, 2, dtype=torch.int64, device=DEVICE), torch.ones(3, 2, device=DEVICE))
    grad = torch.ones_like(out)
    grad[1, 3] = bad
    assert not gradients(out, (table,), grad)[0].isfinite().any()


def test_deterministic_gradient_of_zeros_is_zero(deterministic):
    table = random(4, 8)
    out = weighted_bag_cuda(table, torch.zeros(3, 2, dtype=torch.int64, device=DEVICE), torch.ones(3, 2, device=DEVICE))
    assert not gradients(out, (table,), torch.zeros_like(out))[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_bag_sends_the_gradient_to_the_first_winner(dtype):
    table = random(9, 5, dtype=dtype)
    indices = torch.randint(0, 9, (6, 4), device=DEVICE)
    indices[0] = -1  # a bag without entries
    indices[1, 1] = indices[1, 0]
    out, winners = max_bag_cuda(table, indices)
    values = table.double()[indices.clamp(min=0)].masked_fill((indices < 0)[..., None], -torch.inf)
    assert torch.equal(out[1:].double(), values.amax(1)[1:]) and not out[0].any()
    assert (winners[0] == -1).all()
    assert torch.equal(table.gather(0, winners[1:]), out[1:])
    (grad,) = gradients(out, (table,), torch.ones_like(out))
    expected = torch.zeros(9, 5, device=DEVICE).scatter_add_(0, winners[1:], torch.ones(5, 5, device=DEVICE))
    assert torch.equal(grad.float(), expected)


# --- RoI Align ---


@pytest.mark.parametrize(
    "sampling_ratio, aligned, size",
    [(1, True, (2, 3)), (2, True, (2, 2)), (2, False, (2, 2)), (0, True, (2, 2)), (0, False, (2, 2))],
)
def test_align_is_its_equation_and_torchvision(sampling_ratio, aligned, size):
    features = maps()
    out = roi_align_fused(features, ROIS, LEVELS, STRIDES, size, sampling_ratio, aligned)
    expected = plain_align(features, ROIS, LEVELS, size, sampling_ratio, aligned)
    close(out, expected)
    close_gradients(out, expected, features)
    for level, feature in enumerate(features):
        rows = level == LEVELS
        close(out[rows], align_of_torchvision(feature, ROIS[rows], level, size, sampling_ratio, aligned))


def align_of_torchvision(feature, rois, level, size, sampling_ratio, aligned):
    return torchvision.ops.roi_align(feature, rois, size, 1 / STRIDES[level], sampling_ratio, aligned)


@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_odd_rois_give_what_torchvision_gives(sampling_ratio):
    features = maps(images=2)
    levels = torch.ones(len(ODD_ROIS), dtype=torch.int64, device=DEVICE)
    out = roi_align_fused(features, ODD_ROIS, levels, STRIDES, (2, 2), sampling_ratio, True)
    expected = align_of_torchvision(features[1], ODD_ROIS, 1, (2, 2), sampling_ratio, True)
    close(out, expected)
    close_gradients(out, expected, features[1:2])


def test_rois_that_are_not_finite_pool_zero():
    nan, inf = float("nan"), float("inf")
    rois = boxes((0, nan, 1, 9, 9), (0, 1, 1, inf, 9), (1, -inf, 1, 9, inf), (nan, nan, nan, nan, nan))
    features = maps()
    for sampling_ratio, aligned in ((2, True), (0, True), (2, False)):
        levels = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        out = torch.ops.detector.roi_align(
            features, rois, levels, None, None, [0.25, 0.125, 0.0625], [2, 2], sampling_ratio, aligned, 0.1
        )
        assert not out.any()
        assert not any(g.any() for g in gradients(out, features, torch.ones_like(out)))
    offsets, modulation, rois, levels = random(3, 2, 2, 2), random(3, 2, 2), rois[:3], levels[:3]
    out = roi_align_fused(features, rois, levels, STRIDES, (2, 2), offsets=offsets, modulation=modulation)
    assert not any(g.any() for g in gradients(out, [*features, offsets, modulation], torch.ones_like(out)))


@pytest.mark.parametrize("bins", [3, 7])
def test_bins_of_whole_cells_take_as_many_points(bins):
    """Adaptive sampling: a quotient off by a rounding would take one more."""
    features = maps(channels=2)
    rois = boxes(*((i % 2, 0, 0, 4 * bins * k, 4 * bins * k) for i, k in enumerate((1, 2, 3, 5, 6))))
    levels = torch.zeros(len(rois), dtype=torch.int64, device=DEVICE)
    out = roi_align_fused(features, rois, levels, STRIDES, (bins, bins), 0)
    close(out, plain_align(features, rois, levels, (bins, bins), 0, True))


def test_batch_and_level_out_of_range_read_the_nearest():
    features = maps()
    good = boxes((0, 5, 3, 21, 22), (1, 5, 3, 21, 22), (1, 5, 3, 21, 22))
    bad = boxes((-7, 5, 3, 21, 22), (2, 5, 3, 21, 22), (1e30, 5, 3, 21, 22))
    scales = [1 / s for s in STRIDES]
    settings = None, None, scales, [2, 2], 2, True, 0.1
    good_levels = torch.tensor([0, 2, 2], device=DEVICE)
    bad_levels = torch.tensor([-(2**40), 3, 2**40], device=DEVICE)
    out = torch.ops.detector.roi_align(features, good, good_levels, *settings)
    assert torch.equal(torch.ops.detector.roi_align(features, bad, bad_levels, *settings), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    features = maps(dtype=dtype)
    out = roi_align_fused(features, ROIS, LEVELS, STRIDES, (2, 2))
    assert out.dtype == dtype and all(f.dtype == dtype for f in features)
    expected = plain_align(features, ROIS, LEVELS, (2, 2), 2, True)
    close(out, expected, dtype)
    close_gradients(out, expected, features)


def test_no_rois_give_an_empty_result_and_zero_gradients():
    features = maps()
    out = roi_align_fused(features, ROIS[:0], LEVELS[:0], STRIDES, (7, 7))
    assert out.shape == (0, 6, 7, 7)
    for grad, feature in zip(gradients(out, features, out), features):
        assert grad.shape == feature.shape and not grad.any()


def test_a_level_without_rois_gets_zero_gradient():
    features = maps()
    out = roi_align_fused(features, ROIS[:2], LEVELS[:2], STRIDES, (2, 2))
    first, *others = gradients(out, features, torch.ones_like(out))
    assert first.any() and not any(g.any() for g in others)


def test_any_layout_and_one_level_of_one_cell():
    features = [torch.randn(2, 3, 10, 16, device=DEVICE)[:, :, :, 1:15], torch.randn(2, 3, 1, 1, device=DEVICE)]
    features = [f.requires_grad_() for f in features]
    levels = torch.tensor([0, 0, 1, 1], device=DEVICE)
    out = roi_align_fused(features, ROIS, levels, STRIDES[:2], (1, 2))
    expected = plain_align(features, ROIS, levels, (1, 2), 2, True)
    close(out, expected)
    close_gradients(out, expected, features)


def test_more_channels_than_a_tile_and_frozen_levels():
    features = [f.detach() for f in maps(channels=258)]
    features[1].requires_grad_()
    out = roi_align_fused(features, ROIS[2:3], LEVELS[2:3], STRIDES, (1, 1))
    expected = plain_align(features, ROIS[2:3], LEVELS[2:3], (1, 1), 2, True)
    close(out, expected)
    close_gradients(out, expected, features[1:2])


def test_deterministic_align_sums_in_fixed_point(deterministic):
    features = maps()
    rois, levels = ROIS[[0, 0, 2]], LEVELS[[0, 0, 2]]
    out = roi_align_fused(features, rois, levels, STRIDES, (2, 2))
    expected = plain_align(features, rois, levels, (2, 2), 2, True)
    close_gradients(out, expected, features)


# --- deformable RoI pooling ---


@pytest.mark.parametrize(
    "sampling_ratio, granularity, modulated",
    [(2, "bin", False), (2, "point", True), (0, "bin", True)],
)
def test_deformable_is_its_equation_with_gradients_to_offsets_and_modulation(sampling_ratio, granularity, modulated):
    features, rois, levels = maps(), ROIS[:3], LEVELS[:3]
    points = (2, 4) if granularity == "point" else (1, 2)
    offsets = random(3, 2, *points)
    modulation = torch.rand(3, *points, device=DEVICE).requires_grad_() if modulated else None
    inputs = [*features, offsets, modulation]
    settings = (1, 2), sampling_ratio, True, offsets, modulation, 0.3
    out = roi_align_fused(features, rois, levels, STRIDES, *settings)
    expected = plain_align(features, rois, levels, *settings)
    close(out, expected)
    close_gradients(out, expected, inputs, slack=4)  # an offset is as many roundings off as the RoI is cells wide


def test_zero_offsets_are_align_to_the_bit():
    features = maps()
    zero = torch.zeros(4, 2, 1, 2, device=DEVICE)
    plain = roi_align_fused(features, ROIS, LEVELS, STRIDES, (1, 2))
    assert torch.equal(roi_align_fused(features, ROIS, LEVELS, STRIDES, (1, 2), offsets=zero), plain)


def test_modulation_alone_scales_the_bins():
    features, inputs = maps(), (ROIS[:2], LEVELS[:2], STRIDES, (2, 2))
    modulation = torch.rand(2, 2, 2, device=DEVICE).requires_grad_()
    plain = roi_align_fused(features, *inputs).detach()
    out = roi_align_fused(features, *inputs, modulation=modulation)
    close(out, modulation[:, None] * plain)
    close(gradients(out, (modulation,), torch.ones_like(out))[0], plain.sum(1))


def test_no_rois_with_offsets():
    features, offsets, modulation = maps(), random(0, 2, 2, 2), random(0, 2, 2)
    out = roi_align_fused(features, ROIS[:0], LEVELS[:0], STRIDES, (2, 2), offsets=offsets, modulation=modulation)
    grads = gradients(out, [*features, offsets, modulation], out)
    assert [g.shape for g in grads] == [t.shape for t in [*features, offsets, modulation]]


# --- the methods on this path, one of each kind; tests/gpu has them all ---


@pytest.mark.parametrize(
    "name", ["align_max", "modulated_deformable", "pool", "position_sensitive_align", "precise", "warp"]
)
def test_methods_give_what_the_bag_gives(name):
    features = maps(channels=4)
    factory = hydra.utils.instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    op = make_op(factory, output_size=2, channels=4, levels=3).to(DEVICE)
    for parameter in op.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    inputs = [*features, *op.parameters()]
    rois = torch.cat([ROIS[1:2], ODD_ROIS[:3]])
    levels = torch.tensor([0, 1, 2, 2], device=DEVICE)
    grad, results = torch.randn(4, op.output_channels(4), 2, 2, device=DEVICE), {}
    for path in ("bag", "triton"):
        with use_path(path):  # around the backward pass too, which recomputes some
            out = op(features, rois, levels, STRIDES).features
            results[path] = [out, *gradients(out, inputs, grad)]
    for bag, ours in zip(results["bag"], results["triton"]):
        close(ours, bag, slack=32)


# --- registration with PyTorch, and what is refused ---


def test_the_ops_are_registered_as_pytorch_wants_them():
    check = torch.library.opcheck
    table, weights, indices = random(5, 4), random(3, 2), torch.randint(0, 5, (3, 2), device=DEVICE)
    check(torch.ops.detector.weighted_bag, (table, indices, weights))
    check(torch.ops.detector.max_bag, (table, indices))
    features, scales = maps(channels=2), [1 / s for s in STRIDES]
    sampling = ROIS[:1], LEVELS[:1], random(1, 2, 1, 2), random(1, 1, 2), scales, [1, 2], 1, True, 0.1
    check(torch.ops.detector.roi_align, (features, *sampling))


def test_align_compiles_in_one_graph_for_any_number_of_rois():
    def loss(features, rois, levels, offsets):
        return roi_align_fused(features, rois, levels, STRIDES, (1, 2), 1, offsets=offsets).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    features = maps(channels=2)
    for rows in (slice(0, 1), slice(1, 3)):
        offsets = random(len(ROIS[rows]), 2, 1, 2)
        ours, theirs = (f(features, ROIS[rows], LEVELS[rows], offsets) for f in (compiled, loss))
        close(ours, theirs)
        close_gradients(ours, theirs, [*features, offsets])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"offsets": torch.zeros(4, 2, 3, 3)}, ValueError, r"offsets must be \[4, 2, 2, 2\].*got \[4, 2, 3, 3\]"),
        ({"modulation": torch.zeros(4, 2)}, ValueError, r"modulation must be \[4, 2, 2\]"),
        ({"features": [torch.zeros(2, 3, 4, 4, dtype=torch.float64)] * 3}, TypeError, "features must be float32"),
        ({"rois": torch.zeros(4, 4)}, ValueError, r"rois must have shape \[R, 5\]"),
        ({"strides": (4, 8)}, ValueError, "strides must be 3"),
    ],
)
def test_align_refuses_what_it_cannot_read(change, error, message):
    move = lambda v: v.to(DEVICE) if isinstance(v, torch.Tensor) else v  # noqa: E731
    change = {k: [move(f) for f in v] if isinstance(v, list) else move(v) for k, v in change.items()}
    call = {"features": maps(), "rois": ROIS, "levels": LEVELS, "strides": STRIDES, "output_size": (2, 2)} | change
    with pytest.raises(error, match=message):
        roi_align_fused(**call)


@pytest.mark.parametrize(
    "table, indices, weights, message",
    [
        (torch.zeros(4), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2), r"table must be \[cells, C\]"),
        (torch.zeros(4, 2).double(), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2), "table must be"),
        (torch.zeros(4, 2), torch.zeros(2, 2), torch.zeros(2, 2), r"indices must be \[B, K\] int32 or int64"),
        (torch.zeros(4, 2), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3), r"weights must be \[2, 2\]"),
    ],
)
def test_bag_refuses_what_it_cannot_read(table, indices, weights, message):
    with pytest.raises(ValueError, match=message):
        weighted_bag_cuda(table, indices, weights)
