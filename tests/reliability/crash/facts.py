"""What a run has said and been told: noted in one order with what it did to the disk."""

from __future__ import annotations

from dataclasses import dataclass


class Fact:
    """Anything that a crash does not undo."""


@dataclass(frozen=True)
class Submitted(Fact):
    """State `number`, all of whose tensors hold that number, is about to be saved; numbers only rise."""

    number: int
    loss: float | None = None


@dataclass(frozen=True)
class Acknowledged(Fact):
    """Its handle has resolved; `path` is relative to the recording's base."""

    number: int
    path: str
    sequence: int | None


@dataclass(frozen=True)
class Failed(Fact):
    number: int


@dataclass(frozen=True)
class Retention(Fact):
    """From now on so many of the newest are kept, and the best; None keeps all. Commits are `in_order`, or not."""

    num_kept: int | None
    in_order: bool = True


@dataclass(frozen=True)
class Pruning(Fact):
    """`prune()` is about to be called, down to so many."""

    num_kept: int


@dataclass(frozen=True)
class Pruned(Fact):
    """It has returned."""


@dataclass(frozen=True)
class RegistryLost(Fact):
    """Somebody has removed the registry."""


@dataclass(frozen=True)
class Opened(Fact):
    """The directory has been opened for writing."""


@dataclass(frozen=True)
class Found(Fact):
    """A reader has seen these after an earlier crash, and may have gone on from them."""

    numbers: frozenset[int]
