"""The replicator: brings what a replica lacks, for as long as it takes. No torch.

While the replica's place does not answer, what it lacks waits, and is brought there when it answers again, or by the
next run.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from typing import Protocol

from asyncckpt.errors import CheckpointError, CorruptCheckpointError
from asyncckpt.events import EventKind
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.files import NameTakenError
from asyncckpt.registry.mirror_note import NoteWriter
from asyncckpt.registry.replication import Replica
from asyncckpt.registry.retention import RetentionPolicy
from asyncckpt.service.messages import SetupMirror
from asyncckpt.storage.base import Storage
from asyncckpt.threads import log_quietly, lower_priority

_FIRST_PAUSE_SECS = 1.0
_MAX_PAUSE_SECS = 60.0
_POLL_SECS = 0.02


class Listener(Protocol):
    """Who is told what becomes of the mirror's checkpoints; called on the replicator's thread."""

    def emit(self, kind: EventKind, path: str, detail: str) -> None: ...

    def copied(self, sequence: int, info: CheckpointInfo) -> None:
        """It is in the mirror, durable and listed."""

    def given_up(self, sequence: int, error: Exception) -> None:
        """It will never be there."""

    def progress(self, mirrored: int, problem: Exception | None, caught_up_with: int, tried: int) -> None:
        """Everything up to `mirrored` is settled, and all that there was at that poke; what keeps the rest waiting.

        `tried` is the last poke after which something was tried, with success or not.
        """

    def ended(self) -> None:
        """Nothing more will be told."""


class Replicator:
    """One thread that copies when it is poked. Thread-safe."""

    def __init__(self, replica: Replica, listener: Listener, note: NoteWriter, *, nice: int) -> None:
        self._replica = replica
        self._listener = listener
        self._note = note
        self._nice = nice
        self._pokes: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._newest_poke = 0  # for who pokes from one thread, and asks whether that is done
        self._taken_poke = 0
        self._caught_up_with = 0
        self._tried = 0
        self._mirrored = 0
        self._problem: Exception | None = None
        self._is_stopped = False
        self._is_hurried = False
        self._is_finishing = False
        self._given_up: set[int] = set()
        self._doubtful: int | None = None  # the number of what was being copied last, until that is known to be there
        self._thread = threading.Thread(target=self._run, name="asyncckpt-replicator", daemon=True)
        self._thread.start()

    def poke(self, number: int, *, is_hurried: bool = False) -> None:
        """There may be something to copy. Numbers grow, but may come in another order. In a hurry, no pause after a
        failure is waited for."""
        self._pokes.put(number)
        self._newest_poke = max(self._newest_poke, number)
        if is_hurried:
            self._is_hurried = True

    def await_source(self) -> None:
        """Wait for who finishes the checkpoints of a trainer that has ended."""
        self._replica.await_source()

    def finish(self) -> None:
        """End once nothing is lacking, or what is lacking can't be brought. Does not wait."""
        self._newest_poke = number = self._newest_poke + 1  # before it is asked whether that is done
        self._is_finishing = True
        self.poke(number, is_hurried=True)

    def stop(self) -> None:
        """End after the checkpoint that is being copied."""
        self._is_stopped = True
        self._pokes.put(0)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread to end; False on time-out."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        lower_priority(self._nice)
        pause = 0.0
        while self._await_poke(pause):
            try:
                if self._catch_up():
                    pause, self._problem, self._caught_up_with = 0.0, None, self._taken_poke
            except (OSError, CheckpointError) as error:
                pause = _next_pause(pause)
                self._note_problem(error)
            except Exception as error:  # a policy of the user's, a mistake of ours: whoever waits must hear of it
                pause = _next_pause(pause)
                problem = CheckpointError(f"{type(error).__name__}: {error}")
                problem.__cause__ = error
                self._note_problem(problem)
            self._tried = self._taken_poke
            self._tell_progress()
            if self._is_finishing and self._tried >= self._newest_poke:
                break
        try:
            self._replica.close()
        except Exception as error:
            log_quietly(logging.WARNING, f"the mirror could not be given back: {error}")
        self._listener.ended()

    def _await_poke(self, pause: float) -> bool:
        """After a failure only the pause is waited for. False when it is to end."""
        deadline = time.monotonic() + pause
        while not self._is_stopped and not self._is_hurried and (rest := deadline - time.monotonic()) > 0:
            time.sleep(min(rest, _POLL_SECS))
        self._is_hurried = False  # before its poke is taken
        if pause == 0.0:
            self._taken_poke = max(self._taken_poke, self._pokes.get())
        while not self._pokes.empty():
            self._taken_poke = max(self._taken_poke, self._pokes.get())
        return not self._is_stopped

    def _catch_up(self) -> bool:
        """Copy what is lacking; False if it was stopped before."""
        lacking = [info for info in self._replica.lacking() if info.sequence not in self._given_up]
        self._settle_doubtful()
        self._note_mirrored(lacking)
        for number, info in enumerate(lacking):
            if self._is_stopped:
                return False
            self._copy(info)
            self._note_mirrored(lacking[number + 1 :])
            self._tell_progress()
        return True

    def _copy(self, info: CheckpointInfo) -> None:
        assert info.sequence is not None
        self._doubtful = info.sequence
        try:
            copied = self._replica.copy(info)
        except (CorruptCheckpointError, NameTakenError) as error:
            self._given_up.add(info.sequence)
            self._listener.given_up(info.sequence, error)
            return
        if copied is None:
            gone = CheckpointError(f"{info.filepath} was deleted before it was mirrored")
            self._listener.given_up(info.sequence, gone)
            return
        self._tell_copied(copied)

    def _settle_doubtful(self) -> None:
        """What was being copied when it failed may have arrived all the same."""
        if self._doubtful is not None and (copied := self._replica.find(self._doubtful)) is not None:
            self._tell_copied(copied)

    def _tell_copied(self, info: CheckpointInfo) -> None:
        assert info.sequence is not None
        self._doubtful = None
        self._listener.copied(info.sequence, info)
        self._listener.emit("mirrored", str(info.filepath), "")

    def _note_mirrored(self, lacking: list[CheckpointInfo]) -> None:
        rest = [info.sequence for info in lacking if info.sequence is not None]
        self._mirrored = min(rest) - 1 if rest else self._replica.last_sequence

    def _note_problem(self, error: Exception) -> None:
        if str(error) != str(self._problem):
            log_quietly(logging.WARNING, f"the mirror does not take anything at the moment: {error}; tried again")
            self._listener.emit("mirror_failed", "", str(error))
        self._problem = error

    def _tell_progress(self) -> None:
        self._note.tell(self._mirrored, self._problem)
        self._listener.progress(self._mirrored, self._problem, self._caught_up_with, self._tried)


def _next_pause(pause: float) -> float:
    return min(max(2 * pause, _FIRST_PAUSE_SECS), _MAX_PAUSE_SECS)


def make_replicator(
    setup: SetupMirror, storage: Storage, retention: RetentionPolicy, listener: Listener, *, nice: int
) -> Replicator:
    """What a mirror's setup describes, but for what it can't always say."""
    source = CheckpointDirectory(os.fsdecode(setup.source), storage)
    target = CheckpointDirectory(
        os.fsdecode(setup.target),
        storage,
        retention=retention,
        metric=setup.metric,
        mode=setup.mode,
        lock_timeout_secs=setup.lock_timeout_secs,
    )
    note = NoteWriter(storage, source.path, target.path)
    return Replicator(Replica(source, storage, target), listener, note, nice=nice)
