"""Random lives of a checkpoint directory against a model: saves, crashes, prunes, damage, lost registries, resumes.

A crash is a disk that is dead from some call through the seam on, after which the manager is dropped: what is in the
directory then is what the calls before have left. `directory_model` says which states that may be.

`ASYNCCKPT_NUM_LIVES` (default 60) chooses how many.
"""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from registry.directory_model import Disk, Entry, File, Health, Writer, best_of, look, opened, pruned, saved
from storage.mounts import memory_directory
from storage.seam import Call, Seam
from torch import nn

from asyncckpt import CheckpointManager, CorruptCheckpointError, KeepBest, KeepLast
from asyncckpt.naming import BEST_NAME, LOCK_NAME, REGISTRY_NAME, checkpoint_name, is_temporary_name
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.storage.local import LocalStorage

NUM_LIVES = int(os.environ.get("ASYNCCKPT_NUM_LIVES", "60"))
NUM_KEPT = 2
MOST_CALLS = 130
LOSSES = st.sampled_from([0.1, 0.2, 0.3, 0.4, math.nan, None])
MOVES = st.sampled_from([1, 0, -1, -2])  # of the step


class Filled(nn.Module):
    """All of it is one number, which tells the states apart."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((2000,), float(number)), requires_grad=False)

    @property
    def number(self) -> int:
        (number,) = self.weights.unique().tolist()
        return int(number)


class Life(RuleBasedStateMachine):
    """Whatever happens, what is on disk, listed and loaded is what the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.resources = ExitStack()
        self.path = self.resources.enter_context(memory_directory()) / "run"
        self.manager: CheckpointManager | None = None
        self.writer: Writer | None = None  # None until the manager has opened the directory
        self.disk = Disk()
        self.damaged: frozenset[int] = frozenset()  # as the manager has found out by loading
        self.step = self.number = 0

    def teardown(self) -> None:
        """Everything that is whole can be loaded, by its name."""
        self.close()
        model = Filled()
        with CheckpointManager(self.path) as reader:
            for name, file in self.disk.files.items():
                if file.health == "whole":
                    reader.load(name, model)
                    assert model.number == file.entry.number
        self.resources.close()

    # --- what a writer does ---

    @rule(saves=st.lists(st.tuples(LOSSES, MOVES), min_size=1, max_size=4))
    def train(self, saves: list[tuple[float | None, int]]) -> None:
        for loss, move in saves:
            self.save(loss, move, None)

    @rule(loss=LOSSES, move=MOVES, crash=st.integers(0, MOST_CALLS))
    def save(self, loss: float | None, move: int, crash: int | None) -> None:
        self.step = max(0, self.step + move)
        self.number += 1
        before, writer = self.opening()
        entry = writer.next_entry(before[-1], checkpoint_name(1, self.step, {"loss": loss}), loss, self.number)
        after, num_unacknowledged, writer = saved(before[-1], writer, entry, NUM_KEPT)

        def act(manager: CheckpointManager) -> None:
            handle = manager.save(Filled(self.number), None, 1, self.step, val_loss=loss)
            assert handle is not None
            info = handle.result(60)
            assert (info.sequence, info.filepath.name) == (entry.sequence, entry.name)
            manager.wait(60)

        self.write(act, before + after, len(before) + num_unacknowledged, writer, crash)

    @rule(num_last=st.integers(1, 3), num_best=st.integers(0, 2), crash=st.none() | st.integers(0, MOST_CALLS))
    def prune(self, num_last: int, num_best: int, crash: int | None) -> None:
        before, writer = self.opening()
        whole = writer.whole(writer.index.entries)
        kept = [*whole[-num_last:], *best_first(whole)[:num_best]]
        policy = KeepLast(num_last) | KeepBest(num_best) if num_best else KeepLast(num_last)
        after, num_unacknowledged, writer = pruned(before[-1], writer, kept)
        self.write(
            lambda manager: manager.prune(policy), before + after, len(before) + num_unacknowledged, writer, crash
        )

    def opening(self) -> tuple[list[Disk], Writer]:
        states, writer = opened(self.disk) if self.writer is None else ([self.disk], self.writer)
        return states, replace(writer, damaged=self.damaged)

    def write(
        self,
        act: Callable[[CheckpointManager], object],
        states: list[Disk],
        num_unacknowledged: int,
        writer: Writer,
        crash: int | None,
    ) -> None:
        """Pass through the states to the last one, or crash on the way."""
        manager = self.open_manager()

        def die(call: Call) -> None:
            if crash is not None and call.number >= crash:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with Seam(die) as seam:
            try:
                act(manager)
                states = states[num_unacknowledged:]
            except OSError:
                assert crash is not None
            has_crashed = crash is not None and len(seam.calls) > crash
            if has_crashed:
                self.close()
        if not has_crashed:
            states, self.writer = states[-1:], writer
        seen, shapes = look(self.path), [state.shape() for state in states]
        assert seen in shapes
        self.disk = states[len(shapes) - 1 - shapes[::-1].index(seen)]

    def open_manager(self) -> CheckpointManager:
        if self.manager is None:
            self.manager = CheckpointManager(self.path, NUM_KEPT, retries=0, save_rng=False, lock_timeout_secs=0.5)
        return self.manager

    @rule(num_damaged=st.integers(0, 2))
    def resume(self, num_damaged: int) -> None:
        """What the manager finds damaged on its way is not counted by retention any more."""
        for entry in self.disk.listed()[-num_damaged:] if num_damaged else []:
            if self.disk.is_whole(entry) and entry != best_of(self.disk.listed()):
                self.damage_file(entry.name, "flipped", in_place=False)
        if best_of(self.disk.listed()) in self.newer_than_valid():
            return
        self.check_load(self.open_manager().load_latest, self.disk.newest_valid(), is_empty=not self.disk.listed())
        self.damaged |= {entry.sequence for entry in self.newer_than_valid()}

    def newer_than_valid(self) -> list[Entry]:
        return list(itertools.takewhile(lambda entry: not self.disk.is_whole(entry), reversed(self.disk.listed())))

    @rule()
    def close(self) -> None:
        manager, self.manager, self.writer, self.damaged = self.manager, None, None, frozenset()
        if manager is not None:
            manager.close(60)

    @rule()
    def open_twice(self) -> None:
        """The second time, not a byte changes."""
        self.close()
        states, _ = opened(self.disk)
        if not self.path.exists():
            return
        self.open_once()
        self.disk = states[-1]
        assert look(self.path) == self.disk.shape()
        assert not any(is_temporary_name(path.name) for path in self.path.iterdir())
        before = contents(self.path)
        self.open_once()
        assert contents(self.path) == before

    def open_once(self) -> None:
        directory = CheckpointDirectory(str(self.path), LocalStorage(), metric="val_loss", mode="min")
        directory.open_for_writing()
        directory.close()

    # --- what others do to the files ---

    @precondition(lambda self: self.whole_files())
    @rule(data=st.data(), health=st.sampled_from(["flipped", "torn", None]), in_place=st.booleans())
    def damage(self, data: st.DataObject, health: Health | None, in_place: bool) -> None:
        """A checkpoint's file, in place (then the best link may be the same file) or by another file."""
        self.damage_file(data.draw(st.sampled_from(self.whole_files())), health, in_place=in_place)

    def damage_file(self, name: str, health: Health | None, *, in_place: bool) -> None:
        path, link = self.path / name, self.path / BEST_NAME
        damaged = File(self.disk.files[name].entry, health) if health else None
        if in_place and damaged and link.exists() and path.samefile(link):
            self.disk = replace(self.disk, link=damaged)
        damage(path, health, in_place=in_place)
        self.disk = self.disk.having(name, damaged) if damaged else self.disk.without(name)

    def whole_files(self) -> list[str]:
        """The newest first, since it is the one that matters."""
        whole = [file for file in self.disk.files.values() if file.health == "whole"]
        return [file.entry.name for file in sorted(whole, key=lambda file: -file.entry.sequence)]

    @precondition(lambda self: self.disk.link is not None and self.disk.link.health == "whole")
    @rule(health=st.sampled_from(["flipped", "torn", None]))
    def damage_link(self, health: Health | None) -> None:
        assert self.disk.link is not None
        damage(self.path / BEST_NAME, health, in_place=False)
        self.disk = replace(self.disk, link=File(self.disk.link.entry, health) if health else None)

    @precondition(lambda self: self.disk.index is not None)
    @rule(contents=st.sampled_from([None, b"", b'{"checkpoints": 5']))
    def lose_registry(self, contents: bytes | None) -> None:
        path = self.path / REGISTRY_NAME
        path.unlink()
        if contents is not None:
            path.write_bytes(contents)
        self.disk = replace(self.disk, index=None, has_damaged_index=contents is not None)

    # --- what a reader finds, after each of these ---

    @invariant()
    def reads_what_is_there(self) -> None:
        with CheckpointManager(self.path, NUM_KEPT) as reader:
            expected = self.disk.listed()
            assert [(info.sequence, info.filepath.name, info.protected) for info in reader.list_checkpoints()] == [
                (entry.sequence, entry.name, entry.protected) for entry in expected
            ]
            best = best_of(expected)
            assert (reader.best and reader.best.sequence) == (best and best.sequence)
            self.check_load(reader.load_latest, self.disk.newest_valid(), is_empty=not expected)
            self.check_load(reader.load_best, self.disk.best_valid(), is_empty=best is None)

    def check_load(self, load: Callable[[nn.Module], tuple[int, Any]], file: File | None, *, is_empty: bool) -> None:
        model = Filled()
        if file is not None:
            load(model)
            assert model.number == file.entry.number
        elif not is_empty or self.disk.is_lost:
            with pytest.raises(CorruptCheckpointError):
                load(model)
        else:
            assert load(model) == (0, {})


def best_first(entries: list[Entry]) -> list[Entry]:
    ranked: list[Entry] = []
    while best := best_of(entry for entry in entries if entry not in ranked):
        ranked.append(best)
    return ranked


def damage(path: Path, health: Health | None, *, in_place: bool) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if not in_place or health is None:
        path.unlink()
    if health is not None:
        path.write_bytes(content if health == "flipped" else content[: len(content) // 2])


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != LOCK_NAME}


@pytest.fixture
def quiet() -> Iterator[None]:
    """All that recovery says."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(900)  # a life that fails is made shorter first, which takes minutes
@pytest.mark.usefixtures("quiet")
def test_random_lives() -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=NUM_LIVES,
            stateful_step_count=25,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
