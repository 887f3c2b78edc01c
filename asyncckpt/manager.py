"""The manager: a directory of checkpoints that keeps itself in order."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeVar

import torch

from asyncckpt.distributed.ranks import Ranks
from asyncckpt.distributed.sharding import check_replicated
from asyncckpt.errors import (
    CheckpointWriteError,
    MetricNotFoundError,
    RegistryError,
    StorageBusyError,
)
from asyncckpt.image.file import verify_listed
from asyncckpt.mirror_tier import MirrorOptions, MirrorTier, check_backlog, mirror_place
from asyncckpt.naming import BEST_NAME, checkpoint_name
from asyncckpt.opening import Opening
from asyncckpt.pace import Pace
from asyncckpt.paths import as_path
from asyncckpt.policies import SavePolicy
from asyncckpt.records import CheckpointInfo, VerifyReport, is_better
from asyncckpt.registry.backlog import Mirrored
from asyncckpt.registry.directory import CheckpointDirectory, Listing
from asyncckpt.registry.retention import KeepLast, RetentionPolicy
from asyncckpt.resume import Resume, Target, check_names
from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.saver import AsyncCheckpointSaver, close_after
from asyncckpt.state.capture import as_float, as_int, create_checkpoint, unwrap
from asyncckpt.state.rng import capture_rng_states
from asyncckpt.state.stateful import capture_stateful
from asyncckpt.storage.base import Storage
from asyncckpt.storage.bounded import BoundedStorage
from asyncckpt.storage.journal import journals_directory
from asyncckpt.storage.places import Places, full_path
from asyncckpt.threads import log_quietly

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from asyncckpt.service.options import SaverOptions

T = TypeVar("T")

_LEAST_PATIENCE_SECS = 1.0  # for giving the directory back, when all the time has been spent on the mirror


class CheckpointManager:
    """Saves checkpoints into one directory, keeps a registry of them, and resumes from them.

    The newest checkpoint is the one that was committed last, whatever its step. `best_model.pt` is always the best of
    those listed, by the monitored metric. Old ones are deleted once what replaces them is durable. Constructing a
    manager, listing and loading change nothing in the directory and may be done by any number of processes; the first
    `save` (or `prune`, `pin`) makes this manager the directory's one writer, until `close` or the end of the process.
    Thread-safe.

    In a distributed run every rank makes a manager and calls the same methods: rank 0 decides and writes, every rank
    loads the same checkpoint. `save`, `should_save`, the loads and `wait` are collective: every rank calls them, in the
    same order, from the thread that trains (not in a callback or a signal handler), and what fails on one rank is
    raised on all, by the same type. Everything else is done by any rank on its own.

    Args:
        checkpoint_dir: a directory, or a URL (`s3://bucket/run`); made by the first save.
        max_checkpoints: how many of the newest checkpoints to keep; the best one is kept besides.
        monitor_metric: "val_loss", "train_loss", or a name in `val_metrics`.
        monitor_mode: "min" if smaller is better, "max" if larger is.
        save_best_only: save only what improves on the best.
        retention: a policy (`KeepLast`, `KeepBest`, `KeepEvery`, joined by `|`) in place of `max_checkpoints`.
        save_policy: what `should_save` asks: `EverySteps`, `EveryMinutes` or `AdaptiveInterval`.
        mirror: a second directory, usually a URL, that every checkpoint is copied to in the background once it is
            durable in the first. It never holds up training; loads take the newest valid checkpoint of both places.
        mirror_retention: what the mirror keeps; None is the policy of the first directory.
        mirror_backlog_bytes: how much the first directory keeps besides, while the mirror does not have it yet; beyond
            that the oldest are dropped unmirrored, with an error in the log.
        mirror_storage_options: how to open the mirror; None: by `storage_options`, as the first directory.
        save_rng: save the state of all random number generators, and restore it with the rest.
        weights_only: refuse to save what a safe load would refuse, and load safely. False saves any picklable state,
            and loads may then run code that is in the file.
        lock_timeout_secs: how long to wait for another writer of the directory. When the storage does not answer while
            it is opened, `save` gives up after this and `stall_timeout_secs` more.
        saver_options: those of `AsyncCheckpointSaver`: `snapshot`, `max_in_flight`, `when_full`, `on_failure`, ….
    """

    def __init__(
        self,
        checkpoint_dir: str | os.PathLike[str] = "checkpoints",
        max_checkpoints: int = 5,
        monitor_metric: str = "val_loss",
        monitor_mode: str = "min",
        save_best_only: bool = False,
        *,
        retention: RetentionPolicy | None = None,
        save_policy: SavePolicy | None = None,
        mirror: str | os.PathLike[str] | None = None,
        mirror_retention: RetentionPolicy | None = None,
        mirror_backlog_bytes: int = 64 << 30,
        mirror_storage_options: Mapping[str, Any] | None = None,
        save_rng: bool = True,
        weights_only: bool = True,
        lock_timeout_secs: float = 10.0,
        **saver_options: Unpack[SaverOptions],
    ) -> None:
        if monitor_mode not in ("min", "max"):
            raise ValueError(f"monitor_mode must be 'min' or 'max', not {monitor_mode!r}")
        if not isinstance(monitor_metric, str) or not monitor_metric:
            raise ValueError(f"monitor_metric must be the name of a metric, not {monitor_metric!r}")
        self.checkpoint_dir = as_path(full_path(checkpoint_dir, "checkpoint_dir"))
        self.max_checkpoints = max_checkpoints
        self.monitor_metric = monitor_metric
        self.monitor_mode = monitor_mode
        self.save_best_only = save_best_only
        self.save_rng = save_rng
        self.weights_only = weights_only
        self._save_policy = save_policy
        _check_policy("retention", retention)
        _check_policy("mirror_retention", mirror_retention)
        check_backlog(mirror_backlog_bytes)
        place = mirror_place(mirror, str(self.checkpoint_dir)) if mirror is not None else None
        mirror_storage: Places | None = None
        if mirror_storage_options is not None:
            mirror_storage = Places(mirror_storage_options, journals_directory(), name="mirror_storage_options")
        if retention is None:
            if not isinstance(max_checkpoints, int) or isinstance(max_checkpoints, bool) or max_checkpoints < 1:
                raise ValueError(f"max_checkpoints must be a whole number of at least 1, not {max_checkpoints!r}")
            retention = KeepLast(max_checkpoints)
        self._saver = AsyncCheckpointSaver(**saver_options)
        self._storage = BoundedStorage()
        self._finalizer = weakref.finalize(self, self._storage.end, _nothing)
        self._finalizer.atexit = False
        self._lock_timeout_secs = lock_timeout_secs
        self._directory = CheckpointDirectory(
            str(self.checkpoint_dir),
            self._saver.storage,
            retention=retention,
            metric=monitor_metric,
            mode=monitor_mode,
            lock_timeout_secs=lock_timeout_secs,
            report=self._saver.emit,
            note_progress=self._storage.note_progress,
        )
        self._mirror: MirrorTier | None = None
        if place is not None:
            self._mirror = self._make_mirror(
                place, mirror_storage or self._saver.storage, mirror_retention or retention
            )
            self._directory.mirrored, self._directory.mirror_backlog_bytes = Mirrored(), mirror_backlog_bytes
        tiers = [self._directory, *([self._mirror.directory] if self._mirror is not None else [])]
        self._resume = Resume(tiers, self._saver.emit, weights_only=weights_only)
        self._opening = Opening(
            self._directory,
            self._storage,
            self._saver.wait_idle,
            lock_timeout_secs + self._saver.stall_timeout_secs,
            self._mirror,
            self._resume.seen,
        )
        self._saving = threading.RLock()  # guards what follows; reentrant, since signal handlers may save
        self._newest_step: int | None = None
        self._pace = Pace()

    def _make_mirror(self, place: str, storage: Storage, retention: RetentionPolicy) -> MirrorTier:
        saver = self._saver
        options = MirrorOptions(
            in_process=saver.writer != "thread",
            nice=saver.nice,
            lock_timeout_secs=self._lock_timeout_secs,
            exit_timeout_secs=saver.exit_timeout_secs,
        )
        directory = CheckpointDirectory(
            place,
            storage,
            retention=retention,
            metric=self.monitor_metric,
            mode=self.monitor_mode,
            lock_timeout_secs=self._lock_timeout_secs,
            report=saver.emit,
        )
        return MirrorTier(directory, self._directory, options, saver.emit, saver.run_callback)

    # --- saving ---

    def save(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        epoch: int,
        global_step: int,
        train_loss: float | None = None,
        val_loss: float | None = None,
        val_metrics: Mapping[str, float] | None = None,
        scheduler: Any = None,
        config: Mapping[str, Any] | None = None,
        extra_state: Mapping[str, Any] | None = None,
        *,
        stateful: Mapping[str, Any] | None = None,
        rank_stateful: Mapping[str, Any] | None = None,
    ) -> SaveHandle | None:
        """Snapshot the training state and write it in the background.

        Blocks for one memory copy (milliseconds with `snapshot="overlap"`), and until there is room in flight; the
        first call also opens the directory for writing. Nothing is durable on return: `handle.result()` or `wait()` say
        when it is. None if `save_best_only` and this is no improvement. In a distributed run the handles of all ranks
        but the first are settled at once, and `skipped`.

        Args:
            model: wrapped (DDP, torch.compile) or plain; saved without its wrappers.
            optimizer: None leaves it out.
            epoch, global_step: where training is, for the file's name and for resuming.
            train_loss, val_loss, val_metrics: numbers, or tensors of one element. Without `val_loss` and `val_metrics`
                (in the middle of an epoch) the checkpoint can't be the best. NaN never is.
            scheduler: anything with `state_dict()`.
            config, extra_state: plain data to keep with it; tensors too.
            stateful: objects with `state_dict()` and `load_state_dict()`, or random generators, by name; the same on
                every rank, so that the first one's is saved.
            rank_stateful: the same, for what differs from rank to rank, as data loaders may.

        Raises:
            MetricNotFoundError: metrics were given, but not the monitored one.
            UnsafeCheckpointError: a safe load would refuse something; the message names it (`config.optimizer_cls`).
            UnsupportedStateError: the model is sharded over the ranks, or something can't be saved.
            StorageBusyError, CheckpointWriteError, RegistryError: the directory can't be opened for writing: somebody
                else writes to it, or the storage refuses or does not answer. Once it has been open, what becomes of it
                later fails saves (by their handles), and training goes on.
            And what `AsyncCheckpointSaver.save` raises.
        """
        self._saver.check_not_in_callback("save")
        ranks = Ranks()
        handle: SaveHandle | None = None

        def capture_own() -> dict[str, Any]:
            check_names(stateful, rank_stateful)
            check_replicated(model)
            return {
                "rng_states": capture_rng_states() if self.save_rng else None,
                "stateful": capture_stateful(rank_stateful or {}),
            }

        def save_here(rank_states: list[dict[str, Any]]) -> tuple[int, bool] | None:
            nonlocal handle
            info = self._describe(epoch, global_step, train_loss, val_loss, val_metrics)
            checkpoint = create_checkpoint(
                model,
                optimizer,
                scheduler,
                info.epoch or 0,
                info.global_step or 0,
                info.train_loss,
                info.val_loss,
                dict(info.val_metrics),
                config,
                rank_states[0]["rng_states"],
                extra_state=extra_state,
                stateful=stateful,
                save_rng=False,
            )
            if scheduler is None:
                del checkpoint["scheduler_state_dict"]
            if ranks.size > 1 or rank_stateful:
                checkpoint["rank_states"] = rank_states
            checkpoint["timestamp"] = info.timestamp
            handle = self._submit(checkpoint, info, model, optimizer)
            return (info.global_step or 0, handle.skipped) if handle is not None else None

        saved = ranks.on_first_from_all(capture_own, save_here)
        if saved is not None and handle is None:
            step, is_skipped = saved
            if not is_skipped:
                self._pace.mark(step)  # so that this rank's should_save says what rank 0's does
            handle = SaveHandle(str(self.checkpoint_dir), _run)
            handle.skip()  # rank 0 writes
        return handle

    def _describe(
        self,
        epoch: int,
        global_step: int,
        train_loss: float | None,
        val_loss: float | None,
        val_metrics: Mapping[str, float] | None,
    ) -> CheckpointInfo:
        """The checkpoint's entry, all but its number; plain numbers, since safe loads and JSON know no others."""
        metrics = {str(name): as_float(name, value) for name, value in (val_metrics or {}).items()}
        info = CheckpointInfo(
            filepath=Path(),
            epoch=as_int("epoch", epoch),
            global_step=as_int("global_step", global_step),
            val_loss=None if val_loss is None else as_float("val_loss", val_loss),
            val_metrics=metrics,
            timestamp=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            train_loss=None if train_loss is None else as_float("train_loss", train_loss),
        )
        monitored = info.metric(self.monitor_metric)
        if monitored is None and (metrics or info.val_loss is not None or self.save_best_only):
            given = ", ".join(["val_loss"] * (info.val_loss is not None) + sorted(metrics)) or "none"
            raise MetricNotFoundError(
                f"the monitored metric {self.monitor_metric!r} was not given to save(); these were: {given}"
            )
        shown = {"loss": info.val_loss}
        if self.monitor_metric != "val_loss":
            shown[self.monitor_metric] = monitored
        name = checkpoint_name(info.epoch or 0, info.global_step or 0, shown)
        return replace(info, filepath=Path(name))

    def _submit(
        self, checkpoint: dict[str, Any], info: CheckpointInfo, model: torch.nn.Module, optimizer: Any
    ) -> SaveHandle | None:
        with self._saving:
            self._saver.check_usable()
            try:
                is_certain = self._opening.open_for_writing()
            except (CheckpointWriteError, StorageBusyError, RegistryError) as error:
                if not self._directory.was_open:
                    raise
                # Training has begun, and goes on: a directory lost on the way fails this save, as a full disk would.
                handle = self._saver.fail(str(self.checkpoint_dir / info.filepath), error)
                self._note_saving(handle, info)
                return handle
            if self.save_best_only and not self._is_improvement(info):
                return None
            self._note_branch(info)
            if self._mirror is not None:
                self._directory.mirrored = self._mirror.running().mirrored
            listing = replace(self._directory.reserve(info), is_certain=is_certain)
            handle = self._submit_listed(checkpoint, listing, model, optimizer)
            if not handle.skipped:
                self._note_saving(handle, info)
            return handle

    def _submit_listed(
        self, checkpoint: dict[str, Any], listing: Listing, model: torch.nn.Module, optimizer: Any
    ) -> SaveHandle:
        """For the mirror too, which is told before, since it may have it at once."""
        mirror = self._mirror.started if self._mirror is not None else None
        sequence = listing.info.sequence or 0
        mirrored = mirror.expect(sequence, str(listing.info.filepath)) if mirror is not None else None
        handle: SaveHandle | None = None
        try:
            handle = self._saver.save_listed(
                checkpoint,
                listing,
                optimizers=[optimizer] if optimizer is not None else [],
                modules=[unwrap(model)],
                weights_only=self.weights_only,
            )
        finally:
            if handle is None or handle.skipped:
                self._directory.withdraw(listing)
                if mirror is not None:
                    mirror.withdraw(sequence)
        if mirror is not None and not handle.skipped:
            handle.mirrored = mirrored
            mirror.follow(handle, sequence)
        return handle

    def _note_saving(self, handle: SaveHandle, info: CheckpointInfo) -> None:
        self._newest_step = info.global_step
        self._pace.note_save(handle, info)

    def _is_improvement(self, info: CheckpointInfo) -> bool:
        """On the best there is, also in the mirror that an empty disk went on from, and on what is being written."""
        registry, continued = self._directory.own_registry, self._opening.continued
        best = registry.best_score
        scores = [other.metric(self.monitor_metric) for other in self._pace.in_flight]
        if continued is not None and continued.run_id == registry.run_id:
            scores.append(continued.best_score)
        for score in scores:
            best = score if is_better(score, best, self.monitor_mode) else best
        return is_better(info.metric(self.monitor_metric), best, self.monitor_mode)

    def _note_branch(self, info: CheckpointInfo) -> None:
        newest = self._newest_step
        if newest is None and (latest := self._directory.own_registry.latest) is not None:
            newest = latest.global_step
        if newest is not None and (info.global_step or 0) < newest:
            log_quietly(
                logging.WARNING,
                f"{self.checkpoint_dir}: step {info.global_step} is below the newest checkpoint's, {newest}: from here "
                "on this branch is the latest",
            )

    # --- when to save ---

    def should_save(self, step: int) -> bool:
        """Whether `save_policy` wants a checkpoint after this step; without a policy, after every step.

        Call it once a step: the time between calls tells how much slower steps are while a checkpoint is written. Takes
        microseconds; in a distributed run a time-based policy asks rank 0, which every rank waits for.
        """
        self._saver.check_not_in_callback("should_save")
        policy = self._save_policy
        if policy is None:
            return step != self._pace.last_step
        if policy.uses_time:
            return Ranks().on_first(lambda: self._pace.should_save(policy, step))
        return self._pace.should_save(policy, step)

    # --- loading ---

    def load_latest(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        device: torch.device | str | None = None,
        *,
        stateful: Mapping[str, Any] | None = None,
        rank_stateful: Mapping[str, Any] | None = None,
        strict: bool = True,
        restore_rng: bool = True,
        weights_only: bool | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Restore the newest valid checkpoint; its epoch and all it holds. `(0, {})` if there is none.

        Blocks until every byte has been checked and the state is in place. A damaged or missing checkpoint is passed
        over for the next older one, with a warning in the log and an event; so is one that is damaged while it is
        loaded, since all that is restored is read and checked once more. The returned tensors are mapped from the
        file: drop them once they are not needed, since a deleted file keeps its space as long as they live.

        Args:
            model, optimizer, scheduler: to restore into; those left out are not restored.
            device: where to move the model.
            stateful, rank_stateful: the objects that were given to `save`, by the same names. When another number of
                ranks saved the checkpoint, nobody's own state is in it: those of `rank_stateful`, and the random number
                generators, are left as they are, with a warning.
            strict: the checkpoint must hold everything that is asked for, and the model's keys must match. Otherwise
                what is missing is left as it is, with a warning.
            restore_rng: set all random number generators to the states of this rank when it was saved.
            weights_only: False lets the file run code; None is the manager's own setting.

        Raises:
            CorruptCheckpointError: there are checkpoints, but not one of them is whole.
            CheckpointError: the checkpoint does not fit what it is to be restored into; nothing was changed.
            UnsafeCheckpointError: it would run code.
        """
        target = Target(model, optimizer, scheduler, device, stateful, rank_stateful, strict, restore_rng, weights_only)
        return self._resumed(self._resume.latest(target))

    def load_best(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        device: torch.device | str | None = None,
        *,
        stateful: Mapping[str, Any] | None = None,
        rank_stateful: Mapping[str, Any] | None = None,
        strict: bool = True,
        restore_rng: bool = True,
        weights_only: bool | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Restore the best checkpoint by the monitored metric; `(0, {})` if none has one. As `load_latest`.

        A damaged best checkpoint is an error: no other is the best.
        """
        target = Target(model, optimizer, scheduler, device, stateful, rank_stateful, strict, restore_rng, weights_only)
        return self._resumed(self._resume.best(target))

    def load(
        self,
        checkpoint: SupportsIndex | str | os.PathLike[str],
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        device: torch.device | str | None = None,
        *,
        stateful: Mapping[str, Any] | None = None,
        rank_stateful: Mapping[str, Any] | None = None,
        strict: bool = True,
        restore_rng: bool = True,
        weights_only: bool | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Restore one checkpoint: the newest of a step, or the file at a path (or name in the directory).

        As `load_latest`, but without falling back. Raises `CheckpointNotFoundError` if there is no such checkpoint.
        """
        target = Target(model, optimizer, scheduler, device, stateful, rank_stateful, strict, restore_rng, weights_only)
        return self._resumed(self._resume.one(checkpoint, target))

    def _resumed(self, checkpoint: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        if checkpoint is None:
            return 0, {}
        with self._saving:
            self._newest_step = None
            self._pace.mark(checkpoint.get("global_step") or 0)
        return checkpoint.get("epoch") or 0, checkpoint

    # --- the directory ---

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """All checkpoints, in the order of their commits. Reads the registry; changes nothing."""
        return [self._directory.locate(info) for info in self._opening.registry().checkpoints]

    @property
    def latest(self) -> CheckpointInfo | None:
        """The checkpoint that was committed last."""
        latest = self._opening.registry().latest
        return latest and self._directory.locate(latest)

    @property
    def best(self) -> CheckpointInfo | None:
        """The best checkpoint by the monitored metric."""
        best = self._opening.registry().best
        return best and self._directory.locate(best)

    @property
    def best_score(self) -> float:
        """The best checkpoint's metric; without one, infinitely bad."""
        score = self._opening.registry().best_score
        return score if score is not None else float("inf" if self.monitor_mode == "min" else "-inf")

    @property
    def best_checkpoint_path(self) -> Path | None:
        """`best_model.pt`, if there is a best checkpoint. It may share its bytes with the checkpoint's own file."""
        return self.checkpoint_dir / BEST_NAME if self._opening.registry().best else None

    def verify(self) -> list[VerifyReport]:
        """Read every byte of every checkpoint and check it. Blocks; changes nothing. A missing file is a problem."""
        return [verify_listed(self._saver.storage, str(info.filepath)) for info in self.list_checkpoints()]

    def prune(self, retention: RetentionPolicy | None = None, *, dry_run: bool = False) -> list[CheckpointInfo]:
        """Apply the retention policy (or another one) now; the checkpoints that were deleted.

        Also those that were recovered without a registry, which saving leaves alone. Blocks until the files are
        deleted, durably. With `dry_run` nothing is changed. Raises as `save` does when the directory can't be written.
        In a distributed run rank 0 does it, and waits for nobody; on the others nothing happens, and none are returned.
        """
        if Ranks().is_first and self._mirror is not None:
            self._directory.mirrored = self._mirror.find_mirrored(self._opening.registry())
        if dry_run:
            return [self._directory.locate(info) for info in self._directory.prune(retention, dry_run=True)]
        return self._on_directory(lambda: self._directory.prune(retention), "prune")

    def pin(self, step: int) -> list[CheckpointInfo]:
        """Keep the newest checkpoint of a step, whatever retention and `prune` say, until `unpin`; in the mirror too.

        It is listed as `pinned`, and a later save of the same step takes another name. Only the registry knows of pins:
        when it is lost, all checkpoints are kept until somebody prunes, but none is pinned any more. Blocks until the
        registry is durable, behind the saves that were submitted before. Raises `CheckpointNotFoundError` if there is
        no such checkpoint, and as `save` does when the directory can't be written. In a distributed run rank 0 does it,
        and waits for nobody; on the others nothing happens, and none are returned.
        """
        step = as_int("step", step)
        return self._on_directory(lambda: self._directory.pin(step), "pin")

    def unpin(self, step: int) -> list[CheckpointInfo]:
        """Leave the checkpoints of a step to retention again; those that were pinned. As `pin`."""
        step = as_int("step", step)
        return self._on_directory(lambda: self._directory.unpin(step), "unpin", unpins=True)

    def _on_directory(
        self, change: Callable[[], list[CheckpointInfo]], name: str, *, unpins: bool = False
    ) -> list[CheckpointInfo]:
        """Open the directory for writing, and change it where saves are written, after those that were submitted."""
        if not Ranks().is_first:
            return []
        self._saver.check_open()
        with self._saving:
            self._opening.open_for_writing()
            mirror = self._mirror.running() if self._mirror is not None else None
        changed = self._saver.run_on_worker(change, name, str(self.checkpoint_dir))
        if mirror is not None:
            if unpins:
                mirror.unpin([info.sequence for info in changed if info.sequence is not None])
            mirror.poke()
        return [self._directory.locate(info) for info in changed]

    # --- the writer process ---

    def use_writer_process(self) -> bool:
        """As `AsyncCheckpointSaver.use_writer_process`; ranks other than the first write nothing, and start nothing."""
        return Ranks().is_first and self._saver.use_writer_process()

    def leave_to_writer(self) -> None:
        """As `AsyncCheckpointSaver.leave_to_writer`; what the mirror lacks is its process's business, too."""
        self._saver.leave_to_writer()
        if self._mirror is not None:
            self._mirror.leave()

    # --- the end ---

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Warm the memory for the first save. Blocks, without the GIL; see `AsyncCheckpointSaver.prepare`."""
        if Ranks().is_first:
            self._saver.prepare(create_checkpoint(model, optimizer, save_rng=False))

    def wait(self, timeout: float | None = None, *, tier: Literal["local", "mirror"] = "local") -> None:
        """The barrier: return once every save before is durable and what it replaced is deleted, or raise.

        With `tier="mirror"` only once the mirror has all that too, and what was saved before this run; while it does
        not answer, this waits. What never came there, being damaged or dropped before, is raised once. In a distributed
        run it is a barrier of all ranks. See `AsyncCheckpointSaver.wait`.
        """
        if tier not in ("local", "mirror"):
            raise ValueError(f"tier must be 'local' or 'mirror', not {tier!r}")
        if tier == "mirror" and self._mirror is None:
            raise ValueError("this manager has no mirror")
        self._saver.check_not_in_callback("wait")
        Ranks().on_first(lambda: self._wait(timeout, tier))

    def _wait(self, timeout: float | None, tier: str) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._saver.wait(timeout)
        if tier == "mirror" and self._mirror is not None:
            if self._mirror.started is None:
                with self._saving:
                    self._saver.check_open()
                    self._mirror.running()
            self._mirror.wait(deadline)

    def close(self, timeout: float | None = None) -> None:
        """Wait until everything is durable, and give threads, memory and the directory back. Raises as `wait` does.

        Blocks up to `timeout` seconds. Waits for no other rank: in a distributed run the first one closes what it
        wrote, and alone raises what failed.
        """
        self._saver.check_not_in_callback("close")
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            self._saver.close(timeout, before_end=lambda: self._close_mirror(deadline))
        finally:
            self._give_back(deadline)

    def _close_mirror(self, deadline: float | None) -> None:
        if self._mirror is not None:
            self._mirror.close(deadline, self._saver.call_when_idle)

    def _give_back(self, deadline: float | None) -> None:
        """Let the next writer in, once nothing is in flight; not on this thread, which a dead storage must not hold."""
        storage, directory = self._storage, self._directory
        if not self._saver.call_when_idle(lambda: storage.end(directory.shut)):
            return
        patience = self._saver.stall_timeout_secs
        if deadline is not None:
            patience = min(patience, max(_LEAST_PATIENCE_SECS, deadline - time.monotonic()))
        if not storage.join(patience):
            log_quietly(
                logging.WARNING,
                f"{self.checkpoint_dir}: nothing is left to be written, but the storage does not answer: the directory "
                "is given back when it does, or when this process ends",
            )

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        close_after(error, lambda: self.close(self._saver.exit_timeout_secs))


def _check_policy(name: str, policy: RetentionPolicy | None) -> None:
    if policy is not None and not isinstance(policy, RetentionPolicy):
        raise TypeError(f"{name} must be a retention policy, as KeepLast(5) is, not {policy!r}")


def _run(action: Callable[[], object]) -> None:
    action()


def _nothing() -> None:
    pass
