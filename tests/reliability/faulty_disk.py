"""A disk that refuses what is written to it while a certain file exists, with ext4 on it: nbdkit, nbdfuse, loop."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.mounts import memory_directory

from reliability.gates import not_checked
from reliability.power import PoweredFileSystem, check_that_loops_can_be_mounted

_NUM_BYTES = 64 << 20
_START_SECS = 20.0


class FaultyDisk:
    """While `refusing` exists the disk answers every write with EIO, which the kernel tells at the next fsync."""

    def __init__(self, file_system: PoweredFileSystem, refusing: Path) -> None:
        self.file_system, self.refusing = file_system, refusing

    @property
    def mount(self) -> Path:
        return self.file_system.mount


@contextmanager
def faulty_disk() -> Iterator[FaultyDisk]:
    """A new one; skips, loudly, where this process may not."""
    check_that_loops_can_be_mounted()
    for program in ("nbdkit", "nbdfuse", "mkfs.ext4"):
        if shutil.which(program) is None:
            not_checked(f"{program} is not installed")
    with memory_directory() as directory:
        refusing, mount, image = directory / "refusing", directory / "mount", directory / "disk"
        mount.mkdir()
        image.touch()
        nbdkit = ["nbdkit", "--single", "--exit-with-parent", "--filter=error", "memory", str(_NUM_BYTES)]
        rules = [f"error-{call}{rule}" for call in ("pwrite", "zero") for rule in ("-rate=100%", f"-file={refusing}")]
        pid_file = directory / "pid"
        command = ["nbdfuse", "-P", str(pid_file), str(image), "--command", *nbdkit, *rules]
        serving = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            _wait_until(pid_file, serving)
            subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
            # The journal is written when an fsync asks for it: one that can't be written makes ext4 read-only.
            file_system = PoweredFileSystem(image, mount, "commit=900")
            try:
                file_system.switch_on()
                yield FaultyDisk(file_system, refusing)
            finally:
                refusing.unlink(missing_ok=True)
                file_system.switch_off()
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(image)], check=True)
            serving.wait(_START_SECS)


def _wait_until(pid_file: Path, serving: subprocess.Popen[bytes]) -> None:
    """nbdfuse writes it once it is ready."""
    deadline = time.monotonic() + _START_SECS
    while not pid_file.exists():
        if serving.poll() is not None or time.monotonic() > deadline:
            not_checked("nbdfuse does not start here")
        time.sleep(0.01)
