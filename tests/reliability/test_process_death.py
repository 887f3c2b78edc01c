"""The trainer dies, the writer process does not: what was staged is committed all the same, and found."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from service.disk import Disk, wait_for
from storage.observe import temporaries
from torch import nn

import asyncckpt
from asyncckpt import CheckpointManager
from reliability.dying_server import Order
from reliability.gates import SEED, count, not_checked, report

GATE = "9 process death"
TESTS = Path(__file__).parent.parent
TIMEOUT_SECS = 60.0

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform != "linux", reason="NOT CHECKED: a writer process needs Linux"),
]


class Server:
    """The fork server's other end."""

    def __init__(self, logs: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "reliability" / "dying_server.py")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "TMPDIR": str(logs)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self._output = self.process.stdout.fileno()
        self._rest = b""
        assert self.next_line() == "ready"

    def start(self, order: Order) -> Death:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        self.process.stdin.flush()
        return Death(self, order, int(self.expect("start")))

    def expect(self, word: str) -> str:
        first, rest = self.next_line().split()
        assert first == word, (first, rest)
        return rest

    def next_line(self) -> str:
        while b"\n" not in self._rest:
            assert select.select([self._output], [], [], TIMEOUT_SECS)[0], "nothing was said in time"
            received = os.read(self._output, 65536)
            assert received, "the server died"
            self._rest += received
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Death:
    """One trainer, from its start to its death, and what lives on."""

    def __init__(self, server: Server, order: Order, pid: int) -> None:
        self.server, self.order, self.pid = server, order, pid
        self.writer = int(server.expect("writer"))
        self.writer_fd = os.pidfd_open(self.writer)
        self.children: list[int] = []
        self.staged: list[int] = []
        self.has_ended = False

    def await_staged(self, number: int) -> None:
        while number not in self.staged:
            self._note(self.server.next_line())

    def _note(self, line: str) -> bool:
        word, value = line.split()
        if word == "child":
            self.children.append(int(value))
        elif word == "staged":
            self.staged.append(int(value))
        return word == "end"

    def await_end(self) -> None:
        """Of the trainer; takes in what it had still said."""
        while not self.has_ended:
            self.has_ended = self._note(self.server.next_line())

    def await_writer(self) -> None:
        """The writer ends by itself, once it has done what it could."""
        assert select.select([self.writer_fd], [], [], TIMEOUT_SECS)[0], "the writer does not end"

    def clean_up(self) -> None:
        for pid in (self.pid, self.writer, *self.children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.await_end()
        os.close(self.writer_fd)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture
def start(server: Server) -> Iterator[Any]:
    """Starts trainers, and leaves none behind."""
    deaths: list[Death] = []

    def start(order: Order) -> Death:
        deaths.append(server.start(order))
        return deaths[-1]

    try:
        yield start
    finally:
        for death in deaths:
            death.clean_up()


def number_in(path: Path) -> int:
    """Which state the file holds; it must be whole."""
    checked = asyncckpt.verify(path)
    assert checked.ok, checked.problems
    checkpoint = torch.load(path, weights_only=True)
    number = int(checkpoint["global_step"])
    assert all(bool((weights == number).all()) for weights in checkpoint["model_state_dict"].values())
    return number


def saved_numbers(order: Order) -> list[int]:
    """What is in the directory by its own account: the registry's file, or the files."""
    directory = Path(order.directory)
    if not order.is_managed:
        numbers = sorted(number_in(path) for path in directory.glob("*.pt"))
        assert temporaries(directory) == []
        return numbers
    with contextlib.suppress(FileNotFoundError):
        entries = json.loads((directory / "registry.json").read_text())["checkpoints"]
        assert [number_in(directory / entry["filepath"]) for entry in entries] == [e["global_step"] for e in entries]
        expected = {entry["filepath"] for entry in entries} | {"registry.json", ".asyncckpt.lock"}
        assert {path.name for path in directory.iterdir()} == expected
        return [entry["global_step"] for entry in entries]
    return []


class Restarted:
    """A trainer that goes on where the dead one stopped."""

    def __init__(self, directory: str, **options: Any) -> None:
        self.manager = CheckpointManager(directory, 10**6, save_rng=False, **options)
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(250_000))])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)

    def load(self) -> int:
        _, checkpoint = self.manager.load_latest(self.model, self.optimizer)
        return int(checkpoint["global_step"]) if checkpoint else 0

    def save(self, number: int) -> list[int | None]:
        """The steps that are listed then."""
        with torch.no_grad():
            self.model[0].fill_(number)
        handle = self.manager.save(self.model, self.optimizer, 0, number)
        assert handle is not None
        handle.result(60)
        return [info.global_step for info in self.manager.list_checkpoints()]


def await_text(path: Path, text: str) -> None:
    wait_for(lambda: text in path.read_text())


def kill_trainer(death: Death) -> None:
    os.kill(death.pid, signal.SIGKILL)


def kill_group(death: Death) -> None:
    os.killpg(death.pid, signal.SIGKILL)


def signal_everybody(number: signal.Signals) -> Any:
    """As a launcher or a terminal does, to every process of the job; and SIGKILL after it."""

    def kill(death: Death) -> None:
        for pid in (death.writer, *death.children, death.pid):
            os.kill(pid, number)
        os.kill(death.pid, signal.SIGKILL)

    kill.__name__ = f"{number.name.lower()}_to_everybody"
    return kill


VARIANTS: list[tuple[Any, bool, int]] = list(itertools.product(["copy", "overlap"], [True, False], [0, 1]))
CIRCUMSTANCES = [
    ("none", kill_trainer, count(8, full=200)),
    ("native", kill_trainer, count(4, full=200)),
    ("loader", kill_trainer, count(2, full=50)),
    ("none", kill_group, count(4, full=200)),
    ("loader", kill_group, count(1, full=20)),
    ("none", signal_everybody(signal.SIGTERM), count(3, full=50)),
    ("none", signal_everybody(signal.SIGINT), count(3, full=50)),
    ("none", signal_everybody(signal.SIGHUP), count(3, full=50)),
]


@pytest.mark.parametrize(
    ("children", "kill", "num_deaths"),
    CIRCUMSTANCES,
    ids=[f"{kill.__name__} with children: {children}" for children, kill, _ in CIRCUMSTANCES],
)
def test_what_was_staged_is_committed(children: Any, kill: Any, num_deaths: int, tmp_path: Path, start: Any) -> None:
    """Through a manager and a saver, copied and overlapped, by a writer that has just been started and a warm one."""
    num_committed = num_survived = 0
    for index in range(num_deaths):
        snapshot, is_managed, warm = VARIANTS[index % len(VARIANTS)]
        num_saves = warm + 1 + index % 2  # one or two in flight
        directory = str(tmp_path / str(index))
        death = start(Order(directory, 1, num_saves, is_managed, snapshot, warm, children))
        death.await_staged(num_saves)
        kill(death)
        death.await_end()
        death.await_writer()
        num_survived += sum(os.path.exists(f"/proc/{pid}") for pid in death.children)
        assert saved_numbers(death.order) == list(range(1, num_saves + 1)), (index, SEED)
        if is_managed:
            restarted = Restarted(directory, lock_timeout_secs=0)
            assert restarted.load() == num_saves
            restarted.manager.close()
        num_committed += 1
        shutil.rmtree(directory)
    circumstance = f"{kill.__name__.replace('_', ' ')}, children: {children}"
    report(f"{GATE}, {circumstance}", f"{num_committed} of {num_deaths} committed and listed")
    if children == "native":
        assert num_survived == num_deaths, "the children were to live on"


def test_killed_at_a_random_moment(tmp_path: Path, start: Any) -> None:
    """In a stream of saves: all that were staged are there, and of the one in the middle all or nothing."""
    num_deaths = count(3, full=200)
    chance = random.Random(SEED)
    num_staged = num_between = 0
    for index in range(num_deaths):
        snapshot, is_managed, _ = VARIANTS[index % len(VARIANTS)]
        order = Order(str(tmp_path / str(index)), 1, None, is_managed, snapshot)
        death = start(order)
        death.await_staged(1 + index % 3)
        time.sleep(chance.uniform(0, 0.05))
        kill_trainer(death)
        death.await_end()
        death.await_writer()
        numbers = saved_numbers(order)
        last = death.staged[-1]
        assert numbers in (list(range(1, last + 1)), list(range(1, last + 2))), (index, SEED)
        num_staged, num_between = num_staged + last, num_between + (len(numbers) > last)
        shutil.rmtree(order.directory)
    report(
        f"{GATE}, at random moments",
        f"{num_deaths} trainers killed: {num_staged} saves staged, 0 lost; {num_between} committed of those that "
        "the trainer had not yet returned from",
    )


@pytest.mark.parametrize("first_act", ["load", "save"])
def test_a_restarted_trainer_waits_for_the_dead_ones_writer(
    first_act: str, tmp_path: Path, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Says for whom, and then finds what it has committed."""
    num_deaths = count(2, full=20)
    for index in range(num_deaths):
        disk = Disk(tmp_path / f"control {index}")
        directory = str(tmp_path / str(index))
        disk.hold()
        death = start(Order(directory, 1, 2, control=str(tmp_path / f"control {index}")))
        death.await_staged(2)
        disk.wait_until_held()
        kill_trainer(death)
        death.await_end()
        restarted = Restarted(directory, lock_timeout_secs=30)  # at once: the writer may not even have noticed
        caplog.clear()
        outcome: list[Any] = []
        act = restarted.load if first_act == "load" else lambda restarted=restarted: restarted.save(3)
        thread = threading.Thread(target=lambda act=act, outcome=outcome: outcome.append(act()))
        thread.start()
        wait_for(lambda: "waiting for what still writes to" in caplog.text)
        thread.join(0.3)
        assert thread.is_alive()
        await_text(Path(directory, ".asyncckpt.lock"), f"finishing: writer process {death.writer} on ")
        disk.let_go()
        thread.join(60)
        assert outcome == [2 if first_act == "load" else [1, 2, 3]]
        restarted.manager.close()
        death.await_writer()
        assert saved_numbers(death.order) == ([1, 2] if first_act == "load" else [1, 2, 3])
    report(
        f"{GATE}, restarted at once", f"{num_deaths} first calls of {first_act}() waited, and found both checkpoints"
    )


def test_a_restarted_trainer_does_not_wait_for_ever(
    tmp_path: Path, start: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a disk that never answers: loading goes on with what there is, saving says who is in the way."""
    monkeypatch.setattr("asyncckpt.registry.turns.MAX_FINISHING_SECS", 1.0)
    disk = Disk(tmp_path / "control")
    directory = str(tmp_path / "directory")
    disk.hold(suffix="step00000002.pt.tmp")
    death = start(Order(directory, 1, 2, warm=1, control=str(tmp_path / "control")))
    death.await_staged(2)
    kill_trainer(death)
    death.await_end()
    await_text(Path(directory, ".asyncckpt.lock"), "finishing")
    restarted = Restarted(directory, lock_timeout_secs=0)
    assert restarted.load() == 1
    with pytest.raises(asyncckpt.StorageBusyError, match=f"finishing: writer process {death.writer} on "):
        restarted.save(3)
    disk.let_go()
    death.await_writer()
    assert restarted.save(3)[-1] == 3
    restarted.manager.close()


def test_the_writer_is_killed_too(tmp_path: Path, start: Any) -> None:
    """Nothing torn: the old state is intact, and the next trainer sweeps what the dead left."""
    num_deaths = count(4, full=100)
    chance = random.Random(SEED)
    num_swept = num_new = 0
    for index in range(num_deaths):
        disk = Disk(tmp_path / f"control {index}")
        directory = tmp_path / str(index)
        if index % 2:
            disk.hold(chance.choice(["pwrite", "fsync", "rename"]), "step00000002.pt.tmp")
        death = start(Order(str(directory), 1, 2, warm=1, control=str(tmp_path / f"control {index}")))
        death.await_staged(2)
        time.sleep(chance.uniform(0, 0.05))
        for pid in chance.sample([death.pid, death.writer], 2):
            os.kill(pid, signal.SIGKILL)
        death.await_end()
        death.await_writer()
        num_swept += len(temporaries(directory))
        restarted = Restarted(str(directory), lock_timeout_secs=5)
        number = restarted.load()
        assert number in (1, 2), (index, SEED)
        assert restarted.save(3) in ([1, 3], [1, 2, 3]), (index, SEED)
        restarted.manager.close()
        assert saved_numbers(death.order)[-1] == 3
        num_new += number == 2
    report(
        f"{GATE}, the writer too",
        f"{num_deaths} pairs killed: {num_new} had committed, 0 torn; {num_swept} temporary files swept by the next",
    )


TRAINER = """
import json, os, sys
sys.path[:0] = {path!r}
from reliability.dying_server import Order, run_trainer
os.setpgid = lambda *args: None
run_trainer(Order(**json.loads(sys.argv[1])))
"""


def test_a_pid_namespace_that_ends_with_the_trainer(tmp_path: Path) -> None:
    """As a container's: nobody survives, nothing is torn, and the next trainer goes on from what was acknowledged."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if os.geteuid() != 0 or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode != 0:
        not_checked("a PID namespace needs root and unshare")
    chance = random.Random(SEED)
    num_deaths = count(1, full=20)
    num_staged = num_saved = 0
    for index in range(num_deaths):
        order = Order(str(tmp_path / str(index)), 1, None)
        code = TRAINER.format(path=[str(TESTS), *sys.path])
        process = subprocess.Popen(
            [*unshare, sys.executable, "-c", code, json.dumps(asdict(order))],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        staged = 0
        while staged < 3 + index % 4:
            word, value = process.stdout.readline().split()
            staged = int(value) if word == "staged" else staged
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        staged = max([staged, *(int(line.split()[1]) for line in process.stdout if line.startswith("staged "))])
        process.wait(60)
        process.stdout.close()
        restarted = Restarted(order.directory, lock_timeout_secs=30)
        number = restarted.load()
        assert staged - 3 <= number <= staged + 1, (index, SEED)  # all but what was in flight
        assert restarted.save(number + 1) == list(range(1, number + 2))
        restarted.manager.close()
        assert saved_numbers(order) == list(range(1, number + 2))
        num_staged, num_saved = num_staged + staged, num_saved + number
    report(
        f"{GATE}, in a PID namespace",
        f"{num_deaths} namespaces ended: {num_staged} saves staged, {num_saved} durable, 0 torn",
    )


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A control group whose memory is limited."""
    path = Path(f"/sys/fs/cgroup/memory/asyncckpt-{os.getpid()}")
    try:
        path.mkdir()
    except OSError as error:
        not_checked(f"no memory control group (version 1) can be made here: {error}")
    try:
        (path / "memory.limit_in_bytes").write_text(str(500 << 20))
        with contextlib.suppress(OSError):
            (path / "memory.memsw.limit_in_bytes").write_text(str(500 << 20))
        yield path
    finally:
        wait_for(lambda: not (path / "cgroup.procs").read_text())
        path.rmdir()


def test_an_out_of_memory_kill(tmp_path: Path, start: Any, cgroup: Path) -> None:
    """Takes the trainer, not the writer, which finishes."""
    num_deaths = count(2, full=20)
    for index in range(num_deaths):
        disk = Disk(tmp_path / f"control {index}")
        disk.hold()
        control = str(tmp_path / f"control {index}")
        order = Order(str(tmp_path / str(index)), 1, 2, numel=5_000_000, control=control, cgroup=str(cgroup))
        death = start(order)
        death.await_staged(2)
        death.await_end()
        assert not select.select([death.writer_fd], [], [], 0)[0], "the writer was killed"
        disk.let_go()
        death.await_writer()
        assert saved_numbers(order) == [1, 2]
        shutil.rmtree(order.directory)
    killed = dict(line.split() for line in (cgroup / "memory.oom_control").read_text().splitlines()).get("oom_kill")
    report(f"{GATE}, out of memory", f"{num_deaths} trainers killed by the kernel (it says {killed}), all committed")
    assert killed is None or int(killed) == num_deaths
