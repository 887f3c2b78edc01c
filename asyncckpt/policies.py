"""Save policies: when to save. Pure: time comes in as an argument, so that every decision can be replayed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from asyncckpt.interval import daly_interval


@dataclass(frozen=True)
class Progress:
    """How far training is, and what saving has cost; times are in seconds, moments those of one monotonic clock.

    `last_step` and `last_secs` are of the last save, or of the beginning of training in this process; a rollback resets
    them. `cost_secs` is what a recent save cost training: its stall, and the steps that were slower while it was
    written; None before the first has returned. `write_secs` is what a recent save took from `save()` to durable; None
    before the first is durable.
    """

    step: int
    secs: float
    last_step: int
    last_secs: float
    cost_secs: float | None = None
    write_secs: float | None = None


class SavePolicy(ABC):
    """When to save. Policies are immutable, and `|` saves when either of two would."""

    @property
    def uses_time(self) -> bool:
        """Whether two ranks at one step could decide differently, so that one must decide for all."""
        return True

    @abstractmethod
    def should_save(self, progress: Progress) -> bool:
        """Whether to save now; asked after every step, or every few."""

    def __or__(self, other: SavePolicy) -> SavePolicy:
        if not isinstance(other, SavePolicy):
            return NotImplemented
        return SaveAny((*_parts(self), *_parts(other)))


@dataclass(frozen=True, repr=False)
class SaveAny(SavePolicy):
    """Saves when any of its policies would; made by `|`."""

    policies: tuple[SavePolicy, ...]

    @property
    def uses_time(self) -> bool:
        return any(policy.uses_time for policy in self.policies)

    def should_save(self, progress: Progress) -> bool:
        return any(policy.should_save(progress) for policy in self.policies)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))


@dataclass(frozen=True)
class EverySteps(SavePolicy):
    """Saves when training has reached or passed a multiple of `num` steps since the last save.

    Raises TypeError or ValueError unless `num` is an int of at least 1.
    """

    num: int
    uses_time = False

    def __post_init__(self) -> None:
        if isinstance(self.num, bool) or not isinstance(self.num, int):
            raise TypeError(f"num must be an int, not {self.num!r}")
        if self.num < 1:
            raise ValueError(f"num must be at least 1, not {self.num}")

    def should_save(self, progress: Progress) -> bool:
        return progress.step // self.num > progress.last_step // self.num


@dataclass(frozen=True)
class EveryMinutes(SavePolicy):
    """Saves when the last save is that many minutes ago, and not the same step twice.

    Raises TypeError or ValueError unless `minutes` is a positive finite number.
    """

    minutes: float

    def __post_init__(self) -> None:
        _check_range("minutes", self.minutes)

    def should_save(self, progress: Progress) -> bool:
        return progress.step != progress.last_step and progress.secs - progress.last_secs >= self.minutes * 60


@dataclass(frozen=True)
class AdaptiveInterval(SavePolicy):
    """Saves as often as is worth it, by what saves are measured to cost.

    Without `mtbf_hours`, saving costs training at most the fraction `max_overhead` of its time. `mtbf_hours` is the
    mean time between failures of the whole job: with it the interval is the one that loses the least time to saving and
    repeated work together (Daly's formula, see `asyncckpt.interval`), and `max_overhead` does not apply.
    Either way the interval is at least what a write takes, so that saves don't pile up.

    The first save comes at the first step, so that the costs get measured.

    Raises TypeError or ValueError unless `max_overhead` is above 0 and at most 1, and `mtbf_hours` positive and finite.
    """

    max_overhead: float = 0.01
    mtbf_hours: float | None = None

    def __post_init__(self) -> None:
        _check_range("max_overhead", self.max_overhead, at_most=1)
        if self.mtbf_hours is not None:
            _check_range("mtbf_hours", self.mtbf_hours)

    def interval_secs(self, cost_secs: float, write_secs: float) -> float:
        """The interval between saves of which each costs training `cost_secs`, and is durable in `write_secs`."""
        if self.mtbf_hours is None:
            return max(cost_secs / self.max_overhead, write_secs)
        # A clock may tell that a save took no time at all; Daly's formula tends to 0 there, but takes only more.
        worthwhile = daly_interval(cost_secs, self.mtbf_hours * 3600) if cost_secs > 0 else 0.0
        return max(worthwhile, write_secs)

    def should_save(self, progress: Progress) -> bool:
        if progress.step <= progress.last_step:
            return False
        if progress.cost_secs is None:
            return True
        # Nothing is known of the write while the first is under way, and never will be if it failed: save all the same.
        interval_secs = self.interval_secs(progress.cost_secs, progress.write_secs or 0.0)
        return progress.secs - progress.last_secs >= interval_secs


def _parts(policy: SavePolicy) -> tuple[SavePolicy, ...]:
    return policy.policies if isinstance(policy, SaveAny) else (policy,)


def _check_range(name: str, value: object, at_most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not (0 < value <= at_most and math.isfinite(value)):
        limit = "finite" if at_most == math.inf else f"at most {at_most}"
        raise ValueError(f"{name} must be above 0 and {limit}, not {value!r}")
