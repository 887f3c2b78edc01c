"""Servers for the tests, which are nobody's children: tests that count the processes they start must not find them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_START = '"$@" >"$BACKGROUND_LOG" 2>&1 </dev/null & echo $!'
_MAX_ENDING_SECS = 10.0


class Background:
    """A program that runs in the background; what it says is in `log`."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> None:
        env = {**os.environ, **(environment or {}), "BACKGROUND_LOG": str(log)}
        shell = ["/bin/sh", "-c", _START, "sh", *map(str, command)]
        started = subprocess.run(shell, env=env, cwd=log.parent, stdout=subprocess.PIPE, text=True, check=True)
        self.log = log
        self.pid = int(started.stdout)

    @property
    def is_alive(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def check(self, deadline: float) -> None:
        """Fail if it has ended, or when the time is up."""
        assert self.is_alive, self.log.read_text(errors="replace")
        assert time.monotonic() < deadline, self.log.read_text(errors="replace")

    def kill(self) -> None:
        """End it, and wait for that."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + _MAX_ENDING_SECS
        while self.is_alive and time.monotonic() < deadline:
            time.sleep(0.01)


@contextmanager
def background(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Background]:
    """Such a program, until the end of the block."""
    process = Background(command, log, environment)
    try:
        yield process
    finally:
        process.kill()
