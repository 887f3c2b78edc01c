"""The lock of a local directory: a file under flock, which names its holder.

The file stays for good: removing a lock's file is a race.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import threading

from asyncckpt.naming import LOCK_NAME
from asyncckpt.storage import system_calls
from asyncckpt.storage.base import Lock
from asyncckpt.storage.files import Descriptor, is_at, lock_if_supported, write_all

_MAX_HOLDER_BYTES = 500
_MAX_RELEASE_SECS = 1.0


class LocalLock(Lock):
    """Taken by making one; the directory must exist, and its path be absolute."""

    def __init__(self, directory: str, holder: str) -> None:
        self._path = os.path.join(directory, LOCK_NAME)
        # O_NONBLOCK: a pipe of that name makes nobody wait, not on Linux alone.
        self._file = Descriptor(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(system_calls.fstat(self._file.fd).st_mode):
                raise OSError(errno.ENXIO, "not a regular file", self._path)
            if not lock_if_supported(self._file.fd):
                raise BlockingIOError(errno.EWOULDBLOCK, _read_holder(self._file.fd), self._path)
            if not is_at(self._file.fd, self._path):
                raise BlockingIOError(errno.EWOULDBLOCK, "somebody who replaced the lock's file", self._path)
            _write_holder(self._file.fd, holder)
        except BaseException:
            self._file.close()
            raise

    def is_intact(self) -> bool:
        if self._file.fd == -1:
            return False
        try:
            system_calls.lstat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # it can't be told now; the lock is held all the same
            return True
        try:
            return is_at(self._file.fd, self._path)
        except OSError:  # the path answers, the open file does not: it is of a mount, or a server, that is gone
            return False

    def release(self) -> None:
        if self._file.fd == -1:  # released before, or a forked child's
            return
        with contextlib.suppress(OSError):
            system_calls.truncate(self._file.fd, 0)
        with contextlib.suppress(OSError):  # closing is not enough while a child that has just been forked has a copy
            system_calls.unlock(self._file.fd)
        self._file.close()

    def __del__(self) -> None:
        """Nobody knows which thread drops the last reference: it must not hang on a storage that does not answer."""
        if not hasattr(self, "_file") or self._file.fd == -1 or sys.is_finalizing():  # the process's end releases it
            return
        releasing = threading.Thread(target=self.release, name="asyncckpt-release", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread can be started any more: the end is near
            releasing.start()
            releasing.join(_MAX_RELEASE_SECS)


def _write_holder(fd: int, holder: str) -> None:
    """A courtesy to others: also where the disk is full a lock must be had, or nothing could be deleted."""
    with contextlib.suppress(OSError):
        system_calls.truncate(fd, 0)
        write_all(fd, 0, memoryview(holder.encode("utf-8", "replace")[:_MAX_HOLDER_BYTES]))


def _read_holder(fd: int) -> str:
    """One line for people; anybody may have written it."""
    buffer = bytearray(_MAX_HOLDER_BYTES)
    try:
        count = system_calls.pread_into(fd, memoryview(buffer), 0)
    except OSError:
        count = 0
    text = buffer[:count].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else " " for character in text).strip() or "an unknown process"
