"""What a saver tells its `on_event` callback."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

EventKind = Literal[
    "submitted",
    "staged",
    "retried",
    "stalled",
    "committed",
    "failed",
    "skipped",
    "swept",
    "recovered",
    "deleted",
    "fallback",
    "writer_died",
    "mirrored",
    "mirror_failed",
]


@dataclass(frozen=True)
class Event:
    """One step in the life of a save, or of the directory that it goes to.

    `path` is the destination (for `swept`, the dead temporary file that was removed; for `deleted`, the checkpoint that
    retention dropped; for `recovered`, what was made to agree after a crash; for `fallback`, the damaged checkpoint in
    whose place an earlier one is loaded; empty for `writer_died`, which is about the writer process, and
    `mirror_failed`), `detail` one line
    for people (for `stalled`, what the storage does not return from), `time` seconds since the epoch.
    """

    kind: EventKind
    path: str
    detail: str = ""
    time: float = field(default_factory=time.time)
