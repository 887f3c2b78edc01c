"""Files on a local (or locally mounted) file system.

The commit: write a temporary file in the destination's own directory, held under flock by its writer; fsync it; rename
it over the destination; fsync the directory. Data goes past the page cache (O_DIRECT) where the file system lets it:
faster, and the cache stays the data loader's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Sequence

from asyncckpt.storage import system_calls, temporary
from asyncckpt.storage.base import Reader, Storage, Upload, committing
from asyncckpt.storage.directories import make_directories, open_directory, sync_entries
from asyncckpt.storage.directory_lock import LocalLock, holder_of, is_locked
from asyncckpt.storage.files import Descriptor, remove_quietly, write_all
from asyncckpt.storage.links import share

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_DIRECT_ALIGNMENT = 4096
_PIECE_BYTES = 8 << 20
_NUM_THREADS = 8  # while some wait for the disk, others checksum: 0.97 of the raw disk's speed, with 4 it was 0.89


class LocalStorage(Storage):
    """The local file system. `direct=False` keeps to buffered writes."""

    def __init__(self, *, direct: bool = True) -> None:
        self._direct = direct and _O_DIRECT != 0

    def begin(self, path: str, num_bytes: int, *, expected: str | None = None) -> LocalUpload:
        return LocalUpload(os.path.abspath(path), num_bytes, direct=self._direct)

    def piece_bytes(self, path: str, num_bytes: int) -> int:
        return _PIECE_BYTES

    def open(self, path: str, *, follow_links: bool = True) -> LocalReader:
        return LocalReader(path, follow_links=follow_links)

    def list_names(self, directory: str) -> list[str]:
        return sorted(system_calls.list_directory(directory))

    def delete(self, paths: Sequence[str]) -> None:
        absolute = [os.path.abspath(path) for path in paths]
        for path in absolute:
            with contextlib.suppress(FileNotFoundError):
                system_calls.unlink(path)
        for parent in sorted({os.path.dirname(path) for path in absolute}):
            with contextlib.suppress(FileNotFoundError), open_directory(parent) as directory:
                sync_entries(directory)

    def link(self, source: str, destination: str) -> None:
        source, destination = os.path.abspath(source), os.path.abspath(destination)
        with self.open(source, follow_links=False) as held:
            if not share(held.fd, source, destination):
                self._copy(held, destination)

    def _copy(self, source: LocalReader, destination: str) -> None:
        buffer = memoryview(bytearray(min(_PIECE_BYTES, source.num_bytes)))
        with committing(self.begin(destination, source.num_bytes)) as upload:
            for offset in range(0, source.num_bytes, _PIECE_BYTES):
                piece = buffer[: source.num_bytes - offset]
                source.read_into(offset, piece)
                upload.write(offset, piece)

    def lock(self, directory: str, holder: str) -> LocalLock:
        path = os.path.abspath(directory)
        make_directories(path)
        return LocalLock(path, holder)

    def receive_lock(self, directory: str, share: int | bytes) -> LocalLock:
        assert isinstance(share, int)
        return LocalLock.received(directory, share)

    def is_locked(self, directory: str) -> bool:
        return is_locked(directory)

    def holder(self, directory: str) -> str:
        return holder_of(directory)

    def device(self, directory: str) -> int:
        path = os.path.abspath(directory)
        while True:
            try:
                return system_calls.stat(path).st_dev
            except FileNotFoundError:
                path = os.path.dirname(path)

    def sweep(self, directory: str, *, has_lock: bool = False) -> list[str]:
        return temporary.sweep(directory)


class LocalUpload(Upload):
    """A temporary file under its writer's lock."""

    piece_bytes = _PIECE_BYTES
    num_threads = _NUM_THREADS

    def __init__(self, path: str, num_bytes: int, *, direct: bool) -> None:
        self._path = path
        self._num_bytes = num_bytes
        self._directory = os.path.dirname(path)
        make_directories(self._directory)
        self._file, self._temporary = temporary.create_temporary(path)
        self._direct_file: Descriptor | None = None
        self._direct_refused = False
        self._replaced_file: Descriptor | None = None
        try:
            system_calls.allocate(self._file.fd, num_bytes)
            if direct:
                self._direct_file = _open_direct(self._temporary)
        except BaseException:
            self.abort()
            raise

    def write(self, offset: int, view: memoryview) -> None:
        num_direct = self._write_direct(offset, view)
        if num_direct < len(view):
            write_all(self._file.fd, offset + num_direct, view[num_direct:])

    def _write_direct(self, offset: int, view: memoryview) -> int:
        """Write whole pages past the cache; how many bytes that was, 0 where it can't be done."""
        if self._direct_file is None or self._direct_refused or not _is_aligned(offset, view):
            return 0
        num_bytes = len(view) // _DIRECT_ALIGNMENT * _DIRECT_ALIGNMENT
        try:
            write_all(self._direct_file.fd, offset, view[:num_bytes])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct_refused = True  # other threads may be using the descriptor: it is closed with the upload
            return 0
        return num_bytes

    def sync(self) -> None:
        system_calls.fsync(self._file.fd)

    def reader(self) -> LocalReader:
        return LocalReader(self._temporary)

    def commit(self) -> None:
        if system_calls.fstat(self._file.fd).st_size != self._num_bytes:
            raise OSError(errno.EIO, "the temporary file changed size before it was committed")
        # The directory is opened first, so that once the file is visible only the sync itself can fail.
        with open_directory(self._directory) as directory:
            self._replaced_file = _keep(self._path)
            system_calls.rename(self._temporary, self._path)
            self._temporary = ""
            sync_entries(directory)
        _close(self._direct_file, self._file)

    def close(self) -> None:
        _close(self._replaced_file)

    def abort(self) -> None:
        if self._temporary and self._file.fd != -1:  # in a forked child it is the parent's
            remove_quietly(self._temporary)
            self._temporary = ""
        _close(self._direct_file, self._file, self._replaced_file)


class LocalReader(Reader):
    """An open file; `fd` may be used to open it again by `/proc/self/fd`."""

    def __init__(self, path: str, *, follow_links: bool = True) -> None:
        flags = os.O_RDONLY | os.O_NONBLOCK  # opening a pipe would wait for its writer
        self._file = Descriptor(path, flags if follow_links else flags | os.O_NOFOLLOW)
        try:
            status = system_calls.fstat(self.fd)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ENXIO, "not a regular file", path)
        except BaseException:
            self.close()
            raise
        self.num_bytes = status.st_size

    @classmethod
    def received(cls, fd: int) -> LocalReader:
        """Of a descriptor, which belongs to the reader now."""
        reader = cls.__new__(cls)
        reader._file = Descriptor.received(fd)
        reader.num_bytes = system_calls.fstat(fd).st_size
        return reader

    @property
    def fd(self) -> int:
        return self._file.fd

    def last_change(self) -> tuple[int, int]:
        """The file's size, and when it was last written to: another answer means that its bytes may be others."""
        status = system_calls.fstat(self.fd)
        return status.st_size, status.st_mtime_ns

    def read_into(self, offset: int, view: memoryview) -> None:
        position = 0
        while position < len(view):
            count = system_calls.pread_into(self.fd, view[position:], offset + position)
            if count == 0:
                raise EOFError(f"the file ends at byte {offset + position}")
            position += count

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LocalReader:
        return self


def _is_aligned(offset: int, view: memoryview) -> bool:
    """Whether O_DIRECT takes the view's first pages."""
    if offset % _DIRECT_ALIGNMENT or view.readonly or len(view) < _DIRECT_ALIGNMENT:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) % _DIRECT_ALIGNMENT == 0


def _open_direct(path: str) -> Descriptor | None:
    try:
        return Descriptor(path, os.O_RDWR | _O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


def _keep(path: str) -> Descriptor | None:
    """Hold on to the file that a rename will replace: freeing its blocks within the rename took a quarter of a save."""
    if not hasattr(os, "O_PATH"):
        return None
    try:
        return Descriptor(path, os.O_PATH | os.O_NOFOLLOW)
    except OSError:
        return None


def _close(*files: Descriptor | None) -> None:
    for file in files:
        if file is not None:
            file.close()
