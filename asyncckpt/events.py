"""What a saver tells its `on_event` callback."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

EventKind = Literal["submitted", "staged", "retried", "committed", "failed", "skipped", "swept"]


@dataclass(frozen=True)
class Event:
    """One step in the life of a save.

    `path` is the destination (for `swept`, the dead temporary file that was removed), `detail` one line for people,
    `time` seconds since the epoch.
    """

    kind: EventKind
    path: str
    detail: str = ""
    time: float = field(default_factory=time.time)
