"""The runs whose crash states are enumerated: what savers and managers are used for, each in a few saves."""

from __future__ import annotations

import errno
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from storage.mounts import memory_directory
from storage.test_links import WAYS
from torch import nn

from asyncckpt import (
    AsyncCheckpointSaver,
    CheckpointInfo,
    CheckpointManager,
    CheckpointWriteError,
    KeepLast,
    SaveHandle,
)
from asyncckpt.events import Event
from asyncckpt.naming import REGISTRY_NAME
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.service import worker
from asyncckpt.storage.local import LocalStorage
from reliability.crash.exploring import Recording, look_at
from reliability.crash.facts import Acknowledged, Found, Opened, Pruned, Pruning, RegistryLost, Retention, Submitted
from reliability.crash.file_systems import (
    RUN,
    TIMEOUT_SECS,
    file_system,
    held_before_commit,
    is_any,
    is_directory,
    is_file,
    patched,
    raising_once,
)
from reliability.crash.findings import Findings, look_at_directory, look_at_files
from reliability.crash.invariant import Promise, broken, broken_files, promise_of
from reliability.crash.recorder import Recorder, recording
from reliability.crash.states import CrashState, crash_states

_NUM_RECOVERIES = 20
FEW, SEVERAL = 16, 5000  # tensor elements: a file within one block, and one of six

Losses = Sequence[float | None]
Workload = Callable[[random.Random], Recording]


# --- managers ---


class Managing:
    """A manager under a recorder, and the numbers of its states."""

    def __init__(self, recorder: Recorder, path: str = RUN, num_kept: int = 2, first: int = 1, **options: Any) -> None:
        self.recorder = recorder
        self.number = first
        recorder.note(Retention(num_kept))
        self.manager = CheckpointManager(recorder.base / path, num_kept, save_rng=False, **options)

    def __enter__(self) -> Managing:
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close(TIMEOUT_SECS)

    def save(
        self, loss: float | None, *, step: int | None = None, numel: int = FEW, num_metrics: int = 0
    ) -> SaveHandle:
        number, self.number = self.number, self.number + 1
        model = filled(number, numel)
        metrics = {f"metric {index}": float(number) for index in range(num_metrics)}

        def save() -> SaveHandle | None:
            return self.manager.save(
                model, None, epoch=0, global_step=step or number, val_loss=loss, val_metrics=metrics
            )

        return self.recorder.submit(number, loss, save)


def managed(name: str, recorder: Recorder, num_kept: int, path: str = RUN, before: Promise | None = None) -> Recording:
    def look(base: Path) -> Findings:
        return look_at_directory(base / path, num_kept)

    return Recording(name, recorder.initial, recorder.steps, look, broken, before or Promise())


def save_in_turn(managing: Managing, losses: Losses, chance: random.Random, **options: Any) -> None:
    """The next save begins when the one before is acknowledged, or when all that it replaced is deleted too."""
    for loss in losses:
        managing.save(loss, **options).result(TIMEOUT_SECS)
        if chance.random() < 0.5:
            managing.manager.wait(TIMEOUT_SECS)


def any_losses(chance: random.Random, count: int) -> Losses:
    return [chance.choice([math.nan, None, 1.0, 2.0, 3.0, 4.0, chance.uniform(0, 9)]) for _ in range(count)]


def kept(num_kept: int) -> Workload:
    """Retention at work: worse, better and equal losses, NaN and none."""

    def run(chance: random.Random) -> Recording:
        with memory_directory() as base:
            with recording(base) as recorder, Managing(recorder, num_kept=num_kept) as managing:
                save_in_turn(managing, any_losses(chance, 5), chance)
            return managed(f"keep {num_kept}", recorder, num_kept)

    return run


def best_changes(*ways: str) -> Workload:
    """Each save is the best: the link is renewed, in one of these ways, and the best before is deleted."""

    def run(chance: random.Random) -> Recording:
        with memory_directory() as base, file_system(chance.choice(ways)):
            with recording(base) as recorder, Managing(recorder, num_kept=1) as managing:
                save_in_turn(managing, [9.0 - number - chance.random() for number in range(4)], chance)
            return managed("the best changes", recorder, 1)

    return run


def best_stays(chance: random.Random) -> Recording:
    """The first save stays the best, outside what else is kept."""
    with memory_directory() as base, file_system(chance.choice(WAYS)):
        with recording(base) as recorder, Managing(recorder, num_kept=1) as managing:
            save_in_turn(managing, [1.0, *(2.0 + chance.random() for _ in range(3))], chance)
        return managed("the best stays", recorder, 1)


def concurrent_saves(chance: random.Random) -> Recording:
    """All submitted at once, two written at a time; commits keep their order."""
    with memory_directory() as base:
        with recording(base) as recorder, Managing(recorder, num_workers=2, max_in_flight=4) as managing:
            managing.save(5.0).result(TIMEOUT_SECS)
            for loss in any_losses(chance, 4):
                managing.save(loss, numel=chance.choice([FEW, SEVERAL]))
        return managed("concurrent saves", recorder, 2)


def same_name(chance: random.Random) -> Recording:
    """Two steps saved over and over, each with the loss it had: the new file takes the old one's place."""
    num_kept = chance.choice([1, 2])
    with memory_directory() as base:
        with recording(base) as recorder, Managing(recorder, num_kept=num_kept) as managing:
            for _ in range(5):
                step = chance.choice([1, 1, 2])
                save_in_turn(managing, [float(step)], chance, step=step)
        return managed("the same name", recorder, num_kept)


def deep_directory(chance: random.Random) -> Recording:
    """The first save makes the directory and two levels above it."""
    path = f"one/two/{RUN}"
    with memory_directory() as base:
        with recording(base) as recorder, Managing(recorder, path) as managing:
            save_in_turn(managing, any_losses(chance, 2), chance, numel=chance.choice([FEW, SEVERAL]))
        return managed("two missing levels deep", recorder, 2, path)


def pruning(chance: random.Random) -> Recording:
    with memory_directory() as base:
        with recording(base) as recorder, Managing(recorder, num_kept=3) as managing:
            save_in_turn(managing, any_losses(chance, 4), chance)
            managing.manager.wait(TIMEOUT_SECS)
            recorder.note(Pruning(1))
            managing.manager.prune(KeepLast(1))
            recorder.note(Pruned())
            save_in_turn(managing, any_losses(chance, 2), chance)
        return managed("prune", recorder, 3)


def mirrored(chance: random.Random) -> Recording:
    """The mirror of a directory that is elsewhere; what counts as acknowledged is what `handle.mirrored` says."""
    num_kept = chance.choice([1, 2])
    with memory_directory() as base, memory_directory() as elsewhere, recording(base) as recorder:
        recorder.note(Retention(num_kept, in_order=False))  # the newest first, then what it passed
        retention = KeepLast(num_kept)
        with CheckpointManager(
            elsewhere / RUN, mirror=base / RUN, mirror_retention=retention, writer="thread", save_rng=False
        ) as manager:
            for number, loss in enumerate(any_losses(chance, 5), 1):
                save_mirrored(recorder, manager, number, loss, chance.choice([FEW, SEVERAL]))
                if chance.random() < 0.5:
                    manager.wait(TIMEOUT_SECS, tier="mirror")
        return managed("a mirror", recorder, num_kept)


def late_mirror(chance: random.Random) -> Recording:
    """The mirror of a directory that was there before: the newest comes first, and then what is older."""
    losses = any_losses(chance, 4)

    def manager(**options: Any) -> CheckpointManager:
        return CheckpointManager(elsewhere / RUN, len(losses), writer="thread", save_rng=False, **options)

    with memory_directory() as base, memory_directory() as elsewhere:
        with manager() as alone:
            for number, loss in enumerate(losses, 1):
                alone.save(filled(number, FEW), None, epoch=0, global_step=number, val_loss=loss)
            alone.wait(TIMEOUT_SECS)
            names = {str(info.filepath.name): info.global_step or 0 for info in alone.list_checkpoints()}
        with recording(base) as recorder:
            recorder.note(Retention(len(losses), in_order=False))
            for number, loss in enumerate(losses, 1):
                recorder.note(Submitted(number, loss))

            def note(event: Event) -> None:
                if event.kind == "mirrored":
                    number = names[os.path.basename(event.path)]
                    recorder.note(Acknowledged(number, os.path.relpath(event.path, base), number))

            with manager(mirror=base / RUN, on_event=note) as mirroring:
                mirroring.wait(TIMEOUT_SECS, tier="mirror")
        return managed("a mirror of what was there before", recorder, len(losses))


def filled(number: int, numel: int) -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.full((numel,), float(number)))])


def save_mirrored(recorder: Recorder, manager: CheckpointManager, number: int, loss: float | None, numel: int) -> None:
    def note(mirrored: Future[CheckpointInfo | None]) -> None:
        if (info := mirrored.result()) is not None:
            recorder.note(Acknowledged(number, os.path.relpath(info.filepath, recorder.base), info.sequence))

    recorder.note(Submitted(number, loss))
    handle = manager.save(filled(number, numel), None, epoch=0, global_step=number, val_loss=loss)
    assert handle is not None
    assert handle.mirrored is not None
    handle.mirrored.add_done_callback(note)


def lost_registry(chance: random.Random) -> Recording:
    """Somebody has removed the registry: it is rebuilt from the files, which retention leaves alone until a prune."""
    with memory_directory() as base:
        with recording(base) as earlier, Managing(earlier) as managing:
            save_in_turn(managing, any_losses(chance, 4), chance)
        (base / RUN / REGISTRY_NAME).unlink()
        before = promise_of([*earlier.facts, RegistryLost()])
        with recording(base) as recorder, Managing(recorder, first=managing.number) as managing:
            save_in_turn(managing, any_losses(chance, 3), chance)
            managing.manager.wait(TIMEOUT_SECS)
            recorder.note(Pruning(1))
            managing.manager.prune(KeepLast(1))
            recorder.note(Pruned())
        return managed("a lost registry", recorder, 2, before=before)


def many_blocks(direct: bool) -> Workload:
    """Files, and a registry, of several blocks, which may be torn; past the page cache or through it."""

    def run(chance: random.Random) -> Recording:
        with memory_directory() as base, file_system("hard link", direct=direct):
            with recording(base) as recorder, Managing(recorder, num_kept=1) as managing:
                losses = [chance.uniform(0, 9) for _ in range(3)]
                save_in_turn(managing, losses, chance, numel=SEVERAL, num_metrics=150)
            return managed("several blocks" + (", O_DIRECT" if direct else ", buffered"), recorder, 1)

    return run


def failing(name: str, error: int, of: Callable[[Any], bool], num_turns: int) -> Workload:
    """One of the first calls of the file system of a kind fails, and what can be done again is. After an fsync that
    failed, what was written before may never reach the disk, however well a later one does."""

    def run(chance: random.Random) -> Recording:
        turn = chance.randrange(1, num_turns + 1)
        with memory_directory() as base, ExitStack() as stack:
            stack.enter_context(patched(name, raising_once(name, error, of, turn)))
            stack.enter_context(mock.patch.object(worker, "_FIRST_PAUSE_SECS", 0))
            recorder = stack.enter_context(recording(base))
            with Managing(recorder) as managing:
                for loss in any_losses(chance, 5):
                    with suppress(CheckpointWriteError):  # the directory could not be opened
                        managing.save(loss, numel=chance.choice([FEW, SEVERAL])).exception(TIMEOUT_SECS)
                        managing.manager.wait(TIMEOUT_SECS)
            return managed(f"{name} {turn} fails", recorder, 2)

    return run


def recoveries(chance: random.Random) -> Iterator[Recording]:
    """A crash while the directory is opened after a crash, for some of the crash states of one run."""
    first = chance.choice([best_changes(*WAYS), same_name, kept(1), kept(2), pruning, concurrent_saves])(chance)
    states = list(crash_states(first.initial, first.steps, chance))
    for crashed in chance.sample(states, min(_NUM_RECOVERIES, len(states))):
        yield recovery_from(first, crashed)


def recovery_from(first: Recording, crashed: CrashState) -> Recording:
    with memory_directory() as base:
        found = look_at(crashed.tree, base / "look", first.look)
        crashed.tree.write(base)
        with recording(base) as recorder:
            recorder.note(Found(frozenset(c.number for c in found.checkpoints.values() if c.number is not None)))
            directory = CheckpointDirectory(str(base / RUN), LocalStorage(), metric="val_loss")
            directory.open_for_writing()
            directory.close()
            recorder.note(Opened())
    before = first.promises()[crashed.num_facts]
    return Recording(f"recovery, {first.name}", recorder.initial, recorder.steps, first.look, broken, before)


# --- savers to explicit paths ---


def saved_to(name: str, recorder: Recorder, path: str, names: list[str]) -> Recording:
    def look(base: Path) -> Findings:
        return look_at_files(base / path, names)

    return Recording(name, recorder.initial, recorder.steps, look, broken_files)


def save_to(recorder: Recorder, saver: AsyncCheckpointSaver, path: str, number: int, numel: int = FEW) -> SaveHandle:
    state = {"tensor": torch.full((numel,), float(number))}
    return recorder.submit(number, None, lambda: saver.save(state, recorder.base / path))


def overwritten_path(chance: random.Random) -> Recording:
    """One path, two missing levels deep at first, written over and over."""
    with memory_directory() as base:
        with recording(base) as recorder, AsyncCheckpointSaver(chance.choice([1, 2])) as saver:
            for number in range(1, 5):
                handle = save_to(recorder, saver, "one/two/state.pt", number, chance.choice([FEW, SEVERAL]))
                if chance.random() < 0.5:
                    handle.result(TIMEOUT_SECS)
        return saved_to("one path", recorder, "one/two", ["state.pt"])


def ranks_side_by_side(chance: random.Random) -> Recording:
    """Two savers in one directory: while one is about to commit, the other one begins, sweeps, and commits."""
    with memory_directory() as base:
        with recording(base) as recorder, ExitStack() as stack:
            first, second = (stack.enter_context(AsyncCheckpointSaver()) for _ in range(2))
            with held_before_commit("rank0.pt") as release:
                handle = save_to(recorder, first, "rank0.pt", 1, chance.choice([FEW, SEVERAL]))
                save_to(recorder, second, "rank1.pt", 2, chance.choice([FEW, SEVERAL])).result(TIMEOUT_SECS)
                release()
                handle.result(TIMEOUT_SECS)
            save_to(recorder, first, "rank0.pt", 3).result(TIMEOUT_SECS)
            save_to(recorder, second, "rank1.pt", 4).result(TIMEOUT_SECS)
        return saved_to("ranks side by side", recorder, "", ["rank0.pt", "rank1.pt"])


_RUNS: dict[str, Workload] = {
    "first save two missing levels deep": deep_directory,
    "one path overwritten": overwritten_path,
    "ranks side by side": ranks_side_by_side,
    "KeepLast(2)": kept(2),
    "KeepLast(1)": kept(1),
    "best changes": best_changes(*WAYS),
    "best stays": best_stays,
    "concurrent saves": concurrent_saves,
    "same name": same_name,
    "prune": pruning,
    "mirror": mirrored,
    "late mirror": late_mirror,
    "lost registry": lost_registry,
    "several blocks, O_DIRECT": many_blocks(direct=True),
    "several blocks, buffered": many_blocks(direct=False),
    "a file's fsync fails": failing("fsync", errno.EIO, is_file, 12),
    "a directory's fsync fails": failing("fsync", errno.EIO, is_directory, 20),
    "a rename fails": failing("rename", errno.ENOSPC, is_any, 10),
    "an unlink fails": failing("unlink", errno.EIO, is_any, 10),
}


def runs_of(name: str, chance: random.Random) -> Iterable[Recording]:
    """Some runs of one of the `WORKLOADS`, with losses, sizes and the like as they come."""
    return recoveries(chance) if name == RECOVERY else [_RUNS[name](chance)]


RECOVERY = "crash during recovery"
WORKLOADS = (*_RUNS, RECOVERY)
