"""The worker: the one place that knows write → sync → commit → registry. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial

from asyncckpt.errors import CheckpointError, CheckpointWriteError, CorruptCheckpointError, is_full, remedy
from asyncckpt.image.checksum import ImageSource, Piece
from asyncckpt.image.verify import verify_reader
from asyncckpt.paths import as_path
from asyncckpt.records import CheckpointInfo, Timings
from asyncckpt.registry.directory import Listing
from asyncckpt.registry.files import LinkTakenError
from asyncckpt.service.watchdog import Watch
from asyncckpt.storage.base import Storage, Upload
from asyncckpt.threads import ThreadGroup

# What may pass by itself. A full disk may too, but not within seconds: it fails at once, and the next save tries again.
_PASSING_ERRORS = frozenset({errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.ENETDOWN})
_FIRST_PAUSE_SECS = 0.1
_POLL_SECS = 0.02


@dataclass
class Job:
    """An image on its way to a path.

    `before_commit` returns once every earlier commit in the same place has settled, and raises if the image must not be
    committed; once `hurry` says so, there are no more pauses between retries.
    """

    path: str
    storage: Storage
    source: ImageSource
    retries: int
    verify_after_save: bool
    before_commit: Callable[[], object]
    on_retry: Callable[[OSError], None]
    hurry: Callable[[], bool]
    timings: Timings
    watch: Watch
    listing: Listing | None = None
    is_committed: bool = False


def write_checkpoint(job: Job, writers: ThreadGroup) -> CheckpointInfo:
    """Write, sync, commit, and list in the registry; all durable on return, so that it may be acknowledged. Blocks.

    A passing error abandons the file, its descriptor too (a failed fsync may have dropped the data, and the next one on
    that descriptor would report success), and writes a new one, up to `job.retries` times. Raises
    `CheckpointWriteError`; what was at the path before is untouched then, unless only the registry was not written.
    """
    for attempt in range(job.retries + 1):
        try:
            return _write_once(job, writers)
        except OSError as error:
            if attempt == job.retries or not (_may_pass(error) or _has_made_room(job, error)):
                raise _describe(job, error) from error
            job.on_retry(error)
            forget_frames(error)
            _pause(_FIRST_PAUSE_SECS * 2**attempt, job.hurry)
    raise AssertionError("unreachable")


def _may_pass(error: OSError) -> bool:
    return error.errno in _PASSING_ERRORS and not isinstance(error, CheckpointError)


def _has_made_room(job: Job, error: OSError) -> bool:
    """On a full disk: what is only kept there for a mirror gives way."""
    with contextlib.suppress(OSError, CheckpointError):
        return is_full(error) and job.listing is not None and job.listing.directory.make_room()
    return False


def _pause(secs: float, hurry: Callable[[], bool]) -> None:
    """Polls a plain flag: who sets it may be interrupted by Ctrl-C, which can leave an Event locked for ever."""
    deadline = time.monotonic() + secs
    while not hurry() and (rest := deadline - time.monotonic()) > 0:
        time.sleep(min(rest, _POLL_SECS))


def _write_once(job: Job, writers: ThreadGroup) -> CheckpointInfo:
    timings, watch = job.timings, job.watch
    started = time.perf_counter()
    with watch.during("begin"):
        upload = job.storage.begin(job.path, job.source.num_bytes, expected=_replaceable(job))
    try:
        for window in job.source.windows(upload.piece_bytes):
            _write_window(upload, window, writers, watch)
        timings.checksum_secs = job.source.checksum_secs
        written = time.perf_counter()
        timings.write_secs = written - started
        with watch.during("fsync"):
            upload.sync()
        if job.verify_after_save:
            with watch.during("read back"):
                _read_back(job.path, upload)
        synced = time.perf_counter()
        timings.sync_secs = synced - written
        job.before_commit()
        with watch.during("commit"):
            info = _commit(job, upload)
        timings.commit_secs = time.perf_counter() - synced
        writers.put(upload.close)
    except BaseException:
        with watch.during("abort"):
            upload.abort()
        raise
    return info


def _replaceable(job: Job) -> str | None:
    """What the commit may replace; near storage has been looked at already, by who chose the name."""
    if job.listing is None or job.storage.is_near(os.path.dirname(job.path)):
        return None
    return job.listing.directory.replaceable(os.path.basename(job.path))


def _commit(job: Job, upload: Upload) -> CheckpointInfo:
    job.is_committed = False
    if job.listing is None:
        _commit_upload(job, upload)
        timestamp = datetime.now(timezone.utc).isoformat()
        return CheckpointInfo(as_path(job.path), num_bytes=job.source.num_bytes, timestamp=timestamp)
    directory = job.listing.directory
    listing = replace(job.listing, info=replace(job.listing.info, num_bytes=job.source.num_bytes))
    # No closure: in the frames of an error's traceback, cleared or not, it would keep the image alive.
    return directory.locate(directory.record(listing, partial(_commit_upload, job, upload)))


def _commit_upload(job: Job, upload: Upload) -> None:
    upload.commit()
    job.is_committed = True


def _write_window(upload: Upload, window: Iterator[Piece], writers: ThreadGroup, watch: Watch) -> None:
    """Pull pieces and write them from several threads; the first error stops all and is raised."""
    pulling = threading.Lock()
    failed = threading.Event()

    def write_pieces() -> None:
        try:
            while not failed.is_set():
                with pulling:  # the next piece is checksummed while the others are being written
                    piece = next(window, None)
                if piece is None:
                    return
                with watch.during("write"):
                    upload.write(piece.offset, piece.view)
        except BaseException:
            failed.set()
            raise

    writers.run_on_all(write_pieces, upload.num_threads)


def _read_back(path: str, upload: Upload) -> None:
    reader = upload.reader()
    if reader is None:
        return  # the storage has checked every piece
    with reader:
        report = verify_reader(reader, path)
    if not report.ok:
        raise CorruptCheckpointError(f"{path}: what was written does not read back: {report.problems[0]}")


def _describe(job: Job, error: OSError) -> CheckpointWriteError:
    what_failed = "is whole, but could not be listed in the registry" if job.is_committed else "was not saved"
    if isinstance(error, LinkTakenError):
        what_failed = "is saved and listed, but the link to the best one can't be renewed"
    reason = error.strerror or str(error)
    return CheckpointWriteError(f"{job.path} {what_failed}: {reason}{remedy(error.errno, job.path)}", errno=error.errno)


def forget_frames(error: BaseException) -> None:
    """Clear the frames of a traceback: their locals hold the image."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        pending += (current.__cause__, current.__context__)
