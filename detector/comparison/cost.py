"""What a model costs: parameters, floating-point operations, time and memory of inference, with the RoI part apart."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detector.roi import RoIExtractor
from detector.structures import Batch, to_device


@torch.inference_mode()
def measure_cost(model: nn.Module, batches: Sequence[Batch], repeat: int = 2) -> dict[str, Any]:
    """Cost of inference, image by image.

    batches: of one image each. Returns parameters and roi_parameters (of the RoI methods themselves, such as offset
    predictors); gflops and roi_gflops, means over the images (multiplications and additions of convolutions, matrix
    products and weighted bags; comparisons of max pooling are none); ms and roi_ms per image, medians of `repeat`
    rounds; memory_mb, the peak on a GPU, else None.
    """
    device = next(model.parameters()).device
    batches = [to_device(batch, device) for batch in batches]
    extractors = {name: m for name, m in model.named_modules() if isinstance(m, RoIExtractor)}
    counts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "roi_parameters": sum(p.numel() for m in extractors.values() for p in m.parameters()),
    }
    with FlopCounterMode(display=False, custom_mapping=BAGS) as counter:
        for batch in batches:
            model(batch)
    per_module, owner = counter.get_flop_counts(), type(model).__name__
    inside = sum(sum(per_module.get(f"{owner}.{name}", {}).values()) for name in extractors)
    counts |= {"gflops": counter.get_total_flops() / len(batches) / 1e9, "roi_gflops": inside / len(batches) / 1e9}

    clock = Clock(device)
    handles = [m.register_forward_pre_hook(clock.start) for m in extractors.values()]
    handles += [m.register_forward_hook(clock.stop) for m in extractors.values()]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    total, inside = [], []
    try:
        for batch in [batches[0], *batches * repeat]:  # the first one warms up
            clock.seconds, began = 0.0, clock.now()
            model(batch)
            total.append(clock.now() - began)
            inside.append(clock.seconds)
    finally:
        for handle in handles:
            handle.remove()
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    medians = {"ms": 1e3 * float(np.median(total[1:])), "roi_ms": 1e3 * float(np.median(inside[1:]))}
    return counts | medians | {"memory_mb": memory}


class Clock:
    """Seconds between `start` and `stop`, which are forward hooks; waits for the GPU."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.began = device, 0.0, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self, *_) -> None:
        self.began = self.now()

    def stop(self, *_) -> None:
        self.seconds += self.now() - self.began


def _bag(weight_shape, indices_shape, *_, **__) -> int:
    return 2 * int(np.prod(indices_shape)) * weight_shape[-1]


BAGS = {torch.ops.aten._embedding_bag: _bag, torch.ops.aten._embedding_bag_forward_only: _bag}
