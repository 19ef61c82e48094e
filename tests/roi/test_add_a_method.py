"""A RoI method from the outside: the guide's, to the letter, and one defined here."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from detector.config import build, compose
from detector.roi import RoIFeatures, RoIOp
from detector.roi.bag import pool_cells
from detector.roi.geometry import Axis, bilinear, locate
from tests.roi.common import STRIDES, levels_of, make_features, make_rois
from tests.tiny import OVERRIDES, random_batch, tiny_model

GUIDE = Path(__file__).parents[2] / "docs" / "add_a_roi_method.md"


class CentreRoIPool(RoIOp):
    """The value at the centre of each bin, times a learned number per channel."""

    def __init__(self, output_size, channels: int):
        super().__init__(output_size)
        self.scale = torch.nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, features, rois, levels, strides):
        regions = locate(features, rois, levels, strides)
        axes = []
        for low, size, bins in ((1, regions.heights, self.output_size[0]), (0, regions.widths, self.output_size[1])):
            start, end = regions.boxes[:, low, None], regions.boxes[:, low + 2, None]
            position = start + (torch.arange(bins) + 0.5) / bins * (end - start) - 0.5
            axes.append(bilinear(position, size[:, None]))
        y = Axis(*(t[:, :, None, None] for t in axes[0]))
        x = Axis(*(t[:, None, :, None] for t in axes[1]))
        return RoIFeatures(pool_cells(features, regions, y, x) * self.scale)


def train(model, steps: int = 8) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    totals = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = sum(model(*random_batch()).values())
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
        totals.append(total.item())
    return totals


def test_a_method_defined_in_a_test_trains():
    model = tiny_model(roi=CentreRoIPool)
    scale = model.box_head.extractor.op.scale
    before = scale.detach().clone()
    totals = train(model)
    assert totals[-1] < 0.8 * totals[0]
    assert not torch.equal(scale, before)
    assert model.mask_head.extractor.op is not model.box_head.extractor.op


@pytest.fixture
def guide(tmp_path, monkeypatch):
    """The guide's method as the module it names, and a folder with the guide's yaml."""
    code = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    yaml = re.search(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    (tmp_path / "roi").mkdir()
    (tmp_path / "roi" / "gaussian.yaml").write_text(yaml)
    (tmp_path / "gaussian.py").write_text(code)
    spec = importlib.util.spec_from_file_location("detector.roi.gaussian", tmp_path / "gaussian.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "detector.roi.gaussian", module)
    return module, tmp_path


def test_the_guides_method_pools(guide):
    """On a constant map it gives that constant, on a ramp the value at the bins' centres; its gradients are right."""
    op = guide[0].GaussianRoIPool((2, 3)).double()
    rois = make_rois(6, extent=100)
    rois[:, 1:] = rois[:, 1:].clamp(24, 120)
    inside = (rois[:, 3:] - rois[:, 1:3] > 1).all(1)
    rois = rois[inside]
    features = make_features()
    out = op([torch.full_like(f, 3) for f in features], rois, levels_of(rois), STRIDES).features
    torch.testing.assert_close(out, torch.full_like(out, 3))
    ramp = torch.arange(56, dtype=torch.float64).expand(2, 1, 40, 56) + 0.5
    values = op([ramp], rois, torch.zeros(len(rois), dtype=torch.int64), [4]).features[:, 0, 0]
    x1, x2 = rois[:, 1, None] / 4, rois[:, 3, None] / 4
    torch.testing.assert_close(values, x1 + (torch.arange(3) + 0.5) / 3 * (x2 - x1))
    small = [f[:, :, :9, :9].clone().requires_grad_() for f in features]
    assert torch.autograd.gradcheck(lambda *f: op(f, rois, levels_of(rois), STRIDES).features, small, fast_mode=True)


def test_the_guides_yaml_trains_in_every_head(guide):
    options = [
        *OVERRIDES,
        "roi=gaussian",
        f"hydra.searchpath=[file://{guide[1]}]",
        "model.box_head.roi.sigma=0.3",
    ]
    torch.manual_seed(0)
    model = build(compose("train", options).model, "model", num_classes=3)
    ops = [head.extractor.op for head in (model.box_head, model.mask_head)]
    assert all(isinstance(op, guide[0].GaussianRoIPool) for op in ops)
    assert [op.sigma for op in ops] == [0.3, 0.25]
    totals = train(model)
    assert totals[-1] < 0.8 * totals[0]
