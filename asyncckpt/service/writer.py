"""The writer process: takes images that the trainer staged, and does with them what worker threads would do. No torch.

When the trainer ends, however it ends, the writer finishes what was fully staged, and then ends too.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from asyncckpt.events import EventKind
from asyncckpt.image.arena import Arena
from asyncckpt.image.checksum import ImageSource, StagedImage
from asyncckpt.image.layout import plan_layout
from asyncckpt.naming import WRITER_LOG_PREFIX
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory, Listing, WriterState
from asyncckpt.registry.retention import from_plain
from asyncckpt.service import messages
from asyncckpt.service.connection import Connection
from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.messages import (
    AskCommit,
    Begun,
    Farewell,
    Finished,
    ForgetArena,
    GiveUp,
    Grant,
    Happened,
    Hello,
    Hurry,
    Logged,
    MayCommit,
    Message,
    Settled,
    Setup,
    ShareArena,
    Staged,
    Submit,
    plain_text,
)
from asyncckpt.service.queue import SaveQueue, Submission
from asyncckpt.storage.places import Places
from asyncckpt.threads import logger, lower_priority

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# What the writer knows of a save's timings; the rest is the trainer's.
TIMINGS = ("queue_secs", "checksum_secs", "write_secs", "sync_secs", "commit_secs", "stalled_secs")

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_BEST_EFFORT_LOWEST = 2 << 13 | 7
_OOM_SCORE_STEP = 500
_MAX_CLOSE_SECS = 2.0  # threads that hang must not keep the process


def main(connection_fd: int, trainer_fd: int) -> None:
    """Run until the trainer ends, or hangs up, and all is written. `trainer_fd` is its pidfd."""
    run_process(connection_fd, lambda connection: Writer(connection, trainer_fd).run())


def run_process(connection_fd: int, run: Callable[[Connection], object]) -> None:
    """All of a process of ours; what is meant for the trainer does not end it."""
    for number in IGNORED_SIGNALS:  # what is meant for the trainer's process group, terminal or job step
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)  # blocked while the trainer started us
    connection = Connection(socket.socket(fileno=connection_fd))
    run(connection)
    logging.shutdown()
    _remove_empty_log()
    os._exit(0)  # nothing is left to be done, and threads that hang in a system call must not keep us


def step_back(nice: int) -> None:
    """Let training have the cores and the disk first, and the out-of-memory killer take the trainer first."""
    lower_priority(nice)  # before there are threads, which inherit it
    if nice:
        # Our own session has a scheduling group of its own, which shares the cores as equals unless it steps back too.
        _write_figure("/proc/self/autogroup", nice)
        if number := _IOPRIO_SET.get(os.uname().machine):
            ctypes.CDLL(None).syscall(number, 1, 0, _BEST_EFFORT_LOWEST)
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/oom_score_adj") as file:
            score = int(file.read())
        _write_figure("/proc/self/oom_score_adj", max(-1000, score - _OOM_SCORE_STEP))


def _write_figure(path: str, figure: int) -> None:
    with contextlib.suppress(OSError), open(path, "w") as file:
        file.write(str(figure))


def _remove_empty_log() -> None:
    """Who started us does so too, unless it has ended before."""
    with contextlib.suppress(OSError):
        path, status = os.readlink("/proc/self/fd/2"), os.fstat(2)
        if (
            stat.S_ISREG(status.st_mode)
            and status.st_size == 0
            and os.path.basename(path).startswith(WRITER_LOG_PREFIX)
        ):
            os.unlink(path)


class NotStagedError(Exception):
    """The trainer ended before the image was complete."""


@dataclass(eq=False)
class RemoteImage:
    """A `PendingImage` whose bytes another process stages."""

    save: int
    writer: Writer
    source: StagedImage | None = None
    arena: Arena | None = None  # the writer's to look after
    is_allowed: bool = False
    staged: threading.Event = field(default_factory=threading.Event)
    answered: threading.Event = field(default_factory=threading.Event)

    @property
    def is_complete(self) -> bool:
        return self.staged.is_set()

    def wait(self) -> ImageSource:
        self.staged.wait()
        if self.source is None:
            raise NotStagedError
        self.writer.send(Begun(self.save))
        return self.source

    def check(self) -> None:
        """Ask the trainer, who alone can see whether somebody wrote to its tensors meanwhile.

        Once it has died nobody can tell; but then the fence and the comparison after the copy have held.
        """
        self.writer.send(AskCommit(self.save))
        self.answered.wait()
        if not self.is_allowed:
            raise NotStagedError

    def answer(self, allowed: bool) -> None:
        self.is_allowed = allowed
        self.answered.set()

    def release(self) -> None:
        self.source = None  # the arena is the trainer's to reuse


class Writer:
    """Receives on the main thread; everything else happens on the queue's workers."""

    def __init__(self, connection: Connection, trainer_fd: int) -> None:
        self._connection = connection
        self._trainer_fd = trainer_fd
        self._is_orphan = False
        self._is_over = False  # the trainer needs us no more, and lives on
        self._queue: SaveQueue | None = None
        self._storage = Places()
        self._arenas: dict[int, Arena] = {}
        self._directories: dict[int, tuple[int, CheckpointDirectory]] = {}
        self._images: dict[int, RemoteImage] = {}  # of saves that are not settled
        self._seen: set[int] = set()
        self._unfinished: set[int] = set()
        self._changed = threading.Condition()
        self._telling = threading.Lock()  # what is said of a directory's state is said in the order of its changes

    def run(self) -> None:
        logger.addHandler(Forwarder(self))
        logger.setLevel(logging.INFO)
        while self._connection.wait(self._trainer_fd):
            received = self._connection.receive()
            if received is None:
                break
            self._take(received)
        self._finish_alone()
        if self._queue is not None:  # uploads are still being closed, for which no save waits
            self._queue.stop()
            for group in self._queue.thread_groups:
                group.join(_MAX_CLOSE_SECS)

    def _finish_alone(self) -> None:
        """The trainer has ended or hung up; what it said before is still to be heard."""
        while self._connection.has_more():
            received = self._connection.receive()
            if received is None:
                break
            self._take(received)
        self._is_orphan = True
        self._connection.shut_down()  # a forked child of the trainer's may have the other end, and never receive
        with self._changed:
            unfinished = len(self._unfinished)
            images = list(self._images.values())
        if not self._is_over:  # else the last save's worker may just not have crossed it off yet
            if unfinished:
                logger.warning("the trainer has ended; finishing what it had staged (%d saves)", unfinished)
            for _, directory in self._directories.values():
                directory.inherit()
        for image in images:
            image.staged.set()  # what is not complete by now never will be
            image.answer(True)
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished)
        for _, directory in self._directories.values():
            directory.close()

    def send(self, message: Message) -> None:
        """Tell the trainer, if it still listens."""
        self._connection.send(messages.encode(message))

    @property
    def is_orphan(self) -> bool:
        return self._is_orphan

    # --- what the trainer says ---

    def _take(self, received: tuple[bytes, list[int]]) -> None:
        body, fds = received
        message = messages.decode_to_writer(body)
        if isinstance(message, Setup):
            step_back(message.nice)
            self._storage = Places(message.storage_options, message.journals, never_forks=True)
            self._queue = SaveQueue(
                self._storage,
                message.num_workers,
                nice=0,
                retries=message.retries,
                verify_after_save=message.verify_after_save,
                stall_timeout_secs=message.stall_timeout_secs,
                emit=self._emit,
            )
            self.send(Hello())
        elif isinstance(message, ShareArena):
            self._map_arena(message.arena, fds.pop())
        elif isinstance(message, ForgetArena):
            if (arena := self._arenas.pop(message.arena, None)) is not None:
                arena.close()
        elif isinstance(message, Grant):
            self._be_writer(message, fds.pop() if message.lock is None else message.lock)
        elif isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Staged):
            self._note_staged(message)
        elif isinstance(message, GiveUp):
            if (image := self._images.get(message.save)) is not None:
                image.staged.set()
        elif isinstance(message, MayCommit):
            if (image := self._images.get(message.save)) is not None:
                image.answer(message.allowed)
        elif isinstance(message, Hurry):
            self._own_queue().hurry()
        elif isinstance(message, Farewell):
            self._is_over = True
        for fd in fds:
            os.close(fd)

    def _own_queue(self) -> SaveQueue:
        assert self._queue is not None, "the trainer's first message is Setup"
        return self._queue

    def _map_arena(self, number: int, fd: int) -> None:
        if number in self._arenas:
            os.close(fd)
        else:
            self._arenas[number] = Arena.received(fd)

    def _be_writer(self, grant: Grant, lock: int | bytes) -> None:
        generation, directory = self._directories.get(grant.directory, (0, None))
        if grant.generation <= generation:
            if isinstance(lock, int):
                os.close(lock)
            return
        if directory is not None:
            directory.close()
        directory = CheckpointDirectory(
            os.fsdecode(grant.path),
            self._storage,
            retention=from_plain(grant.retention) if grant.retention is not None else None,
            metric=grant.metric,
            mode=grant.mode,
            report=self._emit,
        )
        directory.mirror_backlog_bytes = grant.mirror_backlog_bytes
        directory.take_over(grant.state, lock)
        self._directories[grant.directory] = (grant.generation, directory)

    def _submit(self, message: Submit) -> None:
        if message.save in self._seen:
            return
        self._seen.add(message.save)
        listing: Listing | None = None
        if message.listing is not None:
            _, directory = self._directories[message.listing.directory]
            directory.note_all_damaged(message.listing.damaged)
            directory.mirrored = message.listing.mirrored
            listing = Listing(directory, message.listing.info, message.listing.run_id, message.listing.is_certain)
        image = RemoteImage(message.save, self)
        handle = SaveHandle(os.fsdecode(message.path), lambda action: None)
        with self._changed:
            self._images[message.save] = image
            self._unfinished.add(message.save)
        self._own_queue().submit(
            Submission(
                handle,
                image,
                settle=partial(self._settle, message.save, handle, listing),
                finish=partial(self._finish, message.save, listing),
                listing=listing,
            )
        )

    def _note_staged(self, message: Staged) -> None:
        image = self._images.get(message.save)
        if image is not None and not image.staged.is_set():
            layout = plan_layout(message.records)
            image.source = StagedImage(layout, self._arenas[message.arena].buffer)
            image.staged.set()

    # --- what becomes of it ---

    def _settle(
        self,
        save: int,
        handle: SaveHandle,
        listing: Listing | None,
        info: CheckpointInfo | None,
        error: BaseException | None,
    ) -> None:
        with self._changed:
            del self._images[save]
        if self._is_orphan and info is not None:
            logger.info("%s is durable", info.filepath)
        elif self._is_orphan:
            logger.error("%s is lost: %s", handle.path, str(error) or "it was not fully staged")
        timings = {name: getattr(handle.timings, name) for name in TIMINGS}
        plain = messages.describe_error(error) if error is not None else None
        with self._telling:
            self.send(Settled(save, info, plain, timings, _state_of(listing)))

    def _finish(self, save: int, listing: Listing | None) -> None:
        with self._changed:  # first: the trainer may hang up as soon as it has heard of it
            self._unfinished.discard(save)
            self._changed.notify_all()
        with self._telling:
            self.send(Finished(save, _state_of(listing)))

    def _emit(self, kind: EventKind, path: str, detail: str) -> None:
        self.send(Happened(kind, os.fsencode(path), plain_text(detail)))


def _state_of(listing: Listing | None) -> WriterState | None:
    return None if listing is None else listing.directory.state


class Teller(Protocol):
    """A process that tells its trainer."""

    @property
    def is_orphan(self) -> bool: ...

    def send(self, message: Message) -> None: ...


class Forwarder(logging.Handler):
    """The process's log is the trainer's, and its own once the trainer has ended."""

    def __init__(self, writer: Teller) -> None:
        super().__init__()
        self._writer = writer
        self._file = logging.StreamHandler(sys.stderr)
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if self._writer.is_orphan:
            self._file.emit(record)
        else:
            text = plain_text(self.format(record))
            self._writer.send(Logged(record.levelno, text))
