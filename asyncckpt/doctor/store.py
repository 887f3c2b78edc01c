"""What a store that a URL names can do, tried with objects of our own there, gone again at once. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
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
from asyncckpt.storage.s3 import S3Storage, split

_NUM_PARTS = 2
_SLOW = 20e6
_GIGABYTE = 10**9
_ONE_WRITER = "let only one process write to a directory, and see to that yourself"
_RIGHTS = "the credentials need to read, write, list and delete under it, and to list and abort uploads in parts"
_UNFINISHED = "or let a lifecycle rule abort incomplete uploads"
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
    with _probe(place) as path:
        try:
            place.storage.replace(path, contents)
            secs = time.perf_counter() - started
            found = place.storage.read(path, len(contents))
        except OSError as error:
            advice = _HINTS.get(error.errno or 0, "")
            return Finding(PROBLEM, f"no object can be written and read: {reason(error)}", "every save fails", advice)
        if found != contents:
            return Finding(PROBLEM, "an object that was written reads as another one", "", _ANOTHER)
        try:
            place.storage.delete([path])
        except OSError as error:
            return Finding(WARNING, f"nothing can be deleted: {reason(error)}", "retention frees no space", _RIGHTS)
        if place.storage.version(path):
            return Finding(WARNING, "what was deleted is still there", "retention frees no space")
    return Finding(OK, f"an object of 4 kB is written in {format_latency(secs)}, read, and deleted")


def check_conditions(place: Place) -> Finding:
    """Whether a write may be bound to what it replaces: what keeps two writers apart where there are no locks."""
    storage = _storage(place)
    assert isinstance(storage, ClaimedStorage), "a URL's"
    with _probe(place) as path:
        try:
            if not has_conditions(storage, path):
                return Finding(WARNING, "conditions of writes are not heeded", "nobody is kept out", _ONE_WRITER)
            storage.replace(path, b"", expected=storage.version(path))
        except OSError as error:
            return Finding(PROBLEM, f"conditional writes fail: {reason(error)}", "every save fails", _ANOTHER)
    return Finding(OK, "conditional writes are honoured", "one writer at a time; the other gets StorageBusyError")


def check_copying(place: Place) -> Finding:
    """By the store itself: how the best checkpoint gets its second name."""
    contents = os.urandom(4096)
    with _probe(place) as source, _probe(place) as destination:
        place.storage.replace(source, contents)
        try:
            place.storage.link(source, destination)
            found = place.storage.read(destination, len(contents))
        except OSError as error:
            return Finding(PROBLEM, f"no object can be copied: {reason(error)}", "saves of the best fail", _RIGHTS)
    if found != contents:
        return Finding(PROBLEM, "an object that was copied reads as another one", "", _ANOTHER)
    return Finding(OK, "objects are copied by the store", "best_model.pt is a copy of the best checkpoint")


def check_parts(place: Place) -> Finding:
    """Uploads in parts: that they stay invisible, and can be given up."""
    storage = _store(place)
    if storage is not None and (refusal := _refusal_to_clean_up(place, storage)) is not None:
        return refusal
    with _probe(place) as path:
        try:
            upload = place.storage.begin(path, _large(place))
        except OSError as error:
            return Finding(PROBLEM, f"no upload in parts can be begun: {reason(error)}", "large saves fail", _RIGHTS)
        try:
            is_visible = bool(place.storage.version(path))
        finally:
            upload.abort()
    if is_visible:
        return Finding(PROBLEM, "an upload in parts is visible before it is complete", "", _ANOTHER)
    return Finding(OK, f"files above {format_bytes(upload.piece_bytes)} go in parts", "visible once they are complete")


def _refusal_to_clean_up(place: Place, storage: S3Storage) -> Finding | None:
    """Whether what is left of uploads in parts could be found, and got rid of; tried with one that has no parts."""
    path = _new_path(place)
    bucket, key = split(path)
    send = storage.requests.send
    try:
        upload = {"Key": key, "UploadId": send("create_multipart_upload", bucket, Key=key)["UploadId"]}
    except OSError as error:
        return Finding(PROBLEM, f"no upload in parts can be begun: {reason(error)}", "large saves fail", _RIGHTS)
    refusals = []
    try:
        for operation, arguments in (("list_multipart_uploads", {"Prefix": key}), ("list_parts", upload)):
            try:
                send(operation, bucket, **arguments)
            except OSError as error:
                refusals.append(reason(error))
    finally:
        try:
            send("abort_multipart_upload", bucket, **upload)
        except OSError as error:
            refusals.append(f"{reason(error)}; one without parts is left: {path}, {upload['UploadId']}")
    if not refusals:
        return None
    found = f"what is left of uploads in parts can't be cleaned up: {'; '.join(refusals)}"
    return Finding(WARNING, found, "what dead writers have sent stays, and costs", f"{_RIGHTS}; {_UNFINISHED}")


def check_speed(place: Place) -> Finding:
    """Of an upload in parts, until it is durable, and of reading it back."""
    contents = memoryview(bytearray(os.urandom(_large(place))))
    with _probe(place) as path:
        started = time.perf_counter()
        try:
            _write(place, path, contents)
        except OSError as error:
            return Finding(PROBLEM, f"no file can be written in parts: {reason(error)}", "large saves fail", _RIGHTS)
        up = len(contents) / (time.perf_counter() - started)
        started = time.perf_counter()
        crc, stored = _read(place, path, len(contents))
        down = len(contents) / (time.perf_counter() - started)
    if crc != crc32(contents) or stored not in (None, crc):
        return Finding(PROBLEM, "a file that was written reads as another one", "", _ANOTHER)
    found = f"{format_bytes(int(up))}/s up, {format_bytes(int(down))}/s down"
    found += "; no checksum of the whole is kept" if stored is None else "; the store keeps a checksum of the whole"
    choice = f"1 GB is durable after about {format_secs(_GIGABYTE / up)}"
    if up < _SLOW:
        return Finding(NOTE, found, choice, "save less often: `asyncckpt interval --write-secs` says how often")
    return Finding(OK, found, choice)


def check_left(place: Place) -> Finding:
    """What these checks could not take away again. To be run after them."""
    ours = os.path.basename(place.probe)
    left = [f"{place.directory}/{name}" for name in place.storage.list_names(place.directory) if ours in name]
    storage = _store(place)
    if storage is not None:
        bucket, key = split(place.probe)
        with contextlib.suppress(OSError):  # that nobody may ask has been said
            for page in storage.requests.pages("list_multipart_uploads", bucket, Prefix=key):
                left += [f"the upload in parts {upload['UploadId']}" for upload in page.get("Uploads", ())]
    if left:
        return Finding(WARNING, f"left by this examination: {', '.join(left)}", "", "delete that")
    return Finding(OK, "nothing is left of what was tried")


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


def _new_path(place: Place) -> str:
    """One for each time that something is tried: what could not be deleted is not to be taken for what comes next."""
    return f"{place.probe}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def _probe(place: Place) -> Iterator[str]:
    """A path for an object, which is gone afterwards, if it can be deleted."""
    path = _new_path(place)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            place.storage.delete([path])


def _write(place: Place, path: str, contents: memoryview) -> None:
    upload = place.storage.begin(path, len(contents))

    def write(offset: int) -> None:
        upload.write(offset, contents[offset : offset + upload.piece_bytes])

    try:
        _side_by_side(range(0, len(contents), upload.piece_bytes), upload.num_threads, write)
        upload.sync()
        upload.commit()
        upload.close()
    finally:
        upload.abort()  # harmless after the commit


def _read(place: Place, path: str, num_bytes: int) -> tuple[int, int | None]:
    """The CRC32 of what is there, and the one that the store keeps."""
    contents = memoryview(bytearray(num_bytes))
    piece_bytes = num_bytes // NUM_FETCHING_THREADS
    with place.storage.open(path) as reader:

        def read(offset: int) -> None:
            reader.read_into(offset, contents[offset : offset + piece_bytes])

        _side_by_side(range(0, num_bytes, piece_bytes), NUM_FETCHING_THREADS, read)
        return crc32(contents), reader.stored_checksum()


def _side_by_side(offsets: range, num_threads: int, act: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(num_threads, "asyncckpt-doctor") as threads:
        for _ in threads.map(act, offsets):
            pass
