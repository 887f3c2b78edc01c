"""A run whose wall clock jumps between its saves, and while it waits; asserts that nothing hangs or is deleted wrongly.

    python clock_run.py DIRECTORY WRITER SEED

Goes on with the run in DIRECTORY/before, if there is one.
The clock is put in Python's place before anything else is imported, so that every module has this one.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

HOUR = 3600.0
DAY = 24 * HOUR
JUMPS = [HOUR, -HOUR, DAY, -3 * DAY, 400 * DAY, -20_000 * DAY, 20_000 * DAY, 40 * 365 * DAY, -40 * 365 * DAY, -0.5]


class Clock(datetime.datetime):
    """Python's datetime, off by `offset` seconds."""

    offset = 0.0

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
        return super().now(tz) + datetime.timedelta(seconds=cls.offset)

    @classmethod
    def jump(cls, secs: float) -> None:
        cls.offset += secs


_real_time = time.time
datetime.datetime = Clock  # type: ignore[misc]
time.time = lambda: _real_time() + Clock.offset

# ruff: noqa: E402
import pytest

import asyncckpt
from asyncckpt import AdaptiveInterval, EveryMinutes, KeepEvery, KeepLast, StorageBusyError
from asyncckpt.storage import system_calls
from reliability.training_loop import TIMEOUT_SECS, Loop

CLOSE_SECS = 20.0  # what should take moments, on a slow machine
KEPT_BY_TIME = KeepEvery(hours=1) | KeepLast(2)


_TIME_OUT = (TimeoutError, concurrent.futures.TimeoutError)  # one and the same since Python 3.11


def first_of_each_hour(moments: dict[int, datetime.datetime]) -> set[int]:
    """The steps that are to be kept, from what the clock said at each save."""
    seen: dict[float, int] = {}
    for step, moment in moments.items():
        seen.setdefault(moment.timestamp() // HOUR, step)
    return set(seen.values())


def order_and_retention(path: Path, writer: str, chance: random.Random) -> None:
    """The latest is what was saved last, and milestones stay, whatever the clock says; also for the next process."""
    jumps = JUMPS + [chance.uniform(-DAY, DAY) for _ in range(5)]
    with Loop(path, writer, 1000, retention=KEPT_BY_TIME) as loop:
        moments: dict[int, datetime.datetime] = {}
        for jump in jumps:
            info = loop.save().result(TIMEOUT_SECS)
            loop.manager.wait(TIMEOUT_SECS)
            moments[loop.step] = datetime.datetime.fromisoformat(info.timestamp)
            assert loop.manager.latest is not None
            assert loop.manager.latest.global_step == loop.step
            assert abs((moments[loop.step] - Clock.now(datetime.timezone.utc)).total_seconds()) < CLOSE_SECS
            listed = [entry.global_step for entry in loop.manager.list_checkpoints()]
            assert listed == sorted(first_of_each_hour(moments) | {*sorted(moments)[-2:]})
            assert all(report.ok for report in loop.manager.verify())
            Clock.jump(jump)
    Clock.jump(-10_000 * DAY)
    with Loop(path, writer, 1000, retention=KEPT_BY_TIME) as resumed:
        _, checkpoint = resumed.manager.load_latest(resumed.model)
        assert checkpoint["global_step"] == len(jumps)
        resumed.step = 100
        resumed.save().result(TIMEOUT_SECS)
        assert [entry.global_step for entry in resumed.manager.list_checkpoints()][-2:] == [len(jumps), 101]
    Clock.offset = 0.0


def go_on(path: Path, writer: str) -> None:
    """With what another boot has written: no moment of its clock is left in it."""
    with Loop(path, writer, 1000, save_policy=EveryMinutes(30)) as loop:
        _, checkpoint = loop.manager.load_latest(loop.model)
        loop.step = checkpoint["global_step"]
        assert not loop.manager.should_save(loop.step + 1)
        loop.acknowledged = list(range(1, loop.step + 1))
        loop.succeed()


def policies(path: Path, writer: str) -> None:
    """The interval between saves is measured by a clock that nobody sets."""
    for policy in (EveryMinutes(30), AdaptiveInterval(max_overhead=1e-6), EveryMinutes(30) | EveryMinutes(60)):
        with Loop(path, writer, 1000, save_policy=policy) as loop:
            loop.save().result(TIMEOUT_SECS)
            loop.manager.wait(TIMEOUT_SECS)
            for jump in JUMPS:
                Clock.jump(jump)
                assert not loop.manager.should_save(loop.step + 1), (policy, jump)
        Clock.offset = 0.0


class Jumping(threading.Thread):
    """Sets the clock again and again, by an hour each time."""

    def __init__(self, jump: float) -> None:
        super().__init__()
        self.jump = jump
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.wait(0.01):
            Clock.jump(self.jump)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.join()
        Clock.offset = 0.0


def deadlines(path: Path, writer: str, jump: float) -> None:
    """Time-outs come when they are due, and not before, though the clock jumps while they run."""
    gate = threading.Event()
    fsync = system_calls.fsync

    def held(fd: int) -> None:
        assert gate.wait(TIMEOUT_SECS)
        fsync(fd)

    with Loop(path, numel=1000) as loop:
        loop.save().result(TIMEOUT_SECS)
        other = Loop(path, writer, lock_timeout_secs=0.5)
        expect_in_time(StorageBusyError, 0.5, jump, other.save)
        other.manager.close()
        system_calls.fsync = held
        handles = [loop.save(), loop.save()]
        for action in (loop.manager.wait, handles[0].result, loop.manager.close):
            expect_in_time(_TIME_OUT, 0.3, jump, partial(action, 0.3))
        gate.set()
        for handle in handles:
            handle.result(TIMEOUT_SECS)
            assert 0.9 <= handle.timings.durable_secs < 5 * CLOSE_SECS
        system_calls.fsync = fsync


def expect_in_time(
    error: type[Exception] | tuple[type[Exception], ...], secs: float, jump: float, action: Callable[[], object]
) -> None:
    started = time.monotonic()
    with Jumping(jump), pytest.raises(error):
        action()
    assert secs <= time.monotonic() - started < CLOSE_SECS


def main() -> None:
    path, writer, chance = Path(sys.argv[1]), sys.argv[2], random.Random(int(sys.argv[3]))
    assert asyncckpt.manager.datetime is Clock  # type: ignore[attr-defined]
    order_and_retention(path / "order", writer, chance)
    policies(path / "policies", writer)
    for jump in (HOUR, -HOUR):
        deadlines(path / f"deadlines {jump}", writer, jump)
    if (path / "before").exists():
        go_on(path / "before", writer)
    print(f"monotonic {time.monotonic()}")


if __name__ == "__main__":
    main()
