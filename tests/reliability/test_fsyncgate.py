"""fsyncgate: the kernel tells of a lost write once, and the next fsync on that descriptor says that all is well."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from storage.seam import FUNCTIONS, Seam, assert_durable
from storage.test_faults import assert_new_files

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointWriteError
from asyncckpt.service import worker
from asyncckpt.storage import local, system_calls
from reliability.faulty_disk import FaultyDisk, faulty_disk
from reliability.gates import count, report
from reliability.test_io_errors import Process, check_as_a_reader

NUM_SAVES = count(3, full=50)  # each with a fault of its own
TIMEOUT_SECS = 60.0


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyDisk]:
    """Written to through the page cache: past it, the write itself would fail."""
    monkeypatch.setattr(local, "_O_DIRECT", 0)
    monkeypatch.setattr(worker, "_FIRST_PAUSE_SECS", 0)
    with faulty_disk() as disk:
        yield disk


class RefusingOnce:
    """An fsync during whose `number`-th call for a file, not a directory, the disk refuses what is written to it."""

    def __init__(self, disk: FaultyDisk, number: int) -> None:
        self.num_failed = 0
        self._disk, self._number, self._num_files = disk, number, 0

    def __call__(self, fd: int) -> None:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self._num_files += is_file
        if not is_file or self._num_files != self._number:
            FUNCTIONS["fsync"](fd)
            return
        self._disk.refusing.touch()
        try:
            FUNCTIONS["fsync"](fd)
        except OSError:
            self.num_failed += 1
            raise
        finally:
            self._disk.refusing.unlink()


@contextmanager
def refusing_once(disk: FaultyDisk, number: int) -> Iterator[Seam]:
    refusing = RefusingOnce(disk, number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system_calls, "fsync", refusing)
        with Seam() as seam:
            yield seam
    assert refusing.num_failed == 1
    assert_new_files(seam.calls)


def test_this_kernel_forgets_a_lost_write(disk: FaultyDisk) -> None:
    """What the gate is about: without it the tests below would show nothing."""
    path = disk.mount / "file"
    content = os.urandom(100_000)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, content, 0)
        disk.refusing.touch()
        with pytest.raises(OSError, match="Input/output error"):
            os.fsync(fd)
        disk.refusing.unlink()
        os.fsync(fd)
    finally:
        os.close(fd)
    disk.file_system.cut()
    disk.file_system.restore()
    assert path.read_bytes() != content


def state(number: int) -> dict[str, object]:
    return {"number": number, "weights": torch.full((20_000,), float(number))}


def number_at(path: Path) -> int:
    """Which state is in the file; fails unless all of it is."""
    loaded = asyncckpt.load(path, mmap=False)
    number = int(loaded["number"])
    assert torch.equal(loaded["weights"], torch.full((20_000,), float(number)))
    return number


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("retries", [0, 2], ids=["no retries", "retries"])
def test_plain_saves(disk: FaultyDisk, retries: int) -> None:
    """Acknowledged only from another file, written anew, which is there after a power cut; without retries, not at
    all, and the old file is there."""
    path = disk.mount / "state.pt"
    with AsyncCheckpointSaver() as saver:
        saver.save(state(0), path).result(TIMEOUT_SECS)
    expected = 0
    for number in range(1, NUM_SAVES + 1):
        with AsyncCheckpointSaver(retries=retries) as saver, refusing_once(disk, 1) as seam:
            failure = saver.save(state(number), path).exception(TIMEOUT_SECS)
        if retries:
            assert failure is None
            assert_durable(seam.calls, str(path))
            expected = number
        else:
            assert isinstance(failure, CheckpointWriteError)
            assert failure.errno == errno.EIO
        disk.file_system.cut()
        disk.file_system.restore()
        assert number_at(path) == expected
        assert [entry.name for entry in disk.mount.glob("*.pt")] == ["state.pt"]
    what = "saved again to a new file" if retries else "not acknowledged"
    report("6 fsyncgate, saver", f"{NUM_SAVES} fsyncs failed once on a faulty disk: {what}, 0 lost in a power cut")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("victim", [1, 2], ids=["checkpoint", "registry"])
def test_managed_saves(disk: FaultyDisk, victim: int) -> None:
    """The same, whether it is the checkpoint's file whose fsync fails or the registry's."""
    path = disk.mount / "run"
    for number in range(NUM_SAVES):
        process = Process(path, number)
        with closing(process.manager), refusing_once(disk, victim) as seam:
            assert process.save(1 / (number + 1)) is None
        assert_durable(seam.calls, str(path / "registry.json"))
        disk.file_system.cut()
        disk.file_system.restore()
        check_as_a_reader(path, number + 1, f"save {number}")
    report(
        f"6 fsyncgate, manager, {'checkpoint' if victim == 1 else 'registry'}",
        f"{NUM_SAVES} fsyncs failed once on a faulty disk: saved again to a new file, 0 lost in a power cut",
    )
