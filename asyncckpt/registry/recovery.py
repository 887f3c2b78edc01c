"""What a checkpoint directory really holds: its registry held against its files. Reads only; no torch.

A crash may leave a committed file that the registry does not name yet, a registry that names files to be deleted, or a
best link that is one save behind; people delete files, and lose or edit registries. `survey` says how things are, the
same way for readers, who just look, and for a writer, who then makes the directory agree.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from asyncckpt.errors import CorruptCheckpointError, RegistryError
from asyncckpt.image.file import read_anew
from asyncckpt.image.verify import read_metadata
from asyncckpt.naming import BEST_NAME, REGISTRY_NAME, is_checkpoint_name
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.registry import (
    MAX_REGISTRY_BYTES,
    DamagedRegistryError,
    FileDescription,
    PendingDelete,
    Registry,
    decode_registry,
    read_description,
)
from asyncckpt.storage.base import Storage

Describe = Callable[[str], FileDescription | None]

_NUM_LOOKS = 5
_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)  # a link, a directory, a device: none of ours


@dataclass(frozen=True)
class Survey:
    """A directory as it was found. Names are relative to it.

    `recorded` is what `registry.json` says. `registry` is how the directory should be read: with what was committed but
    not recorded (`unrecorded`), without what is `gone`. Files in `restorable` are gone, but the best link still has
    their contents. `deletable` were dropped by retention, and are still there. `strangers` are checkpoint files that
    belong to another run, or to nobody known; without a registry, `torn` are those of them that are damaged.
    `linked_best` is the sequence number of what the best link holds.
    """

    registry: Registry
    recorded: Registry | None
    damage: str = ""
    unrecorded: tuple[CheckpointInfo, ...] = ()
    gone: tuple[CheckpointInfo, ...] = ()
    restorable: tuple[CheckpointInfo, ...] = ()
    deletable: tuple[PendingDelete, ...] = ()
    strangers: tuple[str, ...] = ()
    torn: tuple[str, ...] = ()
    linked_best: int | None = None

    @property
    def lost(self) -> tuple[str, ...]:
        """With nothing to read: the names of checkpoints that were here, and can't be read any more."""
        if self.registry.checkpoints:
            return ()
        return (*(str(info.filepath) for info in self.gone), *self.torn, *([REGISTRY_NAME] if self.damage else []))


def survey(
    storage: Storage, directory: str, metric: str | None = None, mode: str | None = None, *, every_file: bool = False
) -> Survey:
    """Look at a directory; a missing one is empty. Changes nothing, takes no lock. Blocks for a few small reads.

    The best checkpoint is the best by `metric` and `mode`, or by what the directory itself says was monitored. A writer
    asks `every_file` what it is; readers believe the registry where it names a file that is there. Raises
    `RegistryError` for a registry of somebody else or of a later version, and OSError when something can't be read.
    """
    recorded, damage, names = _look(storage, directory)

    def describe(name: str) -> FileDescription | None:
        return describe_file(storage, os.path.join(directory, name))

    files = {name for name in names if is_checkpoint_name(name)}
    best_link, is_torn = _describe_link(storage, directory) if BEST_NAME in names else (None, False)
    if recorded is None:
        found = _rebuild(files, best_link, describe, damage)
        found = replace(found, torn=(*found.torn, BEST_NAME)) if is_torn else found
    else:
        found = _reconcile(recorded, files, best_link, describe, every_file=every_file)
    registry = found.registry.monitoring(metric or found.registry.monitor_metric, mode or found.registry.monitor_mode)
    linked_best = best_link.info.sequence if best_link and best_link.run_id == registry.run_id else None
    return replace(found, registry=registry, linked_best=linked_best)


def _look(storage: Storage, directory: str) -> tuple[Registry | None, str, set[str]]:
    """The registry, what is wrong with it, and the names in the directory, all of one moment.

    A writer may commit and prune between two looks: then files that the registry names seem to be gone.
    """
    for _ in range(_NUM_LOOKS):
        recorded, damage = read_registry(storage, directory)
        try:
            names = set(storage.list_names(directory))
        except FileNotFoundError:
            names = set()
        if recorded is None or all(str(info.filepath) in names for info in recorded.checkpoints):
            if recorded is not None or REGISTRY_NAME not in names or damage:
                break
        elif read_registry(storage, directory)[0] == recorded:
            break
    return recorded, damage, names


def read_registry(storage: Storage, directory: str) -> tuple[Registry | None, str]:
    """`registry.json`; None with what is wrong with it, or with "" when there is none."""
    path = os.path.join(directory, REGISTRY_NAME)
    try:
        return decode_registry(storage.read(path, MAX_REGISTRY_BYTES)), ""
    except FileNotFoundError:
        return None, ""
    except DamagedRegistryError as error:
        return None, str(error)
    except RegistryError as error:
        raise RegistryError(f"{path} can't be used: {error}") from error
    except OSError as error:
        if error.errno not in (*_NO_FILE, errno.EFBIG):
            raise
        raise RegistryError(f"{path} can't be used: {error.strerror}; move it away") from error


def describe_file(storage: Storage, path: str) -> FileDescription | None:
    """What a checkpoint file says of itself; None for links and the like, and for files that no manager wrote.

    Raises `CorruptCheckpointError` for a damaged file, and OSError for one that can't be read.
    """

    def describe() -> FileDescription | None:
        with storage.open(path, follow_links=False) as reader:
            return read_description(read_metadata(reader), reader.num_bytes)

    try:
        return read_anew(path, describe)  # a writer prunes, and replaces, as it likes
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error
    except OSError as error:
        if error.errno not in (*_NO_FILE, errno.ENOENT):
            raise
        return None


def _describe_link(storage: Storage, directory: str) -> tuple[FileDescription | None, bool]:
    """The best link's description, and whether it is damaged: a writer renews it then."""
    try:
        return describe_file(storage, os.path.join(directory, BEST_NAME)), False
    except CorruptCheckpointError:
        return None, True
    except OSError:
        return None, False


def _reconcile(
    recorded: Registry, files: set[str], best_link: FileDescription | None, describe: Describe, *, every_file: bool
) -> Survey:
    present: list[CheckpointInfo] = []
    gone: list[CheckpointInfo] = []
    restorable: list[CheckpointInfo] = []
    unrecorded: list[CheckpointInfo] = []
    strangers: list[str] = []

    def is_ours(name: str, description: FileDescription) -> bool:
        return description.run_id == recorded.run_id and description.name == name

    for info in recorded.checkpoints:
        name = str(info.filepath)
        description = None
        is_there = name in files
        if is_there and every_file:
            try:
                description = describe(name)
                is_there = description is not None and is_ours(name, description)
            except CorruptCheckpointError:
                pass  # still listed: nothing is deleted because of it
            strangers += [name] * (not is_there)
        if is_there and description is not None and _is_later(description.info, info):
            unrecorded.append(description.info)  # the name was committed again, and the registry not written
        elif is_there:
            present.append(info)
        elif (
            best_link
            and best_link.run_id == recorded.run_id
            and best_link.info.sequence == info.sequence
            and name not in files
        ):
            restorable.append(info)
        else:
            gone.append(info)

    pending = {drop.name: drop for drop in recorded.pending_deletes}
    deletable: list[PendingDelete] = []
    for name in sorted(files - {str(info.filepath) for info in recorded.checkpoints}):
        try:
            description = describe(name)
        except (CorruptCheckpointError, PermissionError):
            description = None
        if description is not None and is_ours(name, description):
            if (description.info.sequence or 0) > recorded.last_sequence:
                unrecorded.append(description.info)
                continue
            if name in pending and description.info.sequence == pending[name].sequence:
                deletable.append(pending[name])
                continue
        strangers.append(name)
    return Survey(
        recorded.with_checkpoints([*present, *restorable, *unrecorded]),
        recorded=recorded,
        unrecorded=tuple(unrecorded),
        gone=tuple(gone),
        restorable=tuple(restorable),
        deletable=tuple(deletable),
        strangers=tuple(strangers),
    )


def _is_later(info: CheckpointInfo, than: CheckpointInfo) -> bool:
    return (info.sequence or 0) > (than.sequence or 0)


def _rebuild(files: set[str], best_link: FileDescription | None, describe: Describe, damage: str) -> Survey:
    """Without a registry: the run of the newest file, all of whose files are protected from retention."""
    own: list[FileDescription] = []
    torn: list[str] = []
    for name in sorted(files):
        try:
            description = describe(name)
        except CorruptCheckpointError:
            torn.append(name)
        else:
            own += [description] if description is not None and description.name == name else []
    newest = max(own, key=lambda description: description.created, default=best_link)
    if newest is None:
        registry = Registry(secrets.token_hex(8), "val_loss", "min")
        return Survey(registry, None, damage=damage, strangers=tuple(sorted(files)), torn=tuple(torn))
    of_run = sorted((d for d in own if d.run_id == newest.run_id), key=lambda description: description.created)
    found = {description.info.sequence: replace(description.info, protected=True) for description in of_run}
    restorable: list[CheckpointInfo] = []
    if best_link and best_link.run_id == newest.run_id and best_link.info.sequence not in found:
        is_free = best_link.name not in files and is_checkpoint_name(best_link.name)
        restorable += [replace(best_link.info, protected=True)] if is_free else []
    registry = Registry(newest.run_id, newest.monitor_metric, newest.monitor_mode)
    return Survey(
        registry.with_checkpoints([*found.values(), *restorable]),
        recorded=None,
        damage=damage,
        unrecorded=tuple(found.values()),
        restorable=tuple(restorable),
        strangers=tuple(sorted(files - {str(info.filepath) for info in found.values()})),
        torn=tuple(torn),
    )


def file_of(survey: Survey, info: CheckpointInfo) -> Path:
    """The name of the file that holds a checkpoint's bytes."""
    is_restorable = any(other.sequence == info.sequence for other in survey.restorable)
    return Path(BEST_NAME) if is_restorable else info.filepath
