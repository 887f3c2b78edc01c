"""The two kinds of queue that a saver can have, and how each is started. No torch."""

from __future__ import annotations

from asyncckpt.service.messages import Setup
from asyncckpt.service.process_queue import ProcessQueue
from asyncckpt.service.queue import Emit, SaveQueue
from asyncckpt.service.writer_process import why_not
from asyncckpt.storage.base import Storage
from asyncckpt.warn import warn

AnyQueue = SaveQueue | ProcessQueue


def in_threads(storage: Storage, setup: Setup, emit: Emit) -> SaveQueue:
    """A queue for which threads of this process write."""
    return SaveQueue(
        storage,
        setup.num_workers,
        nice=setup.nice,
        retries=setup.retries,
        verify_after_save=setup.verify_after_save,
        stall_timeout_secs=setup.stall_timeout_secs,
        emit=emit,
    )


def in_process(threads: SaveQueue, setup: Setup, emit: Emit) -> AnyQueue:
    """A writer process's queue, or, where there can be none, the threads' own, with a warning."""
    reason = why_not()
    try:
        if reason is None:
            return ProcessQueue(threads, setup, emit)
    except OSError as error:
        reason = f"a writer process can't be started: {error}"
    warn(f"{reason}; threads write the checkpoints instead, and don't outlive the trainer")
    return threads
