"""The files of a checkpoint directory, in its writer's hands: which are whole, and which are ours; taking in what a
crash has left; deleting. No torch.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from asyncckpt.errors import CheckpointWriteError, CorruptCheckpointError
from asyncckpt.events import EventKind
from asyncckpt.image.layout import FOLDER, METADATA_RECORD
from asyncckpt.image.verify import default_num_threads, verify_reader
from asyncckpt.naming import BEST_NAME, REGISTRY_NAME
from asyncckpt.registry.recovery import Survey, describe_file, file_of
from asyncckpt.registry.registry import MAX_REGISTRY_BYTES, PendingDelete, Registry
from asyncckpt.storage.base import Reader, Storage
from asyncckpt.threads import log_quietly

_START = ((0, b"PK\x03\x04"), (30, f"{FOLDER}/data.pkl".encode()))  # of each of our files, and where
_START_BYTES = 4 << 10
_END_BYTES = 64 << 10

Report = Callable[[EventKind, str, str], None]


class NameTakenError(CheckpointWriteError):
    """Another file has the name, which is not this writer's to replace."""


class LinkTakenError(NameTakenError):
    """Another file has the best link's name; the checkpoint itself is there, and listed."""


class CheckpointFiles:
    """What a directory's writer does with its files. `report` hears of events, `note_progress` of every answer."""

    def __init__(self, storage: Storage, path: str, report: Report, note_progress: Callable[[], None]) -> None:
        self._storage = storage
        self._path = path
        self._report_event = report
        self._note_progress = note_progress

    def path_of(self, name: str) -> str:
        """The whole path of one of them."""
        return os.path.join(self._path, name)

    def report(self, level: int, kind: EventKind, name: str, detail: str) -> None:
        """Say what has happened to one of them, in the log and as an event."""
        path = self.path_of(name)
        log_quietly(level, f"{path}: {detail}")
        self._report_event(kind, path, detail)

    def check_ours(self, path: str, run_id: str) -> None:
        """Raise `NameTakenError` if there is a file that is not this run's. Blocks; raises OSError."""
        try:
            with self._storage.open(path, follow_links=False):
                pass
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.ELOOP:  # else it is a link, and nobody's business where that leads
                raise
        with contextlib.suppress(CorruptCheckpointError):
            description = describe_file(self._storage, path)
            if description is not None and description.run_id == run_id:
                return
        raise NameTakenError(f"{path} is another file, not of this run: it is not overwritten; move it away")

    def check_link(self, run_id: str) -> None:
        """Raise `LinkTakenError` if `best_model.pt` is somebody else's; a damaged checkpoint is not.

        Blocks, and reads all of a file that does not say that it is ours.
        """
        try:
            self.check_ours(self.path_of(BEST_NAME), run_id)
        except NameTakenError as error:
            if not self._is_damaged_checkpoint(BEST_NAME):
                raise LinkTakenError(str(error)) from None

    def _is_damaged_checkpoint(self, name: str) -> bool:
        """Whether a file is damaged, and was one of ours: not what somebody else's file is that we can't read."""
        with contextlib.suppress(CorruptCheckpointError):
            if describe_file(self._storage, self.path_of(name)) is not None:
                return False
        try:
            return self._looks_like_a_checkpoint(name) and bool(self.problem(name))
        except OSError as error:
            if error.errno == errno.ELOOP:  # a link
                return False
            raise

    def problem(self, name: str) -> str:
        """What is wrong with a file; "" when it is whole. Reads all of it; raises OSError when it can't."""
        path = self.path_of(name)
        with _Heard(self._storage.open(path, follow_links=False), self._note_progress) as reader:
            report = verify_reader(reader, path, num_threads=default_num_threads())
        return report.problems[0] if report.problems else ""

    def is_bad(self, name: str) -> bool:
        """Whether a file can't be relied on: it is damaged, or can't be read. Reads all of it."""
        try:
            return bool(self.problem(name))
        except OSError:
            return True

    def adopt(self, found: Survey) -> Registry:
        """Take in what was committed but not recorded, each file only if it is whole."""
        registry = found.registry
        for info in (*found.unrecorded, *found.restorable):
            name = str(info.filepath)
            try:
                problem = self.problem(str(file_of(found, info)))
            except OSError as error:  # it may be whole, and nobody would ever look at it again
                others = [other for other in registry.checkpoints if other.sequence != info.sequence]
                registry = registry.with_checkpoints([*others, replace(info, protected=True)])
                self.report(logging.WARNING, "recovered", name, f"taken in, but can't be read now: {error.strerror}")
                continue
            if problem:
                registry = registry.with_checkpoints(i for i in registry.checkpoints if i.sequence != info.sequence)
                self.report(logging.WARNING, "recovered", name, f"not taken in: {problem}")
            elif info in found.restorable:
                self._storage.link(self.path_of(BEST_NAME), self.path_of(name))
                self.report(logging.WARNING, "recovered", name, f"its file was gone, and is back from {BEST_NAME}")
            else:
                self.report(logging.WARNING, "recovered", name, "committed but not recorded: now it is")
        return registry

    def finish_deletes(self, found: Survey, registry: Registry) -> Registry:
        """Delete what a writer that died had dropped, but only if what was to replace it is whole."""
        # Whatever else is on the list is gone already, or somebody else's file has that name now.
        registry = registry.deleted(drop for drop in registry.pending_deletes if drop not in found.deletable)
        if not found.deletable:
            return registry
        needed = [info for info in (registry.latest, registry.best) if info is not None]
        if needed and not any(self.is_bad(str(info.filepath)) for info in needed):
            return self.delete(registry, found.deletable)
        rescued = []
        for drop in found.deletable:
            description = describe_file(self._storage, self.path_of(drop.name))
            if description is not None and not self.is_bad(drop.name):
                rescued.append(replace(description.info, protected=True))
                self.report(logging.WARNING, "recovered", drop.name, "kept after all: what replaced it is damaged")
        return registry.with_checkpoints([*registry.checkpoints, *rescued])

    def set_aside(self, damage: str) -> None:
        """Keep a damaged registry for whoever wants to look at it."""
        name = f"registry.damaged-{secrets.token_hex(4)}.json"
        contents = self._storage.read(self.path_of(REGISTRY_NAME), MAX_REGISTRY_BYTES)
        self._storage.replace(self.path_of(name), contents)
        self.report(
            logging.WARNING, "recovered", REGISTRY_NAME, f"rebuilt from the files, the old one is {name}: {damage}"
        )

    def delete(self, registry: Registry, pending: Sequence[PendingDelete]) -> Registry:
        """What could be deleted is off the list; the rest is tried again after the next save."""
        ours: list[PendingDelete] = []
        strange: list[PendingDelete] = []
        for drop in pending:
            try:
                (strange if self._is_strange(registry, drop) else ours).append(drop)
            except OSError as error:
                reason = error.strerror or str(error)
                self.report(logging.WARNING, "failed", drop.name, f"not deleted: can't be looked at now: {reason}")
        registry = registry.deleted(strange)
        if not ours:
            return registry
        try:
            self._storage.delete([self.path_of(drop.name) for drop in ours])
        except OSError as error:
            if len(ours) == 1:
                reason = error.strerror or str(error)
                self.report(logging.WARNING, "failed", ours[0].name, f"could not be deleted: {reason}")
                return registry
            for drop in ours:
                registry = self.delete(registry, (drop,))
            return registry
        for drop in ours:
            self.report(logging.INFO, "deleted", drop.name, "dropped by retention")
        return registry.deleted(ours)

    def _is_strange(self, registry: Registry, drop: PendingDelete) -> bool:
        """Whether somebody has put another file in the place of what was dropped. Raises OSError when in doubt."""
        try:
            description = describe_file(self._storage, self.path_of(drop.name))
        except CorruptCheckpointError:
            return not self._looks_like_a_checkpoint(drop.name)
        is_ours = description is not None and description.run_id == registry.run_id
        if description is not None and is_ours and description.info.sequence == drop.sequence:
            return False
        is_there = drop.name in self._storage.list_names(self._path)
        if is_there:
            self.report(logging.WARNING, "failed", drop.name, "not deleted: it is another file by now")
        return is_there

    def _looks_like_a_checkpoint(self, name: str) -> bool:
        """Damaged, but of ours: its end has the name of our metadata. Or it has no end, and begins as ours, or as what
        was never written."""
        with self._storage.open(self.path_of(name), follow_links=False) as reader:
            start = bytearray(min(_START_BYTES, reader.num_bytes))
            reader.read_into(0, memoryview(start))
            end = bytearray(min(_END_BYTES, reader.num_bytes))
            reader.read_into(reader.num_bytes - len(end), memoryview(end))
        if METADATA_RECORD.encode() in end:
            return True
        is_cut = b"PK\x05\x06" not in end
        begins_as_ours = all(part.startswith(bytes(start[at : at + len(part)])) for at, part in _START)
        return is_cut and (begins_as_ours or not any(start))


class _Heard(Reader):
    """A reader that tells of every answer."""

    def __init__(self, reader: Reader, note: Callable[[], None]) -> None:
        self.num_bytes = reader.num_bytes
        self._reader = reader
        self._note = note

    def read_into(self, offset: int, view: memoryview) -> None:
        self._reader.read_into(offset, view)
        self._note()

    def close(self) -> None:
        self._reader.close()
