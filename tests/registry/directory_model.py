"""A model of a checkpoint directory: the states that it passes through, one for each durable step of the protocol.

A crash leaves the directory in one of these states, so a test that sees another one has found a step out of order.
`look` says in the same terms what really is there. Retention is `KeepLast(num_kept)` and the best by `val_loss`, "min".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import asyncckpt
from asyncckpt.naming import BEST_NAME, REGISTRY_NAME, is_checkpoint_name, numbered_name
from asyncckpt.records import CheckpointInfo

# "flipped": a bit of a tensor is wrong. "torn": not even what the file says of itself can be read.
Health = Literal["whole", "flipped", "torn"]


@dataclass(frozen=True)
class Entry:
    """A checkpoint; `number` is what its tensors are filled with."""

    sequence: int
    name: str
    loss: float | None
    number: int
    protected: bool = False
    damaged: bool = False  # found so by a load, and recorded since


@dataclass(frozen=True)
class File:
    """A checkpoint's bytes."""

    entry: Entry
    health: Health = "whole"

    @property
    def says(self) -> tuple[Health, int | None]:
        """What can be seen of it from outside."""
        return self.health, None if self.health == "torn" else self.entry.sequence


@dataclass(frozen=True)
class Index:
    """What the registry says; `dropped` are files still to be deleted, `best` the sequence number of the best."""

    entries: tuple[Entry, ...] = ()
    dropped: tuple[Entry, ...] = ()
    last_sequence: int = 0
    best: int | None = None


@dataclass(frozen=True)
class Disk:
    """What is in the directory. `index` is None while there is no registry, or only a damaged one."""

    files: Mapping[str, File] = field(default_factory=dict)
    link: File | None = None
    index: Index | None = None
    has_damaged_index: bool = False

    def having(self, name: str, file: File) -> Disk:
        return replace(self, files={**self.files, name: file})

    def without(self, name: str) -> Disk:
        return replace(self, files={other: file for other, file in self.files.items() if other != name})

    def recording(self, index: Index) -> Disk:
        return replace(self, index=index, has_damaged_index=False)

    # --- what a reader finds ---

    def listed(self) -> list[Entry]:
        if self.index is None:
            found = [replace(file.entry, protected=True) for file in self.files.values() if file.health != "torn"]
            if self.linked is not None and self.linked not in [entry.sequence for entry in found]:
                assert self.link is not None
                if self.link.entry.name not in self.files:
                    found.append(replace(self.link.entry, protected=True))
            return in_order(found)
        return in_order([*(entry for entry in self.index.entries if self.holder(entry)), *self.unrecorded()])

    def unrecorded(self) -> list[Entry]:
        """Files that were committed, and are not in the registry."""
        assert self.index is not None
        names = [entry.name for entry in self.index.entries]
        files = [file for name, file in self.files.items() if name not in names and file.health != "torn"]
        return [file.entry for file in files if file.entry.sequence > self.index.last_sequence]

    def holder(self, entry: Entry) -> File | None:
        """The file with a checkpoint's bytes: its own, or the best link."""
        if entry.name in self.files:
            return self.files[entry.name]
        return self.link if self.linked == entry.sequence else None

    @property
    def linked(self) -> int | None:
        return None if self.link is None else self.link.says[1]

    def is_whole(self, entry: Entry) -> bool:
        file = self.holder(entry)
        return file is not None and file.health == "whole"

    @property
    def is_lost(self) -> bool:
        """There were checkpoints, and nothing of them is left to list."""
        if self.index is None:
            files = [*self.files.values(), *([self.link] if self.link else [])]
            return not self.listed() and (self.has_damaged_index or any(file.health == "torn" for file in files))
        return not self.listed() and bool(self.index.entries)

    def newest_valid(self) -> File | None:
        return next((self.holder(entry) for entry in reversed(self.listed()) if self.is_whole(entry)), None)

    def best_valid(self) -> File | None:
        best = best_of(self.listed())
        holders = [] if best is None else [self.holder(best), self.link if self.linked == best.sequence else None]
        return next((file for file in holders if file and file.health == "whole"), None)

    def shape(self) -> dict[str, Any]:
        """What can be seen from outside; compare with `look`."""
        return {
            "files": {name: file.says for name, file in self.files.items()},
            "link": self.link and self.link.says,
            "registry": "damaged" if self.has_damaged_index else self.index and _shape_of(self.index),
        }


@dataclass(frozen=True)
class Writer:
    """A directory that is open for writing: the writer's own view, which may be ahead of the disk's.

    `damaged` are those which it has tried to load.
    """

    index: Index
    linked: int | None
    strangers: frozenset[str] = frozenset()
    damaged: frozenset[int] = frozenset()

    def whole(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those that may be whole, for all it knows."""
        return [entry for entry in self.marked(entries) if not entry.damaged]

    def marked(self, entries: Iterable[Entry]) -> list[Entry]:
        """With what it knows of damage."""
        return [replace(entry, damaged=entry.damaged or entry.sequence in self.damaged) for entry in in_order(entries)]

    def retained(self, entries: Iterable[Entry], kept: Iterable[Entry]) -> list[Entry]:
        """What a policy keeps, the newest, the best and the protected ones; damaged ones that are newer than these."""
        whole = self.whole(entries)
        always = [*whole[-1:], best_of(whole), *(entry for entry in whole if entry.protected)]
        sequences = {entry.sequence for entry in (*kept, *always) if entry is not None}
        oldest = min(sequences, default=0)
        return [
            entry
            for entry in self.marked(entries)
            if entry.sequence in sequences or (entry.damaged and entry.sequence > oldest)
        ]

    def next_entry(self, disk: Disk, name: str, loss: float | None, number: int) -> Entry:
        """Under a name that no file has which this writer does not list: a damaged one that it left alone, say."""
        ours = {entry.name for entry in (*self.index.entries, *self.index.dropped)}
        taken = self.strangers | (frozenset(disk.files) - ours)
        free, suffix = name, 2
        while free in taken:
            free, suffix = numbered_name(name, suffix), suffix + 1
        return Entry(self.index.last_sequence + 1, free, loss, number)


def opened(disk: Disk) -> tuple[list[Disk], Writer]:
    """The states while the directory is opened for writing, the first one as it is found."""
    states = [disk]
    trusted, doubtful = _surveyed(disk)
    kept = list(trusted)
    for entry in doubtful:  # taken in only if whole
        holder = disk.holder(entry)
        assert holder is not None
        if holder.health == "whole":
            kept.append(entry)
            if entry.name not in states[-1].files:
                states.append(states[-1].having(entry.name, holder))
    recorded = disk.index or Index()
    last_sequence = max([recorded.last_sequence, *(entry.sequence for entry in (*trusted, *doubtful))])

    deletable = [entry for entry in recorded.dropped if _is_deletable(disk, entry)]
    dropped: list[Entry] = []
    if deletable:
        needed = [entry for entry in [*in_order(kept)[-1:], best_of(kept)] if entry is not None]
        if needed and all(states[-1].files[entry.name].health == "whole" for entry in needed):
            states += _deleted(states[-1], deletable)
        else:
            rescued = [entry for entry in deletable if disk.files[entry.name].health == "whole"]
            kept += [replace(entry, protected=True, damaged=False) for entry in rescued]
            dropped = [entry for entry in deletable if entry not in rescued]

    kept = [replace(entry, damaged=entry.damaged and not states[-1].is_whole(entry)) for entry in kept]
    index = _index(kept, dropped, last_sequence, best_of(kept))
    if index.entries != recorded.entries or disk.has_damaged_index:
        states.append(states[-1].recording(index))
    linked_states, linked = _linked(states[-1], best_of(kept), disk.linked)
    listed_names = {entry.name for entry in (*trusted, *doubtful, *deletable)}
    return states + linked_states, Writer(index, linked, frozenset(disk.files) - listed_names)


def saved(disk: Disk, writer: Writer, entry: Entry, num_kept: int) -> tuple[list[Disk], int, Writer]:
    """The states after the commit and each later step of a save, which of them may first be acknowledged, and the
    writer's view then."""
    committed = disk.having(entry.name, File(entry))
    entries = [*(other for other in writer.index.entries if other.name != entry.name), entry]
    kept = writer.retained(entries, writer.whole(entries)[-num_kept:])
    return _recorded(committed, writer, entries, kept, first=[committed])


def pruned(disk: Disk, writer: Writer, kept: Iterable[Entry]) -> tuple[list[Disk], int, Writer]:
    """The same for pruning down to `kept`, the newest and the best."""
    bare = [replace(entry, protected=False) for entry in writer.index.entries]
    return _recorded(disk, writer, bare, writer.retained(bare, kept), first=[])


def _recorded(
    disk: Disk, writer: Writer, entries: Sequence[Entry], kept: Sequence[Entry], *, first: list[Disk]
) -> tuple[list[Disk], int, Writer]:
    names = {entry.name for entry in kept}
    dropped = [entry for entry in (*writer.index.dropped, *entries) if entry.name not in names]
    last_sequence = max([writer.index.last_sequence, *(entry.sequence for entry in entries)])
    best = best_of(writer.whole(kept))
    index = _index(kept, dropped, last_sequence, best)
    states = [*first, disk.recording(index)]
    while best is not None and best.sequence != writer.linked and best.name not in states[-1].files:
        kept = [entry for entry in kept if entry != best]  # somebody has deleted it
        best = best_of(writer.whole(kept))
        index = _index(kept, dropped, last_sequence, best)
        states.append(states[-1].recording(index))
    linked_states, linked = _linked(states[-1], best, writer.linked)
    states += linked_states
    acknowledged = len(states) - 1
    states += _deleted(states[-1], dropped)
    return states, acknowledged, replace(writer, index=replace(index, dropped=()), linked=linked)


def best_of(entries: Iterable[Entry]) -> Entry | None:
    """The lowest loss, of equals the earliest; NaN and no loss at all never are the best."""
    whole = [entry for entry in in_order(entries) if not entry.damaged]
    comparable = [entry for entry in whole if entry.loss is not None and not math.isnan(entry.loss)]
    return min(comparable, key=lambda entry: entry.loss, default=None)  # type: ignore[arg-type,return-value]


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.sequence)


def _surveyed(disk: Disk) -> tuple[list[Entry], list[Entry]]:
    """What the registry names and has a file, and what was found beyond that."""
    if disk.index is None:
        return [], disk.listed()
    trusted: list[Entry] = []
    doubtful: list[Entry] = []
    for entry in disk.index.entries:
        file = disk.files.get(entry.name)
        if file is None:
            doubtful += [entry] * (disk.linked == entry.sequence)
        elif file.health != "torn" and file.entry.sequence > entry.sequence:
            doubtful.append(file.entry)  # the name was committed again
        else:
            trusted.append(entry)
    return trusted, [*doubtful, *disk.unrecorded()]


def _is_deletable(disk: Disk, entry: Entry) -> bool:
    file = disk.files.get(entry.name)
    return file is not None and file.says[1] == entry.sequence


def _deleted(disk: Disk, entries: Iterable[Entry]) -> list[Disk]:
    states = [disk]
    for entry in entries:
        states.append(states[-1].without(entry.name))
    return states[1:]


def _index(entries: Iterable[Entry], dropped: Iterable[Entry], last_sequence: int, best: Entry | None) -> Index:
    return Index(tuple(in_order(entries)), tuple(dropped), last_sequence, best.sequence if best else None)


def _linked(disk: Disk, best: Entry | None, linked: int | None) -> tuple[list[Disk], int | None]:
    if best is None or best.sequence == linked:
        return [], linked
    return [replace(disk, link=disk.files[best.name])], best.sequence


# --- what is there ---


def look(directory: Path) -> dict[str, Any]:
    """The real directory, in the terms of `Disk.shape`. Temporary files, the lock and registries set aside are left
    out."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return {
        "files": {name: _look_at(directory / name) for name in names if is_checkpoint_name(name)},
        "link": _look_at(directory / BEST_NAME) if BEST_NAME in names else None,
        "registry": _read_registry(directory / REGISTRY_NAME) if REGISTRY_NAME in names else None,
    }


def entry_of(path: Path, info: CheckpointInfo | None = None) -> Entry:
    """A whole checkpoint file's entry, by what the file says of itself."""
    metadata = _metadata(asyncckpt.verify(path))
    loaded = asyncckpt.load(path)
    return Entry(metadata["sequence"], path.name, loaded["val_loss"], loaded["extra_state"]["number"])


def _look_at(path: Path) -> tuple[Health, int | None]:
    report = asyncckpt.verify(path)
    if report.metadata is None:
        return "torn", None
    return "whole" if report.ok else "flipped", _metadata(report)["sequence"]


def _metadata(report: asyncckpt.VerifyReport) -> Any:
    assert report.metadata is not None
    return report.metadata["metadata"]


def _read_registry(path: Path) -> dict[str, Any] | str:
    try:
        document = json.loads(path.read_bytes())
    except ValueError:
        return "damaged"
    best = [entry["sequence"] for entry in document["checkpoints"] if entry["is_best"]]
    assert len(best) <= 1
    return {
        "entries": [
            (entry["sequence"], entry["filepath"], entry["protected"], entry["damaged"])
            for entry in document["checkpoints"]
        ],
        "best": best[0] if best else None,
        "dropped": sorted((drop["sequence"], drop["name"]) for drop in document["pending_deletes"]),
        "last_sequence": document["last_sequence"],
    }


def _shape_of(index: Index) -> dict[str, Any]:
    return {
        "entries": [(entry.sequence, entry.name, entry.protected, entry.damaged) for entry in index.entries],
        "best": index.best,
        "dropped": sorted((entry.sequence, entry.name) for entry in index.dropped),
        "last_sequence": index.last_sequence,
    }
