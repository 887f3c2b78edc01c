"""`memory://`: fsspec's files in this process's memory, for tests and notebooks; gone with it. No torch."""

from __future__ import annotations

import errno
import os
from typing import Any

from asyncckpt.paths import scheme_of
from asyncckpt.storage.base import Reader, Upload
from asyncckpt.storage.fsspec_errors import explained
from asyncckpt.storage.fsspec_storage import FsspecStorage

_PIECE_BYTES = 8 << 20


class MemoryStorage(FsspecStorage):
    """Files in memory: written in place before anybody sees them, then named."""

    def is_shared(self, directory: str) -> bool:
        return False

    def connect(self, path: str) -> Any:
        """One for all who have the same options: it is the file system's instance that holds the files."""
        from fsspec import get_filesystem_class

        return get_filesystem_class(scheme_of(path))(**self._options)

    def begin(self, path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
        return _MemoryUpload(*self.find(path), path, num_bytes)

    def piece_bytes(self, path: str, num_bytes: int) -> int:
        return _PIECE_BYTES

    def open(self, path: str, *, follow_links: bool = True) -> Reader:
        file_system, place = self.find(path)
        with explained(path):
            if file_system.info(place)["type"] == "directory":
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            return _MemoryReader(file_system.open(place))

    def list_names(self, directory: str) -> list[str]:
        try:
            return super().list_names(directory)
        except FileNotFoundError:
            return []

    def is_near(self, directory: str) -> bool:
        return True

    def sweep(self, directory: str, *, has_lock: bool = False) -> list[str]:
        return []


class _MemoryUpload(Upload):
    piece_bytes = _PIECE_BYTES
    num_threads = 2

    def __init__(self, file_system: Any, place: str, path: str, num_bytes: int) -> None:
        from fsspec.implementations.memory import MemoryFile

        self._path = path
        self._file = MemoryFile(file_system, place)
        if num_bytes:
            self._file.seek(num_bytes - 1)
            self._file.write(b"\0")

    def write(self, offset: int, view: memoryview) -> None:
        self._file.getbuffer()[offset : offset + len(view)] = view

    def sync(self) -> None:
        """There is nothing to sync to."""

    def reader(self) -> Reader:
        return _MemoryReader(self._file)

    def commit(self) -> None:
        with explained(self._path):
            self._file.commit()

    def abort(self) -> None:
        """It has no name yet, or is committed."""


class _MemoryReader(Reader):
    """The file itself, whatever is at its path by now."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.num_bytes = file.size

    def read_into(self, offset: int, view: memoryview) -> None:
        contents = self._file.getbuffer()[offset : offset + len(view)]
        if len(contents) != len(view):
            raise EOFError(f"the file ends at byte {self._file.size}")
        view[:] = contents

    def close(self) -> None:
        """Nothing is held."""
