"""Maps and RoIs for the tests of the RoI methods, ordinary and awkward ones."""

from __future__ import annotations

import torch
from torch import Tensor

from detector.roi.extractor import assign_levels

STRIDES = (4, 8, 16, 32)


def make_features(channels: int = 3, images: int = 2, size: tuple[int, int] = (40, 56), dtype=torch.float64) -> list:
    """Four maps of a pyramid over an image of 4 * size pixels; odd sizes are rounded up from level to level."""
    generator = torch.Generator().manual_seed(channels * 1000 + images)
    h, w = size
    features = []
    for _ in STRIDES:
        features.append(torch.randn(images, channels, h, w, generator=generator, dtype=torch.float64).to(dtype))
        h, w = (h + 1) // 2, (w + 1) // 2
    return features


def make_rois(count: int = 20, images: int = 2, seed: int = 0, extent: float = 160, dtype=torch.float64) -> Tensor:
    """[count, 5] RoIs of all sizes in an image of `extent` pixels; some reach beyond it."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    image = (uniform[:, 4] * images).floor().clamp(max=images - 1)
    side = torch.exp(uniform[:, 2:4] * 4.2 + 1)  # 3 to 180 px
    corner = uniform[:, :2] * extent - 10
    return torch.cat([image[:, None], corner, corner + side], 1).to(dtype)


def make_awkward(dtype=torch.float64) -> Tensor:
    """RoIs that a careless method gets wrong, by name in the comments."""
    nan, inf = float("nan"), float("inf")
    boxes = [
        [10, 10, 10, 10],  # a point
        [20, 10, 20, 50],  # no width
        [50.3, 60.1, 30.2, 20.7],  # reversed on both axes
        [50.3, 20.7, 30.2, 60.1],  # reversed on x
        [-300.5, -200, -100, -50.2],  # wholly left of and above the map
        [1000, 1000, 1200, 1300.5],  # wholly right of and below it
        [-20.3, -30.7, 30.2, 25.1],  # partly outside, top left
        [190.2, 130.1, 260.4, 200.9],  # partly outside, bottom right
        [-500.1, -400.2, 700.3, 600.4],  # larger than the image
        [0, 0, 224, 160],  # exactly the image
        [-4, -4, 0, 0],  # touches the corner
        [0.1, 0.1, 0.2, 0.2],  # far below a cell
        [nan, 10, 50, 60],
        [10, 20, nan, 60],
        [nan, nan, nan, nan],
        [-inf, 10, inf, 60],
        [10, 10, inf, inf],
        [-1e5, 10.3, 1e5, 60],  # absurdly wide
        [1e20, 1e20, 2e20, 2e20],  # far beyond what int32 holds
        [3.7, 5.9, 8.1, 150.2],  # very narrow
    ]
    boxes = torch.tensor(boxes, dtype=torch.float64)
    image = (torch.arange(len(boxes)) % 2)[:, None].double()
    return torch.cat([image, boxes], 1).to(dtype)


def levels_of(rois: Tensor) -> Tensor:
    return assign_levels(rois[:, 1:], STRIDES)
