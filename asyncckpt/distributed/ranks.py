"""The processes of a distributed run, as far as saving needs them: the first one decides, all learn what it decided.

What fails on one rank is raised on every rank, so that all of them do the same next and none waits for another.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from asyncckpt.errors import CheckpointError

T = TypeVar("T")
C = TypeVar("C")


class Ranks:
    """The default process group; without one, this process alone. Methods are collective: every rank calls them.

    They block until every rank has called them, up to the process group's time-out. An error of an action is raised
    on every rank, by the same type: the error of the lowest rank that failed. On the others an `OtherRankError` is its
    cause, and tells where it was met. What ends a process (KeyboardInterrupt, SystemExit) stays on its own rank, and is
    a `CheckpointError` on the others, as it is on every rank when one has died or does not come in time.

    The messages are small, and travel through the host: NCCL's could use only `torch.cuda.current_device()`, would wait
    for whatever the GPU has to do before, and end the job when one rank waits for a slow disk. So where the process
    group has no backend for the CPU (as after `init_process_group("nccl")`), the first method called makes a gloo group
    beside it. With "cpu:gloo,cuda:nccl", torch's own default, none is needed; in a torch built without gloo, each rank
    has to set its device first, by `torch.cuda.set_device`.
    """

    def __init__(self) -> None:
        is_distributed = distributed.is_available() and distributed.is_initialized()
        self.rank: int = distributed.get_rank() if is_distributed else 0
        self.size: int = distributed.get_world_size() if is_distributed else 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def on_all(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; its result."""
        if self.size == 1:
            return action()
        result, error = _attempt(action)
        failures: list[Any] = [None] * self.size
        with _meeting(error):
            distributed.all_gather_object(failures, self._failure(error), group=_group())
        self._raise(next((failure for failure in failures if failure is not None), None), error)
        return cast(T, result)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank; one small message."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        with _meeting(None):
            distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=_group())
        return bool(flags.item())

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on the first rank; its result (plain data) everywhere."""
        if self.size == 1:
            return action()
        result, error = _attempt(lambda: _checked(action())) if self.is_first else (None, None)
        return self._tell(result, error)

    def on_first_from_all(self, contribute: Callable[[], C], action: Callable[[list[C]], T]) -> T:
        """Run `contribute` on every rank, then `action` on the first one, with what they returned, in their order.

        The result of `action` (plain data) everywhere. Contributions may hold tensors on any device; they arrive as
        copies on the CPU.
        """
        if self.size == 1:
            return action([contribute()])
        contribution, own_error = _attempt(lambda: _pack(contribute()))
        received: list[Any] | None = [None] * self.size if self.is_first else None
        with _meeting(own_error):
            distributed.gather_object((contribution, self._failure(own_error)), received, group=_group())

        def act() -> T:
            assert received is not None
            self._raise(next((failure for _, failure in received if failure is not None), None), own_error)
            return _checked(action([_unpack(packed) for packed, _ in received]))

        result, error = _attempt(act) if self.is_first else (None, own_error)
        return self._tell(result, error)

    def _tell(self, result: T | None, error: BaseException | None) -> T:
        """The first rank's result or error, everywhere."""
        told = [(result, self._failure(error)) if self.is_first else None]
        with _meeting(error):
            distributed.broadcast_object_list(told, src=0, group=_group())
        assert told[0] is not None
        result, failure = told[0]
        self._raise(failure, error)
        return cast(T, result)

    def _failure(self, error: BaseException | None) -> _Failure | None:
        """What the others are told of this rank's error; it may have been another rank's before."""
        if error is None:
            return None
        if isinstance(error.__cause__, OtherRankError):
            return _Failure(error.__cause__.rank, _picklable(error, self.rank), str(error.__cause__))
        return _Failure(self.rank, _picklable(error, self.rank), "".join(traceback.format_exception(error)))

    def _raise(self, failure: _Failure | None, own_error: BaseException | None) -> None:
        if failure is None:
            return
        if own_error is not None and (failure.rank == self.rank or not isinstance(own_error, Exception)):
            raise own_error
        raise failure.error from OtherRankError(failure.rank, failure.story)


class OtherRankError(CheckpointError):
    """The error that this is the cause of was met on another rank: `rank`, with its traceback."""

    def __init__(self, rank: int, story: str) -> None:
        super().__init__(rank, story)
        self.rank = rank

    def __str__(self) -> str:
        return f"on rank {self.rank}:\n{self.args[1]}"


@dataclass(frozen=True)
class _Failure:
    """An error as it travels between ranks."""

    rank: int
    error: Exception
    story: str


def _attempt(action: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Also what ends a process: the others wait to hear of it, and the caller raises it afterwards."""
    try:
        return action(), None
    except BaseException as error:
        return None, error


@contextlib.contextmanager
def _meeting(error: BaseException | None) -> Iterator[None]:
    """Around a collective. If it fails, this rank's own error is the one to raise."""
    try:
        yield
    except RuntimeError as failure:
        if error is not None:
            raise error from None
        raise CheckpointError(
            "the other ranks can't be reached: one of them has died, or has not called the same method in time (in a "
            f"distributed run every rank has to): {failure}"
        ) from failure


def _picklable(error: BaseException, rank: int) -> Exception:
    if not isinstance(error, Exception):
        return CheckpointError(f"rank {rank} was ended by {error!r}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return CheckpointError(f"{type(error).__name__}: {error}")
    return error


def _checked(result: T) -> T:
    """An error of pickling has to come while it can still be told to the others."""
    pickle.dumps(result)
    return result


def _pack(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    # From our own other ranks, which could run code here anyway: all objects of torch.distributed are unpickled freely.
    return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)


_beside: tuple[object, Any] | None = None


def _group() -> Any:
    """The process group for messages through the host; None is the default one. The first call is collective."""
    global _beside
    if "cpu:" in distributed.get_backend_config() or not distributed.is_gloo_available():
        return None
    default = distributed.group.WORLD
    if _beside is None or _beside[0] is not default:
        _beside = (default, distributed.new_group(backend="gloo"))
    return _beside[1]
