"""The thread that copies: what it brings when it is poked, what it tells of it, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from registry.test_takeover import Writer, refusing_registries

from asyncckpt import CheckpointInfo, CheckpointWriteError, KeepLast, StorageBusyError
from asyncckpt.events import EventKind
from asyncckpt.naming import checkpoint_name
from asyncckpt.registry.backlog import Mirrored
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.files import NameTakenError
from asyncckpt.registry.mirror_note import NoteWriter
from asyncckpt.registry.replication import Replica
from asyncckpt.service import replicator
from asyncckpt.service.messages import describe_error, rebuild_error
from asyncckpt.service.replicator import Replicator
from asyncckpt.storage.local import LocalStorage
from service.disk import wait_for


class Heard:
    """What a replicator has told. `on_copied` is called on its thread."""

    def __init__(self) -> None:
        self.on_copied: Callable[[int], object] = lambda sequence: None
        self.copies: list[int] = []
        self.passed: list[int] = []
        self.losses: dict[int, str] = {}
        self.events: list[EventKind] = []
        self.num_failures = 0
        self.caught_up_with = 0
        self.has_ended = False

    def emit(self, kind: EventKind, path: str, detail: str) -> None:
        self.events.append(kind)

    def copied(self, sequence: int, info: CheckpointInfo) -> None:
        self.copies.append(sequence)
        self.on_copied(sequence)

    def passed_over(self, sequence: int) -> None:
        self.passed.append(sequence)

    def given_up(self, sequence: int, error: Exception) -> None:
        self.losses[sequence] = str(error)

    def progress(self, mirrored: Mirrored, problem: Exception | None, caught_up_with: int, tried: int) -> None:
        self.num_failures += problem is not None
        self.caught_up_with = caught_up_with

    def ended(self) -> None:
        self.has_ended = True


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Writer]:
    (tmp_path / "scratch").mkdir()
    writer = Writer(LocalStorage(), str(tmp_path / "source"), tmp_path / "scratch")
    yield writer
    writer.close()


@pytest.fixture
def target(tmp_path: Path) -> CheckpointDirectory:
    return CheckpointDirectory(str(tmp_path / "mirror"), LocalStorage(), retention=KeepLast(9))


@pytest.fixture
def heard() -> Heard:
    return Heard()


Start = Callable[..., Replicator]


@pytest.fixture
def start(source: Writer, target: CheckpointDirectory, heard: Heard) -> Iterator[Start]:
    started: list[Replicator] = []

    def start(kind: type[Replica] = Replica) -> Replicator:
        note = NoteWriter(source.storage, source.url, target.path)
        started.append(Replicator(kind(source.directory, target), heard, note, nice=0))
        return started[-1]

    yield start
    for running in started:
        running.stop()
        assert running.join(60)


def test_what_is_saved_meanwhile(source: Writer, heard: Heard, start: Start) -> None:
    """All that there was at the poke is brought there; what comes later is another poke's."""
    for step in (1, 2, 3):
        source.save(step)
    heard.on_copied = lambda sequence: source.save({1: 4, 4: 5}[sequence]) if sequence in (1, 4) else None
    running = start()
    running.poke(1)
    wait_for(lambda: heard.caught_up_with == 1)
    assert heard.copies == [3, 1, 4, 2]
    running.poke(2)
    wait_for(lambda: heard.caught_up_with == 2)
    assert heard.copies == [3, 1, 4, 2, 5]


def test_finishing_brings_what_was_saved_before(source: Writer, heard: Heard, start: Start) -> None:
    """Also when it is asked to finish in the middle of bringing what was there before that."""
    source.save(1)
    running = start()

    def save_the_last_one(sequence: int) -> None:
        if sequence == 1:
            source.save(2)
            running.finish()

    heard.on_copied = save_the_last_one
    running.poke(1)
    assert running.join(60)
    assert heard.copies == [1, 2]
    assert heard.has_ended


def test_stopping_brings_nothing_more(source: Writer, target: CheckpointDirectory, heard: Heard, start: Start) -> None:
    """But what is being copied; and the place is free then."""
    for step in (1, 2, 3):
        source.save(step)
    running = start()
    heard.on_copied = lambda sequence: running.stop()
    running.poke(1)
    assert running.join(60)
    assert heard.copies == [3]
    assert heard.caught_up_with == 0
    assert not target.is_open


def test_a_hurry_waits_for_no_pause(
    source: Writer, target: CheckpointDirectory, heard: Heard, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each hurry is for one attempt."""
    monkeypatch.setattr(replicator, "_FIRST_PAUSE_SECS", 3600.0)
    monkeypatch.setattr(replicator, "_MAX_PAUSE_SECS", 3600.0)
    source.save(1)
    in_the_way = Path(target.path)
    in_the_way.touch()
    running = start()
    running.poke(1)
    wait_for(lambda: heard.num_failures == 1)
    running.poke(2, is_hurried=True)
    wait_for(lambda: heard.num_failures == 2)
    failures: list[int] = []
    heard.on_copied = lambda sequence: failures.append(heard.num_failures)
    in_the_way.unlink()
    running.poke(3, is_hurried=True)
    wait_for(lambda: heard.caught_up_with == 3)
    assert failures == [2]


def test_a_commit_that_seemed_to_fail(
    source: Writer, target: CheckpointDirectory, heard: Heard, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is there once it can be listed, and counts as mirrored. That, and what kept it waiting, is told once."""
    monkeypatch.setattr(replicator, "_FIRST_PAUSE_SECS", 0.01)
    monkeypatch.setattr(replicator, "_MAX_PAUSE_SECS", 0.01)
    source.save(1)
    running = start()
    with refusing_registries(target, monkeypatch, num_taken=0):
        running.poke(1)
        wait_for(lambda: heard.num_failures >= 3)
    wait_for(lambda: heard.caught_up_with == 1)
    running.poke(2)
    wait_for(lambda: heard.caught_up_with == 2)
    assert heard.copies == [1]
    assert heard.events == ["mirror_failed", "mirrored"]


def test_somebodys_file_in_the_mirror(source: Writer, target: CheckpointDirectory, heard: Heard, start: Start) -> None:
    """With a checkpoint's name: that one never comes there, the others do."""
    for step in (1, 2):
        source.save(step)
    theirs = Path(target.path) / checkpoint_name(1, 1, {})
    theirs.parent.mkdir()
    theirs.write_bytes(b"somebody's own")
    start().poke(1)
    wait_for(lambda: heard.caught_up_with == 1)
    assert heard.copies == [2]
    assert list(heard.losses) == [1]


@pytest.mark.parametrize("is_replaced", [True, False], ids=["saved again", "deleted"])
def test_one_that_goes_just_now(source: Writer, heard: Heard, start: Start, is_replaced: bool) -> None:
    """Of a checkpoint that is not there any more nothing is listed in the mirror."""

    class Late(Replica):
        def copy(self, info: CheckpointInfo) -> CheckpointInfo | None:
            if info.sequence == 1 and is_replaced:
                source.save(1)
            elif info.sequence == 1:
                Path(source.directory.path_of(str(info.filepath))).unlink()
            return super().copy(info)

    source.save(1)
    running = start(Late)
    for number in (1, 2):
        running.poke(number)
        wait_for(lambda number=number: heard.caught_up_with == number)  # type: ignore[misc]
    assert heard.copies == [2] * is_replaced
    assert heard.passed == [1] * is_replaced  # no loss: what was saved again is there
    assert heard.losses.keys() == (set() if is_replaced else {1})


def test_errors_keep_their_kind_on_the_way() -> None:
    """To the trainer, or the nearest kind that users know."""
    for error, kind in ((NameTakenError("a"), CheckpointWriteError), (StorageBusyError("b"), StorageBusyError)):
        told = rebuild_error(describe_error(error))
        assert type(told) is kind
        assert str(told) == str(error)
