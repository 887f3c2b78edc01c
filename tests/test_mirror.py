"""A manager with a mirror: durable here first, there later; neither holds up the other."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from service.disk import wait_for
from service.test_saver import disk_held
from storage.s3_server import BUCKET, S3Server
from torch import nn

import asyncckpt
from asyncckpt import CheckpointInfo, CheckpointManager, KeepLast, WaitTimeoutError, mirror_tier
from asyncckpt.cli.listing import gather
from asyncckpt.events import Event
from asyncckpt.naming import MIRROR_NOTE_NAME, REGISTRY_NAME
from asyncckpt.registry.backlog import Mirrored
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.mirror_note import NoteWriter, read_note
from asyncckpt.registry.recovery import Survey
from asyncckpt.registry.replication import Replica
from asyncckpt.registry.retention import RetentionPolicy
from asyncckpt.service import messages, replicator
from asyncckpt.service import mirror as mirror_service
from asyncckpt.service.mirror import ProcessCopier, ThreadCopier
from asyncckpt.service.options import WriterKind
from asyncckpt.service.writer_process import WriterProcess
from asyncckpt.storage.places import Places


class Filled(nn.Module):
    """All of it is one number."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((2000,), float(number)), requires_grad=False)

    @property
    def number(self) -> int:
        return int(self.weights[0])


@pytest.fixture(params=["to a directory", "to a directory, by a thread", "to S3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def there(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """The mirror's place, and the options that open it."""
    if kind != "to S3":
        return str(tmp_path / "there"), {}
    running: S3Server = request.getfixturevalue("server")
    return f"s3://{BUCKET}/{tmp_path.name}", {"storage_options": running.options}


only_to_a_directory = pytest.mark.parametrize("kind", ["to a directory"])
only_by_processes = pytest.mark.parametrize("kind", ["to a directory", "to S3"])


Make = Callable[..., CheckpointManager]


@pytest.fixture
def make(
    tmp_path: Path, kind: str, there: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Make]:
    writer = "thread" if kind.endswith("thread") else "auto"
    monkeypatch.setattr(replicator, "_MAX_PAUSE_SECS", 0.1)  # of a thread
    managers: list[CheckpointManager] = []

    def make(path: Path = tmp_path / "here", **options: Any) -> CheckpointManager:
        options = {
            "mirror": there[0],
            "writer": writer,
            "save_rng": False,
            "lock_timeout_secs": 0.5,
            **there[1],
            **options,
        }
        managers.append(CheckpointManager(path, options.pop("max_checkpoints", 2), **options))
        return managers[-1]

    yield make
    for manager in managers:
        manager.close(60)


@pytest.fixture
def reader(there: tuple[str, dict[str, Any]]) -> Iterator[CheckpointManager]:
    with CheckpointManager(there[0], **there[1]) as reader:
        yield reader


def save(manager: CheckpointManager, step: int, loss: float | None = None) -> asyncckpt.SaveHandle:
    handle = manager.save(Filled(step), None, 1, step, val_loss=loss)
    assert handle is not None
    return handle


def arrival(handle: asyncckpt.SaveHandle, timeout: float = 60) -> CheckpointInfo:
    """The checkpoint in the mirror."""
    assert handle.mirrored is not None
    info = handle.mirrored.result(timeout)
    assert info is not None
    return info


def steps(manager: CheckpointManager) -> list[int | None]:
    return [info.global_step for info in manager.list_checkpoints()]


def test_everything_comes_to_the_mirror(
    make: Make, reader: CheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    """With a registry, a retention and a best link of its own."""
    manager = make(mirror_retention=KeepLast(3))
    handles = [save(manager, step, 1 / step) for step in range(1, 6)]
    manager.wait(60, tier="mirror")
    assert steps(reader) == [3, 4, 5]
    assert (reader.best and reader.best.global_step) == 5
    assert all(report.ok for report in reader.verify())
    assert [arrival(handle).global_step for handle in handles[2:]] == [3, 4, 5]
    assert str(arrival(handles[-1]).filepath) == str(reader.list_checkpoints()[-1].filepath)
    save(manager, 6)
    manager.wait(60)
    assert steps(manager) == [5, 6]
    assert "mirror" not in caplog.text  # nothing to complain of


def test_the_best_one_there(make: Make, reader: CheckpointManager) -> None:
    """By the same metric, and kept besides."""
    manager = make(monitor_metric="accuracy", monitor_mode="max", mirror_retention=KeepLast(1))
    for step, accuracy in ((1, 0.9), (2, 0.5)):
        manager.save(Filled(step), None, 1, step, val_loss=step, val_metrics={"accuracy": accuracy})
    manager.wait(60, tier="mirror")
    assert steps(reader) == [1, 2]


def test_an_empty_disk_goes_on_with_the_mirrors_run(make: Make, reader: CheckpointManager, tmp_path: Path) -> None:
    """A new machine: the run is resumed from the mirror, which neither loses nor mixes up anything."""
    first = make()
    for step in (1, 2, 3):
        save(first, step, 1 / step)
    first.close(60)
    shutil.rmtree(tmp_path / "here")
    second, model = make(), Filled()
    epoch, _ = second.load_latest(model)
    assert (epoch, model.number) == (1, 3)
    assert second.load_best(model)[0] == 1
    save(second, 4, 0.9)
    second.wait(60, tier="mirror")
    assert steps(second) == [4]
    assert steps(reader) == [3, 4]
    assert [info.sequence for info in reader.list_checkpoints()] == [3, 4]
    assert (reader.best and reader.best.global_step) == 3


def test_an_empty_disk_and_no_load(make: Make, reader: CheckpointManager, tmp_path: Path) -> None:
    """It is the same run all the same."""
    first = make()
    save(first, 1)
    first.close(60)
    shutil.rmtree(tmp_path / "here")
    second = make()
    save(second, 2)
    second.wait(60, tier="mirror")
    assert steps(reader) == [1, 2]


def test_the_newest_valid_one_of_both_places(make: Make, tmp_path: Path) -> None:
    """What is damaged here is loaded from there, the newest first; of equals the local one."""
    manager = make(max_checkpoints=3)
    for step in (1, 2, 3):
        save(manager, step)
    manager.wait(60, tier="mirror")
    events: list[Event] = []
    loading, model = make(on_event=events.append), Filled()
    loading.load_latest(model)
    assert model.number == 3
    assert not events
    for name in ("step00000003", "step00000002"):
        (path,) = (tmp_path / "here").glob(f"*{name}*")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    loading.load_latest(model)
    assert model.number == 3
    loading.load(2, model)
    assert model.number == 2
    assert {Path(event.path).parent for event in events} == {tmp_path / "here"}  # which was tried first


@only_by_processes
def test_pins_hold_in_the_mirror_too(make: Make, reader: CheckpointManager) -> None:
    """From the moment on that they are known there."""
    manager = make(max_checkpoints=1)
    save(manager, 1)
    manager.wait(60, tier="mirror")
    manager.pin(1)
    wait_for(lambda: [info.pinned for info in reader.list_checkpoints()] == [True])
    for step in (2, 3):
        save(manager, step)
    manager.wait(60, tier="mirror")
    assert steps(reader) == [1, 3]
    manager.unpin(1)
    save(manager, 4)
    manager.wait(60, tier="mirror")
    assert steps(reader) == [4]


@only_by_processes
@pytest.mark.parametrize("lost", ["the directory", "the registry"])
def test_pins_outlive_what_pinned_them(make: Make, reader: CheckpointManager, lost: str, tmp_path: Path) -> None:
    """What is lost here was unpinned by nobody."""
    manager = make(max_checkpoints=1)
    save(manager, 1)
    manager.wait(60)
    manager.pin(1)
    manager.wait(60, tier="mirror")
    if lost == "the directory":
        shutil.rmtree(tmp_path / "here")
    else:
        manager.close(60)
        (tmp_path / "here" / REGISTRY_NAME).unlink()
        manager = make(max_checkpoints=1)
    for step in (2, 3):
        save(manager, step)
        manager.wait(60, tier="mirror")
    assert steps(reader) == [1, 3]


@only_by_processes
def test_waiting_in_a_callback_of_the_mirror(make: Make) -> None:
    """Would never end: it is refused."""
    manager = make()
    refusals: list[str] = []

    def wait(_: object) -> None:
        methods: list[Callable[[], None]] = [lambda: manager.wait(60, tier="mirror"), manager.close]
        for method in methods:
            try:
                method()
            except RuntimeError as error:
                refusals.append(str(error))

    handle = save(manager, 1)
    assert handle.mirrored is not None
    handle.mirrored.add_done_callback(wait)
    manager.wait(60, tier="mirror")
    wait_for(lambda: len(refusals) == 2)
    assert "inside a callback would wait for itself" in refusals[0]


@only_to_a_directory
def test_a_restart_catches_up(make: Make, reader: CheckpointManager, tmp_path: Path) -> None:
    """What was saved without the mirror comes there with the next run that has one."""
    alone = make(mirror=None, max_checkpoints=3)
    for step in (1, 2, 3):
        save(alone, step)
    alone.close(60)
    manager = make(max_checkpoints=3)
    save(manager, 4)
    manager.wait(60, tier="mirror")
    assert steps(manager) == [1, 2, 3, 4]  # the first was not there yet
    assert steps(reader) == [2, 3, 4]


def saved_without_mirror(make: Make, *steps: int) -> list[Path]:
    """The files, in a directory whose mirror has nothing of them yet."""
    alone = make(mirror=None, max_checkpoints=len(steps))
    for step in steps:
        save(alone, step)
    alone.close(60)
    return [info.filepath for info in alone.list_checkpoints()]


def test_the_newest_comes_first(make: Make) -> None:
    """It is what the loss of this machine would cost."""
    saved_without_mirror(make, 1, 2, 3, 4)
    order: list[str] = []
    manager = make(
        max_checkpoints=4, on_event=lambda event: order.append(event.path) if event.kind == "mirrored" else None
    )
    manager.wait(60, tier="mirror")
    wait_for(lambda: len(order) == 4)
    assert [name.rpartition("step")[2][:8] for name in order] == [f"{step:08}" for step in (4, 1, 2, 3)]


@pytest.mark.parametrize("kind", ["to a directory", "to a directory, by a thread"])
def test_one_that_cannot_be_copied_holds_up_no_other(
    make: Make, reader: CheckpointManager, there: tuple[str, dict[str, Any]]
) -> None:
    files = saved_without_mirror(make, 1, 2, 3)
    in_the_way = Path(there[0]) / files[0].name
    in_the_way.mkdir(parents=True)
    manager = make(max_checkpoints=3)
    with pytest.raises(WaitTimeoutError, match=r"not have everything yet: .*[Ii]s a directory"):
        manager.wait(2, tier="mirror")
    wait_for(lambda: steps(reader) == [2, 3])
    save(manager, 4)
    wait_for(lambda: steps(reader) == [2, 3, 4])
    manager.wait(60)
    assert steps(manager) == [1, 2, 3, 4]  # the first is kept for it
    in_the_way.rmdir()
    save(manager, 5)
    manager.wait(60, tier="mirror")
    assert steps(reader) == [3, 4, 5]


def test_what_the_mirror_has_lost_is_brought_again(make: Make, reader: CheckpointManager) -> None:
    first = make(max_checkpoints=3)
    for step in (1, 2, 3):
        save(first, step)
    first.close(60)
    assert steps(reader) == [1, 2, 3]
    reader.prune(KeepLast(1))
    reader.close(60)
    again = make(max_checkpoints=3)
    again.wait(60, tier="mirror")
    assert steps(reader) == [1, 2, 3]


@pytest.mark.parametrize("kind", ["to a directory", "to a directory, by a thread"])
def test_pruning_here_unpins_nothing_there(make: Make, reader: CheckpointManager, tmp_path: Path) -> None:
    """Whose registry is lost does not know what is pinned, and prunes it; the mirror knows."""
    manager = make(max_checkpoints=1)
    save(manager, 1)
    manager.wait()
    manager.pin(1)
    save(manager, 2)
    manager.wait(60, tier="mirror")
    manager.close(60)
    (tmp_path / "here" / REGISTRY_NAME).unlink()
    manager = make(max_checkpoints=1)
    assert [info.global_step for info in manager.prune()] == [1]
    for step in (3, 4):
        save(manager, step)
        manager.wait(60, tier="mirror")
    assert steps(reader) == [1, 4]


def test_unpinning_between_runs(make: Make, reader: CheckpointManager) -> None:
    first = make(max_checkpoints=1)
    save(first, 1)
    first.wait(60)
    first.pin(1)
    save(first, 2)
    first.close(60)
    assert steps(reader) == [1, 2]
    without = make(mirror=None, max_checkpoints=1)
    without.unpin(1)
    without.close(60)
    manager = make(max_checkpoints=1)
    manager.wait(60, tier="mirror")
    save(manager, 3)
    manager.wait(60, tier="mirror")
    assert steps(reader) == [3]


@pytest.mark.parametrize("has_loaded", [True, False])
@only_by_processes
def test_no_improvement_on_the_mirrors_best(make: Make, has_loaded: bool, tmp_path: Path) -> None:
    """On an empty disk, which goes on from there."""
    first = make(save_best_only=True)
    save(first, 1, 0.2)
    first.close(60)
    shutil.rmtree(tmp_path / "here")
    second = make(save_best_only=True)
    if has_loaded:
        second.load_latest(Filled())
    assert second.save(Filled(2), None, 1, 2, val_loss=0.3) is None
    assert second.save(Filled(3), None, 1, 3, val_loss=0.1) is not None


@only_by_processes
def test_another_runs_best_counts_for_nothing(make: Make, tmp_path: Path) -> None:
    first = make()
    save(first, 1, 0.1)
    first.close(60)
    other = make(tmp_path / "other", mirror=None)
    save(other, 1, 0.5)
    other.close(60)
    second = make(tmp_path / "other", save_best_only=True)
    second.load_latest(Filled())
    assert second.save(Filled(2), None, 1, 2, val_loss=0.3) is not None


@pytest.mark.parametrize("kind", ["to S3"])
@pytest.mark.parametrize("writer", ["auto", "thread"])
def test_each_place_has_its_options(there: tuple[str, dict[str, Any]], writer: WriterKind, tmp_path: Path) -> None:
    """A directory mirrored to a bucket; and a bucket to another place, which its options would not open."""
    url, options = there[0], there[1]["storage_options"]
    wrong = {**options, "secret": "wrong"}
    here, again = tmp_path / "here", f"{url}-again"
    with CheckpointManager(
        here, mirror=url, storage_options=wrong, mirror_storage_options=options, writer=writer
    ) as manager:
        save(manager, 1)
        manager.wait(60, tier="mirror")
    with CheckpointManager(
        again, mirror=tmp_path / "far", storage_options=options, mirror_storage_options=wrong, writer=writer
    ) as manager:
        save(manager, 1)
        manager.wait(60, tier="mirror")
    for place in (url, str(tmp_path / "far")):
        with CheckpointManager(place, storage_options=options) as reader:
            assert steps(reader) == [1]


def test_another_runs_mirror_is_left_alone(make: Make, reader: CheckpointManager, tmp_path: Path) -> None:
    """Loudly; nothing of it is touched, and training goes on."""
    first = make()
    save(first, 1)
    first.close(60)
    other = make(tmp_path / "other", mirror=None)
    save(other, 7)
    other.close(60)
    failed = threading.Event()
    events: list[Event] = []

    def note(event: Event) -> None:
        events.append(event)
        if event.kind == "mirror_failed":
            failed.set()

    second = make(tmp_path / "other", on_event=note)
    handle = save(second, 8)
    handle.result(60)
    assert failed.wait(60)
    assert "another run's" in next(event.detail for event in events if event.kind == "mirror_failed")
    assert steps(reader) == [1]
    model = Filled()
    second.load_latest(model)
    assert model.number == 8


def test_a_damaged_one_is_not_mirrored(make: Make, reader: CheckpointManager, tmp_path: Path) -> None:
    alone = make(mirror=None, max_checkpoints=3)
    for step in (1, 2):
        save(alone, step)
    alone.close(60)
    (path,) = (tmp_path / "here").glob("*step00000001*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    manager = make(max_checkpoints=3)
    save(manager, 3)
    with pytest.raises(asyncckpt.CorruptCheckpointError, match="step00000001"):
        manager.wait(60, tier="mirror")
    assert steps(reader) == [2, 3]
    manager.wait(60, tier="mirror")  # it has been said


class Down:
    """A mirror that is a directory which can't be written, until `up`."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "down"
        self.path.write_text("in the way")

    def up(self) -> None:
        self.path.unlink()


def when_copying_fails(act: Callable[[], object]) -> Callable[[Event], object]:
    """Not when the first save can't look at the mirror."""
    return lambda event: act() if event.kind == "mirror_failed" and "new run begins" not in event.detail else None


def test_a_mirror_that_is_down_holds_up_nothing(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it lacks is kept here, up to the backlog, and brought there once it is up; the log says so."""
    down = Down(tmp_path)
    failed = threading.Event()
    manager = make(
        mirror=down.path,
        mirror_backlog_bytes=10 << 20,
        on_event=when_copying_fails(failed.set),
    )
    handles = [save(manager, step) for step in range(1, 6)]
    manager.wait(60)
    assert failed.wait(60)
    assert steps(manager) == [1, 2, 3, 4, 5]
    with pytest.raises(WaitTimeoutError, match=r"mirror does not have everything yet: .*[Nn]ot a directory"):
        manager.wait(0.2, tier="mirror")
    wait_for(lambda: "the mirror does not take everything at the moment" in caplog.text)
    down.up()
    manager.wait(60, tier="mirror")
    with CheckpointManager(down.path) as reader:
        assert steps(reader) == [4, 5]
    assert [handle.mirrored and handle.mirrored.result(60) for handle in handles[:3]] == [None, None, None]
    assert [arrival(handle).global_step for handle in handles[3:]] == [4, 5]
    save(manager, 6)
    manager.wait(60)
    assert steps(manager) == [5, 6]


@only_to_a_directory
def test_beyond_the_backlog_the_oldest_are_dropped_loudly(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    down = Down(tmp_path)
    manager = make(mirror=down.path, mirror_backlog_bytes=0)
    handles = [save(manager, step) for step in (1, 2)]
    manager.wait(60)
    handles += [save(manager, step) for step in (3, 4)]
    manager.wait(60)
    assert steps(manager) == [3, 4]
    assert caplog.text.count("dropped before it was mirrored") == 2
    manager.prune(KeepLast(1), dry_run=True)
    assert caplog.text.count("dropped before it was mirrored") == 2
    down.up()
    with pytest.raises(asyncckpt.CheckpointError, match="2 checkpoints never came to the mirror; the first: commit 1"):
        manager.wait(60, tier="mirror")
    with CheckpointManager(down.path) as reader:
        assert steps(reader) == [3, 4]
    assert handles[0].mirrored is not None
    with pytest.raises(asyncckpt.CheckpointError, match="before it was mirrored"):
        handles[0].mirrored.result(60)


@only_to_a_directory
def test_listing_says_how_the_mirror_stands(make: Make, tmp_path: Path) -> None:
    """In the local directory, also when nothing runs."""
    down, storage = Down(tmp_path), Places()
    manager = make(mirror=down.path)
    for step in (1, 2):
        save(manager, step)
    manager.close()
    listed = gather(storage, str(tmp_path / "here")).mirror
    assert listed is not None
    assert (listed.place, listed.lacks) == (str(down.path), 2)
    assert "ot a directory" in listed.problem
    again = make(mirror=down.path)
    with pytest.raises(WaitTimeoutError):
        again.wait(2, tier="mirror")
    assert gather(storage, str(tmp_path / "here")).mirror == listed  # it is down since then
    down.up()
    again.wait(60, tier="mirror")
    listed = gather(storage, str(tmp_path / "here")).mirror
    assert listed is not None
    assert (listed.lacks, listed.problem) == (0, "")
    assert steps(again) == [1, 2]
    assert not gather(storage, str(tmp_path / "here")).not_of_this_run


@only_to_a_directory
def test_the_note_brings_no_removed_directory_back(make: Make, tmp_path: Path) -> None:
    manager = make()
    save(manager, 1)
    manager.wait(60, tier="mirror")
    note = NoteWriter(Places(), str(tmp_path / "here"), "s3://bucket/run")
    shutil.rmtree(tmp_path / "here")
    note.tell(Mirrored(7), None)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("mirror", "mirrored", "problem", "is_since_then", "standing"),
    [
        ("s3://bucket/run", Mirrored(7, frozenset({5})), "no route", True, Mirrored(7, frozenset({5}))),
        ("s3://bucket/run", Mirrored(9, frozenset({5})), "no route", True, Mirrored(9, frozenset({5}))),
        ("s3://bucket/run", Mirrored(), "no route", True, Mirrored(7, frozenset({5}))),  # nothing is known by now
        ("s3://bucket/run", Mirrored(), "no disk", False, Mirrored(7, frozenset({5}))),
        ("s3://bucket/run", Mirrored(7), "", False, Mirrored(7)),
        ("s3://bucket/other", Mirrored(), "no route", False, Mirrored()),  # another mirror
    ],
)
def test_the_note_goes_on_with_what_it_said(
    mirror: str, mirrored: Mirrored, problem: str, is_since_then: bool, standing: Mirrored, tmp_path: Path
) -> None:
    """In an earlier run: how far the mirror is, and since when the same problem keeps it behind."""
    then = "2026-01-02T03:04:05+00:00"
    note = {"mirror": "s3://bucket/run", "mirrored": 7, "lacking": [5], "problem": "no route", "since": then}
    path = tmp_path / MIRROR_NOTE_NAME
    path.write_text(json.dumps(note))
    earlier, file = read_note(Places(), str(tmp_path)), path.stat().st_ino
    (tmp_path / REGISTRY_NAME).touch()
    NoteWriter(Places(), str(tmp_path), mirror).tell(mirrored, OSError(problem) if problem else None)
    told = read_note(Places(), str(tmp_path))
    assert told is not None
    assert (told.mirror, told.standing, told.problem) == (mirror, standing, problem)
    assert (told.since == then) is is_since_then
    assert (path.stat().st_ino == file) is (told == earlier)  # written only if something has changed


@pytest.mark.parametrize(
    ("mirrored", "told"),
    [
        (Mirrored(7), Mirrored(7)),
        (Mirrored(7, frozenset({2, 5})), Mirrored(7, frozenset({2, 5}))),
        (Mirrored(9000, frozenset(range(3, 9001, 2))), Mirrored(2)),  # too many to be told
    ],
)
def test_the_note_tells_what_is_lacking(mirrored: Mirrored, told: Mirrored, tmp_path: Path) -> None:
    (tmp_path / REGISTRY_NAME).touch()
    NoteWriter(Places(), str(tmp_path), "s3://bucket/run").tell(mirrored, None)
    note = read_note(Places(), str(tmp_path))
    assert note is not None
    assert note.standing == told


def test_the_note_of_long_texts_can_be_read(tmp_path: Path) -> None:
    """They come from elsewhere."""
    (tmp_path / REGISTRY_NAME).touch()
    NoteWriter(Places(), str(tmp_path), f"s3://{'x' * 9000}").tell(Mirrored(7), OSError("\x1b" * 9000))
    note = read_note(Places(), str(tmp_path))
    assert note is not None
    assert note.standing == Mirrored(7)


@only_to_a_directory
def test_closing_does_not_wait_for_a_mirror_that_is_down(make: Make, tmp_path: Path) -> None:
    down = Down(tmp_path)
    manager = make(mirror=down.path)
    save(manager, 1)
    manager.close()
    assert steps(manager) == [1]


@only_to_a_directory
def test_a_forked_child_waits_for_nothing(
    make: Make, reader: CheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it complain; whose mirror it is goes on."""
    manager = make()
    save(manager, 1)
    manager.wait(60, tier="mirror")
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        manager.close()
        os._exit(8 if "mirror" in caplog.text else 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    save(manager, 2)
    manager.wait(60, tier="mirror")
    assert steps(reader) == [1, 2]


@pytest.mark.parametrize("kind", ["to a directory", "to a directory, by a thread"])
def test_the_end_of_a_with_block_closes_the_mirror(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose place is free then. To close it once more changes nothing."""
    with make() as manager:
        handle = save(manager, 1)
    assert not Places().is_locked(str(tmp_path / "there"))
    assert arrival(handle, 0).global_step == 1
    manager.close()
    assert "mirror" not in caplog.text


@only_to_a_directory
def test_closing_tries_once_more(make: Make, tmp_path: Path) -> None:
    """A mirror that was down when it was tried last, and is up by now, gets everything."""
    down = Down(tmp_path)
    failed = threading.Event()
    manager = make(mirror=down.path, on_event=when_copying_fails(failed.set))
    handle = save(manager, 1)
    assert failed.wait(60)
    down.up()
    manager.close()
    assert arrival(handle, 0).global_step == 1
    with CheckpointManager(down.path) as reader:
        assert steps(reader) == [1]


@pytest.mark.parametrize("kind", ["to a directory, by a thread"])
def test_closing_does_not_wait_for_the_next_attempt(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be a minute away."""
    monkeypatch.setattr(replicator, "_FIRST_PAUSE_SECS", 3600.0)
    monkeypatch.setattr(replicator, "_MAX_PAUSE_SECS", 3600.0)
    down = Down(tmp_path)
    failed = threading.Event()
    manager = make(mirror=down.path, on_event=when_copying_fails(failed.set))
    handle = save(manager, 1)
    assert failed.wait(60)
    down.up()
    manager.close(60)
    assert arrival(handle, 0).global_step == 1


@only_to_a_directory
def test_closing_ends_waiting(make: Make, tmp_path: Path) -> None:
    """For a mirror that is down, in another thread."""
    manager = make(mirror=Down(tmp_path).path)
    save(manager, 1)
    assert manager._mirror is not None
    mirror, waited = manager._mirror.running(), list[bool]()
    waiting = threading.Thread(target=lambda: waited.append(mirror.wait(None)), daemon=True)
    waiting.start()
    manager.close()
    waiting.join(60)
    assert waited == [False]


@only_to_a_directory
def test_what_is_not_mirrored_when_it_is_closed_never_is(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever waits for that is told, and whoever reads the log."""
    manager = make(mirror=Down(tmp_path).path)
    handle = save(manager, 1)
    manager.close()
    assert handle.mirrored is not None
    with pytest.raises(asyncckpt.CheckpointError, match=r"not mirrored before the end: .*[Nn]ot a directory"):
        handle.mirrored.result(0)
    assert re.search(r"the mirror lacks some checkpoints: .*[Nn]ot a directory", caplog.text)


def test_a_manager_that_is_dropped(make: Make, kind: str, there: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Without being closed, as in a notebook: what it saved comes to the mirror, whose place is free then."""
    place, options = there
    writer: WriterKind = "thread" if kind.endswith("thread") else "auto"
    manager = CheckpointManager(tmp_path / "here", mirror=place, writer=writer, **options)
    handle = save(manager, 1)
    del manager
    assert arrival(handle).global_step == 1
    wait_for(lambda: not Places(options.get("storage_options")).is_locked(place))
    again = make()
    save(again, 2)
    again.wait(60, tier="mirror")
    wait_for(
        lambda: (
            sum(thread.name in ("asyncckpt-mirror", "asyncckpt-replicator") for thread in threading.enumerate()) == 1
        )
    )


@only_to_a_directory
def test_nothing_here_and_the_mirror_does_not_answer(make: Make, tmp_path: Path) -> None:
    """To start from scratch then would be a surprise."""
    down = Down(tmp_path)
    with pytest.raises(OSError, match=r"[Nn]ot a directory"):
        make(mirror=down.path).load_latest(Filled())
    down.up()
    assert make(mirror=down.path).load_latest(Filled()) == (0, {})


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mirror that this process is never answered by."""
    place, ended, read = tmp_path / "silent", threading.Event(), CheckpointDirectory.read

    def read_silently(directory: CheckpointDirectory) -> Survey:
        if directory.path == str(place):
            assert ended.wait(60)
        return read(directory)

    monkeypatch.setattr(CheckpointDirectory, "read", read_silently)
    yield place
    ended.set()


@only_to_a_directory
def test_the_first_save_asks_no_mirror(
    make: Make, silent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When there is something here, the run is known."""
    monkeypatch.setattr(mirror_tier, "_MAX_LOOK_SECS", 0.1)
    first = make(mirror=None)
    save(first, 1).result(60)
    first.close(60)
    second = make(mirror=silent, stall_timeout_secs=300.0)
    save(second, 2).result(60)
    assert "can't be looked at" not in caplog.text
    assert steps(second) == [1, 2]
    second.wait(60, tier="mirror")


@only_to_a_directory
def test_the_first_save_on_an_empty_disk_does_not_wait_for_a_silent_mirror(
    make: Make, silent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """For long; that a new run begins is said loudly, and once, also when its directory is removed under it."""
    monkeypatch.setattr(mirror_tier, "_MAX_LOOK_SECS", 0.1)
    said = threading.Event()
    manager = make(
        mirror=silent,
        stall_timeout_secs=300.0,
        on_event=lambda event: said.set() if "new run begins" in event.detail else None,
    )
    save(manager, 1).result(60)
    assert "a NEW run begins" in caplog.text
    assert said.wait(60)
    save(manager, 2).result(60)
    shutil.rmtree(tmp_path / "here")
    save(manager, 3).result(60)
    assert caplog.text.count("a NEW run begins") == 1


@only_to_a_directory
def test_a_mirror_that_is_down_just_at_the_first_save(make: Make, reader: CheckpointManager, tmp_path: Path) -> None:
    """On a new disk: what was loaded from the mirror says which run it is."""
    first = make()
    for step in (1, 2, 3):
        save(first, step)
    first.close(60)
    shutil.rmtree(tmp_path / "here")
    second, model = make(), Filled()
    second.load_latest(model)
    assert model.number == 3
    (tmp_path / "there").rename(tmp_path / "away")
    (tmp_path / "there").write_text("in the way")
    save(second, 4).result(60)
    (tmp_path / "there").unlink()
    (tmp_path / "away").rename(tmp_path / "there")
    second.wait(60, tier="mirror")
    assert steps(reader) == [3, 4]
    assert [info.sequence for info in second.list_checkpoints()] == [4]


@only_to_a_directory
def test_waiting_before_the_first_save(make: Make, reader: CheckpointManager) -> None:
    """Brings what earlier runs have saved."""
    first = make(mirror=None)
    save(first, 1)
    first.close(60)
    make().wait(60, tier="mirror")
    assert steps(reader) == [1]


@only_to_a_directory
def test_waiting_with_nothing_saved(make: Make, reader: CheckpointManager, tmp_path: Path) -> None:
    """Makes no mirror, which would be one of no run."""
    manager = make()
    manager.wait(60, tier="mirror")
    assert not (tmp_path / "there").exists()
    save(manager, 1)
    manager.wait(60, tier="mirror")
    assert steps(reader) == [1]


@only_to_a_directory
def test_pruning_goes_by_what_the_mirror_has_now(make: Make, reader: CheckpointManager, tmp_path: Path) -> None:
    """Not by what it had at the last save; nor is everything kept, because nothing has been heard of it yet."""
    manager = make(max_checkpoints=5)
    for step in range(1, 6):
        save(manager, step)
    manager.wait(60, tier="mirror")
    (tmp_path / "there").rename(tmp_path / "away")  # it does not matter whether it answers just now
    assert [info.global_step for info in manager.prune(KeepLast(3), dry_run=True)] == [1, 2]
    (tmp_path / "away").rename(tmp_path / "there")
    assert [info.global_step for info in manager.prune(KeepLast(3))] == [1, 2]
    manager.close(60)
    again = make(max_checkpoints=5)
    assert [info.global_step for info in again.prune(KeepLast(1), dry_run=True)] == [3, 4]
    pid = stop_copying(again)
    try:
        assert [info.global_step for info in again.prune(KeepLast(1), dry_run=True)] == [3, 4]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert [info.global_step for info in again.prune(KeepLast(1))] == [3, 4]
    assert steps(reader) == [1, 2, 3, 4, 5]


@only_to_a_directory
@pytest.mark.parametrize(("mirror_retention", "dropped"), [(KeepLast(9), [1]), (KeepLast(1), [1, 2])])
def test_pruning_keeps_what_is_still_to_be_mirrored(
    make: Make, mirror_retention: RetentionPolicy, dropped: list[int]
) -> None:
    """And not what the mirror would delete at once."""
    first = make()
    save(first, 1)
    first.close(60)
    alone = make(mirror=None, max_checkpoints=3)
    for step in (2, 3):
        save(alone, step)
    alone.close(60)
    manager = make(mirror_retention=mirror_retention)
    assert [info.global_step for info in manager.prune(KeepLast(1), dry_run=True)] == dropped


@only_to_a_directory
@pytest.mark.parametrize("is_down", [True, False], ids=["down", "another run's"])
def test_pruning_when_the_mirror_has_nothing_to_say(make: Make, is_down: bool, tmp_path: Path) -> None:
    """Of this run: nothing is known to be there."""
    saved_without_mirror(make, 1, 2, 3)
    mirror = Down(tmp_path).path if is_down else tmp_path / "other"
    if not is_down:
        other = make(mirror, mirror=None, max_checkpoints=3)
        for step in (1, 2, 3):
            save(other, step)
        other.close(60)
    manager = make(mirror=mirror)
    assert manager.prune(KeepLast(1), dry_run=True) == []
    assert manager.prune(KeepLast(1)) == []
    assert steps(manager) == [1, 2, 3]


@only_to_a_directory
def test_the_same_directory_by_another_name(make: Make, tmp_path: Path) -> None:
    """Would be its own mirror, and nobody's writer."""
    (tmp_path / "link").symlink_to(tmp_path / "here")
    with pytest.raises(ValueError, match="another place"):
        make(mirror=tmp_path / "link")
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="another place"):
        make(mirror=tmp_path / "link")


@only_to_a_directory
def test_a_checkpoint_that_is_mirrored_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the thread that saves has done anything more."""
    manager = make()
    save_listed = manager._saver.save_listed

    def save_slowly(*arguments: Any, **options: Any) -> asyncckpt.SaveHandle:
        handle = save_listed(*arguments, **options)
        handle.result(60)
        assert manager._mirror is not None
        assert manager._mirror.running().wait(60)
        return handle

    monkeypatch.setattr(manager._saver, "save_listed", save_slowly)
    for step in (1, 2):
        handle = save(manager, step)
        assert arrival(handle).global_step == step


@pytest.mark.parametrize("kind", ["to a directory", "to a directory, by a thread"])
def test_a_signal_handler_saves_in_the_middle_of_a_save(
    make: Make, reader: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has the lower number then, and is committed later: both come to the mirror, and neither counts as lost."""
    manager = make(max_checkpoints=1, mirror_retention=KeepLast(9))
    save(manager, 1)
    manager.wait(60, tier="mirror")
    save_listed = manager._saver.save_listed
    assert manager._mirror is not None
    mirror = manager._mirror.running()
    handles: list[asyncckpt.SaveHandle] = []

    def interrupted(*arguments: Any, **options: Any) -> asyncckpt.SaveHandle:
        monkeypatch.setattr(manager._saver, "save_listed", save_listed)
        for step in (3, 4):
            handles.append(save(manager, step))
            assert arrival(handles[-1]).sequence == step
            assert mirror.wait(60)
        return save_listed(*arguments, **options)

    monkeypatch.setattr(manager._saver, "save_listed", interrupted)
    handles.append(save(manager, 2))
    manager.wait(60, tier="mirror")
    assert arrival(handles[-1]).sequence == 2
    assert steps(reader) == [1, 2, 3, 4]


@pytest.mark.parametrize(("here", "there"), [("gs", "gcs"), ("abfs", "az"), ("abfs", "abfss"), ("ssh", "sftp")])
def test_the_same_place_by_another_scheme(here: str, there: str) -> None:
    with pytest.raises(ValueError, match="another place"):
        CheckpointManager(f"{here}://bucket/run", mirror=f"{there}://bucket/run")


@only_to_a_directory
def test_the_same_step_saved_again_while_the_mirror_is_down(make: Make, tmp_path: Path) -> None:
    """As by a periodic save and the last one: the first is replaced, and no loss."""
    down = Down(tmp_path)
    manager = make(mirror=down.path)
    handles = [save(manager, 1), save(manager, 1)]
    manager.wait(60)
    down.up()
    manager.wait(60, tier="mirror")
    assert handles[0].mirrored is not None
    assert handles[0].mirrored.result(60) is None
    assert arrival(handles[1]).sequence == 2


@only_by_processes
def test_a_slow_callback_of_the_mirror(make: Make) -> None:
    """Holds up callbacks alone."""
    ended, begun = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        begun.set()
        ended.wait(60)

    manager = make()
    handle = save(manager, 1)
    assert handle.mirrored is not None
    handle.mirrored.add_done_callback(wait)
    assert begun.wait(60)
    assert arrival(save(manager, 2)).global_step == 2
    manager.wait(60, tier="mirror")
    ended.set()


@pytest.mark.parametrize("kind", ["to a directory", "to a directory, by a thread"])
def test_closing_when_the_newest_cannot_be_copied(
    make: Make, reader: CheckpointManager, there: tuple[str, dict[str, Any]]
) -> None:
    """The others come there all the same."""
    files = saved_without_mirror(make, 1, 2, 3)
    (Path(there[0]) / files[-1].name).mkdir(parents=True)
    manager = make(max_checkpoints=3)
    manager.unpin(1)  # so that the mirror is started
    manager.close(60)
    assert steps(reader) == [1, 2]


@only_to_a_directory
def test_a_save_that_is_skipped_is_not_awaited(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it one that never came to the mirror."""
    manager = make(when_full="skip")
    save(manager, 1)
    manager.wait(60)
    with monkeypatch.context() as full:
        full.setattr(manager._saver._admission, "enter", lambda: None)
        handle = save(manager, 2)
    assert handle.skipped
    assert handle.mirrored is None
    save(manager, 3)
    manager.wait(60, tier="mirror")


@pytest.mark.parametrize("kind", ["to a directory, by a thread"])
def test_a_save_that_failed_here(make: Make, reader: CheckpointManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never comes to the mirror, by the same error; and is no loss of the mirror's."""
    manager = make()
    save(manager, 1)
    manager.wait(60, tier="mirror")

    def refuse(*arguments: object) -> CheckpointInfo:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(manager._directory, "record", refuse)
        handle = save(manager, 2)
        with pytest.raises(asyncckpt.CheckpointWriteError):
            handle.result(60)
    assert handle.mirrored is not None
    assert handle.mirrored.exception(60) is handle.failure()
    save(manager, 3)
    manager.wait(60, tier="mirror")
    assert steps(reader) == [1, 3]


@only_to_a_directory
def test_a_slow_callback_does_not_hold_up_the_mirror(make: Make) -> None:
    """It is told by the thread that has made the checkpoint durable."""
    ended, begun = threading.Event(), threading.Event()

    def on_success(info: CheckpointInfo) -> None:
        begun.set()
        assert ended.wait(60)

    manager = make(on_success=on_success)
    try:
        save(manager, 1)
        assert begun.wait(60)
        manager.wait(60, tier="mirror")
        handle = save(manager, 2)
        assert arrival(handle, 20).global_step == 2
    finally:
        ended.set()


@only_to_a_directory
def test_what_makes_no_sense(make: Make, tmp_path: Path) -> None:
    manager = make(mirror=None)
    with pytest.raises(ValueError, match="has no mirror"):
        manager.wait(tier="mirror")
    with pytest.raises(ValueError, match="tier must be"):
        manager.wait(tier="moon")  # type: ignore[arg-type]
    for place in (tmp_path / "here", "s3://bucket/run"):
        with pytest.raises(ValueError, match="another place"):
            make(place, mirror=place)


@only_to_a_directory
@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"retention": 5}, TypeError),
        ({"mirror_retention": 5}, TypeError),
        ({"mirror_backlog_bytes": "64GB"}, TypeError),
        ({"mirror_backlog_bytes": True}, TypeError),
        ({"mirror_backlog_bytes": -1}, ValueError),
        ({"mirror_backlog_bytes": 2**70}, ValueError),
        ({"mirror_storage_options": "s3"}, TypeError),
    ],
)
def test_mistakes_are_found_at_once(make: Make, option: dict[str, Any], error: type[Exception]) -> None:
    """And not by a process in the background, after hours."""
    (name,) = option
    with pytest.raises(error, match=name):
        make(**option)


class WantsAccuracy(RetentionPolicy):
    """Made by a user who forgot that there are checkpoints without."""

    def kept(self, checkpoints: Sequence[CheckpointInfo]) -> frozenset[int]:
        return frozenset(info.sequence or 0 for info in checkpoints if info.val_metrics["accuracy"] > 0.5)


@only_to_a_directory
def test_a_policy_that_fails_is_a_problem_of_the_mirror(make: Make) -> None:
    """Nobody waits for it for ever."""
    failed = threading.Event()
    manager = make(
        mirror_retention=WantsAccuracy(),
        on_event=when_copying_fails(failed.set),
    )
    save(manager, 1).result(60)
    assert failed.wait(60)
    with pytest.raises(WaitTimeoutError, match="KeyError: 'accuracy'"):
        manager.wait(0.1, tier="mirror")
    manager.close()
    assert steps(manager) == [1]


@pytest.mark.parametrize("kind", ["to a directory", "to a directory, by a thread"])
def test_one_that_an_earlier_process_has_brought(
    make: Make, reader: CheckpointManager, there: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Which still copies when the trainer is started again: the new one's checkpoint is mirrored, and no loss."""
    saved_without_mirror(make, 1)
    source = CheckpointDirectory(str(tmp_path / "here"), Places())
    earlier = Replica(source, CheckpointDirectory(there[0], Places(), retention=KeepLast(9)))
    earlier.look(without=())
    manager = make()
    handle = save(manager, 2)
    handle.result(60)
    for info in earlier.look(without=()).wanted:
        earlier.copy(info)
    earlier.close()
    manager.wait(60, tier="mirror")
    assert steps(reader) == [1, 2]
    assert arrival(handle).global_step == 2


# --- the process that copies ---


@only_by_processes
def test_the_trainer_is_killed(there: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """What was durable locally comes to the mirror all the same, whose place is free then."""
    place, options = there
    source = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
import asyncckpt, torch
from torch import nn
manager = asyncckpt.CheckpointManager({str(tmp_path / "here")!r}, 5, mirror={place!r}, **{options!r})
for step in range(1, 4):
    manager.save(nn.Linear(2000, 200), None, 1, step)
manager.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == -signal.SIGKILL
    with CheckpointManager(place, **options) as reader:
        wait_for(lambda: steps(reader) == [1, 2, 3])
        assert all(report.ok for report in reader.verify())
    wait_for(lambda: not Places(options.get("storage_options")).is_locked(place))


@only_by_processes
def test_the_trainer_is_killed_right_after_staging(there: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """The writer process commits what was staged, and the mirror's process waits for that, and brings it there."""
    place, options = there
    source = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
import asyncckpt, torch
from torch import nn
manager = asyncckpt.CheckpointManager({str(tmp_path / "here")!r}, 5, mirror={place!r}, writer="process", **{options!r})
manager.save(nn.Linear(2000, 200), None, 1, 1)
manager.wait(tier="mirror")
for step in (2, 3):
    manager.save(nn.Linear(2000, 2000), None, 1, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == -signal.SIGKILL
    with CheckpointManager(place, **options) as reader:
        wait_for(lambda: steps(reader) == [1, 2, 3])


def stop_copying(manager: CheckpointManager) -> int:
    """Let the mirror's process hear, and do, nothing for a while; its id."""
    assert manager._mirror is not None
    copier = manager._mirror.running()._copier
    assert isinstance(copier, ProcessCopier)
    pid = copier.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    return pid


@only_to_a_directory
def test_there_is_no_time_to_close(make: Make, reader: CheckpointManager) -> None:
    """The time-out counts once, and the process goes on alone."""
    manager = make(max_checkpoints=9)
    save(manager, 1)
    manager.wait(60, tier="mirror")
    pid = stop_copying(manager)
    try:
        handles = [save(manager, step) for step in range(2, 7)]
        started = time.monotonic()
        manager.close(4)
        assert time.monotonic() - started < 7
        for handle in handles:
            assert handle.mirrored is not None
            with pytest.raises(asyncckpt.CheckpointError, match="not mirrored before the end"):
                handle.mirrored.result(0)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: steps(reader) == [1, 2, 3, 4, 5, 6])
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))


@pytest.mark.parametrize("kind", ["to a directory", "to a directory, by a thread"])
def test_what_becomes_durable_after_closing(make: Make, reader: CheckpointManager) -> None:
    """There was no time to wait for the disk: it still comes to the mirror, since nobody is let go before."""
    manager = make()
    save(manager, 1)
    manager.wait(60, tier="mirror")
    assert manager._mirror is not None
    copier = manager._mirror.running()._copier
    with disk_held() as gate:
        handle = save(manager, 2)
        with pytest.raises(WaitTimeoutError):
            manager.close(0.1)
        if isinstance(copier, ThreadCopier):
            assert not copier._replicator.join(1)
        gate.set()
        handle.result(60)
    wait_for(lambda: steps(reader) == [1, 2])
    if isinstance(copier, ProcessCopier) and copier.pid is not None:
        os.kill(copier.pid, signal.SIGKILL)  # it would wait for the end of this process for some seconds


@pytest.mark.parametrize("kind", ["to a directory", "to a directory, by a thread"])
def test_waiting_after_the_end(make: Make, tmp_path: Path) -> None:
    """Nothing is lacking; or nothing more will come."""
    manager = make()
    save(manager, 1)
    manager.close(60)
    manager.wait(60, tier="mirror")
    down = Down(tmp_path)
    manager = make(tmp_path / "other", mirror=down.path)
    save(manager, 1)
    manager.close(60)
    with pytest.raises(WaitTimeoutError, match="does not have everything yet"):
        manager.wait(60, tier="mirror")


@pytest.mark.parametrize("kind", ["to a directory", "to a directory, by a thread"])
def test_a_callback_that_waits_for_the_mirror(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the manager is being closed it is told that it would wait for itself."""
    told, closing, close = list[Exception](), threading.Event(), mirror_service.Mirror.close

    def note_closing(mirror: mirror_service.Mirror, *arguments: Any) -> bool:
        closing.set()
        return close(mirror, *arguments)

    def wait(_: object) -> None:
        try:
            manager.wait(10, tier="mirror")
        except Exception as error:
            told.append(error)

    copied = mirror_service.Standing.copied

    def hear_late(*arguments: Any) -> None:
        assert closing.wait(60)
        copied(*arguments)

    monkeypatch.setattr(mirror_service.Mirror, "close", note_closing)
    monkeypatch.setattr(mirror_service.Standing, "copied", hear_late)
    manager = make()
    handle = save(manager, 1)
    assert handle.mirrored is not None
    handle.mirrored.add_done_callback(wait)
    manager.close(60)
    assert [type(error) for error in told] == [RuntimeError]


@pytest.mark.parametrize("kind", ["to S3"])
def test_from_one_bucket_to_another(there: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """In parts, as what is larger than one."""
    place, options = there
    model = nn.Linear(2300, 2300)
    with CheckpointManager(f"{place}-source", mirror=place, save_rng=False, **options) as manager:
        manager.save(model, None, 1, 1)
        manager.wait(120, tier="mirror")
    with CheckpointManager(place, **options) as reader:
        assert all(report.ok for report in reader.verify())
        assert steps(reader) == [1]


@pytest.mark.parametrize("kind", ["to a directory", "to a directory, by a thread"])
def test_somebody_elses_best_link_there(make: Make, reader: CheckpointManager, tmp_path: Path) -> None:
    """Nothing is lost: it is said, and once the file is moved away all is as it should be."""
    link = tmp_path / "there" / "best_model.pt"
    link.parent.mkdir()
    torch.save({}, link)
    problems = threading.Event()
    manager = make(on_event=when_copying_fails(problems.set))
    handles = [save(manager, 1, 0.5)]
    assert problems.wait(60)
    handles += [save(manager, step, 1 / (step + 2)) for step in (2, 3)]
    link.unlink()
    manager.wait(60, tier="mirror")
    assert arrival(handles[-1]).global_step == 3
    assert steps(reader) == [2, 3]
    assert all(handle.mirrored is not None and handle.mirrored.exception(60) is None for handle in handles)


@only_to_a_directory
def test_leaving_what_is_lacking_to_the_process(make: Make, reader: CheckpointManager) -> None:
    """As when the grace period of a job that is ended is over: nothing waits for the mirror any more."""
    manager = make()
    save(manager, 1)
    manager.wait(60, tier="mirror")
    pid = stop_copying(manager)
    try:
        save(manager, 2).result(60)
        manager.leave_to_writer()
        with pytest.raises(WaitTimeoutError, match="does not have everything yet"):
            manager.wait(tier="mirror")
        manager.close()
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: steps(reader) == [1, 2])
    os.kill(pid, signal.SIGKILL)  # it would wait for the end of this process for some seconds


@pytest.mark.parametrize("kind", ["to a directory, by a thread"])
def test_there_is_no_process_to_leave_it_to(make: Make, reader: CheckpointManager) -> None:
    """So nothing changes."""
    manager = make()
    manager.leave_to_writer()
    save(manager, 1)
    manager.leave_to_writer()
    manager.wait(60, tier="mirror")
    assert steps(reader) == [1]


@only_to_a_directory
def test_pokes_never_wait(make: Make, reader: CheckpointManager) -> None:
    """Not even for a process that hears nothing, as often as somebody looks whether the mirror has everything."""
    manager = make()
    save(manager, 1)
    manager.wait(60, tier="mirror")
    pid = stop_copying(manager)
    assert manager._mirror is not None
    mirror = manager._mirror.running()
    poking = threading.Thread(target=lambda: [mirror.poke() for _ in range(20_000)], daemon=True)
    poking.start()
    try:
        poking.join(30)
        assert not poking.is_alive()
    finally:
        os.kill(pid, signal.SIGCONT)
    save(manager, 2)
    manager.wait(60, tier="mirror")
    assert steps(reader) == [1, 2]


@only_to_a_directory
def test_the_interpreter_waits_for_a_thread_that_copies(reader: CheckpointManager, tmp_path: Path) -> None:
    """As for saves that are in flight, since nobody else will bring them there."""
    source = f"""
import sys, time
sys.path[:0] = {sys.path!r}
import asyncckpt, torch
from asyncckpt.registry.replication import Replica
from torch import nn
copy = Replica.copy
Replica.copy = lambda *arguments: (time.sleep(0.3), copy(*arguments))[1]
manager = asyncckpt.CheckpointManager({str(tmp_path / "here")!r}, mirror={str(tmp_path / "there")!r}, writer="thread")
for step in range(1, 4):
    manager.save(nn.Linear(20, 20), None, 1, step)
"""
    subprocess.run([sys.executable, "-c", source], check=True)
    assert steps(reader) == [1, 2, 3]


@pytest.mark.parametrize(
    ("is_down", "exit_timeout_secs"), [(True, 3600.0), (False, 0.1)], ids=["that is down", "that takes its time"]
)
def test_the_interpreter_does_not_wait_for_a_mirror(is_down: bool, exit_timeout_secs: float, tmp_path: Path) -> None:
    """What it lacks is told of."""
    place = Down(tmp_path).path if is_down else tmp_path / "there"
    source = f"""
import sys, time
sys.path[:0] = {sys.path!r}
import asyncckpt
from asyncckpt.registry.replication import Replica
from torch import nn
Replica.copy = lambda *arguments: time.sleep(3600)
manager = asyncckpt.CheckpointManager(
    {str(tmp_path / "here")!r}, mirror={str(place)!r}, writer="thread", exit_timeout_secs={exit_timeout_secs}
)
manager.save(nn.Linear(20, 20), None, 1, 1)
"""
    ended = subprocess.run([sys.executable, "-c", source], check=True, timeout=60, capture_output=True, text=True)
    assert "at exit: the mirror lacks some checkpoints" in ended.stderr


def refuse_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: str) -> WriterProcess:
        raise OSError("no more processes")

    monkeypatch.setattr(mirror_service, "WriterProcess", refuse)


@only_to_a_directory
def test_no_process_can_be_started(
    make: Make, reader: CheckpointManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread copies in its place, which is said."""
    refuse_processes(monkeypatch)
    manager = make()
    save(manager, 1)
    manager.wait(60, tier="mirror")
    assert steps(reader) == [1]
    assert "no more processes: a thread copies to the mirror" in caplog.text


def test_a_mirror_that_no_other_process_finds(tmp_path: Path) -> None:
    """A thread copies there."""
    place = f"memory://{secrets.token_hex(4)}"
    with CheckpointManager(tmp_path / "here", mirror=place) as manager:
        save(manager, 1)
        manager.wait(60, tier="mirror")
    with CheckpointManager(place) as reader:
        assert steps(reader) == [1]


@only_to_a_directory
def test_the_process_is_killed_and_no_other_can_be_started(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever for what it does not bring."""
    monkeypatch.setattr(mirror_service, "_FIRST_PAUSE_SECS", 0.01)
    monkeypatch.setattr(mirror_service, "_MAX_PAUSE_SECS", 0.01)
    manager = make()
    save(manager, 1)
    manager.wait(60, tier="mirror")
    assert manager._mirror is not None
    copier = manager._mirror.running()._copier
    assert isinstance(copier, ProcessCopier)
    assert copier.pid is not None
    refuse_processes(monkeypatch)
    os.kill(copier.pid, signal.SIGKILL)
    handle = save(manager, 2)
    manager.close()
    assert handle.mirrored is not None
    with pytest.raises(asyncckpt.CheckpointError, match="before the end: no more processes"):
        handle.mirrored.result(0)


@only_to_a_directory
def test_a_process_that_never_comes_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts, and dies: that is said, and nobody waits for ever."""
    monkeypatch.setattr(mirror_service, "_FIRST_PAUSE_SECS", 0.01)
    monkeypatch.setattr(mirror_service, "_MAX_PAUSE_SECS", 0.01)
    monkeypatch.setattr(mirror_service, "MIRROR_MODULE", "asyncckpt.no_such_module")
    manager = make()
    handle = save(manager, 1)
    manager.close(60)
    assert handle.mirrored is not None
    with pytest.raises(asyncckpt.CheckpointError, match=r"before the end: the mirror's process \d+ "):
        handle.mirrored.result(0)


@only_to_a_directory
def test_what_the_process_says_is_not_understood(
    make: Make, reader: CheckpointManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is in the log, and another one takes its place."""
    decode, refused = messages.decode_from_mirror, list[bytes]()

    def decode_all_but_one(body: bytes) -> messages.FromMirror:
        if not refused:
            refused.append(body)
            raise ValueError("of another version")
        return decode(body)

    monkeypatch.setattr(messages, "decode_from_mirror", decode_all_but_one)
    manager = make()
    save(manager, 1)
    wait_for(lambda: refused)
    save(manager, 2)
    manager.wait(60, tier="mirror")
    assert steps(reader) == [1, 2]
    assert "of another version" in caplog.text


@only_to_a_directory
def test_the_process_is_killed(make: Make, reader: CheckpointManager, tmp_path: Path) -> None:
    """Another one takes its place."""
    manager = make(max_checkpoints=5)
    save(manager, 1)
    manager.wait(60, tier="mirror")
    for step in (2, 3):
        assert manager._mirror is not None
        copier = manager._mirror.running()._copier
        assert isinstance(copier, ProcessCopier)
        before = copier.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        save(manager, step)
        manager.wait(60, tier="mirror")
        assert copier.pid != before
    assert steps(reader) == [1, 2, 3]
    assert steps(manager) == [1, 2, 3]
