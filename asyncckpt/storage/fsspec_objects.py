"""Object stores that fsspec opens (gs, abfs, and others): the finished put is the commit. No torch.

Never `with file_system.open(…)`: an exception inside publishes half a file. What is small is put at the commit; the
rest goes into a file that is not finished before. What a writer that died has sent of one never shows; gs and abfs
forget it within a week, others keep it until a rule of theirs, or somebody, does away with it.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Mapping
from typing import Any

from asyncckpt.storage.base import Upload
from asyncckpt.storage.fsspec_errors import explained
from asyncckpt.storage.fsspec_files import InOrder, SmallUpload
from asyncckpt.storage.fsspec_storage import FsspecStorage

_PIECE_BYTES = 32 << 20  # several blocks, which some clients send side by side
_BLOCK_BYTES = 8 << 20


class ObjectStorage(FsspecStorage):
    """Objects. `can_copy` says whether the store copies in one act, `has_buckets` whether those must be made first.

    What is sent can't be read before the commit, and is not held against a checksum but by the connection itself.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        can_copy: bool = True,
        has_buckets: bool = False,
        piece_bytes: int = _PIECE_BYTES,
        **more: Any,
    ) -> None:
        super().__init__(options, **more)
        self._can_copy = can_copy
        self._has_buckets = has_buckets
        self._piece_bytes = piece_bytes
        self._found: set[str] = set()  # buckets

    def key(self, file_system: Any, place: str) -> str:
        """Without what it takes for an older version's name."""
        return str(file_system.split_path(place)[1]) if self._has_buckets else place

    def begin(self, path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
        if num_bytes > self._piece_bytes:
            self._check_bucket(path)
            return _ObjectUpload(*self.find(path), path, num_bytes, self._piece_bytes)
        return SmallUpload(num_bytes, self._piece_bytes, lambda contents: self._put(path, contents))

    def _put(self, path: str, contents: bytes) -> None:
        file_system, place = self.find(path)
        try:
            with explained(path):
                file_system.pipe_file(place, contents)
        except FileNotFoundError:
            self._check_bucket(path)
            raise

    def piece_bytes(self, path: str, num_bytes: int) -> int:
        return self._piece_bytes

    def list_names(self, directory: str) -> list[str]:
        try:
            return super().list_names(directory)
        except FileNotFoundError:
            self._check_bucket(directory)
            return []

    def _check_bucket(self, path: str) -> None:
        """Raise OSError (ENODEV) if there is no such bucket: its absence looks like that of files. Asks once."""
        bucket = path.split("/", 3)[2]
        if self._has_buckets and bucket not in self._found:
            if self._is_missing(path):
                raise OSError(errno.ENODEV, f"there is no bucket {bucket!r}; make it first, or correct the URL")
            self._found.add(bucket)

    def _is_missing(self, path: str) -> bool:
        """Whether the store says that there is no such bucket. It may not say so to those who may not ask."""
        file_system, place = self.find(path)
        bucket = place.split("/", 1)[0]
        for look in (file_system.info, file_system.ls):  # who may not look at a bucket may list what is in it
            try:
                with explained(path):
                    look(bucket)
            except FileNotFoundError:
                continue
            except OSError:
                pass
            return False
        return True

    def copy(self, source: str, destination: str) -> None:
        if not self._can_copy:
            super().copy(source, destination)
            return
        file_system, place = self.find(source)
        target = self.place(file_system, destination)
        with explained(source):
            file_system.cp_file(place, target)


class _ObjectUpload(Upload):
    num_threads = 1  # the client sends one piece after the other

    def __init__(self, file_system: Any, place: str, path: str, num_bytes: int, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self._path = path
        self._num_bytes = num_bytes
        with explained(path):
            self._file = file_system.open(place, "wb", block_size=min(_BLOCK_BYTES, piece_bytes), autocommit=False)
        _pretend_closed(self._file, True)
        self._pieces = InOrder(self._write)
        self._is_over = False

    def write(self, offset: int, view: memoryview) -> None:
        with explained(self._path):
            self._pieces.write(offset, view)

    def _write(self, view: memoryview) -> None:
        _pretend_closed(self._file, False)
        try:
            self._file.write(view)
        finally:
            _pretend_closed(self._file, True)

    def sync(self) -> None:
        """What is sent is in the store, if not visible yet."""

    def reader(self) -> None:
        return None

    def commit(self) -> None:
        if self._pieces.num_bytes != self._num_bytes:
            raise OSError(errno.EIO, "parts of the upload are missing", self._path)
        with explained(self._path):
            _pretend_closed(self._file, False)
            self._file.close()  # which finishes the object already in clients that don't know autocommit=False
            self._file.commit()
        self._is_over = True

    def abort(self) -> None:
        if not self._is_over:
            self._is_over = True
            with contextlib.suppress(Exception):
                self._file.discard()
            _pretend_closed(self._file, True)


def _pretend_closed(file: Any, is_closed: bool) -> None:
    """A file that is forgotten, or left open at exit, is closed by its `__del__`, which would publish what there is."""
    with contextlib.suppress(AttributeError):
        file.closed = is_closed
