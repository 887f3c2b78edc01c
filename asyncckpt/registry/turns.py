"""Whose turn it is to write a directory: taking its lock, and waiting for who has it. No torch.

A lock says who holds it. A writer process that only finishes the checkpoints of a trainer that has ended says
so (`FINISHING`), and is worth a longer wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from datetime import datetime, timezone

from asyncckpt.errors import StorageBusyError
from asyncckpt.storage import system_calls
from asyncckpt.storage.base import FINISHING, Lock, Storage
from asyncckpt.threads import log_quietly

MAX_FINISHING_SECS = 600.0
_PAUSE_SECS = 0.05
_SILENT_WAIT_SECS = 1.0


def take_lock(storage: Storage, directory: str, timeout_secs: float) -> Lock:
    """The directory's lock. Blocks up to `timeout_secs` (ten minutes for a writer that finishes), saying for whom.

    Raises `StorageBusyError` then.
    """
    holder = f"{_name(os.getpid())}, since {datetime.now(timezone.utc).isoformat(timespec='seconds')}"
    started = time.monotonic()
    is_announced = False
    while True:
        try:
            return storage.lock(directory, holder)
        except BlockingIOError as error:
            other = str(error.strerror)
            waited = time.monotonic() - started
            if waited >= (MAX_FINISHING_SECS if other.startswith(FINISHING) else timeout_secs):
                raise StorageBusyError(
                    f"{directory} is being written to by {other}; a directory has one writer at a time: "
                    "close that manager or end that process, or use another directory"
                ) from error
            if waited >= _SILENT_WAIT_SECS and not is_announced:
                _announce(directory, other)
                is_announced = True
        time.sleep(_PAUSE_SECS)


def await_finishing(storage: Storage, directory: str, timeout_secs: float) -> None:
    """Wait for a writer that finishes the checkpoints of a trainer that has died, so that they are seen.

    Returns at once if there is none; blocks for ten minutes at most. Where the lock is still in the name of a process
    that has ended, its writer is given `timeout_secs` to say that it goes on; where there are claims, it is waited for
    a sign of its life.
    """
    with contextlib.suppress(OSError):  # whoever reads next says what is wrong
        _await_finishing(storage, directory, timeout_secs)


def _await_finishing(storage: Storage, directory: str, timeout_secs: float) -> None:
    started = time.monotonic()
    is_announced = False
    takes_time = not storage.is_near(directory)  # to see whether the holder lives
    while holder := _holder_that_is_left(storage, directory):
        if not is_announced and (takes_time or storage.is_locked(directory)):
            _announce(directory, holder)
            is_announced = True
        if not storage.is_locked(directory):
            return
        if time.monotonic() - started >= (MAX_FINISHING_SECS if holder.startswith(FINISHING) else timeout_secs):
            return
        time.sleep(_PAUSE_SECS)


def name_of_finisher() -> str:
    """What a writer process says of itself once its trainer has ended."""
    return f"{FINISHING}writer {_name(os.getpid())}"


def _holder_that_is_left(storage: Storage, directory: str) -> str:
    """What the lock's holder says of itself, if it has outlived its trainer, or may have; else ""."""
    holder = storage.holder(directory)
    return holder if holder.startswith(FINISHING) or _has_ended(holder) else ""


def _announce(directory: str, holder: str) -> None:
    log_quietly(logging.WARNING, f"waiting for what still writes to {directory}: {holder}")


def _name(pid: int) -> str:
    return f"process {pid} on {socket.gethostname()}"


def _has_ended(holder: str) -> bool:
    """Whether the process of this machine that a lock's file names is no more."""
    pid = holder.removeprefix("process ").split(" ", 1)[0]
    if not pid.isdecimal() or not holder.startswith(f"{_name(int(pid))}, ") or not hasattr(os, "pidfd_open"):
        return False
    try:
        pidfd = os.pidfd_open(int(pid))
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(0))  # it may still wait for its parent to take note
    finally:
        system_calls.close(pidfd)
