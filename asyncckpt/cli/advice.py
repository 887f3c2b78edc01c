"""`asyncckpt interval`: how often to save. Pure; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from asyncckpt.cli.output import format_secs, make_table
from asyncckpt.interval import daly_interval, expected_overhead, optimal_interval, young_interval

_HOUR_SECS = 3600.0


@dataclass(frozen=True)
class Costs:
    """What is known of the training: times in seconds, None where nothing was said."""

    save_secs: float
    mtbf_secs: float | None
    total_secs: float | None = None
    num_failures: float | None = None
    write_secs: float = 0.0
    max_overhead: float | None = None


@dataclass(frozen=True)
class Choice:
    """An interval, and the fraction of the time that saving and failures take with it; None without failures known."""

    name: str
    formula: str
    interval_secs: float
    saving_overhead: float
    failure_overhead: float | None
    expected_overhead: float | None


@dataclass(frozen=True)
class Advice:
    """All formulas that apply, and the interval to choose: as `AdaptiveInterval` would, or as `max_overhead` says."""

    save_secs: float
    mtbf_secs: float | None
    write_secs: float
    formulas: Sequence[Choice]
    recommended: Choice


def gather(
    save_secs: float,
    mtbf_hours: float | None = None,
    total_hours: float | None = None,
    failure_probability: float | None = None,
    write_secs: float = 0.0,
    max_overhead: float | None = None,
) -> Advice:
    """Work it out. Raises ValueError for numbers that no formula takes, and when too little is known."""
    if not 0 < save_secs < math.inf:
        raise ValueError(f"--save-secs must be positive and finite, not {save_secs}")
    if not 0 <= write_secs < math.inf:
        raise ValueError(f"--write-secs can't be {write_secs}")
    if failure_probability is not None and total_hours is None:
        raise ValueError("--failure-probability is that of a failure in the whole training: it needs --total-hours")
    if max_overhead is not None and not 0 < max_overhead <= 1:
        raise ValueError(f"--max-overhead must be above 0 and at most 1, not {max_overhead}")
    costs = Costs(
        save_secs,
        _to_mtbf_secs(mtbf_hours, total_hours, failure_probability),
        None if total_hours is None else total_hours * _HOUR_SECS,
        failure_probability,
        write_secs,
        max_overhead,
    )
    if costs.mtbf_secs is None and max_overhead is None:
        raise ValueError("give --mtbf-hours, or --total-hours with --failure-probability, or --max-overhead")
    formulas = _formulas(costs)
    return Advice(save_secs, costs.mtbf_secs, write_secs, formulas, _recommend(costs, formulas))


def draw(advice: Advice, console: Console) -> None:
    """A row for each formula, and what to choose."""
    if advice.formulas:
        numbers = ("interval", "saving", "failures", "together")
        table = make_table("formula", "", *numbers, right=numbers)
        for choice in advice.formulas:
            table.add_row(choice.name, choice.formula, format_secs(choice.interval_secs), *_percentages(choice))
        console.print(table)
        console.print()
    chosen = advice.recommended
    saving, _, together = _percentages(chosen)
    cost = f"saving takes {saving} of the time"
    if chosen.expected_overhead is not None:
        cost += f", with what failures throw away {together}"
    console.print(f"Save every {format_secs(chosen.interval_secs)} ({chosen.name}): {cost}.", style="bold")


def _to_mtbf_secs(
    mtbf_hours: float | None, total_hours: float | None, failure_probability: float | None
) -> float | None:
    if mtbf_hours is not None:
        return mtbf_hours * _HOUR_SECS
    if total_hours is None or not failure_probability:
        return None
    return total_hours * _HOUR_SECS / failure_probability


def _formulas(costs: Costs) -> list[Choice]:
    if costs.mtbf_secs is None:
        return []
    choices = []
    if costs.total_secs is not None and costs.num_failures is not None:
        interval_secs = optimal_interval(costs.save_secs, costs.total_secs, costs.num_failures)
        choices.append(_choice("optimal", "√(2cT/p)", interval_secs, costs))
    choices += [
        _choice("Young", "√(2δM)", young_interval(costs.save_secs, costs.mtbf_secs), costs),
        _choice("Daly", "√(2δM)·(1 + ⅓√(δ/2M) + …) − δ", daly_interval(costs.save_secs, costs.mtbf_secs), costs),
    ]
    return choices


def _recommend(costs: Costs, formulas: Sequence[Choice]) -> Choice:
    """Daly's interval, but no shorter than a write takes, nor than the overhead that is allowed."""
    candidates = [("the write takes that long", costs.write_secs)]
    if costs.max_overhead is not None:
        candidates.append(("the overhead allowed", costs.save_secs / costs.max_overhead))
    candidates += [(choice.name, choice.interval_secs) for choice in formulas if choice.name == "Daly"]
    name, interval_secs = max(reversed(candidates), key=lambda candidate: candidate[1])
    return _choice(name, "", interval_secs, costs)


def _choice(name: str, formula: str, interval_secs: float, costs: Costs) -> Choice:
    saving = costs.save_secs / interval_secs
    if costs.mtbf_secs is None:
        return Choice(name, formula, interval_secs, saving, None, None)
    # A failure throws away what was done since the last save began that is durable: half an interval and a write, which
    # counts as a restart does.
    together = expected_overhead(interval_secs, costs.save_secs, costs.mtbf_secs, restart_secs=costs.write_secs)
    return Choice(name, formula, interval_secs, saving, together - saving, together)


def _percentages(choice: Choice) -> list[str]:
    fractions = (choice.saving_overhead, choice.failure_overhead, choice.expected_overhead)
    return ["-" if fraction is None else f"{fraction * 100:.2g} %" for fraction in fractions]
