"""The file system fails, at every call that the manager's small operations make: old or new, whole, nothing left."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncckpt.naming import LOCK_NAME
from asyncckpt.storage.local import LocalStorage
from storage.mounts import memory_directory
from storage.observe import names, no_descriptor_leaks, temporaries
from storage.seam import Fault, Seam, assert_directory_synced, assert_durable
from storage.test_links import only_way

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EINTR", "EROFS", "ESTALE")
OLD, NEW = b"old", b"new" * 5000
STORAGE = LocalStorage()


def every_call_fails(
    error: str, sticky: bool, attempt: Callable[[Path, Fault], bool], least_calls: int
) -> tuple[int, int]:
    """Attempt something with a fault at its first call, its second …; how often it succeeded and failed."""
    outcomes: list[bool] = []
    with memory_directory() as directory:
        while True:
            base = directory / str(len(outcomes))
            base.mkdir()
            fault = Fault(len(outcomes), getattr(errno, error), sticky=sticky)
            with no_descriptor_leaks():
                succeeded = attempt(base, fault)
            assert succeeded or fault.hit is not None
            if fault.hit is None:
                break
            outcomes.append(succeeded)
    assert len(outcomes) >= least_calls
    return outcomes.count(True), outcomes.count(False)


def succeeds(operation: Callable[[], object], fault: Fault, seam: Seam) -> bool:
    with seam:
        try:
            operation()
        except OSError as error:
            raised: OSError | None = error
        else:
            raised = None
    assert raised is None or raised.errno == fault.error_number, f"at call {fault.hit}"
    return raised is None


def assert_nothing_left(base: Path, fault: Fault, expected: set[str]) -> None:
    """But for a temporary file that could not be removed, which a sweep removes later."""
    if fault.hit is None or fault.hit.name != "unlink":
        assert temporaries(base) == [], f"at call {fault.hit}"
    STORAGE.sweep(str(base))
    assert names(base) == expected, f"at call {fault.hit}"


def assert_written(seam: Seam, base: Path, fault: Fault, succeeded: bool, had: bytes | None, wanted: bytes) -> None:
    """The file holds what was wanted, durably, or, after an error, what it had."""
    where = f"at call {fault.hit}"
    path = base / "file"
    renamed = any(call.name == "rename" and call.succeeded for call in seam.calls)
    if succeeded or renamed:  # after an error only the directory's sync failed
        assert path.read_bytes() == wanted, where
    else:
        assert (path.read_bytes() if path.exists() else None) == had, where
    if succeeded:
        assert_durable(seam.calls, str(path))


@pytest.mark.parametrize("old", [OLD, None], ids=["over an old file", "where there is none"])
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize("error", ERRORS)
def test_replacing(error: str, sticky: bool, old: bytes | None) -> None:
    """Done again without the fault it succeeds."""

    def attempt(base: Path, fault: Fault) -> bool:
        path = base / "file"
        if old is not None:
            path.write_bytes(old)
        seam = Seam(fault)
        succeeded = succeeds(lambda: STORAGE.replace(str(path), NEW), fault, seam)
        assert_written(seam, base, fault, succeeded, old, NEW)
        assert_nothing_left(base, fault, {"file"} if path.exists() else set())
        STORAGE.replace(str(path), b"newer")
        assert path.read_bytes() == b"newer"
        return succeeded

    num_succeeded, num_failed = every_call_fails(error, sticky, attempt, least_calls=12)
    assert num_succeeded  # a close may fail, and the hold on the old file
    assert num_failed


@pytest.mark.parametrize("old", [OLD, None, NEW], ids=["over an old file", "where there is none", "onto itself"])
@pytest.mark.parametrize("way", ["clone", "hard link", "copy"])
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize("error", ERRORS)
def test_linking(monkeypatch: pytest.MonkeyPatch, error: str, sticky: bool, way: str, old: bytes | None) -> None:
    """The source stays as it was; done again without the fault it succeeds."""
    only_way(monkeypatch, way)

    def attempt(base: Path, fault: Fault) -> bool:
        source, path = base / "source", base / "file"
        source.write_bytes(NEW)
        if old == NEW:
            path.hardlink_to(source)
        elif old is not None:
            path.write_bytes(old)
        seam = Seam(fault)
        succeeded = succeeds(lambda: STORAGE.link(str(source), str(path)), fault, seam)
        assert_written(seam, base, fault, succeeded, old, NEW)
        assert source.read_bytes() == NEW
        assert_nothing_left(base, fault, {"source", "file"} if path.exists() else {"source"})
        STORAGE.link(str(source), str(path))
        assert path.read_bytes() == source.read_bytes() == NEW
        return succeeded

    num_succeeded, num_failed = every_call_fails(error, sticky, attempt, least_calls=12)
    assert num_succeeded
    assert num_failed


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize("error", ERRORS)
def test_deleting(error: str, sticky: bool) -> None:
    """Acknowledged means gone for good; other files stay; done again without the fault it succeeds."""

    def attempt(base: Path, fault: Fault) -> bool:
        for name in ("a", "b", "c"):
            (base / name).touch()
        seam = Seam(fault)
        doomed = [str(base / name) for name in ("a", "b")]
        succeeded = succeeds(lambda: STORAGE.delete(doomed), fault, seam)
        assert "c" in names(base)
        if succeeded:
            assert names(base) == {"c"}
            assert_directory_synced(seam.calls, seam.named("unlink")[-1], str(base))
        STORAGE.delete(doomed)
        assert names(base) == {"c"}
        return succeeded

    num_succeeded, num_failed = every_call_fails(error, sticky, attempt, least_calls=5)
    assert num_succeeded == 1  # the directory's close
    assert num_failed


@pytest.mark.parametrize("operation", ["read", "list_names"])
@pytest.mark.parametrize("error", ERRORS)
def test_reading(error: str, operation: str) -> None:
    """An error, or the whole answer."""

    def attempt(base: Path, fault: Fault) -> bool:
        (base / "file").write_bytes(NEW)
        answers: list[object] = []

        def read() -> None:
            if operation == "read":
                answers.append(STORAGE.read(str(base / "file"), len(NEW)))
            else:
                answers.append(STORAGE.list_names(str(base)))

        succeeded = succeeds(read, fault, Seam(fault))
        assert answers == ([NEW if operation == "read" else ["file"]] if succeeded else [])
        return succeeded

    _, num_failed = every_call_fails(error, False, attempt, least_calls=1)
    assert num_failed


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize("error", ERRORS)
def test_locking(error: str, sticky: bool) -> None:
    """Had or not; who has it keeps others out, and a release always lets them in."""

    def attempt(base: Path, fault: Fault) -> bool:
        directory = base / "d"

        def lock_and_release() -> None:
            lock = STORAGE.lock(str(directory), "me")
            lock.release()

        succeeded = succeeds(lock_and_release, fault, Seam(fault))
        if directory.exists():
            assert names(directory) <= {LOCK_NAME}
        lock = STORAGE.lock(str(directory), "next")
        with pytest.raises(BlockingIOError, match="next"):
            STORAGE.lock(str(directory), "other")
        lock.release()
        return succeeded

    num_succeeded, num_failed = every_call_fails(error, sticky, attempt, least_calls=12)
    assert num_succeeded  # what it says of the holder may fail
    assert num_failed
