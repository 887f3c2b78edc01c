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
_UNKNOWN = "an unknown process"
_MAX_RELEASE_SECS = 1.0


class LocalLock(Lock):
    """Taken by making one; the directory must exist, and its path be absolute."""

    def __init__(self, directory: str, holder: str) -> None:
        self._path = os.path.join(directory, LOCK_NAME)
        self._is_received = self._is_shared = False
        # O_NONBLOCK: a pipe of that name makes nobody wait, not on Linux alone.
        self._file = Descriptor(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(system_calls.fstat(self._file.fd).st_mode):
                raise OSError(errno.ENXIO, "not a regular file", self._path)
            if not lock_if_supported(self._file.fd):
                raise BlockingIOError(errno.EWOULDBLOCK, _read_holder(self._file.fd) or _UNKNOWN, self._path)
            if not is_at(self._file.fd, self._path):
                raise BlockingIOError(errno.EWOULDBLOCK, "somebody who replaced the lock's file", self._path)
            self.describe(holder)
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def received(cls, directory: str, fd: int) -> LocalLock:
        """The lock that another process shared."""
        lock = cls.__new__(cls)
        lock._path = os.path.join(directory, LOCK_NAME)
        lock._file = Descriptor.received(fd)
        lock._is_received, lock._is_shared = True, False
        return lock

    def describe(self, holder: str) -> None:
        # A courtesy to others: also where the disk is full a lock must be had, or nothing could be deleted. Not if the
        # file has a second name: it may be somebody's file of another kind.
        with contextlib.suppress(OSError):
            if system_calls.fstat(self._file.fd).st_nlink > 1:
                return
            system_calls.truncate(self._file.fd, 0)
            write_all(self._file.fd, 0, memoryview(holder.encode("utf-8", "replace")[:_MAX_HOLDER_BYTES]))

    def share(self) -> int:
        self._is_shared = True
        return self._file.fd

    def inherit(self) -> None:
        self._is_received = False

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
        if self._is_received:
            self._file.close()
            return
        with contextlib.suppress(OSError):
            if system_calls.fstat(self._file.fd).st_nlink == 1:
                system_calls.truncate(self._file.fd, 0)
        with contextlib.suppress(OSError):  # closing is not enough while a child that has just been forked has a copy
            system_calls.unlock(self._file.fd)
        self._file.close()

    def __del__(self) -> None:
        """Nobody knows which thread drops the last reference: it must not hang on a storage that does not answer."""
        if not hasattr(self, "_file") or self._file.fd == -1 or sys.is_finalizing():  # the process's end releases it
            return
        # One that is shared: nobody said that it is over, and whoever has it too may still be writing.
        let_go = self._file.close if self._is_shared else self.release
        releasing = threading.Thread(target=let_go, name="asyncckpt-release", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread can be started any more: the end is near
            releasing.start()
            releasing.join(_MAX_RELEASE_SECS)


def is_locked(directory: str) -> bool:
    """Whether somebody has the lock of a local directory."""
    try:
        with Descriptor(os.path.join(directory, LOCK_NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
            return not system_calls.try_shared_lock(file.fd)
    except OSError:  # there is no such file, or there are no locks here
        return False


def holder_of(directory: str) -> str:
    """What the lock's file says of its holder; "" if there is no such file, or nothing in it. Raises OSError."""
    try:
        with Descriptor(os.path.join(directory, LOCK_NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
            return _read_holder(file.fd)
    except FileNotFoundError:
        return ""


def _read_holder(fd: int) -> str:
    """One line for people; anybody may have written it. "" if nobody has."""
    buffer = bytearray(_MAX_HOLDER_BYTES)
    try:
        count = system_calls.pread_into(fd, memoryview(buffer), 0)
    except OSError:
        count = 0
    text = buffer[:count].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else " " for character in text).strip()
