"""The one seam to the file system: every call that reads or changes a checkpoint directory goes through here.

Callers use `system_calls.fsync(fd)`, never an imported name, so that replacing one attribute of this module injects a
fault into, counts, or records that call everywhere.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import fcntl
import os
from collections.abc import Iterator

_FICLONE = 0x40049409  # linux/fs.h

_libc = ctypes.CDLL(None, use_errno=True)


def open_file(path: str, flags: int, mode: int = 0o666) -> int:
    return os.open(path, flags | os.O_CLOEXEC, mode)


def close(fd: int) -> None:
    os.close(fd)


def pwrite(fd: int, view: memoryview, offset: int) -> int:
    return os.pwrite(fd, view, offset)


def pread_into(fd: int, view: memoryview, offset: int) -> int:
    return os.preadv(fd, [view], offset)


def allocate(fd: int, num_bytes: int) -> None:
    """Reserve the blocks, so that a full disk is found before writing; silently nothing where that is unsupported.

    Not `os.posix_fallocate`: where the file system can't, libc would write every block by hand.
    """
    fallocate = getattr(_libc, "fallocate64", None)
    if fallocate is None:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(fd, 0, 0, num_bytes) != 0:
        error = ctypes.get_errno()
        if error in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
            return
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def fsync(fd: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the drive's cache
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL):  # network file systems have only the other
                raise
    os.fsync(fd)


def try_lock(fd: int) -> bool:
    """Take the exclusive lock on the open file; False when somebody else holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def try_shared_lock(fd: int) -> bool:
    """Take a lock that others may share, until the file is closed; False when somebody holds the exclusive one."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(fd: int) -> None:
    """Give the lock up, whoever else has a copy of the descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def rename(source: str, destination: str) -> None:
    os.replace(source, destination)


def link(source: str, destination: str) -> None:
    os.link(source, destination, follow_symlinks=False)


def clone(source: int, destination: int) -> None:
    """Let the empty file `destination` share all blocks of `source`, to be told apart when either is written to."""
    fcntl.ioctl(destination, _FICLONE, source)


def truncate(fd: int, num_bytes: int) -> None:
    os.ftruncate(fd, num_bytes)


def unlink(path: str) -> None:
    os.unlink(path)


def append(fd: int, line: bytes) -> None:
    os.write(fd, line)


def make_directory(path: str, mode: int = 0o777) -> None:
    os.mkdir(path, mode)


def remove_directory(path: str) -> None:
    os.rmdir(path)


def stat(path: str) -> os.stat_result:
    return os.stat(path)


def lstat(path: str) -> os.stat_result:
    return os.lstat(path)


def fstat(fd: int) -> os.stat_result:
    return os.fstat(fd)


def file_system_status(path: str) -> os.statvfs_result:
    return os.statvfs(path)


def list_directory(path: str) -> Iterator[str]:
    return iter(os.listdir(path))
