"""File systems that fsspec opens, and that rename (smb, hdfs, webdav, ...): a temporary file, and its rename. No torch.

Whether that is durable only the server knows: fsspec has no fsync.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from typing import Any

from asyncckpt.storage.base import Lock, Reader, Upload
from asyncckpt.storage.fsspec_errors import explained
from asyncckpt.storage.fsspec_files import InOrder, RangeReader, Temporary
from asyncckpt.storage.fsspec_storage import FsspecStorage

_PIECE_BYTES = 8 << 20


class RenameStorage(FsspecStorage):
    """Files. `replaces` says whether a rename replaces what is there; if not, neither do we: that takes two acts.

    A registry must be replaced, so no manager writes there then.
    """

    def __init__(self, options: Mapping[str, Any] | None = None, *, replaces: bool = True, **more: Any) -> None:
        super().__init__(options, **more)
        self._replaces = replaces

    def begin(self, path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
        return _RenameUpload(self, path, num_bytes, replaces=self._replaces)

    def piece_bytes(self, path: str, num_bytes: int) -> int:
        return _PIECE_BYTES

    def copy(self, source: str, destination: str) -> None:
        directory = destination.rsplit("/", 1)[0]
        file_system, place = self.find(directory)
        with explained(directory):
            file_system.info(place)  # FileNotFoundError, rather than a new directory
        super().copy(source, destination)

    def lock(self, directory: str, holder: str) -> Lock:
        if not self._replaces:
            raise OSError(
                errno.EOPNOTSUPP,
                "this kind of storage can't replace a file in one act, as a registry needs it; save to paths of their "
                "own by AsyncCheckpointSaver, or mount it",
                directory,
            )
        return super().lock(directory, holder)


class _RenameUpload(Upload):
    piece_bytes = _PIECE_BYTES
    num_threads = 1

    def __init__(self, storage: RenameStorage, path: str, num_bytes: int, *, replaces: bool) -> None:
        self._path = path
        self._num_bytes = num_bytes
        self._replaces = replaces
        self._temporary = Temporary(path)
        self._file_system, self._place = storage.find(path)
        self._temporary_place = self._file_system._strip_protocol(self._temporary.path)
        self._file: Any = None
        try:
            with explained(path):
                self._file_system.makedirs(self._place.rsplit("/", 1)[0], exist_ok=True)
                self._file = self._file_system.open(self._temporary_place, "wb")
        except BaseException:
            self.abort()
            raise
        self._pieces = InOrder(self._file.write)

    def write(self, offset: int, view: memoryview) -> None:
        with explained(self._path):
            self._pieces.write(offset, view)

    def sync(self) -> None:
        if self._pieces.num_bytes != self._num_bytes:
            raise OSError(errno.EIO, "parts of the upload are missing", self._path)
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with explained(self._path):
                file.close()

    def reader(self) -> Reader:
        return RangeReader(self._file_system, self._temporary_place, self._temporary.path)

    def commit(self) -> None:
        if not self._replaces and self._file_system.exists(self._place):
            raise FileExistsError(
                errno.EEXIST,
                "there is a file, which can't be replaced in one act here: save to another path",
                self._path,
            )
        with explained(self._path):
            self._move()
        self._temporary.end()
        self._temporary_place = ""

    def _move(self) -> None:
        """By the names as they are: a `mv` may expand wildcards, so what moves one file comes first, and is checked."""
        file_system = self._file_system
        getattr(file_system, "mv_file", file_system.mv)(self._temporary_place, self._place)
        found = file_system.info(self._place)
        if found["size"] != self._num_bytes or file_system.exists(self._temporary_place):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._close()
        if self._temporary_place:
            with contextlib.suppress(Exception):
                self._file_system.rm_file(self._temporary_place)
            self._temporary_place = ""
        self._temporary.end()
