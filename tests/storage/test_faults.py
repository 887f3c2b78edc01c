"""The file system fails, at every call that a save makes: the save fails or recovers, and nothing else is harmed."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from reliability.gates import report

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointWriteError, SaveHandle
from asyncckpt.naming import is_temporary_name, temporary_name
from asyncckpt.service import worker
from asyncckpt.storage.local import LocalStorage
from storage.mounts import memory_directory
from storage.seam import Call, Fault, Seam, assert_durable

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EINTR", "EROFS", "ESTALE")
PASSING = {"EIO", "EINTR", "ESTALE"}  # what a new attempt may cure
DEAD = temporary_name("0" * 16, "state.pt")
TIMEOUT_SECS = 60.0


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_FIRST_PAUSE_SECS", 0)


@pytest.fixture(scope="module")
def old_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("old") / "state.pt"
    torch.save(state(1), path)
    return path


def state(number: int) -> dict[str, object]:
    return {"number": number, "weights": torch.full((5000,), float(number))}


def number_at(path: Path) -> int:
    """Which state the file holds; fails unless it is whole."""
    loaded = asyncckpt.load(path)
    number = int(loaded["number"])
    assert torch.equal(loaded["weights"], torch.full((5000,), float(number)))
    return number


def temporaries(base: Path) -> set[str]:
    return {name for _, _, names in os.walk(base) for name in names if is_temporary_name(name)}


def over_an_old_file(base: Path, old_file: Path) -> Path:
    """With what a dead writer left beside it."""
    base.mkdir()
    shutil.copy(old_file, base / "state.pt")
    (base / DEAD).touch()
    return base / "state.pt"


def two_directories_missing(base: Path, old_file: Path) -> Path:
    base.mkdir()
    return base / "runs" / "first" / "state.pt"


PLACES: dict[str, Callable[[Path, Path], Path]] = {
    "over an old file": over_an_old_file,
    "two directories missing": two_directories_missing,
}


@pytest.fixture(scope="module")
def figures() -> Iterator[Counter[str]]:
    figures: Counter[str] = Counter()
    yield figures
    report(
        "5 I/O errors, saver",
        f"{figures.total()} calls failed, one at a time, once or for good: {figures['saved']} saves recovered, "
        f"{figures['failed']} failed as they should, nothing left",
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize("error", ERRORS)
def test_every_call_may_fail(figures: Counter[str], old_file: Path, error: str, sticky: bool, place: str) -> None:
    """Call after call of a whole save is made to fail, until a save has fewer calls than that."""
    outcomes: list[str] = []
    passes = error in PASSING and not sticky
    with memory_directory() as directory:
        while True:
            number = len(outcomes)
            base = directory / str(number)
            fault = Fault(number, getattr(errno, error), sticky=sticky)
            outcome = save_with(fault, base, PLACES[place](base, old_file), must_recover=passes)
            if fault.hit is None:
                break
            outcomes.append(outcome)
    figures.update(outcomes)
    assert number > 15
    assert "saved" in outcomes
    assert "failed" in outcomes or passes


def save_with(fault: Fault, base: Path, path: Path, *, must_recover: bool) -> str:
    """One save with the fault, and all that must hold afterwards."""
    had_old = path.exists()
    with AsyncCheckpointSaver() as saver:
        with Seam(fault) as seam:
            handle = saver.save(state(2), path)
            failure = handle.exception(TIMEOUT_SECS)
        where = f"at call {fault.hit}"
        renamed = any(call.name == "rename" and call.succeeded for call in seam.calls)
        if failure is None:
            assert number_at(path) == 2, where
            assert_durable(seam.calls, str(path))
        else:
            assert fault.hit is not None, failure
            assert not must_recover, where
            assert isinstance(failure, CheckpointWriteError), where
            assert failure.errno == failure.__cause__.errno != 0, where  # type: ignore[union-attr]
            assert str(path) in str(failure), where
            if renamed:  # only the directory's sync failed: the new file is there, though not yet durable
                assert number_at(path) == 2, where
            elif had_old:
                assert number_at(path) == 1, where
            else:
                assert not path.exists(), where
        assert_new_files(seam.calls)
        if fault.hit is None or fault.hit.name != "unlink":
            assert temporaries(base) <= {DEAD}, where
        saver.save(state(3), path).result(TIMEOUT_SECS)
        assert number_at(path) == 3, where
    LocalStorage().sweep(str(path.parent))
    assert temporaries(base) == set(), where
    return "saved" if failure is None else "failed"


def assert_new_files(calls: list[Call]) -> None:
    """Every attempt wrote to a file of its own, and gave it up when its sync failed."""
    assert len(created_files(calls)) == len(set(created_files(calls)))
    for failed in (call for call in calls if call.name == "fsync" and not call.succeeded and call.is_on_temporary):
        later = [call.name for call in calls if call.path == failed.path and call.number > failed.number]
        assert set(later) <= {"unlink", "close"}, later


def created_files(calls: list[Call]) -> list[str]:
    return [call.path for call in calls if call.name == "open_file" and call.args[1] & os.O_CREAT]


# --- fsyncgate: the kernel reports a lost write once; the next fsync on that descriptor says that all is well ---


def failing_sync(of: str, directory: Path, num_failures: int) -> Callable[[Call], None]:
    num_failed = 0

    def before(call: Call) -> None:
        nonlocal num_failed
        meant = call.is_on_temporary if of == "file" else call.path == str(directory)
        if call.name == "fsync" and meant and num_failed < num_failures:
            num_failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return before


@pytest.mark.parametrize("of", ["file", "directory"])
@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_failed_sync_is_never_asked_again(tmp_path: Path, of: str, num_failures: int) -> None:
    """Each attempt gets a new file, written in full; only that one's own sync counts."""
    with AsyncCheckpointSaver(retries=2) as saver, Seam(failing_sync(of, tmp_path, num_failures)) as seam:
        saver.save(state(2), tmp_path / "state.pt").result(TIMEOUT_SECS)
    assert_durable(seam.calls, str(tmp_path / "state.pt"))
    assert_new_files(seam.calls)
    created = created_files(seam.calls)
    assert len(created) == num_failures + 1
    for path in created:
        written = sum(len(call.args[1]) for call in seam.named("pwrite") if call.path == path)
        assert written == (tmp_path / "state.pt").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt"}


@pytest.mark.parametrize("of", ["file", "directory"])
def test_without_retries_a_failed_sync_fails_the_save(tmp_path: Path, of: str) -> None:
    """Never acknowledged, whatever a second fsync would say."""
    with AsyncCheckpointSaver(retries=0) as saver, Seam(failing_sync(of, tmp_path, 1)) as seam:
        failure = saver.save(state(2), tmp_path / "state.pt").exception(TIMEOUT_SECS)
    assert isinstance(failure, CheckpointWriteError)
    assert failure.errno == errno.EIO
    assert len(created_files(seam.calls)) == 1
    assert temporaries(tmp_path) == set()


# --- what the user is told, and what goes on ---


def test_retries_are_told_and_counted(tmp_path: Path) -> None:
    """Each new attempt is an event with its cause; after the last one the error says what and where."""
    events: list[str] = []
    path = tmp_path / "state.pt"
    with AsyncCheckpointSaver(retries=3, on_event=lambda event: events.append(f"{event.kind} {event.detail}")) as saver:
        fault = Fault(number_of_call("pwrite", tmp_path / "probe.pt"), errno.EIO, sticky=True)
        with Seam(fault):
            failure = saver.save(state(2), path).exception(TIMEOUT_SECS)
    assert isinstance(failure, CheckpointWriteError)
    assert str(path) in str(failure)
    assert os.strerror(errno.EIO) in str(failure)
    retried = [event for event in events if event.startswith("retried")]
    assert len(retried) == 3
    assert all(os.strerror(errno.EIO) in event for event in retried)


def number_of_call(name: str, path: Path) -> int:
    with AsyncCheckpointSaver() as saver, Seam() as seam:
        saver.save(state(1), path).result(TIMEOUT_SECS)
    return seam.named(name)[0].number


def test_one_failure_does_not_harm_the_others(tmp_path: Path) -> None:
    """Of several saves under way, to several directories, only the one whose disk fails is lost."""

    def before(call: Call) -> None:
        if call.name == "pwrite" and "/bad/" in call.path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    handles: dict[str, SaveHandle] = {}
    with AsyncCheckpointSaver(num_workers=3, max_in_flight=3) as saver, Seam(before):
        for name in ("good", "bad", "fine"):
            handles[name] = saver.save(state(2), tmp_path / name / "state.pt")
        assert {name: type(handle.exception(TIMEOUT_SECS)) for name, handle in handles.items()} == {
            "good": type(None),
            "bad": CheckpointWriteError,
            "fine": type(None),
        }
    assert number_at(tmp_path / "good/state.pt") == number_at(tmp_path / "fine/state.pt") == 2


def test_closing_does_not_wait_for_the_disk_to_recover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`close` cuts the pause between two attempts short; the attempts that are left are still made."""
    monkeypatch.setattr(worker, "_FIRST_PAUSE_SECS", 10 * TIMEOUT_SECS)
    failed = threading.Event()

    def before(call: Call) -> None:
        if call.name == "pwrite" and not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Seam(before):
        saver = AsyncCheckpointSaver()
        handle = saver.save(state(2), tmp_path / "state.pt")
        assert failed.wait(TIMEOUT_SECS)
        saver.close(TIMEOUT_SECS)
    handle.result(0)
    assert number_at(tmp_path / "state.pt") == 2


@pytest.fixture(autouse=True)
def no_descriptor_is_left_open(no_pause: None) -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before
