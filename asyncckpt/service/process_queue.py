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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from asyncckpt.errors import CheckpointWriteError
from asyncckpt.events import EventKind
from asyncckpt.image.checksum import StagedImage
from asyncckpt.paths import scheme_of
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.retention import to_plain
from asyncckpt.service import messages
from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.messages import (
    AskCommit,
    Begun,
    Farewell,
    Finished,
    ForgetArena,
    FromWriter,
    GiveUp,
    Grant,
    Happened,
    Hello,
    Hurry,
    MayCommit,
    Message,
    PlannedListing,
    Settled,
    Setup,
    ShareArena,
    Staged,
    Submit,
)
from asyncckpt.service.queue import Emit, SaveQueue, Submission
from asyncckpt.service.worker import forget_frames
from asyncckpt.service.writer_process import WriterProcess
from asyncckpt.threads import ThreadGroup, log_quietly

_MAX_DEATHS = 3  # of writers, on one image
_MAX_FAILED_STARTS = 3
_MAX_ENDING_SECS = 10.0


@dataclass(eq=False)
class _Entry:
    """A save for the writer, until it is finished. `torn` is why it must not commit."""

    number: int
    submission: Submission
    is_started: bool = False  # the writer has been told of it
    is_handed_over: bool = False  # and has its image
    is_begun: bool = False
    is_settled: bool = False
    num_deaths: int = 0
    torn: BaseException | None = None

    @property
    def path(self) -> str:
        return self.submission.handle.path

    @property
    def directory(self) -> CheckpointDirectory | None:
        listing = self.submission.listing
        return listing.directory if listing is not None else None


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
        self._setup = setup
        self._emit = emit
        self._lock = threading.RLock()  # reentrant, since signal handlers may save; held for moments
        self._entries: dict[int, _Entry | _Work] = {}
        self._numbers = itertools.count(1)
        self._is_ready = False  # the process has said so
        self._num_failed_starts = 0
        self._has_given_up = False
        self._is_stopping = self._in_hurry = False
        self._told: set[str] = set()
        self._process: WriterProcess | None = self._start()
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
        return self.survives_exit and all(isinstance(entry, _Entry) and entry.is_handed_over for entry in entries)

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
                is_local = self._is_local(submission)
                self._entries[number] = self._local_save(number, submission) if is_local else _Entry(number, submission)
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
        self._in_hurry = True
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

    def _next(self) -> Iterator[_Entry | _Work]:
        """What need not wait: the first in line, and those behind it of the same kind."""
        kind: type | None = None
        for entry in list(self._entries.values()):
            kind = kind or type(entry)
            if type(entry) is not kind:
                return
            yield entry

    def _advance(self) -> None:
        """Start everything whose turn it is, and hand over the images that are complete."""
        failed: list[tuple[_Entry, Exception]] = []
        with self._lock:
            for entry in self._next():
                if isinstance(entry, _Work):
                    self._local.put(self._start_works)
                    break
                try:
                    self._send(entry)
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
                process.connection.send(messages.encode(Farewell()))
                process.hang_up()

    # --- what this process writes itself ---

    def _is_local(self, submission: Submission) -> bool:
        """Whether threads of this process have to write it; says why, once, where the user can do something."""
        if self._has_given_up:
            return True
        image, listing, path = submission.image, submission.listing, submission.handle.path
        if not self._local.storage.is_shared(path):
            scheme = scheme_of(path)
            self._tell_once(f"the writer process can't open {scheme}:// as this one does, by class or storage_options")
            return True
        if listing is not None and (policy := listing.directory.retention) is not None and to_plain(policy) is None:
            self._tell_once(f"the retention policy {policy!r} is code that the writer process does not have")
            return True
        if not isinstance(image.source, StagedImage):
            return True
        if image.arena is None or image.arena.fd is None:
            self._tell_once("memory can't be shared with the writer process here (memfd is forbidden, or ulimit -f)")
            return True
        return False

    def _tell_once(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            log_quietly(logging.WARNING, f"{reason}: threads write these checkpoints, and don't outlive the trainer")

    def _local_save(self, number: int, submission: Submission) -> _Work:
        finish = submission.finish

        def finish_and_forget() -> None:
            finish()
            self._forget(number)

        submission = replace(submission, finish=finish_and_forget)
        return _Work(number, lambda: self._local.submit(submission))

    # --- to the writer ---

    def _start(self) -> WriterProcess:
        process = WriterProcess()
        self._is_ready = False
        process.connection.send(messages.encode(self._setup))
        if self._in_hurry:
            process.connection.send(messages.encode(Hurry()))
        return process

    def _tell(self, message: Message, *fds: int) -> None:
        process = self._process
        if process is not None:
            process.connection.send(messages.encode(message), fds)

    def _send(self, entry: _Entry) -> None:
        """Tell the writer what it does not know of the save yet. Raises what went wrong while staging."""
        process = self._process
        if process is None:
            return
        submission = entry.submission
        submission.handle.is_submitted = True  # before it can be over, for `submit` that is interrupted
        if not entry.is_started:
            planned: PlannedListing | None = None
            if (listing := submission.listing) is not None:
                self._grant(process, listing.directory)
                damaged = sorted(listing.directory.damaged)
                planned = PlannedListing(
                    id(listing.directory),
                    listing.info,
                    listing.run_id,
                    listing.is_certain,
                    damaged,
                    listing.directory.mirrored,
                )
            self._tell(Submit(entry.number, os.fsencode(entry.path), planned))
            entry.is_started = True
        if not entry.is_handed_over and submission.image.is_complete:
            self._send_image(entry, process)
            entry.is_handed_over = True

    def _grant(self, process: WriterProcess, directory: CheckpointDirectory) -> None:
        """Let the writer write the directory; again if this process has written it since."""
        number, generation = id(directory), directory.generation
        if process.generations.get(number) == generation:
            return
        lock = directory.share_lock()
        grant = Grant(
            directory=number,
            generation=generation,
            path=os.fsencode(directory.path),
            retention=to_plain(directory.retention) if directory.retention is not None else None,
            metric=directory.metric,
            mode=directory.mode,
            state=directory.state,
            lock=lock if isinstance(lock, bytes) else None,
            mirror_backlog_bytes=directory.mirror_backlog_bytes,
        )
        process.connection.send(messages.encode(grant), (lock,) if isinstance(lock, int) else ())
        process.generations[number] = generation

    def _send_image(self, entry: _Entry, process: WriterProcess) -> None:
        image = entry.submission.image
        source, arena = image.wait(), image.arena
        assert isinstance(source, StagedImage)
        assert arena is not None
        assert arena.fd is not None
        if arena.number not in process.arenas:
            process.connection.send(messages.encode(ShareArena(arena.number)), (arena.fd,))
            process.arenas.add(arena.number)
            arena.before_close(partial(self._tell, ForgetArena(arena.number)))
        records = [(record.name, record.num_bytes) for record in source.layout.records]
        self._tell(Staged(entry.number, arena.number, records))

    # --- from the writer ---

    def _serve(self) -> None:
        while (process := self._process) is not None:
            while process.connection.wait(process.pidfd) or process.connection.has_more():
                received = process.connection.receive()
                if received is None:
                    break
                try:
                    self._hear(messages.decode_from_writer(received[0]))
                except Exception:
                    logging.getLogger("asyncckpt").exception("an answer of the writer process can't be used")
            if self._is_over:
                process.wait(_MAX_ENDING_SECS)
                return
            self._replace(process)

    def _hear(self, message: FromWriter) -> None:
        if isinstance(message, Hello):
            self._is_ready, self._num_failed_starts = True, 0
        elif isinstance(message, Happened):
            self._emit(message.kind, os.fsdecode(message.path), message.detail)
        elif isinstance(message, messages.Logged):
            log_quietly(message.level, message.text)
        elif not isinstance(entry := self._entries.get(message.save), _Entry):  # it was given up
            if isinstance(message, AskCommit):
                self._tell(MayCommit(message.save, False))
        elif isinstance(message, Begun):
            entry.is_begun = True
        elif isinstance(message, AskCommit):
            self._answer(entry)
        elif isinstance(message, Settled):
            self._settle(entry, message)
        elif isinstance(message, Finished):
            if entry.directory is not None and message.state is not None:
                entry.directory.learn(message.state)
            self._finish(entry)

    def _answer(self, entry: _Entry) -> None:
        try:
            entry.submission.image.check()
        except BaseException as error:
            forget_frames(error)
            entry.torn = error
        self._tell(MayCommit(entry.number, entry.torn is None))

    def _settle(self, entry: _Entry, message: Settled) -> None:
        if entry.is_settled:
            return
        timings = entry.submission.handle.timings
        for name, secs in message.timings.items():
            setattr(timings, name, secs)
        if entry.directory is not None and message.state is not None:
            entry.directory.learn(message.state)
        error = entry.torn or (messages.rebuild_error(message.error) if message.error is not None else None)
        self._acknowledge(entry, message.info, error)

    def _acknowledge(self, entry: _Entry, info: CheckpointInfo | None, error: BaseException | None) -> None:
        entry.is_settled = True
        if error is not None:
            forget_frames(error)
        entry.submission.image.release()
        if error is not None and (listing := entry.submission.listing) is not None:
            listing.directory.withdraw(listing)
        entry.submission.settle(info, error)

    def _finish(self, entry: _Entry) -> None:
        entry.submission.finish()
        self._forget(entry.number)

    def _conclude(self, entry: _Entry, info: CheckpointInfo | None, error: BaseException | None) -> None:
        """Settle and finish a save that the writer will say no more of."""
        if not entry.is_settled:
            self._acknowledge(entry, info, error)
        self._finish(entry)

    # --- when the writer dies ---

    def _replace(self, dead: WriterProcess) -> None:
        """Start another one, from the images that are still mapped here; on the thread that hears the writer."""
        with self._lock:
            self._process = None
            unfinished = [entry for entry in self._entries.values() if isinstance(entry, _Entry) and entry.is_started]
        dead.wait()
        ending = dead.describe_end()
        self._report("writer_died", f"the writer process {dead.pid} {ending}")
        if self._is_ready:
            _count_death(unfinished)
        else:  # it has not looked at an image yet
            self._num_failed_starts += 1
        self._recover(unfinished)
        for entry in [entry for entry in unfinished if entry.num_deaths >= _MAX_DEATHS and not entry.is_settled]:
            message = f"{entry.path} was not saved: the writer process died {entry.num_deaths} times while writing it"
            self._conclude(entry, None, CheckpointWriteError(f"{message}; the last one {ending}"))
        process = self._start_another()
        with self._lock:
            for entry in unfinished:
                entry.is_started = entry.is_handed_over = entry.is_begun = False
            self._process = process
            if process is None:
                self._give_up()
        self._advance()
        self._end_if_over()

    def _recover(self, entries: Iterable[_Entry]) -> None:
        """Find out what the dead one has committed: the directories and their files say so."""
        by_directory: dict[CheckpointDirectory, list[_Entry]] = {}
        for entry in entries:
            if entry.directory is not None:
                by_directory.setdefault(entry.directory, []).append(entry)
            elif entry.is_settled:
                self._conclude(entry, None, None)
        for directory, own in by_directory.items():
            try:
                directory.recover()
            except Exception as error:
                directory.close()  # the next save opens it anew
                for entry in own:
                    self._conclude(entry, None, error)
                continue
            listed = {info.sequence: info for info in directory.registry.checkpoints}
            for entry in own:
                listing = entry.submission.listing
                info = listed.get(listing.info.sequence) if listing is not None else None
                if info is not None or entry.is_settled:
                    self._conclude(entry, directory.locate(info) if info is not None else None, None)

    def _start_another(self) -> WriterProcess | None:
        while self._num_failed_starts < _MAX_FAILED_STARTS:
            try:
                return self._start()
            except OSError as error:
                self._num_failed_starts += 1
                self._report("writer_died", f"a writer process can't be started: {error}")
        return None

    def _give_up(self) -> None:
        """No writer process can be had: threads write what is left, and whatever comes."""
        self._report("writer_died", "checkpoints are written by threads from now on, which end with the trainer")
        self._has_given_up = True
        for number, entry in self._entries.items():
            if isinstance(entry, _Entry):
                self._entries[number] = self._local_save(number, entry.submission)

    def _report(self, kind: EventKind, detail: str) -> None:
        log_quietly(logging.WARNING, detail)
        self._emit(kind, "", detail)


def _count_death(unfinished: Sequence[_Entry]) -> None:
    """Against the saves that the writer had begun; if there are none, those whose images it was given."""
    waiting = [entry for entry in unfinished if entry.is_handed_over and not entry.is_settled]
    for entry in [entry for entry in waiting if entry.is_begun] or waiting:
        entry.num_deaths += 1
