"""Processes for `asyncckpt run` to be tested with: a training that takes signals, and its writer. No torch.

Run as a script with a role and two inherited descriptors: each says on `said` what it does, a line each, and the writer
works until `told` ends or holds a byte for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

from asyncckpt.naming import WRITER_NAME

_PR_SET_NAME = 15
CAUGHT = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2),
    *(signal.SIGALRM, signal.SIGCONT, signal.SIGWINCH, signal.SIGRTMIN + 3),
)
DIE = signal.SIGRTMIN + 4  # as if the kernel had killed it


def say(said: int, line: str) -> None:
    os.write(said, f"{line}\n".encode())


def writer(said: int, told: int, name: str = WRITER_NAME) -> None:
    """As the real one: of its own session, deaf to signals, with a name."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("ready", flush=True)
    os.read(told, 1)
    say(said, "written")


def start_writer(said: int, told: int, *name: str) -> None:
    command = [sys.executable, __file__, "writer", str(said), str(told), *name]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(said, told), start_new_session=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    say(said, f"writer {child.pid}")


def training(said: int, told: int) -> None:
    """Says which signals it gets, and ends at SIGTERM with 3."""
    signals = {*CAUGHT, DIE}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    say(said, f"training {os.getpid()}")
    while True:
        number = signal.sigwait(signals)
        say(said, f"got {int(number)}")
        if number == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == signal.SIGTERM:
            sys.exit(3)


def saving(said: int, told: int, *name: str) -> None:
    """A training with a writer."""
    start_writer(said, told, *name)
    print("ready", flush=True)
    training(said, told)


def launcher(said: int, told: int) -> None:
    """Leaves a training behind, and ends."""
    command = [sys.executable, __file__, "saving", str(said), str(told)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(said, told))
    assert child.stdout is not None
    child.stdout.readline()
    say(said, f"launcher of {child.pid}")


def orphans(said: int, told: int) -> None:
    """Leaves processes that end without a parent, and then waits."""
    for _ in range(5):
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            if grandchild == 0:
                os.read(told, 1)
            os._exit(0)
        os.waitpid(child, 0)
    training(said, told)


if __name__ == "__main__":
    globals()[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
