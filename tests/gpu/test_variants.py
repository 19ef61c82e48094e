"""Every model, backbone and neck of configs/ on a GPU: the losses of the CPU, and in bf16 a step and detections."""

from __future__ import annotations

import pytest
import torch

from detector.ops.layers import to_preferred_layout
from detector.structures import to_device
from tests.test_variants import ALL, assert_learns, detections, half_empty_input, untrained

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("group, name", ALL)
def test_a_variant_computes_what_it_does_on_the_cpu(group, name, monkeypatch):
    model = untrained(group, name, monkeypatch)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    batch, targets = half_empty_input()
    found = {}
    for device in ("cpu", "cuda"):
        model = to_preferred_layout(model.to(device), torch.device(device)).train()
        model.load_state_dict(state)  # running statistics too
        losses = model(to_device(batch, device), to_device(targets, device))
        found[device] = {key: loss.item() for key, loss in losses.items()}
    # another rounding can change which RoIs are drawn, and the mask loss of a few is a mean of a few
    assert found["cuda"] == pytest.approx(found["cpu"], rel=3e-2, abs=1e-4)

    batch, targets = to_device(batch, "cuda"), to_device(targets, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert_learns(model, model(batch, targets))
        results = detections(model, batch)
    assert results.valid.any(dim=1).all() and results.boxes.isfinite().all()
