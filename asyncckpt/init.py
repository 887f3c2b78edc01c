"""A small init for containers, `asyncckpt run`: they end when the last checkpoint is written. Linux only; no torch.

A container, and a job step, lives as long as its first process. If that is the training, and it is killed, the kernel
kills the writer process with it, which was about to finish what had been staged. So this one goes first: it starts the
command, hands on signals, reaps whatever is left by dead parents, and at the end waits for writers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from asyncckpt.naming import INIT_NAME, WRITER_NAME

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as shells have it

_ENDING = frozenset({signal.SIGTERM, signal.SIGINT})
# Not those of the process's own faults, and not those that stop it: a terminal sends these to both.
_FORWARDED_NAMES = "SIGHUP SIGINT SIGQUIT SIGTERM SIGUSR1 SIGUSR2 SIGALRM SIGCONT SIGWINCH SIGPWR"
_POLL_SECS = 0.5  # the end of a writer whose parent is still there sends us no signal
_MAX_NAMED = 5
_MAX_SCANS = 10

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_SI_KERNEL = 0x80


def run(command: Sequence[str], grace_secs: float = 600.0) -> int:
    """Run `command`, then wait for the writers among its descendants; the exit code that the command ended with.

    Blocks. A command that a signal ended counts as 128 + its number, one that is not there as 127, one that can't be
    executed as 126. Must be called on the main thread of a process that has no other: it blocks signals for good, and
    reaps every child. Raises OSError where this can't be done, on other systems than Linux say.
    """
    if sys.platform != "linux":
        raise OSError("asyncckpt run needs Linux: elsewhere orphans can't be waited for")
    return _Init(command).run(grace_secs)


class _Init:
    def __init__(self, command: Sequence[str]) -> None:
        # Blocked before the command starts, so that none is lost: they are taken by waiting for them. Blocked ones
        # are kept even if they would be ignored, which for PID 1 is the default.
        self._signals = _forwarded() | {signal.SIGCHLD}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it never learns how a child ended
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        _prctl(_PR_SET_NAME, INIT_NAME.encode())
        # On a terminal both stay in its foreground group: it can stop them, and the keyboard's signals reach both.
        self._shares_group = _in_foreground()
        self._num_endings = 0
        self._exit_code: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            _execute(command, mask, own_group=not self._shares_group)

    def run(self, grace_secs: float) -> int:
        self._reap()
        while self._exit_code is None:
            self._take(signal.sigwaitinfo(self._signals))
            self._reap()
        self._await_writers(grace_secs)
        return self._exit_code

    def _await_writers(self, grace_secs: float) -> None:
        deadline = time.monotonic() + grace_secs
        announced = False
        while pids := _writers():
            if not announced:
                _say(f"waiting for {_describe(pids)}, for at most {grace_secs:g} s; a further SIGTERM ends that")
                announced = True
            rest = deadline - time.monotonic()
            if rest <= 0:
                _say(f"{grace_secs:g} s are over: leaving {_describe(pids)}, whose checkpoints may be lost")
                return
            received = signal.sigtimedwait(self._signals, min(rest, _POLL_SECS))
            if received is not None:
                self._take(received)
                if received.si_signo in _ENDING:
                    if self._num_endings > 1:
                        _say(f"told to end: leaving {_describe(pids)}, whose checkpoints may be lost")
                        return
                    _say("told to end: waiting still; another SIGTERM ends that")
            self._reap()

    def _take(self, received: signal.struct_siginfo) -> None:
        if received.si_signo == signal.SIGCHLD:
            return
        self._num_endings += received.si_signo in _ENDING
        from_terminal = self._shares_group and received.si_code == _SI_KERNEL
        if self._exit_code is None and not from_terminal:
            os.kill(self._pid, received.si_signo)

    def _reap(self) -> None:
        """Let every child that has ended go; one signal may stand for many of them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                code = os.waitstatus_to_exitcode(status)
                self._exit_code = 128 - code if code < 0 else code


def _forwarded() -> set[int]:
    named = (getattr(signal, name) for name in _FORWARDED_NAMES.split())
    return {*named, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1)}


def _execute(command: Sequence[str], mask: set[signal.Signals | int], *, own_group: bool) -> NoReturn:
    """In the forked child: become the command."""
    code = NOT_EXECUTABLE
    try:
        if own_group:
            # A signal to our whole group must not reach it twice: for a training script, the second means "at once".
            os.setpgid(0, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # if we are killed, it must not run on unseen
        for changed_by_python in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            if changed_by_python != signal.SIGINT or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                signal.signal(changed_by_python, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvp(command[0], list(command))
    except BaseException as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            code = NOT_FOUND
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        _say(f"{command[0]}: {reason}")
    finally:
        os._exit(code)


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # stdin is no terminal, or not ours
        return False


def _writers() -> list[int]:
    """The living writer processes among all descendants of this process."""
    found: list[int] = []
    for _ in range(_MAX_SCANS):
        parents, named = _scan()
        tops = {pid: _top(pid, parents) for pid in named}
        found = [pid for pid, top in tops.items() if top == os.getpid()]
        if set(tops.values()) <= {0, os.getpid()}:
            break
        # A parent on the way up has ended while we looked, and its children may be ours now; or is hidden from us.
    return found


def _scan() -> tuple[dict[int, int], list[int]]:
    """The parent of every process, and those that are called writers."""
    parents: dict[int, int] = {}
    named: list[int] = []
    for pid in _processes():
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                before, _, after = file.read().rpartition(")")  # a name may hold parentheses itself
        except OSError:  # it has ended meanwhile
            continue
        state, parent = after.split()[:2]
        parents[pid] = int(parent)
        if before.partition("(")[2] == WRITER_NAME and state not in "ZX":
            named.append(pid)
    return parents, named


def _top(pid: int, parents: Mapping[int, int]) -> int:
    """The way up from a process: to this one, to 0, or to one that is missing."""
    for _ in parents:  # not for ever, whatever a number that was reused has to do with it
        if pid in (0, os.getpid()) or pid not in parents:
            break
        pid = parents[pid]
    return pid


def _processes() -> list[int]:
    try:
        if os.readlink("/proc/self") == str(os.getpid()):
            return [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        pass
    _say("can't look for writer processes, since /proc shows not the processes here: not waiting")
    return []


def _describe(pids: Sequence[int]) -> str:
    shown = ", ".join(map(str, pids[:_MAX_NAMED])) + (", …" if len(pids) > _MAX_NAMED else "")
    return f"{len(pids)} writer process{'es' if len(pids) > 1 else ''} ({shown})"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens: no reason to leave anybody
        print(f"asyncckpt run: {line}", file=sys.stderr, flush=True)


def _prctl(option: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value if isinstance(value, bytes) else ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl: {os.strerror(error)}")
