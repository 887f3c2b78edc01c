"""Local directories, made and synced: a file's name is durable only once its directory is."""

from __future__ import annotations

import contextlib
import errno
import os

from asyncckpt.storage import system_calls
from asyncckpt.storage.files import Descriptor


def open_directory(path: str) -> Descriptor:
    """Opened before its entries are changed, only the sync itself can fail afterwards."""
    return Descriptor(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_entries(directory: Descriptor) -> None:
    """Make the directory's entries durable."""
    try:
        system_calls.fsync(directory.fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems can't sync directories
            raise


def make_directories(path: str) -> None:
    """Make what is missing, each level durable in its parent before anything is put in it.

    So is the deepest level that is there already: another rank may have made it a moment ago, or an attempt of ours
    whose sync failed.
    """
    parent = os.path.dirname(path)
    try:
        system_calls.stat(path)
    except FileNotFoundError:
        make_directories(parent)
        with contextlib.suppress(FileExistsError):  # another rank was faster
            system_calls.make_directory(path)
        _sync(parent)
    else:
        with contextlib.suppress(PermissionError):  # a parent that we can't read, /home say: not one that we made
            _sync(parent)


def _sync(path: str) -> None:
    with open_directory(path) as directory:
        sync_entries(directory)
