"""`asyncckpt interval`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import asyncckpt
from cli.running import run, run_json


def test_all_formulas_are_those_of_the_library() -> None:
    """With the overhead of each, the write counted as lost in every failure."""
    options = ["--mtbf-hours", 12, "--total-hours", 100, "--failure-probability", 8, "--write-secs", 20]
    advice = run_json("interval", "--save-secs", 2, *options)
    expected = {
        "optimal": asyncckpt.optimal_interval(2, 360_000, 8),
        "Young": asyncckpt.young_interval(2, 43_200),
        "Daly": asyncckpt.daly_interval(2, 43_200),
    }
    assert {choice["name"]: choice["interval_secs"] for choice in advice["formulas"]} == pytest.approx(expected)
    for choice in advice["formulas"]:
        overhead = asyncckpt.expected_overhead(choice["interval_secs"], 2, 43_200, restart_secs=20)
        assert choice["expected_overhead"] == pytest.approx(overhead)
        assert choice["saving_overhead"] + choice["failure_overhead"] == pytest.approx(overhead)
    assert advice["recommended"]["name"] == "Daly"


def test_failures_expected_in_all_of_training_are_a_mean_time_between_failures() -> None:
    """T/p, so that Young's formula gives what the reference's gives."""
    advice = run_json("interval", "--save-secs", 2, "--total-hours", 100, "--failure-probability", 8)
    assert advice["mtbf_secs"] == 45_000
    assert advice["formulas"][0]["interval_secs"] == pytest.approx(advice["formulas"][1]["interval_secs"])


@pytest.mark.parametrize(
    ("save_secs", "write_secs", "mtbf_hours", "max_overhead"),
    [(2, 20, 12, None), (2, 900, 12, None), (0.2, 1, None, 0.01), (0.2, 60, None, 0.01)],
)
def test_the_recommendation_is_what_the_adaptive_policy_does(
    save_secs: float, write_secs: float, mtbf_hours: float | None, max_overhead: float | None
) -> None:
    """Daly's interval or the overhead allowed, but at least a write."""
    options = ["--mtbf-hours", mtbf_hours] if mtbf_hours is not None else ["--max-overhead", max_overhead]
    advice = run_json("interval", "--save-secs", save_secs, "--write-secs", write_secs, *options)
    policy = asyncckpt.AdaptiveInterval(max_overhead or 0.01, mtbf_hours)
    assert advice["recommended"]["interval_secs"] == pytest.approx(policy.interval_secs(save_secs, write_secs))


def test_an_overhead_that_daly_would_exceed_is_kept() -> None:
    """The longer of the two."""
    advice = run_json("interval", "--save-secs", 2, "--mtbf-hours", 12, "--max-overhead", 0.001)
    assert advice["recommended"]["interval_secs"] == pytest.approx(2000)


def test_a_line_says_what_to_choose() -> None:
    """In words, below the table."""
    lines = run("interval", "--save-secs", 2, "--mtbf-hours", 12).stdout.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["Young", "Daly"]
    assert lines[-1] == (
        "Save every 6.91 min (Daly): saving takes 0.48 % of the time, with what failures throw away 0.96 %."
    )
    alone = run("interval", "--save-secs", 0.2, "--max-overhead", 0.01).stdout
    assert alone == "Save every 20 s (the overhead allowed): saving takes 1 % of the time.\n"


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--save-secs", 1],
        ["--save-secs", 1, "--total-hours", 5],
        ["--save-secs", 1, "--failure-probability", 0.5],
        ["--save-secs", 0, "--max-overhead", 0.1],
        ["--save-secs", -1, "--mtbf-hours", 1],
        ["--save-secs", "nan", "--mtbf-hours", 1],
        ["--save-secs", 1, "--mtbf-hours", 0],
        ["--save-secs", 1, "--mtbf-hours", "inf"],
        ["--save-secs", 1, "--mtbf-hours", 1, "--total-hours", 0, "--failure-probability", 1],
        ["--save-secs", 1, "--total-hours", 1, "--failure-probability", -1],
        ["--save-secs", 1, "--mtbf-hours", 1, "--max-overhead", 0],
        ["--save-secs", 1, "--mtbf-hours", 1, "--max-overhead", 2],
        ["--save-secs", 1, "--mtbf-hours", 1, "--write-secs", -1],
        ["--save-secs", 1, "--max-overhead", 0.1, "--write-secs", "inf"],
        ["--save-secs", 1, "--mtbf-hours", 1, "--failure-probability", 1],
        ["--save-secs", "soon", "--mtbf-hours", 1],
    ],
)
def test_wrong_numbers_are_usage_errors(options: Sequence[object]) -> None:
    """Exit code 2, never a traceback."""
    assert run("interval", *options, code=2).stdout == ""
