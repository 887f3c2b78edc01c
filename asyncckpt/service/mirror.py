"""The mirror, seen from the trainer: a second place that every checkpoint of a directory comes to. No torch.

A light process of its own does the copying, since a network is no business of a process whose GIL is busy; it goes on
when the trainer ends, until nothing is lacking. Where there can be none, a thread does.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from asyncckpt.errors import CheckpointError
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.backlog import Mirrored
from asyncckpt.registry.retention import RetentionPolicy, to_plain
from asyncckpt.service import exit, messages
from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.messages import (
    Copied,
    Farewell,
    Finish,
    GivenUp,
    Happened,
    Logged,
    PassedOver,
    Poke,
    Progress,
    SetupMirror,
    Unpin,
)
from asyncckpt.service.queue import Emit
from asyncckpt.service.replicator import Replicator, make_replicator
from asyncckpt.service.writer_process import MIRROR_MODULE, WriterProcess, why_not
from asyncckpt.storage.base import Storage
from asyncckpt.threads import log_quietly, logger

_POLL_SECS = 0.02
_MAX_ENDING_SECS = 10.0
_FIRST_PAUSE_SECS = 1.0  # before a process that has died is replaced
_MAX_PAUSE_SECS = 60.0


RunCallback = Callable[[Callable[[], object]], None]


def _call(action: Callable[[], None]) -> None:
    action()


class Mirror:
    """What becomes of a directory's checkpoints in a second place. Thread-safe.

    In a forked child there is no mirror, and nothing is done or waited for: it is the parent's. One that is dropped
    without `close` still brings what is lacking, in the background, and ends then.
    """

    exit_code: int | None = None  # what the mirror lacks at exit, the next run brings there

    def __init__(self, standing: Standing, copier: ThreadCopier | ProcessCopier, exit_timeout_secs: float) -> None:
        self._standing = standing
        self._copier = copier
        self._exit_timeout_secs = exit_timeout_secs
        self._exit_deadline: float | None = None
        self._is_left = False  # to its process
        self._is_closed = False
        self._is_complete = False  # at the end
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _abandon, copier, self._pid)
        self._finalizer.atexit = False
        if not copier.survives_exit:
            exit.register(self)
        self.poke()

    @classmethod
    def in_thread(
        cls,
        setup: SetupMirror,
        retention: RetentionPolicy,
        storages: tuple[Storage, Storage],
        emit: Emit,
        run_callback: RunCallback,
        exit_timeout_secs: float,
    ) -> Mirror:
        """Copied to by a thread of this process."""
        standing = Standing(emit, run_callback)
        replicator = make_replicator(setup, storages, retention, standing, nice=setup.nice)
        return cls(standing, ThreadCopier(replicator, standing), exit_timeout_secs)

    @classmethod
    def in_process(cls, setup: SetupMirror, emit: Emit, run_callback: RunCallback) -> Mirror:
        """Copied to by a process of its own. Raises OSError when that can't be started."""
        standing = Standing(emit, run_callback)
        return cls(standing, ProcessCopier(setup, standing), 0.0)

    @classmethod
    def start(
        cls,
        setup: SetupMirror,
        retention: RetentionPolicy,
        storages: tuple[Storage, Storage],
        emit: Emit,
        run_callback: RunCallback,
        *,
        in_process: bool,
        exit_timeout_secs: float,
    ) -> Mirror:
        """Copied to by a process, if it is wanted and can be had; else by a thread, with a word in the log.

        `storages` are those of the source and of the mirror; `run_callback` runs what users attach to futures.
        """
        if in_process:
            reason = why_not()
            if to_plain(retention) is None:
                reason = f"the retention policy {retention!r} is code that another process does not have"
            try:
                if reason is None:
                    return cls.in_process(setup, emit, run_callback)
            except OSError as error:
                reason = f"the mirror's process can't be started: {error}"
            log_quietly(logging.WARNING, f"{reason}: a thread copies to the mirror, and does not outlive the trainer")
        return cls.in_thread(setup, retention, storages, emit, run_callback, exit_timeout_secs)

    @property
    def mirrored(self) -> Mirrored:
        """How far it has come, as was heard last; what was saved here, and has not arrived, is lacking."""
        mirrored, awaited = self._standing.mirrored, self._standing.awaited
        return replace(mirrored, lacking=mirrored.lacking | awaited) if awaited else mirrored

    @property
    def problem(self) -> Exception | None:
        """What keeps the mirror behind at the moment."""
        return self._standing.problem

    def expect(self, sequence: int, path: str) -> Future[CheckpointInfo | None]:
        """What becomes of a checkpoint that is about to be saved: its place in the mirror, or why it never got there;
        None if it was passed over.

        Before it is submitted, since it may be there at once.
        """
        return self._standing.expect(sequence, path)

    def withdraw(self, sequence: int) -> None:
        """It was not submitted after all."""
        self._standing.withdraw(sequence)

    def follow(self, handle: SaveHandle, sequence: int) -> None:
        """Bring it there once it is durable locally."""
        mirrors, standing = [self], self._standing  # a settled handle must not keep us
        handle.call_at_once(lambda _: mirrors.pop()._note_saved(sequence, handle.failure()))
        handle.add_done_callback(lambda _: standing.tell_failed(sequence))

    def _note_saved(self, sequence: int, error: BaseException | None) -> None:
        """On the thread that settles the save, so it neither blocks nor runs what users have attached to futures."""
        if error is not None:
            self._standing.note_failed(sequence, error)
        self._standing.note_saved(sequence, self.poke())

    def unpin(self, sequences: Sequence[int]) -> None:
        """These are not pinned in the directory any more, which may drop them before anybody looks."""
        if sequences and self._is_ours:
            self._copier.unpin(sequences)

    def wait(self, timeout: float | None) -> bool:
        """Wait until nothing is lacking; False on time-out, or when it is left to its process.

        Whatever was saved before must be durable locally.
        """
        return self._wait(self.poke(), _deadline(timeout), while_down=True)

    def take_losses(self) -> list[Exception]:
        """Why checkpoints never came to the mirror, each told once."""
        return self._standing.take_losses()

    def leave(self) -> None:
        """What is lacking is its process's business now: nothing here waits for it. Without one nothing changes."""
        self._is_left = self._copier.survives_exit

    def close(self, timeout: float | None, call_when_idle: Callable[[Callable[[], None]], object] = _call) -> bool:
        """Bring what is lacking, if that can be done now and in time, and end; False if something is lacking.

        Blocks up to `timeout` seconds. Where the mirror is down, it is tried once more, and left to the next run; where
        there is not enough time, its process goes on alone, as soon as `call_when_idle` says that nothing is being
        saved any more. Futures that are not settled get an error. Safe to call
        twice.
        """
        if self._is_closed or not self._is_ours:
            return True
        deadline = _deadline(timeout)
        number = self.poke(is_hurried=True)
        is_complete = self._wait(number, deadline, while_down=False)
        self._is_closed, self._is_complete = True, is_complete
        self._finalizer.detach()
        if is_complete or self._standing.is_stuck(number):
            self._copier.stop(min(_MAX_ENDING_SECS, _remaining(deadline)))
            who = "the next run brings them there"
        else:
            call_when_idle(self._copier.let_go)
            who = self._copier.who_goes_on
        if not is_complete:
            log_quietly(logging.WARNING, f"the mirror lacks some checkpoints{self._standing.reason}; {who}")
        self._standing.ended()
        return is_complete

    def poke(self, *, is_hurried: bool = False) -> int:
        """Something has changed in the directory; in a hurry, no pause after a failure is waited for.

        Does not block; the number counts these.
        """
        number = next(self._standing.numbers)
        if self._is_ours:
            self._copier.poke(is_hurried=is_hurried)
        return number

    def _wait(self, number: int, deadline: float | None, *, while_down: bool) -> bool:
        standing = self._standing
        while not standing.has_caught_up(number):
            if self._is_closed:
                return self._is_complete
            if self._is_left or not self._is_ours or _remaining(deadline) == 0.0:
                return False
            if not while_down and standing.is_stuck(number):
                return False
            time.sleep(_POLL_SECS)
        return True

    @property
    def _is_ours(self) -> bool:
        return os.getpid() == self._pid

    # --- for the exit module, where a thread copies ---

    def flush_at_exit(self, *, final: bool) -> bool:
        if self._exit_deadline is None:
            self._exit_deadline = time.monotonic() + self._exit_timeout_secs
        number = self.poke(is_hurried=True)
        if not self._is_closed and not self._wait(number, self._exit_deadline, while_down=False) and final:
            text = f"at exit: the mirror lacks some checkpoints{self._standing.reason}; the next run brings them there"
            log_quietly(logging.WARNING, text)
        return True

    def forget_after_fork(self) -> None:
        self._finalizer.detach()


class _Arrival(Future["CheckpointInfo | None"]):
    """Its callbacks run where the saver's do, and hold up nobody who hears the mirror."""

    def __init__(self, run_callback: RunCallback) -> None:
        super().__init__()
        self._run_callback = run_callback
        self.set_running_or_notify_cancel()

    def add_done_callback(self, fn: Callable[[Future[CheckpointInfo | None]], object]) -> None:
        super().add_done_callback(lambda future: self._run_callback(lambda: fn(future)))


class Standing:
    """How things stand with the mirror, as its replicator tells: what the threads hold that hear it, since they must
    not keep the `Mirror` itself."""

    def __init__(self, emit: Emit, run_callback: RunCallback) -> None:
        self.emit = emit
        self._run_callback = run_callback
        self.mirrored = Mirrored()
        self.problem: Exception | None = None
        self.numbers = itertools.count(1)  # of pokes; its `next` is one act, whatever signals come
        self._caught_up_with = 0
        self._tried = 0
        self._futures: dict[int, Future[CheckpointInfo | None]] = {}
        self._failures: dict[int, BaseException] = {}  # of local saves, whose futures don't know it yet
        self._losses: list[Exception] = []
        self._paths: dict[int, str] = {}  # of what is awaited
        self._saved: dict[int, int] = {}  # which of that is durable here, by the poke that says so
        self._replaced: set[int] = set()  # which of that was saved again under the same name

    def expect(self, sequence: int, path: str) -> Future[CheckpointInfo | None]:
        future = _Arrival(self._run_callback)
        self._replaced.update(earlier for earlier, other in list(self._paths.items()) if other == path)
        self._futures[sequence], self._paths[sequence] = future, path
        return future

    def withdraw(self, sequence: int) -> None:
        self._forget(sequence)

    @property
    def awaited(self) -> frozenset[int]:
        """The numbers of what is saved here, or being saved, and has not arrived."""
        return frozenset(list(self._futures))

    def note_saved(self, sequence: int, poke: int) -> None:
        """It is durable here, or has failed: who looks after this poke knows."""
        if sequence in self._futures:
            self._saved[sequence] = poke

    def note_failed(self, sequence: int, error: BaseException) -> None:
        """The local save has failed; somebody else tells its future."""
        self._failures[sequence] = error

    def tell_failed(self, sequence: int) -> None:
        """Tell the future, if the local save has failed and nobody has told it yet."""
        if (error := self._failures.pop(sequence, None)) is not None:
            self._fail(sequence, error)

    def has_caught_up(self, number: int) -> bool:
        """Whether nothing was lacking after this poke."""
        return self._caught_up_with >= number

    def is_stuck(self, number: int) -> bool:
        """Whether it was tried after this poke, and failed."""
        return self.problem is not None and self._tried >= number

    def cannot_try(self, error: Exception) -> None:
        """There is no replicator at the moment."""
        self.problem, self._tried = error, next(self.numbers)

    @property
    def reason(self) -> str:
        """Why something is lacking, for the end of a sentence."""
        return f": {self.problem}" if self.problem is not None else ""

    def take_losses(self) -> list[Exception]:
        losses, self._losses = self._losses, []
        return losses

    # --- what the replicator tells ---

    def copied(self, sequence: int, info: CheckpointInfo) -> None:
        if (future := self._forget(sequence)) is not None:
            future.set_result(info)

    def passed_over(self, sequence: int) -> None:
        if (future := self._forget(sequence)) is not None:
            future.set_result(None)

    def given_up(self, sequence: int, error: Exception) -> None:
        log_quietly(logging.ERROR, str(error))
        self._losses.append(error)
        self._fail(sequence, error)

    def progress(self, mirrored: Mirrored, problem: Exception | None, caught_up_with: int, tried: int) -> None:
        self.mirrored, self.problem = mirrored, problem
        for sequence in [sequence for sequence in list(self._futures) if not mirrored.awaits(sequence)]:
            self.tell_failed(sequence)
            if sequence in self._replaced:
                self.passed_over(sequence)
            elif self._saved.get(sequence, tried + 1) <= tried:  # else it may have come after that look
                self.given_up(sequence, CheckpointError(f"commit {sequence} was dropped before it was mirrored"))
        self._caught_up_with, self._tried = caught_up_with, tried

    def ended(self) -> None:
        for sequence in list(self._futures):
            self.tell_failed(sequence)
            self._fail(sequence, CheckpointError(f"commit {sequence} was not mirrored before the end{self.reason}"))

    def _fail(self, sequence: int, error: BaseException) -> None:
        if (future := self._forget(sequence)) is not None:
            future.set_exception(error)

    def _forget(self, sequence: int) -> Future[CheckpointInfo | None] | None:
        self._paths.pop(sequence, None)
        self._saved.pop(sequence, None)
        self._replaced.discard(sequence)
        return self._futures.pop(sequence, None)


class ThreadCopier:
    """A thread of this process that copies."""

    survives_exit = False
    who_goes_on = "a thread goes on with it, as long as this process lives"

    def __init__(self, replicator: Replicator, standing: Standing) -> None:
        self._replicator = replicator
        self._standing = standing

    def poke(self, *, is_hurried: bool = False) -> None:
        self._replicator.poke(next(self._standing.numbers), is_hurried=is_hurried)

    def unpin(self, sequences: Sequence[int]) -> None:
        self._replicator.unpin(sequences)

    def stop(self, timeout: float) -> None:
        """Bring nothing more, and end."""
        self._replicator.stop()
        self._replicator.join(timeout)

    def finish(self) -> None:
        """Bring what is lacking, and end. Does not wait."""
        self._replicator.finish()

    let_go = finish


class ProcessCopier:
    """A process that copies, replaced when it dies, and the thread that hears it.

    Only one poke is under way, unless it is in a hurry: what comes meanwhile goes when that has been answered, so that
    a process that hears nothing at the moment holds up nobody.
    """

    survives_exit = True
    who_goes_on = "its process goes on alone"

    def __init__(self, setup: SetupMirror, standing: Standing) -> None:
        self._setup = setup
        self._standing = standing
        self._is_stopped = False
        self._is_unsent = False  # a poke
        self._is_hurried = False  # no pause is waited for
        self._sent = 0
        self._answered = 0
        self._unpinned: list[int] = []
        self._process: WriterProcess | None = self._start()
        self._thread = threading.Thread(target=self._serve, name="asyncckpt-mirror", daemon=True)
        self._thread.start()

    def poke(self, *, is_hurried: bool = False) -> None:
        self._is_unsent = True
        self._is_hurried = self._is_hurried or is_hurried
        if is_hurried or self._sent <= self._answered:
            self._send_poke(is_hurried=is_hurried)

    def _send_poke(self, *, is_hurried: bool = False) -> None:
        self._is_unsent = False
        self._sent = number = next(self._standing.numbers)  # above that of whoever waits
        self._send(Poke(number, is_hurried))

    def _send(self, message: messages.Message) -> None:
        if (process := self._process) is not None:
            process.connection.send(messages.encode(message))

    def unpin(self, sequences: Sequence[int]) -> None:
        self._unpinned.extend(sequences)
        self._send(Unpin(list(sequences)))

    @property
    def pid(self) -> int | None:
        """The process's id; None while there is none."""
        process = self._process
        return process.pid if process is not None else None

    def stop(self, timeout: float) -> None:
        """Bring nothing more, and end."""
        self._is_stopped = True
        self._send(Farewell())
        self._hang_up()
        self._thread.join(timeout)

    def finish(self) -> None:
        """Bring what is lacking, tell of it, and end. Does not wait."""
        self._is_stopped = True
        self._send(Finish())

    def let_go(self) -> None:
        """As when the trainer has ended: the process brings what is lacking, alone, once nobody saves any more."""
        self._is_stopped = True
        self._hang_up()

    def _hang_up(self) -> None:
        if (process := self._process) is not None:
            process.hang_up()

    def _start(self) -> WriterProcess:
        process = WriterProcess(MIRROR_MODULE)
        process.connection.send(messages.encode(self._setup))
        return process

    def _serve(self) -> None:
        pause = 0.0
        while (process := self._process) is not None:
            while process.connection.wait(process.pidfd) or process.connection.has_more():
                received = process.connection.receive()
                if received is None:
                    break
                try:
                    message = messages.decode_from_mirror(received[0])
                    self._hear(message)
                except Exception:  # of another version, say: the next process may be of ours
                    logger.exception("what the mirror's process says is not understood")
                    process.kill()
                    break
                if isinstance(message, Progress):
                    pause = 0.0
            process.wait()
            if self._is_stopped:
                break
            what = f"the mirror's process {process.pid} {process.describe_end()}"
            log_quietly(logging.WARNING, what)
            if pause > 0.0:  # as the one before, and nothing has come of it
                self._standing.cannot_try(CheckpointError(what))
            pause = min(max(2 * pause, _FIRST_PAUSE_SECS), _MAX_PAUSE_SECS)
            self._start_another(pause)
        self._standing.ended()

    def _start_another(self, pause: float) -> None:
        self._process = None
        while not self._is_stopped:
            deadline = time.monotonic() + pause
            while not (self._is_stopped or self._is_hurried) and time.monotonic() < deadline:
                time.sleep(_POLL_SECS)
            self._is_hurried = False
            try:
                self._process = self._start()
            except OSError as error:
                log_quietly(logging.WARNING, f"the mirror's process can't be started: {error}")
                self._standing.cannot_try(error)
                pause = _MAX_PAUSE_SECS
                continue
            self._send(Unpin(self._unpinned))  # what was sent to an earlier one may not have come to it
            self._send_poke()
            if self._is_stopped:
                self._hang_up()
            return

    def _hear(self, message: messages.FromMirror) -> None:
        standing = self._standing
        if isinstance(message, Copied):
            standing.copied(message.sequence, message.info)
        elif isinstance(message, PassedOver):
            standing.passed_over(message.sequence)
        elif isinstance(message, GivenUp):
            standing.given_up(message.sequence, messages.rebuild_error(message.error))
        elif isinstance(message, Progress):
            problem = messages.rebuild_error(message.problem) if message.problem is not None else None
            standing.progress(message.mirrored, problem, message.caught_up_with, message.tried)
            self._answered = message.tried
            if self._is_unsent and self._sent <= self._answered:
                self._send_poke()
        elif isinstance(message, Logged):
            log_quietly(message.level, message.text)
        elif isinstance(message, Happened):
            standing.emit(message.kind, os.fsdecode(message.path), message.detail)


def _abandon(copier: ThreadCopier | ProcessCopier, pid: int) -> None:
    """A mirror was dropped without `close()`: what is lacking still comes there, then everything is given back."""
    if os.getpid() == pid:
        copier.finish()


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _remaining(deadline: float | None) -> float:
    return math.inf if deadline is None else max(0.0, deadline - time.monotonic())
