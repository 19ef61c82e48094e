"""Train and compare two-stage detectors with a swappable RoI feature extractor."""

from __future__ import annotations


def load(checkpoint, device="cpu", changes=None, trust=()):
    """The model of a checkpoint in evaluation mode, with `predict(image)`: see detector.inference.load.load."""
    from detector.inference.load import load  # here, so that a look at the configuration does not wait for torch

    return load(checkpoint, device, changes, trust)
