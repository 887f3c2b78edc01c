"""The local directory's lock: what its file may be, who reads it, and file systems that can't."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncckpt.naming import LOCK_NAME
from asyncckpt.storage import files, system_calls
from asyncckpt.storage.directory_lock import LocalLock
from asyncckpt.storage.local import LocalStorage
from storage.mounts import small_file_system
from storage.observe import names, no_descriptor_leaks
from storage.seam import FUNCTIONS, raising


def take(directory: Path, holder: str = "me") -> LocalLock:
    return LocalStorage().lock(str(directory), holder)


def holder_of(directory: Path) -> str:
    with pytest.raises(BlockingIOError) as refused:
        take(directory)
    return str(refused.value.strerror)


def make_target_link(path: Path) -> None:
    path.with_name("target").write_bytes(b"precious")
    path.symlink_to(path.with_name("target"))


FOREIGN: dict[str, Callable[[Path], object]] = {
    "link": make_target_link,
    "dangling link": lambda path: path.symlink_to(path.with_name("missing")),
    "directory": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_lock_file(tmp_path: Path, kind: str) -> None:
    """An error at once that is not "busy", for waiting would not help; nothing is followed, emptied or made."""
    FOREIGN[kind](tmp_path / LOCK_NAME)
    before = names(tmp_path)
    with no_descriptor_leaks(), pytest.raises(OSError, match=r"symbolic links|directory|not a regular file") as raised:
        take(tmp_path)
    assert not isinstance(raised.value, BlockingIOError)
    assert names(tmp_path) == before
    if kind == "link":
        assert (tmp_path / "target").read_bytes() == b"precious"


def test_the_file_says_who_and_is_emptied(tmp_path: Path) -> None:
    """It names the holder, and nobody after the release; it stays, since removing it would be a race."""
    with no_descriptor_leaks():
        lock = take(tmp_path, "process 1 on here")
        assert (tmp_path / LOCK_NAME).read_bytes() == b"process 1 on here"
        lock.release()
    assert (tmp_path / LOCK_NAME).read_bytes() == b""
    assert names(tmp_path) == {LOCK_NAME}


def test_a_dead_holder_is_forgotten(tmp_path: Path) -> None:
    """What one that was killed left there, longer than the next one's word, is gone."""
    (tmp_path / LOCK_NAME).write_bytes(b"process 1234567 on a far away machine")
    lock = take(tmp_path, "me")
    assert holder_of(tmp_path) == "me"
    lock.release()


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"", "an unknown process"),
        (b" \n", "an unknown process"),
        (b"a\nb\x1b[31m\0c", "a b [31m c"),
        (b"\xff\xfe", "��"),
        (b"x" * 10_000, "x" * 500),
    ],
    ids=["empty", "blank", "control characters", "no text", "long"],
)
def test_the_holder_is_one_printable_line(tmp_path: Path, written: bytes, said: str) -> None:
    """Anybody may have written it."""
    (tmp_path / LOCK_NAME).write_bytes(written)
    with (tmp_path / LOCK_NAME).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with no_descriptor_leaks():
            assert holder_of(tmp_path) == said


def test_a_holder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is taken all the same: busy, by somebody."""
    lock = take(tmp_path)
    monkeypatch.setattr(system_calls, "pread_into", raising(errno.EIO, name="pread_into"))
    assert holder_of(tmp_path) == "an unknown process"
    lock.release()


@pytest.mark.parametrize("name", ["truncate", "pwrite"])
def test_a_holder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It holds all the same, and is released."""
    monkeypatch.setattr(system_calls, name, raising(errno.ENOSPC, name=name))
    lock = take(tmp_path)
    assert lock.is_intact()
    holder_of(tmp_path)
    lock.release()
    take(tmp_path).release()


def test_a_full_disk(tmp_path: Path) -> None:
    """The lock can be had, or nobody could make room."""
    with small_file_system(tmp_path / "mount", "size=64k") as mount:
        take(mount).release()  # makes the file
        with (mount / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space"):
            while True:
                ballast.write(bytes(4096))
        lock = take(mount)
        assert holder_of(mount) == "an unknown process"
        LocalStorage().delete([str(mount / "ballast")])
        lock.release()


# --- whether it still guards the directory ---


def move_directory(directory: Path) -> None:
    directory.rename(directory.with_name("moved"))


def replace_directory(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def replace_file(directory: Path) -> None:
    (directory / "new").touch()
    (directory / "new").rename(directory / LOCK_NAME)


def link_elsewhere(directory: Path) -> None:
    (directory / LOCK_NAME).rename(directory / "elsewhere")
    (directory / LOCK_NAME).symlink_to(directory / "elsewhere")


LOSSES: dict[str, Callable[[Path], object]] = {
    "the directory moved": move_directory,
    "the directory removed": shutil.rmtree,
    "the directory replaced": replace_directory,
    "the file removed": lambda directory: (directory / LOCK_NAME).unlink(),
    "the file replaced": replace_file,
    "the file linked": link_elsewhere,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lock_that_guards_nothing(tmp_path: Path, loss: str) -> None:
    """Who moves or removes its file lets others in: it is intact no more, and is released in peace."""
    lock = take(tmp_path / "d")
    assert lock.is_intact()
    with no_descriptor_leaks():
        LOSSES[loss](tmp_path / "d")
        assert not lock.is_intact()
    lock.release()
    assert not lock.is_intact()


def test_a_linked_directory_is_the_same_directory(tmp_path: Path) -> None:
    """Moved to another disk with a link left in its place, it is guarded still."""
    lock = take(tmp_path / "d")
    move_directory(tmp_path / "d")
    (tmp_path / "d").symlink_to(tmp_path / "moved")
    assert lock.is_intact()
    assert holder_of(tmp_path / "moved") == "me"
    lock.release()


@pytest.mark.parametrize("loss", ["the file removed", "the file replaced"])
def test_a_file_that_goes_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """A lock on it would guard nothing: busy, and to be had on the next try."""

    def try_lock(fd: int) -> bool:
        monkeypatch.undo()
        LOSSES[loss](tmp_path)
        return bool(FUNCTIONS["try_lock"](fd))

    monkeypatch.setattr(system_calls, "try_lock", try_lock)
    with no_descriptor_leaks():
        assert "replaced" in holder_of(tmp_path)
        take(tmp_path).release()


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They mean the directory of that moment."""
    monkeypatch.chdir(tmp_path)
    lock = LocalStorage().lock("d", "me")
    monkeypatch.chdir("/")
    assert lock.is_intact()
    assert holder_of(tmp_path / "d") == "me"
    lock.release()


# --- who may have copies ---


def test_released_though_a_copy_is_open(tmp_path: Path) -> None:
    """A child that was forked a moment ago has not closed its copy yet: the next one need not wait for that."""
    lock = take(tmp_path)
    copy = os.dup(lock._file.fd)
    lock.release()
    take(tmp_path).release()
    os.close(copy)


def test_a_lock_that_nobody_has_any_more(tmp_path: Path) -> None:
    """Dropped without a release, as in a notebook's cell that is run again, it is released."""
    lock = take(tmp_path)
    assert holder_of(tmp_path) == "me"
    del lock
    gc.collect()
    take(tmp_path).release()


def test_programs_inherit_nothing(tmp_path: Path) -> None:
    """The descriptor is closed on exec."""
    lock = take(tmp_path)
    assert not os.get_inheritable(lock._file.fd)
    lock.release()


# --- file systems without locks ---


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    """The lock is had, by as many as ask for it, and the log says so once."""
    files._say_that_there_are_no_locks.cache_clear()
    for name in ("try_lock", "unlock"):
        monkeypatch.setattr(system_calls, name, raising(error, name=name))
    with no_descriptor_leaks():
        locks = [take(tmp_path), take(tmp_path)]
        assert [lock.is_intact() for lock in locks] == [True, True]
        for lock in locks:
            lock.release()
    (said,) = [record for record in caplog.records if record.name == "asyncckpt"]
    assert said.levelname == "WARNING"
    assert "no file locks" in said.getMessage()


@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL, errno.ESTALE])
def test_other_lock_errors_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Neither had nor busy, and no descriptor leaks."""
    monkeypatch.setattr(system_calls, "try_lock", raising(error, name="try_lock"))
    with no_descriptor_leaks(), pytest.raises(OSError, match=os.strerror(error)) as raised:
        take(tmp_path)
    assert not isinstance(raised.value, BlockingIOError)
