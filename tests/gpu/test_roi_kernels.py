"""The Triton kernels on a GPU: all cases of the interpreter, then real sizes, determinism, graphs, compilation."""

from __future__ import annotations

import pytest
import torch
import torchvision

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from detector.roi import DeformableRoIPool, RoIAlign, assign_levels
from detector.roi.base import choose_path, use_path
from detector.roi.triton_align import roi_align_fused
from tests.roi.triton_cases import *  # noqa: F403

pytestmark = pytest.mark.cuda
PYRAMID = (4, 8, 16, 32)


def pyramid(dtype=torch.float32, channels=256, size=(800, 1088), images=2):
    """The maps P2 to P5, channels_last."""
    return [
        torch.randn(images, channels, size[0] // s, size[1] // s, device="cuda")
        .to(dtype, memory_format=torch.channels_last)
        .requires_grad_()
        for s in PYRAMID
    ]


def proposals(count, size=(800, 1088), images=2):
    """RoIs of 16 to 800 pixels, uniform in the logarithm, and their levels."""
    side = torch.exp(torch.rand(count, 2, device="cuda") * 3.9 + 2.8)
    corner = torch.rand(count, 2, device="cuda") * torch.tensor(size[::-1], device="cuda") - side / 2
    image = torch.randint(0, images, (count, 1), device="cuda")
    rois = torch.cat([image, corner, corner + side], 1)
    return rois, assign_levels(rois[:, 1:], PYRAMID)


def by_torchvision(features, rois, levels, size, sampling_ratio):
    out = features[0].new_zeros(len(rois), features[0].shape[1], size, size)
    for level, (feature, stride) in enumerate(zip(features, PYRAMID)):
        rows = (levels == level).nonzero()[:, 0]
        pooled = torchvision.ops.roi_align(
            feature, rois[rows].to(feature.dtype), size, 1 / stride, sampling_ratio, True
        )
        out = out.index_copy(0, rows, pooled)
    return out


@pytest.mark.parametrize("size, sampling_ratio", [(7, 2), (14, 2), (7, 0)])
def test_a_pyramid_gives_what_torchvision_gives(size, sampling_ratio):
    features = pyramid()
    rois, levels = proposals(1000)
    out = roi_align_fused(features, rois, levels, PYRAMID, (size, size), sampling_ratio)
    expected = by_torchvision(features, rois, levels, size, sampling_ratio)
    # positions of hundreds of cells are rounded to 1e-5 of one, each path in its own way
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-4)
    assert ((out - expected).abs() > 5e-5).float().mean() < 1e-4
    grad = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(o, features, grad) for o in (out, expected))
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-4)  # hundreds of float32 terms in a cell


def test_bfloat16_is_as_near_to_float32_as_its_inputs():
    features = pyramid(torch.bfloat16)
    rois, levels = proposals(300)
    out = roi_align_fused(features, rois, levels, PYRAMID, (7, 7))
    exact = roi_align_fused([f.float() for f in features], rois, levels, PYRAMID, (7, 7))
    torch.testing.assert_close(out.float(), exact, rtol=2**-7, atol=1e-3)


def test_deterministic_gradients_repeat_to_the_bit(deterministic):
    features = pyramid(channels=64)
    rois, levels = proposals(2000)
    offsets = (torch.randn(2000, 2, 7, 7, device="cuda")).requires_grad_()
    out = roi_align_fused(features, rois, levels, PYRAMID, (7, 7), offsets=offsets)
    grad = torch.randn_like(out)
    first = torch.autograd.grad(out, [*features, offsets], grad, retain_graph=True)
    for _ in range(5):
        again = torch.autograd.grad(out, [*features, offsets], grad, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def loss_of(features, rois, levels, offsets):
    plain = roi_align_fused(features, rois, levels, PYRAMID, (7, 7))
    moved = roi_align_fused(features, rois, levels, PYRAMID, (7, 7), offsets=offsets)
    return (plain * moved).mean()


def test_the_host_never_waits_for_the_device():
    features = pyramid(channels=32)
    rois, levels = proposals(100)
    offsets = torch.randn(100, 2, 7, 7, device="cuda", requires_grad=True)
    loss_of(features, rois, levels, offsets).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(features, rois, levels, offsets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_forward_and_backward_on_new_input():
    features = pyramid(channels=32)
    rois, levels = proposals(200)
    offsets = torch.randn(200, 2, 7, 7, device="cuda", requires_grad=True)
    inputs = [*features, offsets]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss_of(features, rois, levels, offsets), inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(features, rois, levels, offsets)
        grads = torch.autograd.grad(loss, inputs)
    new_rois, new_levels = proposals(200)
    rois.copy_(new_rois)
    levels.copy_(new_levels)
    graph.replay()
    expected = loss_of(features, rois, levels, offsets)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_torch_compile_traces_it_in_one_graph():
    features = pyramid(channels=32)
    rois, levels = proposals(64)
    offsets = torch.randn(64, 2, 7, 7, device="cuda", requires_grad=True)
    compiled = torch.compile(loss_of, fullgraph=True)
    ours, theirs = (f(features, rois, levels, offsets) for f in (compiled, loss_of))
    torch.testing.assert_close(ours, theirs)
    inputs = [*features, offsets]
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_methods_take_this_path_and_agree_with_the_bag():
    features = pyramid(channels=16, size=(256, 320))
    rois, levels = proposals(60, size=(256, 320))
    assert choose_path(features[0]) == "triton"
    assert choose_path(features[0].double()) == "bag"
    align = RoIAlign(7)
    deformable = DeformableRoIPool(7, 16, modulated=True).cuda()
    for parameter in deformable.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for op in (align, deformable):
        out = op(features, rois, levels, PYRAMID).features
        with use_path("bag"):
            expected = op(features, rois, levels, PYRAMID).features
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(out)
        inputs = [*features, *op.parameters()]
        for ours, theirs in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
            largest = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * max(largest, 1))
