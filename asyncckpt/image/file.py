"""A checkpoint file by its path: found, opened, verified. No torch."""

from __future__ import annotations

import errno
import os
import re

from asyncckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.image.verify import default_num_threads, verify_reader
from asyncckpt.records import VerifyReport
from asyncckpt.storage.local import LocalReader, LocalStorage


def verify(path: str | os.PathLike[str]) -> VerifyReport:
    """Read every byte of a checkpoint and check it. Blocks; thread-safe; loads nothing, runs nothing.

    A damaged file is a report with problems, not an exception. Raises `CheckpointNotFoundError`, and OSError when
    reading fails.
    """
    return _verify(local_path(path), follow_links=True)


def verify_listed(path: str | os.PathLike[str]) -> VerifyReport:
    """As `verify`, of a file that a registry named: what is no file, or can't be read, is a problem too."""
    try:
        return _verify(local_path(path), follow_links=False)
    except (OSError, CorruptCheckpointError) as error:
        return VerifyReport(str(path), 0, 0, (str(error),), None)


def _verify(name: str, *, follow_links: bool) -> VerifyReport:
    with open_checkpoint(name, follow_links=follow_links) as reader:
        return verify_reader(reader, name, num_threads=default_num_threads())


def local_path(path: str | os.PathLike[str]) -> str:
    """The absolute form of a path on this machine."""
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"a checkpoint's path is a str or a Path, not {type(name).__name__}")
    if not name or name.endswith(os.sep) or "\0" in name:
        raise ValueError(f"a checkpoint's path names a file, not {name!r}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        raise CheckpointError(f"{name}: this version saves to and loads from local paths only")
    return os.path.abspath(name)


def open_checkpoint(path: str, *, follow_links: bool = True) -> LocalReader:
    """Open for reading. Raises `CheckpointNotFoundError`, and `CorruptCheckpointError` for what is no file.

    With `follow_links=False` that is a symbolic link too: the name came from a file, not from the user.
    """
    try:
        return LocalStorage().open(path, follow_links=follow_links)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(f"there is no checkpoint at {path}") from error
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise CorruptCheckpointError(f"{path} is a directory or a device, not a checkpoint file") from error
        if error.errno == errno.ELOOP:
            raise CorruptCheckpointError(f"{path} is a symbolic link, which may lead anywhere: not followed") from error
        raise
