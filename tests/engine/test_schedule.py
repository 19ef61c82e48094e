"""Schedules against their formulas, and lengths in all their notations."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.engine.optimizer import Cosine, OneCycle, Step
from detector.settings import to_iterations


@pytest.mark.parametrize(
    ("length", "expected"), [(7, 7), ("2 epochs", 200), ("1 epoch", 100), ("0.5ep", 50), (0.25, 250), (1.0, 1000)]
)
def test_lengths(length, expected):
    assert to_iterations(length, per_epoch=100, total=1000) == expected


@pytest.mark.parametrize("length", [-1, 1.5, -0.5, "soon", "epochs", "-2 epochs", True, None, "3"])
def test_what_is_not_a_length_is_refused_by_name(length):
    with pytest.raises(ValueError, match="milestone = "):
        to_iterations(length, 100, 1000, "milestone")


def test_share_needs_a_whole():
    with pytest.raises(ValueError, match=r"every = 0\.5"):
        to_iterations(0.5, 100, None, "every")


def test_step():
    schedule = Step(max_epochs=12, warmup=10, warmup_factor=0.1, milestones=["8 epochs", 110], gamma=0.5)
    factor = schedule.factor(per_epoch=10)
    assert schedule.total(10) == 120
    assert [factor(t) for t in (0, 5, 10, 79, 80, 109, 110, 119)] == pytest.approx(
        [0.1, 0.55, 1, 1, 0.5, 0.5, 0.25, 0.25]
    )


def test_cosine():
    factor = Cosine(max_iterations=110, warmup=10, warmup_factor=0.0, final_factor=0.2).factor(1)
    for t in range(10, 110):
        assert factor(t) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (t - 10) / 100)))
    assert [factor(t) for t in (0, 5)] == [0.0, 0.5]


def test_one_cycle():
    factor = OneCycle(max_iterations=100, peak=0.3, start_factor=0.04, final_factor=0.001).factor(1)
    values = [factor(t) for t in range(100)]
    assert values[0] == pytest.approx(0.04)
    assert values[15] == pytest.approx(0.52)  # half way up
    assert values[30] == 1.0 == max(values)
    assert values[65] == pytest.approx(0.5005)
    assert all(a < b for a, b in zip(values[:30], values[1:31], strict=True))
    assert all(a > b for a, b in zip(values[30:-1], values[31:], strict=True))


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5])
def test_one_cycle_of_very_short_runs(total):
    """Too short to rise: from the top down, or up to the top at the second step."""
    factor = OneCycle(max_iterations=total).factor(1)
    values = [factor(t) for t in range(total)]
    assert max(values) == 1.0 and all(0 < value <= 1 for value in values)


schedules = st.one_of(
    st.builds(Step, max_iterations=st.integers(2, 500), warmup=st.floats(0, 0.4), milestones=st.lists(st.floats(0, 1))),
    st.builds(Cosine, max_iterations=st.integers(2, 500), warmup=st.floats(0, 0.4), final_factor=st.floats(0, 1)),
    st.builds(OneCycle, max_iterations=st.integers(20, 500), peak=st.floats(0.1, 0.9)),
)


@given(schedules)
def test_factors_stay_between_zero_and_one(schedule):
    factor = schedule.factor(10)
    assert all(0 <= factor(t) <= 1 for t in range(schedule.total(10)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Step(), "exactly one"),
        (lambda: Step(max_epochs=1, max_iterations=1), "exactly one"),
        (lambda: Step(max_iterations=0), "max_iterations = 0"),
        (lambda: Step(max_epochs=-1.0), "max_epochs = -1"),
        (lambda: Step(max_iterations=5, gamma=0.0), "gamma = 0"),
        (lambda: Step(max_iterations=5, milestones=["x"]), r"milestones\[0\] = 'x'"),
        (lambda: Step(max_iterations=5, warmup_factor=2.0), "warmup_factor = 2"),
        (lambda: Step(max_iterations=5, warmup=9).factor(1), "warmup = 9: must be shorter than the run of 5"),
        (lambda: Cosine(max_iterations=5, final_factor=-1.0), "final_factor = -1"),
        (lambda: OneCycle(max_iterations=5, warmup=1), "warmup = 1"),
        (lambda: OneCycle(max_iterations=5, peak=9).factor(1), "peak = 9: must be inside the run of 5"),
    ],
)
def test_impossible_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()
