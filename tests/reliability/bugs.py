"""Bugs to be put into the package's own commit path and recovery, each by patching a real function: what a mutation
gate needs. Every bug is one that some store or other has had."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from asyncckpt import CheckpointInfo
from asyncckpt.naming import BEST_NAME, CHECKPOINT_SUFFIX, REGISTRY_NAME, temporary_name
from asyncckpt.registry import directory as directory_module
from asyncckpt.registry import index as index_module
from asyncckpt.registry.directory import CheckpointDirectory, Listing
from asyncckpt.registry.files import CheckpointFiles
from asyncckpt.registry.registry import Registry, encode_registry
from asyncckpt.registry.retention import RetentionPolicy
from asyncckpt.service import worker
from asyncckpt.service.order import Turn
from asyncckpt.service.queue import SaveQueue, Submission
from asyncckpt.service.watchdog import Watch
from asyncckpt.storage import directories, links, local, system_calls, temporary
from asyncckpt.storage.files import Descriptor
from asyncckpt.storage.local import LocalStorage, LocalUpload

Patch = Callable[[], AbstractContextManager[object]]


def patch(owner: object, name: str, function: Callable[..., Any]) -> Patch:
    return lambda: mock.patch.object(owner, name, function)


class _Seam:
    """The file system calls as one module sees them: these instead, the others as they are for everybody."""

    def __init__(self, calls: dict[str, Callable[..., Any]]) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return self._calls.get(name) or getattr(system_calls, name)


def patch_calls(module: ModuleType, **calls: Callable[..., Any]) -> Patch:
    return patch(module, "system_calls", _Seam(calls))  # type: ignore[arg-type]


def nothing(*_: object) -> None:
    pass


def is_checkpoint(upload: LocalUpload) -> bool:
    return upload._path.endswith(CHECKPOINT_SUFFIX) and os.path.basename(upload._path) != BEST_NAME


def is_registry(upload: LocalUpload) -> bool:
    return os.path.basename(upload._path) == REGISTRY_NAME


# --- syncs left out ---


def without_sync(of: Callable[[LocalUpload], bool]) -> Patch:
    sync = LocalUpload.sync
    return patch(LocalUpload, "sync", lambda upload: None if of(upload) else sync(upload))


def without_directory_sync(of: Callable[[LocalUpload], bool]) -> Patch:
    commit = LocalUpload.commit

    def renamed_only(upload: LocalUpload) -> None:
        if of(upload):
            rename_into_place(upload)
        else:
            commit(upload)

    return patch(LocalUpload, "commit", renamed_only)


def rename_into_place(upload: LocalUpload) -> None:
    system_calls.rename(upload._temporary, upload._path)
    upload._temporary = ""
    upload._file.close()


@contextmanager
def renamed_before_sync() -> Iterator[None]:
    """Into place first, made durable afterwards: before the save is acknowledged, but too late for what was there."""

    def commit(upload: LocalUpload) -> None:
        with directories.open_directory(upload._directory) as directory:
            system_calls.rename(upload._temporary, upload._path)
            upload._temporary = ""
            directories.sync_entries(directory)
        system_calls.fsync(upload._file.fd)
        upload._file.close()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(LocalUpload, "sync", nothing))
        stack.enter_context(mock.patch.object(LocalUpload, "commit", commit))
        yield


def synced_again(upload: LocalUpload) -> None:
    """A failed fsync is tried again on the same descriptor."""
    try:
        system_calls.fsync(upload._file.fd)
    except OSError:
        system_calls.fsync(upload._file.fd)


def with_errors_swallowed(directory: Descriptor) -> None:
    with contextlib.suppress(OSError):
        system_calls.fsync(directory.fd)


# --- steps in another order ---


def registry_first(directory: CheckpointDirectory, listing: Listing, commit: Callable[[], None]) -> CheckpointInfo:
    with directory._writing:
        directory._write(directory._with(listing.info))
        commit()
        directory._link_best()
        directory._reserved.discard(str(listing.info.filepath))
    return listing.info


def deletes_first(directory: CheckpointDirectory, listing: Listing, commit: Callable[[], None]) -> CheckpointInfo:
    with directory._writing:
        commit()
        registry = directory._with(listing.info)
        directory._write(directory._files.delete(registry, registry.pending_deletes))
        directory._link_best()
        directory._reserved.discard(str(listing.info.filepath))
    return listing.info


def acknowledge(submission: Submission) -> None:
    """Before its time, and not again when its time has come."""
    info = CheckpointInfo(Path(submission.handle.path))
    if submission.listing is not None:
        info = submission.listing.directory.locate(submission.listing.info)
    submission.settle(info, None)
    submission.settle = nothing


def acknowledged_at_once() -> AbstractContextManager[object]:
    write = SaveQueue._write

    def acknowledging(queue: SaveQueue, submission: Submission, turn: Turn, watch: Watch) -> CheckpointInfo:
        acknowledge(submission)
        return write(queue, submission, turn, watch)

    return mock.patch.object(SaveQueue, "_write", acknowledging)


def acknowledged_by(owner: object, name: str, *, before: bool) -> Patch:
    """On the worker, just before or after it calls this function."""

    @contextmanager
    def patching() -> Iterator[None]:
        write, function = SaveQueue._write, getattr(owner, name)
        current = threading.local()

        def noting(queue: SaveQueue, submission: Submission, turn: Turn, watch: Watch) -> CheckpointInfo:
            current.submission = submission
            return write(queue, submission, turn, watch)

        def calling(*args: Any) -> Any:
            submission = getattr(current, "submission", None)
            if before and submission is not None:
                acknowledge(submission)
            result = function(*args)
            if not before and submission is not None:
                acknowledge(submission)
            return result

        with mock.patch.object(SaveQueue, "_write", noting), mock.patch.object(owner, name, calling):
            yield

    return patching


# --- temporary files ---


def temporary_path_elsewhere(path: str) -> str:
    above, name = os.path.split(path)
    return os.path.join(os.path.dirname(above), temporary_name(os.urandom(8).hex(), name))


def create_in_place(path: str) -> tuple[Descriptor, str]:
    """The registry is written where it is."""
    if os.path.basename(path) != REGISTRY_NAME:
        return _create_temporary(path)
    return Descriptor(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), path


_create_temporary = temporary.create_temporary


def reading_sweeps(directory: CheckpointDirectory) -> object:
    directory.storage.sweep(directory.path)
    return _read(directory)


_read = CheckpointDirectory.read


# --- retention and the best ---


def encode_without_pending(registry: Registry) -> bytes:
    return encode_registry(replace(registry, pending_deletes=()))


def kept_by_policy_alone(policy: RetentionPolicy, checkpoints: Sequence[CheckpointInfo]) -> frozenset[int]:
    return policy.kept(checkpoints)


def delete_as_can_be(storage: LocalStorage, paths: Sequence[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            system_calls.unlink(path)
    with directories.open_directory(os.path.dirname(paths[0])) as directory:
        directories.sync_entries(directory)


_link_best = CheckpointDirectory._link_best


def linked_once(directory: CheckpointDirectory) -> None:
    if directory._index.state.linked_best is None:
        _link_best(directory)


def linked_while_saving(directory: CheckpointDirectory) -> None:
    if not directory._is_opening:
        _link_best(directory)


def linked_by_name() -> AbstractContextManager[object]:
    """The link is taken for current when the best has the name that it had."""
    linked: dict[str, str] = {}

    def link_best(directory: CheckpointDirectory) -> None:
        best = directory._own_registry().best
        if best is not None and linked.get(directory.path) != str(best.filepath):
            linked[directory.path] = str(best.filepath)
            directory._index.note_link(None)
            _link_best(directory)

    return mock.patch.object(CheckpointDirectory, "_link_best", link_best)


BUGS: dict[str, Patch] = {
    "the checkpoint's file is not synced": without_sync(is_checkpoint),
    "the registry's file is not synced": without_sync(is_registry),
    "the directory is not synced after the checkpoint's rename": without_directory_sync(is_checkpoint),
    "the directory is not synced after the registry's rename": without_directory_sync(is_registry),
    "the directory is not synced after the best link's rename": patch(links, "sync_entries", nothing),
    "the best link's reflink is not synced": patch_calls(links, fsync=nothing),
    "the parent of a directory that was made is not synced": patch(directories, "_sync", nothing),
    "renamed into place, then synced": renamed_before_sync,
    "a failed sync is tried again on the same descriptor": patch(LocalUpload, "sync", synced_again),
    "a failed sync of the directory is no error": patch(local, "sync_entries", with_errors_swallowed),
    "the registry is written before the checkpoint is there": patch(CheckpointDirectory, "record", registry_first),
    "old files are deleted before the registry is written": patch(CheckpointDirectory, "record", deletes_first),
    "acknowledged when it is staged": acknowledged_at_once,
    "acknowledged when it is committed, not recorded": acknowledged_by(worker, "_commit_upload", before=False),
    "acknowledged when it is recorded, the best not linked": acknowledged_by(
        CheckpointDirectory, "_link_best", before=True
    ),
    "temporary files in another directory": patch(temporary, "temporary_path", temporary_path_elsewhere),
    "the registry is written in place": patch(temporary, "create_temporary", create_in_place),
    "temporary files are swept though they are locked": patch_calls(temporary, try_lock=lambda fd: True),
    "temporary files are never swept": patch(LocalStorage, "sweep", lambda storage, directory, **_: []),
    "readers sweep": patch(CheckpointDirectory, "read", reading_sweeps),
    "what is to be deleted is forgotten when it is dropped": patch(
        index_module, "encode_registry", encode_without_pending
    ),
    "a delete that failed counts as done": patch(LocalStorage, "delete", delete_as_can_be),
    "retention drops the best": patch(directory_module, "retained", kept_by_policy_alone),
    "the best link is made once": patch(CheckpointDirectory, "_link_best", linked_once),
    "the best link is not renewed by recovery": patch(CheckpointDirectory, "_link_best", linked_while_saving),
    "the best link is known by its name": linked_by_name,
    "an older commit is not announced": patch(
        CheckpointDirectory, "_announce", lambda directory, registry, info: registry
    ),
    "a commit that failed counts as done": patch(CheckpointDirectory, "_is_there", lambda directory, info: True),
    "what was not recorded is taken in unverified": patch(CheckpointFiles, "problem", lambda files, name: ""),
    "recovery deletes though what replaced it is damaged": patch(CheckpointFiles, "is_bad", lambda files, name: False),
}
