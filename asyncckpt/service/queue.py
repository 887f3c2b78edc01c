"""The queue: submitted saves, the workers that take them in order, and the order of their commits. No torch."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from asyncckpt.events import EventKind
from asyncckpt.image.checksum import ImageSource
from asyncckpt.records import CheckpointInfo
from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.order import CommitOrder, Turn
from asyncckpt.service.worker import Job, forget_frames, write_checkpoint
from asyncckpt.storage.base import Storage
from asyncckpt.threads import ThreadGroup, lower_priority

logger = logging.getLogger("asyncckpt")

_NUM_WRITER_THREADS = 8

Emit = Callable[[EventKind, str, str], None]
Settle = Callable[[CheckpointInfo | None, BaseException | None], None]


class PendingImage(Protocol):
    """An image that is staged, or on its way to being so."""

    def wait(self) -> ImageSource:
        """The bytes, once they are final; raises what went wrong while staging."""
        ...

    def release(self) -> None:
        """Give the memory back, once nothing reads or fills it any more. Blocks until staging is over."""
        ...


class SaveQueue:
    """Writes what is submitted, first come first served, on `num_workers` workers. Thread-safe."""

    def __init__(
        self, storage: Storage, num_workers: int, *, nice: int, retries: int, verify_after_save: bool, emit: Emit
    ) -> None:
        self._storage = storage
        self._retries = retries
        self._verify_after_save = verify_after_save
        self._emit = emit
        self._order = CommitOrder()
        self._lock = threading.RLock()
        self._swept: set[str] = set()
        self._hurry = threading.Event()
        self._workers = ThreadGroup("worker", num_workers, lambda: lower_priority(nice))
        self._writers = ThreadGroup("writer", _NUM_WRITER_THREADS, lambda: lower_priority(nice))
        self.thread_groups = (self._workers, self._writers)

    def submit(self, handle: SaveHandle, image: PendingImage, settle: Settle) -> None:
        """Queue a save. `settle` is called on a worker when it is durable or has failed, the image being released."""
        submitted = time.perf_counter()
        with self._lock:
            turn = self._order.enter(os.path.dirname(handle.path))
            # Under the lock, so that workers take saves in the order of their turns, and none waits for ever.
            self._workers.put(lambda: self._process(handle, image, turn, submitted, settle))

    def hurry(self) -> None:
        """No more pauses between retries."""
        self._hurry.set()

    def _process(self, handle: SaveHandle, image: PendingImage, turn: Turn, submitted: float, settle: Settle) -> None:
        info: CheckpointInfo | None = None
        error: BaseException | None = None
        try:
            info = self._write(handle, image.wait(), turn, submitted)
        except BaseException as caught:
            forget_frames(caught)
            error = caught
        finally:
            turn.leave()
            image.release()
        settle(info, error)

    def _write(self, handle: SaveHandle, source: ImageSource, turn: Turn, submitted: float) -> CheckpointInfo:
        handle.timings.queue_secs = time.perf_counter() - submitted
        self._sweep(os.path.dirname(handle.path))
        job = Job(
            path=handle.path,
            storage=self._storage,
            source=source,
            retries=self._retries,
            verify_after_save=self._verify_after_save,
            wait_turn=turn.wait,
            on_retry=lambda passing: self._emit("retried", handle.path, str(passing)),
            hurry=self._hurry,
            timings=handle.timings,
        )
        return write_checkpoint(job, self._writers)

    def _sweep(self, directory: str) -> None:
        """Once per directory: remove what writers that died left there."""
        with self._lock:
            if directory in self._swept:
                return
            self._swept.add(directory)
        for path in self._storage.sweep(directory):
            logger.warning("removed %s, left by a writer that died", path)
            self._emit("swept", path, "")
