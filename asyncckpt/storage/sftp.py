"""Files on a server that is reached by SSH: a temporary file, fsync, and a rename that replaces. No torch.

fsspec connects; the rest is said to paramiko's client directly, since fsspec knows neither fsync nor hard links, and
waits for an answer after every 32 KiB. A client is not thread-safe, so every upload and every reader has one of its
own, on a connection that they share.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from asyncckpt.storage.base import Reader, Upload
from asyncckpt.storage.fsspec_errors import explained
from asyncckpt.storage.fsspec_files import Temporary
from asyncckpt.storage.fsspec_storage import FsspecStorage
from asyncckpt.storage.sftp_requests import make_link, read_into, rename, sync_directory, sync_file, write

_PIECE_BYTES = 8 << 20
_CONNECT_SECS = 20.0
_MAX_SILENT_SECS = 60.0
_KEEP_ALIVE_SECS = 15


class SFTPStorage(FsspecStorage):
    """Files under `sftp://host/…`. `options` are those of fsspec's sftp: username, port, key_filename, password, …"""

    def __init__(self, options: Mapping[str, Any] | None = None, **more: Any) -> None:
        super().__init__({"timeout": _CONNECT_SECS, **(options or {})}, **more)

    def connect(self, path: str) -> Any:
        file_system = super().connect(path)
        file_system.client.get_transport().set_keepalive(_KEEP_ALIVE_SECS)
        file_system.ftp.get_channel().settimeout(_MAX_SILENT_SECS)
        file_system.lock = threading.Lock()  # of its own client, which asks the small questions
        file_system.more = []  # connections, once the server opens no more clients on this one
        return file_system

    def place(self, file_system: Any, path: str) -> str:
        """All that follows the server: fsspec's would end at a "?"."""
        return "/" + path.split("/", 3)[3]

    def is_connected(self, file_system: Any) -> bool:
        transport = file_system.client.get_transport()
        return transport is not None and bool(transport.is_active())

    def client(self, path: str) -> Any:
        """A client for one upload or reader. Blocks for some milliseconds."""
        import paramiko

        file_system, _ = self.find(path)
        with file_system.lock, explained(path):
            for connection in (file_system, *file_system.more):
                with contextlib.suppress(paramiko.ChannelException):
                    client = connection.client.open_sftp()
                    client.get_channel().settimeout(_MAX_SILENT_SECS)
                    return client
            file_system.more.append(super().connect(path))
            return file_system.more[-1].ftp

    @contextlib.contextmanager
    def asking(self, path: str) -> Iterator[tuple[Any, str]]:
        """The client for small questions, for the length of the block, and the path on the server."""
        file_system, place = self.find(path)
        with file_system.lock, explained(path):
            yield file_system.ftp, place

    def begin(self, path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
        return _SFTPUpload(self, path, num_bytes)

    def piece_bytes(self, path: str, num_bytes: int) -> int:
        return _PIECE_BYTES

    def open(self, path: str, *, follow_links: bool = True) -> Reader:
        with self.asking(path) as (client, place):
            look = client.stat if follow_links else client.lstat
            mode = look(place).st_mode or 0
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, "a symbolic link, which may lead anywhere", path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.ENXIO, "not a regular file", path)
        return _SFTPReader(self, path)

    def list_names(self, directory: str) -> list[str]:
        with self.asking(directory) as (client, place):
            return sorted(client.listdir(place))

    def delete(self, paths: Sequence[str]) -> None:
        for path in dict.fromkeys(paths):
            with contextlib.suppress(FileNotFoundError), self.asking(path) as (client, place):
                client.remove(place)
        for directory in dict.fromkeys(path.rsplit("/", 1)[0] for path in paths):
            with contextlib.suppress(FileNotFoundError), self.asking(directory) as (client, place):
                sync_directory(client, place)

    def copy(self, source: str, destination: str) -> None:
        """By a hard link, where the server makes them."""
        with self.open(source, follow_links=False):
            pass
        directory = destination.rsplit("/", 1)[0]
        temporary = Temporary(destination)
        try:
            with self.asking(directory) as (client, place):
                client.stat(place)
                try:
                    make_link(client, self.find(source)[1], self.find(temporary.path)[1])
                except OSError:
                    is_linked = False
                else:
                    is_linked = True
                    rename(client, self.find(temporary.path)[1], self.find(destination)[1])
                    sync_directory(client, place)
        finally:
            with contextlib.suppress(OSError):  # a rename onto a link of the same file leaves it
                self.delete([temporary.path])
            temporary.end()
        if not is_linked:
            super().copy(source, destination)

    def make_directories(self, path: str) -> None:
        """Those that lead to a file, each durable in its parent."""
        with self.asking(path) as (client, place):
            missing = []
            parent = place.rsplit("/", 1)[0]
            while parent and not _exists(client, parent):
                missing.append(parent)
                parent = parent.rsplit("/", 1)[0]
            for directory in reversed(missing):
                with contextlib.suppress(OSError):  # somebody else may just have made it; if not, opening fails
                    client.mkdir(directory)
                sync_directory(client, directory.rsplit("/", 1)[0] or "/")


class _SFTPUpload(Upload):
    """A temporary file, with a client of its own."""

    piece_bytes = _PIECE_BYTES
    num_threads = 1  # it is one connection all the same

    def __init__(self, storage: SFTPStorage, path: str, num_bytes: int) -> None:
        self._storage = storage
        self._path = path
        self._num_bytes = num_bytes
        self._lock = threading.Lock()
        storage.make_directories(path)
        self._place = storage.find(path)[1]
        self._temporary = Temporary(path)
        self._temporary_place = storage.find(self._temporary.path)[1]
        self._client: Any = None
        try:
            self._client = storage.client(path)
            with explained(path):
                self._file = self._client.open(self._temporary_place, "wbx", bufsize=0)
        except BaseException:
            self.abort()
            raise

    def write(self, offset: int, view: memoryview) -> None:
        with self._lock, explained(self._path):
            write(self._client, self._file.handle, offset, view)

    def sync(self) -> None:
        with self._lock, explained(self._path):
            sync_file(self._client, self._file.handle)

    def reader(self) -> Reader:
        return _SFTPReader(self._storage, self._temporary.path)

    def commit(self) -> None:
        with explained(self._path):
            num_bytes = self._file.stat().st_size
        if num_bytes != self._num_bytes:
            raise OSError(errno.EIO, "the temporary file changed size before it was committed", self._path)
        with explained(self._path):
            rename(self._client, self._temporary_place, self._place)
            self._temporary_place = ""
            sync_directory(self._client, self._place.rsplit("/", 1)[0] or "/")
        self._end()

    def _end(self) -> None:
        self._temporary.end()
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.close()

    def abort(self) -> None:
        if self._temporary_place:
            with contextlib.suppress(OSError):
                self._storage.delete([self._temporary.path])
            self._temporary_place = ""
        self._end()


class _SFTPReader(Reader):
    """An open file, with a client of its own."""

    def __init__(self, storage: SFTPStorage, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._client = storage.client(path)
        try:
            with explained(path):
                self._file = self._client.open(storage.find(path)[1], "rb", bufsize=0)
                self.num_bytes = self._file.stat().st_size
        except BaseException:
            self.close()
            raise

    def read_into(self, offset: int, view: memoryview) -> None:
        with self._lock, explained(self._path):
            count = read_into(self._client, self._file.handle, offset, view)
        if count != len(view):
            raise EOFError(f"the file ends at byte {offset + count}")

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._client.close()


def _exists(client: Any, place: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        client.stat(place)
        return True
    return False
