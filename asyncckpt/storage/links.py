"""One file's contents under a second name, without a second copy: a reflink, else a hard link.

A reflink is better: the two share their blocks until one is written to. A hard link is the very same file.
"""

from __future__ import annotations

import contextlib
import errno
import os

from asyncckpt.storage import system_calls
from asyncckpt.storage.directories import open_directory, sync_entries
from asyncckpt.storage.files import is_at, remove_quietly
from asyncckpt.storage.temporary import create_temporary, temporary_path

_MAX_NAMES_TRIED = 10
# How file systems say that they have no reflinks or hard links (EMLINK: not one more), or none for us.
_REFUSALS = frozenset(
    {
        *(errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EXDEV),
        *(errno.EPERM, errno.EACCES, errno.EMLINK),
    }
)


def share(source: int, source_path: str, destination: str) -> bool:
    """Make `destination` hold what the open, durable file `source` holds; False where that takes a copy.

    Durable on return. `source_path` is where it was opened.
    """
    with open_directory(os.path.dirname(destination)) as directory:
        shared = _clone(source, destination) or _hard_link(source, source_path, destination)
        if shared:
            sync_entries(directory)
    return shared


def _clone(source: int, destination: str) -> bool:
    file, temporary = create_temporary(destination)
    with file:  # its lock keeps sweepers away until it has its name
        try:
            try:
                system_calls.clone(source, file.fd)
            except OSError as error:
                if error.errno in _REFUSALS:
                    return False
                raise
            system_calls.fsync(file.fd)
            system_calls.rename(temporary, destination)
        finally:
            remove_quietly(temporary)
    return True


def _hard_link(source: int, source_path: str, destination: str) -> bool:
    for _ in range(_MAX_NAMES_TRIED):
        temporary = temporary_path(destination)
        try:
            system_calls.link(source_path, temporary)
        except OSError as error:
            if error.errno in _REFUSALS:
                return False
            raise
        try:
            # Not so if a sweeper was here, for nobody holds a lock on this name, or if somebody has put another file at
            # `source_path` since it was opened.
            if is_at(source, temporary):
                with contextlib.suppress(FileNotFoundError):
                    system_calls.rename(temporary, destination)
                    return True
        finally:
            remove_quietly(temporary)  # it is still there when the destination was the very same file
    return False
