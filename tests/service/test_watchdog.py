"""The watchdog: each stall told of once, by event, log and timings; nothing told of what returns in time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from storage.seam import Call, Seam

from asyncckpt import AsyncCheckpointSaver
from asyncckpt.events import Event
from asyncckpt.records import Timings
from asyncckpt.service.watchdog import Watchdog

HANG_SECS = 60.0


class Reports:
    """What a watchdog has said."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self._said = threading.Condition()

    def __call__(self, path: str, detail: str) -> None:
        with self._said:
            self.lines.append((path, detail))
            self._said.notify_all()

    def wait_for(self, num_lines: int) -> None:
        with self._said:
            assert self._said.wait_for(lambda: len(self.lines) >= num_lines, HANG_SECS)


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def make(reports: Reports) -> Iterator[Callable[[float], Watchdog]]:
    made: list[Watchdog] = []

    def make(timeout_secs: float) -> Watchdog:
        made.append(Watchdog(timeout_secs, reports, lambda: False))
        return made[-1]

    yield make
    for watchdog in made:
        watchdog.stop()
        assert watchdog.join(HANG_SECS)


def test_each_stall_is_told_of_once(
    make: Callable[[float], Watchdog], reports: Reports, caplog: pytest.LogCaptureFixture
) -> None:
    """And that it is over; the next operation of the same save may stall in its turn."""
    timings = Timings()
    with make(0.05).watch("a.pt", timings) as watch:
        with watch.during("write"):
            reports.wait_for(1)
            assert reports.lines == [("a.pt", "write has not returned for 0.05 s")]
        first = timings.stalled_secs
        assert first > 0
        assert "a.pt: write has returned, after" in caplog.text
        with watch.during("fsync"):
            reports.wait_for(2)
        assert reports.lines[1:] == [("a.pt", "fsync has not returned for 0.05 s")]
        assert timings.stalled_secs > first


def test_pieces_that_stall_together_are_one_stall(make: Callable[[float], Watchdog], reports: Reports) -> None:
    """A dead disk holds up all that is being written; another save's stall is another one."""
    watchdog = make(0.05)
    one, other = Timings(), Timings()
    with watchdog.watch("a.pt", one) as watch, watchdog.watch("b.pt", other) as second:
        with watch.during("write"), watch.during("write"), second.during("write"):
            reports.wait_for(2)
        assert sorted(reports.lines) == [(f"{name}.pt", "write has not returned for 0.05 s") for name in "ab"]
        assert one.stalled_secs > 0
        assert other.stalled_secs > 0


def test_stalled_secs_grow_while_it_lasts(make: Callable[[float], Watchdog], reports: Reports) -> None:
    """Whoever looks at the handle's timings sees how long it has been."""
    timings = Timings()
    with make(0.05).watch("a.pt", timings) as watch, watch.during("fsync"):
        reports.wait_for(1)
        seen = timings.stalled_secs
        pause = threading.Event()
        while timings.stalled_secs == seen:  # a hang is this test's time-out
            pause.wait(0.01)
        assert timings.stalled_secs > seen


def test_what_returns_in_time_is_no_stall(make: Callable[[float], Watchdog], reports: Reports) -> None:
    """However many operations, and however long they take together."""
    timings = Timings()
    watchdog = make(0.2)
    with watchdog.watch("a.pt", timings) as watch:
        pause = threading.Event()
        for _ in range(50):
            with watch.during("write"):
                pause.wait(0.01)
    assert not reports.lines
    assert timings.stalled_secs == 0


def test_it_ends_only_when_nothing_is_watched(make: Callable[[float], Watchdog], reports: Reports) -> None:
    """A saver that was closed with a time-out still tells of what hangs."""
    watchdog = make(0.1)
    with watchdog.watch("a.pt", Timings()) as watch, watch.during("fsync"):
        watchdog.stop()
        reports.wait_for(1)
        assert not watchdog.join(0)
    assert watchdog.join(HANG_SECS)


@pytest.mark.parametrize(
    ("call", "operation"),
    [("open_file", "begin"), ("pwrite", "write"), ("fsync", "fsync"), ("rename", "commit")],
)
def test_a_saver_names_what_is_stuck(
    tmp_path: Path, call: str, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The event, the log, and the handle's timings, while it lasts; the save succeeds afterwards."""
    events: list[Event] = []
    noticed, gate = threading.Event(), threading.Event()

    def note(event: Event) -> None:
        events.append(event)
        if event.kind == "stalled":
            noticed.set()

    def hold(made: Call) -> None:
        if made.name == call and ".tmp" in str(made.path) + str(made.args):
            assert gate.wait(HANG_SECS)

    with AsyncCheckpointSaver(stall_timeout_secs=0.1, on_event=note) as saver, Seam(hold):
        handle = saver.save({"weights": torch.ones(1000)}, tmp_path / "a.pt")
        assert noticed.wait(HANG_SECS)
        assert handle.timings.stalled_secs > 0
        gate.set()
        handle.result(HANG_SECS)
    stalled = [event for event in events if event.kind == "stalled"]
    assert [(event.path, event.detail) for event in stalled] == [
        (str(tmp_path / "a.pt"), f"{operation} has not returned for 0.1 s")
    ]
    assert f"{operation} has not returned for 0.1 s" in caplog.text
    assert f"{operation} has returned" in caplog.text
