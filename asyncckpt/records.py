"""The vocabulary: plain records that pass between modules. No I/O, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that is durable.

    `epoch`, `global_step`, `val_loss` and `val_metrics` are None or empty for saves that name only a path.
    """

    filepath: Path
    num_bytes: int
    timestamp: str
    epoch: int | None = None
    global_step: int | None = None
    val_loss: float | None = None
    val_metrics: Mapping[str, float] = field(default_factory=dict)
    is_best: bool = False


@dataclass
class Timings:
    """Where the time of one save went, in seconds.

    `blocked_secs` is what the call to `save()` took: waiting for room, planning and staging. `fence_secs` is what
    training waited at `optimizer.step` for an overlapped staging. `durable_secs` runs from the call to `save()` to
    the checkpoint being durable. `checksum_secs` and `write_secs` are summed over threads that run at the same time.
    """

    num_bytes: int = 0
    blocked_secs: float = 0.0
    plan_secs: float = 0.0
    stage_secs: float = 0.0
    fence_secs: float = 0.0
    queue_secs: float = 0.0
    checksum_secs: float = 0.0
    write_secs: float = 0.0
    sync_secs: float = 0.0
    commit_secs: float = 0.0
    durable_secs: float = 0.0


@dataclass(frozen=True)
class VerifyReport:
    """What reading every byte of a checkpoint found.

    `ok` is true when every record matched its checksum; `problems` says what did not, record by record.
    `metadata` is the file's own description of itself, None for files that asyncckpt did not write.
    """

    path: str
    num_bytes: int
    num_records: int
    problems: tuple[str, ...]
    metadata: Mapping[str, object] | None

    @property
    def ok(self) -> bool:
        return not self.problems
