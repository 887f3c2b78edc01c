"""A disk that a test holds, breaks, or dies with: under the writing threads of this process or of a writer process.

The test and the disk are in different processes, so they speak through files in a directory of their own.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from storage.seam import Call, Seam

from asyncckpt.naming import WRITER_LOG_PREFIX
from asyncckpt.service import worker, writer_process
from asyncckpt.storage import system_calls

if TYPE_CHECKING:  # a writer process has neither the time nor the need for it
    import pytest

TESTS = Path(__file__).parent.parent
_COMMAND = writer_process.command
_POLL_SECS = 0.002
_MAX_SECS = 60.0


class Disk:
    """The test's side. Every call of the writing threads is in `calls`, as (process, name, path)."""

    def __init__(self, control: Path) -> None:
        self._control = control
        control.mkdir()

    @property
    def calls(self) -> list[tuple[int, str, str]]:
        with contextlib.suppress(FileNotFoundError), open(self._control / "calls", "rb") as file:
            lines = [line.split(b" ", 2) for line in file.read().split(b"\0") if line]
            return [(int(pid), name.decode(), os.fsdecode(path)) for pid, name, path in lines]
        return []

    @contextmanager
    def held(self, name: str = "fsync", suffix: str = ".tmp") -> Iterator[None]:
        """It stops answering such a call (on a file of that ending), until the end of the block."""
        self.hold(name, suffix)
        try:
            yield
        finally:
            self.let_go()

    def hold(self, name: str = "fsync", suffix: str = ".tmp") -> None:
        self._write("hold", {"name": name, "suffix": suffix})

    def let_go(self) -> None:
        for name in ("hold", "is-held"):
            (self._control / name).unlink(missing_ok=True)

    def wait_until_held(self) -> None:
        wait_for((self._control / "is-held").exists)

    def fail(self, error: int, name: str = "fsync", *, times: int | None = None, suffix: str = "") -> None:
        """Such calls raise this error, so often (or until `mend`)."""
        for number in range(times or 0):
            (self._control / f"failure-{number}").touch()
        self._write("fail", {"name": name, "suffix": suffix, "errno": error, "sticky": times is None})

    def lose_writes(self) -> None:
        """From now on zeros are written."""
        (self._control / "lossy").touch()

    def kill_at(self, number: int) -> None:
        """The next writer that comes to its call of that number dies before it, by SIGKILL."""
        (self._control / "kill-at").write_text(str(number))

    def kill_always(self, name: str, suffix: str = "") -> None:
        """Every writer dies at such a call."""
        self._write("kill", {"name": name, "suffix": suffix})

    def mend(self) -> None:
        for name in ("fail", "lossy", "kill-at", "kill"):
            (self._control / name).unlink(missing_ok=True)

    def _write(self, name: str, what: object) -> None:
        temporary = self._control / f"{name}.tmp"
        temporary.write_text(json.dumps(what))
        temporary.rename(self._control / name)


def wait_for(condition: Callable[[], object]) -> None:
    """Until the condition holds; fails when it never does."""
    deadline = time.monotonic() + _MAX_SECS
    while not condition():
        assert time.monotonic() < deadline, f"{condition} never came true"
        time.sleep(_POLL_SECS)


def children() -> list[int]:
    """The processes that this one has started, zombies too."""
    found: list[int] = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            found += map(int, Path(f"/proc/self/task/{task}/children").read_text().split())
    return found


def open_files() -> set[tuple[str, str]]:
    """Descriptors, and what they are of; connections that earlier tests have left may close meanwhile."""
    found: set[tuple[str, str]] = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


@contextmanager
def writer_disk(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk under every writer process that is started; in the end none is left, nor anything that it needed."""
    logs = directory / "tmp"
    logs.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(logs))
    monkeypatch.setattr(writer_process, "command", writer_command(directory / "control"))
    before, processes = open_files(), children()
    yield Disk(directory / "control")
    wait_for(lambda: children() == processes)
    wait_for(lambda: open_files() <= before)
    wait_for(lambda: not list(logs.glob(f"{WRITER_LOG_PREFIX}*")))


# --- the disk's side ---


@contextmanager
def controlled(control: Path) -> Iterator[None]:
    """In this process: its writing threads work on the disk that the test controls."""
    calls = os.open(control / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    num_calls = 0

    def before(call: Call) -> None:
        nonlocal num_calls
        if not threading.current_thread().name.startswith(("asyncckpt-worker", "asyncckpt-writer")):
            return
        number, num_calls = num_calls, num_calls + 1
        os.write(calls, b"%d %s %s\0" % (os.getpid(), call.name.encode(), os.fsencode(call.path)))
        _die_or_not(control, call, number)
        _hold(control, call)
        _fail(control, call)

    pause, worker._FIRST_PAUSE_SECS = worker._FIRST_PAUSE_SECS, 0.0
    pwrite, system_calls.pwrite = system_calls.pwrite, partial(_pwrite, control)
    try:
        with Seam(before):
            yield
    finally:
        worker._FIRST_PAUSE_SECS, system_calls.pwrite = pause, pwrite
        os.close(calls)


def writer_command(control: Path, *, prelude: str = "") -> Callable[[int, int, str], list[str]]:
    """In place of `writer_process.command`: a writer process on such a disk. `prelude` is run in it first."""

    def command(connection_fd: int, trainer_fd: int, module: str) -> list[str]:
        *interpreter, code = _COMMAND(connection_fd, trainer_fd, module)
        start, _ = code.split("from asyncckpt", 1)
        code = f"""{start}
sys.path += [{str(TESTS)!r}]
{prelude}
from pathlib import Path
from service.disk import controlled
from {module} import main
with controlled(Path({str(control)!r})):
    main({connection_fd}, {trainer_fd})
"""
        return [*interpreter, code]

    return command


def _read(path: Path, call: Call) -> dict[str, object] | None:
    try:
        what: dict[str, object] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return what if what["name"] in (call.name, "") and call.path.endswith(str(what["suffix"])) else None


def _die_or_not(control: Path, call: Call, number: int) -> None:
    if _read(control / "kill", call) is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(FileNotFoundError):
        if int((control / "kill-at").read_text()) == number:
            (control / "kill-at").unlink()
            os.kill(os.getpid(), signal.SIGKILL)


def _hold(control: Path, call: Call) -> None:
    if _read(control / "hold", call) is None:
        return
    (control / "is-held").touch()
    wait_for(lambda: _read(control / "hold", call) is None)


def _fail(control: Path, call: Call) -> None:
    what = _read(control / "fail", call)
    if what is None:
        return
    if not what["sticky"]:
        left = sorted(control.glob("failure-*"))
        if not left:
            return
        left[0].unlink()
    number = what["errno"]
    assert isinstance(number, int)
    raise OSError(number, os.strerror(number))


def _pwrite(control: Path, fd: int, view: memoryview, offset: int) -> int:
    if (control / "lossy").exists():
        view = memoryview(mmap.mmap(-1, len(view)))  # aligned, as O_DIRECT wants it
    return os.pwrite(fd, view, offset)
