"""Temporary files, in the destination's own directory: made under their writer's lock, swept once it is dead."""

from __future__ import annotations

import errno
import os
import secrets
import stat

from asyncckpt.naming import is_temporary_name, temporary_name
from asyncckpt.storage import system_calls
from asyncckpt.storage.files import Descriptor, is_at, lock_if_supported, remove_quietly

_MAX_NAMES_TRIED = 100


def temporary_path(path: str) -> str:
    """A new name beside `path`."""
    directory, name = os.path.split(path)
    return os.path.join(directory, temporary_name(secrets.token_hex(8), name))


def create_temporary(path: str) -> tuple[Descriptor, str]:
    """Create a temporary file beside `path` and lock it, so that it counts as alive as long as we do."""
    for _ in range(_MAX_NAMES_TRIED):
        temporary = temporary_path(path)
        file = Descriptor(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        ours = False
        try:
            # A sweeper may see the file before it is locked: then it is gone, or about to be. Take another name.
            ours = lock_if_supported(file.fd) and system_calls.fstat(file.fd).st_nlink > 0
            if ours:
                return file, temporary
        finally:
            if not ours:
                file.close()
                remove_quietly(temporary)
    raise OSError(errno.EAGAIN, "another program locks every new file here", os.path.dirname(path))


def sweep(directory: str) -> list[str]:
    """Remove the temporary files in a directory whose writers are dead; their paths."""
    try:
        names = [name for name in system_calls.list_directory(directory) if is_temporary_name(name)]
    except OSError:
        return []
    paths = [os.path.join(directory, name) for name in names]
    return [path for path in paths if _remove_if_dead(path)]


def _remove_if_dead(path: str) -> bool:
    """Remove a temporary file whose lock is free. It is removed while locked, so its writer can't come back."""
    try:
        with Descriptor(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
            if not stat.S_ISREG(system_calls.fstat(file.fd).st_mode):
                return False
            if not system_calls.try_lock(file.fd) or not is_at(file.fd, path):
                return False
            system_calls.unlink(path)
    except OSError:
        return False
    return True
