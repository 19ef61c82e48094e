"""Weights of other frameworks: read safely, renamed, checked, and with the numbers that they need to reproduce."""

from detector.weights.architecture import apply_presets, build_model, model_config
from detector.weights.loading import ForeignWeights, load_foreign
from detector.weights.start import Start
from detector.weights.transfer import Kept, Misfit, load_into, misfit

__all__ = [
    "ForeignWeights",
    "Kept",
    "Misfit",
    "Start",
    "apply_presets",
    "build_model",
    "load_foreign",
    "load_into",
    "misfit",
    "model_config",
]
