"""`asyncckpt run`, with real processes that are really killed."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from asyncckpt import init
from asyncckpt.cli import run as run_command
from cli.fake_job import CAUGHT, DIE
from cli.test_app import drive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NOT CHECKED: asyncckpt run is for Linux")

FAKE_JOB = str(Path(__file__).with_name("fake_job.py"))
ASYNCCKPT_RUN = [sys.executable, "-m", "asyncckpt", "run"]
TIMEOUT_SECS = 60.0


class Job:
    """`asyncckpt run` over a role of `fake_job`; what the processes say, and the writer's word to end."""

    def __init__(self, role: str, *options: str, prefix: Sequence[str] = (), name: Sequence[str] = ()) -> None:
        said, their_said = os.pipe()
        their_told, self._told = os.pipe()
        inherited = (their_said, their_told)
        command = [sys.executable, FAKE_JOB, role, *map(str, inherited), *name]
        self.process = subprocess.Popen(
            [*prefix, *ASYNCCKPT_RUN, *options, "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=inherited,
            start_new_session=True,
        )
        for descriptor in inherited:
            os.close(descriptor)
        self._said = open(said)  # noqa: SIM115
        self._pids: list[int] = []

    def heard(self, what: str) -> str:
        """The next line that somebody says: it starts with `what`; the rest of it."""
        line = self._said.readline().strip()
        if line.split()[-1:] and line.split()[0] in ("training", "writer", "of"):
            self._pids.append(int(line.split()[-1]))
        assert line.startswith(what), line
        return line.removeprefix(what).strip()

    def warned(self, what: str) -> str:
        """The next line on stderr, which holds `what`."""
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("asyncckpt run: ")
        assert what in line
        return line

    def let_writer_end(self) -> None:
        os.write(self._told, b".")

    def ended(self) -> int:
        """The exit code; nothing more was on stderr."""
        code = self.process.wait(TIMEOUT_SECS)
        assert self.process.stderr is not None
        assert self.process.stderr.read() == ""
        return code

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.close(self._told)
        self._said.close()
        assert self.process.stderr is not None
        self.process.stderr.close()


StartJob = Callable[..., Job]


@pytest.fixture
def start() -> Iterator[StartJob]:
    """Starts jobs of which no process is left at the end."""
    with contextlib.ExitStack() as stack:

        def start_job(role: str, *options: str, prefix: Sequence[str] = (), name: Sequence[str] = ()) -> Job:
            job = Job(role, *options, prefix=prefix, name=name)
            stack.callback(job.close)
            return job

        yield start_job


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ASYNCCKPT_RUN, *arguments], capture_output=True, text=True, timeout=TIMEOUT_SECS, check=False
    )


@pytest.mark.parametrize(
    ("command", "code", "stderr"),
    [
        (["true"], 0, ""),
        (["sh", "-c", "exit 7"], 7, ""),
        (["sh", "-c", "kill -KILL $$"], 137, ""),
        (["sh", "-c", "kill -TERM $$"], 143, ""),
        (["sh", "-c", "kill -INT $$"], 130, ""),
        (["sh", "-c", "kill -PIPE $$"], 141, ""),  # which Python ignores, and its children need not
        (["asyncckpt-no-such-command"], 127, "asyncckpt run: asyncckpt-no-such-command: No such file or directory\n"),
        (["./no/such/command"], 127, "asyncckpt run: ./no/such/command: No such file or directory\n"),
        (["/etc/passwd"], 126, "asyncckpt run: /etc/passwd: Permission denied\n"),
        (["/"], 126, "asyncckpt run: /: Permission denied\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_it_exits_as_the_command_did(command: list[str], code: int, stderr: str) -> None:
    """As a shell would."""
    done = run("--", *command)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", stderr)


def test_the_command_is_all_that_comes_after_the_dashes() -> None:
    """Its own options and dashes are its own; stdin and the environment too."""
    done = run("--grace", "5", "--", "echo", "--grace", "x", "--", "--help")
    assert (done.returncode, done.stdout, done.stderr) == (0, "--grace x -- --help\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the command comes after --"),
        (["--"], "the command comes after --"),
        (["true"], "the command comes after --"),
        (["true", "--", "true"], "the command comes after --"),
        (["--grace", "nan", "--", "true"], "'nan' is no number of seconds"),
        (["--grace", "-1", "--", "true"], "'-1' is no number of seconds"),
        (["--grace", "soon", "--", "true"], "'soon' is no number of seconds"),
        (["--unknown", "--", "true"], "the command comes after --"),
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and nothing is started."""
    with pytest.raises(SystemExit) as raised:
        run_command.main(arguments)
    assert raised.value.code == 2
    assert said in capfd.readouterr().err


def test_elsewhere_it_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """In one line, before anything is started."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert run_command.main(["--", "touch", "/started"]) == 3
    out, err = capfd.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("asyncckpt: asyncckpt run needs Linux")


def test_it_is_light() -> None:
    """It needs no torch, typer or rich, and stays in memory as long as the training."""
    done = drive("run", "--", "true", before="sys.modules['typer'] = sys.modules['rich'] = None")
    assert (done.returncode, done.stderr) == (0, "False\n")


def test_signals_are_handed_on_once_each(start: StartJob) -> None:
    """Also those to its whole process group: for a training script a second one means something else."""
    job = start("training")
    job.heard("training")
    for send in (os.kill, os.killpg):
        for number in set(CAUGHT) - {signal.SIGTERM}:
            send(job.process.pid, number)
            assert int(job.heard("got")) == number
    os.kill(job.process.pid, signal.SIGTERM)
    assert int(job.heard("got")) == signal.SIGTERM
    assert job.ended() == 3


def test_a_killed_training_leaves_a_writer_that_is_awaited(start: StartJob) -> None:
    """The exit code is the training's, and comes after the checkpoint."""
    job = start("saving")
    writer = job.heard("writer")
    os.kill(int(job.heard("training")), signal.SIGKILL)
    assert job.warned("waiting for 1 writer process") == (
        f"asyncckpt run: waiting for 1 writer process ({writer}), for at most 600 s; a further SIGTERM ends that\n"
    )
    assert job.process.poll() is None
    job.let_writer_end()
    job.heard("written")
    assert job.ended() == 137


def test_a_writer_whose_parent_is_not_the_command(start: StartJob) -> None:
    """A launcher ended before the ranks that it started; the rank is not waited for, its writer is."""
    job = start("launcher")
    lines = sorted([job._said.readline() for _ in range(3)])
    assert [line.split()[0] for line in lines] == ["launcher", "training", "writer"]
    job._pids += [int(line.split()[-1]) for line in lines[1:]]
    job.warned(f"waiting for 1 writer process ({job._pids[-1]})")
    job.let_writer_end()
    job.heard("written")
    assert job.ended() == 0
    os.kill(job._pids[0], 0)  # alive


def test_other_orphans_are_not_awaited(start: StartJob) -> None:
    """A process of another name may stay as long as it likes."""
    job = start("saving", name=("tensorboard",))
    writer = int(job.heard("writer"))
    os.kill(int(job.heard("training")), signal.SIGKILL)
    assert job.ended() == 137
    os.kill(writer, 0)  # alive


def test_a_dead_writer_is_not_awaited(start: StartJob) -> None:
    """Neither if it dies while its parent lives and does not reap it, nor while it is waited for."""
    job = start("saving")
    os.kill(int(job.heard("writer")), signal.SIGKILL)
    job.heard("training")
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.ended() == 3
    job = start("saving")
    writer = int(job.heard("writer"))
    job.heard("training")
    os.kill(job.process.pid, signal.SIGTERM)
    job.warned("waiting for 1 writer process")
    os.kill(writer, signal.SIGKILL)
    assert job.ended() == 3


def test_the_grace_runs_out(start: StartJob) -> None:
    """It says whom it leaves."""
    job = start("saving", "--grace", "0.2")
    writer = job.heard("writer")
    os.kill(int(job.heard("training")), signal.SIGKILL)
    job.warned("for at most 0.2 s")
    job.warned(f"0.2 s are over: leaving 1 writer process ({writer}), whose checkpoints may be lost")
    assert job.ended() == 137


def test_a_second_signal_ends_the_waiting(start: StartJob) -> None:
    """The first one ended the training."""
    job = start("saving")
    writer = job.heard("writer")
    job.heard("training")
    os.kill(job.process.pid, signal.SIGTERM)
    job.warned("waiting for 1 writer process")
    os.kill(job.process.pid, signal.SIGUSR1)  # says nothing about ending
    os.kill(job.process.pid, signal.SIGINT)
    job.warned(f"told to end: leaving 1 writer process ({writer}), whose checkpoints may be lost")
    assert job.ended() == 3


def test_the_first_signal_is_no_second_one(start: StartJob) -> None:
    """After a training that was killed it is the container's end: there is a grace period then, to be used."""
    job = start("saving")
    job.heard("writer")
    os.kill(int(job.heard("training")), signal.SIGKILL)
    job.warned("waiting for 1 writer process")
    os.kill(job.process.pid, signal.SIGTERM)
    job.warned("told to end: waiting still; another SIGTERM ends that")
    job.let_writer_end()
    job.heard("written")
    assert job.ended() == 137


def test_the_dead_are_reaped(start: StartJob) -> None:
    """While the command runs: orphans that end become no zombies."""
    job = start("orphans")
    training = job.heard("training")
    children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children")
    assert len(children.read_text().split()) == 6
    for _ in range(5):
        job.let_writer_end()
    eventually(lambda: children.read_text().split() == [training])
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.ended() == 3


def test_killed_it_does_not_leave_the_training_unseen(start: StartJob) -> None:
    """The training is told to end, and saves."""
    job = start("saving")
    job.heard("writer")
    job.heard("training")
    os.killpg(job.process.pid, signal.SIGKILL)
    assert int(job.heard("got")) == signal.SIGTERM
    job.let_writer_end()
    job.heard("written")


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As `nohup` and background jobs of a shell want it."""
    script = 'trap "" INT; exec "$@"'
    command = ["sh", "-c", script, "sh", *ASYNCCKPT_RUN, "--", "sh", "-c", "kill -INT $$; echo alive"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECS, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_the_keyboard_of_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C reaches the command, once, and it may read from the terminal."""
    said = tmp_path / "said"
    script = f"exec 3>>{said}; read line; echo $line >&3; exec {sys.executable} {FAKE_JOB} training 3 0"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(sys.executable, [*ASYNCCKPT_RUN, "--", "sh", "-c", script])
    try:
        os.write(terminal, b"typed\n")
        eventually(lambda: said.exists() and "training" in said.read_text())
        os.write(terminal, b"\x03")
        eventually(lambda: "got" in said.read_text())
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        lines = said.read_text().split("\n")
        assert lines[0] == "typed"
        assert lines[2:5] == [f"got {number}" for number in (2, 10, 15)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.close(terminal)


PID_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")


@pytest.fixture
def pid_namespace() -> tuple[str, ...]:
    """A command's beginning that makes it PID 1 of a namespace, as in a container."""
    tried = subprocess.run([*PID_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"NOT CHECKED: no PID namespace to be had here: {tried.stderr.strip()}")
    return PID_NAMESPACE


def first_process(job: Job) -> int:
    """PID 1 of the namespace, as seen from outside."""
    pid = job.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def test_as_pid_1(start: StartJob, pid_namespace: tuple[str, ...]) -> None:
    """Signals reach the training, though the kernel spares PID 1; the writer, which would die with it, is awaited."""
    job = start("saving", prefix=(*pid_namespace, "--mount-proc"))
    job.heard("writer")
    job.heard("training")
    os.kill(first_process(job), signal.SIGHUP)
    assert int(job.heard("got")) == signal.SIGHUP
    os.kill(first_process(job), DIE)
    assert int(job.heard("got")) == DIE
    job.warned("waiting for 1 writer process")
    job.let_writer_end()
    job.heard("written")
    assert job.ended() == 137


def test_as_pid_1_until_it_is_told_to_end(start: StartJob, pid_namespace: tuple[str, ...]) -> None:
    """Then the kernel ends the writer, as it does without `asyncckpt run`: nobody writes any more."""
    job = start("saving", prefix=(*pid_namespace, "--mount-proc"))
    job.heard("writer")
    job.heard("training")
    os.kill(first_process(job), signal.SIGTERM)
    assert int(job.heard("got")) == signal.SIGTERM
    job.warned("waiting for 1 writer process")
    os.kill(first_process(job), signal.SIGTERM)
    job.warned("told to end: leaving 1 writer process")
    assert job.ended() == 3
    assert job._said.readline() == ""  # the last one that held the pipe's other end is dead


def test_where_proc_shows_other_processes(start: StartJob, pid_namespace: tuple[str, ...]) -> None:
    """It can't know of writers then, and says so."""
    job = start("saving", prefix=pid_namespace)
    job.heard("writer")
    job.heard("training")
    os.kill(first_process(job), signal.SIGTERM)
    job.heard("got")
    job.warned("can't look for writer processes")
    assert job.ended() == 3


@pytest.mark.parametrize(
    ("parents", "top"),
    [({7: 5, 5: 1, 1: 0}, 0), ({7: 5}, 5), ({7: -1, 3: 1}, -1), ({7: 8, 8: 7}, 7)],
    ids=["somebody else's", "a parent that has ended", "ours", "a circle of reused numbers"],
)
def test_the_way_up(parents: dict[int, int], top: int) -> None:
    """To whom a process belongs (-1 stands for this process)."""
    ours = {pid: os.getpid() if parent == -1 else parent for pid, parent in parents.items()}
    assert init._top(7, ours) == (os.getpid() if top == -1 else top)
