"""Gate 10: a file system that stops answering. Training goes on, waits end, and it recovers.

Real calls hang in the kernel here, on a FUSE mount. No time is asserted, only that nothing hangs: what is to be bounded
is done on a thread that is given a minute.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt import (
    AsyncCheckpointSaver,
    CheckpointManager,
    CheckpointWriteError,
    SaveHandle,
    StorageBusyError,
    WaitTimeoutError,
)
from asyncckpt.events import Event
from reliability.gates import SEED, count, report
from reliability.stalling_file_system import EVERYTHING, StallingFileSystem, stalling_file_system

T = TypeVar("T")

HANG_SECS = 60.0
STALL_SECS = 0.2
NUM_STEPS = 30  # while nothing answers

figures = {"cases": 0, "steps": 0, "stalls": 0, "acknowledged": 0, "exits": 0}


@pytest.fixture(autouse=True, scope="module")
def figures_of_the_gate() -> Iterator[None]:
    yield
    report(
        "10 stalls",
        f"{figures['cases']} cases: {figures['steps']} steps trained while the storage hung, "
        f"{figures['stalls']} stalls reported, {figures['acknowledged']} checkpoints acknowledged and none lost, "
        f"{figures['exits']} processes ended though a thread was stuck",
    )


@pytest.fixture
def system(tmp_path: Path) -> Iterator[StallingFileSystem]:
    with stalling_file_system(tmp_path / "system") as mounted:
        yield mounted


def within(action: Callable[[], T]) -> T:
    """What the action returns or raises; it must not hang."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG_SECS)
    assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]
    return results[0]


class Run:
    """Training that saves through a saver or a manager, to the mount."""

    def __init__(self, system: StallingFileSystem, kind: str, **options: object) -> None:
        self.system, self.kind = system, kind
        self.events: list[Event] = []
        self.noticed = threading.Event()
        self.model = nn.Linear(64, 64)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.step = 0
        self.improves = True
        self.handles: dict[int, SaveHandle] = {}
        self.options = {"when_full": "skip", "stall_timeout_secs": STALL_SECS, "on_event": self.note, **options}
        self.saver: AsyncCheckpointSaver | CheckpointManager = self.make()

    def make(self) -> AsyncCheckpointSaver | CheckpointManager:
        if self.kind == "saver":
            return AsyncCheckpointSaver(**self.options)  # type: ignore[arg-type]
        directory = self.system.mount / "run"
        return CheckpointManager(
            directory,
            max_checkpoints=2,
            lock_timeout_secs=0.3,
            snapshot="overlap",
            **self.options,  # type: ignore[arg-type]
        )

    def note(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "stalled":
            self.noticed.set()

    def train(self) -> None:
        self.step += 1
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 64)).square().mean().backward()
        self.optimizer.step()

    def save(self) -> SaveHandle:
        self.train()
        if isinstance(self.saver, CheckpointManager):
            val_loss = 1.0 / self.step if self.improves else 1.0
            saved = self.saver.save(self.model, self.optimizer, 1, self.step, val_loss=val_loss)
            assert saved is not None
            handle = saved
        else:
            checkpoint = {"model_state_dict": self.model.state_dict(), "global_step": self.step}
            # The same path in turn, so that there is something to be replaced.
            handle = self.saver.save(checkpoint, self.system.mount / "run" / f"{self.step % 2}.pt")
        if not handle.skipped:
            self.handles[self.step] = handle
        return handle

    def assert_recovers(self) -> None:
        """The storage answers again: what was stuck ends, later saves succeed, what was acknowledged loads."""
        within(lambda: self.saver.wait(HANG_SECS))
        within(self.save).result(HANG_SECS)
        within(lambda: self.saver.wait(HANG_SECS))
        durable = {step for step, handle in self.handles.items() if handle.exception(HANG_SECS) is None}
        kept = sorted({*sorted(durable)[-2:], *(() if self.improves else (1,))})
        found = {}
        for path in (self.system.source / "run").glob("*.pt"):
            if path.name != "best_model.pt":
                found[asyncckpt.load(path, mmap=False)["global_step"]] = path
        if self.kind == "manager":
            assert sorted(found) == kept
        else:
            newest = {step % 2: step for step in sorted(durable)}
            assert sorted(found) == sorted(newest.values())
        assert not list((self.system.source / "run").glob(".asyncckpt-*.tmp"))
        figures["acknowledged"] += len(durable)

    def wait_until_noticed(self) -> None:
        assert self.noticed.wait(HANG_SECS), "the watchdog said nothing"


def test_the_file_system_is_one(system: StallingFileSystem) -> None:
    """While it answers, it is the directory behind it: names, contents, links."""
    (system.mount / "d").mkdir()
    (system.mount / "d/a").write_bytes(b"x" * 300_000)
    os.link(system.mount / "d/a", system.mount / "d/b")
    os.rename(system.mount / "d/a", system.mount / "d/c")
    assert sorted(os.listdir(system.mount / "d")) == sorted(os.listdir(system.source / "d")) == ["b", "c"]
    assert (system.mount / "d/c").read_bytes() == (system.source / "d/b").read_bytes() == b"x" * 300_000
    assert os.path.samefile(system.mount / "d/b", system.mount / "d/c")


OPERATIONS = ("create", "write", "fsync", "fsyncdir", "rename", "getattr")
CASES = list(itertools.product(OPERATIONS, ("saver", "manager"), ("alone", EVERYTHING)))


@pytest.mark.parametrize(
    ("operation", "kind", "extent"),
    sorted(random.Random(SEED).sample(CASES, count(4, full=len(CASES)))),
)
def test_training_goes_on(system: StallingFileSystem, operation: str, kind: str, extent: str) -> None:
    """Steps are trained, saves asked for; waits end; the stall is told of; when it is over all is as it should be."""
    run = Run(system, kind)
    run.save().result(HANG_SECS)
    run.saver.wait(HANG_SECS)
    system.stall(operation)
    handle = within(run.save)
    system.wait_until_stalled(operation)
    if extent == EVERYTHING:
        system.stall(EVERYTHING)
    run.wait_until_noticed()

    before = run.step
    skipped = [within(run.save).skipped for _ in range(NUM_STEPS)]
    assert run.step == before + NUM_STEPS
    assert skipped.count(False) <= 1  # max_in_flight is 2
    assert handle.timings.stalled_secs > 0
    with pytest.raises(FutureTimeoutError):
        within(lambda: handle.result(0.1))
    with pytest.raises(WaitTimeoutError):
        within(lambda: run.saver.wait(0.1))
    stalled = [event for event in run.events if event.kind == "stalled" and event.path == handle.path]
    assert len(stalled) == 1
    assert f"has not returned for {STALL_SECS:g} s" in stalled[0].detail

    system.go()
    run.assert_recovers()
    within(lambda: run.saver.close(HANG_SECS))
    figures["cases"] += 1
    figures["steps"] += NUM_STEPS
    figures["stalls"] += len(stalled)


@pytest.mark.parametrize(("operation", "is_durable"), [("link", False), ("unlink", True), ("readdir", False)])
def test_what_only_a_manager_does(system: StallingFileSystem, operation: str, is_durable: bool) -> None:
    """The best link, retention's deletes, and looking for names: training goes on; what is durable is acknowledged.

    Whoever reads a directory's names holds up, in the kernel, all who change them.
    """
    run = Run(system, "manager")
    run.improves = operation != "unlink"  # the best link has a temporary name to be unlinked
    for _ in range(3):
        run.save().result(HANG_SECS)
    run.saver.wait(HANG_SECS)
    system.stall(operation)
    handle = within(run.save)
    system.wait_until_stalled(operation)
    if is_durable:
        handle.result(HANG_SECS)
    run.wait_until_noticed()
    with pytest.raises(WaitTimeoutError):
        within(lambda: run.saver.wait(0.1))
    assert handle.done() == is_durable
    for _ in range(NUM_STEPS):
        within(run.save)
    assert isinstance(run.saver, CheckpointManager)
    assert within(lambda: run.saver.best) is not None  # type: ignore[union-attr]
    system.go()
    run.assert_recovers()
    within(lambda: run.saver.close(HANG_SECS))
    figures["cases"] += 1
    figures["steps"] += NUM_STEPS


@pytest.mark.parametrize("kind", ["saver", "manager"])
def test_closing_ends_in_time(system: StallingFileSystem, kind: str) -> None:
    """`close` and the end of a block give up at their time-outs; what was stuck is saved when the storage answers."""
    run = Run(system, kind, exit_timeout_secs=0.3)
    run.save().result(HANG_SECS)
    system.stall("fsync")
    handle = within(run.save)
    system.wait_until_stalled("fsync")
    system.stall(EVERYTHING)
    with pytest.raises(WaitTimeoutError):
        within(lambda: run.saver.close(0.2))
    with pytest.raises(WaitTimeoutError):
        within(lambda: run.saver.__exit__(None, None, None))
    system.go()
    handle.result(HANG_SECS)
    run.saver = run.make()  # the directory is free again, as soon as the last save has ended
    within(lambda: saved_in_the_end(run))
    within(lambda: run.saver.close(HANG_SECS))
    figures["cases"] += 1


def saved_in_the_end(run: Run) -> None:
    while True:
        try:
            run.save().result(HANG_SECS)
            return
        except StorageBusyError:
            continue


def test_closing_when_only_the_lock_is_left(system: StallingFileSystem, caplog: pytest.LogCaptureFixture) -> None:
    """All is durable: closing succeeds, with a warning; the directory is free when the storage answers."""
    run = Run(system, "manager")
    run.save().result(HANG_SECS)
    run.saver.wait(HANG_SECS)
    system.stall(EVERYTHING)
    within(run.saver.close)
    assert "given back when it does" in caplog.text
    system.go()
    run.saver = run.make()
    within(lambda: saved_in_the_end(run))
    within(lambda: run.saver.close(HANG_SECS))
    figures["cases"] += 1


@pytest.mark.parametrize("operation", ["getattr", "create", "readdir", EVERYTHING])
def test_the_opening_hangs(system: StallingFileSystem, operation: str) -> None:
    """The first save gives up and says why; the opening goes on, and once it is through saves succeed."""
    run = Run(system, "manager")
    system.stall(operation)
    with pytest.raises(StorageBusyError, match="the storage does not answer"):
        within(run.save)
    for _ in range(NUM_STEPS):  # nobody waits a second time
        run.train()
        with pytest.raises(StorageBusyError):
            within(run.save)
    system.go()
    within(lambda: saved_in_the_end(run))
    run.assert_recovers()
    within(lambda: run.saver.close(HANG_SECS))
    figures["cases"] += 1
    figures["steps"] += NUM_STEPS


def test_the_directory_is_moved_while_nothing_answers(system: StallingFileSystem) -> None:
    """Taken for open, since nobody can tell, it turns out not to be: that save fails, the next one opens it anew."""
    run = Run(system, "manager")
    run.save().result(HANG_SECS)
    run.saver.wait(HANG_SECS)
    system.stall(EVERYTHING)
    handle = within(run.save)
    run.wait_until_noticed()
    os.rename(system.source / "run", system.source / "moved")
    system.go()
    failure = handle.exception(HANG_SECS)
    assert isinstance(failure, CheckpointWriteError)
    assert "moved, removed or unmounted while the storage did not answer" in str(failure)
    within(lambda: saved_in_the_end(run))
    assert sorted(os.listdir(system.source)) == ["moved", "run"]
    within(lambda: run.saver.close(HANG_SECS))
    figures["cases"] += 1


@pytest.mark.parametrize("kind", ["saver", "manager"])
@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
def test_an_error_after_the_stall(system: StallingFileSystem, kind: str, operation: str) -> None:
    """As a server that comes back and knows nothing: the save is done anew."""
    run = Run(system, kind)
    run.save().result(HANG_SECS)
    system.stall(operation)
    handle = within(run.save)
    system.wait_until_stalled(operation)
    run.wait_until_noticed()
    system.go(errno.EIO)
    handle.result(HANG_SECS)
    assert "retried" in [event.kind for event in run.events]
    run.assert_recovers()
    within(lambda: run.saver.close(HANG_SECS))
    figures["cases"] += 1


@pytest.mark.parametrize("kind", ["saver", "manager"])
@pytest.mark.parametrize("stuck", [True, False])
def test_the_file_system_dies_and_is_mounted_anew(system: StallingFileSystem, kind: str, stuck: bool) -> None:
    """What was stuck fails, nothing acknowledged is lost, and the next save after the remount succeeds."""
    run = Run(system, kind, max_consecutive_failures=100)
    run.save().result(HANG_SECS)
    run.saver.wait(HANG_SECS)
    if stuck:
        system.stall("fsync")
        handle = within(run.save)
        system.wait_until_stalled("fsync")
        system.die()
        assert isinstance(handle.exception(HANG_SECS), CheckpointWriteError)
    else:
        system.die()
    failed = within(run.save)
    assert isinstance(failed.exception(HANG_SECS), CheckpointWriteError)
    system.start_anew()
    within(run.save).result(HANG_SECS)
    within(lambda: run.saver.wait(HANG_SECS))
    if kind == "manager":
        with pytest.raises(StorageBusyError):  # the lock is one of the new mount
            CheckpointManager(system.mount / "run", lock_timeout_secs=0).save(run.model, None, 1, 0)
    for step in [step for step, handle in run.handles.items() if handle.exception(HANG_SECS) is not None]:
        del run.handles[step]
    run.assert_recovers()
    within(lambda: run.saver.close(HANG_SECS))
    figures["cases"] += 1


# --- the end of a process ---

TRAINER = """
import sys, threading, torch, asyncckpt
from torch import nn
noticed = threading.Event()
model = nn.Linear(4, 4)
manager = asyncckpt.CheckpointManager(
    sys.argv[1], stall_timeout_secs=0.2, exit_timeout_secs=0.5,
    on_event=lambda event: noticed.set() if event.kind == "stalled" else None,
)
manager.save(model, None, 1, 1).result(60)
print("saved", flush=True)
sys.stdin.readline()
manager.save(model, None, 1, 2)
assert noticed.wait(60)
print("stalled", flush=True)
"""


def state_of(pid: int) -> str:
    """R, S, D, Z, … of the main thread; "" once the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@contextmanager
def ended_with(system: StallingFileSystem) -> Iterator[None]:
    """A failure lets everybody go, before somebody waits for a process that can't end."""
    try:
        yield
    except BaseException:
        system.die()
        raise


@pytest.mark.parametrize("server", ["has the request", "reads nothing"])
def test_a_process_ends_though_a_thread_is_stuck(tmp_path: Path, server: str) -> None:
    """Exit gives up after exit_timeout_secs. A thread whose request a FUSE server has taken can't be killed by anybody:
    then the process is a zombie (its main thread is gone, with code 74) until the server answers or is gone itself.
    """
    with stalling_file_system(tmp_path / "system", single_threaded=server == "reads nothing") as system:
        command = [sys.executable, "-c", TRAINER, str(system.mount / "run")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, **pipes, text=True) as process, ended_with(system):  # type: ignore[call-overload]
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "saved\n"
            if server == "reads nothing":
                system.stall("getattr")
                threading.Thread(target=lambda: os.path.exists(system.mount / "other"), daemon=True).start()
                system.wait_until_stalled("getattr")
            else:
                system.stall("fsync")
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "stalled\n"
            if server == "reads nothing":
                assert process.wait(HANG_SECS) == 74
                system.go()
            else:
                deadline = time.monotonic() + HANG_SECS
                while state_of(process.pid) != "Z":
                    assert time.monotonic() < deadline, f"the main thread is in state {state_of(process.pid)!r}"
                    time.sleep(0.01)
                system.go()
                assert process.wait(HANG_SECS) == 74
            assert "at exit, after 0.5 s: 1 of 1 saves are not durable yet" in process.stderr.read()
    figures["exits"] += 1
