"""Muon against torch's for matrices, AdamW for vectors, and against the singular value decomposition."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from detector.engine.muon import Muon, channels_last, orthogonal

LR = 0.01


def stepped(optimizer: torch.optim.Optimizer, gradients: list[list[Tensor]]) -> list[Tensor]:
    """The parameters after a step with each of the gradients."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for each in gradients:
        for parameter, gradient in zip(parameters, each, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(*shapes: tuple[int, ...], steps: int = 4) -> list[list[Tensor]]:
    return [[p.detach() for p in parameters(*shapes, seed=1 + step)] for step in range(steps)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), st.floats(-4, 4))
def test_singular_vectors_stay_and_values_become_about_one(rows, columns, seed, magnitude):
    matrix = parameters((rows, columns), seed=seed)[0].detach().double()
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s.clamp(min=0.01 * s.max())  # whose square float32 still tells from rounding
    matrix = 10**magnitude * (u * s) @ vt
    found = orthogonal([matrix.float()])[0].double()
    values = u.mT @ found @ vt.mT
    assert found.shape == matrix.shape
    assert values.diagonal().min() > 0.6 and values.diagonal().max() < 1.25
    torch.testing.assert_close(values, values.diagonal().diag(), atol=2e-3, rtol=0)


def test_many_at_once_are_as_each_alone():
    shapes = [(4, 9), (9, 4), (4, 5), (7, 7), (1, 3)]
    matrices = [p.detach() for p in parameters(*shapes)]
    for together, matrix in zip(orthogonal(matrices), matrices, strict=True):
        torch.testing.assert_close(together, orthogonal([matrix])[0])


def test_matrices_as_torch_has_them():
    shapes = [(24, 40), (40, 24), (16, 16)]
    given = {"lr": LR, "momentum": 0.9, "weight_decay": 0.1}
    ours = stepped(Muon(parameters(*shapes), **given), gradients(*shapes))
    theirs = torch.optim.Muon(parameters(*shapes), **given, adjust_lr_fn="match_rms_adamw")
    for found, right, start in zip(ours, stepped(theirs, gradients(*shapes)), parameters(*shapes), strict=True):
        # torch rounds to bfloat16 between its products
        assert (found - right).norm() < 0.02 * (right - start).norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_are_matrices_of_their_rows(layout):
    shape = (6, 5, 3, 3)
    kernels = [nn.Parameter(p.detach().to(memory_format=layout)) for p in parameters(shape)]
    each = [[g[0].to(memory_format=layout)] for g in gradients(shape)]
    found = stepped(Muon(kernels, lr=LR), each)[0]
    flat = Muon([nn.Parameter(parameters(shape)[0].detach().flatten(1))], lr=LR)
    right = stepped(flat, [[g[0].flatten(1)] for g in gradients(shape)])[0]
    torch.testing.assert_close(found.flatten(1), right)
    assert kernels[0].is_contiguous(memory_format=layout)


def test_vectors_are_adamws():
    shapes = [(5,), (7,)]
    given = {"lr": LR, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "fused": True}
    mixed = Muon(parameters(*shapes, (4, 4)), **given)
    found = stepped(mixed, [[*each, torch.ones(4, 4)] for each in gradients(*shapes)])[:2]
    right = stepped(torch.optim.AdamW(parameters(*shapes), **given), gradients(*shapes))
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_elements_move_a_fifth_of_the_rate():
    start = parameters((48, 96))[0].detach()
    moved = stepped(Muon([nn.Parameter(start.clone())], lr=LR, weight_decay=0), gradients((48, 96), steps=1))[0] - start
    assert moved.square().mean().sqrt() == pytest.approx(0.2 * LR, rel=0.15)


def test_length_of_the_gradient_has_no_part():
    shape = (8, 12)
    short = [[1e-4 * g for g in each] for each in gradients(shape)]
    found, right = (stepped(Muon(parameters(shape), lr=LR), each)[0] for each in (short, gradients(shape)))
    torch.testing.assert_close(found, right, atol=1e-6, rtol=0)


def test_without_gradient_nothing_moves_and_zeros_only_decay():
    weights = parameters((3, 4), (3, 4), (4,))
    optimizer = Muon(weights, lr=LR, weight_decay=0.5)
    weights[1].grad = torch.zeros(3, 4)
    optimizer.step()
    start = parameters((3, 4), (3, 4), (4,))
    assert torch.equal(weights[0], start[0]) and torch.equal(weights[2], start[2])
    torch.testing.assert_close(weights[1], start[1] * (1 - LR * 0.5))


def test_gradients_stay_and_the_closure_is_heard():
    weights = parameters((3, 4), (3,))

    def closure() -> Tensor:
        loss = sum(w.square().sum() for w in weights)
        loss.backward()
        return loss

    before = sum(w.detach().square().sum() for w in weights)
    assert torch.equal(Muon(weights, lr=LR).step(closure), before)
    assert torch.equal(weights[0].grad, 2 * parameters((3, 4))[0])


def test_continues_where_it_was():
    shapes = [(6, 5, 3, 3), (6, 6), (6,)]
    all_of_it = gradients(*shapes, steps=6)
    right = stepped(Muon(parameters(*shapes), lr=LR), all_of_it)
    first = Muon(parameters(*shapes), lr=LR)
    halfway = stepped(first, all_of_it[:3])
    second = Muon([nn.Parameter(p) for p in halfway], lr=0.5, momentum=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(stepped(second, all_of_it[3:]), right, strict=True))


def test_products_are_exact_whatever_the_program_chose():
    matrix = parameters((64, 256))[0].detach()
    right = orthogonal([matrix])[0]
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(orthogonal([matrix])[0], right)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_views_of_kernels():
    assert channels_last(torch.zeros(6, 5, 3, 2)).shape == (6, 3, 2, 5)
    assert channels_last(torch.zeros(6, 5)).shape == (6, 5)


@pytest.mark.parametrize(
    ("given", "message"), [({"momentum": 1.0}, "momentum = 1.0: must be in"), ({"lr": -1.0}, "learning rate")]
)
def test_impossible_settings(given, message):
    with pytest.raises(ValueError, match=message):
        Muon(parameters((2, 2)), **given)
