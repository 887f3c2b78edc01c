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
import secrets
import stat
import weakref
from collections.abc import Iterator, Sequence

from asyncckpt.naming import LOCK_NAME, is_temporary_name, temporary_name
from asyncckpt.storage import system_calls
from asyncckpt.storage.base import Lock, Reader, Storage, Upload

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_DIRECT_ALIGNMENT = 4096
_PIECE_BYTES = 8 << 20
_NUM_THREADS = 8  # while some wait for the disk, others checksum: 0.97 of the raw disk's speed, with 4 it was 0.89
_MAX_NAMES_TRIED = 100
_MAX_HOLDER_BYTES = 500
# How file systems say that they have no reflinks or hard links (EMLINK: not one more).
_UNSUPPORTED = frozenset(
    {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES}
)


class LocalStorage(Storage):
    """The local file system. `direct=False` keeps to buffered writes."""

    def __init__(self, *, direct: bool = True) -> None:
        self._direct = direct and _O_DIRECT != 0

    def begin(self, path: str, num_bytes: int) -> LocalUpload:
        return LocalUpload(os.path.abspath(path), num_bytes, direct=self._direct)

    def open(self, path: str, *, follow_links: bool = True) -> LocalReader:
        return LocalReader(path, follow_links=follow_links)

    def list_names(self, directory: str) -> list[str]:
        return sorted(system_calls.list_directory(directory))

    def delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                system_calls.unlink(path)
        for directory in sorted({os.path.dirname(path) for path in paths}):
            sync_directory(directory)

    def link(self, source: str, destination: str) -> None:
        with self.open(source, follow_links=False) as held, _open_directory(os.path.dirname(destination)) as directory:
            # Locked, so that no sweeper takes the link's temporary name, the same file, for a dead writer's.
            with contextlib.suppress(OSError):
                system_calls.try_lock(held.fd)
            temporary = _clone(held.fd, destination) or _hard_link(source, destination)
            if not temporary:
                self._copy(held, destination)
                return
            try:
                system_calls.rename(temporary, destination)
            finally:
                with contextlib.suppress(FileNotFoundError):  # renamed onto the very same file, it stays
                    system_calls.unlink(temporary)
            _sync_entries(directory)

    def _copy(self, source: LocalReader, destination: str) -> None:
        upload = self.begin(destination, source.num_bytes)
        try:
            buffer = memoryview(bytearray(min(_PIECE_BYTES, source.num_bytes)))
            for offset in range(0, source.num_bytes, _PIECE_BYTES):
                piece = buffer[: min(_PIECE_BYTES, source.num_bytes - offset)]
                source.read_into(offset, piece)
                upload.write(offset, piece)
            upload.sync()
            upload.commit()
            upload.close()
        except BaseException:
            upload.abort()
            raise

    def lock(self, directory: str, holder: str) -> LocalLock:
        _make_directories(os.path.abspath(directory))
        return LocalLock(os.path.join(directory, LOCK_NAME), holder)

    def sweep(self, directory: str) -> list[str]:
        try:
            names = [name for name in system_calls.list_directory(directory) if is_temporary_name(name)]
        except OSError:
            return []
        paths = [os.path.join(directory, name) for name in names]
        return [path for path in paths if _remove_if_dead(path)]


class LocalUpload(Upload):
    """A temporary file under its writer's lock."""

    piece_bytes = _PIECE_BYTES
    num_threads = _NUM_THREADS

    def __init__(self, path: str, num_bytes: int, *, direct: bool) -> None:
        self._path = path
        self._num_bytes = num_bytes
        self._directory = os.path.dirname(path)
        _make_directories(self._directory)
        self._file, self._temporary = _create_locked(path)
        self._direct_file = -1
        self._direct_refused = False
        self._replaced_file = -1
        _uploads.add(self)
        try:
            system_calls.allocate(self._file, num_bytes)
            if direct:
                self._direct_file = _open_direct(self._temporary)
        except BaseException:
            self.abort()
            raise

    def write(self, offset: int, view: memoryview) -> None:
        direct_bytes = len(view) // _DIRECT_ALIGNMENT * _DIRECT_ALIGNMENT if self._can_write_direct(offset, view) else 0
        if direct_bytes and not self._write_direct(offset, view[:direct_bytes]):
            direct_bytes = 0
        if direct_bytes < len(view):
            _write_all(self._file, offset + direct_bytes, view[direct_bytes:])

    def _can_write_direct(self, offset: int, view: memoryview) -> bool:
        if self._direct_file == -1 or self._direct_refused:
            return False
        if offset % _DIRECT_ALIGNMENT or view.readonly or len(view) < _DIRECT_ALIGNMENT:
            return False
        return ctypes.addressof(ctypes.c_char.from_buffer(view)) % _DIRECT_ALIGNMENT == 0

    def _write_direct(self, offset: int, view: memoryview) -> bool:
        """False when the file system refuses unbuffered writes after all; from then on they are buffered."""
        try:
            _write_all(self._direct_file, offset, view)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct_refused = True  # other threads may be using the descriptor: it is closed with the upload
            return False
        return True

    def sync(self) -> None:
        system_calls.fsync(self._file)

    def reader(self) -> LocalReader:
        return LocalReader(self._temporary)

    def commit(self) -> None:
        if system_calls.fstat(self._file).st_size != self._num_bytes:
            raise OSError(errno.EIO, "the temporary file changed size before it was committed")
        # The directory is opened first, so that once the file is visible only the sync itself can fail.
        with _open_directory(self._directory) as directory:
            self._replaced_file = _keep(self._path)
            system_calls.rename(self._temporary, self._path)
            self._temporary = ""
            _sync_entries(directory)
        self._close("_direct_file", "_file")

    def close(self) -> None:
        self._close("_replaced_file")

    def abort(self) -> None:
        if self._temporary:
            with contextlib.suppress(OSError):
                system_calls.unlink(self._temporary)
            self._temporary = ""
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close whatever is open; a forked child does only this."""
        self._close("_direct_file", "_file", "_replaced_file")

    def _close(self, *names: str) -> None:
        for name in names:
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd != -1:
                _close_quietly(fd)


class LocalReader(Reader):
    """An open file; `fd` may be used to open it again by `/proc/self/fd`."""

    def __init__(self, path: str, *, follow_links: bool = True) -> None:
        flags = os.O_RDONLY | os.O_NONBLOCK  # opening a pipe would wait for its writer
        self.fd = system_calls.open_file(path, flags if follow_links else flags | os.O_NOFOLLOW)
        try:
            status = system_calls.fstat(self.fd)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ENXIO, "not a regular file", path)
        except BaseException:
            _close_quietly(self.fd)
            raise
        self.num_bytes = status.st_size

    def read_into(self, offset: int, view: memoryview) -> None:
        position = 0
        while position < len(view):
            count = system_calls.pread_into(self.fd, view[position:], offset + position)
            if count == 0:
                raise EOFError(f"the file ends at byte {offset + position}")
            position += count

    def close(self) -> None:
        if self.fd != -1:
            system_calls.close(self.fd)
            self.fd = -1

    def __enter__(self) -> LocalReader:
        return self


class LocalLock(Lock):
    """A file under flock, which names its holder. The file stays: removing a lock's file is a race."""

    def __init__(self, path: str, holder: str) -> None:
        self._path = path
        self._file = system_calls.open_file(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            if not _lock_if_supported(self._file):
                raise BlockingIOError(errno.EWOULDBLOCK, _read_holder(self._file), path)
            system_calls.truncate(self._file, 0)
            _write_all(self._file, 0, memoryview(holder.encode()))
        except BaseException:
            self._close()
            raise
        _locks.add(self)

    def is_intact(self) -> bool:
        if self._file == -1:
            return False
        try:
            there = system_calls.stat(self._path)
        except OSError:
            return False
        mine = system_calls.fstat(self._file)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def release(self) -> None:
        if self._file != -1:
            with contextlib.suppress(OSError):
                system_calls.truncate(self._file, 0)
            self._close()

    def forget(self) -> None:
        """In a forked child: the lock is the parent's, and would otherwise last as long as both."""
        self._close()

    def _close(self) -> None:
        fd, self._file = self._file, -1
        if fd != -1:
            _close_quietly(fd)

    def __del__(self) -> None:
        if getattr(self, "_file", -1) != -1:
            self.release()


def _read_holder(lock: int) -> str:
    """One line for people; anybody may have written it."""
    buffer = bytearray(_MAX_HOLDER_BYTES)
    count = system_calls.pread_into(lock, memoryview(buffer), 0)
    text = buffer[:count].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else " " for character in text).strip() or "an unknown process"


def sync_directory(path: str) -> None:
    """Make the directory's entries durable."""
    with _open_directory(path) as directory:
        _sync_entries(directory)


@contextlib.contextmanager
def _open_directory(path: str) -> Iterator[int]:
    fd = system_calls.open_file(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        _close_quietly(fd)


def _sync_entries(directory: int) -> None:
    try:
        system_calls.fsync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems can't sync directories
            raise


def _make_directories(path: str) -> None:
    """Make what is missing, each level durable in its parent before anything is put in it.

    So is the deepest level that is there already: another rank may have made it a moment ago, or an attempt of ours
    whose sync failed.
    """
    parent = os.path.dirname(path)
    try:
        system_calls.stat(path)
    except FileNotFoundError:
        _make_directories(parent)
        with contextlib.suppress(FileExistsError):  # another rank was faster
            system_calls.make_directory(path)
        sync_directory(parent)
    else:
        with contextlib.suppress(PermissionError):  # a parent that we can't read, /home say: not one that we made
            sync_directory(parent)


def _create_locked(path: str) -> tuple[int, str]:
    """Create a temporary file beside `path` and lock it, so that it counts as alive as long as we do."""
    directory, name = os.path.split(path)
    for _ in range(_MAX_NAMES_TRIED):
        temporary = os.path.join(directory, temporary_name(secrets.token_hex(8), name))
        fd = system_calls.open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        ours = False
        try:
            # A sweeper may see the file before it is locked: then it is gone, or about to be. Take another name.
            ours = _lock_if_supported(fd) and system_calls.fstat(fd).st_nlink > 0
            if ours:
                return fd, temporary
        finally:
            if not ours:
                _close_quietly(fd)
                with contextlib.suppress(OSError):
                    system_calls.unlink(temporary)
    raise OSError(errno.EAGAIN, "another program locks every new file here", directory)


def _lock_if_supported(fd: int) -> bool:
    try:
        return system_calls.try_lock(fd)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            return True  # a network file system without locks: the sweeper can't lock it either, and leaves it alone
        raise


def _keep(path: str) -> int:
    """Hold on to the file that a rename will replace: freeing its blocks within the rename took a quarter of a save."""
    if not hasattr(os, "O_PATH"):
        return -1
    try:
        return system_calls.open_file(path, os.O_PATH | os.O_NOFOLLOW)
    except OSError:
        return -1


def _clone(source: int, destination: str) -> str:
    """A temporary file beside `destination` that shares the source's blocks; "" where the file system can't."""
    fd, temporary = _create_locked(destination)
    try:
        system_calls.clone(source, fd)
        system_calls.fsync(fd)
    except OSError as error:
        with contextlib.suppress(OSError):
            system_calls.unlink(temporary)
        if error.errno not in _UNSUPPORTED:
            raise
        return ""
    finally:
        _close_quietly(fd)
    return temporary


def _hard_link(source: str, destination: str) -> str:
    """A temporary name for the same file beside `destination`; "" where the file system can't."""
    directory, name = os.path.split(destination)
    temporary = os.path.join(directory, temporary_name(secrets.token_hex(8), name))
    try:
        system_calls.link(source, temporary)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return ""
    return temporary


def _open_direct(path: str) -> int:
    try:
        return system_calls.open_file(path, os.O_RDWR | _O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return -1
        raise


def _write_all(fd: int, offset: int, view: memoryview) -> None:
    position = 0
    while position < len(view):
        count = system_calls.pwrite(fd, view[position:], offset + position)
        if count == 0:
            raise OSError(errno.EIO, "the file system wrote nothing and gave no error")
        position += count


def _remove_if_dead(path: str) -> bool:
    """Remove a temporary file whose lock is free. It is removed while locked, so its writer can't come back."""
    try:
        fd = system_calls.open_file(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        mine = system_calls.fstat(fd)
        if not stat.S_ISREG(mine.st_mode) or not system_calls.try_lock(fd):
            return False
        there = system_calls.stat(path)
        if (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            return False
        system_calls.unlink(path)
    except OSError:
        return False
    finally:
        _close_quietly(fd)
    return True


def _close_quietly(fd: int) -> None:
    """What matters was synced before; a network file system's late word about the rest changes nothing."""
    with contextlib.suppress(OSError):
        system_calls.close(fd)


_uploads: weakref.WeakSet[LocalUpload] = weakref.WeakSet()
_locks: weakref.WeakSet[LocalLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for upload in list(_uploads):
        upload.close_descriptors()
    for lock in list(_locks):
        lock.forget()


os.register_at_fork(after_in_child=_close_in_child)
