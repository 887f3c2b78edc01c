"""kill -9 of a managing process, at random moments and at every file system call: the directory is always in a state
that the protocol passes through, from which the next process goes on."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from registry.directory_model import Disk, Entry, File, Writer, entry_of, in_order, look, opened, saved
from storage.mounts import memory_directory

from asyncckpt import CheckpointManager, KeepLast
from asyncckpt.naming import BEST_NAME, LOCK_NAME, REGISTRY_NAME, temporary_name
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.storage.local import LocalStorage
from reliability.gates import SEED, count, report
from reliability.saving_server import Managed, Order
from reliability.test_sigkill import TIMEOUT_SECS, Server, temporaries

NUM_KILLS = count(60, full=1000)
NUM_KEPT = 2
LONGEST_RUN_SECS = 0.06


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def acknowledged(lines: list[str]) -> list[Entry]:
    return [Entry(**json.loads(line.split(" ", 1)[1])) for line in lines if line.startswith("ack ")]


def open_for_writing(path: Path) -> None:
    """As the next process does it, and nothing more."""
    directory = CheckpointDirectory(str(path), LocalStorage(), retention=KeepLast(NUM_KEPT), metric="val_loss")
    directory.open_for_writing()
    directory.close()


def passed_through(before: Disk, path: Path, acks: list[Entry]) -> list[Disk]:
    """The states that the directory may be in after a process was killed that had acknowledged `acks`."""
    states, writer = opened(before)
    for entry in acks:
        after, num_before_ack, writer = saved(states[-1], writer, entry, NUM_KEPT)
        states = after[num_before_ack:]
    for entry in unacknowledged(path, before, writer):
        after, _, writer = saved(states[-1], writer, entry, NUM_KEPT)
        states += after
    return states


def unacknowledged(path: Path, before: Disk, writer: Writer) -> list[Entry]:
    """What the process committed besides, by the files' own words."""
    entries = [entry_of(path / name) for name in look(path)["files"]]
    return in_order(entry for entry in entries if entry.sequence > writer.index.last_sequence)


def now(states: list[Disk], path: Path, where: str) -> Disk:
    """Which of these states the directory is in."""
    seen = look(path)
    shapes = [state.shape() for state in states]
    assert seen in shapes, f"{where}: {seen} is none of {shapes}"
    return states[len(shapes) - 1 - shapes[::-1].index(seen)]


def check_as_a_reader(path: Path, disk: Disk, acks: list[Entry], where: str) -> None:
    """What is listed is whole, and loads as it was saved; the latest is the newest acknowledged or a newer one."""
    before = contents(path)
    manager = CheckpointManager(path, NUM_KEPT)
    listed = manager.list_checkpoints()
    assert [(info.sequence, info.filepath.name) for info in listed] == [
        (entry.sequence, entry.name) for entry in disk.listed()
    ], where
    assert all(report.ok for report in manager.verify()), where
    for info in listed:
        assert number_in(info.filepath) == disk.files[info.filepath.name].entry.number, where
    newest = max([0, *(entry.sequence for entry in acks)])
    assert newest == 0 or (manager.latest is not None and (manager.latest.sequence or 0) >= newest), where
    manager.close()
    assert contents(path) == before, f"{where}: reading changed something"


def number_in(path: Path) -> int:
    """Which state is in the file; fails unless all of it is."""
    loaded = torch.load(path, weights_only=True)
    number = int(loaded["extra_state"]["number"])
    tensors = loaded["model_state_dict"].values()
    assert all(bool((tensor == number).all()) for tensor in tensors), "tensors of different states"
    return number


def check_as_a_writer(path: Path, disk: Disk, where: str) -> Disk:
    """Once opened, the directory is in order; opened again, not a byte changes."""
    states, _ = opened(disk)
    open_for_writing(path)
    assert look(path) == states[-1].shape(), where
    assert_in_order(path)
    before = contents(path)
    open_for_writing(path)
    assert contents(path) == before, where
    return states[-1]


def assert_in_order(path: Path) -> None:
    """The registry names the checkpoint files there are, the best link is the best, and nothing else lies about."""
    names = {path.name for path in path.iterdir()}
    document = json.loads((path / REGISTRY_NAME).read_bytes())
    listed = {entry["filepath"] for entry in document["checkpoints"]}
    best = [entry["filepath"] for entry in document["checkpoints"] if entry["is_best"]]
    assert names == {*listed, REGISTRY_NAME, LOCK_NAME, *([BEST_NAME] if best else [])}
    for name in best:
        assert (path / BEST_NAME).read_bytes() == (path / name).read_bytes()


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != LOCK_NAME}


def draw_losses(chance: random.Random) -> list[float | None]:
    """Bursts of better and better, worse, NaN, equal, and none at all."""
    losses: list[float | None] = []
    while len(losses) < 40:
        start = float(chance.randrange(-50, 50))
        burst: list[list[float | None]] = [
            [start - index for index in range(5)],
            [start + index for index in range(5)],
            [math.nan, math.nan],
            [-50.0, -50.0, -50.0],
            [None, None, None],
        ]
        losses += chance.choice(burst)
    return losses


@pytest.fixture
def base() -> Iterator[Path]:
    """In memory: on a disk most kills would hit an fsync, and few what lies between."""
    with memory_directory() as directory:
        yield directory


def test_killed_at_a_random_moment(base: Path, server: Server) -> None:
    """One directory through it all: with one and two workers, copied and overlapped, going back to old steps."""
    chance = random.Random(SEED)
    path = base / "run"
    path.mkdir()
    disk, first = Disk(), 1
    num_acks = num_newer = num_left = num_recovered = num_midway = 0
    for kill in range(NUM_KILLS):
        managed = Managed(draw_losses(chance), NUM_KEPT, chance.choice(["copy", "overlap"]), chance.choice([None, 7]))
        order = Order([str(path)], first, num_workers=chance.choice([1, 1, 2]), num_tensors=3, managed=managed)
        pid = server.start(order)
        lines = [str(server.next_line(TIMEOUT_SECS)) for _ in range(chance.randrange(7))]
        time.sleep(chance.uniform(0, LONGEST_RUN_SECS))
        os.kill(pid, signal.SIGKILL)
        lines += server.lines_until_end()

        where = f"kill {kill} with seed {SEED}, after {lines[-1:]}"
        acks = acknowledged(lines)
        newest = disk.newest_valid()
        if lines:
            assert lines[0] == f"resumed {newest.entry.number if newest else 0}", where
        states = passed_through(disk, path, acks)
        disk = now(states, path, where)
        check_as_a_reader(path, disk, acks, where)
        num_acks += len(acks)
        num_newer += bool(disk.listed()) and disk.listed()[-1].sequence > max([0, *(ack.sequence for ack in acks)])
        num_left += len(temporaries(path))
        num_midway += disk.shape() != opened(disk)[0][-1].shape()
        if kill % 2:
            disk = check_as_a_writer(path, disk, where)
            num_recovered += 1
        first += len(acks) + 10
    report(
        "4 SIGKILL of a manager",
        f"{NUM_KILLS} kills: {num_acks} checkpoints acknowledged, 0 lost; {num_newer} times one more was there; "
        f"{num_midway} times there was something to finish; {num_left} temporary files left by the dead; "
        f"{num_recovered} times opened twice, to the same bytes",
    )
    disk = check_as_a_writer(path, disk, "at the end")
    assert num_acks > NUM_KILLS
    assert num_left > 0
    assert num_midway > 0 or NUM_KILLS < 50


LOSSES = [math.nan, 5.0, 4.0, 9.0, 3.0, 8.0]  # by the state's number


def save_states(server: Server, path: Path, first: int, num_saves: int = 1, kill_at: int | None = None) -> list[str]:
    """What the child said; `done` at the end, unless it was killed."""
    managed = Managed([*LOSSES], NUM_KEPT)
    server.start(Order([str(path)], first, num_saves, kill_at=kill_at, num_tensors=2, numel=1000, managed=managed))
    lines = server.lines_until_end()
    assert "done" in lines or kill_at is not None
    return lines


def after(disk: Disk, lines: list[str]) -> Disk:
    for entry in acknowledged(lines):
        disk = saved(disk, opened(disk)[1], entry, NUM_KEPT)[0][-1]
    return disk


def before_a_save(base: Path, server: Server) -> tuple[Path, Disk, int]:
    """The next one is a new best: the old best is to be deleted, and the link to be renewed."""
    path = base / "scene"
    disk = after(Disk(), save_states(server, path, 1, 3))
    return path, disk, 4


def before_a_recovery(base: Path, server: Server) -> tuple[Path, Disk, int]:
    """A file, the best, is to be adopted, the link to be renewed, a delete to be finished, a temporary to be swept."""
    path, work = base / "scene", base / "work"
    disk = after(Disk(), save_states(server, work, 1, 2))
    shutil.copytree(work, base / "first two")
    (third,) = acknowledged(save_states(server, work, 3))
    shutil.copytree(work, path)
    (fourth,) = acknowledged(save_states(server, work, 4))
    (dropped,) = set(look(base / "first two")["files"]) - set(look(path)["files"])
    shutil.copy(base / "first two" / dropped, path)
    shutil.copy(work / fourth.name, path)
    (path / temporary_name("0" * 16, "state.pt")).touch()
    states, num_before_ack, _ = saved(disk, opened(disk)[1], third, NUM_KEPT)
    return path, states[num_before_ack].having(fourth.name, File(fourth)), 5


def copy_scene(scene: Path, path: Path) -> Path:
    """The best link stays a link."""
    shutil.copytree(scene, path)
    content = (path / BEST_NAME).read_bytes()
    (same,) = [file for file in path.glob("checkpoint_*") if file.read_bytes() == content]
    (path / BEST_NAME).unlink()
    os.link(same, path / BEST_NAME)
    return path


@pytest.mark.parametrize("prepare", [before_a_save, before_a_recovery])
def test_killed_at_every_call(
    base: Path, server: Server, prepare: Callable[[Path, Server], tuple[Path, Disk, int]]
) -> None:
    """Before the first call through the seam, before the second, … until a save is through before its time comes."""
    scene, disk, number = prepare(base, server)
    assert look(scene) == disk.shape()
    found: list[Disk] = []
    lines: list[str] = []
    while "done" not in lines:
        call = len(found)
        path, where = copy_scene(scene, base / str(call)), f"before call {call}"
        lines = save_states(server, path, number, kill_at=call)
        acks = acknowledged(lines)
        found.append(now(passed_through(disk, path, acks), path, where))
        all_states = passed_through(disk, path, [])
        check_as_a_reader(path, found[-1], acks, where)
        check_as_a_writer(path, found[-1], where)
        shutil.rmtree(path)
    report(
        "4 SIGKILL of a manager at every call",
        f"{len(found) - 1} kills: the directory passed through {len(all_states)} states, all seen",
    )
    assert all(state in found for state in all_states)
