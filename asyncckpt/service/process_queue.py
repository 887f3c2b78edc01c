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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from asyncckpt.errors import CheckpointError, CheckpointWriteError
from asyncckpt.events import EventKind
from asyncckpt.image.checksum import StagedImage
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.retention import to_plain
from asyncckpt.service import messages
from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.messages import (
    AskCommit,
    Begun,
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
    """A save that the writer has not finished. `torn` is why it must not commit."""

    number: int
    submission: Submission
    is_sent: bool = False
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


class ProcessQueue:
    """As `SaveQueue`, which it takes for what can't be handed over; its writer process is started at once. Thread-safe.

    Raises OSError when the process can't be started.
    """

    def __init__(self, local: SaveQueue, setup: Setup, emit: Emit) -> None:
        self._local = local
        self._setup = setup
        self._emit = emit
        self._lock = threading.RLock()  # reentrant, since signal handlers may save; held for moments
        self._changed = threading.Condition(self._lock)
        self._entries: dict[int, _Entry] = {}
        self._numbers = itertools.count(1)
        self._num_exclusive = 0
        self._num_failed_starts = 0
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
    def pid(self) -> int | None:
        """The writer's process id; None if there is none."""
        process = self._process
        return process.pid if process is not None else None

    # --- from the trainer ---

    def submit(self, submission: Submission) -> None:
        """Queue a save. `handle.is_submitted` says, also after Ctrl-C in here, whether it is on its way."""
        if self._is_local(submission):
            submission.handle.is_submitted = True
            self._local.run(lambda: self._exclusively(lambda: self._local.carry_out(submission)))
            return
        entry = _Entry(next(self._numbers), submission)
        try:
            self._entries[entry.number] = entry
            submission.handle.is_submitted = True
            self._send(entry)
        except BaseException:
            self._send(entry)  # what the writer has heard already counts once
            raise

    def staged(self, handle: SaveHandle) -> None:
        """The handle's image is complete, or given up. On return it is in the writer's hands."""
        for entry in list(self._entries.values()):
            if entry.submission.handle is handle:
                self._send_staged(entry)

    def run(self, action: Callable[[], object]) -> None:
        """Run `action` on a worker of this process, once the writer has finished what it has. Does not wait."""
        self._local.run(lambda: self._exclusively(action))

    def hurry(self) -> None:
        """No more pauses between retries."""
        self._in_hurry = True
        self._local.hurry()
        self._tell(Hurry())

    def stop(self) -> None:
        """End threads and process once they have finished what was submitted. Does not wait."""
        self._local.stop()
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._hang_up_if_over()
        self._replies.stop()

    def leave(self) -> None:
        """This process ends: the writer is on its own."""
        if (process := self._process) is not None:
            process.leave()

    # --- what this process writes itself ---

    def _is_local(self, submission: Submission) -> bool:
        """Whether threads of this process have to write it; says why, once, where the user can do something."""
        if self._process is None and self._num_failed_starts >= _MAX_FAILED_STARTS:
            return True
        image, listing = submission.image, submission.listing
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

    def _exclusively(self, action: Callable[[], object]) -> None:
        with self._changed:
            self._num_exclusive += 1
            self._changed.wait_for(lambda: not any(entry.is_sent for entry in list(self._entries.values())))
        try:
            action()
        finally:
            with self._changed:
                self._num_exclusive -= 1
            for entry in list(self._entries.values()):
                self._send(entry)

    # --- to the writer ---

    def _start(self) -> WriterProcess:
        process = WriterProcess()
        process.connection.send(messages.encode(self._setup))
        if self._in_hurry:
            process.connection.send(messages.encode(Hurry()))
        return process

    def _tell(self, message: Message, *fds: int) -> None:
        process = self._process
        if process is not None:
            process.connection.send(messages.encode(message), fds)

    def _send(self, entry: _Entry, *, again: bool = False) -> None:
        with self._lock:
            process = self._process
            if process is None or (entry.is_sent and not again) or (self._num_exclusive and not entry.is_sent):
                return
            submission = entry.submission
            planned: PlannedListing | None = None
            if (listing := submission.listing) is not None:
                self._grant(process, listing.directory)
                damaged = sorted(listing.directory.damaged)
                planned = PlannedListing(id(listing.directory), listing.info, listing.run_id, damaged)
            self._tell(Submit(entry.number, os.fsencode(entry.path), planned))
            entry.is_sent = True
        if submission.image.is_complete:
            self._send_staged(entry)

    def _grant(self, process: WriterProcess, directory: CheckpointDirectory) -> None:
        """Let the writer write the directory; again if this process has written it since."""
        number, generation = id(directory), directory.generation
        if process.generations.get(number) == generation:
            return
        grant = Grant(
            directory=number,
            generation=generation,
            path=os.fsencode(directory.path),
            retention=to_plain(directory.retention) if directory.retention is not None else None,
            metric=directory.metric,
            mode=directory.mode,
            state=directory.state,
        )
        process.connection.send(messages.encode(grant), (directory.share_lock(),))
        process.generations[number] = generation

    def _send_staged(self, entry: _Entry) -> None:
        image = entry.submission.image
        try:
            source, arena = image.wait(), image.arena
            with self._lock:
                process = self._process
                if process is None or not entry.is_sent or arena is None or arena.fd is None:
                    return
                assert isinstance(source, StagedImage)
                if arena.number not in process.arenas:
                    process.connection.send(messages.encode(ShareArena(arena.number)), (arena.fd,))
                    process.arenas.add(arena.number)
                    arena.before_close(partial(self._tell, ForgetArena(arena.number)))
                records = [(record.name, record.num_bytes) for record in source.layout.records]
                self._tell(Staged(entry.number, arena.number, records))
        except BaseException as error:
            self._tell(GiveUp(entry.number))
            self._conclude(entry, None, error)

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
            self._num_failed_starts = 0
        elif isinstance(message, Happened):
            self._emit(message.kind, os.fsdecode(message.path), message.detail)
        elif isinstance(message, messages.Logged):
            log_quietly(message.level, message.text)
        elif (entry := self._entries.get(message.save)) is None:
            return  # it was given up
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
        with self._changed:
            self._entries.pop(entry.number, None)
            self._changed.notify_all()
        entry.submission.finish()
        self._hang_up_if_over()

    def _conclude(self, entry: _Entry, info: CheckpointInfo | None, error: BaseException | None) -> None:
        """Settle and finish a save that the writer will say no more of."""
        if not entry.is_settled:
            self._acknowledge(entry, info, error)
        self._finish(entry)

    @property
    def _is_over(self) -> bool:
        return self._is_stopping and not self._entries

    def _hang_up_if_over(self) -> None:
        if self._is_over and (process := self._process) is not None:
            process.hang_up()

    # --- when the writer dies ---

    def _replace(self, dead: WriterProcess) -> None:
        """Start another one, from the images that are still mapped here; on the thread that hears the writer."""
        with self._lock:
            self._process = None
        dead.wait()
        ending = dead.describe_end()
        self._report("writer_died", f"the writer process {dead.pid} {ending}")
        self._num_failed_starts += 1
        unfinished = list(self._entries.values())
        for entry in unfinished:
            entry.num_deaths += entry.is_begun and not entry.is_settled
            entry.is_begun = False
        self._recover(unfinished)
        for entry in [entry for entry in self._entries.values() if entry.num_deaths >= _MAX_DEATHS]:
            message = f"{entry.path} was not saved: the writer process died {entry.num_deaths} times while writing it"
            self._conclude(entry, None, CheckpointWriteError(f"{message}; the last one {ending}"))
        self._start_another()

    def _recover(self, entries: Iterable[_Entry]) -> None:
        """Find out what the dead one has committed: the directories and their files say so."""
        by_directory: dict[CheckpointDirectory, list[_Entry]] = {}
        for entry in entries:
            if entry.directory is not None and entry.is_sent:
                by_directory.setdefault(entry.directory, []).append(entry)
            elif entry.is_settled:
                self._conclude(entry, None, None)
        for directory, own in by_directory.items():
            try:
                directory.recover()
            except CheckpointError as error:
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

    def _start_another(self) -> None:
        process: WriterProcess | None = None
        while process is None and self._num_failed_starts < _MAX_FAILED_STARTS:
            try:
                process = self._start()
            except OSError as error:
                self._num_failed_starts += 1
                self._report("writer_died", f"a writer process can't be started: {error}")
        if process is None:
            self._report("writer_died", "checkpoints are written by threads from now on, which end with the trainer")
            for entry in list(self._entries.values()):
                self._entries.pop(entry.number, None)
                self._local.submit(entry.submission)
            with self._changed:
                self._changed.notify_all()
            return
        with self._lock:
            self._process = process
        for entry in list(self._entries.values()):
            self._send(entry, again=True)
        self._hang_up_if_over()

    def _report(self, kind: EventKind, detail: str) -> None:
        log_quietly(logging.WARNING, detail)
        self._emit(kind, "", detail)
