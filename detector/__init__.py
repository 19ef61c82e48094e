"""Train and compare two-stage detectors with a swappable RoI feature extractor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from detector.inference.predict import Detector


def load(
    checkpoint: str | Path | Mapping,
    device: str | torch.device = "cpu",
    changes: Mapping | None = None,
    trust: str | Sequence[str] | None = (),
) -> Detector:
    """The detector of a checkpoint, with `predict(image)`: see detector.inference.load.load."""
    from detector.inference.load import load  # here, so that a look at the configuration does not wait for torch

    return load(checkpoint, device, changes, trust)
