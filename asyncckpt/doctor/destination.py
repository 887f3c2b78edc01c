"""What the directory can do, tried with small files of our own there, each gone again at once."""

from __future__ import annotations

import errno
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from asyncckpt.cli.output import format_bytes
from asyncckpt.doctor.child import run_python
from asyncckpt.doctor.file_system import MEMORY, find_mount
from asyncckpt.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding, Place, format_latency, reason
from asyncckpt.image.arena import PAGE_BYTES, Arena
from asyncckpt.naming import is_checkpoint_name
from asyncckpt.storage import system_calls
from asyncckpt.storage.directories import open_directory
from asyncckpt.storage.files import Descriptor, is_at, remove_quietly, write_all
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.temporary import create_temporary, temporary_path

_NUM_SYNCS = 8
_MAX_SYNCS_SECS = 0.5
_SUSPICIOUS_SYNC_SECS = 30e-6  # the fastest disks take longer, unless their caches survive a power cut
_SLOW_SYNC_SECS = 0.1
_LEAST_BYTES = 16 << 20
_COMFORTABLE_BYTES = 1 << 30
_NUM_INODES = 4  # a save's names at one time: the checkpoint, the registry and the link, and a directory
_CANT = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY})

_HINTS = {
    errno.ENOSPC: "free some space, or inodes",
    errno.EDQUOT: "the quota is used up",
    errno.EACCES: "the directory must be writable by this user",
    errno.EPERM: "the directory must be writable by this user",
    errno.EROFS: "the file system is mounted read-only",
}

_TAKE_LOCK = """
from asyncckpt.storage import system_calls
print(system_calls.try_lock(system_calls.open_file(sys.argv[1], os.O_RDWR)))
"""


@contextmanager
def _probe_file(place: Place) -> Iterator[tuple[Descriptor, str]]:
    """An empty file, which is gone afterwards; named so that a sweep would remove it if we were killed."""
    file, path = create_temporary(place.probe)
    try:
        yield file, path
    finally:
        file.close()
        remove_quietly(path)


def check_writing(place: Place) -> Finding:
    """Whether a file can be made and written to at all."""
    try:
        with _probe_file(place) as (file, _):
            write_all(file.fd, 0, memoryview(bytes(PAGE_BYTES)))
    except OSError as error:
        advice = _HINTS.get(error.errno or 0, "")
        return Finding(PROBLEM, f"no file can be written: {reason(error)}", "every save fails", advice)
    return Finding(OK, "files can be written")


def check_space(place: Place) -> Finding:
    """Bytes and inodes, and how that compares with the checkpoints that are there."""
    status = system_calls.file_system_status(place.directory)
    free = status.f_bavail * status.f_frsize
    inodes = status.f_favail if status.f_files else None  # some file systems make them as needed
    largest = _largest_checkpoint(place.directory)
    found = f"{format_bytes(free)} free" + ("" if inodes is None else f", {inodes:,} inodes")
    choice = "a new checkpoint is written before an old one is deleted"
    if largest:
        found += f"; the largest checkpoint here has {format_bytes(largest)}"
    if inodes is not None and inodes < _NUM_INODES:
        return Finding(PROBLEM, found, choice, "delete some files: there is no room for another name")
    if free < max(largest, _LEAST_BYTES):
        return Finding(PROBLEM, found, choice, "free some space: there is no room for another checkpoint")
    if free < (2 * largest or _COMFORTABLE_BYTES):
        return Finding(WARNING, found, choice, "free some space, or keep fewer checkpoints")
    return Finding(OK, found, choice)


def _largest_checkpoint(directory: str) -> int:
    largest = 0
    for name in system_calls.list_directory(directory):
        if is_checkpoint_name(name):
            try:
                largest = max(largest, system_calls.lstat(os.path.join(directory, name)).st_size)
            except FileNotFoundError:  # retention was faster
                continue
    return largest


def check_fsync(place: Place) -> Finding:
    """That it works, and whether it takes the time that a disk needs."""
    if "eatmydata" in place.environment.get("LD_PRELOAD", ""):
        return Finding(PROBLEM, "libeatmydata is loaded: fsync does nothing", "", "run without it")
    try:
        with _probe_file(place) as (file, _):
            secs = statistics.median(_sync_secs(file))
    except OSError as error:
        return Finding(PROBLEM, f"fsync fails: {reason(error)}", "every save fails", "mend the storage")
    found = f"of 4 kB takes {format_latency(secs)}"
    choice = "a save is acknowledged after it, never before"
    mount = find_mount(place)
    if secs >= _SUSPICIOUS_SYNC_SECS or (mount is not None and mount.kind in MEMORY):
        slow = secs > _SLOW_SYNC_SECS
        return Finding(NOTE if slow else OK, found, choice, "a save waits for about five of them" if slow else "")
    found += ", less than most disks need: something on the way may ignore it, or its cache survives a power cut"
    return Finding(WARNING, found, choice, "ask whoever runs the storage which of the two it is")


def _sync_secs(file: Descriptor) -> Iterator[float]:
    """How long each of a few took, every time of a new page."""
    first = time.perf_counter()
    for number in range(_NUM_SYNCS):
        write_all(file.fd, number * PAGE_BYTES, memoryview(os.urandom(PAGE_BYTES)))
        started = time.perf_counter()
        system_calls.fsync(file.fd)
        ended = time.perf_counter()
        yield ended - started
        if ended - first > _MAX_SYNCS_SECS:
            return


def check_directory_fsync(place: Place) -> Finding:
    """Without it a file's name may be lost, however durable the file is."""
    try:
        with open_directory(place.directory) as directory, _probe_file(place):
            started = time.perf_counter()
            system_calls.fsync(directory.fd)
            secs = time.perf_counter() - started
    except OSError as error:
        if error.errno not in _CANT:
            return Finding(PROBLEM, f"fails: {reason(error)}", "every save fails", "mend the storage")
        found = f"not supported: {reason(error)}"
        choice = "goes on without: names become durable when the file system pleases"
        return Finding(WARNING, found, choice, "a power cut may lose acknowledged saves: save elsewhere")
    return Finding(OK, f"takes {format_latency(secs)}")


def check_commit(place: Place) -> Finding:
    """A file that is replaced by another in one act, as every commit does it."""
    storage = LocalStorage()
    path = temporary_path(place.probe)
    try:
        storage.replace(path, b"old")
        started = time.perf_counter()
        storage.replace(path, b"new")
        secs = time.perf_counter() - started
        contents = storage.read(path, 3)
    except OSError as error:
        return Finding(PROBLEM, f"a file can't replace another: {reason(error)}", "every save fails")
    finally:
        remove_quietly(path)
    if contents != b"new":
        return Finding(PROBLEM, "a file that replaced another still reads as the old one")
    return Finding(OK, f"a file replaces another, durably, in {format_latency(secs)}")


def check_locks(place: Place) -> Finding:
    """flock: whether it is there, and keeps another process out."""
    unsafe = "let only one process write to the directory, and remove .asyncckpt-*.tmp of killed ones by hand"
    file = Descriptor(path := temporary_path(place.probe), os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        locked = system_calls.try_lock(file.fd)
        taken_twice = run_python(_TAKE_LOCK, path) == "True"
    except OSError as error:
        if error.errno is None:
            return Finding(NOTE, f"there, but not tried from another process: {error}")
        return Finding(WARNING, f"none: {reason(error)}", "nobody is kept out", unsafe)
    finally:
        file.close()
        remove_quietly(path)
    if not locked or taken_twice:
        return Finding(WARNING, "a lock keeps no other process out", "asks for locks, in vain", unsafe)
    return Finding(OK, "flock keeps another process out", "one writer at a time; others wait, then StorageBusyError")


def check_direct_writing(place: Place) -> Finding:
    """O_DIRECT."""
    flag = getattr(os, "O_DIRECT", 0)
    buffered = "buffered writes; they push other files out of the page cache"
    arena = Arena(PAGE_BYTES)
    try:
        with _probe_file(place) as (_, path):
            if not flag:
                return Finding(NOTE, "this system has none", buffered)
            with Descriptor(path, os.O_RDWR | flag) as file:
                write_all(file.fd, 0, arena.buffer[:PAGE_BYTES])
    except OSError as error:
        if error.errno not in _CANT:
            raise
        return Finding(NOTE, f"refused: {reason(error)}", buffered)
    finally:
        arena.close()
    return Finding(OK, "taken", "writes past the page cache, which stays the data loader's")


def check_links(place: Place) -> Finding:
    """How one checkpoint gets its second name, `best_model.pt`."""
    with _probe_file(place) as (source, path), _probe_file(place) as (clone, _):
        write_all(source.fd, 0, memoryview(bytes(PAGE_BYTES)))
        reflink = _refusal(lambda: system_calls.clone(source.fd, clone.fd))
        link = temporary_path(place.probe)
        try:
            hard_link = _refusal(lambda: system_calls.link(path, link))
            if not hard_link and not is_at(source.fd, link):
                hard_link = "no (the name leads to another file)"
        finally:
            remove_quietly(link)
    found = f"reflinks: {reflink or 'yes'}; hard links: {hard_link or 'yes'}"
    if not reflink:
        return Finding(OK, found, "best_model.pt is a reflink of the best checkpoint: no second copy")
    if not hard_link:
        return Finding(OK, found, "best_model.pt is a hard link to the best checkpoint: don't write into it")
    return Finding(NOTE, found, "best_model.pt is a second copy", "leave room for one checkpoint more")


def _refusal(action: Callable[[], None]) -> str:
    """Why it can't be done; nothing if it was."""
    try:
        action()
    except OSError as error:
        return f"no ({reason(error)})"
    return ""
