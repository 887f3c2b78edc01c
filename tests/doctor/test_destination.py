"""What a directory can do, on real file systems, and with faults injected at the seam."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from storage.mounts import memory_directory, remount, small_file_system, without_privileges
from storage.observe import names, no_descriptor_leaks
from storage.seam import Call, Seam, raising

from asyncckpt.doctor import destination, speed
from asyncckpt.doctor.file_system import check_file_system
from asyncckpt.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding, Place
from asyncckpt.storage import system_calls
from doctor.places import disk, place_in

MEBIBYTE = 1 << 20
WRITING_CHECKS = [
    destination.check_writing,
    destination.check_fsync,
    destination.check_directory_fsync,
    destination.check_commit,
    destination.check_locks,
    destination.check_direct_writing,
    destination.check_links,
    speed.check_writing_speed,
]


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory


def failing(name: str, error: int, when: Callable[[Call], bool] = lambda call: True) -> Seam:
    def before(call: Call) -> None:
        if call.name == name and when(call):
            raise OSError(error, os.strerror(error))

    return Seam(before)


@pytest.mark.parametrize("check", WRITING_CHECKS, ids=lambda check: check.__name__)
def test_on_a_disk_all_is_well(tmp_path: Path, check: Callable[[Place], Finding]) -> None:
    """Whatever file system the tests run on (its own checks are below), and nothing is left behind."""
    with no_descriptor_leaks():
        finding = check(place_in(tmp_path))
    assert finding.status in (OK, NOTE, WARNING), finding
    assert finding.found
    assert names(tmp_path) == set()


@pytest.mark.parametrize(("kind", "reflinks"), [("ext4", "no (Operation not supported)"), ("xfs", "yes")])
def test_two_kinds_of_disk(tmp_path: Path, kind: str, reflinks: str) -> None:
    """Both sync, lock, and take O_DIRECT; one has reflinks."""
    with disk(tmp_path, kind) as mount:
        place = place_in(mount)
        assert check_file_system(place) == Finding(OK, f"{kind} at {mount}")
        for check in (destination.check_locks, destination.check_direct_writing, destination.check_directory_fsync):
            assert check(place).status == OK
        links = destination.check_links(place)
        assert links.found == f"reflinks: {reflinks}; hard links: yes"
        assert ("reflink" if reflinks == "yes" else "hard link") in links.choice
        assert names(mount) <= {"lost+found"}


def test_memory_is_no_disk(tmp_path: Path) -> None:
    """Its fsync succeeds and is quick, which is no news there; that it is memory is."""
    with small_file_system(tmp_path / "mount", "size=64m") as mount:
        finding = check_file_system(place_in(mount))
        assert (finding.status, finding.advice) == (PROBLEM, "save to a disk")
        assert "nothing survives" in finding.found
        assert destination.check_fsync(place_in(mount)).status == OK


def test_read_only(tmp_path: Path) -> None:
    """Nothing can be saved, and why."""
    with small_file_system(tmp_path / "mount", "size=1m") as mount:
        remount(mount, "ro")
        finding = destination.check_writing(place_in(mount))
    assert finding.status == PROBLEM
    assert "Read-only file system" in finding.found
    assert finding.advice == "the file system is mounted read-only"


def test_a_directory_of_somebody_else() -> None:
    """Its permissions count."""
    with tempfile.TemporaryDirectory() as directory:  # not tmp_path, whose parents nobody but its owner may enter
        os.chmod(directory, 0o555)
        with without_privileges():
            finding = destination.check_writing(place_in(Path(directory)))
        assert (finding.status, finding.advice) == (PROBLEM, "the directory must be writable by this user")


def test_a_full_disk(tmp_path: Path) -> None:
    """No byte, and then no name, can be had."""
    with small_file_system(tmp_path / "mount", "size=1m,nr_inodes=4") as mount:
        (mount / "ballast").write_bytes(bytes(MEBIBYTE))
        finding = destination.check_writing(place_in(mount))
        assert (finding.status, finding.advice) == (PROBLEM, "free some space, or inodes")
        assert "No space left" in finding.found
        assert destination.check_space(place_in(mount)).status == PROBLEM
        assert names(mount) == {"ballast"}


@pytest.mark.parametrize(
    ("options", "largest", "status", "said"),
    [
        ("size=4m", 0, PROBLEM, "no room for another checkpoint"),
        ("size=64m,nr_inodes=4", 0, PROBLEM, "no room for another name"),
        ("size=64m", 33, PROBLEM, "no room for another checkpoint"),
        ("size=64m", 24, WARNING, "keep fewer checkpoints"),
        ("size=64m", 20, OK, ""),
        ("size=64m", 0, WARNING, "keep fewer checkpoints"),
        ("size=2g", 0, OK, ""),
        ("size=2g,nr_inodes=0", 0, OK, ""),
    ],
)
def test_space(tmp_path: Path, options: str, largest: int, status: str, said: str) -> None:
    """Measured against the largest checkpoint that is there, in MiB."""
    with small_file_system(tmp_path / "mount", options) as mount:
        if largest:
            (mount / "step1.pt").write_bytes(bytes(largest * MEBIBYTE))
        finding = destination.check_space(place_in(mount))
    assert finding.status == status, finding
    assert said in finding.advice
    assert ("inodes" in finding.found) == ("nr_inodes=0" not in options)


def test_fsync_that_fails(memory: Path) -> None:
    """Of the file, of the directory: no save can succeed."""
    with failing("fsync", errno.EIO, lambda call: call.path != str(memory)):
        assert destination.check_fsync(place_in(memory)).status == PROBLEM
        assert destination.check_commit(place_in(memory)).status == PROBLEM
        assert destination.check_directory_fsync(place_in(memory)).status == OK
    with failing("fsync", errno.EIO, lambda call: call.path == str(memory)):
        finding = destination.check_directory_fsync(place_in(memory))
        assert (finding.status, finding.found) == (PROBLEM, "fails: Input/output error")
        assert destination.check_fsync(place_in(memory)).status == OK
    assert names(memory) == set()


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_directory_that_can_not_be_synced(memory: Path, error: int) -> None:
    """As on some network file systems: saves go on there, with a warning; so they do in truth."""
    with failing("fsync", error, lambda call: call.path == str(memory)):
        finding = destination.check_directory_fsync(place_in(memory))
        assert finding.status == WARNING
        assert "goes on without" in finding.choice
        assert destination.check_commit(place_in(memory)).status == OK


def test_fsync_that_is_too_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does nothing, on a disk, is suspicious."""
    with disk(tmp_path, "ext4") as mount:
        assert destination.check_fsync(place_in(mount)).status in (OK, NOTE)
        monkeypatch.setattr(system_calls, "fsync", lambda fd: None)
        finding = destination.check_fsync(place_in(mount))
    assert finding.status == WARNING
    assert "something on the way may ignore it, or its cache survives a power cut" in finding.found


def test_fsync_that_is_taken_away(tmp_path: Path) -> None:
    """By a library that is loaded for speed."""
    place = replace(place_in(tmp_path), environment={"LD_PRELOAD": "/usr/lib/libeatmydata.so"})
    assert destination.check_fsync(place).status == PROBLEM


def test_a_rename_that_fails(memory: Path) -> None:
    """Or one that does nothing."""
    with failing("rename", errno.EPERM):
        finding = destination.check_commit(place_in(memory))
    assert (finding.status, finding.found) == (PROBLEM, "a file can't replace another: Operation not permitted")
    assert names(memory) == set()


def test_a_rename_that_is_lost(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one does nothing, and gives no error."""
    num_calls = 0
    rename = system_calls.rename

    def rename_once(source: str, destination: str) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            rename(source, destination)

    monkeypatch.setattr(system_calls, "rename", rename_once)
    finding = destination.check_commit(place_in(memory))
    assert (finding.status, finding.found) == (PROBLEM, "a file that replaced another still reads as the old one")


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_no_locks(memory: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """A warning: who keeps others out, then?"""
    monkeypatch.setattr(system_calls, "try_lock", raising(error, name="try_lock"))
    finding = destination.check_locks(place_in(memory))
    assert (finding.status, finding.choice) == (WARNING, "nobody is kept out")
    assert "only one process" in finding.advice


def test_locks_that_keep_nobody_out(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Granted here, and granted to another process too, which is asked for real."""
    monkeypatch.setattr(system_calls, "try_lock", lambda fd: True)
    finding = destination.check_locks(place_in(memory))
    assert (finding.status, finding.found) == (WARNING, "a lock keeps no other process out")


def test_locks_where_no_other_process_can_be_started(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said that only half was tried."""
    monkeypatch.setattr(sys, "executable", "")
    finding = destination.check_locks(place_in(memory))
    assert finding.status == NOTE
    assert "not tried from another process" in finding.found


def test_no_direct_writing(tmp_path: Path) -> None:
    """ramfs refuses it, for real."""
    mount = tmp_path / "mount"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "ramfs", "test", str(mount)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"NOT CHECKED: mounting is refused here: {mounted.stderr.strip()}")
    try:
        finding = destination.check_direct_writing(place_in(mount))
        assert (finding.status, finding.found) == (NOTE, "refused: Invalid argument")
        assert finding.choice.startswith("buffered writes")
        assert names(mount) == set()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("name", ["open_file", "pwrite"])
def test_direct_writing_that_is_refused_late(memory: Path, name: str) -> None:
    """When the file is opened so, or only when it is written to."""
    with failing(name, errno.EINVAL, lambda call: name == "pwrite" or bool(call.args[1] & os.O_DIRECT)):
        assert destination.check_direct_writing(place_in(memory)).status == NOTE
    assert names(memory) == set()


def test_no_hard_links(memory: Path) -> None:
    """Nor reflinks: the best checkpoint is copied."""
    with failing("link", errno.EPERM), failing("clone", errno.EOPNOTSUPP):
        finding = destination.check_links(place_in(memory))
    assert finding.found == "reflinks: no (Operation not supported); hard links: no (Operation not permitted)"
    assert (finding.status, finding.choice) == (NOTE, "best_model.pt is a second copy")


def test_a_slow_disk(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are of what was written, and a slow one says what to do."""
    monkeypatch.setattr(speed, "_write_secs", lambda storage, place, contents, threads: len(contents) / 50e6)
    finding = speed.check_writing_speed(place_in(memory))
    assert finding.found == "50 MB/s as asyncckpt writes, 50 MB/s buffered"
    assert (finding.status, finding.choice) == (NOTE, "1 GB is durable after about 20 s")
    assert "asyncckpt interval" in finding.advice


def test_no_room_to_measure(tmp_path: Path) -> None:
    """A small disk is not filled for the sake of a figure."""
    with small_file_system(tmp_path / "mount", "size=32m") as mount:
        assert speed.check_writing_speed(place_in(mount)).found == "not measured: there is too little room"


@pytest.mark.parametrize("check", WRITING_CHECKS[:4] + WRITING_CHECKS[5:], ids=lambda check: check.__name__)
def test_nothing_is_left_behind(
    memory: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Place], Finding]
) -> None:
    """Whichever call fails, each in turn, once the file is there."""
    monkeypatch.setattr(speed, "_MOST_BYTES", 8 * MEBIBYTE)
    with Seam() as seam:
        check(place_in(memory))
    numbers = [call.number for call in seam.calls if call.name not in ("unlink", "close")]
    assert len(numbers) >= 3
    for number in numbers:

        def fail(call: Call, number: int = number) -> None:
            if call.number == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with no_descriptor_leaks(), Seam(fail), contextlib.suppress(OSError):
            check(place_in(memory))
        assert names(memory) == set(), number
