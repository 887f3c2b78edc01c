"""A checkpoint directory: read by anybody, written by one process at a time. No torch.

The writer's order, each step durable before the next: the file is committed (the worker's business), `record` writes
the registry and then the best link, the save is acknowledged, `delete_pending` deletes what retention dropped.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from asyncckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    CorruptCheckpointError,
    RegistryError,
    SaverClosedError,
    is_full,
    remedy,
)
from asyncckpt.image.file import open_to_load
from asyncckpt.naming import BEST_NAME, REGISTRY_NAME, numbered_name
from asyncckpt.paths import as_path
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry import turns
from asyncckpt.registry.backlog import Mirrored
from asyncckpt.registry.files import CheckpointFiles, LinkTakenError, NameTakenError, Report
from asyncckpt.registry.index import Index, IndexState, check_claim
from asyncckpt.registry.recovery import Survey, describe_file, survey
from asyncckpt.registry.registry import (
    PendingDelete,
    Registry,
    describe_in_file,
)
from asyncckpt.registry.retention import RetentionPolicy, retained
from asyncckpt.storage.base import Lock, Storage
from asyncckpt.storage.local import LocalReader


@dataclass(frozen=True)
class Listing:
    """Where a checkpoint is listed once it is committed, and as what."""

    directory: CheckpointDirectory
    info: CheckpointInfo
    run_id: str
    is_certain: bool = True  # that the directory was still open for writing when this was reserved


@dataclass(frozen=True)
class WriterState:
    """What a directory's writer knows beyond what is on disk: a value, so that it can go to another process."""

    registry: Registry
    is_recorded: bool
    index: IndexState
    damaged: frozenset[int]


_GONE = "its file is gone, so it is listed no more"
_generations = itertools.count(1)
_MOST_COMMITS = 2**61  # a save's number beyond what the registry may hold would lose it


class CheckpointDirectory:
    """One directory with a registry. Thread-safe.

    Constructing it and reading change nothing. `open_for_writing` takes the directory's lock, which lasts until `close`
    or the end of the process. A writer process may then do the writing: it is given the `state` and a share of the
    lock, and what it knows afterwards is taken back by `learn`. `generation` changes when this process itself wrote,
    so that another one's state is out of date.
    """

    def __init__(
        self,
        path: str,
        storage: Storage,
        *,
        retention: RetentionPolicy | None = None,
        metric: str | None = None,
        mode: str | None = None,
        lock_timeout_secs: float = 10.0,
        report: Report = lambda kind, path, detail: None,
        note_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self.retention, self.metric, self.mode = retention, metric, mode
        self.generation = next(_generations)
        self.mirrored: Mirrored | None = None  # how far its mirror is; what that awaits is kept for it
        self.mirror_backlog_bytes = 0  # as long as it is no more than this
        self.spared: frozenset[int] = frozenset()  # of a mirror: what is kept besides at each commit, by numbers
        self.was_open = False  # for writing, at some time: the run is under way
        self.storage = storage
        self._lock_timeout_secs = lock_timeout_secs
        self._note_progress = note_progress
        self._files = CheckpointFiles(storage, path, report, note_progress)
        self._report = self._files.report
        self._index = Index(storage, path, self._files)

        self._opening = threading.Lock()
        self._is_opening = False
        self._lock: Lock | None = None
        self._device: int | None = None
        self._writing = threading.Lock()  # guards the writer's steps; the registry is a value, replaced whole
        self._registry: Registry | None = None  # the writer's; what was committed but could not be recorded is in it
        self._is_recorded = False  # registry.json says the same
        self._strangers: frozenset[str] = frozenset()
        self._damaged: frozenset[int] = frozenset()
        self._sequences = itertools.count(1)  # its `next` is one act, whatever signals come
        self._continued: tuple[str, int] | None = None  # a run that another directory holds, and its last commit
        self._run_id: str | None = None  # kept when the directory is opened anew, and there is nothing in it yet
        self._names: frozenset[str] = frozenset()  # in the directory, when somebody looked last
        self._reserved: set[str] = set()  # names of what is being written
        self._is_shut = False

    # --- reading ---

    def read(self) -> Survey:
        """What the directory holds now. Blocks for a few small reads; raises as `survey` does."""
        found = survey(self.storage, self.path, self.metric, self.mode)
        if found.damage:
            self._report(
                logging.WARNING, "recovered", REGISTRY_NAME, f"damaged, so the files are listed instead: {found.damage}"
            )
        return found

    @property
    def registry(self) -> Registry:
        """The registry: the writer's own, or what is read from the directory."""
        registry = self._registry
        if registry is None or not self.is_open:
            registry = self.read().registry
        return registry.with_damaged(self._damaged) if self._damaged else registry

    @property
    def own_registry(self) -> Registry:
        """The writer's own registry, from memory; raises `CheckpointError` when it is not open for writing."""
        registry = self._own_registry()
        return registry.with_damaged(self._damaged) if self._damaged else registry

    @property
    def known(self) -> Registry | None:
        """The writer's own registry, for whoever must not wait for the storage; None when it has not been opened."""
        registry = None if self._is_opening else self._registry
        return registry and (registry.with_damaged(self._damaged) if self._damaged else registry)

    @property
    def is_open(self) -> bool:
        """Open for writing: not so in a forked child, nor when somebody has moved or removed the directory."""
        lock = self._lock
        with contextlib.suppress(OSError):
            return lock is not None and lock.is_intact()
        return False

    def await_finishing(self) -> None:
        """Wait for a writer that finishes the checkpoints of a trainer that has died. See `turns.await_finishing`."""
        turns.await_finishing(self.storage, self.path, self._lock_timeout_secs)

    def note_damaged(self, info: CheckpointInfo) -> None:
        """A load found it so: from now on it is not the best, and takes no whole checkpoint's place in retention."""
        if info.sequence is not None:
            self._damaged |= {info.sequence}

    def has_file(self, name: str) -> bool:
        """Whether there is such a file now."""
        try:
            with self.storage.open(self.path_of(name)):
                return True
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False

    def open_to_load(self, path: str, *, follow_links: bool = True) -> LocalReader:
        """A checkpoint's file, that can be mapped."""
        return open_to_load(self.storage, path, follow_links=follow_links)

    def path_of(self, name: str) -> str:
        """The whole path of one of its files."""
        return self._files.path_of(name)

    def locate(self, info: CheckpointInfo) -> CheckpointInfo:
        """The same checkpoint with the whole path of its file."""
        return replace(info, filepath=as_path(self.path) / info.filepath)

    # --- opening for writing ---

    def look(self) -> bool:
        """Whether it is (still) open for writing; if so, `reserve` knows from now on which names are there. Blocks."""
        if not self.is_open:
            return False
        if not self.storage.is_near(self.path):
            return True  # the commit says whether there is somebody else's file
        with contextlib.suppress(OSError):
            self._names = frozenset(self.storage.list_names(self.path))
        return True

    def open_for_writing(self) -> None:
        """Take the lock and make the directory agree with itself. Blocks; returns at once when it is open already.

        Waits for a short time for another writer, then raises `StorageBusyError`. After a crash it may have to read a
        checkpoint or two to make sure of them. Raises `CheckpointWriteError` when the directory can't be written, and
        `RegistryError`.
        """
        with self._opening:
            if self._is_shut:
                raise SaverClosedError(f"the manager of {self.path} is closed; make another one")
            if self.is_open:
                return
            self._is_opening = True
            try:
                with self._writing, _explained(self.path, "can't be opened for writing"):
                    if self._run_id is not None:
                        self._check_place(self._run_id)
                    self.close()
                    self._lock = turns.take_lock(self.storage, self.path, self._lock_timeout_secs)
                    self._device = self.storage.device(self.path)
                    self._note_progress()
                    self._recover()
                    self.look()
            except BaseException:
                self.close()
                raise
            finally:
                self._is_opening = False
            self.was_open = True

    def _check_place(self, run_id: str) -> None:
        """The directory was moved, removed or unmounted under the run: what is there now must be the same run's.

        An empty directory will do where it was, but not on another file system: what an unmounted one leaves behind is
        not to be filled, since nobody would find those checkpoints once it is mounted again.
        """
        found = survey(self.storage, self.path, self.metric, self.mode)
        if found.recorded is not None or found.registry.checkpoints:
            if found.registry.run_id != run_id:
                raise CheckpointWriteError(
                    f"{self.path} has become another run's directory under this run, which leaves it alone; put this "
                    "run's back, or make a manager of another directory"
                )
        elif self._device is not None and self.storage.device(self.path) != self._device:
            raise CheckpointWriteError(
                f"{self.path} is on another file system than before, with nothing of this run; mount the one that "
                "holds its checkpoints, or make another manager"
            )
        elif self._is_recorded:
            self._report(logging.WARNING, "recovered", "", "removed under this run with all its checkpoints: made anew")

    def close(self) -> None:
        """Give the lock back. Nothing may be in flight."""
        lock, self._lock, self._registry = self._lock, None, None
        if lock is not None:
            lock.release()

    def expect_run(self, run_id: str) -> None:
        """Whatever is in the directory when it is opened must be of this run; an empty one becomes it."""
        self._run_id = run_id

    def continue_run(self, run_id: str, last_sequence: int) -> None:
        """An empty directory goes on with this run when it is opened, from this commit; one of this run too."""
        self._continued = (run_id, last_sequence)

    def shut(self) -> None:
        """Close for good."""
        self._is_shut = True
        self.close()

    def recover(self) -> None:
        """Make the directory, which is open for writing, agree with itself after the process that wrote for us died.

        Blocks, and raises, as `open_for_writing` does.
        """
        with self._writing, _explained(self.path, "can't be recovered"):
            self._check_place(self._own_registry().run_id)
            self._recover()

    def _recover(self) -> None:
        self.generation = next(_generations)
        for path in self.storage.sweep(self.path, has_lock=True):
            self._report(logging.WARNING, "swept", os.path.basename(path), "left by a writer that died")
        self._index.look()
        found = survey(self.storage, self.path, self.metric, self.mode, every_file=True)
        if found.registry.last_sequence > _MOST_COMMITS:
            raise RegistryError(f"{self.path} can't be written to: its checkpoints' numbers are beyond all reason")
        if found.damage:
            self._files.set_aside(found.damage)
        for info in found.gone:
            self._report(logging.WARNING, "recovered", str(info.filepath), _GONE)
        for name in found.strangers:
            self._report(logging.INFO, "recovered", name, "not of this run: left alone")
        registry = self._files.finish_deletes(found, self._files.adopt(found))
        if found.recorded is None and not registry.checkpoints and self._run_id is not None:
            registry = replace(registry, run_id=self._run_id)
        registry = self._with_continued(found, registry)
        self._run_id = registry.run_id
        registry = registry.with_checkpoints(
            replace(info, damaged=info.damaged and self._files.is_bad(str(info.filepath)))
            for info in registry.checkpoints
        )
        self._index.note_link(found.linked_best)
        self._strangers = frozenset(found.strangers)
        self._sequences = itertools.count(max(next(self._sequences), registry.last_sequence + 1))
        registry = replace(registry, claim=self._lock.claim if self._lock is not None else "")
        self._registry = registry
        # With a claim always: who had it before, and sleeps, must find the registry changed.
        self._is_recorded = found.recorded is not None and _lists_the_same(registry, found.recorded)
        if not self._is_recorded and (registry.checkpoints or found.recorded is not None or found.damage):
            self._write(registry)
        self._link_best()
        if registry.best is None:
            self._tell_of_link(found, registry)

    def _tell_of_link(self, found: Survey, registry: Registry) -> None:
        """There is no best one yet, and something has the name of its link."""
        if found.linked_best is not None:
            self._report(logging.INFO, "recovered", BEST_NAME, f"no checkpoint has a {registry.monitor_metric}: kept")
        elif problem := self._index.link_problem(registry.run_id):
            self._report(logging.WARNING, "recovered", BEST_NAME, f"the first best checkpoint will fail: {problem}")

    def _with_continued(self, found: Survey, registry: Registry) -> Registry:
        if self._continued is None:
            return registry
        run_id, last_sequence = self._continued
        if last_sequence > _MOST_COMMITS:
            raise RegistryError(f"{self.path} can't go on with a run whose numbers are beyond all reason")
        if found.recorded is None and not registry.checkpoints:
            registry = replace(registry, run_id=run_id)
        if registry.run_id == run_id:
            registry = replace(registry, last_sequence=max(registry.last_sequence, last_sequence))
        return registry

    # --- another process as the writer ---

    @property
    def state(self) -> WriterState:
        """What its writer knows; asked when nothing is being written. Raises `CheckpointError` if it is not open.

        Takes no lock: a signal handler may save, and so ask, in the middle of this.
        """
        registry = self._own_registry()
        return WriterState(registry, self._is_recorded, self._index.state, self._damaged)

    def share_lock(self) -> int | bytes:
        """What to send to the process that is to hold the lock too: a descriptor, or plain bytes."""
        if self._lock is None:
            raise CheckpointError(f"{self.path} is not open for writing any more")
        return self._lock.share()

    def take_over(self, state: WriterState, lock: int | bytes) -> None:
        """In that process: be the writer from here on. Changes nothing in the directory."""
        with self._writing:
            if self._lock is not None:
                self._lock.release()
            self._lock = self.storage.receive_lock(self.path, lock)
            self._device = self.storage.device(self.path)
            self._set_state(state)

    def learn(self, state: WriterState) -> None:
        """What the writer process knows by now."""
        with self._writing:
            self._set_state(replace(state, damaged=state.damaged | self._damaged))

    def _set_state(self, state: WriterState) -> None:
        self._registry, self._is_recorded = state.registry, state.is_recorded
        self._index.state, self._damaged = state.index, state.damaged
        self._reserved -= {str(info.filepath) for info in state.registry.checkpoints}

    def note_all_damaged(self, sequences: Iterable[int]) -> None:
        """As `note_damaged`, by their numbers."""
        self._damaged |= frozenset(sequences)

    @property
    def damaged(self) -> frozenset[int]:
        """The sequence numbers of what was found to be damaged."""
        return self._damaged

    def inherit(self) -> None:
        """The process that shared the lock has ended: tell others that what it left is only being finished here."""
        if self._lock is not None:
            self._lock.inherit()
            self._lock.describe(turns.name_of_finisher())

    # --- writing ---

    def reserve(self, info: CheckpointInfo) -> Listing:
        """Give a checkpoint that is about to be written its sequence number, and a name that no other's file has.

        Does not block: it goes by the last `look`.
        """
        registry = self._own_registry()
        pinned = {str(entry.filepath) for entry in registry.checkpoints if entry.pinned}
        ours = {str(entry.filepath) for entry in registry.checkpoints}
        ours |= {drop.name for drop in registry.pending_deletes} | self._reserved
        taken = self._strangers | pinned | (self._names - ours)
        name = str(info.filepath)
        number = 2
        while name in taken:
            name = numbered_name(str(info.filepath), number)
            number += 1
        self._reserved.add(name)
        return Listing(self, replace(info, filepath=Path(name), sequence=self._next_sequence()), registry.run_id)

    def _next_sequence(self) -> int:
        sequence = next(self._sequences)
        if self.mirrored is not None and sequence <= self.mirrored.last:
            sequence = self.mirrored.last + 1  # an old directory came back: the mirror has others under these numbers
            self._sequences = itertools.count(sequence + 1)
        return sequence

    def withdraw(self, listing: Listing) -> None:
        """The checkpoint was not written after all: whoever puts a file of that name here keeps it."""
        self._reserved.discard(str(listing.info.filepath))

    def check(self, listing: Listing) -> None:
        """Find out what was uncertain when the storage did not answer. Blocks.

        Raises `CheckpointWriteError` when the directory is not this writer's any more.
        """
        if not listing.is_certain and not self.is_open:
            raise CheckpointWriteError(
                f"{self.path_of(str(listing.info.filepath))} was not saved: the directory was moved, removed or "
                "unmounted while the storage did not answer; the next save opens it anew"
            )

    def replaceable(self, name: str) -> str | None:
        """The version of what a commit under this name may replace, "" being nothing; None without versions. Blocks.

        Raises `NameTakenError` for a file that is not this run's, or is pinned, and `CheckpointWriteError` when another
        writer has taken the directory over: what that one commits later a commit of this version can't replace.
        """
        path = self.path_of(name)
        version = self.storage.version(path) if self.storage.has_versions(self.path) else None
        registry = self._own_registry()
        listed = next((info for info in registry.checkpoints if str(info.filepath) == name), None)
        if listed is not None and listed.pinned:
            raise NameTakenError(f"{path} is pinned: it is not overwritten")
        if listed is None and version != "" and all(drop.name != name for drop in registry.pending_deletes):
            self._files.check_ours(path, registry.run_id)
        check_claim(self._lock, self.path)
        return version

    def describe(self, info: CheckpointInfo) -> Mapping[str, object]:
        """What the checkpoint's file is to say of itself."""
        return describe_in_file(self._own_registry(), info)

    def record(self, listing: Listing, commit: Callable[[], None]) -> CheckpointInfo:
        """Commit a checkpoint by `commit`, then the registry that lists it, then the best link; all durable on return.

        Blocks. The registry's file is written before the commit, so that a full disk is found while nothing has
        happened yet. No file is deleted meanwhile. After an OSError the checkpoint may be there but not listed; the
        next `record`, or whoever opens the directory next, lists it. May be done again for the same checkpoint.
        """
        info = listing.info
        with self._writing:
            self.generation = next(_generations)
            before, registry = self._own_registry(), self._with(info)
            check_claim(self._lock, self.path)
            if not self.is_open:
                self._check_place(registry.run_id)
            if (info.sequence or 0) <= before.last_sequence:
                before = self._announce(before, info)
            upload = self._index.begin(registry)
            try:
                try:
                    commit()
                except BaseException:
                    self._note_doubtful(before, registry, info)
                    raise
                self._registry, self._is_recorded = registry, False
                self._index.commit(upload, registry, self._lock)
            except BaseException:
                upload.abort()
                raise
            self._registry, self._is_recorded = registry, True
            self._tell_of_unmirrored(before, registry, self._why_unmirrored())
            self._reserved.discard(str(info.filepath))
            try:
                self._link_best()
            except LinkTakenError:  # all is listed, and what it has replaced must not pile up
                self._delete_pending()
                raise
        return next((kept for kept in registry.checkpoints if kept.sequence == info.sequence), info)

    def _announce(self, registry: Registry, info: CheckpointInfo) -> Registry:
        """Of a file below the last number nobody could tell, after a crash before it is listed, that it was not dropped
        long ago. Until then it is to be deleted."""
        drop = PendingDelete(str(info.filepath), info.sequence or 0)
        is_listed = any(other.filepath == info.filepath for other in registry.checkpoints)
        if not is_listed and drop not in registry.pending_deletes:
            registry = replace(registry, pending_deletes=(*registry.pending_deletes, drop))
            self._write(registry)
        return registry

    def finish_recording(self) -> None:
        """Write what an earlier `record` has committed, and could not list. Blocks; raises OSError."""
        with self._writing:
            if not self._is_recorded and (registry := self._own_registry()).checkpoints:
                self.generation = next(_generations)
                self._write(registry)
            self._link_best()

    def make_room(self) -> bool:
        """The disk is full: drop what is only kept for the mirror, loudly; whether there was something. Blocks.

        Raises OSError, and `CheckpointError`.
        """
        if self.retention is None or self.mirrored is None:
            return False
        with self._writing:
            before = self._own_registry()
            pruned = before.keeping(retained(self.retention, before.checkpoints))
            if pruned == before:
                return False
            self._drop(before, pruned, "the disk is full")
        return True

    def delete_pending(self) -> None:
        """Delete what the recorded registry no longer needs; durable on return. Blocks. Never raises OSError."""
        with self._writing:
            self._delete_pending()

    def _delete_pending(self) -> None:
        self.generation = next(_generations)
        if self._registry is not None and self._is_recorded:
            self._registry = self._files.delete(self._registry, self._registry.pending_deletes)

    def prune(self, retention: RetentionPolicy | None = None, *, dry_run: bool = False) -> list[CheckpointInfo]:
        """Apply a policy now, to checkpoints recovered without a registry too; what was (or would be) dropped.

        Blocks until the files are deleted, durably. Raises as `open_for_writing` does.
        """
        if dry_run:
            return self._pruned(self.registry, retention)[1]
        self.open_for_writing()
        with self._writing, _explained(self.path, "was not pruned"):
            before = self._own_registry()
            pruned, dropped = self._pruned(before.with_damaged(self._damaged), retention)
            self._drop(before, pruned, self._why_unmirrored())
        return dropped

    def _drop(self, before: Registry, pruned: Registry, why_unmirrored: str) -> None:
        """Write a registry that drops something, then delete that."""
        self.generation = next(_generations)
        try:
            self._write(pruned)
        except OSError as error:
            if not is_full(error) or not self._is_recorded:  # what is to be kept may not be durable yet
                raise
            # Room first: should we die here, whoever opens the directory next finds these files gone, no more.
            self._registry, self._is_recorded = pruned, False
            pruned = self._files.delete(pruned, pruned.pending_deletes)
            self._write(pruned)
        self._tell_of_unmirrored(before, pruned, why_unmirrored)
        self._link_best()
        self._registry = self._files.delete(self._own_registry(), pruned.pending_deletes)

    def pin(self, step: int) -> list[CheckpointInfo]:
        """Keep the newest checkpoint of a step whatever retention says; in a list, as it is listed from now on.

        Blocks; durable on return. Raises `CheckpointNotFoundError` when there is none, and as `open_for_writing` does.
        """
        return self._set_pins(step, is_pinned=True)

    def unpin(self, step: int) -> list[CheckpointInfo]:
        """Leave all checkpoints of a step to retention again; those that were pinned. As `pin`."""
        return self._set_pins(step, is_pinned=False)

    def _set_pins(self, step: int, *, is_pinned: bool) -> list[CheckpointInfo]:
        self.open_for_writing()
        with self._writing, _explained(self.path, "was not changed"):
            self.generation = next(_generations)
            registry = self._own_registry().with_damaged(self._damaged)
            infos = [info for info in registry.checkpoints if info.global_step == step]
            if not infos:
                steps = ", ".join(str(info.global_step) for info in registry.checkpoints) or "none"
                raise CheckpointNotFoundError(f"{self.path} has no checkpoint of step {step}; it has {steps}")
            whole = [info for info in infos if not info.damaged]
            chosen = (whole or infos)[-1:] if is_pinned else infos
            changed = [replace(info, pinned=is_pinned) for info in chosen if info.pinned != is_pinned]
            for info in changed:
                registry = registry.with_pin(info, is_pinned=is_pinned)
            if changed:
                self._write(registry)
        return [replace(info, pinned=is_pinned) for info in chosen] if is_pinned else changed

    def follow_pins(self, infos: Sequence[CheckpointInfo], unpinned: Collection[int]) -> None:
        """Pin what another directory of the run pins; see `Registry.following_pins`. Blocks; durable on return."""
        with self._writing, _explained(self.path, "was not changed"):
            before = self._own_registry()
            registry = before.following_pins(infos, unpinned)
            if registry != before:
                self.generation = next(_generations)
                self._write(registry)

    def _own_registry(self) -> Registry:
        if self._registry is None:
            raise CheckpointError(f"{self.path} is not open for writing any more")
        return self._registry

    def _with(self, info: CheckpointInfo) -> Registry:
        registry = self._own_registry().with_checkpoint(info).with_damaged(self._damaged)
        if self.retention is not None:
            registry = registry.keeping(self._retained(self.retention, registry.checkpoints) | self.spared)
        return registry

    def _retained(self, policy: RetentionPolicy, checkpoints: Sequence[CheckpointInfo]) -> frozenset[int]:
        """What the policy keeps, and what a mirror has still to be brought, the newest first."""
        kept = retained(policy, checkpoints)
        if self.mirrored is None:
            return kept
        total, awaited = 0, set[int]()
        for info in reversed(checkpoints):
            if info.sequence is None or not self.mirrored.awaits(info.sequence):
                continue
            total += info.num_bytes
            if total > self.mirror_backlog_bytes:
                break
            awaited.add(info.sequence)
        return kept | awaited

    def _why_unmirrored(self) -> str:
        return f"over {self.mirror_backlog_bytes:,} bytes wait for the mirror"

    def _tell_of_unmirrored(self, before: Registry, after: Registry, why: str) -> None:
        """What has just been dropped though the mirror does not have it."""
        if self.mirrored is not None:
            for drop in after.pending_deletes:
                if self.mirrored.awaits(drop.sequence) and drop not in before.pending_deletes:
                    self._report(logging.ERROR, "mirror_failed", drop.name, f"dropped before it was mirrored: {why}")

    def _note_doubtful(self, before: Registry, registry: Registry, info: CheckpointInfo) -> None:
        """The commit has failed. Is the file there all the same, it would be nobody's."""
        name, sequence = str(info.filepath), info.sequence
        assert sequence is not None
        try:
            if self._is_there(info):  # only the last sync failed
                self._registry, self._is_recorded = registry, False
        except OSError:  # so it is deleted, if it is this one, by what the next registry says
            drop = PendingDelete(name, sequence)
            if drop not in before.pending_deletes and all(str(other.filepath) != name for other in before.checkpoints):
                pending = (*before.pending_deletes, drop)
                self._registry, self._is_recorded = replace(before, pending_deletes=pending), False

    def _is_there(self, info: CheckpointInfo) -> bool:
        """Whether the file is this checkpoint. Raises OSError when it can't be read."""
        with contextlib.suppress(CorruptCheckpointError):
            description = describe_file(self.storage, self.path_of(str(info.filepath)))
            return description is not None and description.info.sequence == info.sequence
        return False

    def _pruned(self, registry: Registry, retention: RetentionPolicy | None) -> tuple[Registry, list[CheckpointInfo]]:
        policy = retention or self.retention
        if policy is None:
            raise ValueError("no retention policy was given")
        bare = registry.with_checkpoints(replace(info, protected=False) for info in registry.checkpoints)
        kept = self._retained(policy, bare.checkpoints)
        return bare.keeping(kept), [info for info in bare.checkpoints if info.sequence not in kept]

    def _write(self, registry: Registry) -> None:
        self._index.write(registry, self._lock)
        self._registry, self._is_recorded = registry, True

    def _link_best(self) -> None:
        """The registry is the truth; the link follows. Of a best one that somebody has deleted it learns here."""
        while (best := self._own_registry().best) is not None:
            try:
                self._index.link(best, self._own_registry().run_id)
                return
            except FileNotFoundError:
                self._report(logging.WARNING, "recovered", str(best.filepath), _GONE)
                registry = self._own_registry()
                self._write(registry.with_checkpoints(info for info in registry.checkpoints if info is not best))
            except NameTakenError:
                raise
            except OSError as error:
                raise OSError(error.errno, f"{BEST_NAME} can't be renewed: {error.strerror}") from error


@contextlib.contextmanager
def _explained(path: str, what_failed: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointWriteError(
            f"{path} {what_failed}: {reason}{remedy(error.errno, path)}", errno=error.errno
        ) from error


def _lists_the_same(a: Registry, b: Registry) -> bool:
    return (a.checkpoints, a.monitor_metric, a.monitor_mode, a.claim) == (
        b.checkpoints,
        b.monitor_metric,
        b.monitor_mode,
        b.claim,
    )
