"""Resuming: which file to load, the same on every rank, and into what."""

from __future__ import annotations

import errno
import logging
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch

from asyncckpt.distributed.ranks import OtherRankError, Ranks
from asyncckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.image.file import file_path, read_anew
from asyncckpt.image.load import Loaded, load_to_restore
from asyncckpt.naming import BEST_NAME
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.files import Report
from asyncckpt.registry.recovery import Survey, file_of
from asyncckpt.registry.registry import FileDescription, Registry, read_description
from asyncckpt.state.restore import restore_checkpoint, taken_apart
from asyncckpt.threads import log_quietly

_NUM_LOOKS = 10  # at a directory that another process prunes meanwhile
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
    """Loads from one directory, or from several places of one run. Every method is collective, blocks, and restores on
    all ranks or on none.

    `seen` is what each place held when it was looked at last, by its number; only on the first rank.
    """

    def __init__(self, tiers: Sequence[CheckpointDirectory], emit: Report, *, weights_only: bool) -> None:
        self._tiers = tiers
        self._directory = tiers[0]
        self._emit = emit
        self._weights_only = weights_only
        self.seen: dict[int, Registry] = {}

    def latest(self, target: Target) -> dict[str, Any] | None:
        """Restore the newest checkpoint that every rank can read, and return it; None if there is none at all."""
        return self._restore_first(self._newest_first, target, "checkpoint")

    def best(self, target: Target) -> dict[str, Any] | None:
        """Restore the best checkpoint, and return it; None if there is none."""
        return self._restore_first(self._best_first, target, "best checkpoint")

    def one(self, checkpoint: SupportsIndex | str | os.PathLike[str], target: Target) -> dict[str, Any]:
        """Restore the newest checkpoint of a step, or the file at a path, and return it."""
        candidates = Ranks().on_first(lambda: self._find(checkpoint))
        for candidate in candidates[:-1]:
            try:
                return self._restore(candidate, target)
            except _Unreadable as error:
                self._report_fallback(candidate.path, error, is_last=False)
        try:
            return self._restore(candidates[-1], target)
        except _Unreadable as error:
            raise error.met from error.met.__cause__

    def _find(self, checkpoint: SupportsIndex | str | os.PathLike[str]) -> list[_Candidate]:
        """Its file; of a step's newest checkpoint that in each place."""
        if isinstance(checkpoint, SupportsIndex):
            step = operator.index(checkpoint)
            candidates = self._newest_first(self._surveys())
            of_step = [candidate for candidate in candidates if candidate.info and candidate.info.global_step == step]
            if of_step:
                return [candidate for candidate in of_step if candidate.sequence == of_step[0].sequence]
            steps = [str(candidate.info and candidate.info.global_step) for candidate in reversed(candidates)]
            known = ", ".join(dict.fromkeys(steps)) or "none"
            raise CheckpointNotFoundError(f"{self._directory.path} has no checkpoint of step {step}; it has {known}")
        name = os.fspath(checkpoint)
        if os.path.basename(name) == name:
            for tier, directory in enumerate(self._tiers):
                if directory.has_file(name):
                    return [_Candidate(directory.path_of(name), tier)]
        return [_Candidate(file_path(checkpoint), 0)]

    def _restore_first(
        self, choose: Callable[[list[_Found]], list[_Candidate]], target: Target, what: str
    ) -> dict[str, Any] | None:
        """The first of the chosen files that every rank can read."""
        ranks = Ranks()
        error: Exception | None = None
        for look in range(_NUM_LOOKS):
            candidates = ranks.on_first(lambda: choose(self._surveys()))
            if not candidates:
                log_quietly(logging.INFO, f"{self._directory.path} has no {what} to resume from")
                return None
            for candidate in candidates:
                try:
                    return self._restore(candidate, target)
                except _Unreadable as unreadable:
                    error = unreadable.met
                    is_last_look = look == _NUM_LOOKS - 1
                    if not is_last_look and ranks.on_first(lambda: choose(self._surveys())) != candidates:
                        break  # another process has changed the directory meanwhile
                    if candidate.info is not None:
                        self._tiers[candidate.tier].note_damaged(candidate.info)
                    self._report_fallback(candidate.path, unreadable, is_last=candidate is candidates[-1])
            else:
                break
        raise CorruptCheckpointError(
            f"no {what} in {self._directory.path} can be read; the last error: {error}"
        ) from error

    def _surveys(self) -> list[_Found]:
        """What there is to choose from, place by place. Raises `CorruptCheckpointError` if all that there was is lost.

        A place that can't be looked at is left out, as long as another one has something.
        """
        surveys: list[_Found] = []
        problems: list[Exception] = []
        for tier, directory in enumerate(self._tiers):
            try:
                surveys.append((tier, found := _look(directory)))
                self.seen[tier] = found.registry
            except (OSError, CheckpointError) as error:
                if tier > 0:
                    log_quietly(logging.WARNING, f"{directory.path} can't be looked at: {error}")
                problems.append(error)
        run_ids = [found.registry.run_id for _, found in surveys if found.registry.checkpoints]
        if not run_ids and problems:
            raise problems[0]
        of_other_runs = [
            tier for tier, found in surveys if found.registry.checkpoints and found.registry.run_id != run_ids[0]
        ]
        for tier in of_other_runs:
            log_quietly(logging.WARNING, f"{self._tiers[tier].path} holds another run's checkpoints: left alone")
        return [(tier, found) for tier, found in surveys if tier not in of_other_runs]

    def _newest_first(self, surveys: list[_Found]) -> list[_Candidate]:
        """Of the same checkpoint in several places the nearest first."""
        candidates = [
            self._candidate(tier, found, info) for tier, found in surveys for info in found.registry.checkpoints
        ]
        return sorted(candidates, key=lambda candidate: (-candidate.sequence, candidate.tier))

    def _best_first(self, surveys: list[_Found]) -> list[_Candidate]:
        """The best one's file; then its link, which may be a copy, and whole."""
        bests = [best for _, found in surveys if (best := found.registry.best) is not None]
        if not bests:
            return []
        registry = surveys[0][1].registry
        best = registry.with_checkpoints({info.sequence: info for info in reversed(bests)}.values()).best
        candidates: list[_Candidate] = []
        for tier, found in surveys:
            if best is None or best.sequence not in [info.sequence for info in found.registry.checkpoints]:
                continue
            candidate = self._candidate(tier, found, best)
            link = replace(candidate, path=self._tiers[tier].path_of(BEST_NAME))
            candidates += [candidate, link] if found.linked_best == best.sequence and link != candidate else [candidate]
        return candidates

    def _candidate(self, tier: int, found: Survey, info: CheckpointInfo) -> _Candidate:
        path = self._tiers[tier].path_of(str(file_of(found, info)))
        return _Candidate(path, tier, found.registry.run_id, info)

    def _report_fallback(self, path: str, error: Exception, *, is_last: bool) -> None:
        log_quietly(logging.WARNING, f"{error}" if is_last else f"{error}; trying the next one")
        self._emit("fallback", path, str(error))

    def _restore(self, candidate: _Candidate, target: Target) -> dict[str, Any]:
        """Read one file on every rank, and restore it if all could; else nobody does."""
        ranks = Ranks()
        directory = self._tiers[candidate.tier]
        weights_only = self._weights_only if target.weights_only is None else target.weights_only
        try:
            checkpoint, taken = ranks.on_all(
                lambda: _read(
                    directory, candidate, lambda loaded: target.take(loaded, ranks), weights_only=weights_only
                )
            )
        except Exception as error:
            if _is_unreadable(error):
                raise _Unreadable(error) from error
            raise
        ranks.on_all(lambda: target.restore(taken, ranks))
        return checkpoint


_Found = tuple[int, Survey]  # which tier, and what it holds


def _look(directory: CheckpointDirectory) -> Survey:
    """What a directory holds. Raises `CorruptCheckpointError` if it is nothing, and was something."""
    directory.await_finishing()
    found = directory.read()
    if found.lost:
        raise CorruptCheckpointError(
            f"{directory.path} had checkpoints, and none of them can be read: {', '.join(found.lost[:5])}; "
            "bring them back, or, to start anew, use another directory or move these files and registry.json away"
        )
    if not found.registry.checkpoints and found.strangers:
        log_quietly(
            logging.WARNING,
            f"{directory.path} holds {len(found.strangers)} .pt files that are not this run's, "
            f"{found.strangers[0]} for one: they are left alone",
        )
    return found


@dataclass(frozen=True)
class _Candidate:
    """A file to load; and, if a registry named it and not the user, which checkpoint of which run it should hold."""

    path: str
    tier: int
    run_id: str = ""
    info: CheckpointInfo | None = None

    @property
    def sequence(self) -> int:
        return (self.info.sequence or 0) if self.info is not None else 0

    def check(self, description: FileDescription | None) -> None:
        """Raise unless it is that one, or a later one that took its name meanwhile."""
        if self.info is None:
            return
        is_ours = description is not None and description.run_id == self.run_id
        if description is None or not is_ours or (description.info.sequence or 0) < self.sequence:
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
    candidate: _Candidate,
    take: Callable[[Loaded], dict[str, Any]],
    *,
    weights_only: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a checkpoint's file, and take from it while it is open; the checkpoint, and what was taken.

    One that the registry named must be what it says, and is not looked for by a link.
    """
    path = candidate.path

    def read() -> tuple[dict[str, Any], dict[str, Any]]:
        with directory.open_to_load(path, follow_links=candidate.info is None) as reader:
            loaded = load_to_restore(reader, path, weights_only=weights_only)
            candidate.check(read_description(loaded.metadata, reader.num_bytes))
            if not isinstance(loaded.state, dict) or "model_state_dict" not in loaded.state:
                raise CheckpointError(f"{path} is whole, but not a training checkpoint: it has no model_state_dict")
            return loaded.state, take(loaded)

    return read_anew(path, read)
