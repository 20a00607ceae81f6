"""When the ranks look, and what they agree on; one rank, whose sums are its own values."""

import math
from collections.abc import Callable

import pytest
import torch

from fedloom_client.training.group import Group
from fedloom_client.training.orders import Cancelled
from fedloom_client.training.pulse import MAX_STEPS, Pulse
from fedloom_common.errors import TrainingFailed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass by hand."""
    now = 0.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("fedloom_client.training.pulse.time.monotonic", lambda: now)
    return pass_time


def pulse_of(values: list[float], *, stop: bool = False) -> Pulse:
    group = Group(0, 1, torch.device("cpu"), None)
    return Pulse(group, torch.tensor(values, dtype=torch.float64), lambda: stop, "the round")


def looks(steps: int, step_s: float, clock: Callable[[float], None]) -> list[int]:
    pulse, due = pulse_of([1.0] * steps), []
    for step in range(steps):
        clock(step_s)
        if pulse.after(step):
            due.append(step + 1)
    assert pulse.sums == [1.0] * steps
    return due


def test_long_steps_are_watched_one_by_one(clock: Callable[[float], None]) -> None:
    assert looks(5, 2.0, clock) == [1, 2, 3, 4, 5]


def test_steps_of_a_tenth_of_a_second_are_watched_every_half_second(clock: Callable[[float], None]) -> None:
    assert looks(20, 0.1, clock) == [1, 2, 7, 12, 17, 20]


def test_the_shortest_steps_are_watched_at_least_every_so_many(clock: Callable[[float], None]) -> None:
    assert looks(150, 1e-4, clock) == [1, 2, 2 + MAX_STEPS, 2 + 2 * MAX_STEPS, 150]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_value_that_is_not_finite_is_named_by_its_step(value: float) -> None:
    pulse = pulse_of([1.0, value, value])
    pulse.after(0)
    with pytest.raises(TrainingFailed, match=f"the loss is {value} at step 2 of 3 of the round"):
        pulse.after(1)


def test_a_wanted_stop_is_raised_at_the_next_look() -> None:
    with pytest.raises(Cancelled):
        pulse_of([1.0, 1.0], stop=True).after(0)
