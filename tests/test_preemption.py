"""A signal announces the end of a job: what is saved in time, or staged in time, survives. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointManager, PreemptionGuard

TIMEOUT_SECS = 120

# A training loop that saves when it is told to stop. Its writer's disk stops answering until somebody writes to the
# pipe `gate`, if there is one.
TRAINER = """
import os, sys, torch, asyncckpt
from asyncckpt.service import writer_process

HELD = '''
import os
from asyncckpt.storage import system_calls
fsync = system_calls.fsync
def held(fd):
    open("{gate}").close()
    fsync(fd)
system_calls.fsync = held
'''
gate = os.path.abspath("gate")
if os.path.exists(gate):
    command = writer_process.command
    def held_command(*fds):
        *start, code = command(*fds)
        path, run = code.split("; from ", 1)
        return [*start, path + HELD.format(gate=gate) + "from " + run]
    writer_process.command = held_command

model = torch.nn.Linear(10, 10)
manager = asyncckpt.CheckpointManager("run", **OPTIONS)
guard = asyncckpt.PreemptionGuard(manager, grace_secs=GRACE)
with manager, guard:
    print("training", flush=True)
    while not guard.should_stop:
        sys.stdin.readline()
    handle = manager.save(model, None, 1, 7)
    print("staged", handle.staged, flush=True)
    END
print("over", flush=True)
"""


@contextmanager
def trainer(directory: Path, end: str, *, grace: float = 60, options: str = "{}") -> Iterator[subprocess.Popen[str]]:
    """A process that trains until it is told to stop, and then does `end`."""
    code = TRAINER.replace("OPTIONS", options).replace("GRACE", repr(grace)).replace("END", end)
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", code],
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "training\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def tell_to_stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def steps_at(directory: Path) -> list[int | None]:
    """As the next trainer finds them: it waits for a writer that still works."""
    model = torch.nn.Linear(10, 10)
    with CheckpointManager(directory / "run") as manager:
        manager.load_latest(model)
        return [info.global_step for info in manager.list_checkpoints()]


def test_stops_saves_and_ends_within_the_grace_period(tmp_path: Path) -> None:
    with trainer(tmp_path, "manager.wait(timeout=guard.remaining_secs)") as process:
        tell_to_stop(process)
        output, errors = process.communicate(timeout=TIMEOUT_SECS)
    assert output.split("\n") == ["staged True", "over", ""]
    assert process.returncode == 0
    assert "60 s are left" in errors
    assert steps_at(tmp_path) == [7]


def test_at_the_deadline_what_is_staged_is_left_to_the_writer(tmp_path: Path) -> None:
    """The trainer's wait, close and exit end though the disk does not answer, with the loop's own exit code."""
    os.mkfifo(tmp_path / "gate")
    end = "try:\n        manager.wait(timeout=guard.remaining_secs)\n    except TimeoutError:\n        print('late')"
    with trainer(tmp_path, end, grace=0.5) as process:
        tell_to_stop(process)
        output, errors = process.communicate(timeout=TIMEOUT_SECS)
    assert output.split("\n") == ["staged True", "late", "over", ""]
    assert process.returncode == 0, errors
    assert "the writer process goes on" in errors
    found: list[int | None] = []
    reader = threading.Thread(target=lambda: found.extend(steps_at(tmp_path)))
    reader.start()  # the next trainer, which waits for the writer
    let_go(tmp_path / "gate")
    reader.join(TIMEOUT_SECS)
    assert found == [7]


def let_go(gate: Path) -> None:
    """Whoever waits at the pipe, now or later, finds somebody at its other end."""
    descriptor = os.open(gate, os.O_RDWR)
    os.rename(gate, gate.with_suffix(".open"))
    gate.touch()
    os.close(descriptor)


def test_a_second_signal_ends_the_trainer_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    with trainer(tmp_path, "manager.wait()") as process:
        tell_to_stop(process)
        assert next_line(process) == "staged True"
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=TIMEOUT_SECS)
    assert "over" not in output
    assert process.returncode == 128 + signal.SIGTERM, errors
    let_go(tmp_path / "gate")
    assert steps_at(tmp_path) == [7]


def test_with_threads_exit_flushes(tmp_path: Path) -> None:
    """`writer="thread"` is respected: there is nobody to leave anything to, so everything is waited for."""
    with trainer(tmp_path, "pass", options="dict(writer='thread')", grace=0.01) as process:
        tell_to_stop(process)
        process.communicate(timeout=TIMEOUT_SECS)
    assert process.returncode == 0
    assert steps_at(tmp_path) == [7]


WRITTEN_BY_THREADS = """
import threading, torch, asyncckpt
from asyncckpt.registry.retention import RetentionPolicy
from asyncckpt.storage import system_calls

class Everything(RetentionPolicy):
    def kept(self, checkpoints):
        return frozenset(info.sequence for info in checkpoints)

manager = asyncckpt.CheckpointManager("run", retention=Everything(), writer="process")
model = torch.nn.Linear(10, 10)
manager.save(model, None, 1, 1).result(60)
system_calls.fsync = lambda fd: threading.Event().wait()
manager.save(model, None, 1, 2)
manager.leave_to_writer()
"""


def test_what_threads_write_does_not_survive_and_that_is_said(tmp_path: Path) -> None:
    """A policy of the user's own is code that the writer does not have: the save is lost, and the exit code tells."""
    done = subprocess.run(
        [sys.executable, "-c", WRITTEN_BY_THREADS], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_SECS
    )
    assert done.returncode == 74, done.stderr
    assert "1 of 1 saves are not durable yet" in done.stderr
    assert "the writer process goes on" not in done.stderr
    assert steps_at(tmp_path) == [1]


@pytest.fixture
def saver() -> Iterator[AsyncCheckpointSaver]:
    with AsyncCheckpointSaver(writer="thread") as saver:
        yield saver


def test_earlier_handlers_run_and_come_back(saver: AsyncCheckpointSaver) -> None:
    heard: list[int] = []

    def earlier(number: int, frame: object) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGUSR1, earlier)
    try:
        with PreemptionGuard(saver, [signal.SIGUSR1]) as guard:
            assert not guard.should_stop
            assert guard.remaining_secs is None
            signal.raise_signal(signal.SIGUSR1)
            assert guard.should_stop
            assert guard.remaining_secs is not None
            assert 0 < guard.remaining_secs <= 30
            with pytest.raises(SystemExit):
                signal.raise_signal(signal.SIGUSR1)
        assert heard == [signal.SIGUSR1] * 2
        assert signal.getsignal(signal.SIGUSR1) is earlier
        guard.close()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_somebody_elses_later_handler_stays(saver: AsyncCheckpointSaver) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with PreemptionGuard(saver, [signal.SIGUSR1]):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_ends_at_the_signal(saver: AsyncCheckpointSaver) -> None:
    """As DataLoader workers must."""
    with PreemptionGuard(saver) as guard:
        started, start = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(start, b"1")
            signal.pause()
            os._exit(0)
        os.read(started, 1)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert not guard.should_stop
    os.close(started)
    os.close(start)


def test_the_guard_starts_the_writer_process(tmp_path: Path) -> None:
    """Saves before it and after it are all there, in order."""
    with AsyncCheckpointSaver() as saver:
        saver.save({"number": 1}, tmp_path / "a.pt")
        with PreemptionGuard(saver):
            assert asyncckpt.load(tmp_path / "a.pt") == {"number": 1}
            saver.save({"number": 2}, tmp_path / "a.pt").result(TIMEOUT_SECS)
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            names = [Path(f"/proc/{child}/comm").read_text().strip() for child in children]
            assert "asyncckpt-save" in names
    assert asyncckpt.load(tmp_path / "a.pt") == {"number": 2}


def test_wrong_use(saver: AsyncCheckpointSaver) -> None:
    with pytest.raises(ValueError, match="grace_secs"):
        PreemptionGuard(saver, grace_secs=0)
    errors: list[str] = []

    def construct() -> None:
        try:
            PreemptionGuard(saver)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=construct)
    thread.start()
    thread.join()
    assert errors == ["a PreemptionGuard must be made on the main thread: only that one may handle signals"]


def test_a_signal_that_nobody_can_handle(saver: AsyncCheckpointSaver) -> None:
    """The error names it, and the others mean what they meant."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="SIGKILL"):
        PreemptionGuard(saver, [signal.SIGTERM, signal.SIGKILL])
    assert signal.getsignal(signal.SIGTERM) == before
