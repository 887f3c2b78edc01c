"""Starting a writer process: a fresh interpreter that never imports torch, in a session of its own. No torch."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from asyncckpt.naming import WRITER_LOG_PREFIX, WRITER_NAME
from asyncckpt.service.connection import Connection

WRITER_MODULE, MIRROR_MODULE = "asyncckpt.service.writer", "asyncckpt.service.mirror_process"
_NAME = "/proc/self/comm"
_IMPORTS = ("asyncckpt", "msgspec", "isal")
_IMPORTS_IF_THERE = ("s3fs", "tenacity")  # an extra's
_MAX_LOG_BYTES = 2000
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def why_not() -> str | None:
    """Why no writer process can be started here; None if it can be tried."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
        return "a writer process needs Linux"
    name = os.path.basename(sys.executable or "")
    if getattr(sys, "frozen", False) or not re.match(r"(python|pypy)[\d.]*\w*$", name):
        return f"sys.executable ({sys.executable or 'unknown'}) is no Python interpreter to run a writer process with"
    return None


def command(connection_fd: int, trainer_fd: int, module: str) -> list[str]:
    """Isolated from the environment and the working directory, where a `queue.py` of the user's may lie; the
    directories of the few packages that it needs come last, behind the standard library."""
    code = (
        # Its name first: `asyncckpt run` knows by it for whom it has to wait.
        f"import os, sys; os.path.exists({_NAME!r}) and open({_NAME!r}, 'w').write({WRITER_NAME!r}); "
        f"sys.path += {import_path()!r}; "
        f"from {module} import main; main({connection_fd}, {trainer_fd})"
    )
    # The same encoding of file names, which may have come from the environment.
    return [sys.executable, "-I", "-S", "-X", f"utf8={sys.flags.utf8_mode}", "-c", code]


def import_path() -> list[str]:
    """Where the few packages lie that a writer process needs."""
    path: list[str] = []
    for name in (*_IMPORTS, *_IMPORTS_IF_THERE):
        spec = importlib.util.find_spec(name)
        if spec is None and name in _IMPORTS_IF_THERE:
            continue
        assert spec is not None
        assert spec.origin is not None
        home = os.path.dirname(os.path.dirname(os.path.abspath(spec.origin)))
        if home not in path:
            path.append(home)
    return path


class WriterProcess:
    """A process that runs a module's `main` and is spoken to by `connection`; `pidfd` can be read once it has ended.

    What it says on stderr goes to a file: an orphan must not keep alive who reads the trainer's output.
    """

    def __init__(self, module: str = WRITER_MODULE) -> None:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as its:
            our_end, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            its.callback(its_end.close)
            ours.callback(our_end.close)
            log_fd, self._log_path = tempfile.mkstemp(prefix=WRITER_LOG_PREFIX, suffix=".log")
            its.callback(os.close, log_fd)
            ours.callback(self._remove_log)
            trainer_fd = os.pidfd_open(os.getpid())
            its.callback(os.close, trainer_fd)
            with _signals_blocked():
                self._process = subprocess.Popen(
                    command(its_end.fileno(), trainer_fd, module),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log_fd,
                    cwd="/",
                    start_new_session=True,
                    pass_fds=(its_end.fileno(), trainer_fd),
                )
            self.pid = self._process.pid
            self.pidfd = os.pidfd_open(self.pid)
            self.connection = Connection(our_end)
            ours.pop_all()
        self.arenas: set[int] = set()  # that it has
        self.generations: dict[int, int] = {}  # of the directories that it writes
        _processes.add(self)

    def hang_up(self) -> None:
        """It finishes what it has, and ends. Safe to call twice, from any thread."""
        self.connection.shut_down()

    def kill(self) -> None:
        """End it at once; whatever it is doing can be cut off at any moment."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end, and give up what we hold of it; False on time-out."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        self._close()
        with contextlib.suppress(OSError):
            if os.path.getsize(self._log_path) == 0:
                self._remove_log()
        return True

    def leave(self) -> None:
        """Nobody will wait for it."""
        self._process.returncode = self._process.poll() or 0  # else subprocess warns of a child that is still running

    def describe_end(self) -> str:
        """How it ended, with the end of what it said on stderr."""
        code = self._process.returncode
        ending = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        with contextlib.suppress(OSError), open(self._log_path, encoding="utf-8", errors="replace") as file:
            if text := file.read()[-_MAX_LOG_BYTES:].strip():
                return f"{ending}: {text.splitlines()[-1]} (all of it is in {self._log_path})"
        return ending

    def leave_in_child(self) -> None:
        """In a forked child: it is the parent's."""
        self._process.returncode = 0
        self._close()

    def _remove_log(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._log_path)

    def _close(self) -> None:
        self.connection.close()
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd != -1:
            with contextlib.suppress(OSError):
                os.close(pidfd)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A new process inherits which signals are blocked: none of these may reach it before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_processes: weakref.WeakSet[WriterProcess] = weakref.WeakSet()


def _close_in_child() -> None:
    for process in list(_processes):
        process.leave_in_child()


os.register_at_fork(after_in_child=_close_in_child)
