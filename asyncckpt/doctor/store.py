"""What a store that a URL names can do, tried with an object of our own there, gone again at once. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from isal.isal_zlib import crc32

from asyncckpt.cli.output import format_bytes, format_secs
from asyncckpt.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding, Place, format_latency, reason
from asyncckpt.image.fetch import NUM_FETCHING_THREADS
from asyncckpt.storage.base import Storage
from asyncckpt.storage.claim import ClaimedStorage, has_conditions
from asyncckpt.storage.places import Places
from asyncckpt.storage.s3 import S3Storage

_NUM_PARTS = 2
_SLOW = 20e6
_GIGABYTE = 10**9
_ONE_WRITER = "let only one process write to a directory, and see to that yourself"
_RIGHTS = "the credentials need to read, write, list and delete under it, and to abort uploads in parts"
_ANOTHER = "use another store"
_WHOLE_LIFE = "a lifecycle rule for noncurrent versions"

_HINTS = {
    errno.EACCES: _RIGHTS,
    errno.ENODEV: "make the bucket, or look at the URL and the region",
    errno.ECONNREFUSED: "look at endpoint_url, and whether this machine gets through to it",
    errno.ETIMEDOUT: "look at endpoint_url, and whether this machine gets through to it",
}


def check_reaching(place: Place) -> Finding:
    """Whether the store answers, and has the bucket."""
    try:
        started = time.perf_counter()
        place.storage.list_names(place.directory)
        secs = time.perf_counter() - started
        place.storage.version(place.probe)
    except OSError as error:
        return Finding(PROBLEM, reason(error), "every save fails", _HINTS.get(error.errno or 0, ""))
    return Finding(OK, f"the store answers, the first time in {format_latency(secs)}")


def check_writing(place: Place) -> Finding:
    """A small object: written, read back, deleted."""
    contents = os.urandom(4096)
    started = time.perf_counter()
    with _gone_afterwards(place):
        try:
            place.storage.replace(place.probe, contents)
            secs = time.perf_counter() - started
            found = place.storage.read(place.probe, len(contents))
        except OSError as error:
            advice = _HINTS.get(error.errno or 0, "")
            return Finding(PROBLEM, f"no object can be written and read: {reason(error)}", "every save fails", advice)
        if found != contents:
            return Finding(PROBLEM, "an object that was written reads as another one", "", _ANOTHER)
        try:
            place.storage.delete([place.probe])
        except OSError as error:
            return Finding(WARNING, f"nothing can be deleted: {reason(error)}", "retention frees no space", _RIGHTS)
        if place.storage.version(place.probe):
            return Finding(WARNING, "what was deleted is still there", "retention frees no space")
    return Finding(OK, f"an object of 4 kB is written in {format_latency(secs)}, read, and deleted")


def check_conditions(place: Place) -> Finding:
    """Whether a write may be bound to what it replaces: what keeps two writers apart where there are no locks."""
    storage = _storage(place)
    assert isinstance(storage, ClaimedStorage), "a URL's"
    with _gone_afterwards(place):
        try:
            if not has_conditions(storage, place.probe):
                return Finding(WARNING, "conditions of writes are not heeded", "nobody is kept out", _ONE_WRITER)
            version = place.storage.version(place.probe)
            place.storage.replace(place.probe, b"", expected=version)
        except OSError as error:
            return Finding(PROBLEM, f"conditional writes fail: {reason(error)}", "every save fails", _ANOTHER)
    return Finding(OK, "conditional writes are honoured", "one writer at a time; the other gets StorageBusyError")


def check_parts(place: Place) -> Finding:
    """Uploads in parts: that they stay invisible, and can be given up."""
    with _gone_afterwards(place):
        try:
            upload = place.storage.begin(place.probe, _large(place))
        except OSError as error:
            return Finding(PROBLEM, f"no upload in parts can be begun: {reason(error)}", "large saves fail", _RIGHTS)
        try:
            is_visible = bool(place.storage.version(place.probe))
        finally:
            upload.abort()
    if is_visible:
        return Finding(PROBLEM, "an upload in parts is visible before it is complete", "", _ANOTHER)
    return Finding(OK, f"files above {format_bytes(upload.piece_bytes)} go in parts", "visible once they are complete")


def check_speed(place: Place) -> Finding:
    """Of an upload in parts, until it is durable, and of reading it back."""
    contents = memoryview(bytearray(os.urandom(_large(place))))
    with _gone_afterwards(place):
        started = time.perf_counter()
        try:
            _write(place, contents)
        except OSError as error:
            return Finding(PROBLEM, f"no file can be written in parts: {reason(error)}", "large saves fail", _RIGHTS)
        up = len(contents) / (time.perf_counter() - started)
        started = time.perf_counter()
        crc, stored = _read(place, len(contents))
        down = len(contents) / (time.perf_counter() - started)
    if crc != crc32(contents) or stored not in (None, crc):
        return Finding(PROBLEM, "a file that was written reads as another one", "", _ANOTHER)
    found = f"{format_bytes(int(up))}/s up, {format_bytes(int(down))}/s down"
    found += "; no checksum of the whole is kept" if stored is None else "; the store keeps a checksum of the whole"
    choice = f"1 GB is durable after about {format_secs(_GIGABYTE / up)}"
    if up < _SLOW:
        return Finding(NOTE, found, choice, "save less often: `asyncckpt interval --write-secs` says how often")
    return Finding(OK, found, choice)


def check_versions(place: Place) -> Finding:
    """Versioning and Object Lock, which keep what retention deletes."""
    storage = _store(place)
    if storage is None:
        return Finding(NOTE, "unknown: nothing is known of this kind of store")
    bucket = place.directory.split("/")[2]
    try:
        versioning = storage.requests.send("get_bucket_versioning", bucket).get("Status") == "Enabled"
    except OSError as error:
        return Finding(NOTE, f"unknown: {reason(error)}", "", f"if the bucket keeps versions: {_WHOLE_LIFE}")
    locked = False
    with contextlib.suppress(OSError):  # there is no such configuration, or nobody may ask
        answer = storage.requests.send("get_object_lock_configuration", bucket)
        locked = answer.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") == "Enabled"
    if locked:
        choice = "what retention deletes keeps its space until its lock ends"
        return Finding(WARNING, "Object Lock is on", choice, f"another bucket; or a short lock, and {_WHOLE_LIFE}")
    if versioning:
        return Finding(NOTE, "versioning is on", "what retention deletes is kept as an old version", _WHOLE_LIFE)
    return Finding(OK, "neither versioning nor Object Lock", "what retention deletes is gone")


def check_client(place: Place) -> Finding:
    """What speaks to the store."""
    storage = _store(place)
    if storage is None:
        return Finding(NOTE, "unknown")
    return Finding(OK, storage.requests.describe(), "a writer process sends, with a GIL of its own")


def _storage(place: Place) -> Storage:
    return place.storage.storage_of(place.directory) if isinstance(place.storage, Places) else place.storage


def _store(place: Place) -> S3Storage | None:
    storage = _storage(place)
    return storage if isinstance(storage, S3Storage) else None


def _large(place: Place) -> int:
    return _NUM_PARTS * place.storage.piece_bytes(place.probe, 0)


@contextlib.contextmanager
def _gone_afterwards(place: Place) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            place.storage.delete([place.probe])


def _write(place: Place, contents: memoryview) -> None:
    upload = place.storage.begin(place.probe, len(contents))

    def write(offset: int) -> None:
        upload.write(offset, contents[offset : offset + upload.piece_bytes])

    try:
        _side_by_side(range(0, len(contents), upload.piece_bytes), upload.num_threads, write)
        upload.sync()
        upload.commit()
        upload.close()
    finally:
        upload.abort()  # harmless after the commit


def _read(place: Place, num_bytes: int) -> tuple[int, int | None]:
    """The CRC32 of what is there, and the one that the store keeps."""
    contents = memoryview(bytearray(num_bytes))
    piece_bytes = num_bytes // NUM_FETCHING_THREADS
    with place.storage.open(place.probe) as reader:

        def read(offset: int) -> None:
            reader.read_into(offset, contents[offset : offset + piece_bytes])

        _side_by_side(range(0, num_bytes, piece_bytes), NUM_FETCHING_THREADS, read)
        return crc32(contents), reader.stored_checksum()


def _side_by_side(offsets: range, num_threads: int, act: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(num_threads, "asyncckpt-doctor") as threads:
        for _ in threads.map(act, offsets):
            pass
