"""Every error that asyncckpt raises.

Each one is a `CheckpointError` and also the builtin that a caller would expect in its place::

    CheckpointError(Exception)
    ├── CheckpointNotFoundError    also FileNotFoundError
    ├── CorruptCheckpointError     also ValueError
    ├── UnsafeCheckpointError      also pickle.UnpicklingError, as torch.load raises
    ├── UnsupportedStateError      also TypeError
    ├── MetricNotFoundError        also LookupError
    ├── RegistryError              also ValueError
    ├── StorageBusyError           also BlockingIOError
    ├── TornSnapshotError          also RuntimeError
    ├── CheckpointWriteError       also OSError (errno is kept)
    ├── CheckpointReadError        also OSError (errno is kept)
    ├── QueueFullError             also RuntimeError
    ├── SaverClosedError           also RuntimeError
    ├── MissingExtraError          also ImportError
    └── WaitTimeoutError           also TimeoutError
"""

from __future__ import annotations

import errno
import pickle
from collections.abc import Sequence

from asyncckpt.paths import scheme_of


class CheckpointError(Exception):
    """The base of all errors raised by asyncckpt."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """The file is not the checkpoint that was written: truncated, altered, or something else entirely."""


class UnsafeCheckpointError(CheckpointError, pickle.UnpicklingError):
    """Opening the file would run code, and the caller did not ask for that by name."""


class UnsupportedStateError(CheckpointError, TypeError):
    """The state holds something that can't be saved; the message names the key's path."""


class MetricNotFoundError(CheckpointError, LookupError):
    """The monitored metric is not among those given to `save`; the message names it and those that are."""


class RegistryError(CheckpointError, ValueError):
    """The directory's registry can't be used by this version of asyncckpt. Nothing in the directory was changed."""


class StorageBusyError(CheckpointError, BlockingIOError):
    """Somebody else is writing to this checkpoint directory; the message names them. Nothing was changed."""


class TornSnapshotError(CheckpointError, RuntimeError):
    """A tensor was written to while the snapshot was taken, so the snapshot was thrown away."""


class CheckpointWriteError(CheckpointError, OSError):
    """The checkpoint did not become durable. At the path is what was there before, whole (or, if only the very last
    sync failed, the new file, whole but not proven durable).

    `failures` lists every failed save when a barrier (`wait`, `close`) reports more than one.
    """

    def __init__(self, message: str, *, errno: int | None = None, failures: Sequence[BaseException] = ()) -> None:
        super().__init__(message)
        self.errno = errno
        self.failures = tuple(failures)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self.args, {"errno": self.errno, "failures": self.failures}


class CheckpointReadError(CheckpointError, OSError):
    """The file is there, and may be whole, but can't be read as it is now; the message says what to do."""

    def __init__(self, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self.args, {"errno": self.errno}


class QueueFullError(CheckpointError, RuntimeError):
    """Too many saves are in flight, and the saver was told to raise (`when_full="raise"`)."""


class SaverClosedError(CheckpointError, RuntimeError):
    """The saver was closed, or belongs to the process that forked this one."""


class MissingExtraError(CheckpointError, ImportError):
    """A package is needed that is not installed; the message names it."""


class WaitTimeoutError(CheckpointError, TimeoutError):
    """Some saves were not durable when the time was up; they go on in the background."""


_REMEDIES = {
    errno.ENOSPC: "free some space, the next save tries again",
    errno.EDQUOT: "the quota is used up, the next save tries again once there is room",
    errno.EFBIG: "files of this size are not allowed here (ulimit -f)",
    errno.EACCES: "the directory must be writable by this user",
    errno.EPERM: "the directory must be writable by this user",
    errno.EROFS: "the file system is mounted read-only; once it is writable again the next save succeeds",
    errno.ENOENT: "the directory was moved or removed meanwhile, the next save makes it anew",
    errno.EISDIR: "there is a directory at this path",
    errno.ENOTDIR: "a part of this path is a file",
    errno.ENAMETOOLONG: "shorten the file's name",
    errno.EMFILE: "close files that are not needed, or allow more (ulimit -n)",
    errno.ENFILE: "the machine has too many files open",
    errno.ENOMEM: "free some memory, the next save tries again",
    errno.EIO: "look into the system's log for what is wrong with the disk",
    errno.ESTALE: "the network file system has to be mounted anew",
    errno.ENOTCONN: "the file system's server has ended; mount it anew",
}


# Of a store, whose other errors say themselves what to do.
_REMOTE_REMEDIES = {
    **dict.fromkeys((errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED), "the next save tries again"),
    errno.EEXIST: "a directory has one writer at a time",
}


def is_full(error: OSError) -> bool:
    """Whether there is no room left, on the disk or by quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def remedy(error_number: int | None, path: str) -> str:
    """What to do about an error of the system, as the end of a message; "" for one that speaks for itself."""
    text = (_REMOTE_REMEDIES if scheme_of(path) else _REMEDIES).get(error_number or 0)
    return f"; {text}" if text else ""
