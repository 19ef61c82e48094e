"""Range checks of settings: ValueError that names the setting, the value and what is expected."""

from __future__ import annotations


def check_fractions(**values: float) -> None:
    """Each value must lie in 0..1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: expected a number from 0 to 1")


def check_counts(**values: int) -> None:
    """Each value must be at least 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
