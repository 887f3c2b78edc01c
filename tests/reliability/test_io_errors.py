"""The file system fails, at every call that a managing process makes: a save fails or recovers, what was acknowledged
loads all the same, nothing hangs, nothing is left, and once the cause is gone the next save succeeds."""

from __future__ import annotations

import errno
import itertools
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from storage.mounts import memory_directory
from storage.observe import no_descriptor_leaks
from storage.seam import FUNCTIONS, Fault, Seam

from asyncckpt import CheckpointManager, CheckpointWriteError, KeepLast
from asyncckpt.naming import temporary_name
from asyncckpt.service import worker
from asyncckpt.storage import system_calls
from reliability.gates import SEED, count, report
from reliability.saving_server import Order, Training
from reliability.test_manager_sigkill import (
    NUM_KEPT,
    assert_in_order,
    contents,
    copy_scene,
    number_in,
    open_for_writing,
)

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EINTR", "EROFS", "short write")
STRIDE = count(37, full=1)  # which calls are tried: every one, or one in so many
TIMEOUT_SECS = 60.0
OLD_LOSSES = [3.0, 5.0, 4.0]  # of the steps 1, 2, …: the first is the best
NEW_LOSSES = [2.0, 6.0]  # the old best goes, and the link is renewed; then the old latest goes


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_FIRST_PAUSE_SECS", 0)


class ShortWrites:
    """A `pwrite` of which the `number`-th call, if `sticky` every later one too, writes only half of what it should."""

    def __init__(self, number: int, *, sticky: bool) -> None:
        self.hit: str | None = None
        self._number, self._sticky = number, sticky
        self._numbers = itertools.count()

    def __call__(self, fd: int, view: memoryview, offset: int) -> int:
        number = next(self._numbers)
        if len(view) > 1 and (number == self._number or (self._sticky and number > self._number)):
            self.hit = self.hit or f"write {number} of {len(view)} bytes"
            view = view[: len(view) // 2]
        return int(FUNCTIONS["pwrite"](fd, view, offset))


@contextmanager
def failing(error: str, number: int, *, sticky: bool) -> Iterator[Fault | ShortWrites]:
    """While open, the `number`-th call through the seam fails, or the `number`-th write is short."""
    with pytest.MonkeyPatch.context() as patch:
        if error == "short write":
            short = ShortWrites(number, sticky=sticky)
            patch.setattr(system_calls, "pwrite", short)
            yield short
        else:
            fault = Fault(number, getattr(errno, error), sticky=sticky)
            with Seam(fault):
                yield fault


class Process:
    """A training process with a manager; the number of its state is its step."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.manager = CheckpointManager(path, NUM_KEPT, save_rng=False)
        self._training = Training(Order([], 0, num_tensors=2, numel=2000))
        self._training.advance_to(step)
        self._training.step = step

    @property
    def step(self) -> int:
        return self._training.step

    def save(self, loss: float | None) -> CheckpointWriteError | None:
        """One step, and a save of it; why it failed."""
        self._training.advance_to(self.step + 1)
        try:
            handle = self._training.save(self.manager, loss)
        except CheckpointWriteError as error:  # the directory could not be opened
            return error
        failure = handle.exception(TIMEOUT_SECS)
        assert handle.wait_over(TIMEOUT_SECS)
        assert failure is None or isinstance(failure, CheckpointWriteError), repr(failure)
        return failure

    def prune(self) -> CheckpointWriteError | None:
        try:
            self.manager.prune(KeepLast(1))
        except CheckpointWriteError as error:
            return error
        return None


def old_run(base: Path) -> tuple[Path, int]:
    """A directory with a best link, and something to recover: a file that is not recorded, a dead writer's rest."""
    path = base / "old"
    process = Process(path)
    for loss in OLD_LOSSES:
        registry = (path / "registry.json").read_bytes() if path.exists() else b""
        assert process.save(loss) is None
    process.manager.close()
    (path / "registry.json").write_bytes(registry)
    (path / temporary_name("0" * 16, "state.pt")).touch()
    return path, process.step


def run_with_fault(path: Path, step: int, fault: Fault | ShortWrites, figures: Counter[str]) -> tuple[Process, int]:
    """Two saves and a prune; the process, and the last step that was acknowledged."""
    process = Process(path, step)
    acknowledged = step
    for loss in NEW_LOSSES:
        failure = process.save(loss)
        assert_explained(failure, fault)
        figures["failed" if failure else "saved"] += 1
        acknowledged = acknowledged if failure else process.step
    assert_explained(process.prune(), fault)
    return process, acknowledged


def assert_explained(failure: CheckpointWriteError | None, fault: Fault | ShortWrites) -> None:
    """It failed because of the fault; a short write fails nothing."""
    if failure is not None:
        assert isinstance(fault, Fault)
        assert fault.hit is not None, failure
        assert failure.errno == fault.error_number, fault.hit


def check_as_a_reader(path: Path, acknowledged: int, where: str) -> None:
    """Whatever failed: the last acknowledged state or a newer one is the latest, and all that is listed is whole."""
    before = contents(path) if path.exists() else {}
    reader = CheckpointManager(path, NUM_KEPT)
    problems = [report for report in reader.verify() if not report.ok]
    assert not problems, f"{where}: {problems}"
    for info in reader.list_checkpoints():
        assert number_in(info.filepath) == info.global_step, where
    latest = reader.latest
    assert acknowledged == 0 or (latest is not None and (latest.global_step or 0) >= acknowledged), where
    reader.close()
    assert (contents(path) if path.exists() else {}) == before, where


def check_afterwards(process: Process, path: Path, where: str) -> None:
    """The cause is gone: the same process saves again, and leaves the directory in order for the next one."""
    assert process.save(7.0) is None, where
    assert process.manager.latest is not None, where
    assert process.manager.latest.global_step == process.step, where
    process.manager.close()
    check_as_a_reader(path, process.step, where)
    open_for_writing(path)
    assert_in_order(path)
    before = contents(path)
    open_for_writing(path)
    assert contents(path) == before, where


@pytest.fixture(scope="module")
def figures() -> Iterator[Counter[str]]:
    figures: Counter[str] = Counter()
    yield figures
    report(
        "5 I/O errors, manager",
        f"{figures['faults']} faults (one in {STRIDE} of {figures['calls']} calls): {figures['saved']} saves succeeded "
        f"or recovered, {figures['failed']} failed as they should, 0 acknowledged lost, nothing left",
    )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize("error", ERRORS)
def test_every_call_may_fail(figures: Counter[str], error: str, sticky: bool) -> None:
    """In an old directory that needs recovery, and in one that has to be made, two levels deep."""
    chance = random.Random(f"{SEED} {error} {sticky}")
    num_hits = Counter[str]()
    with memory_directory() as base:
        scene, step = old_run(base)
        for place in ("old", "new"):
            number = chance.randrange(min(STRIDE, 4))
            while True:
                path = base / "runs" / "first" if place == "new" else copy_scene(scene, base / "copy")
                where = f"{error}, {sticky=}, {place} directory, call {number}"
                with no_descriptor_leaks():
                    with failing(error, number, sticky=sticky) as fault:
                        old_step = step if place == "old" else 0
                        process, acknowledged = run_with_fault(path, old_step, fault, figures)
                    check_as_a_reader(path, acknowledged, f"{where}: {fault.hit}")
                    check_afterwards(process, path, f"{where}: {fault.hit}")
                shutil.rmtree(base / ("runs" if place == "new" else "copy"))
                if fault.hit is None:
                    break
                num_hits[place] += 1
                number += STRIDE if error != "short write" else 1
            figures["calls"] += number
        figures["faults"] += num_hits.total()
    assert num_hits["old"] > 3
    assert num_hits["new"] > 3
