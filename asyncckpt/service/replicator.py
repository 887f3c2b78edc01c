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
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from asyncckpt.errors import CheckpointError, CorruptCheckpointError
from asyncckpt.events import EventKind
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.backlog import Backlog, Mirrored
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.files import LinkTakenError, NameTakenError
from asyncckpt.registry.mirror_note import NoteWriter
from asyncckpt.registry.replication import ReplacedError, Replica
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

    def passed_over(self, sequence: int) -> None:
        """It is not brought there: the mirror's retention would delete it at once, or it was saved again since."""

    def given_up(self, sequence: int, error: Exception) -> None:
        """It will never be there."""

    def progress(self, mirrored: Mirrored, problem: Exception | None, caught_up_with: int, tried: int) -> None:
        """How far the mirror is, and what keeps the rest waiting.

        All is settled that there was at the poke `caught_up_with`; `tried` is the last poke after which something was
        tried, with success or not.
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
        self._mirrored = Mirrored()
        self._problem: Exception | None = None
        self._is_stopped = False
        self._is_hurried = False
        self._is_finishing = False
        self._given_up: set[int] = set()
        self._unpinned: set[int] = set()  # and not yet in the mirror
        self._passed_over: frozenset[int] = frozenset()
        self._num_copied = 0
        self._failures: Counter[int] = Counter()  # of what could not be copied so far
        self._took_newest = False
        self._told: set[int] = set()  # the numbers of what is there
        self._thread = threading.Thread(target=self._run, name="asyncckpt-replicator", daemon=True)
        self._thread.start()

    def poke(self, number: int, *, is_hurried: bool = False) -> None:
        """There may be something to copy. Numbers grow, but may come in another order. In a hurry, no pause after a
        failure is waited for."""
        self._pokes.put(number)
        self._newest_poke = max(self._newest_poke, number)
        if is_hurried:
            self._is_hurried = True

    def unpin(self, sequences: Iterable[int]) -> None:
        """These are not pinned in the source any more, which may drop them before it is looked at."""
        self._unpinned.update(sequences)

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
            num_copied = self._num_copied
            try:
                if self._catch_up():
                    pause, self._problem, self._caught_up_with = 0.0, None, self._taken_poke
            except Exception as error:
                pause = _next_pause(pause if self._num_copied == num_copied else 0.0)
                self._note_problem(error)
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
        """Copy until all is there that is lacking now; False if it was stopped before.

        Training goes on, so that after each copy what is lacking then is looked up.
        """
        backlog = self._look()
        goal = backlog.mirrored.lacking
        failed: dict[int, Exception] = {}
        while wanted := [info for info in backlog.wanted if info.sequence not in failed]:
            if goal.isdisjoint(info.sequence for info in wanted):
                break
            if self._is_stopped:
                return False
            info = self._choose(wanted, backlog.last)
            try:
                self._copy(info)
            except Exception as error:
                if failed:  # one of them may be to blame, of two it is the mirror
                    raise
                failed[info.sequence or 0] = error
            backlog = self._look()
            if not self._failures:
                self._problem = None
            self._tell_progress()
        if failed:
            raise next(iter(failed.values()))
        return True

    def _look(self) -> Backlog:
        """What is to be copied now."""
        unpinned = frozenset(self._unpinned)
        backlog = self._replica.look(self._given_up, unpinned)
        if backlog.there:
            self._unpinned.difference_update(unpinned)
        for info in backlog.there:  # also what another process has brought; what failed may have arrived all the same
            if info.sequence is not None and info.sequence not in self._told:
                self._tell_copied(info.sequence, self._replica.locate(info), is_ours=info.sequence in self._failures)
        for sequence in sorted(backlog.unwanted - self._passed_over):
            self._listener.passed_over(sequence)
        self._passed_over = backlog.unwanted
        self._mirrored = backlog.mirrored
        for sequence in self._failures.keys() - self._mirrored.lacking:
            del self._failures[sequence]
        return backlog

    def _choose(self, wanted: Sequence[CheckpointInfo], last: int) -> CheckpointInfo:
        """The newest of the run, which the loss of this machine would cost; but never twice in a row, and else the
        oldest, which is to be deleted soonest. What could not be copied goes last, and holds up nothing else."""
        fewest = min(self._failures[info.sequence or 0] for info in wanted)
        promising = [info for info in wanted if self._failures[info.sequence or 0] == fewest]
        is_newest_lacking = promising[-1].sequence == last
        self._took_newest = is_newest_lacking and not self._took_newest
        return promising[-1 if self._took_newest else 0]

    def _copy(self, info: CheckpointInfo) -> None:
        assert info.sequence is not None
        try:
            copied = self._replica.copy(info)
        except LinkTakenError:  # it is there
            raise
        except (CorruptCheckpointError, NameTakenError) as error:
            self._give_up(info.sequence, error)
        except ReplacedError:
            self._given_up.add(info.sequence)
            self._listener.passed_over(info.sequence)
        except Exception:
            self._failures[info.sequence] += 1
            raise
        else:
            if copied is not None:
                self._num_copied += 1
                self._tell_copied(info.sequence, copied, is_ours=True)
            else:
                self._give_up(info.sequence, CheckpointError(f"{info.filepath} was deleted before it was mirrored"))

    def _give_up(self, sequence: int, error: Exception) -> None:
        self._given_up.add(sequence)
        self._listener.given_up(sequence, error)

    def _tell_copied(self, sequence: int, info: CheckpointInfo, *, is_ours: bool) -> None:
        self._told.add(sequence)
        self._listener.copied(sequence, info)
        if is_ours:
            self._listener.emit("mirrored", str(info.filepath), "")

    def _note_problem(self, error: Exception) -> None:
        if not isinstance(error, OSError | CheckpointError):  # a policy of the user's, a mistake of ours
            cause = error
            error = CheckpointError(f"{type(cause).__name__}: {cause}")
            error.__cause__ = cause
        if str(error) != str(self._problem):
            log_quietly(logging.WARNING, f"the mirror does not take everything at the moment: {error}; tried again")
            self._listener.emit("mirror_failed", "", str(error))
        self._problem = error

    def _tell_progress(self) -> None:
        self._note.tell(self._mirrored, self._problem)
        self._listener.progress(self._mirrored, self._problem, self._caught_up_with, self._tried)


def _next_pause(pause: float) -> float:
    return min(max(2 * pause, _FIRST_PAUSE_SECS), _MAX_PAUSE_SECS)


def make_replicator(
    setup: SetupMirror, storages: tuple[Storage, Storage], retention: RetentionPolicy, listener: Listener, *, nice: int
) -> Replicator:
    """What a mirror's setup describes, but for what it can't always say: how to open the source, and the target."""
    source = CheckpointDirectory(os.fsdecode(setup.source), storages[0])
    target = CheckpointDirectory(
        os.fsdecode(setup.target),
        storages[1],
        retention=retention,
        metric=setup.metric,
        mode=setup.mode,
        lock_timeout_secs=setup.lock_timeout_secs,
    )
    note = NoteWriter(source.storage, source.path, target.path)
    return Replicator(Replica(source, target), listener, note, nice=nice)
