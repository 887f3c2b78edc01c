"""Resuming: which file to load, the same on every rank, and into what."""

from __future__ import annotations

import errno
import logging
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch

from asyncckpt.distributed.ranks import OtherRankError, Ranks
from asyncckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.image.file import file_path
from asyncckpt.image.load import Loaded, load_to_restore
from asyncckpt.naming import BEST_NAME
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory, Report
from asyncckpt.registry.recovery import Survey, file_of
from asyncckpt.registry.registry import FileDescription, read_description
from asyncckpt.state.restore import restore_checkpoint, taken_apart
from asyncckpt.threads import log_quietly

_NUM_LOOKS = 3  # at a directory that another process prunes meanwhile
# The disk's word that this file can't be read; what else fails is no reason to take an older checkpoint.
_UNREADABLE = frozenset({errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENODATA, errno.EBADMSG})


@dataclass
class Target:
    """What a load restores into, and how."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    scheduler: Any
    device: torch.device | str | None
    stateful: Mapping[str, Any] | None
    rank_stateful: Mapping[str, Any] | None
    strict: bool
    restore_rng: bool
    weights_only: bool | None

    def take(self, loaded: Loaded, ranks: Ranks) -> dict[str, Any]:
        """The checkpoint as this rank saved it, with its own generators' states and what was its own, and what is to be
        restored read from the file into memory of its own. Changes nothing; raises as loading does."""
        check_names(self.stateful, self.rank_stateful)
        taken = dict(loaded.state)
        rank_states = taken.get("rank_states")
        states = taken.get("stateful") or {}
        if rank_states is not None and len(rank_states) == ranks.size:
            own = rank_states[ranks.rank]
            taken["rng_states"] = own["rng_states"]
            states = {**states, **own["stateful"]}
        elif rank_states is not None or ranks.size > 1:
            taken["rng_states"] = None
        objects = self._objects()
        taken["stateful"] = taken_apart(states, loaded, [name for name in states if name in objects])
        return taken_apart(taken, loaded, self._wanted())

    def restore(self, taken: dict[str, Any], ranks: Ranks) -> None:
        """Put in place what was taken."""
        objects = self._objects()
        rank_states = taken.get("rank_states")
        if (rank_states is not None and len(rank_states) != ranks.size) or (rank_states is None and ranks.size > 1):
            saved = {name for state in rank_states or () for name in state["stateful"]}
            objects = {name: thing for name, thing in objects.items() if name not in saved}
            if ranks.is_first and (self.optimizer is not None or self.rank_stateful):  # not for weights alone
                log_quietly(
                    logging.WARNING,
                    f"saved by {len(rank_states or (1,))} ranks and loaded by {ranks.size}: random number generators, "
                    "and what ranks kept of their own, are left as they are",
                )
        restore_checkpoint(
            taken,
            self.model,
            self.optimizer,
            self.scheduler,
            self.device,
            stateful=objects,
            strict=self.strict,
            restore_rng=self.restore_rng,
            gives_memory=True,
        )

    def _wanted(self) -> list[str]:
        keys = ["model_state_dict"] + ["optimizer_state_dict"] * (self.optimizer is not None)
        return keys + ["scheduler_state_dict"] * (self.scheduler is not None) + ["rng_states"] * self.restore_rng

    def _objects(self) -> dict[str, Any]:
        return {**(self.stateful or {}), **(self.rank_stateful or {})}


class Resume:
    """Loads from one directory. Every method is collective, blocks, and restores on all ranks or on none."""

    def __init__(self, directory: CheckpointDirectory, emit: Report, *, weights_only: bool) -> None:
        self._directory = directory
        self._emit = emit
        self._weights_only = weights_only

    def latest(self, target: Target) -> dict[str, Any] | None:
        """Restore the newest checkpoint that every rank can read, and return it; None if there is none at all."""
        return self._restore_first(self._newest_first, target, "checkpoint")

    def best(self, target: Target) -> dict[str, Any] | None:
        """Restore the best checkpoint, and return it; None if there is none."""
        return self._restore_first(self._best_first, target, "best checkpoint")

    def one(self, checkpoint: SupportsIndex | str | os.PathLike[str], target: Target) -> dict[str, Any]:
        """Restore the newest checkpoint of a step, or the file at a path, and return it."""
        path, expected = Ranks().on_first(lambda: self._find(checkpoint))
        try:
            return self._restore(path, target, expected)
        except _Unreadable as error:
            raise error.met from error.met.__cause__

    def _find(self, checkpoint: SupportsIndex | str | os.PathLike[str]) -> tuple[str, _Candidate | None]:
        """The file; and what it must be, if the registry named it, and not the user."""
        if isinstance(checkpoint, SupportsIndex):
            step = operator.index(checkpoint)
            found = self._directory.read()
            infos = [info for info in found.registry.checkpoints if info.global_step == step]
            if infos:
                candidate = self._candidate(found, infos[-1])
                return candidate.path, candidate
            steps = ", ".join(str(info.global_step) for info in found.registry.checkpoints) or "none"
            raise CheckpointNotFoundError(f"{self._directory.path} has no checkpoint of step {step}; it has {steps}")
        name = os.fspath(checkpoint)
        if os.path.basename(name) == name and self._directory.has_file(name):
            return self._directory.path_of(name), None
        return file_path(name), None

    def _restore_first(
        self, choose: Callable[[Survey], list[_Candidate]], target: Target, what: str
    ) -> dict[str, Any] | None:
        """The first of the chosen files that every rank can read."""
        ranks = Ranks()
        error: Exception | None = None
        for look in range(_NUM_LOOKS):
            candidates = ranks.on_first(lambda: self._look(choose))
            if not candidates:
                log_quietly(logging.INFO, f"{self._directory.path} has no {what} to resume from")
                return None
            for candidate in candidates:
                try:
                    return self._restore(candidate.path, target, candidate)
                except _Unreadable as unreadable:
                    error = unreadable.met
                    is_last_look = look == _NUM_LOOKS - 1
                    if not is_last_look and ranks.on_first(lambda: self._look(choose)) != candidates:
                        break  # another process has changed the directory meanwhile
                    self._directory.note_damaged(candidate.info)
                    self._report_fallback(candidate.path, unreadable, is_last=candidate is candidates[-1])
            else:
                break
        raise CorruptCheckpointError(
            f"no {what} in {self._directory.path} can be read; the last error: {error}"
        ) from error

    def _look(self, choose: Callable[[Survey], list[_Candidate]]) -> list[_Candidate]:
        """What there is to choose from. Raises `CorruptCheckpointError` if all that there was is lost."""
        self._directory.await_finishing()
        found = self._directory.read()
        if found.lost:
            raise CorruptCheckpointError(
                f"{self._directory.path} had checkpoints, and none of them can be read: {', '.join(found.lost[:5])}; "
                "bring them back, or, to start anew, use another directory or move these files and registry.json away"
            )
        if not found.registry.checkpoints and found.strangers:
            log_quietly(
                logging.WARNING,
                f"{self._directory.path} holds {len(found.strangers)} .pt files that are not this run's, "
                f"{found.strangers[0]} for one: they are left alone",
            )
        return choose(found)

    def _newest_first(self, found: Survey) -> list[_Candidate]:
        return [self._candidate(found, info) for info in reversed(found.registry.checkpoints)]

    def _best_first(self, found: Survey) -> list[_Candidate]:
        """The best one's file; then its link, which may be a copy, and whole."""
        best = found.registry.best
        if best is None:
            return []
        candidate = self._candidate(found, best)
        link = replace(candidate, path=self._directory.path_of(BEST_NAME))
        return [candidate, link] if found.linked_best == best.sequence and link != candidate else [candidate]

    def _candidate(self, found: Survey, info: CheckpointInfo) -> _Candidate:
        return _Candidate(self._directory.path_of(str(file_of(found, info))), found.registry.run_id, info)

    def _report_fallback(self, path: str, error: Exception, *, is_last: bool) -> None:
        log_quietly(logging.WARNING, f"{error}" if is_last else f"{error}; trying the next one")
        self._emit("fallback", path, str(error))

    def _restore(self, path: str, target: Target, expected: _Candidate | None = None) -> dict[str, Any]:
        """Read one file on every rank, and restore it if all could; else nobody does."""
        ranks = Ranks()
        weights_only = self._weights_only if target.weights_only is None else target.weights_only
        try:
            checkpoint, taken = ranks.on_all(
                lambda: _read(
                    self._directory,
                    path,
                    expected,
                    lambda loaded: target.take(loaded, ranks),
                    weights_only=weights_only,
                )
            )
        except Exception as error:
            if _is_unreadable(error):
                raise _Unreadable(error) from error
            raise
        ranks.on_all(lambda: target.restore(taken, ranks))
        return checkpoint


@dataclass(frozen=True)
class _Candidate:
    """A file to load, and which checkpoint of which run it should hold."""

    path: str
    run_id: str
    info: CheckpointInfo

    def check(self, description: FileDescription | None) -> None:
        """Raise unless it is that one, or a later one that took its name meanwhile."""
        is_ours = description is not None and description.run_id == self.run_id
        if description is None or not is_ours or (description.info.sequence or 0) < (self.info.sequence or 0):
            raise CorruptCheckpointError(f"{self.path} is not the checkpoint that the registry names, but another file")


class _Unreadable(Exception):
    """A checkpoint that can't be read, on this rank or another; `met` is what that rank met."""

    def __init__(self, met: Exception) -> None:
        cause = met.__cause__
        super().__init__(f"rank {cause.rank}: {met}" if isinstance(cause, OtherRankError) else str(met))
        self.met = met


def _is_unreadable(error: Exception) -> bool:
    if isinstance(error, (CorruptCheckpointError, CheckpointNotFoundError)):
        return True
    return isinstance(error, OSError) and error.errno in _UNREADABLE


def check_names(stateful: Mapping[str, Any] | None, rank_stateful: Mapping[str, Any] | None) -> None:
    """Raise ValueError if a name is in both."""
    both = sorted((stateful or {}).keys() & (rank_stateful or {}).keys())
    if both:
        raise ValueError(f"{', '.join(both)} can't be both in stateful and in rank_stateful: one would be lost")


def _read(
    directory: CheckpointDirectory,
    path: str,
    expected: _Candidate | None,
    take: Callable[[Loaded], dict[str, Any]],
    *,
    weights_only: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a checkpoint's file, and take from it while it is open; the checkpoint, and what was taken.

    One that the registry named must be what it says, and is not looked for by a link.
    """
    with directory.open_to_load(path, follow_links=expected is None) as reader:
        loaded = load_to_restore(reader, path, weights_only=weights_only)
        if expected is not None:
            expected.check(read_description(loaded.metadata, reader.num_bytes))
        if not isinstance(loaded.state, dict) or "model_state_dict" not in loaded.state:
            raise CheckpointError(f"{path} is whole, but not a training checkpoint: it has no model_state_dict")
        return loaded.state, take(loaded)
