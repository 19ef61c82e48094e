"""Numbers worked out by hand, from the public functions."""

from __future__ import annotations

import pytest
import torch

from detector.roi import DeformableRoIPool, RoIAlign, RoIPool
from detector.roi.pool import bin_ranges

MAP_8 = torch.tensor(
    [
        [11, 19, 22, 48, 48, 68, 72, 86],
        [34, 48, 57, 51, 76, 71, 94, 104],
        [48, 54, 72, 70, 97, 102, 17, 13],
        [70, 82, 89, 103, 18, 14, 36, 34],
        [97, 109, 13, 25, 27, 36, 49, 56],
        [6, 21, 34, 44, 46, 60, 72, 72],
        [37, 31, 48, 70, 77, 81, 87, 105],
        [54, 54, 79, 83, 96, 101, 11, 26],
    ],
    dtype=torch.float32,
)
MAP_5 = torch.tensor(
    [[10, 30, 50, 70, 90], [25, 45, 65, 85, 5], [40, 60, 80, 0, 20], [55, 75, 95, 15, 35], [70, 90, 10, 30, 50]],
    dtype=torch.float64,
)
LEVEL = torch.zeros(1, dtype=torch.int64)


def pool(op, feature, box):
    """One RoI (x1, y1, x2, y2) from one map [H, W] in its own pixels."""
    roi = torch.tensor([[0, *box]], dtype=feature.dtype)
    return op([feature[None, None]], roi, LEVEL, [1]).features[0, 0]


def test_a_uniform_bins():
    x, y, width, height = 1.30, 0.80, 3.40, 2.60
    out = pool(RoIPool(2, "uniform"), MAP_8, (x, y, x + width, y + height))
    assert out.tolist() == [[19, 22], [48, 57]]
    edges = [
        bin_ranges(torch.tensor([a]), torch.tensor([b]), 1, torch.tensor([8]), "uniform")
        for a, b in ((x, x + width), (y, y + height))
    ]
    quantised = [(int(last) - int(first)) for first, last in edges]
    assert [int(first) for first, _ in edges] == [1, 0]
    assert quantised == [3, 3]
    area = width * height
    assert abs(quantised[0] * quantised[1] - area) / area == pytest.approx(0.018, abs=5e-4)


def test_b_floor_boundaries():
    corners = torch.tensor([[0.0, 3.0], [7.0, 8.0]])
    size = torch.tensor([8])
    first, last = bin_ranges(corners[0, :1], corners[1, :1], 2, size, "floor")
    assert (first.tolist(), last.tolist()) == ([[0, 3]], [[3, 7]])  # columns [0, 3) and [3, 7)
    first, last = bin_ranges(corners[0, 1:], corners[1, 1:], 2, size, "floor")
    assert (first.tolist(), last.tolist()) == ([[3, 5]], [[5, 8]])  # rows [3, 5) and [5, 8)
    expected = [[MAP_8[3:5, 0:3].max(), MAP_8[3:5, 3:7].max()], [MAP_8[5:8, 0:3].max(), MAP_8[5:8, 3:7].max()]]
    assert pool(RoIPool(2, "floor"), MAP_8, (0, 3, 7, 8)).tolist() == expected


def test_c_bilinear_interpolation():
    """One point in the middle of a bin around (2.30, 1.70), cell (2, 1) lying at (2, 1)."""
    value = pool(RoIAlign(1, sampling_ratio=1, aligned=False), MAP_5, (1.80, 1.20, 2.80, 2.20)).item()
    assert value == pytest.approx(0.21 * 65 + 0.09 * 85 + 0.49 * 80 + 0.21 * 0)
    assert value == pytest.approx(60.5)


def test_other_kernels():
    """The weights of the four cells around a point a quarter of a cell past one, and of the nearest, halfway."""
    ramp = torch.arange(9, dtype=torch.float64).mul(10).expand(9, 9)
    for kernel in ("bicubic", "lanczos"):  # at a cell it is the cell's value
        op = RoIAlign(1, sampling_ratio=1, kernel=kernel)
        assert pool(op, ramp, (4, 4, 5, 5)).item() == pytest.approx(40)
    cubic = [-0.0703125, 0.8671875, 0.2265625, -0.0234375]  # t = 1.25, 0.25, 0.75, 1.75
    step = torch.zeros(9, 9, dtype=torch.float64)
    for column, weight in zip((3, 4, 5, 6), cubic):
        step.zero_()[:, column] = 1
        op = RoIAlign(1, sampling_ratio=1, kernel="bicubic")
        assert pool(op, step, (4.25, 4, 5.25, 5)).item() == pytest.approx(weight)
    assert pool(RoIAlign(1, 1, kernel="bicubic"), ramp, (4.25, 4, 5.25, 5)).item() == pytest.approx(42.5)
    step.zero_()[:, 4] = 1  # halfway, Lanczos: 0.6079, -0.1351, 0.0243 on either side, over their sum 0.9943
    assert pool(RoIAlign(1, 1, kernel="lanczos"), step, (4.5, 4, 5.5, 5)).item() == pytest.approx(0.6114, abs=1e-4)


class TestD:
    """k x k points per bin at the far edge of each sub-cell, reduced by max; y points up, origin bottom left."""

    x, y, width, height, bins = 9.25, 10.0, 6.25, 4.53, 3
    box = (x, 16 - y, x + width, 16 - y + height)  # with y down, in a map of 16 rows

    def op(self, **settings):
        return RoIAlign(3, sampling_ratio=3, placement="edge", **settings)

    def points(self):
        """(x, y) of point (n, m) of bin (i, j), y up, cell centres at half-integers."""
        box = torch.tensor([self.box], dtype=torch.float64)
        n = torch.arange(3)
        x = self.op().grid(box[:, 0], box[:, 2], self.bins).at(n)
        y = self.op().grid(box[:, 1], box[:, 3], self.bins).at(n)
        return x[0] + 0.5, 16 - (y[0] + 0.5)

    @pytest.mark.parametrize(
        ("i", "j", "n", "m", "x", "y"),
        [(1, 1, 1, 1, 9.94, 9.50), (1, 1, 2, 1, 10.63, 9.50), (1, 1, 1, 2, 9.94, 8.99), (1, 1, 2, 2, 10.63, 8.99)]
        + [(2, 3, 2, 2, 12.72, 5.97)],
    )
    def test_points(self, i, j, n, m, x, y):
        columns, rows = self.points()
        assert columns[i - 1, n - 1].item() == pytest.approx(x, abs=0.01)
        assert rows[j - 1, m - 1].item() == pytest.approx(y, abs=0.01)

    def test_value_at_a_point(self):
        """(9.94, 9.5) lies on the row of Q11 = 0.1 and Q21 = 0.2, a cell above that of Q12 = 1 and Q22 = 0.7."""
        feature = torch.zeros(16, 16, dtype=torch.float64)
        row = 16 - 10  # y up 9.5 is the centre of row 6 from the top
        feature[row, 9:11] = torch.tensor([0.1, 0.2])
        feature[row + 1, 9:11] = torch.tensor([1, 0.7])
        x, y = 9.94, 16 - 9.5
        value = pool(RoIAlign(1, sampling_ratio=1), feature, (x - 1, y - 1, x + 1, y + 1)).item()
        assert value == pytest.approx(0.144, abs=5e-4)

    def test_maximum_of_the_points(self):
        """Four points with the values 0.14, 0.21, 0.51 and 0.43 at cell centres."""
        feature = torch.tensor([[0.14, 0.21], [0.51, 0.43]], dtype=torch.float64)
        assert pool(RoIAlign(1, reduction="max"), feature, (0, 0, 2, 2)).item() == pytest.approx(0.51)
        edge = RoIAlign(1, reduction="max", placement="edge")  # the far edges of [-1/2, 3/2)^2 are the same points
        assert pool(edge, feature, (-0.5, -0.5, 1.5, 1.5)).item() == pytest.approx(0.51)


class TestE:
    def test_zero_offsets_are_roi_align(self):
        torch.manual_seed(0)
        feature, box = torch.randn(16, 16), (2.3, 1.7, 11.9, 12.4)
        op = DeformableRoIPool(3, channels=1)
        roi = torch.tensor([[0, *box]])
        result = op([feature[None, None]], roi, LEVEL, [1])
        assert torch.equal(result.offsets, torch.zeros(1, 2, 3, 3))
        assert torch.equal(result.features[0, 0], pool(RoIAlign(3), feature, box))

    def test_offsets_move_by_gamma_times_the_rois_size(self):
        """On a ramp f = 3 x + 7 y the average moves by 3 gamma w dx + 7 gamma h dy."""
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        feature, roi = (3 * x + 7 * y)[None, None], torch.tensor([[0, 8.0, 10.0, 20.0, 16.0]])
        op = DeformableRoIPool(2, channels=1, gamma=0.1)
        offsets = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
        moved = op.pool([feature], roi, LEVEL, [1], offsets) - pool(RoIAlign(2), feature[0, 0], roi[0, 1:].tolist())
        expected = 3 * 0.1 * 12 * offsets[:, 0] + 7 * 0.1 * 6 * offsets[:, 1]
        torch.testing.assert_close(moved[:, 0], expected, rtol=1e-4, atol=1e-3)

    def test_count_of_offsets(self):
        op = DeformableRoIPool(3, channels=1, sampling_ratio=1, offset_granularity="point")
        offsets = op([torch.randn(1, 1, 9, 9)], torch.tensor([[0, 1.0, 1.0, 7.0, 7.0]]), LEVEL, [1]).offsets
        assert offsets.shape == (1, 2, 3, 3)
        assert offsets.numel() == 18
