"""The vocabulary: plain records that pass between modules. No I/O, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that is durable.

    `epoch`, `global_step`, the losses, `val_metrics` and `sequence` are None or empty for saves that name only a path.
    `sequence` numbers the commits of a run: the newest checkpoint is the one with the highest, whatever its step.
    `timestamp` is ISO 8601, UTC. `protected` checkpoints were recovered without a registry; retention leaves them alone
    until `prune()`. `damaged` ones turned out so when they were loaded; they count for nothing. `pinned` ones
    are kept, whatever retention says, until they are unpinned.
    """

    filepath: Path
    epoch: int | None = None
    global_step: int | None = None
    val_loss: float | None = None
    val_metrics: Mapping[str, float] = field(default_factory=dict)
    timestamp: str = ""
    is_best: bool = False
    num_bytes: int = 0
    train_loss: float | None = None
    sequence: int | None = None
    protected: bool = False
    damaged: bool = False
    pinned: bool = False

    def metric(self, name: str) -> float | None:
        """The value of "val_loss", "train_loss" or one of `val_metrics`; None if it was not given."""
        if name == "val_loss" and (self.val_loss is not None or name not in self.val_metrics):
            return self.val_loss
        if name == "train_loss" and name not in self.val_metrics:
            return self.train_loss
        return self.val_metrics.get(name)


def is_better(value: float | None, than: float | None, mode: str) -> bool:
    """Whether a metric improved, strictly; `mode` is "min" or "max". None and NaN never do, and anything beats them."""
    if value is None or math.isnan(value):
        return False
    if than is None or math.isnan(than):
        return True
    return value < than if mode == "min" else value > than


@dataclass
class Timings:
    """Where the time of one save went, in seconds.

    `blocked_secs` is what the call to `save()` took: waiting for room, planning and staging. `fence_secs` is what
    training waited at `optimizer.step` for an overlapped staging. `durable_secs` runs from the call to `save()` to
    the checkpoint being durable. `stalled_secs` is what the storage took to answer beyond `stall_timeout_secs`; it
    grows while a stall lasts. `checksum_secs` and `write_secs` are summed over threads that run at the same time.
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
    stalled_secs: float = 0.0
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
