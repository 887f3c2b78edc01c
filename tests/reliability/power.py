"""A file system of one's own whose power can be cut: ext4 or XFS in a loop-mounted image."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.mounts import memory_directory

from reliability.gates import not_checked

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
_WITHOUT_FLUSHING_THE_LOG = struct.pack("I", 2)
_MEBIBYTES = {"ext4": 64, "xfs": 320}  # about the smallest that mkfs takes
_DETACH_SECS = 60.0


class PoweredFileSystem:
    """Mounted at `mount`."""

    def __init__(self, image: Path, mount: Path, *options: str) -> None:
        self._image, self.mount = image, mount
        self._options = ",".join(["loop", *options])

    def cut(self) -> None:
        """From now on nothing reaches the disk, and every call fails."""
        cut_power(self.mount)

    def restore(self) -> None:
        """Mount again what had reached the disk. Nobody may have a file open there."""
        subprocess.run(["umount", str(self.mount)], check=True)
        self._wait_until_detached()
        self.switch_on()

    def _wait_until_detached(self) -> None:
        """A mount namespace that somebody has made meanwhile holds a copy of the mount: the next one would be that."""
        deadline = time.monotonic() + _DETACH_SECS
        while subprocess.run(["losetup", "-j", str(self._image)], capture_output=True, check=True).stdout:
            assert time.monotonic() < deadline, "somebody holds the file system mounted"
            time.sleep(0.01)

    def switch_on(self) -> None:
        command = ["mount", "-o", self._options, str(self._image), str(self.mount)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode != 0:
            not_checked(f"a loop mount is refused here: {mounted.stderr.strip()}")
        assert os.stat(self.mount).st_dev != os.stat("/").st_dev, "this would cut the power of the machine's own disk"

    def switch_off(self) -> None:
        """For good; the loop device goes with it. Lazily: after a failure somebody may have a file open there."""
        subprocess.run(["umount", "--lazy", str(self.mount)], stderr=subprocess.DEVNULL, check=False)


def cut_power(mount: str | os.PathLike[str]) -> None:
    directory = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.fstat(directory).st_dev != os.stat("/").st_dev, "this is the machine's own disk"
        fcntl.ioctl(directory, _SHUTDOWN, _WITHOUT_FLUSHING_THE_LOG)
    finally:
        os.close(directory)


def check_that_loops_can_be_mounted() -> None:
    if sys.platform != "linux" or os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        not_checked("a file system of one's own needs Linux, root and loop devices")


@contextmanager
def powered_file_system(kind: str) -> Iterator[PoweredFileSystem]:
    """A new one; skips, loudly, where this process may not."""
    check_that_loops_can_be_mounted()
    if shutil.which(f"mkfs.{kind}") is None:
        not_checked(f"mkfs.{kind} is not installed")
    with memory_directory() as directory:
        image, mount = directory / "image", directory / "mount"
        mount.mkdir()
        with image.open("wb") as file:
            file.truncate(_MEBIBYTES[kind] << 20)
        subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True)
        file_system = PoweredFileSystem(image, mount)
        try:
            file_system.switch_on()
            yield file_system
        finally:
            file_system.switch_off()
