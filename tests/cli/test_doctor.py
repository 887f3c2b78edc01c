"""`asyncckpt doctor`: the whole command, on real directories."""

from __future__ import annotations

import errno
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from doctor.places import disk
from storage.mounts import memory_directory, remount, small_file_system
from storage.observe import names, no_descriptor_leaks, temporaries
from storage.seam import Call, Seam, raising

from asyncckpt.doctor import examination
from asyncckpt.doctor.examination import CHECKS, Check
from asyncckpt.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding, Place
from asyncckpt.storage import system_calls
from cli.running import error_of, run, run_json
from cli.test_app import drive


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a file system that is none of memory."""
    with disk(tmp_path_factory.mktemp("disk"), "ext4") as mount:
        directory = mount / "runs"
        directory.mkdir()
        yield directory


def test_a_good_place(on_disk: Path) -> None:
    """Exit code 0 and a table, without torch; nothing is left behind."""
    done = drive("doctor", on_disk)
    assert (done.returncode, done.stderr) == (0, "False\n")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["check", "found", "asyncckpt", "then", "what", "to", "change"]
    assert "✓   file system" in done.stdout
    assert lines[-1].startswith("Checkpoints are safe here")
    assert names(on_disk) == set()


def test_json(on_disk: Path) -> None:
    """Every check with its finding, in order, strictly."""
    report = run_json("doctor", on_disk)
    assert (report["path"], report["tested_in"], report["ok"]) == (str(on_disk), str(on_disk), True)
    assert [finding["name"] for finding in report["findings"]] == [check.name for check in CHECKS]
    for finding in report["findings"]:
        assert set(finding) == {"name", "status", "found", "choice", "advice"}
        assert finding["status"] in (OK, NOTE, WARNING)
        assert finding["found"]


def test_the_current_directory_is_the_default(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As somebody who is there expects."""
    monkeypatch.chdir(on_disk)
    monkeypatch.setattr(examination, "CHECKS", CHECKS[:1])
    report = run_json("doctor")
    assert (report["path"], report["tested_in"]) == (".", str(on_disk))


def test_a_directory_that_does_not_exist(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not made: the nearest one above is examined, which is said."""
    monkeypatch.setattr(examination, "CHECKS", CHECKS[:1])
    missing = on_disk / "new" / "deep"
    assert run_json("doctor", missing)["tested_in"] == str(on_disk)
    assert f"examined in {on_disk}, since {missing} does not exist yet" in run("doctor", missing).stdout
    assert names(on_disk) == set()


def test_what_is_no_directory(tmp_path: Path) -> None:
    """An error, not a finding."""
    (tmp_path / "file").write_text("")
    assert error_of("doctor", tmp_path / "file") == f"asyncckpt: {tmp_path / 'file'} is not a directory"
    assert "is not a directory" in error_of("doctor", tmp_path / "file" / "below")


def test_memory_is_not_safe(tmp_path: Path) -> None:
    """Exit code 1."""
    with small_file_system(tmp_path / "mount", "size=256m") as mount:
        report = run_json("doctor", mount, code=1)
        assert not report["ok"]
        assert [finding["name"] for finding in report["findings"] if finding["status"] == PROBLEM] == ["file system"]
        assert names(mount) == set()


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    """What would need a file is left out; the rest is told all the same."""
    with small_file_system(tmp_path / "mount", "size=1m") as mount:
        remount(mount, "ro")
        report = run_json("doctor", mount, code=1)
    assert [finding["name"] for finding in report["findings"]] == [check.name for check in CHECKS if not check.writes]
    assert report["findings"][0]["status"] == PROBLEM


def test_a_disk_that_does_not_sync(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, and the table says so."""
    monkeypatch.setattr(system_calls, "fsync", raising(errno.EIO))
    shown = run("doctor", on_disk, code=1).stdout
    assert "✗   fsync" in shown
    assert "fsync fails: Input/output error" in shown
    assert shown.splitlines()[-1] == "Checkpoints are not safe here: 3 problems, 2 warnings."  # it is small, too
    assert names(on_disk) == set()


def test_a_check_that_fails_is_a_warning(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are run."""
    monkeypatch.setattr(system_calls, "file_system_status", raising(errno.EIO, name="file_system_status"))
    findings = {finding["name"]: finding for finding in run_json("doctor", on_disk)["findings"]}
    assert findings["space"]["status"] == WARNING
    assert findings["space"]["found"] == "could not be checked: Input/output error"
    assert len(findings) == len(CHECKS)


def test_nothing_is_left_whenever_it_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at every call to the file system, each in turn, and just after it."""
    slow = ("locks", "write speed")
    monkeypatch.setattr(examination, "CHECKS", [check for check in CHECKS[:10] if check.name not in slow])
    with memory_directory() as directory:
        with Seam() as seam:
            examination.examine(str(directory))
        num_calls = len(seam.calls)
        assert num_calls > 50
        for number in range(num_calls - 1):  # the last one looks for what is left

            def interrupt(call: Call, number: int = number) -> None:
                if call.number == number:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt), no_descriptor_leaks(), Seam(interrupt):
                examination.examine(str(directory))
            assert names(directory) == set(), seam.calls[number]


def test_a_real_interrupt(on_disk: Path) -> None:
    """Exit code 130, in the middle of a check that has a file there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncckpt", "doctor", str(on_disk)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not temporaries(on_disk):
        assert process.poll() is None
        assert time.monotonic() < deadline
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert names(on_disk) == set()


def test_what_is_drawn_is_clean(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount's name may hold anything."""

    def check(place: Place) -> Finding:
        return Finding(WARNING, "[red]\x1b[31m", "a\nb", "c")

    monkeypatch.setattr(examination, "CHECKS", [Check("odd", check)])
    shown = run("doctor", on_disk).stdout
    assert r"!   odd     [red]\x1b[31m   a\nb" in shown
    assert shown.splitlines()[-1] == "Checkpoints are safe here: 1 warning."


def test_a_terminal_sees_what_is_examined(monkeypatch: pytest.MonkeyPatch, on_disk: Path) -> None:
    """A check may take long, on storage that hangs: which one it is is on stderr."""
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "asyncckpt", "doctor", str(on_disk), "--json"]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=its_end, env=environment) as process:
        os.close(its_end)
        drawn = b""
        while True:
            try:
                drawn += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
        assert process.stdout is not None
        assert process.stdout.read().startswith(b"{")
    os.close(terminal)
    assert process.returncode == 0
    assert b"examining: write speed" in drawn
