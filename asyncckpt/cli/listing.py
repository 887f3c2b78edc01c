"""`asyncckpt list`: what a directory holds. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.table import Table

from asyncckpt.cli.output import clean, format_age, format_bytes, format_count, format_number, make_table
from asyncckpt.naming import BEST_NAME, REGISTRY_NAME
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.mirror_note import MirrorNote, read_note
from asyncckpt.registry.recovery import survey
from asyncckpt.storage.base import Storage

_MAX_METRICS = 30  # columns; the registry may name any number


@dataclass(frozen=True)
class ListedMirror:
    """A directory's mirror, as the last run that copied there has left word: since when it has been so."""

    place: str
    lacks: int
    problem: str
    since: str


@dataclass(frozen=True)
class Listed:
    """A directory's checkpoints in the order of their commits, and what else there is to say. Names are relative."""

    directory: str
    monitor_metric: str
    monitor_mode: str
    total_bytes: int
    checkpoints: Sequence[CheckpointInfo]
    has_registry: bool
    registry_damage: str
    not_recorded: Sequence[Path]
    gone: Sequence[Path]
    restorable: Sequence[Path]
    to_be_deleted: Sequence[str]
    damaged: Sequence[str]
    not_of_this_run: Sequence[str]
    mirror: ListedMirror | None


def gather(storage: Storage, directory: str) -> Listed:
    """Look at the directory; changes nothing. Raises as `survey` does."""
    found = survey(storage, directory)
    checkpoints = found.registry.checkpoints
    return Listed(
        directory=directory,
        monitor_metric=found.registry.monitor_metric,
        monitor_mode=found.registry.monitor_mode,
        total_bytes=sum(info.num_bytes for info in checkpoints),
        checkpoints=checkpoints,
        has_registry=found.recorded is not None,
        registry_damage=found.damage,
        not_recorded=[info.filepath for info in found.unrecorded],
        gone=[info.filepath for info in found.gone],
        restorable=[info.filepath for info in found.restorable],
        to_be_deleted=[drop.name for drop in found.deletable],
        damaged=found.torn,
        not_of_this_run=[name for name in found.strangers if name not in found.torn],
        mirror=_mirror(read_note(storage, directory), checkpoints),
    )


def _mirror(note: MirrorNote | None, checkpoints: Sequence[CheckpointInfo]) -> ListedMirror | None:
    if note is None:
        return None
    lacks = sum(note.standing.awaits(info.sequence) and not info.damaged for info in checkpoints)
    return ListedMirror(note.mirror, lacks, note.problem, note.since)


def draw(listed: Listed, console: Console) -> None:
    """The newest at the bottom, next to the prompt."""
    if listed.checkpoints:
        console.print(_table(listed.checkpoints))
        console.print()
        total = f"{format_count(len(listed.checkpoints), 'checkpoint')}, {format_bytes(listed.total_bytes)}"
        console.print(f"{total}; ★ best by {clean(listed.monitor_metric)} ({listed.monitor_mode})")
    else:
        console.print(f"There are no checkpoints in {clean(listed.directory)}.")
    if any(info.protected for info in listed.checkpoints):
        console.print("protected: found without a registry; kept until the next prune")
    if (mirror := listed.mirror) is not None:
        console.print(_describe_mirror(mirror), style="yellow" if mirror.lacks or mirror.problem else "")
    for line in _notes(listed):
        console.print(line, style="yellow")


def _table(checkpoints: Sequence[CheckpointInfo]) -> Table:
    metrics = sorted({name for info in checkpoints for name in info.val_metrics} - {"val_loss"})[:_MAX_METRICS]
    numbers = ("step", "epoch", "train loss", "val loss", *metrics, "size", "age")
    is_marked = any(info.protected or info.pinned for info in checkpoints)
    table = make_table("", *numbers, "file", *([""] if is_marked else []), right=numbers)
    now = datetime.now(timezone.utc)
    for info in checkpoints:
        table.add_row(
            "★" if info.is_best else "",
            str(info.global_step),
            str(info.epoch),
            format_number(info.train_loss),
            format_number(info.val_loss),
            *(format_number(info.val_metrics.get(name)) for name in metrics),
            format_bytes(info.num_bytes),
            format_age(info.timestamp, now),
            clean(info.filepath),
            *([_mark(info)] if is_marked else []),
            style="bold" if info.is_best else "",
        )
    return table


def _describe_mirror(mirror: ListedMirror) -> str:
    text = f"lacks {format_count(mirror.lacks, 'checkpoint')}" if mirror.lacks else "has all"
    problem = f": {clean(mirror.problem)}, since {clean(mirror.since)}" if mirror.problem else ""
    return f"mirror {clean(mirror.place)}: {text}{problem}"


def _mark(info: CheckpointInfo) -> str:
    return ", ".join(["pinned"] * info.pinned + ["protected"] * info.protected)


def _notes(listed: Listed) -> list[str]:
    notes: list[tuple[Sequence[object], str]] = [
        (listed.gone, "recorded, but its file is gone"),
        (listed.restorable, f"its file is gone, but {BEST_NAME} still holds it; `asyncckpt repair` brings it back"),
        (listed.to_be_deleted, "dropped by retention, not deleted yet"),
        (listed.damaged, "damaged, so that it can't say what it is"),
        (listed.not_of_this_run, "not of this run; never touched"),
    ]
    first = []
    if listed.registry_damage:
        first = [f"{REGISTRY_NAME}: damaged, so the files are listed instead: {clean(listed.registry_damage)}"]
    elif not listed.has_registry and listed.checkpoints:
        first = [f"{REGISTRY_NAME}: missing, so the files are listed instead; `asyncckpt repair` rebuilds it"]
    elif listed.has_registry:
        notes.insert(0, (listed.not_recorded, "not recorded yet; the next writer or `asyncckpt repair` takes it in"))
    return first + [f"{clean(name)}: {note}" for names, note in notes for name in names]
