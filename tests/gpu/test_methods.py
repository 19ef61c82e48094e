"""Every RoI method of configs/roi on a GPU gives what it gives on the CPU, gradients included."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from detector.roi import make_op
from tests.roi.common import STRIDES, levels_of, make_awkward, make_features, make_rois

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda
CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "roi").glob("*.yaml"))
CHANNELS = 8 * 3 * 3  # for the position-sensitive methods of 3 x 3 bins and for attention's heads


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_gpu_and_cpu_agree(config):
    torch.manual_seed(0)
    op = make_op(hydra.utils.instantiate(OmegaConf.load(config)), output_size=3, channels=CHANNELS)
    for parameter in op.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    rois = torch.cat([make_rois(40, dtype=torch.float32), make_awkward(torch.float32)])
    # Far positions differ by roundings of their own size, as the paths add them up in another order.
    rois = rois[~(rois[:, 1:].abs() > 1e4).any(1)]
    results = {}
    for device in ("cpu", "cuda"):
        features = [
            f.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
            for f in make_features(CHANNELS, dtype=torch.float32)
        ]
        op.to(device)
        at = rois.to(device)
        out = op(features, at, levels_of(at), STRIDES).features
        inputs = [*features, *op.parameters()]
        weight = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
        grads = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
        results[device] = [out.detach(), *(g for g in grads if g is not None)]
    assert len(results["cpu"]) == len(results["cuda"])
    for cpu, cuda in zip(results["cpu"], results["cuda"]):
        assert cpu.isfinite().all()
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-3, atol=1e-4 * max(cpu.abs().max().item(), 1))
