"""Open files: what the modules of local storage share."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import weakref

from asyncckpt.storage import system_calls
from asyncckpt.threads import log_quietly

_WITHOUT_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})


class Descriptor:
    """An open file of this process alone; closing it twice does no harm.

    A forked child (a DataLoader worker) closes its copy, which would keep the file's lock, and a deleted file's space,
    for as long as the child lives. `fd` is -1 once it is closed.
    """

    def __init__(self, path: str, flags: int) -> None:
        self.fd = system_calls.open_file(path, flags)
        _descriptors.add(self)

    @classmethod
    def received(cls, fd: int) -> Descriptor:
        """A descriptor that another process sent us."""
        descriptor = cls.__new__(cls)
        descriptor.fd = fd
        _descriptors.add(descriptor)
        return descriptor

    def close(self) -> None:
        """Never raises OSError: what matters was synced before, and a late word about the rest changes nothing."""
        fd, self.fd = self.fd, -1
        if fd != -1:
            with contextlib.suppress(OSError):
                system_calls.close(fd)

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


_descriptors: weakref.WeakSet[Descriptor] = weakref.WeakSet()


def _close_in_child() -> None:
    for descriptor in list(_descriptors):
        descriptor.close()


os.register_at_fork(after_in_child=_close_in_child)
