"""Copying checkpoints from any storage to any other: every byte is checked on the way, before the commit. No torch.

What is there already, and whole, is not copied again, so a copy that was cut short is gone on with by starting it anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from asyncckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.image.file import num_reading_threads, open_checkpoint, read_anew
from asyncckpt.image.transfer import transferred
from asyncckpt.image.verify import read_archive, verify_reader
from asyncckpt.image.whole_checksum import matches_store
from asyncckpt.progress import Advance
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory, Listing
from asyncckpt.registry.recovery import Survey, file_of, read_registry, survey
from asyncckpt.storage.base import Reader, Storage

COPIED, THERE, GONE, FAILED = "copied", "already there", "gone", "failed"


@dataclass(frozen=True)
class CopiedFile:
    """What became of one file: "copied"; "already there", and whole; "gone", as retention wants it; or "failed"."""

    source: str
    destination: str
    outcome: str
    num_bytes: int = 0
    problem: str = ""


def copy_file(storage: Storage, source: str, destination: str, advance: Advance) -> CopiedFile:
    """Copy one checkpoint's file. Blocks; durable on return. `advance` hears of the bytes, on any thread.

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError` for a damaged source, `CheckpointError` if there is
    another file at the destination, and OSError. The destination is as before then.
    """
    return read_anew(source, lambda: _copy(storage, source, destination, advance))


def _copy(storage: Storage, source: str, destination: str, advance: Advance) -> CopiedFile:
    with open_checkpoint(storage, source) as reader:
        is_there, version = _look(storage, reader, source, destination)
        if is_there:
            advance(reader.num_bytes)
            return CopiedFile(source, destination, THERE, reader.num_bytes)
        with transferred(storage, reader, source, destination, version, advance) as upload:
            upload.commit()
        return CopiedFile(source, destination, COPIED, reader.num_bytes)


class DirectoryCopy:
    """All checkpoints of a directory, on their way into another one, which becomes one of the same run.

    The best one goes first, then the newest, so that what is there early is what is wanted first. No retention is
    applied, and nothing at the destination is deleted, or replaced by something else.

    Constructing it only looks. Raises `CheckpointNotFoundError` if there are none, `CheckpointError` if the destination
    holds another run's, `RegistryError`, and OSError.
    """

    def __init__(self, storage: Storage, source: str, destination: str) -> None:
        self._storage, self._source, self._destination = storage, source, destination
        self._found = survey(storage, source)
        run = self._found.registry
        if not run.checkpoints:
            raise CheckpointNotFoundError(f"there are no checkpoints in {source}")
        _check_run(survey(storage, destination), run.run_id, destination)
        self._directory = CheckpointDirectory(
            destination, storage, metric=run.monitor_metric, mode=run.monitor_mode, lock_timeout_secs=0.0
        )
        self._directory.expect_run(run.run_id)
        self.num_bytes = sum(info.num_bytes for info in run.checkpoints)

    def run(self, advance: Advance) -> Iterator[CopiedFile]:
        """Copy and list one after the other. Blocks; each is durable when it is yielded. Damage is an outcome.

        Raises `StorageBusyError` while somebody else writes to the destination, `CheckpointWriteError` and OSError.
        """
        self._directory.open_for_writing()
        try:
            for info in sorted(self._found.registry.checkpoints, key=_urgency, reverse=True):
                yield self._copy(info, advance)
        finally:
            self._directory.close()

    def _copy(self, info: CheckpointInfo, advance: Advance) -> CopiedFile:
        source = os.path.join(self._source, str(file_of(self._found, info)))
        destination = self._directory.path_of(str(info.filepath))
        try:
            return read_anew(source, lambda: self._copy_file(source, destination, info, advance))
        except CheckpointNotFoundError as error:
            recorded, _ = read_registry(self._storage, self._source)
            is_dropped = recorded is not None and all(other.sequence != info.sequence for other in recorded.checkpoints)
            return CopiedFile(source, destination, GONE if is_dropped else FAILED, problem=str(error))
        except (CorruptCheckpointError, _OtherFileError) as error:
            return CopiedFile(source, destination, FAILED, problem=str(error))

    def _copy_file(self, source: str, destination: str, info: CheckpointInfo, advance: Advance) -> CopiedFile:
        listing = Listing(self._directory, replace(info, damaged=False), self._found.registry.run_id)
        with open_checkpoint(self._storage, source, follow_links=False) as reader:
            is_there, version = _look(self._storage, reader, source, destination)
            if is_there:
                advance(reader.num_bytes)
                if not self._lists(info):
                    self._directory.record(listing, _nothing)
                return CopiedFile(source, destination, THERE, reader.num_bytes)
            with transferred(self._storage, reader, source, destination, version, advance) as upload:
                self._directory.record(listing, upload.commit)
            return CopiedFile(source, destination, COPIED, reader.num_bytes)

    def _lists(self, info: CheckpointInfo) -> bool:
        return any(
            (other.sequence, other.filepath) == (info.sequence, info.filepath)
            for other in self._directory.own_registry.checkpoints
        )


def _urgency(info: CheckpointInfo) -> tuple[bool, int]:
    return info.is_best, info.sequence or 0


def _check_run(there: Survey, run_id: str, destination: str) -> None:
    if (there.recorded is not None or there.registry.checkpoints) and there.registry.run_id != run_id:
        raise CheckpointError(f"{destination} holds another run's checkpoints, which are left alone: copy elsewhere")


def _nothing() -> None:
    pass


class _OtherFileError(CheckpointError):
    """Something else is at the destination."""


def _look(storage: Storage, reader: Reader, source: str, destination: str) -> tuple[bool, str]:
    """Whether the same file is at the destination, whole; and the version of what is there, "" being nothing.

    Raises `_OtherFileError` for another file, and `CorruptCheckpointError` for a source without a directory.
    """
    try:
        directory = read_archive(reader).directory
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{source} is damaged: {error}; it was not copied") from error
    try:
        there = storage.open(destination, follow_links=False)
    except FileNotFoundError:
        return False, ""
    with there:
        try:
            is_same = there.num_bytes == reader.num_bytes and read_archive(there).directory == directory
        except CorruptCheckpointError:
            is_same = False
        if not is_same:
            raise _OtherFileError(f"{destination} is another file, or a damaged one: it is not overwritten")
        is_whole = matches_store(there)
        if is_whole is None:
            is_whole = verify_reader(there, destination, num_threads=num_reading_threads(there)).ok
        return is_whole, there.version
