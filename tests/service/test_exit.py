"""What happens to saves in flight when a process ends or forks: real processes, real exits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import asyncckpt

# A disk that takes its time, so that every exit comes before the save is durable.
SLOW_DISK = """
import os, sys, threading, time, torch, asyncckpt
from asyncckpt.storage import system_calls
fsync = system_calls.fsync
def slow(fd):
    time.sleep(0.3)
    fsync(fd)
system_calls.fsync = slow
state = {"weights": torch.arange(100_000.0)}
"""

BROKEN_DISK = """
import errno, os, sys, threading, torch, asyncckpt
from asyncckpt.storage import system_calls
def broken(fd):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
system_calls.fsync = broken
state = {"weights": torch.arange(100_000.0)}
"""


def run(code: str, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code], cwd=directory, capture_output=True, text=True, timeout=120
    )


def assert_whole(path: Path) -> None:
    assert torch.equal(asyncckpt.load(path)["weights"], torch.arange(100_000.0))


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("pass", 0),
        ("sys.exit()", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError('of the trainer')", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
    ],
)
def test_exit_flushes(ending: str, code: int, tmp_path: Path) -> None:
    result = run(f"{SLOW_DISK}\nasyncckpt.save(state, 'a.pt')\n{ending}", tmp_path)
    assert result.returncode == code, result.stderr
    assert_whole(tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_exit_flushes_every_saver(tmp_path: Path) -> None:
    """The drop-in's, one that nobody closed, and one that nobody even kept."""
    code = """
saver = asyncckpt.AsyncCheckpointSaver()
saver.save(state, "a.pt")
asyncckpt.AsyncCheckpointSaver(2).save(state, "b.pt")
asyncckpt.save(state, "c.pt")
"""
    result = run(SLOW_DISK + code, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    for name in ("a.pt", "b.pt", "c.pt"):
        assert_whole(tmp_path / name)


def test_saves_of_a_thread_that_outlives_the_main_thread(tmp_path: Path) -> None:
    code = """
asyncckpt.save(state, "a.pt")
main = threading.main_thread()
def late():
    main.join()
    asyncckpt.save(state, "b.pt")
threading.Thread(target=late).start()
"""
    result = run(SLOW_DISK + code, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert_whole(tmp_path / "a.pt")
    assert_whole(tmp_path / "b.pt")


def test_a_save_in_an_exit_handler(tmp_path: Path) -> None:
    code = """
import atexit
asyncckpt.prepare(state)
atexit.register(lambda: asyncckpt.save(state, "a.pt"))
"""
    result = run(SLOW_DISK + code, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert_whole(tmp_path / "a.pt")


def test_a_save_in_an_exit_handler_registered_before_the_first_save(tmp_path: Path) -> None:
    code = """
import atexit
atexit.register(lambda: asyncckpt.save(state, "late.pt"))
asyncckpt.save(state, "a.pt")
"""
    result = run(SLOW_DISK + code, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert_whole(tmp_path / "late.pt")


def test_a_failing_disk_turns_success_into_74(tmp_path: Path) -> None:
    result = run(BROKEN_DISK + "print('trained')\nasyncckpt.save(state, 'a.pt')", tmp_path)
    assert result.returncode == 74
    assert result.stdout == "trained\n"
    assert "a.pt was not saved: No space left on device" in result.stderr
    assert "exiting with code 74" in result.stderr
    assert os.listdir(tmp_path) == []


def test_the_exit_code_of_an_exception_stays(tmp_path: Path) -> None:
    result = run(BROKEN_DISK + "asyncckpt.save(state, 'a.pt')\nraise RuntimeError('of the trainer')", tmp_path)
    assert result.returncode == 1
    assert "a.pt was not saved" in result.stderr
    assert "of the trainer" in result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "asyncckpt.AsyncCheckpointSaver(exit_code=None).save(state, 'a.pt')",
        "asyncckpt.save(state, 'a.pt').exception()",
    ],
    ids=["switched off", "looked at"],
)
def test_when_the_exit_code_is_left_alone(code: str, tmp_path: Path) -> None:
    result = run(BROKEN_DISK + code, tmp_path)
    assert result.returncode == 0
    assert "a.pt was not saved" in result.stderr


def test_failure_callbacks_run_before_the_exit(tmp_path: Path) -> None:
    code = """
def failed(handle, error):
    print("told of", os.path.basename(handle.path), flush=True)
saver = asyncckpt.AsyncCheckpointSaver(on_failure=failed)
saver.save(state, "a.pt")
"""
    result = run(BROKEN_DISK + code, tmp_path)
    assert (result.returncode, result.stdout) == (74, "told of a.pt\n")


def test_a_stuck_disk_cannot_hold_up_the_exit_for_ever(tmp_path: Path) -> None:
    code = """
system_calls.fsync = lambda fd: threading.Event().wait()
asyncckpt.AsyncCheckpointSaver(exit_timeout_secs=0.2).save(state, "a.pt")
"""
    result = run(SLOW_DISK + code, tmp_path)
    assert result.returncode == 74
    assert "at exit, after 0.2 s: 1 of 1 saves are not durable yet" in result.stderr


FORK = """
import multiprocessing, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 on forking beside threads: what DataLoaders do
context = multiprocessing.get_context("fork")
"""


def test_forked_children_neither_hang_nor_write(tmp_path: Path) -> None:
    """They may run exit handlers, close the saver they inherited, and make their own."""
    code = """
saver = asyncckpt.AsyncCheckpointSaver()
saver.save(state, "a.pt")
asyncckpt.save(state, "b.pt")
def child():
    for call in (lambda: saver.save(state, "never.pt"), saver.wait, lambda: saver.prepare(state)):
        try:
            call()
        except asyncckpt.SaverClosedError as error:
            assert "which forked this one" in str(error)
        else:
            raise AssertionError
    saver.close()
    asyncckpt.wait()
    torch.set_num_threads(1)  # as DataLoader workers do: OpenMP's threads did not survive the fork
    asyncckpt.save(state, "child.pt").result(60)
process = context.Process(target=child)
process.start()
process.join(60)
assert process.exitcode == 0, process.exitcode
saver.wait(60)
"""
    result = run(SLOW_DISK + FORK + code, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt", "child.pt"]


def test_a_plain_fork_ends_without_flushing(tmp_path: Path) -> None:
    """os.fork and a normal end: the child's exit handlers must not write or wait for the parent's saves."""
    code = """
system_calls.fsync = lambda fd: (started.set(), gate.wait(), fsync(fd))
started, gate = threading.Event(), threading.Event()
handle = asyncckpt.save(state, "a.pt")
started.wait()
pid = os.fork()
if pid == 0:
    sys.exit(5)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 5, status
assert not handle.done()
gate.set()
handle.result(60)
"""
    result = run(SLOW_DISK + FORK + code, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert_whole(tmp_path / "a.pt")


def test_a_live_child_keeps_neither_memory_nor_descriptors(tmp_path: Path) -> None:
    code = """
import signal
saver = asyncckpt.AsyncCheckpointSaver()
saver.save({"weights": torch.zeros(10_000_000)}, "a.pt").result()
def held():
    # How often the image shows up among the descriptors, and among the mappings.
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass  # the listing's own
    with open("/proc/self/maps") as maps:
        return sum("memfd:asyncckpt" in target for target in targets), maps.read().count("memfd:asyncckpt")
assert held() == (1, 1), held()
pid = os.fork()
if pid == 0:
    os._exit(0 if held() == (0, 0) else 1)
assert os.waitpid(pid, 0)[1] == 0
saver.close()
assert held() == (0, 0), held()
"""
    result = run(SLOW_DISK + FORK + code, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_dataloader_with_forked_workers_beside_saves(tmp_path: Path) -> None:
    code = """
from torch.utils.data import DataLoader
loader = DataLoader(range(64), batch_size=4, num_workers=2, multiprocessing_context="fork", persistent_workers=True)
for epoch in range(3):
    for batch in loader:
        pass
    asyncckpt.save(state, f"{epoch}.pt")
"""
    result = run(SLOW_DISK + FORK + code, tmp_path)
    assert result.returncode == 0, result.stderr
    for epoch in range(3):
        assert_whole(tmp_path / f"{epoch}.pt")


def test_importing_asyncckpt_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, asyncckpt; asyncckpt.CheckpointError; assert 'torch' not in sys.modules, 'torch'"
    assert run(code, tmp_path).returncode == 0


@pytest.mark.parametrize(
    "module", ["storage.local", "image.layout", "image.arena", "image.checksum", "image.verify", "service.worker"]
)
def test_the_writer_side_imports_no_torch(module: str, tmp_path: Path) -> None:
    code = f"import sys, asyncckpt.{module}; assert 'torch' not in sys.modules, 'torch'"
    assert run(code, tmp_path).returncode == 0
