"""What goes wrong around a training run, and passes: clear errors, nothing lost, and the next save is a success."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from storage.mounts import small_file_system, without_privileges
from storage.seam import Call, Seam

from asyncckpt import CheckpointManager, CheckpointWriteError
from reliability.gates import not_checked
from reliability.training_loop import NUM_KEPT, TIMEOUT_SECS, Loop
from reliability.writers import WRITERS, writer_options

MEBIBYTE = 1 << 20
each_writer = pytest.mark.parametrize("writer", WRITERS)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        not_checked(f"mounting is refused here: {done.stderr.strip()}")


@contextmanager
def mounted(source: Path, target: Path) -> Iterator[None]:
    """The same file system a second time, without anybody who writes through this mount."""
    if os.geteuid() != 0:
        not_checked("mounting needs root")
    mount("--bind", str(source), str(target))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(target)], check=True)


@each_writer
def test_a_disk_that_is_full_for_a_while(tmp_path: Path, writer: str) -> None:
    """With room again the next save succeeds, and so it does when a smaller file finds room."""
    with small_file_system(tmp_path / "mount", "size=12m") as disk, Loop(disk / "run", writer, 250_000) as loop:
        for _ in range(NUM_KEPT + 1):
            loop.succeed()
        for _ in range(2):
            ballast = disk / "ballast"
            with ballast.open("wb") as file:
                usage = os.statvfs(disk)
                file.write(bytes(usage.f_bavail * usage.f_frsize - 100_000))
            for _ in range(2):
                loop.fail(errno.ENOSPC, "No space left", "free some space")
                loop.check()
            ballast.unlink()
            loop.succeed()


@each_writer
def test_inodes_that_are_used_up_for_a_while(tmp_path: Path, writer: str) -> None:
    """Room there is, but not for one more name."""
    options = f"size=12m,nr_inodes={2 + 2 + NUM_KEPT + 5}"
    with small_file_system(tmp_path / "mount", options) as disk, Loop(disk / "run", writer) as loop:
        for _ in range(NUM_KEPT):
            loop.succeed()
        made = [disk / str(number) for number in range(os.statvfs(disk).f_favail)]
        for name in made:
            name.touch()
        loop.fail(errno.ENOSPC, "free some space")
        loop.check()
        for name in made:
            name.unlink()
        loop.succeed()


def test_a_quota_that_is_used_up_for_a_while(tmp_path: Path) -> None:
    """The kernel's answer is injected at every call that takes room, since few machines have quotas."""

    def over(call: Call) -> None:
        if call.name in ("allocate", "pwrite"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with Loop(tmp_path / "run") as loop:
        for _ in range(NUM_KEPT):
            loop.succeed()
        with Seam(over):
            loop.fail(errno.EDQUOT, "quota")
        loop.succeed()


@each_writer
def test_read_only_for_a_while(tmp_path: Path, writer: str) -> None:
    """EROFS, and that it is the file system which is read-only."""
    path = tmp_path / "run"
    with Loop(path, writer) as loop:
        loop.succeed()
        with mounted(path, path):
            mount("-o", "remount,bind,ro", str(path))
            for _ in range(2):
                loop.fail(errno.EROFS, "read-only")
                loop.check()
        loop.succeed()


@each_writer
def test_a_directory_that_is_removed(tmp_path: Path, writer: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is made anew by the next save, as the same run's, and the log says what is gone."""
    path = tmp_path / "run"
    with Loop(path, writer) as loop:
        loop.succeed()
        run_id = loop.manager._directory.registry.run_id
        shutil.rmtree(path)
        loop.acknowledged.clear()
        loop.succeed()
        assert "removed under this run" in caplog.text
        assert loop.manager._directory.registry.run_id == run_id
        loop.succeed()


@each_writer
def test_a_directory_that_can_not_be_made_anew(tmp_path: Path, writer: str) -> None:
    """A file has its name by now: saves fail, training goes on, and all is well once that has gone."""
    path = tmp_path / "run"
    with Loop(path, writer, max_consecutive_failures=9) as loop:
        loop.succeed()
        path.rename(tmp_path / "elsewhere")
        path.touch()
        for _ in range(4):
            loop.fail(errno.ENOTDIR, "a part of this path is a file")
        assert path.read_bytes() == b""
        path.unlink()
        (tmp_path / "elsewhere").rename(path)
        loop.succeed()


@each_writer
def test_a_directory_that_is_another_runs_for_a_while(tmp_path: Path, writer: str) -> None:
    """Swapped under the run: the other one's is left as it is, byte for byte, and our own goes on once it is back."""
    path, aside, other = tmp_path / "run", tmp_path / "aside", tmp_path / "other"
    with Loop(other) as stranger:
        for _ in range(NUM_KEPT):
            stranger.succeed()
    with Loop(path, writer) as loop:
        for _ in range(NUM_KEPT):
            loop.succeed()
        path.rename(aside)
        other.rename(path)
        before = contents(path)
        for _ in range(2):
            loop.fail(None, "another run's directory", "put this run's back")
        with pytest.raises(CheckpointWriteError, match="another run's directory"):
            loop.manager.prune()
        assert contents(path) == before
        path.rename(other)
        aside.rename(path)
        loop.succeed()


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("where", ["write", "commit"])
def test_a_directory_that_becomes_another_runs_in_mid_save(tmp_path: Path, where: str) -> None:
    """What is being written then is neither put there, nor into that run's registry."""
    path, other = tmp_path / "run", tmp_path / "other"
    with Loop(other) as stranger:
        stranger.succeed()
    reached, swapped = threading.Event(), threading.Event()

    def hold(call: Call) -> None:
        is_write = call.name == "pwrite"
        is_commit = call.name == "fsync" and "checkpoint_" in call.path
        if (is_write if where == "write" else is_commit) and not reached.is_set():
            reached.set()
            assert swapped.wait(TIMEOUT_SECS)

    with Loop(path) as loop:
        for _ in range(2):
            loop.succeed()
        with Seam(hold):
            handle = loop.save()
            assert reached.wait(TIMEOUT_SECS)
            swap(path, other)
            before = contents(path)
            swapped.set()
            loop.expect_failure(handle, None, "another run's directory")
        assert contents(path) == before
        swap(path, other)
        assert loop.save().result(TIMEOUT_SECS).global_step == 4
    with Loop(path) as resumed:  # sweeps what could not be removed then: it was not where it had been written
        _, checkpoint = resumed.manager.load_latest(resumed.model, resumed.optimizer)
        resumed.step, resumed.acknowledged = checkpoint["global_step"], [1, 2, 4]
        resumed.succeed()


@each_writer
@pytest.mark.parametrize("is_parent", [False, True], ids=["the directory itself", "what it is in"])
def test_a_file_system_that_is_unmounted_for_a_while(tmp_path: Path, writer: str, is_parent: bool) -> None:
    """Nothing is put into the mount point, where nobody would look for it; mounted again, the run goes on."""
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    path = target / "run" if is_parent else target
    with small_file_system(source, "size=12m"):
        with mounted(source, target):
            loop = Loop(path, writer)
            for _ in range(NUM_KEPT):
                loop.succeed()
        assert list(target.iterdir()) == []
        for _ in range(2):
            loop.fail(None, "another file system", "mount")
        assert list(target.iterdir()) == []
        with mounted(source, target), loop:
            loop.succeed()


@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_permissions_that_are_gone_for_a_while(mode: int) -> None:
    """EACCES, and whose right is missing. (Threads only: a writer process started by root would stay root.)"""
    with tempfile.TemporaryDirectory() as directory:  # not tmp_path, whose parents nobody but its owner may enter
        os.chmod(directory, 0o777)
        with without_privileges():
            path = Path(directory) / "run"
            with Loop(path) as loop:
                loop.succeed()
                path.chmod(mode)
                for _ in range(2):
                    loop.fail(errno.EACCES, "must be writable by this user")
                path.chmod(0o755)
                loop.succeed()
            shutil.rmtree(path)


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        while True:
            try:
                fillers.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        yield
    finally:
        for filler in fillers:
            os.close(filler)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_out_of_descriptors_for_a_while(tmp_path: Path) -> None:
    """EMFILE, and what to do. (Threads only: a writer process has a limit of its own.)"""
    with Loop(tmp_path / "run") as loop:
        for _ in range(NUM_KEPT):
            loop.succeed()
        with no_more_descriptors():
            handle = loop.save()
            assert handle.wait_over(TIMEOUT_SECS)
        loop.expect_failure(handle, errno.EMFILE, "ulimit -n")
        loop.check()
        loop.succeed()


LITTLE_MEMORY = """
import resource, sys, threading, time
from pathlib import Path
import pytest, torch
from asyncckpt import CheckpointManager
from reliability.training_loop import Loop
from reliability.writers import writer_options

def limit(num_bytes):
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + num_bytes, resource.RLIM_INFINITY))

def lift():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

with Loop(Path(sys.argv[1]), sys.argv[2]) as loop:
    loop.succeed()
    loop.model.append(torch.nn.Parameter(torch.full((32 << 20,), 1.0)))
    loop.model[1].grad = torch.full_like(loop.model[1], -1.0)
    loop.optimizer.add_param_group({"params": [loop.model[1]]})
    limit(64 << 20)
    for _ in range(2):
        with pytest.raises(MemoryError, match="checkpoint buffer of .* bytes: .*memory_limit"):
            loop.save()
    before = set(threading.enumerate())
    num_refused = 0
    for num_mebibytes in range(4, 400, 8):  # for none of its threads, for the first, the first two, …
        limit(num_mebibytes << 20)
        try:
            CheckpointManager(Path(sys.argv[1]) / "other", **writer_options(sys.argv[2])).close(60)
            break
        except (RuntimeError, MemoryError):
            num_refused += 1
        finally:
            lift()
            deadline = time.monotonic() + 30
            while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
                next(iter(left)).join(0.1)
            assert not left, left
    assert 3 < num_refused < 49, num_refused
    loop.succeed()
"""


@each_writer
def test_out_of_memory_for_a_while(tmp_path: Path, writer: str) -> None:
    """No address space for an image, nor for one more thread: MemoryError says what to do, and nothing is left over."""
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path / "run"), writer],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@each_writer
def test_many_failures_in_a_row(tmp_path: Path, writer: str) -> None:
    """`save` itself raises at times, so that an outage can't be overlooked; training that goes on all the same saves
    again as soon as it can."""
    path = tmp_path / "run"
    with Loop(path, writer, max_consecutive_failures=3) as loop:
        loop.succeed()
        path.rename(tmp_path / "elsewhere")
        path.touch()
        raised = [_raised(loop.save) for _ in range(12)]
        assert [index for index, error in enumerate(raised) if error] == [3, 5, 7, 9, 11]
        assert all("training goes on without checkpoints" in str(error) for error in raised if error)
        path.unlink()
        (tmp_path / "elsewhere").rename(path)
        handle = loop.save()
        assert handle.result(TIMEOUT_SECS).global_step == loop.step
        with pytest.raises(CheckpointWriteError) as caught:
            loop.manager.wait(TIMEOUT_SECS)
        assert len(caught.value.failures) == 7
    reader = CheckpointManager(path, NUM_KEPT, **writer_options(writer))
    assert [info.global_step for info in reader.list_checkpoints()] == [1, loop.step]
    reader.close()


def _raised(action: Callable[[], object]) -> CheckpointWriteError | None:
    try:
        action()
    except CheckpointWriteError as error:
        return error
    return None
