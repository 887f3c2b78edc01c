"""Save policies as tables: progress in, decision out."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.interval import daly_interval
from asyncckpt.policies import AdaptiveInterval, EveryMinutes, EverySteps, Progress, SavePolicy

NAN, INF = float("nan"), float("inf")


def progress(
    step: int = 1,
    last_step: int = 0,
    *,
    elapsed_secs: float = 0.0,
    cost_secs: float | None = None,
    write_secs: float | None = None,
) -> Progress:
    """The last save was at 1000 on the clock."""
    return Progress(step, 1000.0 + elapsed_secs, last_step, 1000.0, cost_secs, write_secs)


@pytest.mark.parametrize(
    ("num", "last_step", "step", "saves"),
    [
        (100, 0, 0, False),
        (100, 0, 99, False),
        (100, 0, 100, True),
        (100, 0, 101, True),
        (100, 0, 1234, True),
        (100, 100, 100, False),
        (100, 100, 199, False),
        (100, 101, 200, True),
        (100, 150, 199, False),
        (100, 150, 205, True),
        (100, 150, 150, False),
        (100, 300, 200, False),
        (1, 6, 6, False),
        (1, 6, 7, True),
    ],
)
def test_every_steps(num: int, last_step: int, step: int, saves: bool) -> None:
    """A multiple lies after the last save's step and not after this one, so strides don't miss it."""
    assert EverySteps(num).should_save(progress(step, last_step, elapsed_secs=1e9)) is saves


@given(st.integers(1, 20), st.integers(0, 50), st.lists(st.integers(0, 30), max_size=20))
def test_every_steps_saves_once_for_each_multiple(num: int, start: int, strides: list[int]) -> None:
    """However training strides, it saves exactly when a multiple was reached or passed."""
    last_step = step = start
    for stride in strides:
        passed = any(number % num == 0 for number in range(step + 1, step + stride + 1))
        step += stride
        assert EverySteps(num).should_save(progress(step, last_step)) is passed
        if passed:
            last_step = step


@pytest.mark.parametrize(
    ("minutes", "elapsed_secs", "saves"),
    [(10, 0, False), (10, 599.9, False), (10, 600, True), (10, 1e6, True), (0.5, 29, False), (0.5, 30, True)],
)
def test_every_minutes(minutes: float, elapsed_secs: float, saves: bool) -> None:
    """So long since the last save, whatever the steps."""
    assert EveryMinutes(minutes).should_save(progress(elapsed_secs=elapsed_secs)) is saves


@pytest.mark.parametrize(
    ("policy", "cost_secs", "write_secs", "interval"),
    [
        (AdaptiveInterval(), 0.1, 2.0, 10.0),
        (AdaptiveInterval(), 0.1, 30.0, 30.0),
        (AdaptiveInterval(), 0.0, 2.0, 2.0),
        (AdaptiveInterval(0.05), 0.1, 0.0, 2.0),
        (AdaptiveInterval(1), 0.5, 0.0, 0.5),
        (AdaptiveInterval(mtbf_hours=24), 300.0, 0.0, daly_interval(300, 24 * 3600)),
        (AdaptiveInterval(0.5, mtbf_hours=24), 300.0, 0.0, daly_interval(300, 24 * 3600)),
        (AdaptiveInterval(mtbf_hours=0.001), 0.01, 5.0, 5.0),
        (AdaptiveInterval(mtbf_hours=1), 9000.0, 5.0, 3600.0),
        (AdaptiveInterval(mtbf_hours=24), 0.0, 5.0, 5.0),
    ],
)
def test_adaptive_interval(policy: AdaptiveInterval, cost_secs: float, write_secs: float, interval: float) -> None:
    """By the overhead allowed, or by Daly's formula; never shorter than a write."""
    assert policy.interval_secs(cost_secs, write_secs) == pytest.approx(interval)


@pytest.mark.parametrize(
    ("now", "saves"),
    [
        pytest.param(progress(), True, id="nothing measured"),
        pytest.param(progress(write_secs=5.0), True, id="no stall measured"),
        pytest.param(progress(step=0), False, id="nothing measured, nothing done"),
        pytest.param(progress(elapsed_secs=9.9, cost_secs=0.1, write_secs=2.0), False, id="too early"),
        pytest.param(progress(elapsed_secs=10.1, cost_secs=0.1, write_secs=2.0), True, id="time"),
        pytest.param(progress(elapsed_secs=10.1, cost_secs=0.1, write_secs=20.0), False, id="still writing"),
        pytest.param(progress(elapsed_secs=20.0, cost_secs=0.1, write_secs=20.0), True, id="a write's time"),
        pytest.param(progress(elapsed_secs=9.9, cost_secs=0.1), False, id="no write measured, too early"),
        pytest.param(progress(elapsed_secs=10.1, cost_secs=0.1), True, id="no write measured, time"),
        pytest.param(progress(5, 5, elapsed_secs=1e6, cost_secs=0.1, write_secs=2.0), False, id="the same step"),
        pytest.param(progress(4, 5, elapsed_secs=1e6, cost_secs=0.1, write_secs=2.0), False, id="an earlier step"),
        pytest.param(progress(cost_secs=0.0, write_secs=0.0), True, id="saves that cost nothing"),
    ],
)
def test_adaptive_decisions(now: Progress, saves: bool) -> None:
    """Once at the first opportunity, then by the interval; never the same step again."""
    assert AdaptiveInterval(max_overhead=0.01).should_save(now) is saves


@given(st.floats(1e-4, 10), st.floats(0, 100), st.floats(1e-3, 1))
def test_adaptive_overhead_stays_within_its_limit(cost_secs: float, write_secs: float, max_overhead: float) -> None:
    """Of any interval, training waits for at most the fraction allowed."""
    interval = AdaptiveInterval(max_overhead).interval_secs(cost_secs, write_secs)
    assert cost_secs / interval <= max_overhead * (1 + 1e-9)
    assert interval >= write_secs


@pytest.mark.parametrize(
    ("step", "elapsed_secs", "saves"), [(99, 0, False), (100, 0, True), (99, 600, True), (100, 600, True)]
)
def test_either_saves(step: int, elapsed_secs: float, saves: bool) -> None:
    """`|` saves when any of the policies would."""
    policy = EverySteps(100) | EveryMinutes(10)
    assert policy.should_save(progress(step, elapsed_secs=elapsed_secs)) is saves


@pytest.mark.parametrize(
    ("policy", "uses_time"),
    [
        (EverySteps(100), False),
        (EveryMinutes(10), True),
        (AdaptiveInterval(), True),
        (EverySteps(100) | EverySteps(250), False),
        (EverySteps(100) | EveryMinutes(10), True),
    ],
)
def test_ranks_may_differ_only_over_time(policy: SavePolicy, uses_time: bool) -> None:
    """Steps are the same on every rank, clocks are not."""
    assert policy.uses_time is uses_time


def test_a_policy_of_ones_own_may_use_time() -> None:
    """Unless it says otherwise, ranks are not trusted to agree."""

    class Never(SavePolicy):
        def should_save(self, progress: Progress) -> bool:
            return False

    assert Never().uses_time
    assert (Never() | EverySteps(1)).uses_time
    assert (Never() | EverySteps(1)).should_save(progress())


def test_composition_is_flat() -> None:
    """However it is bracketed it is the same policy, which prints as it was written and survives pickling."""
    steps, minutes, adaptive = EverySteps(100), EveryMinutes(10), AdaptiveInterval(0.02)
    policy = (steps | minutes) | adaptive
    assert policy == steps | (minutes | adaptive)
    assert hash(policy) == hash(steps | (minutes | adaptive))
    assert policy != steps | minutes
    assert repr(steps | minutes) == "EverySteps(num=100) | EveryMinutes(minutes=10)"
    assert eval(repr(policy)) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(TypeError):
        steps | 3  # type: ignore[operator]


@pytest.mark.parametrize(
    ("policy", "arguments", "error", "words"),
    [
        (EverySteps, {"num": 0}, ValueError, "num must be at least 1, not 0"),
        (EverySteps, {"num": -5}, ValueError, "num"),
        (EverySteps, {"num": True}, TypeError, "num must be an int, not True"),
        (EverySteps, {"num": 100.0}, TypeError, "num"),
        (EveryMinutes, {"minutes": 0}, ValueError, "minutes must be above 0 and finite, not 0"),
        (EveryMinutes, {"minutes": -1}, ValueError, "minutes"),
        (EveryMinutes, {"minutes": NAN}, ValueError, "minutes"),
        (EveryMinutes, {"minutes": INF}, ValueError, "minutes"),
        (EveryMinutes, {"minutes": True}, TypeError, "minutes must be a number"),
        (EveryMinutes, {"minutes": "10"}, TypeError, "minutes"),
        (AdaptiveInterval, {"max_overhead": 0}, ValueError, "max_overhead must be above 0 and at most 1"),
        (AdaptiveInterval, {"max_overhead": 1.01}, ValueError, "max_overhead"),
        (AdaptiveInterval, {"max_overhead": NAN}, ValueError, "max_overhead"),
        (AdaptiveInterval, {"max_overhead": None}, TypeError, "max_overhead"),
        (AdaptiveInterval, {"mtbf_hours": 0}, ValueError, "mtbf_hours must be above 0"),
        (AdaptiveInterval, {"mtbf_hours": INF}, ValueError, "mtbf_hours"),
        (AdaptiveInterval, {"mtbf_hours": False}, TypeError, "mtbf_hours"),
    ],
)
def test_arguments_are_checked(
    policy: type[SavePolicy], arguments: dict[str, object], error: type[Exception], words: str
) -> None:
    """A policy that makes no sense can't be made, and the error says which argument is wrong."""
    with pytest.raises(error, match=words):
        policy(**arguments)
