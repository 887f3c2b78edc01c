"""The mirror, seen from the trainer: a second place that every checkpoint of a directory comes to. No torch.

A light process of its own does the copying, since a network is no business of a process whose GIL is busy; it goes on
when the trainer ends, until nothing is lacking. Where there can be none, a thread does.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from concurrent.futures import Future

from asyncckpt.errors import CheckpointError
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.replication import Replica
from asyncckpt.registry.retention import RetentionPolicy, to_plain
from asyncckpt.service import messages
from asyncckpt.service.messages import Copied, Farewell, GivenUp, Happened, Logged, Poke, Progress, SetupMirror
from asyncckpt.service.queue import Emit
from asyncckpt.service.replicator import Replicator, make_replica
from asyncckpt.service.writer_process import MIRROR_MODULE, WriterProcess, why_not
from asyncckpt.storage.base import Storage
from asyncckpt.threads import log_quietly

_POLL_SECS = 0.02
_MAX_ENDING_SECS = 10.0
_FIRST_PAUSE_SECS = 1.0  # before a process that has died is replaced
_MAX_PAUSE_SECS = 60.0


class Mirror:
    """What becomes of a directory's checkpoints in a second place. Thread-safe.

    `mirrored` is the sequence number up to which everything has arrived, or will never arrive (it was dropped before);
    0 as long as that is not known. `problem` is what keeps the mirror behind at the moment. In a forked child there is
    no mirror, and nothing is done or waited for: it is the parent's.
    """

    def __init__(self, emit: Emit) -> None:
        self.mirrored = 0
        self.problem: Exception | None = None
        self.emit = emit
        self._futures: dict[int, Future[CheckpointInfo]] = {}
        self._pokes = itertools.count(1)  # its `next` is one act, whatever signals come
        self._caught_up_with = 0
        self._is_closed = False
        self._pid = os.getpid()
        self._copier: ThreadCopier | ProcessCopier

    @classmethod
    def in_thread(cls, replica: Replica, emit: Emit, nice: int) -> Mirror:
        """Copied to by a thread of this process."""
        mirror = cls(emit)
        mirror._copier = ThreadCopier(Replicator(replica, mirror, nice=nice))
        mirror.poke()
        return mirror

    @classmethod
    def in_process(cls, setup: SetupMirror, emit: Emit) -> Mirror:
        """Copied to by a process of its own. Raises OSError when that can't be started."""
        mirror = cls(emit)
        mirror._copier = ProcessCopier(setup, mirror)
        mirror.poke()
        return mirror

    @classmethod
    def start(
        cls, setup: SetupMirror, retention: RetentionPolicy, storage: Storage, emit: Emit, *, in_process: bool
    ) -> Mirror:
        """Copied to by a process, if it is wanted and can be had; else by a thread, with a word in the log."""
        if in_process:
            reason = why_not()
            if to_plain(retention) is None:
                reason = f"the retention policy {retention!r} is code that another process does not have"
            try:
                if reason is None:
                    return cls.in_process(setup, emit)
            except OSError as error:
                reason = f"the mirror's process can't be started: {error}"
            log_quietly(logging.WARNING, f"{reason}: a thread copies to the mirror, and does not outlive the trainer")
        return cls.in_thread(make_replica(setup, storage, retention), emit, setup.nice)

    def expect(self, sequence: int) -> Future[CheckpointInfo]:
        """What becomes of a checkpoint that is being saved: its place in the mirror, or why it never got there."""
        future: Future[CheckpointInfo] = Future()
        future.set_running_or_notify_cancel()
        self._futures[sequence] = future
        return future

    def note_saved(self, sequence: int, error: BaseException | None) -> None:
        """The local save has settled."""
        if error is not None and (future := self._futures.pop(sequence, None)) is not None:
            future.set_exception(error)
        self.poke()

    def wait(self, timeout: float | None, *, while_down: bool = True) -> bool:
        """Wait until nothing is lacking; False on time-out, or, unless `while_down`, when nothing can be brought there.

        Whatever was saved before must be durable locally.
        """
        if not self._is_ours:
            return False
        deadline = None if timeout is None else time.monotonic() + timeout
        number = self.poke()
        while self._caught_up_with < number:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            if (self.problem is not None and not while_down) or self._is_closed:
                return False
            time.sleep(_POLL_SECS)
        return True

    def close(self, timeout: float | None) -> bool:
        """Bring what is lacking, if that can be done now and in time, and end; False if something is lacking.

        Safe to call twice.
        """
        if self._is_closed or not self._is_ours:
            return True
        is_complete = self.wait(timeout, while_down=False)
        self._is_closed = True
        self._copier.stop(_MAX_ENDING_SECS if timeout is None else timeout)
        if not is_complete:
            reason = f": {self.problem}" if self.problem is not None else ""
            log_quietly(logging.WARNING, f"the mirror lacks some checkpoints{reason}; the next run brings them there")
        return is_complete

    def poke(self) -> int:
        """Something has changed in the directory. Does not block; the number counts these."""
        number = next(self._pokes)
        if self._is_ours:
            self._copier.poke(number)
        return number

    @property
    def _is_ours(self) -> bool:
        return os.getpid() == self._pid

    # --- what the replicator tells ---

    def copied(self, sequence: int, info: CheckpointInfo) -> None:
        if (future := self._futures.pop(sequence, None)) is not None:
            future.set_result(info)

    def given_up(self, sequence: int, error: Exception) -> None:
        log_quietly(logging.ERROR, str(error))
        if (future := self._futures.pop(sequence, None)) is not None:
            future.set_exception(error)

    def progress(self, mirrored: int, problem: Exception | None, caught_up_with: int) -> None:
        self.mirrored, self.problem = mirrored, problem
        for sequence in [sequence for sequence in list(self._futures) if sequence <= mirrored]:
            self.given_up(sequence, CheckpointError(f"commit {sequence} was dropped before it was mirrored"))
        self._caught_up_with = caught_up_with


class ThreadCopier:
    """A thread of this process that copies."""

    def __init__(self, replicator: Replicator) -> None:
        self._replicator = replicator
        self.poke = replicator.poke

    def stop(self, timeout: float) -> None:
        self._replicator.stop()
        self._replicator.join(timeout)


class ProcessCopier:
    """A process that copies, replaced when it dies, and the thread that hears it."""

    def __init__(self, setup: SetupMirror, mirror: Mirror) -> None:
        self._setup = setup
        self._mirror = mirror
        self._is_stopped = False
        self._newest_poke = 0
        self._process: WriterProcess | None = self._start()
        self._thread = threading.Thread(target=self._serve, name="asyncckpt-mirror", daemon=True)
        self._thread.start()

    def poke(self, number: int) -> None:
        self._newest_poke = max(self._newest_poke, number)
        if (process := self._process) is not None:
            process.connection.send(messages.encode(Poke(number)))

    @property
    def pid(self) -> int | None:
        """The process's id; None while there is none."""
        process = self._process
        return process.pid if process is not None else None

    def stop(self, timeout: float) -> None:
        self._is_stopped = True
        if (process := self._process) is not None:
            process.connection.send(messages.encode(Farewell()))
            process.hang_up()
        self._thread.join(timeout)

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
                pause = 0.0
                self._hear(messages.decode_from_mirror(received[0]))
            process.wait()
            if self._is_stopped:
                return
            log_quietly(logging.WARNING, f"the mirror's process {process.pid} {process.describe_end()}")
            pause = min(max(2 * pause, _FIRST_PAUSE_SECS), _MAX_PAUSE_SECS)
            self._process = self._start_another(pause)

    def _start_another(self, pause: float) -> WriterProcess | None:
        while not self._is_stopped:
            deadline = time.monotonic() + pause
            while not self._is_stopped and time.monotonic() < deadline:
                time.sleep(_POLL_SECS)
            try:
                process = self._start()
            except OSError as error:
                log_quietly(logging.WARNING, f"the mirror's process can't be started: {error}")
                pause = _MAX_PAUSE_SECS
                continue
            process.connection.send(messages.encode(Poke(self._newest_poke)))
            return process
        return None

    def _hear(self, message: messages.FromMirror) -> None:
        mirror = self._mirror
        if isinstance(message, Copied):
            mirror.copied(message.sequence, message.info)
        elif isinstance(message, GivenUp):
            mirror.given_up(message.sequence, messages.rebuild_error(message.error))
        elif isinstance(message, Progress):
            problem = messages.rebuild_error(message.problem) if message.problem is not None else None
            mirror.progress(message.mirrored, problem, message.caught_up_with)
        elif isinstance(message, Logged):
            log_quietly(message.level, message.text)
        elif isinstance(message, Happened):
            mirror.emit(message.kind, os.fsdecode(message.path), message.detail)
