"""Errors that the kernel itself gives to a managing process: a full disk, too large a file, a file system that is
read-only after an error, an fsync that fails."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from storage.mounts import memory_directory, small_file_system

from asyncckpt.service import worker
from reliability.gates import count, not_checked, report
from reliability.power import powered_file_system
from reliability.saving_server import Managed, Order
from reliability.test_io_errors import Process, check_afterwards, check_as_a_reader, old_run
from reliability.test_manager_sigkill import NUM_KEPT, acknowledged, copy_scene
from reliability.test_sigkill import Server

PAGE_BYTES = 4096
MOST_PAGES = 16  # more than a save needs
NUM_SAVES = 8
NUM_RUNS = count(3, full=100)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_FIRST_PAUSE_SECS", 0)


def save_under_an_error(process: Process, path: Path, errors: set[int], where: str) -> bool:
    """Two saves; whether one of them failed, which only these errors may be the reason for."""
    newest, has_failed = process.step, False
    for loss in (2.0, 6.0):
        failure = process.save(loss)
        assert failure is None or failure.errno in errors, f"{where}: {failure!r}"
        newest, has_failed = (newest, True) if failure else (process.step, has_failed)
    check_as_a_reader(path, newest, where)
    return has_failed


def test_full_disk(tmp_path: Path) -> None:
    """With room for no page more, for one, for two, …: the kernel writes a part of what it should, then ENOSPC."""
    num_failed = 0
    with memory_directory() as base, small_file_system(tmp_path / "mount", "size=1m") as mount:
        scene, step = old_run(base)
        for num_pages in range(MOST_PAGES):
            where = f"room for {num_pages} pages"
            path = copy_scene(scene, mount / "run")
            process = Process(path, step)
            assert process.save(3.5) is None  # the directory is open
            fill(mount, num_pages)
            num_failed += save_under_an_error(process, path, {errno.ENOSPC}, where)
            (mount / "ballast").unlink()
            check_afterwards(process, path, where)
            shutil.rmtree(path)
    report("5 I/O errors, full disk", f"room for 0 to {MOST_PAGES - 1} pages: {num_failed} times a save failed, 0 lost")
    assert 0 < num_failed < MOST_PAGES


def fill(mount: Path, num_pages: int) -> None:
    status = os.statvfs(mount)
    (mount / "ballast").write_bytes(bytes((status.f_bavail - num_pages) * status.f_bsize))


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_limit_on_file_size() -> None:
    """ulimit -f, from nothing to more than a checkpoint: the registry may be too large, or just the checkpoint."""
    num_failed = 0
    limits = range(0, MOST_PAGES * PAGE_BYTES, PAGE_BYTES // 2)
    with memory_directory() as base:
        scene, step = old_run(base)
        for num_bytes in limits:
            where = f"no file above {num_bytes} bytes"
            path = copy_scene(scene, base / "run")
            process = Process(path, step)
            with largest_file(num_bytes):
                num_failed += save_under_an_error(process, path, {errno.EFBIG}, where)
            check_afterwards(process, path, where)
            shutil.rmtree(path)
    report("5 I/O errors, ulimit -f", f"{len(limits)} limits: {num_failed} times a save failed, 0 lost")
    assert 0 < num_failed < len(limits)


def test_read_only_after_an_error() -> None:
    """As ext4 becomes when its journal fails, under a manager that has it open: saves fail, what was acknowledged loads
    in the same process, and the next one goes on once it is repaired."""
    with memory_directory() as base, powered_file_system("ext4") as file_system:
        scene, step = old_run(base)
        path = copy_scene(scene, file_system.mount / "run")
        subprocess.run(["sync", "--file-system", str(path)], check=True)
        process = Process(path, step)
        assert process.save(2.0) is None
        subprocess.run(["mount", "-o", "remount,abort", str(file_system.mount)], check=False, stderr=subprocess.DEVNULL)
        newest = process.step
        assert save_under_an_error(process, path, {errno.EROFS, errno.EIO, errno.ESHUTDOWN}, "aborted")
        check_as_a_reader(path, newest, "aborted")
        process.close()
        file_system.restore()
        check_as_a_reader(path, newest, "repaired")
        check_afterwards(Process(path, newest), path, "repaired")
    report("5 I/O errors, read-only", "ext4 aborted under a manager: no save acknowledged, 0 lost")


# Of each thread's calls: a managed save makes about six, all on the worker.
EVERY_11TH, ALL_LATER = "every 11th from the 5th", "all from the 9th"
RULES = {EVERY_11TH: "5+11", ALL_LATER: "9+"}
FAILED = re.compile(r"fsync\(\d+<([^>]*)>.*\(INJECTED\)")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rule", RULES)
def test_fsync_fails_in_a_process(rule: str) -> None:
    """strace makes the system call fail: the save goes on with another file, or fails, and nothing acknowledged is
    lost; no file is synced again whose sync has failed."""
    if shutil.which("strace") is None:
        not_checked("strace is not installed")
    num_acks = 0
    with memory_directory() as base:
        record = base / "record"
        inject = ["-e", "trace=fsync", "-e", f"inject=fsync:error=EIO:when={RULES[rule]}"]
        server = Server(["strace", "-f", "-y", "--seccomp-bpf", *inject, "-o", str(record)])
        try:
            for run in range(NUM_RUNS):
                path = base / str(run)
                managed = Managed([3.0, 5.0, 2.0], NUM_KEPT)
                server.start(Order([str(path)], 1, NUM_SAVES, num_tensors=2, numel=2000, managed=managed))
                lines = server.lines_until_end()
                acks = acknowledged(lines)
                assert len(acks) == NUM_SAVES if rule == EVERY_11TH else 0 < len(acks) < NUM_SAVES
                check_as_a_reader(path, max([0, *(entry.number for entry in acks)]), rule)
                check_afterwards(Process(path, NUM_SAVES), path, rule)
                num_acks += len(acks)
        finally:
            server.close()
        synced = [line for line in record.read_text().splitlines() if "fsync(" in line]
    failed = [match.group(1) for line in synced if (match := FAILED.search(line))]
    on_files = [name for name in failed if name.endswith(".tmp")]
    for name in on_files:
        assert sum(f"<{name}>" in line for line in synced) == 1, name
    report(
        f"5 I/O errors, fsync by strace, {rule}", f"{len(failed)} failed: {num_acks} checkpoints acknowledged, 0 lost"
    )
    assert on_files
    assert num_acks
