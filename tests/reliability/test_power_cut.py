"""Real power cuts, of ext4 and XFS: what was acknowledged before the cut is there when the power is back."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from registry.directory_model import Disk, Entry, opened, saved

import asyncckpt
from reliability import test_manager_sigkill as managed_runs
from reliability import test_sigkill as plain_runs
from reliability.gates import SEED, count, report
from reliability.power import PoweredFileSystem, powered_file_system
from reliability.saving_server import Managed, Order, Power
from reliability.test_manager_sigkill import NUM_KEPT, draw_losses, unacknowledged
from reliability.test_sigkill import TIMEOUT_SECS, Server, number_at, temporaries

NUM_CUTS = count(16, full=500)  # of each file system
LONGEST_RUN_SECS = 0.08
MOST_ACKS = 5


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


class Cuts:
    """One file system through many cuts: a managed directory, and a file that is saved over and over again."""

    def __init__(self, server: Server, file_system: PoweredFileSystem, chance: random.Random) -> None:
        self._server, self._file_system, self._chance = server, file_system, chance
        self._run, self._file = file_system.mount / "run", file_system.mount / "deep/er/state.pt"
        self._disk, self._first, self._number = Disk(), 1, 0
        self.counts: Counter[str] = Counter()

    def cut(self, *, managed: bool, direct: bool, at_ack: bool) -> None:
        """Save, cut the power, switch it on again, and look."""
        where = f"cut {self.counts['cuts']} with seed {SEED}: {managed=} {direct=} {at_ack=}"
        cut_at_ack = self._chance.randrange(1, MOST_ACKS + 1) if at_ack else None
        power = Power(str(self._file_system.mount), cut_at_ack, direct)
        order = Order([str(self._file)], self._first, num_tensors=3, numel=10_000, power=power)
        if managed:
            order.paths = [str(self._run)]
            order.num_workers = self._chance.choice([1, 1, 2])
            order.managed = Managed(draw_losses(self._chance), NUM_KEPT, self._chance.choice(["copy", "overlap"]))
        before, after = run_and_cut(self._server, self._file_system, order, self._chance)
        self._file_system.restore()
        if managed:
            newest = self._disk.newest_valid()
            assert before[:1] in ([], [f"resumed {newest.entry.number if newest else 0}"]), where
            self._look_at_run(managed_runs.acknowledged(before), managed_runs.acknowledged(after), where)
        else:
            self._look_at_file(plain_runs.acknowledged(before).get(self._file, 0), where)
        self._first += len(before) + len(after) + 10
        self.counts["cuts"] += 1
        self.counts["acks"] += sum(line.startswith("ack ") for line in before)

    def _look_at_run(self, acks: list[Entry], later: list[Entry], where: str) -> None:
        """The directory is in a state that the protocol passes through, at the last counted acknowledgement or later.

        So far as it shows: what was acknowledged while the power was being cut says in which order things were done.
        """
        states, writer = opened(self._disk)
        for entry in acks:
            following, num_before_ack, writer = saved(states[-1], writer, entry, NUM_KEPT)
            states = following[num_before_ack:]
        for entry in later:
            following, _, writer = saved(states[-1], writer, entry, NUM_KEPT)
            states += following
        for entry in unacknowledged(self._run, self._disk, writer):
            following, _, writer = saved(states[-1], writer, entry, NUM_KEPT)
            states += following
        self._disk = managed_runs.now(states, self._run, where)
        managed_runs.check_as_a_reader(self._run, self._disk, acks, where)
        newest = max([0, *(entry.sequence for entry in acks)])
        self.counts["newer"] += bool(self._disk.listed()) and self._disk.listed()[-1].sequence > newest
        self.counts["unfinished"] += self._disk.shape() != opened(self._disk)[0][-1].shape()
        self.counts["temporaries"] += len(temporaries(self._run)) if self._run.exists() else 0
        if self._chance.random() < 0.5:  # else the next process recovers, and its power may be cut meanwhile
            self._disk = managed_runs.check_as_a_writer(self._run, self._disk, where)
            self.counts["opened"] += 1

    def _look_at_file(self, acknowledged: int, where: str) -> None:
        number = number_at(self._file)
        assert number >= max(acknowledged, self._number), where
        self.counts["newer"] += number > max(acknowledged, self._number)
        self._number = number
        if self._file.parent.exists():
            self.counts["temporaries"] += len(temporaries(self._file.parent))


def run_and_cut(
    server: Server, file_system: PoweredFileSystem, order: Order, chance: random.Random
) -> tuple[list[str], list[str]]:
    """What the saving process said before the power was cut, which alone counts, and what it said after that."""
    pid = server.start(order)
    assert order.power is not None
    if order.power.cut_at_ack is not None:
        return server.lines_until_end(), []
    before = [str(server.next_line(TIMEOUT_SECS)) for _ in range(chance.randrange(MOST_ACKS + 1))]
    time.sleep(chance.uniform(0, LONGEST_RUN_SECS))
    while (line := server.next_line(0)) is not None:
        before.append(line)
    file_system.cut()
    with contextlib.suppress(ProcessLookupError):  # it may have ended with an error by now
        os.kill(pid, signal.SIGKILL)
    return before, server.lines_until_end()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_power_cut(server: Server, kind: str) -> None:
    """Through a manager and to one path, past the page cache and through it, exactly at an acknowledgement (the worker
    is stopped there) and at a random moment."""
    chance = random.Random(f"{kind} {SEED}")
    with powered_file_system(kind) as file_system:
        cuts = Cuts(server, file_system, chance)
        ways = itertools.cycle(itertools.product([True, False], repeat=3))
        for at_ack, managed, direct in itertools.islice(ways, NUM_CUTS):
            cuts.cut(managed=managed, direct=direct, at_ack=at_ack)
    counts = cuts.counts
    report(
        f"3 power cuts, {kind}",
        f"{counts['cuts']} cuts: {counts['acks']} checkpoints acknowledged, 0 lost; {counts['newer']} times one more "
        f"was there; {counts['unfinished']} times there was something to finish; {counts['temporaries']} temporary "
        f"files left; {counts['opened']} times opened twice, to the same bytes",
    )
    assert counts["acks"] > NUM_CUTS
    assert counts["opened"] > 0


NUM_TRIES = count(4, full=50)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("managed", [True, False], ids=["managed", "plain"])
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_without_fsync_checkpoints_are_lost(server: Server, kind: str, managed: bool) -> None:
    """The gate can fail: the same cuts, while the saving process leaves out the files' fsync on the buffered path."""
    num_lost = 0
    with powered_file_system(kind) as file_system:
        for number in range(1, NUM_TRIES + 1):
            path = file_system.mount / str(number) / ("" if managed else "state.pt")
            power = Power(str(file_system.mount), cut_at_ack=1, direct=False, syncs_files=False)
            order = Order([str(path)], number, num_tensors=3, numel=10_000, power=power)
            # No best, whose link would be a reflink on XFS: making one writes the file to the disk.
            order.managed = Managed([None], NUM_KEPT) if managed else None
            server.start(order)
            lines = server.lines_until_end()
            file_system.restore()
            if managed:
                (entry,) = managed_runs.acknowledged(lines)
                path /= entry.name
            else:
                assert plain_runs.acknowledged(lines) == {path: number}
            num_lost += not (path.exists() and asyncckpt.verify(path).ok)
    print(f"{kind}: {num_lost} of {NUM_TRIES} acknowledged checkpoints lost without fsync")
    assert num_lost > NUM_TRIES / 2
