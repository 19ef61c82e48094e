"""The whole model on a GPU: the losses and gradients of the CPU, and a host that never waits."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch

from detector.roi import DeformableRoIPool, RoIAlign
from detector.structures import to_device
from tests.tiny import random_batch, tiny_model

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda
METHODS = {"align": RoIAlign, "deformable": DeformableRoIPool}


@pytest.mark.parametrize("roi", METHODS.values(), ids=METHODS)
def test_losses_and_gradients_are_the_cpus(roi):
    found = {}
    for device in ("cpu", "cuda"):
        model = tiny_model(roi=roi).to(device).train()
        losses = model(*(to_device(part, device) for part in random_batch()))
        sum(losses.values()).backward()
        grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        found[device] = {name: loss.item() for name, loss in losses.items()}, grads
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-3)
    for name, grad in found["cpu"][1].items():
        assert (found["cuda"][1][name] - grad).norm() <= 1e-2 * grad.norm() + 1e-6, name


@pytest.mark.parametrize("roi", METHODS.values(), ids=METHODS)
def test_the_host_never_waits(roi):
    model = tiny_model(roi=roi).cuda().train()
    inputs = [to_device(part, "cuda") for part in random_batch()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        sum(model(*inputs).values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # compiles kernels, makes the anchors
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [f"{wait.filename}:{wait.lineno}" for wait in waits if "synchroniz" in str(wait.message)]


@pytest.mark.parametrize("roi", METHODS.values(), ids=METHODS)
def test_half_precision_and_detection(roi):
    model = tiny_model(roi=roi, box_head={"score_threshold": 0.0}).cuda()
    inputs = [to_device(part, "cuda") for part in random_batch()]
    with torch.autocast("cuda", torch.bfloat16):
        losses = model.train()(*inputs)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        found = model.eval()(inputs[0])
    assert found.valid.any() and found.boxes.isfinite().all() and found.masks.isfinite().all()


def test_deterministic_mode_repeats_to_the_bit():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        grads = []
        for _ in range(2):
            model = tiny_model(roi=partial(RoIAlign, sampling_ratio=2)).cuda().train()
            sum(model(*(to_device(part, "cuda") for part in random_batch())).values()).backward()
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads))
