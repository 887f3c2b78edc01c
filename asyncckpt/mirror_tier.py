"""A manager's mirror, as a second tier: looked at before a run begins, started by its first save, waited for, closed.

No torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from asyncckpt.errors import CheckpointError, WaitTimeoutError
from asyncckpt.naming import JOURNALS_NAME
from asyncckpt.paths import scheme_of
from asyncckpt.registry.backlog import Mirrored, backlog_of
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.registry import Registry
from asyncckpt.registry.retention import to_plain
from asyncckpt.service.messages import SetupMirror
from asyncckpt.service.mirror import Mirror, RunCallback
from asyncckpt.service.queue import Emit
from asyncckpt.storage.bounded import BoundedStorage, NoAnswerError
from asyncckpt.storage.journal import journals_directory
from asyncckpt.storage.places import full_path, one_spelling
from asyncckpt.threads import log_quietly

T = TypeVar("T")

_MAX_LOOK_SECS = 10.0  # what a save spends on looking at a mirror that does not answer, once
_MAX_RESOLVE_SECS = 2.0  # what a manager spends on finding out where a path leads
MAX_BACKLOG_BYTES = 2**63 - 1


@dataclass(frozen=True)
class MirrorOptions:
    """How a mirror is copied to."""

    in_process: bool  # if the places can be had in another one
    nice: int
    lock_timeout_secs: float
    exit_timeout_secs: float


class MirrorTier:
    """The second place of a manager's checkpoints. `directory` is its; `source` is the manager's own. Thread-safe, but
    for `running`."""

    def __init__(
        self,
        directory: CheckpointDirectory,
        source: CheckpointDirectory,
        options: MirrorOptions,
        emit: Emit,
        run_callback: RunCallback,
    ) -> None:
        self.directory = directory
        self._source = source
        self._options = options
        self._emit = emit
        self._run_callback = run_callback
        self._mirror: Mirror | None = None

    # --- before a run begins ---

    def look(self) -> Registry | None:
        """What it holds; None, with a warning, if it does not say. Blocks for a short time.

        For a run whose own directory is empty: it goes on with what is found here. If nothing is, a new one begins: its
        checkpoints are durable locally, but never come to a mirror that turns out to hold another run.
        """
        try:
            return self._ask()
        except (OSError, CheckpointError) as error:
            problem = error
        here, there = self._source.path, self.directory.path
        log_quietly(
            logging.WARNING,
            f"{here} is empty, and its mirror {there} can't be looked at ({problem}): a NEW run begins. Should the "
            "mirror hold checkpoints already, they are left alone, and nothing of this run comes there; to go on with "
            f"them, stop, move {here} away, and start again when it answers",
        )
        self._emit("mirror_failed", there, f"a new run begins without it: {problem}")
        return None

    def find_mirrored(self, source: Registry) -> Mirrored:
        """How far it has come; asked, for a short time, if nothing has been heard of it yet."""
        if self._mirror is not None and self._mirror.mirrored.last:
            return self._mirror.mirrored
        with contextlib.suppress(OSError, CheckpointError):
            found = self._ask()
            if found.run_id == source.run_id:
                return backlog_of(source, found, self.directory.retention).mirrored
        return Mirrored()

    def _ask(self) -> Registry:
        try:
            return _ask_apart(lambda: self.directory.read().registry, _MAX_LOOK_SECS)
        except NoAnswerError:
            raise CheckpointError(f"it has not answered for {_MAX_LOOK_SECS:g} s") from None

    # --- while a run is under way ---

    @property
    def started(self) -> Mirror | None:
        """The mirror, if it has been started."""
        return self._mirror

    def running(self) -> Mirror:
        """The mirror, started if it was not: from now on it is brought what it lacks. For one thread at a time."""
        if self._mirror is None:
            self._mirror = self._start()
        return self._mirror

    def _start(self) -> Mirror:
        retention, options = self.directory.retention, self._options
        here, there = self._source.storage, self.directory.storage
        assert retention is not None
        setup = SetupMirror(
            source=os.fsencode(self._source.path),
            target=os.fsencode(self.directory.path),
            retention=to_plain(retention) or [],
            metric=self.directory.metric or "",
            mode=self.directory.mode or "",
            lock_timeout_secs=options.lock_timeout_secs,
            nice=options.nice,
            source_options=here.plain_options,
            target_options=there.plain_options,
            journals=journals_directory() if scheme_of(self._source.path) else self._source.path_of(JOURNALS_NAME),
        )
        return Mirror.start(
            setup,
            retention,
            (here, there),
            self._emit,
            self._run_callback,
            in_process=options.in_process
            and here.is_shared(self._source.path)
            and there.is_shared(self.directory.path),
            exit_timeout_secs=options.exit_timeout_secs,
        )

    def wait(self, deadline: float | None) -> None:
        """Return once nothing is lacking. Raises `WaitTimeoutError`, and what never came there, once."""
        mirror = self.running()
        if not mirror.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
            reason = f": {mirror.problem}" if mirror.problem is not None else ""
            raise WaitTimeoutError(f"the mirror does not have everything yet{reason}")
        _raise_losses(mirror.take_losses())

    # --- the end ---

    def leave(self) -> None:
        """What is lacking is its process's business from now on."""
        if self._mirror is not None:
            self._mirror.leave()

    def close(self, deadline: float | None, call_when_idle: Callable[[Callable[[], None]], object]) -> None:
        """What it does not take now is left to its process, once nothing is being saved, or to the next run."""
        if self._mirror is not None:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._mirror.close(timeout, call_when_idle)


def mirror_place(mirror: str | os.PathLike[str], directory: str) -> str:
    """The full path, or URL, of a mirror of `directory`. Raises as `full_path` does; ValueError if it is the same."""
    place = full_path(mirror, "mirror")
    is_same = one_spelling(place) == one_spelling(directory)
    if not scheme_of(place) and not scheme_of(directory):
        with contextlib.suppress(NoAnswerError, OSError):
            is_same = _ask_apart(lambda: os.path.realpath(place) == os.path.realpath(directory), _MAX_RESOLVE_SECS)
    if is_same:
        raise ValueError(f"the mirror must be another place than checkpoint_dir, not {place!r} again")
    return place


def check_backlog(num_bytes: int) -> None:
    """Raise TypeError or ValueError if that is no size of a backlog."""
    if not isinstance(num_bytes, int) or isinstance(num_bytes, bool):
        raise TypeError(f"mirror_backlog_bytes must be an int, not {type(num_bytes).__name__}")
    if not 0 <= num_bytes <= MAX_BACKLOG_BYTES:
        raise ValueError(f"mirror_backlog_bytes must be from 0 to {MAX_BACKLOG_BYTES}, not {num_bytes}")


def _raise_losses(losses: list[Exception]) -> None:
    if len(losses) == 1:
        raise losses[0]
    if losses:
        raise CheckpointError(
            f"{len(losses)} checkpoints never came to the mirror; the first: {losses[0]}"
        ) from losses[0]


def _ask_apart(question: Callable[[], T], max_secs: float) -> T:
    """On a thread of its own: a mirror's silence is not that of the directory. Raises `NoAnswerError`."""
    asking = BoundedStorage()
    try:
        return asking.ask(question, max_secs)
    finally:
        asking.end(_nothing)


def _nothing() -> None:
    pass
