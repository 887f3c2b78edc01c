"""The names of files. Pure."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

REGISTRY_NAME = "registry.json"
LOCK_NAME = ".asyncckpt.lock"
MIRROR_NOTE_NAME = "mirror.json"  # how a directory's mirror stands
JOURNALS_NAME = ".asyncckpt-uploads"  # how far uploads to a mirror are
CLAIM_NAME, ALIVE_NAME = "writer.json", "writer.alive"  # in its place, on storage without locks
WRITER_LOG_PREFIX = "asyncckpt-writer-"
BEST_NAME = "best_model.pt"
CHECKPOINT_SUFFIX = ".pt"
# What the processes call themselves (prctl PR_SET_NAME, at most 15 characters), for `ps`, and for each other: whoever
# must not end before a writer process finds it by this name.
WRITER_NAME = "asyncckpt-save"
INIT_NAME = "asyncckpt-run"

_TEMPORARY_NAME = re.compile(r"\.asyncckpt-(claimed-)?([0-9a-f]{16})-.*\.tmp", re.DOTALL)
_MAX_NAME_BYTES = 143  # NAME_MAX of eCryptfs, the least we know
_MAX_METRIC_CHARS = 40


def checkpoint_name(epoch: int, global_step: int, metrics: Mapping[str, float | None]) -> str:
    """`checkpoint_epoch0001_step00001000_loss0.4523.pt`: the epoch, the step, and the metrics that are known.

    A metric's name is cut down to letters, digits, dots and dashes (`val/loss` → `val-loss`), so that it can't name
    another directory, and the whole to what a file's name may hold.
    """
    stem = f"checkpoint_epoch{epoch:04d}_step{global_step:08d}"
    for name, value in metrics.items():
        if value is not None:
            stem += f"_{_plain(name)}{_number(value)}"
    return stem[: _MAX_NAME_BYTES - len(CHECKPOINT_SUFFIX)] + CHECKPOINT_SUFFIX


def numbered_name(name: str, number: int) -> str:
    """`name` told apart from a file that is there already: `checkpoint_….pt` → `checkpoint_…_2.pt`."""
    suffix = f"_{number}{CHECKPOINT_SUFFIX}"
    return name.removesuffix(CHECKPOINT_SUFFIX)[: _MAX_NAME_BYTES - len(suffix)] + suffix


def is_checkpoint_name(name: str) -> bool:
    """Whether a registry may name this file: a plain name in its own directory, not one with another meaning there."""
    return (
        name.endswith(CHECKPOINT_SUFFIX)
        and os.path.basename(name) == name
        and not name.startswith(".")
        and name != BEST_NAME
        and "\0" not in name
        and "\\" not in name
    )


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:_MAX_METRIC_CHARS] or "metric"


def _number(value: float) -> str:
    if math.isfinite(value) and abs(value) >= 1e12:
        return f"{value:.4e}"
    return f"{value:.4f}"


def printable(text: object) -> str:
    """Text fit to print: control characters, line ends and what can't be encoded become escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(text))


def temporary_name(attempt: str, name: str, *, is_claimed: bool = False) -> str:
    """The temporary file of one attempt (16 hex digits, random) to write `name`; cut to what a name may hold.

    `is_claimed` is for who has a claim to the directory: whoever has the next one may know that this attempt is dead.
    """
    prefix, suffix = f".asyncckpt-{'claimed-' * is_claimed}{attempt}-", ".tmp"
    room = _MAX_NAME_BYTES - len(prefix) - len(suffix)
    return prefix + name.encode("utf-8", "surrogateescape")[:room].decode("utf-8", "ignore") + suffix


def is_temporary_name(name: str) -> bool:
    """Whether `name` is one that `temporary_name` makes."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


def is_temporary_name_of(temporary: str, name: str) -> bool:
    """Whether `temporary` is what a file is called that is to become `name`."""
    found = _TEMPORARY_NAME.fullmatch(temporary)
    return found is not None and temporary == temporary_name(found[2], name, is_claimed=bool(found[1]))


def is_claimed_name(name: str) -> bool:
    """Whether it is the temporary name of somebody who had a claim to the directory."""
    found = _TEMPORARY_NAME.fullmatch(name)
    return found is not None and bool(found[1])
