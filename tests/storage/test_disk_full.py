"""A disk that is full, a directory that may not be written to, a limit on the size of files: real ones."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointWriteError
from asyncckpt.storage import system_calls
from storage.mounts import remount, small_file_system, without_privileges

MEBIBYTE = 1 << 20
TIMEOUT_SECS = 60.0


def state(num_mebibytes: int, number: int = 1) -> dict[str, torch.Tensor]:
    return {"weights": torch.full((num_mebibytes * MEBIBYTE // 4,), float(number))}


def assert_holds(path: Path, expected: dict[str, torch.Tensor]) -> None:
    assert torch.equal(asyncckpt.load(path, mmap=False)["weights"], expected["weights"])


def failure_of(saver: AsyncCheckpointSaver, checkpoint: object, path: Path) -> CheckpointWriteError:
    failure = saver.save(checkpoint, path).exception(TIMEOUT_SECS)
    assert isinstance(failure, CheckpointWriteError)
    assert str(path) in str(failure)
    return failure


@pytest.mark.parametrize("reserved", [True, False], ids=["found before writing", "found while writing"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserved: bool) -> None:
    """The save fails with what to do, the old file stays, no half file eats the room, and the next save may succeed."""
    if not reserved:
        monkeypatch.setattr(system_calls, "allocate", lambda fd, num_bytes: None)
    with small_file_system(tmp_path / "mount", "size=8m") as mount, AsyncCheckpointSaver() as saver:
        path = mount / "state.pt"
        saver.save(state(2), path).result(TIMEOUT_SECS)
        (mount / "ballast").write_bytes(bytes(3 * MEBIBYTE))
        for _ in range(2):
            failure = failure_of(saver, state(5, 2), path)
            assert failure.errno == errno.ENOSPC
            assert "free some space" in str(failure)
            assert {entry.name for entry in mount.iterdir()} == {"state.pt", "ballast"}
            assert_holds(path, state(2))
        saver.save(state(2, 3), path).result(TIMEOUT_SECS)  # a smaller one has room still
        assert_holds(path, state(2, 3))
        (mount / "ballast").unlink()
        saver.save(state(5, 4), path).result(TIMEOUT_SECS)
        assert_holds(path, state(5, 4))
        assert {entry.name for entry in mount.iterdir()} == {"state.pt"}


def test_no_room_for_another_name(tmp_path: Path) -> None:
    """A file system may run out of inodes, too."""
    with small_file_system(tmp_path / "mount", "size=8m,nr_inodes=4") as mount, AsyncCheckpointSaver() as saver:
        ballast = [mount / str(number) for number in range(3)]
        for path in ballast:
            path.touch()
        for path in (mount / "state.pt", mount / "new/state.pt"):
            assert failure_of(saver, state(1), path).errno == errno.ENOSPC
        assert sorted(mount.iterdir()) == ballast
        ballast[0].unlink()
        saver.save(state(1), mount / "state.pt").result(TIMEOUT_SECS)
        assert_holds(mount / "state.pt", state(1))


def test_read_only_from_one_day_to_the_next(tmp_path: Path) -> None:
    """As ext4 does after an error: saves fail and say why, the old file loads, and saving goes on afterwards."""
    with small_file_system(tmp_path / "mount", "size=8m") as mount, AsyncCheckpointSaver() as saver:
        path = mount / "state.pt"
        saver.save(state(1), path).result(TIMEOUT_SECS)
        remount(mount, "ro")
        failure = failure_of(saver, state(1, 2), path)
        assert failure.errno == errno.EROFS
        assert "read-only" in str(failure)
        assert_holds(path, state(1))
        remount(mount, "rw")
        saver.save(state(1, 3), path).result(TIMEOUT_SECS)
        assert_holds(path, state(1, 3))


@pytest.mark.parametrize("name", ["state.pt", "new/state.pt"])
def test_unwritable_directory(name: str) -> None:
    """EACCES, saying whose right is missing; what is in the directory stays."""
    with tempfile.TemporaryDirectory() as directory:  # not tmp_path, whose parents nobody but its owner may enter
        os.chmod(directory, 0o755)
        path = Path(directory) / "closed" / "state.pt"
        with AsyncCheckpointSaver() as saver:
            saver.save(state(1), path).result(TIMEOUT_SECS)
            path.parent.chmod(0o555)
            with without_privileges():
                failure = failure_of(saver, state(1, 2), path.parent / name)
            assert failure.errno == errno.EACCES
            assert "must be writable" in str(failure)
            assert [entry.name for entry in path.parent.iterdir()] == ["state.pt"]
            assert_holds(path, state(1))
            path.parent.chmod(0o755)
            saver.save(state(1, 3), path.parent / name).result(TIMEOUT_SECS)


SAVE_UNDER_A_LIMIT = """
import errno, os, sys, torch
from asyncckpt import AsyncCheckpointSaver
with AsyncCheckpointSaver() as saver:
    failure = saver.save({"weights": torch.ones(1 << 20)}, sys.argv[1]).exception(60)
    print(errno.errorcode[failure.errno], failure)
    saver.save({"weights": torch.ones(1 << 10)}, sys.argv[1]).result(60)
"""


def test_limit_on_file_size(tmp_path: Path) -> None:
    """ulimit -f: EFBIG, not death by SIGXFSZ (Python ignores it), and a smaller file is saved still."""
    path = tmp_path / "state.pt"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MEBIBYTE, MEBIBYTE))

    done = subprocess.run(
        [sys.executable, "-c", SAVE_UNDER_A_LIMIT, str(path)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("EFBIG ")
    assert str(path) in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]
    assert_holds(path, {"weights": torch.ones(1 << 10)})
