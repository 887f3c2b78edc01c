"""The queue whose saves a writer process carries out: the trainer's side. No torch.

Nothing is waited for here but the hand-over itself: a save is the writer's as soon as its image is complete, so that it
becomes durable though the trainer be killed in the next moment. A writer that dies is replaced, and told again what it
had not finished. What can't be handed over is written by this process's own threads, while the writer does nothing.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from asyncckpt.records import CheckpointInfo
from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.handover import Handover
from asyncckpt.service.messages import (
    AskCommit,
    Begun,
    Farewell,
    Finished,
    FromWriter,
    GiveUp,
    Happened,
    Hello,
    Hurry,
    Logged,
    MayCommit,
    Message,
    Settled,
    Setup,
    decode_from_writer,
    encode,
)
from asyncckpt.service.obstacles import Obstacles
from asyncckpt.service.queue import Emit, SaveQueue, Submission
from asyncckpt.service.succession import Succession, conclude_committed, conclude_deadly
from asyncckpt.service.writer_process import WriterProcess
from asyncckpt.threads import ThreadGroup, log_quietly

_MAX_ENDING_SECS = 10.0


@dataclass(eq=False)
class _Work:
    """What threads of this process do, until it is done: a save that can't be handed over, or something else."""

    number: int
    start: Callable[[], object]
    is_started: bool = False


class ProcessQueue:
    """As `SaveQueue`, which it takes for what can't be handed over; its writer process is started at once. Thread-safe.

    Everything has its turn in `_entries`: the writer and our own threads never work at the same time, so that each
    finds the directory as the other has left it, and commits keep their order.

    Raises OSError when the process can't be started.
    """

    def __init__(self, local: SaveQueue, setup: Setup, emit: Emit) -> None:
        self._local = local
        self._emit = emit
        self._lock = threading.RLock()  # reentrant, since signal handlers may save; held for moments
        self._entries: dict[int, Handover | _Work] = {}
        self._numbers = itertools.count(1)
        self._has_given_up = self._is_stopping = False
        self._obstacles = Obstacles()
        self._succession = Succession(setup, emit)
        self._process: WriterProcess | None = self._succession.start()
        self._replies = ThreadGroup("replies", 1)
        self.thread_groups = (*local.thread_groups, self._replies)
        self._replies.put(self._serve)

    @property
    def survives_exit(self) -> bool:
        """Whether what is staged becomes durable though this process ends."""
        return self._process is not None

    @property
    def is_handed_over(self) -> bool:
        """Whether the writer has everything that is in flight, and needs this process no more."""
        entries = list(self._entries.values())
        return self.survives_exit and all(isinstance(entry, Handover) and entry.is_handed_over for entry in entries)

    @property
    def pid(self) -> int | None:
        """The writer's process id; None if there is none."""
        process = self._process
        return process.pid if process is not None else None

    # --- from the trainer ---

    def submit(self, submission: Submission) -> None:
        """Queue a save. `handle.is_submitted` says, also after Ctrl-C in here, whether it is on its way."""
        number = next(self._numbers)
        try:
            with self._lock:
                is_local = self._has_given_up or self._obstacles.hinder(submission, self._local.storage)
                entry = self._local_save(number, submission) if is_local else Handover(number, submission)
                self._entries[number] = entry
            submission.handle.is_submitted = True
            self._advance()
        except BaseException:
            if number in self._entries:
                submission.handle.is_submitted = True
                self._advance()  # whatever is said or put twice counts once
            raise

    def staged(self, handle: SaveHandle) -> None:
        """The handle's image is complete, or given up. On return it is in the writer's hands, if it is its turn."""
        self._advance()

    def run(self, action: Callable[[], object], name: str, path: str) -> None:
        """Run `action` on a worker of this process, once the writer has finished what it has. Does not wait."""
        number = next(self._numbers)

        def run() -> None:
            try:
                action()
            finally:
                self._forget(number)

        with self._lock:
            self._entries[number] = _Work(number, lambda: self._local.run(run, name, path))
        self._advance()

    def hurry(self) -> None:
        """No more pauses between retries."""
        self._succession.hurry()
        self._local.hurry()
        self._tell(Hurry())

    def stop(self) -> None:
        """End threads and process once they have finished what was submitted. Does not wait."""
        self._is_stopping = True
        self._end_if_over()

    def leave(self) -> None:
        """This process ends: the writer is on its own."""
        if (process := self._process) is not None:
            process.leave()

    # --- whose turn it is ---

    def _next(self) -> Iterator[Handover | _Work]:
        """What need not wait: the first in line, and those behind it of the same kind."""
        kind: type | None = None
        for entry in list(self._entries.values()):
            kind = kind or type(entry)
            if type(entry) is not kind:
                return
            yield entry

    def _advance(self) -> None:
        """Start everything whose turn it is, and hand over the images that are complete."""
        failed: list[tuple[Handover, Exception]] = []
        with self._lock:
            for entry in self._next():
                if isinstance(entry, _Work):
                    self._local.put(self._start_works)
                    break
                if (process := self._process) is None:
                    continue
                try:
                    entry.advance(process, self._tell)
                except Exception as error:
                    del self._entries[entry.number]
                    failed.append((entry, error))
                    self._tell(GiveUp(entry.number))
        for entry, problem in failed:  # without the lock: the saver has one of its own
            self._conclude(entry, None, problem)

    def _start_works(self) -> None:
        """On a worker, which no signal handler interrupts, so that each is started once."""
        with self._lock:
            for work in self._next():
                if isinstance(work, _Work) and not work.is_started:
                    work.is_started = True
                    work.start()

    def _forget(self, number: int) -> None:
        with self._lock:
            self._entries.pop(number, None)
        self._advance()
        self._end_if_over()

    @property
    def _is_over(self) -> bool:
        return self._is_stopping and not self._entries

    def _end_if_over(self) -> None:
        if self._is_over:
            self._local.stop()
            self._replies.stop()
            if (process := self._process) is not None:
                process.connection.send(encode(Farewell()))
                process.hang_up()

    def _local_save(self, number: int, submission: Submission) -> _Work:
        finish = submission.finish

        def finish_and_forget() -> None:
            finish()
            self._forget(number)

        submission = replace(submission, finish=finish_and_forget)
        return _Work(number, lambda: self._local.submit(submission))

    # --- to the writer, and from it ---

    def _tell(self, message: Message) -> None:
        process = self._process
        if process is not None:
            process.connection.send(encode(message))

    def _serve(self) -> None:
        while (process := self._process) is not None:
            while process.connection.wait(process.pidfd) or process.connection.has_more():
                received = process.connection.receive()
                if received is None:
                    break
                try:
                    self._hear(decode_from_writer(received[0]))
                except Exception:
                    logging.getLogger("asyncckpt").exception("an answer of the writer process can't be used")
            if self._is_over:
                process.wait(_MAX_ENDING_SECS)
                return
            self._replace(process)

    def _hear(self, message: FromWriter) -> None:
        if isinstance(message, Hello):
            self._succession.welcome()
        elif isinstance(message, Happened):
            self._emit(message.kind, os.fsdecode(message.path), message.detail)
        elif isinstance(message, Logged):
            log_quietly(message.level, message.text)
        elif not isinstance(entry := self._entries.get(message.save), Handover):  # it was given up
            if isinstance(message, AskCommit):
                self._tell(MayCommit(message.save, False))
        elif isinstance(message, Begun):
            entry.is_begun = True
        elif isinstance(message, AskCommit):
            self._tell(MayCommit(entry.number, entry.may_commit()))
        elif isinstance(message, Settled):
            entry.settle(message)
        elif isinstance(message, Finished):
            entry.learn(message.state)
            self._finish(entry)

    def _finish(self, entry: Handover) -> None:
        entry.submission.finish()
        self._forget(entry.number)

    def _conclude(self, entry: Handover, info: CheckpointInfo | None, error: BaseException | None) -> None:
        """Settle and finish a save that the writer will say no more of."""
        if not entry.is_settled:
            entry.acknowledge(info, error)
        self._finish(entry)

    # --- when the writer dies ---

    def _replace(self, dead: WriterProcess) -> None:
        """Start another one, from the images that are still mapped here; on the thread that hears the writer."""
        with self._lock:
            self._process = None
            unfinished = [entry for entry in self._entries.values() if isinstance(entry, Handover) and entry.is_started]
        ending = self._succession.bury(dead, unfinished)
        conclude_committed(unfinished, self._conclude)
        conclude_deadly(unfinished, ending, self._conclude)
        process = self._succession.start_another()
        with self._lock:
            for entry in unfinished:
                entry.start_anew()
            self._process = process
            if process is None:
                self._give_up()
        self._advance()
        self._end_if_over()

    def _give_up(self) -> None:
        """No writer process can be had: threads write what is left, and whatever comes."""
        self._succession.report("checkpoints are written by threads from now on, which end with the trainer")
        self._has_given_up = True
        for number, entry in self._entries.items():
            if isinstance(entry, Handover):
                self._entries[number] = self._local_save(number, entry.submission)
