"""A checkpoint file by its path: found, opened, verified. No torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from asyncckpt.errors import CheckpointError, CheckpointNotFoundError, CheckpointReadError, CorruptCheckpointError
from asyncckpt.image.fetch import NUM_FETCHING_THREADS, fetch
from asyncckpt.image.verify import default_num_threads, verify_reader
from asyncckpt.progress import CountingReader, progress_bar
from asyncckpt.records import VerifyReport
from asyncckpt.storage.base import Reader, Storage
from asyncckpt.storage.local import LocalReader
from asyncckpt.storage.places import Places, full_path

T = TypeVar("T")

BAR_AFTER_SECS = 1.5  # of a fetch, on a terminal
_NUM_READS = 5  # of a file that its writer replaces meanwhile


def verify(path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> VerifyReport:
    """Read every byte of a checkpoint and check it. Blocks; thread-safe; loads nothing, runs nothing.

    A damaged file is a report with problems, not an exception. One that is replaced meanwhile is read anew. Raises
    `CheckpointNotFoundError`, `CheckpointError` for `storage_options` that can't be used, and OSError when reading
    fails.
    """
    return _verify(Places(storage_options), file_path(path), follow_links=True)


def verify_listed(storage: Storage, path: str) -> VerifyReport:
    """As `verify`, of a file that a registry named: what is no file, or can't be read, is a problem too."""
    try:
        return _verify(storage, path, follow_links=False)
    except (OSError, CorruptCheckpointError) as error:
        return VerifyReport(path, 0, 0, (str(error),), None)


def _verify(storage: Storage, path: str, *, follow_links: bool) -> VerifyReport:
    def verify() -> VerifyReport:
        with open_checkpoint(storage, path, follow_links=follow_links) as reader:
            return verify_reader(reader, path, num_threads=num_reading_threads(reader))

    return read_anew(path, verify)


def num_reading_threads(reader: Reader) -> int:
    """How many may usefully read the file side by side: most of them wait for the network where there is one."""
    return default_num_threads() if isinstance(reader, LocalReader) else NUM_FETCHING_THREADS


def file_path(path: str | os.PathLike[str]) -> str:
    """The full path of a checkpoint's file, on this machine or as a URL."""
    full = full_path(path)  # which refuses what must not be repeated
    if os.fspath(path).endswith(os.sep):
        raise ValueError(f"a checkpoint's path names a file, not {os.fspath(path)!r}")
    return full


def open_checkpoint(storage: Storage, path: str, *, follow_links: bool = True) -> Reader:
    """Open for reading. Raises `CheckpointNotFoundError`, and `CorruptCheckpointError` for what is no file.

    With `follow_links=False` that is a symbolic link too: the name came from a file, not from the user.
    """
    try:
        return storage.open(path, follow_links=follow_links)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(f"there is no checkpoint at {path}") from error
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise CorruptCheckpointError(f"{path} is a directory or a device, not a checkpoint file") from error
        if error.errno == errno.ELOOP:
            raise CorruptCheckpointError(f"{path} is a symbolic link, which may lead anywhere: not followed") from error
        raise


def read_anew(path: str, read: Callable[[], T]) -> T:
    """What `read` makes of the file at `path`, which it opens itself: from the start again if that was replaced, or
    deleted, while it was read (ESTALE). So what is read is of one version.

    Raises `CheckpointReadError` for one that is replaced whenever it is read.
    """
    for _ in range(_NUM_READS):
        try:
            return read()
        except OSError as error:
            if error.errno != errno.ESTALE or isinstance(error, CheckpointError):
                raise
            stale = error
    raise CheckpointReadError(
        f"{path} could not be read: {stale.strerror or stale}, each of {_NUM_READS} times; load another checkpoint, or "
        "try again when nobody writes there",
        errno=errno.ESTALE,
    ) from stale


def open_to_load(storage: Storage, path: str, *, follow_links: bool = True) -> LocalReader:
    """As `open_checkpoint`, a file that can be mapped: one from elsewhere is fetched into memory first."""
    return to_be_mapped(open_checkpoint(storage, path, follow_links=follow_links))


def to_be_mapped(reader: Reader) -> LocalReader:
    """The same file, to be mapped: itself, or what was fetched of it, with a bar on a terminal when it takes long.

    The reader must not be used any more. Blocks. Raises OSError.
    """
    if isinstance(reader, LocalReader):
        return reader
    with reader, progress_bar("fetching", reader.num_bytes, after_secs=BAR_AFTER_SECS) as advance:
        return fetch(CountingReader(reader, advance))
