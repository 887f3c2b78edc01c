"""The saver's options: their names and types, and which values they may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

from asyncckpt.events import Event
from asyncckpt.image.snapshot import SNAPSHOT_MODES, SnapshotMode
from asyncckpt.records import CheckpointInfo
from asyncckpt.service.admission import WHEN_FULL, WhenFull
from asyncckpt.service.handle import SaveHandle

WriterKind = Literal["auto", "thread", "process"]
WRITER_KINDS: tuple[str, ...] = get_args(WriterKind)
_MAX_EXIT_CODE = 255


class SaverOptions(TypedDict, total=False):
    """The keyword arguments of `AsyncCheckpointSaver`, for those who pass them on."""

    num_workers: int
    snapshot: SnapshotMode
    writer: WriterKind
    max_in_flight: int
    when_full: WhenFull
    memory_limit: int | None
    on_success: Callable[[CheckpointInfo], object] | None
    on_failure: Callable[[SaveHandle, BaseException], object] | None
    on_event: Callable[[Event], object] | None
    retries: int
    verify_after_save: bool
    max_consecutive_failures: int
    nice: int
    stall_timeout_secs: float
    exit_timeout_secs: float
    exit_code: int | None
    storage_options: Mapping[str, Any] | None


def check_options(
    *,
    num_workers: int,
    snapshot: str,
    writer: str,
    max_in_flight: int,
    when_full: str,
    memory_limit: int | None,
    retries: int,
    max_consecutive_failures: int,
    nice: int,
    stall_timeout_secs: float,
    exit_timeout_secs: float,
    exit_code: int | None,
) -> None:
    """Raise ValueError, or TypeError, for the first one that can't be as it is."""
    _check_choice("snapshot", snapshot, SNAPSHOT_MODES)
    _check_choice("writer", writer, WRITER_KINDS)
    _check_choice("when_full", when_full, WHEN_FULL)
    _check_at_least("num_workers", num_workers, 1)
    _check_at_least("max_in_flight", max_in_flight, 1)
    _check_at_least("retries", retries, 0)
    _check_at_least("max_consecutive_failures", max_consecutive_failures, 1)
    _check_at_least("nice", nice, 0)
    if memory_limit is not None:
        _check_at_least("memory_limit", memory_limit, 1)
    if not 0 < stall_timeout_secs < math.inf:
        raise ValueError(f"stall_timeout_secs must be a number of seconds above 0, not {stall_timeout_secs}")
    if exit_code is not None:
        _check_at_least("exit_code", exit_code, 1)
        if exit_code > _MAX_EXIT_CODE:
            raise ValueError(f"exit_code must be at most {_MAX_EXIT_CODE}, as the system has it, not {exit_code}")
    if not exit_timeout_secs >= 0:
        raise ValueError(f"exit_timeout_secs must be at least 0, not {exit_timeout_secs}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def _check_at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
