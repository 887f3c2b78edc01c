"""The processes of a distributed run, as far as saving needs them: the first one decides, all learn what it decided."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import distributed

from asyncckpt.errors import CheckpointError

T = TypeVar("T")


class Ranks:
    """The default process group; without one, this process alone. Methods are collective: every rank calls them."""

    def __init__(self) -> None:
        is_distributed = distributed.is_available() and distributed.is_initialized()
        self.rank: int = distributed.get_rank() if is_distributed else 0
        self.size: int = distributed.get_world_size() if is_distributed else 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on the first rank; empty on the others. Blocks for all."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        distributed.gather_object(value, values)
        return values or []

    def on_all(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; its result, or on every rank the error of the first rank that failed.

        Blocks for all. Raises that error on the rank itself, and `OtherRankError` on the others.
        """
        if self.size == 1:
            return action()
        result, failure = _attempt(action)
        failures: list[Any] = [None] * self.size
        distributed.all_gather_object(failures, _picklable(failure))
        for rank, error in enumerate(failures):
            if error is not None and rank == self.rank and failure is not None:
                raise failure
            if error is not None:
                raise OtherRankError(rank, error)
        return cast(T, result)

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on the first rank; its result, or its error, everywhere. Blocks for all."""
        if self.size == 1:
            return action()
        result, failure = _attempt(action) if self.is_first else (None, None)
        shared = [result if failure is None else None, _picklable(failure)]
        distributed.broadcast_object_list(shared, src=0)
        if failure is not None:
            raise failure
        if shared[1] is not None:
            raise shared[1]
        return cast(T, shared[0])


class OtherRankError(CheckpointError):
    """Another rank failed; `error` is what it met."""

    def __init__(self, rank: int, error: Exception) -> None:
        super().__init__(f"on rank {rank}: {error}")
        self.error = error


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _picklable(error: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return CheckpointError(repr(error))
    return error
