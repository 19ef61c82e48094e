"""Weights of other frameworks: read safely, renamed, checked, and with the numbers that they need to reproduce."""

from detector.weights.architecture import apply_presets, build_model, model_config
from detector.weights.loading import ForeignWeights, Misfit, load_foreign, load_into, misfit
from detector.weights.start import Start

__all__ = [
    "ForeignWeights",
    "Misfit",
    "Start",
    "apply_presets",
    "build_model",
    "load_foreign",
    "load_into",
    "misfit",
    "model_config",
]
