"""Errors that a user can act on, and range checks that name the setting, its value and what is expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """The configuration or its input cannot work: the message says where and why. Exit code 2."""


class RunError(RuntimeError):
    """The run cannot go on for a reason the user can act on; no traceback is needed. Exit code 1."""


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


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def require(ok: bool, name: str, value: Any, wanted: str) -> None:
    """Raise ValueError `name = value: must be wanted` unless `ok`."""
    if not ok:
        raise ValueError(f"{name} = {value!r}: must be {wanted}")
