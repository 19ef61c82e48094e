"""On a GPU the host must not wait for the device during a step, other than for NMS: every wait empties the queue of
work. Found without a GPU: operations whose result's shape, or a number for Python, depends on the data."""

from __future__ import annotations

import traceback

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detector.roi.base import RoIOp
from detector.structures import RoIFeatures
from tests.tiny import all_rows, random_batch, tiny_model

WAITS = {"nonzero", "masked_select", "_local_scalar_dense", "unique_dim", "_unique2", "unique_consecutive", "equal"}
WAITS |= {"is_nonzero", "bincount", "lift_fresh", "nms"}


class Waits(TorchDispatchMode):
    """Notes the innermost functions of the project that such an operation was called from."""

    def __init__(self):
        super().__init__()
        self.callers: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        waits = name in WAITS
        if name in ("index", "index_put", "index_put_"):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        if name == "repeat_interleave":
            waits = (kwargs or {}).get("output_size") is None
        if waits:
            frames = [frame for frame in traceback.extract_stack() if "/detector/" in frame.filename]
            self.callers.append(" > ".join([*(frame.name for frame in frames[-4:]), name]))
        return operation(*args, **(kwargs or {}))


class MeanOfMap(RoIOp):
    """Stands in for the RoI method, whose GPU kernels tests/gpu looks at."""

    def forward(self, features, rois, levels, strides):
        values = features[0].mean((2, 3))[rois[:, 0].long()]
        return RoIFeatures(values[:, :, None, None].expand(-1, -1, *self.output_size).contiguous())


def test_a_step_waits_for_nms_alone(monkeypatch):
    monkeypatch.setattr("detector.heads.box.flatten_valid", all_rows)
    model, inputs = tiny_model(roi=MeanOfMap).train(), random_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with Waits() as waits:
        sum(model(*inputs).values()).backward()
        optimizer.step()
    assert any(caller.endswith("> nms") for caller in waits.callers)
    assert not [caller for caller in waits.callers if "propose > " not in caller]


def test_waits_are_seen():
    layer = nn.Linear(2, 1)
    with Waits() as waits:
        x = torch.ones(3, 2)
        x[x.sum(1) > 0]
        float(layer(x).sum())
    assert [caller.split(" > ")[-1] for caller in waits.callers] == ["index", "_local_scalar_dense"]
