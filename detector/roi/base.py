"""The contract of a RoI method, features and RoIs in, one small map per RoI out; and which code computes it.

One function chooses the path; a context manager or an environment variable overrides it:
- "triton": kernels on the GPU, all levels in one launch (triton_align.py, triton_bag.py).
- "bag": the weighted bag of cells in pure PyTorch (bag.py): every device, every dtype, every gradient.
- "torchvision": torchvision's compiled op, one call per level; only for what it implements.
- "plain": operators that torch.export and ONNX know, with shapes that do not depend on the data (plain.py).

Dimensions: N images, L levels, R RoIs, C channels, h x w output bins.
"""

from __future__ import annotations

import inspect
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from detector.ops.kernels import triton_available
from detector.structures import RoIFeatures

PATHS = ("triton", "bag", "torchvision", "plain")
_forced: str | None = None


class RoIOp(nn.Module, ABC):
    """Base class of the RoI methods. A method sets `output_size` in its constructor and writes `forward`.

    Args:
        output_size: bins of the output, an int or (h, w).
    """

    takes_angles: bool = False  # whether rois may be [R, 6] = (batch_index, cx, cy, width, height, angle) too
    gamma: float = 1.0  # scale of the offsets that a method returns, if any: parts of the RoI's width and height

    def __init__(self, output_size: int | Sequence[int]):
        super().__init__()
        self.output_size = pair(output_size)

    def output_channels(self, channels: int) -> int:
        """Channels of the result for features with `channels` channels."""
        return channels

    @abstractmethod
    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        """Pool every RoI.

        Args:
            features: L maps [N, C, Hl, Wl], floating point, contiguous or channels_last (the fast layout).
            rois: [R, 5] = (batch_index, x1, y1, x2, y2) in image pixels, floating point. R may be 0.
            levels: [R] int64, the map that each RoI reads.
            strides: of the L maps in image pixels.
        Returns: RoIFeatures with `features` [R, C, h, w] in the dtype of the maps.
        Raises: TypeError, ValueError for input of other kinds or shapes, see `check_inputs`.
        """

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


def pair(size: int | Sequence[int], name: str = "output_size") -> tuple[int, int]:
    """(h, w) from an int or a sequence of two; ValueError unless both are positive ints."""
    values = (size, size) if isinstance(size, int) else tuple(size)
    if len(values) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        raise ValueError(f"{name} must be a positive int or two of them (h, w), got {size!r}")
    return values


def check_rois(rois: Tensor, angles: bool) -> None:
    """ValueError unless rois is [R, 5], or [R, 6] for a method that takes angles."""
    if rois.ndim != 2 or rois.shape[1] not in ((5, 6) if angles else (5,)):
        rotated = " or [R, 6] = (batch_index, cx, cy, width, height, angle)" if angles else ""
        raise ValueError(
            f"rois must have shape [R, 5] = (batch_index, x1, y1, x2, y2){rotated}, got {list(rois.shape)}"
        )


def check_inputs(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float], angles: bool = False
) -> None:
    """Refuse what no RoI method can read, naming the argument. angles: whether the method takes RoIs [R, 6].

    The ranges of batch indices and levels are checked on the CPU only: on a GPU the check would make the host wait for
    the device in every step. There the indices are clamped where they are used, so a wrong one reads the wrong map but
    never foreign memory.
    """
    if isinstance(features, Tensor) or len(features) == 0:  # type: ignore[unreachable]  # of callers without types
        raise TypeError("features must be a non-empty list of feature maps [N, C, H, W], one per level")
    first = features[0]
    for i, feature in enumerate(features):
        if feature.ndim != 4 or feature.shape[2] == 0 or feature.shape[3] == 0:
            raise ValueError(f"features[{i}] must have shape [N, C, H, W] with H, W >= 1, got {list(feature.shape)}")
        if not feature.is_floating_point():
            raise TypeError(f"features[{i}] must be floating point, got {feature.dtype}")
        if feature.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"features[{i}] has shape {list(feature.shape)}, but features[0] has N, C = {list(first.shape[:2])}"
            )
        if feature.dtype != first.dtype or feature.device != first.device:
            raise TypeError(
                f"features[{i}] is {feature.dtype} on {feature.device}, features[0] {first.dtype} on {first.device}"
            )
    if len(strides) != len(features) or any(stride <= 0 for stride in strides):
        raise ValueError(f"strides must be {len(features)} positive numbers, one per level, got {list(strides)}")
    check_rois(rois, angles)
    if len(rois) and len(first) == 0:
        raise ValueError(f"rois has {len(rois)} rows, but the features hold no image: {list(first.shape)}")
    if not rois.is_floating_point():
        raise TypeError(f"rois must be floating point, got {rois.dtype}")
    if levels.shape != rois.shape[:1]:
        raise ValueError(f"levels must have shape [{rois.shape[0]}] like rois, got {list(levels.shape)}")
    if levels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"levels must be int64 or int32, got {levels.dtype}")
    for name, tensor in (("rois", rois), ("levels", levels)):
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like the features, got {tensor.device}")
    if rois.is_cuda or len(rois) == 0 or torch.compiler.is_compiling():
        return
    images = rois[:, 0].detach()
    bad = ~((images >= 0) & (images < first.shape[0]) & (images == images.floor()))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"rois[{row}, 0] is batch index {float(images[row])}, expected 0..{first.shape[0] - 1}")
    if levels.min() < 0 or levels.max() >= len(features):
        raise ValueError(f"levels must lie in 0..{len(features) - 1}, got {int(levels.min())}..{int(levels.max())}")


def make_op(
    factory: Callable[..., RoIOp], output_size: int | Sequence[int] = 7, channels: int = 256, levels: int = 4
) -> RoIOp:
    """Build a method for a head.

    Args:
        factory: a RoIOp class or a partial of one, as configs/roi/*.yaml instantiate it. A setting the partial already
            carries wins over the ones here.
        output_size, channels, levels: what the head wants and feeds; `channels` and `levels` reach only the methods
            that ask for them (those with parameters of their own).
    """
    if isinstance(factory, RoIOp) or not callable(factory):
        raise TypeError(f"factory must be a RoIOp class or a partial (_partial_: true), got {type(factory).__name__}")
    given = {"output_size": output_size, "channels": channels, "levels": levels}
    fixed = factory.keywords if isinstance(factory, partial) else {}
    wanted = inspect.signature(factory).parameters
    # A method's own random weights neither change those of what is built after it, so that methods start equal, nor
    # repeat them.
    state = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(state.numpy().tobytes()))
        return factory(**{name: value for name, value in given.items() if name in wanted and name not in fixed})


# --------------------------------------------------------------------------------------------------- the choice of path


def choose_path(features: Tensor, paths: Sequence[str] = PATHS) -> str:
    """The path that computes a RoI method over `features` (of any level), out of the `paths` that the method has.

    On the GPU "triton" where it can run, else "torchvision", else "bag". On the CPU "bag", the fastest there. float64,
    which is for gradient checks, is the bag's everywhere. While a program is exported, "plain". `use_path` or the
    environment variable ROI_PATH force a path on the methods that have it.

    Raises ValueError if the forced path is unknown.
    """
    forced = "plain" if exporting() else _forced or os.environ.get("ROI_PATH")
    if forced and forced not in PATHS:
        raise ValueError(f"the environment variable ROI_PATH must be one of {PATHS}, got {forced!r}")
    if forced and forced in paths:
        return forced
    if features.is_cuda and features.dtype != torch.float64:
        order = ("triton", "torchvision", "bag") if triton_available() else ("torchvision", "bag")
    else:
        order = ("bag", "torchvision")
    return next(path for path in order if path in paths)


def exporting() -> bool:
    """Whether shapes must not depend on the data: torch.export runs, or the path "plain" is forced."""
    return torch.compiler.is_exporting() or (_forced or os.environ.get("ROI_PATH")) == "plain"


def check_fixed(what: str) -> None:
    """ValueError while exporting: `what` depends on the data."""
    if exporting():
        raise ValueError(f"{what}, and the shapes of an exported program do not: it needs another form in plain.py")


@contextmanager
def use_path(path: str) -> Iterator[None]:
    """Force `path` on every method that has it: `with use_path("bag"): ...`.

    Raises ValueError if `path` is unknown.
    """
    global _forced
    if path not in PATHS:
        raise ValueError(f"path must be one of {PATHS}, got {path!r}")
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before
