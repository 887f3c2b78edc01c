"""A small file system of one's own, for tests that need a full or read-only one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def memory_directory() -> Iterator[Path]:
    """A directory whose fsync costs nothing, for tests that make thousands of calls fail by hand."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        yield Path(directory)


@contextmanager
def small_file_system(directory: Path, *options: str) -> Iterator[Path]:
    """Mount a tmpfs on `directory`; skips, loudly, where this process may not."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("NOT CHECKED: mounting a small file system needs Linux and root")
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "asyncckpt-test", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"NOT CHECKED: mounting a small file system is refused here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def remount(directory: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(directory)], check=True)


@contextmanager
def without_privileges() -> Iterator[None]:
    """As somebody whom file permissions bind: root becomes nobody for a while (in all threads)."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
