"""Open files: what the modules of local storage share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import weakref
from dataclasses import dataclass

from asyncckpt.naming import is_temporary_name_of
from asyncckpt.storage import system_calls
from asyncckpt.threads import log_quietly

_WITHOUT_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})


class Descriptor:
    """An open file of this process alone; closing it twice does no harm.

    A forked child (a DataLoader worker) closes its copy, which would keep the file's lock, and a deleted file's space,
    for as long as the child lives. `fd` is -1 once it is closed.
    """

    def __init__(self, path: str, flags: int) -> None:
        self._name = os.path.basename(path)
        passing = _Passing(self._name, None)
        _in_passing.append(passing)
        try:
            self.fd = system_calls.open_file(path, flags)
            _descriptors.add(self)
        finally:
            _in_passing.remove(passing)

    @classmethod
    def received(cls, fd: int) -> Descriptor:
        """A descriptor that another process sent us."""
        descriptor = cls.__new__(cls)
        descriptor.fd, descriptor._name = fd, ""
        _descriptors.add(descriptor)
        return descriptor

    def close(self) -> None:
        """Never raises OSError: what matters was synced before, and a late word about the rest changes nothing."""
        passing = _Passing(self._name, self.fd)
        _in_passing.append(passing)
        try:
            fd, self.fd = self.fd, -1
            if fd != -1:
                with contextlib.suppress(OSError):
                    system_calls.close(fd)
        finally:
            _in_passing.remove(passing)

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_at(fd: int, path: str) -> bool:
    """Whether the name at `path` is that of the open file."""
    try:
        mine, there = system_calls.fstat(fd), system_calls.lstat(path)
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def write_all(fd: int, offset: int, view: memoryview) -> None:
    position = 0
    while position < len(view):
        count = system_calls.pwrite(fd, view[position:], offset + position)
        if count == 0:
            raise OSError(errno.EIO, "the file system wrote nothing and gave no error")
        position += count


def remove_quietly(path: str) -> None:
    """Remove a file of ours that nobody needs; what can't be removed now is left for a sweep."""
    with contextlib.suppress(OSError):
        system_calls.unlink(path)


def lock_if_supported(fd: int) -> bool:
    """Take the open file's lock; False when somebody else has it. Where there are no locks nobody has."""
    try:
        return system_calls.try_lock(fd)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    _say_that_there_are_no_locks()
    return True


@functools.cache  # once
def _say_that_there_are_no_locks() -> None:
    log_quietly(
        logging.WARNING,
        "this file system has no file locks (flock): take care that only one process writes to a checkpoint directory, "
        "and remove what killed ones left (.asyncckpt-*.tmp) by hand",
    )


@dataclass(eq=False)
class _Passing:
    """A file that is being opened, with a descriptor that nobody knows yet, or whose descriptor is being closed."""

    name: str
    fd: int | None

    def is_at(self, fd: int) -> bool:
        """Whether the descriptor is this file's: numbers are used again, so its name must tell."""
        try:
            name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)"))
        except OSError:
            return False
        if name == self.name:
            return True
        # A temporary file may have been renamed since, also since the fork: the child may be late.
        return is_temporary_name_of(self.name, name) and (self.fd == fd or _is_for_writing(fd))


def _is_for_writing(fd: int) -> bool:
    """As ours is; what the user has open there to read is his."""
    with contextlib.suppress(OSError):
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    return False


_descriptors: weakref.WeakSet[Descriptor] = weakref.WeakSet()
_in_passing: list[_Passing] = []


def _close_in_child() -> None:
    """Also what another thread was opening or closing at the moment of the fork."""
    passing = list(_in_passing)
    _in_passing.clear()
    for descriptor in list(_descriptors):
        descriptor.close()
    if not passing:
        return
    with contextlib.suppress(OSError):  # no /proc
        for fd in map(int, os.listdir("/proc/self/fd")):
            if any(other.is_at(fd) for other in passing if other.fd in (None, fd)):
                with contextlib.suppress(OSError):
                    system_calls.close(fd)


os.register_at_fork(after_in_child=_close_in_child)
