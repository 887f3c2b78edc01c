"""Repeated measurements: the first one apart, the others as median and range."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Samples:
    """Seconds (or ratios) in the order measured. `warm` leaves the first out, unless it is the only one."""

    all: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.all.append(value)

    @property
    def first(self) -> float:
        return self.all[0]

    @property
    def warm(self) -> Sequence[float]:
        return self.all[1:] or self.all

    @property
    def median(self) -> float:
        return statistics.median(self.warm)

    @property
    def least(self) -> float:
        return min(self.warm)

    @property
    def most(self) -> float:
        return max(self.warm)

    def over(self, other: Samples) -> Samples:
        """The ratio in each round. On a shared machine only what ran side by side may be divided."""
        return Samples([mine / theirs for mine, theirs in zip(self.all, other.all, strict=True)])
