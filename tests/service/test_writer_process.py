"""The writer process itself: how it starts, what it inherits, what it survives, how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reliability.gates import SEED, count

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointManager, CheckpointWriteError, Event
from asyncckpt.naming import WRITER_LOG_PREFIX
from asyncckpt.service import writer_process
from asyncckpt.service.process_queue import ProcessQueue
from service.disk import TESTS, Disk, children, wait_for, writer_command, writer_disk
from service.writer_conformance import Training, number_at, recorded_steps, state, steps

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NOT CHECKED: a writer process needs Linux")

CAP_SYS_RESOURCE = 24
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Under every writer process; checks in the end that nothing is left of them."""
    with writer_disk(tmp_path, monkeypatch) as disk:
        yield disk


@pytest.fixture
def place(tmp_path: Path, disk: Disk) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def make_saver(**options: Any) -> AsyncCheckpointSaver:
    return AsyncCheckpointSaver(writer="process", **options)


def pid_of(saver: AsyncCheckpointSaver) -> int:
    assert isinstance(saver._queue, ProcessQueue)
    assert saver._queue.pid is not None
    return saver._queue.pid


def status(pid: int | str, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


# --- what it is ---


def test_what_it_inherits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch, no descriptor of the trainer, nothing of its terminal, session or directory; and little memory."""
    ours, theirs = socket.socketpair()
    file = os.open(place / "open", os.O_CREAT | os.O_RDWR)
    for fd in (ours.fileno(), theirs.fileno(), file):
        os.set_inheritable(fd, True)
    monkeypatch.chdir(place)
    with make_saver() as saver:
        saver.save(state(1), "a.pt").result(60)
        pid = pid_of(saver)
        process = Path(f"/proc/{pid}")
        descriptors = {fd: os.readlink(process / "fd" / fd) for fd in os.listdir(process / "fd")}
        assert descriptors.pop("0") == descriptors.pop("1") == "/dev/null"
        assert os.path.basename(descriptors.pop("2")).startswith(WRITER_LOG_PREFIX)
        assert not {os.readlink(f"/proc/self/fd/{fd}") for fd in (ours.fileno(), file)} & set(descriptors.values())
        maps = (process / "maps").read_text()
        assert "torch" not in maps
        assert "numpy" not in maps
        assert status(pid, "RssAnon") + status(pid, "RssFile") < 60_000
        assert (process / "comm").read_text() == "asyncckpt-save\n"
        assert os.readlink(process / "cwd") == "/"
        assert os.getsid(pid) == os.getpgid(pid) == pid
    assert number_at(place / "a.pt") == 1
    os.close(file)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("nice", [0, 7])
def test_priorities(nice: int, place: Path) -> None:
    """So far below the trainer's; the out-of-memory killer takes the trainer first."""
    with make_saver(nice=nice) as saver:
        saver.save(state(1), place / "a.pt").result(60)
        pid = pid_of(saver)
        expected = min(19, os.getpriority(os.PRIO_PROCESS, 0) + nice)
        tasks = [int(task) for task in os.listdir(f"/proc/{pid}/task")]
        assert {os.getpriority(os.PRIO_PROCESS, task) for task in tasks} == {expected}
        io_priorities = {ctypes.CDLL(None).syscall(252, 1, task) for task in tasks}  # ioprio_get
        if os.uname().machine == "x86_64":
            assert io_priorities == {2 << 13 | 7} if nice else (2 << 13 | 7) not in io_priorities
        own, writers = (int(Path(f"/proc/{p}/oom_score_adj").read_text()) for p in ("self", pid))
        may_lower = (
            int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16) >> CAP_SYS_RESOURCE & 1
        )
        assert writers == (max(-1000, own - 500) if may_lower else own)
        autogroup = Path(f"/proc/{pid}/autogroup")
        if autogroup.exists() and (figure := autogroup.read_text().split()):
            assert figure[-1] == str(nice)


def test_its_memory_can_not_shrink_under_it(place: Path, disk: Disk) -> None:
    """The arena is sealed, so that nobody can turn the writer's reading into a SIGBUS."""
    with make_saver() as saver, disk.held():
        saver.save(state(1), place / "a.pt")
        disk.wait_until_held()
        [entry] = saver._queue._entries.values()  # type: ignore[union-attr]
        with pytest.raises(PermissionError):
            os.ftruncate(entry.submission.image.arena.fd, 0)  # type: ignore[union-attr, arg-type]
    assert number_at(place / "a.pt") == 1


def test_memory_that_the_trainer_gives_back(place: Path) -> None:
    """The writer gives back too."""

    def num_arenas(pid: int | str) -> int:
        return sum("memfd:asyncckpt" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())

    before = num_arenas("self")
    with make_saver(max_in_flight=1) as saver:
        for number in range(1, 6):  # each state needs a larger arena, and the one before is given back
            saver.save(state(number, number * 1_000_000), place / "a.pt").result(60)
            saver.wait(60)
        wait_for(lambda: num_arenas(pid_of(saver)) == num_arenas("self") - before == 1)


# --- how it starts ---

HOSTILE_NAMES = ("queue", "logging", "msgspec", "socket", "threading", "json", "ctypes", "isal", "signal", "select")


def test_the_trainers_own_modules_do_not_kill_it(tmp_path: Path) -> None:
    """Neither in the working directory nor beside the script, whatever the environment says."""
    (tmp_path / "tmp").mkdir()
    package = Path(asyncckpt.__file__).parent.parent
    for name in HOSTILE_NAMES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the user')")
    code = f"""
import os, sys
sys.path.insert(0, {str(package)!r})
import torch, asyncckpt, {", ".join(HOSTILE_NAMES)}
asyncckpt.AsyncCheckpointSaver().close()  # the trainer has all that it needs
sys.path[:0] = ["", {str(tmp_path)!r}]
for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE"):
    os.environ[name] = {str(tmp_path)!r}
os.environ["PYTHONWARNINGS"] = "error"
with asyncckpt.AsyncCheckpointSaver(writer="process") as saver:
    saver.save({{"number": 1, "weights": torch.ones(10)}}, "a.pt").result(60)
    print(saver._queue.pid is not None, flush=True)
"""
    result = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "True\n", "")
    assert number_at(tmp_path / "a.pt") == 1
    assert list((tmp_path / "tmp").glob(f"{WRITER_LOG_PREFIX}*")) == []


def test_save_does_not_wait_for_its_start(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty saves are handed to a writer that has not begun to live; it does them all when it has."""
    gate = tmp_path / "gate"
    gate.touch()
    prelude = f"import os, time\nwhile os.path.exists({str(gate)!r}): time.sleep(0.01)"
    monkeypatch.setattr(writer_process, "command", writer_command(tmp_path / "control", prelude=prelude))
    with make_saver(max_in_flight=50) as saver:
        handles = [saver.save(state(number), place / f"{number}.pt") for number in range(50)]
        assert not any(handle.done() for handle in handles)
        gate.unlink()
        assert [number_at(handle.result(60).filepath) for handle in handles] == list(range(50))


def test_signals_from_its_very_first_moment(place: Path) -> None:
    """A storm of what a terminal, a launcher or a user sends to the whole job."""
    before, over, num_sent = set(children()), threading.Event(), 0

    def storm() -> None:
        nonlocal num_sent
        while not over.is_set():
            for pid in set(children()) - before:
                for number in IGNORED:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                        num_sent += 1

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        events: list[Event] = []
        for number in range(5):
            with make_saver(on_event=events.append) as saver:
                saver.save(state(number), place / "a.pt").result(60)
                pid = pid_of(saver)
                ignored = int(next(
                    line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                    if line.startswith("SigIgn")
                ), 16)  # fmt: skip
                assert all(ignored >> (number - 1) & 1 for number in IGNORED)
                over.set() if number == 4 else None
                thread.join(60) if number == 4 else None  # before the process id can be anybody else's
        assert [event.kind for event in events].count("writer_died") == 0
    finally:
        over.set()
        thread.join(60)
    assert num_sent > 100
    assert number_at(place / "a.pt") == 4


@pytest.mark.parametrize("executable", ["/bin/true", "", "/opt/app/app"])
def test_where_there_is_no_python_to_start(executable: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads write, and it is said."""
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.warns(UserWarning, match="no Python interpreter.*threads write the checkpoints instead"):
        saver = make_saver()
    with saver:
        saver.save(state(1), place / "a.pt").result(60)
    assert not children()


def test_a_frozen_program(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is no Python interpreter, whatever its name."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.warns(UserWarning, match="no Python interpreter"), make_saver() as saver:
        saver.save(state(1), place / "a.pt").result(60)


def test_a_process_that_can_not_be_started(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads write, and it is said."""
    monkeypatch.setattr(writer_process, "command", lambda *fds: ["/nowhere/python"])
    with pytest.warns(UserWarning, match="can't be started: .*threads write"):
        saver = make_saver()
    with saver:
        saver.save(state(1), place / "a.pt").result(60)


def test_a_process_that_dies_at_its_start(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After three of them threads take over, in order, and nothing is lost; the log tells why.

    No save is to blame, though each of these writers has been given the first images.
    """
    (go := tmp_path / "go").touch()
    prelude = f"import os, time\nwhile os.path.exists({str(go)!r}): time.sleep(0.01)\nraise ImportError('of the test')"
    monkeypatch.setattr(writer_process, "command", writer_command(tmp_path / "control", prelude=prelude))
    events: list[Event] = []
    training = Training()
    with CheckpointManager(place, 3, writer="process", save_rng=False, on_event=events.append) as manager:
        handles = [training.save(manager) for _ in range(2)]
        for handle in handles:
            handle.wait_staged(60)
        go.unlink()
        handles += [training.save(manager) for _ in range(6)]
        assert [handle.result(60).global_step for handle in handles] == list(range(1, 9))
        manager.wait(60)
        assert steps(manager) == recorded_steps(place) == [6, 7, 8]
    died = [event.detail for event in events if event.kind == "writer_died"]
    assert len(died) == 4
    assert all("ended with exit code 1: ImportError: of the test" in detail for detail in died[:3])
    assert "written by threads from now on" in died[3]
    assert "written by threads from now on" in caplog.text
    for log in (tmp_path / "tmp").glob(f"{WRITER_LOG_PREFIX}*"):
        assert "ImportError: of the test" in log.read_text()  # kept, as the message says
        log.unlink()


# --- when it dies ---


@pytest.mark.timeout(900)
def test_killed_at_every_call(place: Path, disk: Disk) -> None:
    """Whatever it was about to do: the saves are done by the next one, once, and the trainer hardly notices."""
    num_deaths, every = 0, count(5, full=1)
    while True:
        directory = place / str(num_deaths)
        events: list[Event] = []
        training = Training()
        with CheckpointManager(directory, 2, writer="process", save_rng=False, on_event=events.append) as manager:
            training.save(manager, 1.0).result(60)
            manager.wait(60)
            base = len([call for call in disk.calls if call[0] == pid_of(manager._saver)])
            disk.kill_at(base + num_deaths)
            handles = [training.save(manager, 2.0), training.save(manager, 0.5)]
            assert [handle.result(60).global_step for handle in handles] == [2, 3], num_deaths
            manager.wait(60)
            assert steps(manager) in ([2, 3], [1, 2, 3]), num_deaths  # what was taken in drops nothing yet
            disk.mend()
            training.save(manager, 3.0).result(60)
            manager.wait(60)
            assert steps(manager) == [3, 4], num_deaths
            assert training.load(manager) == 4, num_deaths
        died = [event.kind for event in events].count("writer_died")
        assert recorded_steps(directory) == [3, 4]
        listed = [info.filepath.name for info in manager.list_checkpoints()]
        assert sorted(name for name in os.listdir(directory) if name != ".asyncckpt.lock") == sorted(
            ["best_model.pt", "registry.json", *listed]
        ), num_deaths
        if not died:
            break
        num_deaths += every
    assert num_deaths > 40


def test_killed_at_every_call_of_a_plain_save(place: Path, disk: Disk) -> None:
    """Without a directory to look into: the file is written again."""
    num_deaths, every = 0, count(3, full=1)
    while True:
        events: list[Event] = []
        disk.kill_at(num_deaths)
        with make_saver(on_event=events.append) as saver:
            handles = [saver.save(state(number), place / "a.pt") for number in (1, 2)]
            assert [handle.result(60).filepath for handle in handles] == [place / "a.pt"] * 2
        disk.mend()
        assert number_at(place / "a.pt") == 2
        assert os.listdir(place) == ["a.pt"]
        if not [event for event in events if event.kind == "writer_died"]:
            break
        num_deaths += every
    assert num_deaths > 20


def test_killed_at_random(place: Path) -> None:
    """Again and again, in a stream of saves."""
    chance = random.Random(SEED)
    over = threading.Event()
    training, num_kills = Training(), 0
    events: list[Event] = []
    with CheckpointManager(place, 3, writer="process", save_rng=False, on_event=events.append) as manager:

        def kill() -> None:
            nonlocal num_kills
            while not over.wait(chance.uniform(0.0, 0.6)):
                pid = pid_of(manager._saver) if manager._saver._queue.survives_exit else 0
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    # Not in its start: three that never began are the end of it.
                    if len(os.listdir(f"/proc/{pid}/task")) > 8:  # its threads are there
                        os.kill(pid, signal.SIGKILL)
                        num_kills += 1

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            failed = 0
            while num_kills < count(10, full=200):
                error = training.save(manager, 1.0).exception(60)
                failed += error is not None
                assert error is None or "died 3 times" in str(error), SEED
        finally:
            over.set()
            thread.join(60)
        training.save(manager, 2.0).result(60)
        manager.wait(60)
        assert steps(manager)[-1] == training.step == training.load(manager)
        assert steps(manager) == recorded_steps(place)
    assert not [event for event in events if "threads from now on" in event.detail]


def test_three_deaths_on_one_image(place: Path, disk: Disk) -> None:
    """Fail that save, and no other: before it, behind it, and after it."""
    events: list[Event] = []
    disk.kill_always("rename", "bad.pt.tmp")
    with make_saver(on_event=events.append, max_in_flight=3) as saver:
        handles = [saver.save(state(number), place / name) for number, name in enumerate(("a.pt", "bad.pt", "b.pt"))]
        assert number_at(handles[0].result(60).filepath) == 0
        error = handles[1].exception(60)
        assert isinstance(error, CheckpointWriteError)
        assert "bad.pt was not saved: the writer process died 3 times while writing it" in str(error)
        assert "killed by signal 9" in str(error)
        assert number_at(handles[2].result(60).filepath) == 2
        saver.save(state(5), place / "c.pt").result(60)
    assert sorted(os.listdir(place)) == ["a.pt", "b.pt", "c.pt"]
    assert [event.kind for event in events].count("writer_died") == 3


def test_what_the_dead_one_had_committed_is_found(place: Path, disk: Disk) -> None:
    """And not written again: the registry was durable, only the best link was not."""
    events: list[Event] = []
    training = Training()
    with CheckpointManager(place, 5, writer="process", save_rng=False, on_event=events.append) as manager:
        training.save(manager, 2.0).result(60)
        disk.kill_always("rename", "best_model.pt.tmp")
        assert training.save(manager, 1.0).result(60).sequence == 2
        disk.mend()
        training.save(manager, 3.0).result(60)
        assert steps(manager) == recorded_steps(place) == [1, 2, 3]
    assert [event.kind for event in events].count("writer_died") == 1
    commits = [path for _, name, path in disk.calls if name == "rename" and "step00000002" in path]
    assert len(commits) == 1
    best = torch.load(place / "best_model.pt", weights_only=True)
    assert best["global_step"] == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_delays_no_news(place: Path) -> None:
    """One that runs no Python hooks keeps the connection open; both ends hear of each other's death all the same."""
    events: list[Event] = []
    libc = ctypes.PyDLL(None)
    with make_saver(on_event=events.append) as saver:
        saver.save(state(1), place / "a.pt").result(60)
        child = libc.fork()
        while child == 0:
            libc.pause()
        try:
            first = pid_of(saver)
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: "writer_died" in [event.kind for event in events])
            saver.save(state(2), place / "a.pt").result(60)
            assert pid_of(saver) != first
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert number_at(place / "a.pt") == 2


def test_an_idle_one_that_was_killed_is_replaced_by_the_next_save(place: Path) -> None:
    """Also the directory's lock is still the trainer's."""
    training = Training()
    with CheckpointManager(place, 5, writer="process", save_rng=False) as manager:
        for _ in range(4):
            training.save(manager).result(60)
            pid = pid_of(manager._saver)
            os.kill(pid, signal.SIGKILL)
        training.save(manager).result(60)
        assert steps(manager) == [1, 2, 3, 4, 5]
        with (
            CheckpointManager(place, 5, save_rng=False, lock_timeout_secs=0) as other,
            pytest.raises(asyncckpt.StorageBusyError),
        ):
            Training().save(other)


# --- when the trainer ends ---

TRAINER = """
import os, signal, sys
sys.path[:0] = {path!r}
from pathlib import Path
import torch, asyncckpt
from asyncckpt.service import writer_process
from service.disk import writer_command
if {control!r}:
    writer_process.command = writer_command(Path({control!r}))
saver = asyncckpt.AsyncCheckpointSaver(writer="process", exit_timeout_secs=60)
print(saver._queue.pid, flush=True)
handle = saver.save({{"number": 1, "weights": torch.ones(100_000)}}, "a.pt")
{ending}
"""


def run_trainer(
    directory: Path, ending: str, *, control: Path | None = None
) -> tuple[subprocess.CompletedProcess[str], int]:
    """What it said, and its writer's process id."""
    path = [str(Path(asyncckpt.__file__).parent.parent), str(TESTS)]
    code = TRAINER.format(path=path, control=str(control or ""), ending=ending)
    (directory / "tmp").mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", code],
        cwd=directory,
        env={**os.environ, "TMPDIR": str(directory / "tmp")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return result, int(result.stdout.split()[0])


def await_end(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], 60)[0], "the writer does not end"
    finally:
        os.close(pidfd)


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("pass", 0),
        ("saver.close()", 0),
        ("del saver; handle.result(60)", 0),
        ("sys.exit(3)", 3),
        ("os._exit(4)", 4),
        ("raise RuntimeError('of the trainer')", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
    ],
)
def test_it_ends_with_the_trainer(ending: str, code: int, tmp_path: Path) -> None:
    """However that ends; the checkpoint is there, nothing is left, and Python in development mode has no complaint."""
    result, pid = run_trainer(tmp_path, ending)
    assert result.returncode == code, result.stderr
    await_end(pid)
    assert number_at(tmp_path / "a.pt") == 1
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "tmp"]
    logs = [log.read_text() for log in (tmp_path / "tmp").glob(f"{WRITER_LOG_PREFIX}*")]
    assert all("a.pt is durable" in log for log in logs), "only what it did alone is worth keeping"
    if code not in (4, -9):
        assert logs == []
    assert "ResourceWarning" not in result.stderr
    if code != 1:
        assert result.stderr == ""


def test_an_orphan_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Whoever captured the trainer's output goes on, though the writer works on."""
    disk = Disk(tmp_path / "control")
    disk.hold()
    result, pid = run_trainer(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", control=tmp_path / "control")
    assert (result.returncode, result.stderr) == (-9, "")
    disk.wait_until_held()
    assert not (tmp_path / "a.pt").exists()
    disk.let_go()
    await_end(pid)
    assert number_at(tmp_path / "a.pt") == 1
    [log] = (tmp_path / "tmp").glob(f"{WRITER_LOG_PREFIX}*")
    assert "finishing what it had staged (1 saves)" in log.read_text()


def test_an_orphan_whose_disk_fails_says_so(tmp_path: Path) -> None:
    """In its log, since nobody else listens."""
    disk = Disk(tmp_path / "control")
    disk.hold()
    result, pid = run_trainer(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", control=tmp_path / "control")
    assert result.returncode == -9
    disk.wait_until_held()
    disk.fail(28, "rename")
    disk.let_go()
    await_end(pid)
    [log] = (tmp_path / "tmp").glob(f"{WRITER_LOG_PREFIX}*")
    assert "a.pt is lost" in log.read_text()
    assert "No space left on device" in log.read_text()
    assert not (tmp_path / "a.pt").exists()


def test_an_exec_is_an_end(tmp_path: Path) -> None:
    """The process lives on as another program, which knows nothing of us."""
    result, pid = run_trainer(tmp_path, "os.execv('/bin/sleep', ['sleep', '0.5'])")
    assert result.returncode == 0, result.stderr
    await_end(pid)
    assert number_at(tmp_path / "a.pt") == 1


def test_a_hundred_savers_leave_nothing(place: Path) -> None:
    """Neither descriptors nor zombies, logs, threads or memory: the fixtures look."""
    for number in range(count(10, full=100)):
        saver = make_saver()
        saver.save(state(number), place / "a.pt")
        if number % 3 == 0:
            os.kill(pid_of(saver), signal.SIGKILL)
        if number % 2:
            saver.close()
        del saver
    wait_for(lambda: not children())
    assert torch.all(torch.load(place / "a.pt", weights_only=True)["weights"] >= 0)


def test_waiting_for_a_writer_that_was_stopped(place: Path) -> None:
    """SIGSTOP: bounded, and it goes on afterwards."""
    saver = make_saver()
    saver.save(state(1), place / "a.pt").result(60)
    os.kill(pid_of(saver), signal.SIGSTOP)
    try:
        started = time.monotonic()
        saver.save(state(2), place / "a.pt")
        with pytest.raises(asyncckpt.WaitTimeoutError):
            saver.wait(0.05)
        with pytest.raises(asyncckpt.WaitTimeoutError):
            saver.close(0.05)
        assert time.monotonic() - started < 30
    finally:
        os.kill(pid_of(saver), signal.SIGCONT)
    saver.close(60)
    assert number_at(place / "a.pt") == 2
