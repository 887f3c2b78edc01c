"""The registry: which checkpoints a directory holds, as a value. Pure; no I/O, no torch.

`registry.json` has the keys `checkpoints`, `best_score` and `best_checkpoint_path`, and what recovery needs besides. It
is an index: every file describes itself, so that a lost registry is rebuilt from the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from asyncckpt.errors import RegistryError
from asyncckpt.naming import BEST_NAME, is_checkpoint_name
from asyncckpt.records import CheckpointInfo, is_better

VERSION = 1
MAX_REGISTRY_BYTES = 32 << 20  # some 60,000 checkpoints

# JSON has no NaN and no infinities: they are written as these strings.
_Number = float | Literal["NaN", "Infinity", "-Infinity"]
_Natural = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
_Sequence = Annotated[int, msgspec.Meta(ge=1, lt=2**62)]
_RunId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
_Mode = Literal["min", "max"]
_NOTHING = msgspec.Raw()


class PendingDelete(NamedTuple):
    """A file that retention dropped: it may be deleted once the registry that says so is durable.

    The name alone would not do: the same name may have been committed again since.
    """

    name: str
    sequence: int


@dataclass(frozen=True)
class Registry:
    """The checkpoints of one run, in order of their commits, with names relative to the directory.

    `claim` is its writer's, on storage where one can be taken for dead who is not. In a mirror `followed_pins` are the
    sequence numbers that are pinned there because they are pinned in the directory that it follows.
    """

    run_id: str
    monitor_metric: str
    monitor_mode: str
    checkpoints: tuple[CheckpointInfo, ...] = ()
    pending_deletes: tuple[PendingDelete, ...] = ()
    last_sequence: int = 0
    claim: str = ""
    followed_pins: frozenset[int] = frozenset()

    @property
    def latest(self) -> CheckpointInfo | None:
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def best(self) -> CheckpointInfo | None:
        return next((info for info in self.checkpoints if info.is_best), None)

    @property
    def best_score(self) -> float | None:
        return self.best.metric(self.monitor_metric) if self.best else None

    def monitoring(self, metric: str, mode: str) -> Registry:
        """The same checkpoints, the best one by this metric."""
        return replace(self, monitor_metric=metric, monitor_mode=mode).with_checkpoints(self.checkpoints)

    def with_checkpoints(self, checkpoints: Iterable[CheckpointInfo]) -> Registry:
        """These checkpoints in place of the present ones: put in order, and the best one marked."""
        ordered = sorted(checkpoints, key=_sequence)
        best: CheckpointInfo | None = None
        for info in ordered:
            best_score = None if best is None else best.metric(self.monitor_metric)
            if not info.damaged and is_better(info.metric(self.monitor_metric), best_score, self.monitor_mode):
                best = info
        marked = tuple(
            info if info.is_best == (info is best) else replace(info, is_best=info is best) for info in ordered
        )
        names = {str(info.filepath) for info in marked}
        return replace(
            self,
            checkpoints=marked,
            pending_deletes=tuple(pending for pending in self.pending_deletes if pending.name not in names),
            last_sequence=max([self.last_sequence, *map(_sequence, marked)]),
        )

    def with_checkpoint(self, info: CheckpointInfo) -> Registry:
        """One more; it takes the place of one with the same name, and its pin."""
        others = [other for other in self.checkpoints if other.filepath != info.filepath]
        is_pinned = info.pinned or any(other.pinned for other in self.checkpoints if other.filepath == info.filepath)
        return self.with_checkpoints([*others, replace(info, pinned=is_pinned)])

    def keeping(self, sequences: Iterable[int]) -> Registry:
        """Without the checkpoints whose sequence numbers are not named, whose files are to be deleted."""
        kept = set(sequences)
        dropped = [info for info in self.checkpoints if info.sequence not in kept]
        pending = tuple(PendingDelete(str(info.filepath), _sequence(info)) for info in dropped)
        return replace(self, pending_deletes=(*self.pending_deletes, *pending)).with_checkpoints(
            info for info in self.checkpoints if info.sequence in kept
        )

    def with_damaged(self, sequences: Iterable[int]) -> Registry:
        """With these known to be damaged: none of them is the best."""
        known = set(sequences)
        return self.with_checkpoints(
            replace(info, damaged=True) if info.sequence in known else info for info in self.checkpoints
        )

    def with_pin(self, info: CheckpointInfo, *, is_pinned: bool) -> Registry:
        """With this one pinned, or not."""
        return self.with_checkpoints(
            replace(other, pinned=is_pinned) if other.sequence == info.sequence else other for other in self.checkpoints
        )

    def following_pins(self, infos: Iterable[CheckpointInfo], unpinned: Collection[int]) -> Registry:
        """With what another directory of the run pins pinned; unpinned what followed it, and is listed there without a
        pin, or is among those `unpinned`.

        Pins of its own stay. So do followed ones that the other directory does not list, or lists as found without a
        registry: it has lost them, and nobody has unpinned them. One whose name was saved again there loses its pin.
        """
        infos = list(infos)
        pinned = {_sequence(info) for info in infos if info.pinned}
        left = {_sequence(info) for info in infos if not info.pinned and not info.protected} | set(unpinned) - pinned
        latest = {info.filepath: _sequence(info) for info in infos}
        left |= {_sequence(info) for info in self.checkpoints if latest.get(info.filepath, 0) > _sequence(info)}
        there = {_sequence(info) for info in self.checkpoints}
        changed = {**dict.fromkeys(self.followed_pins & left, False), **dict.fromkeys(pinned, True)}
        return replace(
            self.with_checkpoints(
                replace(info, pinned=changed.get(_sequence(info), info.pinned)) for info in self.checkpoints
            ),
            followed_pins=frozenset(pinned | (self.followed_pins & there - left)),
        )

    def deleted(self, pending: Iterable[PendingDelete]) -> Registry:
        """These files are gone, durably."""
        gone = set(pending)
        return replace(self, pending_deletes=tuple(left for left in self.pending_deletes if left not in gone))


def _sequence(info: CheckpointInfo) -> int:
    assert info.sequence is not None
    return info.sequence


# --- registry.json ---


class _Entry(msgspec.Struct, kw_only=True):
    filepath: str
    epoch: int
    global_step: int
    val_loss: _Number | None
    val_metrics: dict[str, _Number]
    timestamp: str
    is_best: bool
    sequence: _Sequence
    num_bytes: _Natural
    train_loss: _Number | None = None
    protected: bool = False
    damaged: bool = False
    pinned: bool = False


class _PendingEntry(msgspec.Struct):
    name: str
    sequence: _Sequence


class _Document(msgspec.Struct, kw_only=True):
    version: int = VERSION
    run_id: _RunId
    monitor_metric: str
    monitor_mode: _Mode
    last_sequence: _Natural
    best_score: _Number | None
    best_checkpoint_path: str | None
    checkpoints: list[_Entry]
    pending_deletes: list[_PendingEntry]
    claim: str | msgspec.UnsetType = msgspec.UNSET
    followed_pins: list[_Sequence] | msgspec.UnsetType = msgspec.UNSET


class _Head(msgspec.Struct):
    """What tells whose registry it is; left unparsed, since anything may be there."""

    version: msgspec.Raw = _NOTHING
    run_id: msgspec.Raw = _NOTHING
    checkpoints: msgspec.Raw = _NOTHING


class DamagedRegistryError(ValueError):
    """The registry's text is not one; it is to be rebuilt from the files. Never leaves the package."""


def encode_registry(registry: Registry) -> bytes:
    """The contents of `registry.json`: strict JSON, for people too."""
    best = registry.best
    document = _Document(
        run_id=registry.run_id,
        monitor_metric=registry.monitor_metric,
        monitor_mode="min" if registry.monitor_mode == "min" else "max",
        last_sequence=registry.last_sequence,
        best_score=_from_float(registry.best_score),
        best_checkpoint_path=BEST_NAME if best else None,
        checkpoints=[_to_entry(info) for info in registry.checkpoints],
        pending_deletes=[_PendingEntry(*pending) for pending in registry.pending_deletes],
        claim=registry.claim or msgspec.UNSET,
        followed_pins=sorted(registry.followed_pins) or msgspec.UNSET,
    )
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def decode_registry(text: bytes) -> Registry:
    """Parse and validate; which one is the best is worked out anew.

    Raises `RegistryError` for a registry of somebody else, or of a later version, and `DamagedRegistryError` for what
    makes no sense.
    """
    try:
        _check_version(msgspec.json.decode(text, type=_Head))
        document = msgspec.json.decode(text, type=_Document)
        return _to_registry(document)
    except RegistryError:
        raise
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise DamagedRegistryError(str(error)) from error


def _check_version(head: _Head) -> None:
    version, run_id, checkpoints = (bytes(raw).strip() for raw in (head.version, head.run_id, head.checkpoints))
    if version in (b"", b"null") and not run_id and checkpoints.startswith(b"["):
        raise RegistryError("it was not written by asyncckpt; use another directory, or move it away")
    if re.fullmatch(rb"[0-9]{1,9}", version) and int(version) > VERSION:
        raise RegistryError(
            f"it has format {int(version)}, and this version knows up to {VERSION}: install a later asyncckpt"
        )


def _to_registry(document: _Document) -> Registry:
    names = [entry.filepath for entry in document.checkpoints]
    for name in [*names, *(pending.name for pending in document.pending_deletes)]:
        if not is_checkpoint_name(name):
            raise DamagedRegistryError(f"it names {name!r}, which is not a checkpoint in this directory")
    sequences = [entry.sequence for entry in document.checkpoints]
    if len(set(names)) < len(names) or len(set(sequences)) < len(sequences):
        raise DamagedRegistryError("two checkpoints have one name or one sequence number")
    registry = Registry(
        document.run_id,
        document.monitor_metric,
        document.monitor_mode,
        pending_deletes=tuple(PendingDelete(pending.name, pending.sequence) for pending in document.pending_deletes),
        last_sequence=document.last_sequence,
        claim=document.claim or "",
        followed_pins=frozenset(document.followed_pins or ()),
    )
    return registry.with_checkpoints(map(_from_entry, document.checkpoints))


def _to_entry(info: CheckpointInfo) -> _Entry:
    return _Entry(
        filepath=str(info.filepath),
        epoch=info.epoch or 0,
        global_step=info.global_step or 0,
        val_loss=_from_float(info.val_loss),
        val_metrics={name: _finite_or_name(value) for name, value in info.val_metrics.items()},
        timestamp=info.timestamp,
        is_best=info.is_best,
        sequence=_sequence(info),
        num_bytes=info.num_bytes,
        train_loss=_from_float(info.train_loss),
        protected=info.protected,
        damaged=info.damaged,
        pinned=info.pinned,
    )


def _from_entry(entry: _Entry) -> CheckpointInfo:
    return CheckpointInfo(
        filepath=Path(entry.filepath),
        epoch=entry.epoch,
        global_step=entry.global_step,
        val_loss=_to_float(entry.val_loss),
        val_metrics={name: float(value) for name, value in entry.val_metrics.items()},
        timestamp=entry.timestamp,
        is_best=entry.is_best,
        num_bytes=entry.num_bytes,
        train_loss=_to_float(entry.train_loss),
        sequence=entry.sequence,
        protected=entry.protected,
        damaged=entry.damaged,
        pinned=entry.pinned,
    )


def _finite_or_name(value: float) -> _Number:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)


def _from_float(value: float | None) -> _Number | None:
    return None if value is None else _finite_or_name(value)


def _to_float(value: _Number | None) -> float | None:
    return None if value is None else float(value)


# --- what a file says of itself ---


class _Description(msgspec.Struct, kw_only=True):
    run_id: _RunId
    sequence: _Sequence
    epoch: int
    global_step: int
    train_loss: _Number | None
    val_loss: _Number | None
    val_metrics: dict[str, _Number]
    monitor_metric: str
    monitor_mode: _Mode


@dataclass(frozen=True)
class FileDescription:
    """What a checkpoint file's own metadata says: enough to list it without a registry."""

    run_id: str
    name: str
    created: str
    monitor_metric: str
    monitor_mode: str
    info: CheckpointInfo = field(compare=False)


def describe_in_file(registry: Registry, info: CheckpointInfo) -> Mapping[str, object]:
    """The metadata that travels inside the checkpoint."""
    entry = _to_entry(info)
    description = _Description(
        run_id=registry.run_id,
        sequence=entry.sequence,
        epoch=entry.epoch,
        global_step=entry.global_step,
        train_loss=entry.train_loss,
        val_loss=entry.val_loss,
        val_metrics=entry.val_metrics,
        monitor_metric=registry.monitor_metric,
        monitor_mode="min" if registry.monitor_mode == "min" else "max",
    )
    described: Mapping[str, object] = msgspec.to_builtins(description)
    return described


def read_description(metadata: Mapping[str, object] | None, num_bytes: int) -> FileDescription | None:
    """What a file's metadata record says of a manager's checkpoint; None if it is not one."""
    try:
        outer = msgspec.convert(metadata, _FileMetadata)
        description = outer.metadata
    except msgspec.ValidationError:
        return None
    info = CheckpointInfo(
        filepath=Path(outer.name),
        epoch=description.epoch,
        global_step=description.global_step,
        val_loss=_to_float(description.val_loss),
        val_metrics={name: float(value) for name, value in description.val_metrics.items()},
        timestamp=outer.created,
        num_bytes=num_bytes,
        train_loss=_to_float(description.train_loss),
        sequence=description.sequence,
    )
    return FileDescription(
        description.run_id, outer.name, outer.created, description.monitor_metric, description.monitor_mode, info
    )


class _FileMetadata(msgspec.Struct):
    name: str
    created: str
    metadata: _Description
