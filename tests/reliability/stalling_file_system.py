"""A FUSE file system that passes everything on to a real directory, until it is told to stop answering.

`StallingFileSystem` mounts it from a process of its own. Operations that stall wait in the kernel, as on a dead server,
until `go`; `die` is the end of the process, after which every call on the mount fails at once (ENOTCONN). flock is
not passed on: the kernel keeps it for the mount. Nor is flush: closing a file asks the server nothing. (Where it does,
a process with open files on the mount can't end before the answer, whatever kills it: the kernel closes them itself.)

The server runs several threads, so that a stall of one operation holds up no other; a dead server holds up all, which
`stall(EVERYTHING)` does. With `single_threaded` one stalled operation holds up all later ones, unread.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

EVERYTHING = "everything"
_MAX_START_SECS = 60.0
_MOUNTED = "mounted"


class StallingFileSystem:
    """A mount of `source` at `mount`. Not thread-safe. Look at files in `source` while the mount does not answer."""

    def __init__(self, source: Path, mount: Path, *, single_threaded: bool = False) -> None:
        self.source, self.mount = source, mount
        self._threads = "one" if single_threaded else "many"
        self._socket: socket.socket
        self._server: subprocess.Popen[bytes]
        self._received: bytes
        self._stalled: list[str] = []
        self.start()

    def start(self) -> None:
        """Mount it."""
        self._received = b""
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(self.source), str(self.mount), str(theirs.fileno()), self._threads]
        self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self._expect(_MOUNTED, _MAX_START_SECS)

    def stall(self, *operations: str) -> None:
        """From now on these operations (`EVERYTHING`: all of them) are not answered."""
        self._stalled.clear()
        self._tell({"stall": list(operations)})

    def go(self, error: int = 0) -> None:
        """Answer again; those that are stalled now are done, or fail with `error`."""
        self._tell({"go": error})

    def wait_until_stalled(self, operation: str | None = None, timeout: float = 60.0) -> str:
        """Wait until an operation (this one) has been held up since the last `stall`; which one it is."""
        deadline = time.monotonic() + timeout
        while not (held := [name for name in self._stalled if operation in (None, name)]):
            self._receive(deadline)
        return held[0]

    def die(self) -> None:
        """End the server as a crash would: what is stalled fails, and so does every call on the mount from then on."""
        self._server.kill()
        self._server.wait()
        self._socket.close()

    def start_anew(self) -> None:
        """Mount it anew in its place, after `die`."""
        self.unmount()
        self.start()

    def unmount(self) -> None:
        """Die, and take the mount away, whatever is stuck on it. Safe to call twice."""
        self.die()
        subprocess.run(["umount", "--lazy", str(self.mount)], check=False, capture_output=True)

    def _tell(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        self._expect("ok", 60.0)

    def _expect(self, answer: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while (word := self._receive(deadline)) != answer:
            assert word.startswith("stalled "), word

    def _receive(self, deadline: float) -> str:
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the file system said nothing"
            part = self._socket.recv(4096)
            assert part, "the file system ended"
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        word = line.decode()
        if word.startswith("stalled "):
            self._stalled.append(word.removeprefix("stalled "))
        return word


@contextmanager
def stalling_file_system(directory: Path, *, single_threaded: bool = False) -> Iterator[StallingFileSystem]:
    """Mounted under `directory`, and unmounted at the end whatever happened. Skips, loudly, where that can't be."""
    from reliability import gates

    if sys.platform != "linux" or os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        gates.not_checked("a file system of one's own needs Linux, root and /dev/fuse")
    pytest.importorskip("mfusepy", reason="NOT CHECKED: mfusepy is not installed")
    source, mount = directory / "source", directory / "mount"
    source.mkdir(parents=True)
    mount.mkdir()
    system = StallingFileSystem(source, mount, single_threaded=single_threaded)
    try:
        yield system
    finally:
        system.unmount()


# --- the server's process ---


class _Gate:
    """Holds up the operations that are to stall."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._changed = threading.Condition()
        self._stalling: set[str] = set()
        self._number = 0  # of the stalls that are over
        self._error = 0

    def serve(self) -> None:
        for line in self._control.makefile("rb"):
            message = json.loads(line)
            with self._changed:
                self._stalling = set(message.get("stall", ()))
                if "go" in message:
                    self._number += 1
                    self._error = message["go"]
                    self._changed.notify_all()
                self._say("ok")
        os.kill(os.getpid(), signal.SIGKILL)  # the test is gone: leave nobody stuck

    def _say(self, word: str) -> None:
        with suppress(OSError):
            self._control.sendall(word.encode() + b"\n")

    def mounted(self) -> None:
        threading.Thread(target=self.serve, daemon=True).start()
        with self._changed:
            self._say(_MOUNTED)

    def pass_through(self, operation: str) -> None:
        with self._changed:
            if not self._stalling & {operation, EVERYTHING}:
                return
            number = self._number
            self._say(f"stalled {operation}")
            while not self._changed.wait_for(lambda: self._number > number, timeout=1.0):
                _end_with_the_test()
            if self._error:
                raise OSError(self._error, os.strerror(self._error))


def _end_with_the_test() -> None:
    """A test that was killed is a zombie until its stuck threads are answered, and keeps its end of the socket open."""
    if Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
        os.kill(os.getpid(), signal.SIGKILL)


def _serve(source: str, mount: str, control: socket.socket, *, nothreads: bool) -> None:
    import mfusepy

    gate = _Gate(control)
    field = getattr

    class PassThrough(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def init(self, path: str) -> None:
            gate.mounted()

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            gate.pass_through("getattr")
            status = os.fstat(fh) if fh else os.lstat(source + path)
            names = ("mode", "ino", "dev", "nlink", "uid", "gid", "size", "blocks")
            times = {f"st_{name}": field(status, f"st_{name}_ns") for name in ("atime", "mtime", "ctime")}
            return {f"st_{name}": field(status, f"st_{name}") for name in names} | times

        def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, int], int]]:
            gate.pass_through("readdir")
            entries = []
            for name in (".", "..", *os.listdir(source + path)):
                status = os.lstat(source + path + "/" + name)
                # An inode number of 0 would mean that there is no such entry.
                entries.append((name, {"st_ino": status.st_ino, "st_mode": status.st_mode}, 0))
            return entries

        def open(self, path: str, flags: int) -> int:
            gate.pass_through("open")
            return os.open(source + path, flags & ~os.O_DIRECT)

        def create(self, path: str, mode: int, fi: object = None) -> int:
            gate.pass_through("create")
            return os.open(source + path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            gate.pass_through("read")
            return os.pread(fh, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            gate.pass_through("write")
            return os.pwrite(fh, data, offset)

        def truncate(self, path: str, length: int, fh: int | None = None) -> None:
            gate.pass_through("truncate")
            os.truncate(fh or source + path, length)

        def release(self, path: str, fh: int) -> None:
            os.close(fh)  # nobody waits for the answer

        def fsync(self, path: str, datasync: int, fh: int) -> None:
            gate.pass_through("fsync")
            os.fsync(fh)

        def fsyncdir(self, path: str, datasync: int, fh: int) -> None:
            gate.pass_through("fsyncdir")

        def rename(self, old: str, new: str) -> None:
            gate.pass_through("rename")
            os.rename(source + old, source + new)

        def link(self, target: str, source_path: str) -> None:
            gate.pass_through("link")
            os.link(source + source_path, source + target)

        def unlink(self, path: str) -> None:
            gate.pass_through("unlink")
            os.unlink(source + path)

        def mkdir(self, path: str, mode: int) -> None:
            gate.pass_through("mkdir")
            os.mkdir(source + path, mode)

        def rmdir(self, path: str) -> None:
            os.rmdir(source + path)

    mfusepy.FUSE(
        PassThrough(),
        mount,
        foreground=True,
        nothreads=nothreads,
        max_threads=64,
        max_idle_threads=64,
        fsname="asyncckpt-test",
        use_ino=True,
        hard_remove=True,
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
    )


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], socket.socket(fileno=int(sys.argv[3])), nothreads=sys.argv[4] == "one")
