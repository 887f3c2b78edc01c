"""kill -9, at random moments and at every file system call: what was acknowledged loads, and nothing torn is there."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import asyncckpt
from asyncckpt.naming import is_temporary_name, temporary_name
from asyncckpt.storage.local import LocalStorage
from reliability.gates import SEED, count, report
from reliability.saving_server import Order

NUM_KILLS = count(100, full=1000)
TESTS = Path(__file__).parent.parent
TIMEOUT_SECS = 60.0
LONGEST_SAVE_SECS = 0.05


class Server:
    """The fork server's other end."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "reliability" / "saving_server.py")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._output = self.process.stdout.fileno()
        self._rest = b""
        assert self.next_line(TIMEOUT_SECS) == "ready"

    def start(self, order: Order) -> int:
        """Fork a child; its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        self.process.stdin.flush()
        word, pid = str(self.next_line(TIMEOUT_SECS)).split()
        assert word == "start"
        return int(pid)

    def next_line(self, timeout: float) -> str | None:
        """None when nothing was said in time."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._rest:
            if not select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            received = os.read(self._output, 65536)
            assert received, "the server died"
            self._rest += received
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode()

    def lines_until_end(self) -> list[str]:
        """All that the child still said."""
        lines: list[str] = []
        while (line := self.next_line(TIMEOUT_SECS)) != "end":
            assert line is not None, "the saving process hangs"
            lines.append(line)
        return lines

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # a child that a failed test has left, too
        self.process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def number_at(path: Path) -> int:
    """Which state is at the path; fails unless file and state are whole. 0 when there is none."""
    if not path.exists():
        return 0
    report = asyncckpt.verify(path)
    assert report.ok, report.problems
    loaded = torch.load(path, weights_only=True)
    number = int(loaded["number"])
    assert all(bool((tensor == number).all()) for tensor in loaded["tensors"]), "tensors of different states"
    return number


def acknowledged(lines: list[str]) -> dict[Path, int]:
    """The last acknowledged number at each path."""
    acks = [line.split(" ", 2) for line in lines if line.startswith("ack ")]
    return {Path(path): int(number) for _, number, path in acks}


def temporaries(directory: Path) -> set[Path]:
    return {path for path in directory.iterdir() if is_temporary_name(path.name)}


@pytest.mark.parametrize("num_paths", [1, 2])
def test_killed_at_a_random_moment(tmp_path: Path, server: Server, num_paths: int) -> None:
    """Each path holds one whole state, at least the one that was last acknowledged; the next process cleans up after
    the dead and leaves the living alone."""
    chance = random.Random(SEED + num_paths)
    paths = [tmp_path / f"state{index}.pt" for index in range(num_paths)]
    living = LocalStorage().begin(str(paths[0]), 4096)  # ours: to the saving processes, another live process's
    alive = temporaries(tmp_path)
    before = dict.fromkeys(paths, 0)
    first, num_acks, num_left_by_the_dead, num_newer = 1, 0, 0, 0
    num_kills = NUM_KILLS // 2
    for kill in range(num_kills):
        dead = temporaries(tmp_path) - alive
        pid = server.start(Order([str(path) for path in paths], first, num_workers=num_paths))
        lines = [str(server.next_line(TIMEOUT_SECS)) for _ in range(chance.randrange(4))]
        time.sleep(chance.uniform(0, LONGEST_SAVE_SECS))
        os.kill(pid, signal.SIGKILL)
        lines += server.lines_until_end()

        where = f"kill {kill} with seed {SEED}, after {lines[-1:]}"
        acks = acknowledged(lines)
        for path in paths:
            number = number_at(path)
            assert number >= max(acks.get(path, 0), before[path]), where
            num_newer += number > acks.get(path, before[path])
            first, before[path] = max(first, number + 1), number
        left = temporaries(tmp_path)
        assert alive <= left, where
        if acks:
            assert not dead & left, where
        num_acks += len(lines)
        num_left_by_the_dead += len(left - alive)
        assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in (*paths, *left)}, where
    living.abort()
    report(
        f"4 SIGKILL, {num_paths} paths",
        f"{num_kills} kills: {num_acks} saves acknowledged, 0 lost; {num_newer} files newer than the last "
        f"acknowledged; {num_left_by_the_dead} temporary files left by the dead, all swept by the next process",
    )
    last_order = Order([str(path) for path in paths], first, num_saves=num_paths)
    server.start(last_order)
    assert "done" in server.lines_until_end()
    assert set(tmp_path.iterdir()) >= set(paths)
    assert temporaries(tmp_path) == set()
    assert num_acks > 0
    assert num_left_by_the_dead > 0


def over_an_old_file(base: Path, old_file: Path) -> Path:
    """With what a dead writer left beside it."""
    base.mkdir()
    shutil.copy(old_file, base / "state.pt")
    (base / temporary_name("0" * 16, "state.pt")).touch()
    return base / "state.pt"


def two_directories_missing(base: Path, old_file: Path) -> Path:
    base.mkdir()
    return base / "runs" / "first" / "state.pt"


@pytest.mark.parametrize("prepare", [over_an_old_file, two_directories_missing])
def test_killed_at_every_call(tmp_path: Path, server: Server, prepare: Callable[[Path, Path], Path]) -> None:
    """Before the first call through the seam, before the second, … until a save is through before its time comes."""
    old_file = tmp_path / "old.pt"
    server.start(Order([str(old_file)], 1, num_saves=1, num_tensors=2))
    assert "done" in server.lines_until_end()
    outcomes: list[str] = []
    while True:
        call = len(outcomes)
        path = prepare(tmp_path / str(call), old_file)
        old_number = number_at(path)
        server.start(Order([str(path)], 2, num_saves=1, kill_at=call, num_tensors=2))
        lines = server.lines_until_end()
        number = number_at(path)
        assert number in (old_number, 2), call
        assert number >= acknowledged(lines).get(path, 0), call
        if "done" in lines:
            break
        outcomes.append("old" if number == old_number else "new")

        server.start(Order([str(path)], 3, num_saves=1, num_tensors=2))
        assert "done" in server.lines_until_end()
        assert number_at(path) == 3, call
        assert [entry.name for entry in path.parent.iterdir()] == ["state.pt"], call
    num_new = outcomes.count("new")
    report(
        "4 SIGKILL at every call",
        f"{len(outcomes)} kills: {len(outcomes) - num_new} old files, {num_new} new, all whole",
    )
    assert number == 2
    assert outcomes == sorted(outcomes, reverse=True), "once the new file is there, it stays"
    assert num_new > 0
    assert len(outcomes) > 15
