"""The primitive: weighted sums and maxima of rows of a table."""

from __future__ import annotations

import pytest
import torch

from detector.roi import max_bag, weighted_bag
from detector.roi.bag import as_table, runs


def example(dtype=torch.float64, index_dtype=torch.int64):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(20, 5, generator=generator, dtype=torch.float64).to(dtype)
    indices = torch.randint(0, 20, (7, 4), generator=generator).to(index_dtype)
    return table, indices, torch.randn(7, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weighted_sum(dtype, index_dtype):
    table, indices, weights = example(dtype, index_dtype)
    out = weighted_bag(table, indices, weights)
    expected = (weights[..., None] * table.double()[indices.long()]).sum(1)
    assert out.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_of_table_and_weights():
    table, indices, weights = example()
    table.requires_grad_(), weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda t, w: weighted_bag(t, indices, w), (table, weights))
    with torch.no_grad():
        assert not weighted_bag(table, indices, weights).requires_grad


def test_bags_of_nothing():
    table, indices, weights = (t.requires_grad_() if t.is_floating_point() else t for t in example())
    assert torch.equal(weighted_bag(table, indices[:, :0], weights[:, :0]), torch.zeros(7, 5).double())
    none = weighted_bag(table, indices[:0], weights[:0])
    assert none.shape == (0, 5)
    none.sum().backward()
    assert torch.equal(table.grad, torch.zeros(20, 5).double())
    assert max_bag(table, indices[:0], indices[:0] > 0).shape == (0, 5)


def test_maximum():
    table, indices, weights = example()
    table = (2 * table).round().requires_grad_()  # with ties
    valid = weights > -0.3
    valid[2] = False
    out = max_bag(table, indices, valid)
    cells = table[indices].masked_fill(~valid[..., None], -torch.inf)
    expected = cells.amax(1).masked_fill(~valid.any(1, keepdim=True), 0)
    assert torch.equal(out, expected)
    grad = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out.backward(grad)
    by_hand = torch.zeros(20, 5).double()
    for b in range(7):
        for c in range(5):
            won = [k for k in range(4) if valid[b, k] and table[indices[b, k], c] == out[b, c]]
            if won:
                by_hand[indices[b, won[0]], c] += grad[b, c]
    torch.testing.assert_close(table.grad, by_hand)


def test_a_channels_last_map_is_its_table():
    feature = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    table = as_table(feature)
    assert table.data_ptr() == feature.data_ptr()
    assert torch.equal(table[1 * 20 + 2 * 5 + 3], feature[1, :, 2, 3])
    assert torch.equal(as_table(feature.contiguous()), table)


def test_runs_hold_what_fits():
    costs = torch.tensor([3, 4, 2, 20, 1, 5, 5])
    parts = runs(costs, 9)
    assert [costs[part].tolist() for part in parts] == [[3, 4, 2], [20], [1, 5], [5]]
    assert runs(costs[:0], 9) == [slice(0, 0)]
    assert runs(costs, 100) == [slice(0, 7)]
