"""The interval formulas against published figures, and against the models that they are said to minimise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.interval import daly_interval, expected_overhead, optimal_interval, young_interval

NAN, INF = float("nan"), float("inf")
HOUR = 3600.0
SECS = st.floats(1e-3, 1e7)


def minimum_of(cost: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum has it: golden-section search on a logarithmic scale."""
    start, end = math.log(low), math.log(high)
    shrink = (math.sqrt(5) - 1) / 2
    while end - start > 1e-9:
        left, right = end - shrink * (end - start), start + shrink * (end - start)
        if cost(math.exp(left)) < cost(math.exp(right)):
            end = right
        else:
            start = left
    return math.exp((start + end) / 2)


@pytest.mark.parametrize(
    ("save_secs", "total_secs", "failure_probability", "interval"),
    [(2, 100, 1, 20), (2, 100, 4, 10), (0.5, 10000, 0.01, 1000), (30, 240 * HOUR, 10, 2276.84)],
)
def test_the_reference_formula(
    save_secs: float, total_secs: float, failure_probability: float, interval: float
) -> None:
    """√(2cT/p)."""
    assert optimal_interval(save_secs, total_secs, failure_probability) == pytest.approx(interval, rel=1e-5)


@given(SECS, SECS, st.floats(1e-3, 1e3))
def test_the_reference_formula_is_youngs(save_secs: float, total_secs: float, num_failures: float) -> None:
    """With p the failures expected in all of T, T/p is the mean time between them."""
    expected = young_interval(save_secs, total_secs / num_failures)
    assert optimal_interval(save_secs, total_secs, num_failures) == pytest.approx(expected)


def test_the_reference_formula_minimises_the_reference_cost() -> None:
    """(T/Δ)·c + p·Δ/2 is least there."""
    save_secs, total_secs, failures = 30.0, 240 * HOUR, 10.0
    least = minimum_of(lambda interval: total_secs / interval * save_secs + failures * interval / 2, 1, total_secs)
    assert optimal_interval(save_secs, total_secs, failures) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize(("save_secs", "mtbf_secs", "interval"), [(2, 100, 20), (0.5, 100, 10), (300, 24 * HOUR, 7200)])
def test_young(save_secs: float, mtbf_secs: float, interval: float) -> None:
    """√(2δM)."""
    assert young_interval(save_secs, mtbf_secs) == pytest.approx(interval)


@pytest.mark.parametrize(("save_secs", "mtbf_secs"), [(0.1, HOUR), (10, 24 * HOUR), (300, 24 * HOUR)])
def test_young_minimises_the_overhead(save_secs: float, mtbf_secs: float) -> None:
    """`expected_overhead` is least there, whatever a restart costs."""

    def overhead(interval_secs: float) -> float:
        return expected_overhead(interval_secs, save_secs, mtbf_secs, restart_secs=60)

    least = minimum_of(overhead, save_secs / 10, mtbf_secs)
    assert young_interval(save_secs, mtbf_secs) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize(
    ("save_minutes", "mtbf_minutes", "interval_minutes"), [(5, 24 * 60, 117), (5, 6 * 60, 57), (5, 15, 9.1)]
)
def test_daly_as_published(save_minutes: float, mtbf_minutes: float, interval_minutes: float) -> None:
    """The figures under Figs. 3 to 5 of Daly's article, to their digits."""
    interval = daly_interval(save_minutes * 60, mtbf_minutes * 60) / 60
    assert float(f"{interval:.{len(str(interval_minutes).replace('.', ''))}g}") == interval_minutes


@pytest.mark.parametrize(
    ("save_secs", "mtbf_secs", "interval"),
    [
        (200, 100, 100),
        (201, 100, 100),
        (1e9, 100, 100),
        (50, 100, 100 * (1 + 0.5 / 3 + 0.25 / 9) - 50),
        (199.999999, 100, 200 * 13 / 9 - 200),
    ],
)
def test_daly_by_hand(save_secs: float, mtbf_secs: float, interval: float) -> None:
    """The series below δ = 2M, and M from there on."""
    assert daly_interval(save_secs, mtbf_secs) == pytest.approx(interval, rel=1e-6)


@pytest.mark.parametrize(
    ("ratio", "interval_error", "time_error"),
    [(1e-4, 1e-6, 1e-9), (1e-3, 1e-5, 1e-9), (1e-2, 1e-4, 1e-9), (0.1, 2e-3, 1e-6), (0.5, 0.02, 1e-4), (1, 0.06, 1e-3)],
)
def test_daly_minimises_the_exact_model(ratio: float, interval_error: float, time_error: float) -> None:
    """T_w(τ) = M e^{R/M} (e^{(τ+δ)/M} − 1) T_s/τ, his complete cost function, is least near there; δ/M is `ratio`."""
    mtbf, restart, solve = 24 * HOUR, 600.0, 500 * HOUR
    save = ratio * mtbf

    def wall_time(interval: float) -> float:
        return mtbf * math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf) * solve / interval

    least = minimum_of(wall_time, mtbf * 1e-4, mtbf * 10)
    assert daly_interval(save, mtbf) == pytest.approx(least, rel=interval_error)
    assert wall_time(daly_interval(save, mtbf)) <= wall_time(least) * (1 + time_error)


@given(SECS, SECS)
def test_daly_is_positive_and_below_young(save_secs: float, mtbf_secs: float) -> None:
    """For every cost and failure rate, however far from what the series is meant for."""
    assert 0 < daly_interval(save_secs, mtbf_secs) <= min(mtbf_secs, young_interval(save_secs, mtbf_secs))


@pytest.mark.parametrize(
    ("interval_secs", "save_secs", "mtbf_secs", "restart_secs", "overhead"),
    [(100, 1, 1000, 0, 0.06), (100, 1, 1000, 30, 0.09), (20, 2, 100, 0, 0.2), (1000, 10, 1e6, 1000, 0.0115)],
)
def test_overhead(
    interval_secs: float, save_secs: float, mtbf_secs: float, restart_secs: float, overhead: float
) -> None:
    """δ/Δ + Δ/2M + R/M."""
    assert expected_overhead(interval_secs, save_secs, mtbf_secs, restart_secs) == pytest.approx(overhead)


@pytest.mark.parametrize("wrong", [0, 0.0, -1.0, NAN, INF, -INF])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (optimal_interval, ("save_secs", "total_secs", "failure_probability")),
        (young_interval, ("save_secs", "mtbf_secs")),
        (daly_interval, ("save_secs", "mtbf_secs")),
        (expected_overhead, ("interval_secs", "save_secs", "mtbf_secs", "restart_secs")),
    ],
)
def test_arguments_are_positive_and_finite(
    function: Callable[..., float], arguments: tuple[str, ...], wrong: float
) -> None:
    """The error names the argument; only a restart may be free."""
    for name in arguments:
        values = {**dict.fromkeys(arguments, 1.0), name: wrong}
        if name == "restart_secs" and wrong == 0:
            assert function(**values) == 1.5
        else:
            with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
                function(**values)


@pytest.mark.parametrize("wrong", ["1", None, True])
def test_arguments_are_numbers(wrong: object) -> None:
    """Strings, None and bools are refused by name."""
    with pytest.raises(TypeError, match="mtbf_secs must be a number"):
        daly_interval(1.0, wrong)  # type: ignore[arg-type]
