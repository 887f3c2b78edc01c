"""Places to examine: a real directory, a made-up machine, a disk of one's own in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from asyncckpt.doctor.finding import Place


def place_in(directory: Path) -> Place:
    return Place(str(directory), str(directory / "doctor-0123"))


def made_up(root: Path, files: Mapping[str, str], environment: Mapping[str, str] | None = None) -> Place:
    """A machine whose /proc holds these files; `ns/pid` is a link there."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("ns/pid"):
            path.symlink_to(text)
        else:
            path.write_text(text)
    return Place(str(root), root=root, environment=environment or {})


@contextmanager
def disk(path: Path, kind: str) -> Iterator[Path]:
    """A file system of 320 MB on a loop device; skips, loudly, where it can't be mounted."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("NOT CHECKED: mounting a disk needs Linux and root")
    image, mount = path / f"{kind}.image", path / kind
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20)
    for command in ([f"mkfs.{kind}", "-q", str(image)], ["mount", "-o", "loop", str(image), str(mount)]):
        try:
            subprocess.run(command, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"NOT CHECKED: no {kind} to be had here: {error}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
        image.unlink()
