"""The files of file systems that fsspec opens: how they are read, and what uploads to them are made of. No torch."""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from asyncckpt.storage.base import Reader, Upload
from asyncckpt.storage.claim import new_temporary_name
from asyncckpt.storage.fsspec_errors import explained

_VERSION_KEYS = ("etag", "ETag", "generation", "md5Hash", "ino", "mtime", "modified", "last_modified", "LastModified")


class Temporary:
    """The name of one attempt's file beside its destination, known as alive in this process until `end`."""

    alive: ClassVar[set[str]] = set()

    def __init__(self, path: str) -> None:
        self._name = new_temporary_name(path, secrets.token_hex(8))
        self.path = f"{path.rsplit('/', 1)[0]}/{self._name}"
        self.alive.add(self._name)

    def end(self) -> None:
        self.alive.discard(self._name)


class RangeReader(Reader):
    """One version of a file, read by ranges: after each it is made sure that it is still the same (else ESTALE)."""

    def __init__(self, file_system: Any, place: str, path: str) -> None:
        self._file_system, self._place, self._path = file_system, place, path
        found = self._look()
        if found["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self.num_bytes = int(found["size"])
        self._seen = _version(found)

    def _look(self) -> Mapping[str, Any]:
        with explained(self._path):
            found: Mapping[str, Any] = self._file_system.info(self._place)
        return found

    def read_into(self, offset: int, view: memoryview) -> None:
        stop = offset + len(view)
        if stop > self.num_bytes:
            raise EOFError(f"the file ends at byte {self.num_bytes}")
        if len(view):
            try:
                with explained(self._path):
                    contents = self._file_system.cat_file(self._place, start=offset, end=stop)
                is_same = _version(self._look()) == self._seen
            except FileNotFoundError:
                is_same = False
            if not is_same:
                raise OSError(errno.ESTALE, "it was replaced or deleted while it was read", self._path)
            if len(contents) != len(view):
                raise EOFError(f"the file ends at byte {offset + len(contents)}")
            view[:] = contents

    def close(self) -> None:
        """Nothing is held."""


class InOrder:
    """Takes pieces in any order, and passes them on in the file's. What comes too early is copied. Thread-safe."""

    def __init__(self, pass_on: Callable[[memoryview], object]) -> None:
        self._pass_on = pass_on
        self._lock = threading.Lock()
        self._early: dict[int, bytes] = {}
        self.num_bytes = 0

    def write(self, offset: int, view: memoryview) -> None:
        with self._lock:
            if offset != self.num_bytes:
                self._early[offset] = bytes(view)
                return
            self._take(view)
            while (early := self._early.pop(self.num_bytes, None)) is not None:
                self._take(memoryview(early))

    def _take(self, view: memoryview) -> None:
        self._pass_on(view)
        self.num_bytes += len(view)


class SmallUpload(Upload):
    """A file that is kept in memory, and put by `put` at the commit."""

    num_threads = 1

    def __init__(self, num_bytes: int, piece_bytes: int, put: Callable[[bytes], object]) -> None:
        self.piece_bytes = piece_bytes
        self._contents = bytearray(num_bytes)
        self._put = put

    def write(self, offset: int, view: memoryview) -> None:
        self._contents[offset : offset + len(view)] = view

    def sync(self) -> None:
        """Nothing is durable, or lost, before the commit."""

    def reader(self) -> None:
        return None

    def commit(self) -> None:
        self._put(bytes(self._contents))

    def abort(self) -> None:
        self._contents = bytearray()


def _version(found: Mapping[str, Any]) -> tuple[str, ...]:
    """What changes when a file does, as far as its file system tells."""
    return (str(found["size"]), *(str(found[key]) for key in _VERSION_KEYS if key in found))
