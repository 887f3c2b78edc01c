"""`asyncckpt prune`, `repair`, `pin` and `unpin`: what changes a directory. No torch."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_

from rich.console import Console

from asyncckpt.cli.output import clean, format_bytes, format_count
from asyncckpt.errors import CheckpointNotFoundError, MetricNotFoundError
from asyncckpt.events import EventKind
from asyncckpt.naming import BEST_NAME, is_temporary_name
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.recovery import Survey, survey
from asyncckpt.registry.registry import Registry
from asyncckpt.registry.retention import KeepBest, KeepEvery, KeepLast, RetentionPolicy
from asyncckpt.storage.base import Storage
from asyncckpt.threads import logger


@dataclass(frozen=True)
class Action:
    """One thing that opening a directory for writing did, to a file in it."""

    kind: EventKind
    file: str
    detail: str


@dataclass(frozen=True)
class Keep:
    """What `prune` is to keep: one number for each option that was given.

    Raises ValueError unless there is at least one, and for numbers that no policy takes.
    """

    last: int | None = None
    best: int | None = None
    every_steps: int | None = None
    every_epochs: int | None = None
    every_hours: float | None = None
    metric: str | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        if self.best is None and (self.metric is not None or self.mode is not None):
            raise ValueError("--metric and --mode say which are the best: they need --keep-best")
        if not self._others() and self.best is None:
            raise ValueError("say what to keep: --keep-last, --keep-best or one of --keep-every…")

    def policy(self, registry: Registry) -> RetentionPolicy:
        """By the metric that the directory monitors, unless another one was named.

        Raises ValueError for another metric without a mode, and `MetricNotFoundError` if no checkpoint has the metric:
        the best would be nothing, and all would be deleted.
        """
        return reduce(or_, [*self._others(), *([] if self.best is None else [self._keep_best(self.best, registry)])])

    def _others(self) -> list[RetentionPolicy]:
        policies: list[RetentionPolicy] = []
        if self.last is not None:
            policies.append(KeepLast(self.last))
        if self.every_steps is not None:
            policies.append(KeepEvery(steps=self.every_steps))
        if self.every_epochs is not None:
            policies.append(KeepEvery(epochs=self.every_epochs))
        if self.every_hours is not None:
            policies.append(KeepEvery(hours=self.every_hours))
        return policies

    def _keep_best(self, num: int, registry: Registry) -> KeepBest:
        metric = self.metric or registry.monitor_metric
        if self.mode is None and metric != registry.monitor_metric:
            raise ValueError(f"--metric {metric} needs --mode: this directory monitors {registry.monitor_metric}")
        known = {"val_loss", "train_loss"} | {name for info in registry.checkpoints for name in info.val_metrics}
        there = sorted(name for name in known if any(_is_known(info.metric(name)) for info in registry.checkpoints))
        if registry.checkpoints and metric not in there:
            raise MetricNotFoundError(f"no checkpoint has the metric {metric}; there are: {', '.join(there) or 'none'}")
        return KeepBest(num, metric, self.mode or registry.monitor_mode)


@dataclass(frozen=True)
class Pruned:
    """What was deleted, or would be. `repairs` was done besides, since a writer makes the directory agree first."""

    directory: str
    dry_run: bool
    policy: str
    deleted: Sequence[CheckpointInfo]
    freed_bytes: int
    num_kept: int
    not_deleted: Sequence[Action]
    repairs: Sequence[Action]


@dataclass(frozen=True)
class Pinned:
    """The checkpoints of a step that are pinned now, or are not any more. `repairs` as in `Pruned`."""

    directory: str
    step: int
    pinned: bool
    checkpoints: Sequence[CheckpointInfo]
    repairs: Sequence[Action]


@dataclass(frozen=True)
class Repaired:
    """Everything that was done; and the files that belong to nobody known, which were left alone."""

    directory: str
    actions: Sequence[Action]
    left_alone: Sequence[str]


def find_policy(storage: Storage, directory: str, keep: Keep) -> RetentionPolicy:
    """What `keep` means for the directory as it is. Raises as `Keep.policy` and `survey` do."""
    return keep.policy(survey(storage, directory).registry)


def prune(storage: Storage, directory: str, policy: RetentionPolicy, *, dry_run: bool) -> Pruned:
    """Delete what the policy does not keep. Blocks; durable on return. Raises as `CheckpointDirectory.prune` does."""
    before = survey(storage, directory)
    if not before.registry.checkpoints:  # not even a registry is to be written then
        return Pruned(directory, dry_run, repr(policy), (), 0, 0, (), ())
    with _opening(storage, directory, before) as (opened, actions):
        dropped = opened.prune(policy, dry_run=dry_run)
        num_left = len(opened.registry.checkpoints)
    failed = [action for action in actions if action.kind == "failed"]
    failed_names = {action.file for action in failed}
    deleted = [info for info in dropped if str(info.filepath) not in failed_names]
    dropped_names = {str(info.filepath) for info in dropped}
    return Pruned(
        directory,
        dry_run,
        repr(policy),
        deleted,
        sum(info.num_bytes for info in deleted),
        num_left - len(dropped) if dry_run else num_left,
        failed,
        [action for action in actions if action.file not in dropped_names],
    )


def pin(storage: Storage, directory: str, step: int, *, is_pinned: bool) -> Pinned:
    """Pin the newest checkpoint of a step, or unpin all of it. Blocks; raises as `CheckpointDirectory.pin` does."""
    before = survey(storage, directory)
    if not before.registry.checkpoints:  # nothing is to be written then
        raise CheckpointNotFoundError(f"there are no checkpoints in {directory}")
    with _opening(storage, directory, before) as (opened, actions):
        changed = opened.pin(step) if is_pinned else opened.unpin(step)
    return Pinned(directory, step, is_pinned, changed, actions)


def repair(storage: Storage, directory: str) -> Repaired:
    """Make the directory agree with itself. Blocks. Raises as `CheckpointDirectory.open_for_writing` does."""
    before = survey(storage, directory)
    has_temporary_files = any(map(is_temporary_name, storage.list_names(directory)))
    if before.recorded is None and not (before.damage or before.registry.checkpoints or has_temporary_files):
        return Repaired(directory, (), before.strangers)  # not even a lock's file is to be made then
    with _opening(storage, directory, before) as (opened, actions):
        opened.open_for_writing()
    after = survey(storage, directory)
    if after.linked_best != before.linked_best:
        actions.append(Action("recovered", BEST_NAME, "it was not the best checkpoint: now it is"))
    return Repaired(directory, actions, after.strangers)


def _is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


@contextmanager
def _opening(storage: Storage, directory: str, before: Survey) -> Iterator[tuple[CheckpointDirectory, list[Action]]]:
    """The directory, closed in the end, and a list of what it reports; the log would only say the same again."""
    actions: list[Action] = []

    def report(kind: EventKind, path: str, detail: str) -> None:
        name = os.path.basename(path)
        if not (kind == "recovered" and name in before.strangers):  # those are not touched
            actions.append(Action(kind, name, detail))

    opened = CheckpointDirectory(directory, storage, lock_timeout_secs=0.0, report=report)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield opened, actions
    finally:
        logger.setLevel(level)
        opened.close()


def draw_pruned(pruned: Pruned, console: Console) -> None:
    """What is gone, then the sum."""
    verb = "would delete" if pruned.dry_run else "deleted"
    _draw_actions(pruned.repairs, console)
    for info in pruned.deleted:
        console.print(f"{verb} {clean(info.filepath)} ({format_bytes(info.num_bytes)})", soft_wrap=True)
    for action in pruned.not_deleted:
        console.print(f"{clean(action.file)}: {clean(action.detail)}", style="bold red", soft_wrap=True)
    if not pruned.deleted and not pruned.not_deleted:
        console.print(f"nothing to delete; {format_count(pruned.num_kept, 'checkpoint')} kept")
    else:
        freed = f"{format_bytes(pruned.freed_bytes)} {'to free' if pruned.dry_run else 'freed'}"
        console.print(f"{verb} {format_count(len(pruned.deleted), 'checkpoint')}, {freed}; {pruned.num_kept} kept")


def draw_pinned(pinned: Pinned, console: Console) -> None:
    """A line for each."""
    _draw_actions(pinned.repairs, console)
    for info in pinned.checkpoints:
        console.print(f"{'pinned' if pinned.pinned else 'unpinned'} {clean(info.filepath)}", soft_wrap=True)
    if not pinned.checkpoints:
        console.print(f"no checkpoint of step {pinned.step} was pinned")


def draw_repaired(repaired: Repaired, console: Console) -> None:
    """What was done, file by file."""
    _draw_actions(repaired.actions, console)
    if not repaired.actions:
        console.print("nothing to do")
    for name in repaired.left_alone:
        console.print(f"{clean(name)}: not of this run, left alone", style="dim", soft_wrap=True)


def _draw_actions(actions: Sequence[Action], console: Console) -> None:
    for action in actions:
        console.print(f"{clean(action.file)}: {clean(action.detail)}", style="yellow", soft_wrap=True)
