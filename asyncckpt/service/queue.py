"""The queue: submitted saves, the workers that take them in order, and the order of their commits. No torch."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from asyncckpt.events import EventKind
from asyncckpt.image.arena import Arena
from asyncckpt.image.checksum import ImageSource
from asyncckpt.records import CheckpointInfo, Timings
from asyncckpt.registry.directory import Listing
from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.order import CommitOrder, Turn
from asyncckpt.service.watchdog import Watch, Watchdog
from asyncckpt.service.worker import Job, forget_frames, write_checkpoint
from asyncckpt.storage.base import Storage
from asyncckpt.threads import ThreadGroup, log_quietly, lower_priority

_NUM_WRITER_THREADS = 8

Emit = Callable[[EventKind, str, str], None]
Settle = Callable[[CheckpointInfo | None, BaseException | None], None]


class PendingImage(Protocol):
    """An image that is staged, or on its way to being so. `source` and `arena` are None once it is released."""

    @property
    def source(self) -> ImageSource | None: ...

    @property
    def arena(self) -> Arena | None: ...

    @property
    def is_complete(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        ...

    def wait(self) -> ImageSource:
        """The bytes, once they are final; raises what went wrong while staging."""
        ...

    def check(self) -> None:
        """Raise if the image turns out not to be of one moment. Called last, just before the commit."""
        ...

    def release(self) -> None:
        """Give the memory back, once nothing reads or fills it any more. Blocks until staging is over."""
        ...


@dataclass(eq=False)
class Submission:
    """A save on its way to the workers.

    `settle` is called on a worker when it is durable or has failed, the image being released; `finish` when, after
    that, what it replaced is deleted too.
    """

    handle: SaveHandle
    image: PendingImage
    settle: Settle
    finish: Callable[[], None]
    listing: Listing | None = None
    time: float = field(default_factory=time.perf_counter)


class SaveQueue:
    """Writes what is submitted, first come first served, on `num_workers` workers. Thread-safe."""

    def __init__(
        self,
        storage: Storage,
        num_workers: int,
        *,
        nice: int,
        retries: int,
        verify_after_save: bool,
        stall_timeout_secs: float,
        emit: Emit,
    ) -> None:
        self.storage = storage
        self._retries = retries
        self._verify_after_save = verify_after_save
        self._emit = emit
        self._order = CommitOrder()
        self._submissions: deque[Submission] = deque()
        self._lock = threading.Lock()  # the workers' only
        self._swept: set[str] = set()
        self._in_hurry = False
        self._workers = ThreadGroup("worker", num_workers, lambda: lower_priority(nice))
        submissions = self._submissions
        with contextlib.ExitStack() as started:  # there may be no memory for one more thread
            started.callback(self._workers.stop)
            self._writers = ThreadGroup("writer", _NUM_WRITER_THREADS, lambda: lower_priority(nice))
            started.callback(self._writers.stop)
            self._watchdog = Watchdog(
                stall_timeout_secs, lambda path, detail: emit("stalled", path, detail), lambda: bool(submissions)
            )
            started.pop_all()
        self.thread_groups = (self._workers, self._writers, self._watchdog)

    def submit(self, submission: Submission) -> None:
        """Queue a save. Takes no lock, since a signal handler may interrupt it with a save of its own.

        `handle.is_submitted` says, also after Ctrl-C in here, whether the save is on its way.
        """
        handle = submission.handle
        try:
            self._submissions.append(submission)
            handle.is_submitted = True
            self._workers.put(self._process_next)
        except BaseException:
            # It was appended, though not marked, if it is still there, or was: who takes one marks it before.
            handle.is_submitted = submission in self._submissions or handle.is_submitted
            self._workers.put(self._process_next)  # if it had been put, one of the two finds nothing to do
            raise

    survives_exit = False
    is_handed_over = False

    def staged(self, handle: SaveHandle) -> None:
        """The handle's image is complete: the workers see that for themselves."""

    def put(self, action: Callable[[], object]) -> None:
        """Run a short `action` on a worker. Does not wait."""
        self._workers.put(action)

    def run(self, action: Callable[[], object], name: str, path: str) -> None:
        """Run `action` on a worker, after the saves before it have been begun. Does not wait."""
        watchdog = self._watchdog

        def run_watched() -> None:
            with watchdog.watch(path, Timings()) as watch, watch.during(name):
                action()

        self._workers.put(run_watched)

    def hurry(self) -> None:
        """No more pauses between retries."""
        self._in_hurry = True

    def stop(self) -> None:
        """End the threads once they have done what was submitted. Does not wait."""
        for group in self.thread_groups:
            group.stop()

    def leave(self) -> None:
        """This process ends, and the threads with it."""

    def _process_next(self) -> None:
        with self._lock:  # workers take saves in the order of their turns, so that none waits for ever
            if not self._submissions:
                return
            submission = self._submissions[0]
            submission.handle.is_submitted = True
            self._submissions.popleft()
            turn = self._order.enter(os.path.dirname(submission.handle.path))
            watch = self._watchdog.watch(submission.handle.path, submission.handle.timings)
        with watch:
            self._process(submission, turn, watch)

    def _process(self, submission: Submission, turn: Turn, watch: Watch) -> None:
        info: CheckpointInfo | None = None
        error: BaseException | None = None
        try:
            info = self._write(submission, turn, watch)
        except BaseException as caught:
            forget_frames(caught)
            error = caught
            with self._lock:  # what it could not remove then, the next save does
                self._swept.discard(os.path.dirname(submission.handle.path))
        finally:
            submission.image.release()
        try:
            submission.settle(info, error)
            if submission.listing is not None and info is not None:
                with watch.during("delete"):
                    submission.listing.directory.delete_pending()
            elif submission.listing is not None:
                submission.listing.directory.withdraw(submission.listing)
        finally:
            turn.leave()
            submission.finish()

    def _write(self, submission: Submission, turn: Turn, watch: Watch) -> CheckpointInfo:
        handle, image = submission.handle, submission.image
        source = image.wait()
        handle.timings.queue_secs = time.perf_counter() - submission.time
        with watch.during("the directory"):
            if submission.listing is not None:
                submission.listing.directory.check(submission.listing)
            self._sweep(os.path.dirname(handle.path))

        def before_commit() -> None:
            turn.wait()
            image.check()

        job = Job(
            path=handle.path,
            storage=self.storage,
            source=source,
            retries=self._retries,
            verify_after_save=self._verify_after_save,
            before_commit=before_commit,
            on_retry=lambda passing: self._emit("retried", handle.path, str(passing)),
            hurry=lambda: self._in_hurry,
            timings=handle.timings,
            watch=watch,
            listing=submission.listing,
        )
        return write_checkpoint(job, self._writers)

    def _sweep(self, directory: str) -> None:
        """Once per directory: remove what writers that died left there."""
        with self._lock:
            if directory in self._swept:
                return
            self._swept.add(directory)
        for path in self.storage.sweep(directory):
            log_quietly(logging.WARNING, f"removed {path}, left by a writer that died")
            self._emit("swept", path, "")
