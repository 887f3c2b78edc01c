"""No file system call about a checkpoint directory bypasses the seam: strace's record of a process, call by call."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from storage.mounts import memory_directory
from storage.seam import FUNCTIONS

from reliability.gates import not_checked, report
from reliability.test_io_errors import old_run
from reliability.traced_process import MARKS

TESTS = Path(__file__).parent.parent
TIMEOUT_SECS = 200

# The system calls that a call through the seam makes: one of these.
STAT = {"newfstatat", "stat", "lstat", "fstat", "statx"}
MAKES = {
    "open_file": {"openat", "open"},
    "close": {"close"},
    "pwrite": {"pwrite64"},
    "pread_into": {"preadv", "preadv2"},
    "allocate": {"fallocate"},
    "fsync": {"fsync"},
    "try_lock": {"flock"},
    "try_shared_lock": {"flock"},
    "file_system_status": {"statfs"},
    "unlock": {"flock"},
    "rename": {"rename", "renameat", "renameat2"},
    "link": {"link", "linkat"},
    "clone": {"ioctl"},
    "truncate": {"ftruncate"},
    "unlink": {"unlink", "unlinkat"},
    "make_directory": {"mkdir", "mkdirat"},
    "remove_directory": {"rmdir", "unlinkat"},
    "append": {"write"},
    "stat": STAT,
    "lstat": STAT,
    "fstat": STAT,
}
# Or these, in this order; the first alone where there is no such directory.
LISTING = re.compile(r"(openat|open)(( newfstatat| fstat| fcntl)*( getdents64)+ close)?")

# What torch.load does with the descriptor that it opens at /proc/self/fd/N, after it was verified through the seam.
OPENING = re.compile(r'openat\(AT_FDCWD[^,]*, "/proc/self/fd/\d+", O_RDONLY.* = (\d+)<')
DUPLICATING = re.compile(r"fcntl\(\d+<.*>, F_DUPFD_CLOEXEC, 0\)\s*= (\d+)<")
LOADING = {"newfstatat", "fstat", "lseek", "read", "pread64", "mmap", "close", "ioctl", "fadvise64"}


@dataclass
class Traced:
    """What strace has seen of one process."""

    seam_calls: Counter[str] = field(default_factory=Counter)
    strangers: dict[str, list[str]] = field(default_factory=dict)  # by phase: calls that came not through the seam
    odd: list[str] = field(default_factory=list)  # calls through the seam that made other system calls than they should


def read_record(directory: Path, about: Path) -> Traced:
    """One file of strace's for each thread, so that a call through the seam is what lies between its two marks."""
    traced = Traced()
    is_about = re.compile(rf'["<]{re.escape(str(about))}')
    for record in directory.iterdir():
        read_thread(record.read_text(errors="replace").splitlines(), is_about, traced)
    return traced


def read_thread(lines: list[str], is_about: re.Pattern[str], traced: Traced) -> None:
    phase, seam_call, made = "start", "", list[str]()
    for line in lines:
        name = line.split("(", 1)[0]
        if mark := re.match(rf'\w+\((?:AT_FDCWD[^,]*, )?"{MARKS}/(\w+)/(\w+)"', line):
            kind, word = mark.groups()
            if kind == "phase":
                phase = word
            elif kind == "begin":
                seam_call, made = word, []
            else:
                traced.seam_calls[word] += 1
                if not is_as_it_should(word, made):
                    traced.odd.append(f"{word}: {' '.join(made)}")
                seam_call = ""
        elif seam_call:
            made.append(name)
        elif is_about.search(line):
            traced.strangers.setdefault(phase, []).append(line)


def is_as_it_should(seam_call: str, made: list[str]) -> bool:
    if seam_call == "list_directory":
        return LISTING.fullmatch(" ".join(made)) is not None
    return len(made) == 1 and made[0] in MAKES[seam_call]


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    """A process that saves, recovers, prunes, loads and verifies, and then goes around the seam."""
    if shutil.which("strace") is None:
        not_checked("strace is not installed")
    with memory_directory() as directory:  # no reflinks there, so that hard links are made on every machine
        base, record = directory / "base", directory / "record"
        base.mkdir()
        record.mkdir()
        old_run(base)
        strace = ["strace", "-f", "-ff", "-y", "--seccomp-bpf", "-e", "trace=%file,%desc", "-o", str(record / "thread")]
        done = subprocess.run(
            [*strace, sys.executable, str(TESTS / "reliability" / "traced_process.py")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "ASYNCCKPT_TRACED": str(base)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECS,
            check=False,
        )
        if "ptrace" in done.stderr and "not permitted" in done.stderr:
            not_checked(f"strace is refused here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        yield read_record(record, base)


def test_no_call_bypasses_the_seam(traced: Traced) -> None:
    """Every system call on a path below the directory, or on a descriptor of one, lies within a call through the seam,
    and each of these makes just the one that it stands for; torch.load's own reading is the exception."""
    in_load = traced.strangers.get("load", [])
    others = list(not_by_torch(in_load))
    report(
        "seam, by strace",
        f"{traced.seam_calls.total()} calls through it, each of them the system call that it stands for; 0 around it, "
        f"but for {len(in_load) - len(others)} of torch.load",
    )
    assert others == []
    assert traced.strangers.get("start", []) == []
    assert traced.strangers.get("save", []) == []
    assert traced.odd == [ODD]


def not_by_torch(lines: list[str]) -> Iterator[str]:
    """Those of one thread's calls that are not about a descriptor which torch.load has opened, nor about the page by
    which a load learns where torch has mapped the file: Python's mmap looks at the size, duplicates it and maps it."""
    opened: set[str] = set()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        name = line.split("(", 1)[0]
        if opening := OPENING.match(line):
            opened.add(opening.group(1))
        elif duplicating := DUPLICATING.match(line):
            opened.add(duplicating.group(1))
        elif (name in STAT and DUPLICATING.match(following)) or line.startswith("mmap(NULL, 1, "):
            continue
        elif (used := re.search(r"[( ](\d+)<", line)) and used.group(1) in opened and name in LOADING:
            opened -= {used.group(1)} if name == "close" else set()
        else:
            yield line


def test_the_process_used_the_whole_seam(traced: Traced) -> None:
    """So that the record says something about each function."""
    assert set(MAKES) | {"list_directory"} == set(FUNCTIONS)
    assert set(traced.seam_calls) == set(FUNCTIONS)


ODD = "unlink: truncate unlink"


def test_a_bypass_is_seen(traced: Traced) -> None:
    """The record can fail: what the process did around the seam at its end is found, call by call."""
    bypass = traced.strangers["bypass"]
    names = [line.split("(", 1)[0] for line in bypass]
    assert list(not_by_torch(bypass)) == bypass
    assert [name for name in names if name in ("write", "fsync", "rename")] == ["write", "fsync", "rename"]
    assert names[0] in STAT
    assert "openat" in names
    assert ODD in traced.odd
