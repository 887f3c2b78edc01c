"""What a saver and a manager promise, whoever writes: threads of the trainer, or its writer process."""

from __future__ import annotations

import concurrent.futures
import dis
import errno
import gc
import itertools
import json
import logging
import os
import random
import resource
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal

import pytest
import torch
from reliability.gates import SEED, count
from torch import nn

import asyncckpt
from asyncckpt import (
    AsyncCheckpointSaver,
    CheckpointInfo,
    CheckpointManager,
    CheckpointWriteError,
    CorruptCheckpointError,
    Event,
    KeepLast,
    SaveHandle,
    SaverClosedError,
    TornSnapshotError,
    WaitTimeoutError,
)
from asyncckpt.naming import is_temporary_name
from asyncckpt.registry.retention import RetentionPolicy
from asyncckpt.service.handover import Handover
from asyncckpt.service.ledger import Ledger
from asyncckpt.service.process_queue import ProcessQueue
from asyncckpt.service.queue import SaveQueue
from service.disk import Disk, wait_for


def state(number: int, num_floats: int = 1000) -> dict[str, Any]:
    return {"number": number, "weights": torch.full((num_floats,), float(number))}


def number_at(path: Path) -> int:
    """Which state is at the path; it must be whole."""
    report = asyncckpt.verify(path)
    assert report.ok, report.problems
    loaded = torch.load(path, weights_only=True)
    assert torch.all(loaded["weights"] == loaded["number"])
    return int(loaded["number"])


class Training:
    """A model all of whose weights are the number of the step."""

    def __init__(self) -> None:
        self.model = nn.Linear(50, 50, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.step = 0

    def advance(self) -> None:
        self.step += 1
        with torch.no_grad():
            self.model.weight.fill_(self.step)

    def save(self, manager: CheckpointManager, loss: float | None = None) -> SaveHandle:
        self.advance()
        handle = manager.save(self.model, self.optimizer, epoch=0, global_step=self.step, val_loss=loss)
        assert handle is not None
        return handle

    def load(self, manager: CheckpointManager) -> int:
        """The step that was restored; all weights must be its."""
        _, checkpoint = manager.load_latest(self.model, self.optimizer)
        step = int(checkpoint["global_step"])
        assert bool((self.model.weight == step).all())
        return step


class NewestTwo(RetentionPolicy):
    """A policy of the user's own, which is code."""

    def kept(self, checkpoints: Sequence[CheckpointInfo]) -> frozenset[int]:
        return frozenset(sorted(info.sequence or 0 for info in checkpoints)[-2:])

    def __repr__(self) -> str:
        return "NewestTwo()"


def names(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


def steps(manager: CheckpointManager) -> list[int | None]:
    return [info.global_step for info in manager.list_checkpoints()]


def recorded_steps(directory: Path) -> list[int]:
    """What the registry's file says."""
    return [entry["global_step"] for entry in json.loads((directory / "registry.json").read_text())["checkpoints"]]


class WriterConformance:
    """Subclasses say which writer, and give it a disk."""

    writer: ClassVar[Literal["thread", "process"]]

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Disk]:
        """The disk that what is made in the test writes to."""
        raise NotImplementedError

    @pytest.fixture
    def place(self, tmp_path: Path, disk: Disk) -> Path:
        """An empty directory on that disk."""
        (tmp_path / "place").mkdir()
        return tmp_path / "place"

    def saver(self, num_workers: int = 1, **options: Any) -> AsyncCheckpointSaver:
        return AsyncCheckpointSaver(num_workers, writer=self.writer, **options)

    def manager(self, directory: Path, max_checkpoints: int = 5, **options: Any) -> CheckpointManager:
        return CheckpointManager(directory, max_checkpoints, writer=self.writer, save_rng=False, **options)

    # --- what is saved ---

    def test_what_was_saved_is_what_was_there(self, place: Path, disk: Disk) -> None:
        """Whatever the caller does with it afterwards, while the disk has not even answered."""
        live = {"a": {"b": [torch.arange(10.0), torch.ones(3, dtype=torch.bool)]}, "items": [1, "two"]}
        with self.saver() as saver, disk.held():
            handle = saver.save(live, place / "a.pt")
            live["a"]["b"][0].fill_(-1)  # type: ignore[index]
            live["items"].clear()  # type: ignore[attr-defined]
            disk.wait_until_held()
            assert not handle.done()
        saved = torch.load(place / "a.pt", weights_only=True)
        assert torch.equal(saved["a"]["b"][0], torch.arange(10.0))
        assert saved["items"] == [1, "two"]
        assert asyncckpt.verify(place / "a.pt").ok

    def test_info_timings_and_events(self, place: Path) -> None:
        """All that is known of a save arrives, and in order."""
        events: list[Event] = []
        succeeded: list[CheckpointInfo] = []
        with self.saver(on_event=events.append, on_success=succeeded.append) as saver:
            handle = saver.save(state(1, 3_000_000), place / "a.pt")
            info = handle.result(60)
        timings = handle.timings
        assert (info.filepath, info.num_bytes) == (place / "a.pt", (place / "a.pt").stat().st_size)
        assert timings.num_bytes == info.num_bytes
        parts = (timings.queue_secs, timings.checksum_secs, timings.write_secs, timings.sync_secs, timings.commit_secs)
        assert min(parts) > 0
        assert max(parts) <= timings.durable_secs
        assert [event.kind for event in events] == ["staged", "submitted", "committed"]
        assert {event.path for event in events} == {str(place / "a.pt")}
        assert succeeded == [info]

    @pytest.mark.parametrize("num_workers", [1, 4])
    def test_the_later_of_two_saves_to_one_path_wins(self, num_workers: int, place: Path) -> None:
        """Also when the later one is a thousand times smaller and several workers race."""
        with self.saver(num_workers, max_in_flight=8) as saver:
            for number in range(12):
                saver.save(state(number, 10 if number % 2 else 1_000_000), place / "a.pt")
        assert number_at(place / "a.pt") == 11

    def test_commits_keep_their_order(self, place: Path) -> None:
        """With several workers, small saves behind large ones."""
        events: list[Event] = []
        with self.saver(4, max_in_flight=12, on_event=events.append) as saver:
            for number in range(12):
                saver.save(state(number, 10 if number % 2 else 500_000), place / f"{number}.pt")
        committed = [Path(event.path).stem for event in events if event.kind == "committed"]
        assert committed == [str(number) for number in range(12)]

    def test_saves_that_need_the_trainers_threads_keep_the_order_too(self, place: Path) -> None:
        """A state over the limit is written in pieces, by the trainer itself, between two that need not be."""
        with self.saver(2, memory_limit=20 << 20, max_in_flight=3) as saver:
            for number in range(0, 9, 3):
                saver.save(state(number), place / "a.pt")
                with pytest.warns(UserWarning, match="over memory_limit"):
                    streamed = saver.save(state(number + 1, 6_000_000), place / "a.pt")
                assert streamed.done()
                assert number_at(place / "a.pt") == number + 1
                saver.save(state(number + 2), place / "a.pt")
        assert number_at(place / "a.pt") == 8

    def test_saves_from_many_threads(self, place: Path) -> None:
        """Each is written once, where it belongs."""
        with self.saver(2, max_in_flight=3) as saver, concurrent.futures.ThreadPoolExecutor(8) as threads:
            handles = list(threads.map(lambda number: saver.save(state(number), place / f"{number}.pt"), range(40)))
            assert {handle.result(60).filepath.stem for handle in handles} == {str(number) for number in range(40)}
        assert [number_at(place / f"{number}.pt") for number in range(40)] == list(range(40))

    def test_names_that_are_no_text(self, place: Path) -> None:
        """Bytes that are not UTF-8, line breaks, and a path of thousands of bytes."""
        directory = place / os.fsdecode(b"\xff\xfe\n run") / "/".join(["d" * 200] * 15)
        path = directory / os.fsdecode(b"\xe4\n.pt")
        events: list[Event] = []
        with self.saver(on_event=events.append) as saver:
            assert saver.save(state(1), path).result(60).filepath == path
        assert number_at(path) == 1
        assert {event.path for event in events} == {str(path)}
        with self.manager(place / os.fsdecode(b"\xfd")) as manager:
            info = Training().save(manager).result(60)
            assert info.filepath.exists()
            assert [entry.filepath for entry in manager.list_checkpoints()] == [info.filepath]

    def test_a_name_that_can_not_be_encoded(self, place: Path) -> None:
        """Fails that save, and no other."""
        with self.saver(max_in_flight=1, when_full="raise") as saver:
            assert isinstance(saver.save(state(1), place / "\ud800.pt").exception(60), ValueError)
            saver.save(state(2), place / "a.pt").result(60)
        assert names(place) == ["a.pt"]

    def test_many_tensors(self, place: Path) -> None:
        """Their names and sizes are a large message."""
        num_tensors = count(10_000, full=100_000)
        tensors = [tensor.clone() for tensor in torch.arange(float(num_tensors)).split(1)]
        with self.saver() as saver:
            saver.save(tensors, place / "a.pt").result(120)
        assert asyncckpt.verify(place / "a.pt").ok
        assert torch.equal(torch.cat(torch.load(place / "a.pt", weights_only=True)), torch.arange(float(num_tensors)))

    def test_an_overlapped_save_is_of_one_moment(self, place: Path) -> None:
        """Steps go on meanwhile."""
        model = nn.Linear(500, 500)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        handles, expected = [], []
        with self.saver(snapshot="overlap", max_in_flight=2) as saver:
            for number in range(6):
                expected.append(model.weight.detach().clone())
                state_dict = {"weight": model.weight}
                handles.append(saver.save(state_dict, place / f"{number}.pt", optimizers=[optimizer], modules=[model]))
                model.weight.grad = torch.ones_like(model.weight)
                optimizer.step()
            for handle, weight in zip(handles, expected, strict=True):
                saved = torch.load(handle.result(60).filepath, weights_only=True)
                assert torch.equal(saved["weight"], weight)

    def test_what_turns_out_torn_just_before_the_commit(self, place: Path, disk: Disk) -> None:
        """Is not committed: the trainer sees it, when all else is done."""
        model = nn.Linear(100, 100)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with self.saver(snapshot="overlap") as saver:
            with disk.held():
                handle = saver.save({"weight": model.weight}, place / "a.pt", optimizers=[optimizer], modules=[model])
                disk.wait_until_held()
                with torch.no_grad():
                    model.weight.add_(1)  # by somebody whom the fence does not know
            assert isinstance(handle.exception(60), TornSnapshotError)
            assert os.listdir(place) == []
            saver.save({"weight": model.weight}, place / "a.pt", optimizers=[optimizer], modules=[model]).result(60)

    # --- a directory ---

    def test_registry_retention_and_the_best(self, place: Path) -> None:
        """What is kept, what the registry's file says, and the best link agree; a new manager sees the same."""
        training, losses = Training(), [3.0, 1.0, 2.0, None, 4.0, 2.5]
        events: list[Event] = []
        with self.manager(place, 2, num_workers=2, on_event=events.append) as manager:
            for loss in losses:
                handle = training.save(manager, loss)
                assert handle.result(60).sequence == training.step
                assert steps(manager)[-1] == training.step, "listed as soon as it is acknowledged"
            manager.wait(60)
            assert steps(manager) == [2, 5, 6]
            assert manager.best is not None
            assert manager.best.global_step == 2
            listed = manager.list_checkpoints()
            assert training.load(manager) == 6
        assert recorded_steps(place) == [2, 5, 6]
        assert names(place) == sorted(["best_model.pt", "registry.json", *(info.filepath.name for info in listed)])
        best = torch.load(place / "best_model.pt", weights_only=True)
        assert bool((best["model_state_dict"]["weight"] == 2).all())
        assert [event.kind for event in events].count("deleted") == 3
        with self.manager(place, 2) as again:
            assert again.list_checkpoints() == listed
            assert training.load(again) == 6

    def test_what_is_acknowledged_is_listed_at_once(self, place: Path) -> None:
        """Also while the next ones are being written by other workers."""
        training = Training()
        with self.manager(place, 40, num_workers=3, max_in_flight=6) as manager:
            for handle in [training.save(manager) for _ in range(30)]:
                assert handle.result(60).global_step in steps(manager)

    def test_prune_between_saves(self, place: Path) -> None:
        """The trainer's own writing is known to whoever writes the next save."""
        training = Training()
        with self.manager(place, 10) as manager:
            for _ in range(4):
                training.save(manager)
            dropped = manager.prune(KeepLast(1))
            assert [info.global_step for info in dropped] == [1, 2, 3]
            training.save(manager).result(60)
            assert steps(manager) == [4, 5]
        assert recorded_steps(place) == [4, 5]

    def test_prune_in_the_middle_of_saves(self, place: Path) -> None:
        """Neither loses what the other has done, whatever comes first."""
        training = Training()
        with self.manager(place, 10, max_in_flight=4, num_workers=2) as manager:
            for _ in range(5):
                training.save(manager)
                training.save(manager)
                manager.prune(KeepLast(1))
                training.save(manager)
            manager.wait(60)
            kept = steps(manager)
            manager.prune(KeepLast(1))
            assert steps(manager) == recorded_steps(place) == [15]
        assert kept[-1] == 15
        assert len(kept) < 10
        assert len(names(place)) == 2

    def test_damage_that_a_load_found_is_known_to_the_next_save(self, place: Path) -> None:
        """A damaged checkpoint takes no whole one's place in retention."""
        training = Training()
        with self.manager(place, 2) as manager:
            training.save(manager).result(60)
            damaged = training.save(manager).result(60)
            damaged.filepath.write_bytes(damaged.filepath.read_bytes()[:1000])
            assert training.load(manager) == 1
            training.step = 2
            training.save(manager).result(60)
            manager.wait(60)
            assert steps(manager) == [1, 2, 3]
            assert [info.damaged for info in manager.list_checkpoints()] == [False, True, False]

    def test_a_policy_of_the_users_own(self, place: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Is applied; where that takes the trainer's threads, it is said once."""
        training = Training()
        with self.manager(place, retention=NewestTwo()) as manager:
            for _ in range(4):
                training.save(manager)
            manager.wait(60)
            assert steps(manager) == [3, 4]
        assert recorded_steps(place) == [3, 4]
        assert caplog.text.count("NewestTwo() is code") == (1 if self.writer == "process" else 0)

    def test_saving_again_after_close_is_refused(self, place: Path) -> None:
        """And the directory is the next one's."""
        training = Training()
        manager = self.manager(place, 3)
        training.save(manager)
        manager.close()
        with pytest.raises(SaverClosedError):
            training.save(manager)
        with self.manager(place, 3, lock_timeout_secs=0) as other:
            training.save(other).result(60)

    # --- errors ---

    def test_a_full_disk(self, place: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
        """The error says what and why, reaches everybody, and harms neither the old file nor the next save."""
        failed: list[tuple[SaveHandle, BaseException]] = []
        with self.saver(on_failure=lambda *args: failed.append(args)) as saver:
            saver.save(state(1), place / "a.pt").result(60)
            disk.fail(errno.ENOSPC)
            handle = saver.save(state(2), place / "a.pt")
            with pytest.raises(CheckpointWriteError) as caught:
                saver.wait(60)
            disk.mend()
            assert number_at(place / "a.pt") == 1
            assert names(place) == os.listdir(place) == ["a.pt"]
            saver.save(state(3), place / "a.pt").result(60)
        error, cause = caught.value, caught.value.__cause__
        reason = "No space left on device; free some space, the next save tries again"
        assert str(error) == f"{place / 'a.pt'} was not saved: {reason}"
        assert error.errno == errno.ENOSPC
        assert type(cause) is OSError
        assert (cause.errno, cause.strerror) == (errno.ENOSPC, "No space left on device")
        assert failed == [(handle, error)]
        assert str(error) in caplog.text
        assert number_at(place / "a.pt") == 3

    def test_an_error_that_passes(self, place: Path, disk: Disk) -> None:
        """Is retried, with a new file, and said."""
        events: list[Event] = []
        with self.saver(on_event=events.append) as saver:
            disk.fail(errno.EIO, times=2, suffix="a.pt.tmp")
            saver.save(state(1), place / "a.pt").result(60)
        assert [event.kind for event in events] == ["staged", "submitted", "retried", "retried", "committed"]
        assert "Input/output error" in events[2].detail
        opened = {path for _, name, path in disk.calls if name == "open_file" and is_temporary_name(Path(path).name)}
        assert len(opened) == 3, disk.calls
        assert number_at(place / "a.pt") == 1
        assert os.listdir(place) == ["a.pt"]

    def test_an_error_that_stays(self, place: Path, disk: Disk) -> None:
        """Fails the save after the retries."""
        events: list[Event] = []
        with self.saver(on_event=events.append, retries=2) as saver:
            disk.fail(errno.EIO)
            error = saver.save(state(1), place / "a.pt").exception(60)
            disk.mend()
        assert isinstance(error, CheckpointWriteError)
        assert error.errno == errno.EIO
        assert [event.kind for event in events] == ["staged", "submitted", "retried", "retried", "failed"]
        assert os.listdir(place) == []

    def test_a_registry_that_can_not_be_written(self, place: Path, disk: Disk) -> None:
        """Fails that save; the next one lists what is there."""
        training = Training()
        with self.manager(place) as manager:
            training.save(manager).result(60)
            disk.fail(errno.ENOSPC, "fsync", suffix="registry.json.tmp")
            error = training.save(manager).exception(60)
            assert isinstance(error, CheckpointWriteError)
            assert error.errno == errno.ENOSPC
            disk.mend()
            training.save(manager).result(60)
            assert steps(manager) == recorded_steps(place)
            assert steps(manager) in ([1, 3], [1, 2, 3])
            assert training.load(manager) == 3

    def test_a_directory_that_can_not_be_synced(self, place: Path, disk: Disk) -> None:
        """The file is there, but was not acknowledged; the next save knows of it."""
        training = Training()
        with self.manager(place, retries=0) as manager:
            training.save(manager).result(60)
            disk.fail(errno.EIO, suffix=str(place))
            assert isinstance(training.save(manager).exception(60), CheckpointWriteError)
            disk.mend()
            training.save(manager).result(60)
            assert steps(manager)[-1] == 3
            assert steps(manager) == recorded_steps(place)
            assert {info.filepath.name for info in manager.list_checkpoints()} <= set(names(place))

    def test_what_the_disk_lost_is_noticed(self, place: Path, disk: Disk) -> None:
        """`verify_after_save` reads back before it commits."""
        with self.saver(verify_after_save=True) as saver:
            saver.save(state(1), place / "a.pt").result(60)
            disk.lose_writes()
            error = saver.save(state(2), place / "a.pt").exception(60)
            disk.mend()
        assert isinstance(error, CorruptCheckpointError)
        assert "does not read back" in str(error)
        assert number_at(place / "a.pt") == 1
        assert os.listdir(place) == ["a.pt"]

    def test_places_that_can_not_be_written_to(self, place: Path) -> None:
        """A directory at the path, a file on the way to it, a name that is too long."""
        (place / "directory").mkdir()
        (place / "file").write_text("")
        with self.saver(max_consecutive_failures=9) as saver:
            for path, hint in (
                ("directory", "there is a directory at this path"),
                ("file/a.pt", "a part of this path is a file"),
                ("n" * 300, "shorten the file's name"),
            ):
                error = saver.save(state(1), place / path).exception(60)
                assert isinstance(error, CheckpointWriteError)
                assert hint in str(error)
        assert sorted(os.listdir(place)) == ["directory", "file"]

    def test_save_itself_raises_after_failures_in_a_row(self, place: Path, disk: Disk) -> None:
        """And tries again afterwards."""
        with self.saver(max_consecutive_failures=2) as saver:
            disk.fail(errno.ENOSPC)
            for number in range(2):
                assert saver.save(state(number), place / "a.pt").exception(60) is not None
            with pytest.raises(CheckpointWriteError, match="the last 2 saves failed"):
                saver.save(state(2), place / "a.pt")
            disk.mend()
            saver.save(state(3), place / "a.pt").result(60)

    def test_the_dead_are_swept_and_the_log_says_so(self, place: Path, caplog: pytest.LogCaptureFixture) -> None:
        """In the trainer's own log, and as an event."""
        dead = place / ".asyncckpt-0123456789abcdef-a.pt.tmp"
        dead.write_bytes(b"half")
        events: list[Event] = []
        with caplog.at_level(logging.WARNING), self.saver(on_event=events.append) as saver:
            saver.save(state(1), place / "a.pt")
        assert os.listdir(place) == ["a.pt"]
        assert [event.path for event in events if event.kind == "swept"] == [str(dead)]
        assert f"removed {dead}, left by a writer that died" in caplog.text

    # --- waiting and ending ---

    def test_waiting_for_a_disk_that_does_not_answer(self, place: Path, disk: Disk) -> None:
        """Ends when the time is up; the save goes on."""
        saver = self.saver()
        with disk.held():
            handle = saver.save(state(1), place / "a.pt")
            disk.wait_until_held()
            with pytest.raises(WaitTimeoutError, match=r"1 of 1 saves.*a\.pt"):
                saver.wait(0.01)
            for _ in range(2):
                with pytest.raises(WaitTimeoutError):
                    saver.close(0.01)
            assert os.listdir(place) != ["a.pt"]
        saver.close(60)
        assert handle.done()
        assert number_at(place / "a.pt") == 1

    def test_a_manager_whose_close_was_too_early(self, place: Path, disk: Disk) -> None:
        """Its directory is given up once what is in flight is durable."""
        training = Training()
        manager = self.manager(place)
        with disk.held():
            handle = training.save(manager)
            disk.wait_until_held()
            with pytest.raises(WaitTimeoutError):
                manager.close(0.01)
        handle.result(60)
        with self.manager(place, lock_timeout_secs=60) as other:
            training.save(other).result(60)
            assert steps(other) == [1, 2]
        manager.close(60)

    def test_a_streamed_save_waits_for_its_turn(self, place: Path, disk: Disk) -> None:
        """And a close that comes too early does not lose it."""
        saver = self.saver(memory_limit=9 << 20, max_in_flight=2)
        with disk.held():
            saver.save(state(1, 1000), place / "a.pt")
            disk.wait_until_held()
            streamed: list[SaveHandle] = []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                thread = threading.Thread(
                    target=lambda: streamed.append(saver.save(state(2, 5_000_000), place / "a.pt"))
                )
                thread.start()
                wait_for(lambda: len(saver._ledger._in_flight) == 2)
                with pytest.raises(WaitTimeoutError):
                    saver.close(0.01)
        thread.join(60)
        assert streamed[0].result(60)
        saver.close(60)
        assert number_at(place / "a.pt") == 2

    def test_several_savers_at_once(self, place: Path) -> None:
        """Side by side in one directory."""
        with self.saver() as first, self.saver() as second, self.saver() as third:
            for number in range(6):
                for saver, name in ((first, "a.pt"), (second, "b.pt"), (third, "c.pt")):
                    saver.save(state(number), place / name)
        assert [number_at(place / name) for name in ("a.pt", "b.pt", "c.pt")] == [5, 5, 5]
        assert sorted(os.listdir(place)) == ["a.pt", "b.pt", "c.pt"]

    def test_a_saver_that_nobody_closes(self, place: Path, disk: Disk) -> None:
        """Finishes, and gives everything back."""
        saver = self.saver()
        with disk.held():
            handle = saver.save(state(1), place / "a.pt")
            gone = weakref.ref(saver)
            del saver
        handle.result(60)
        wait_for(lambda: gc.collect() is not None and gone() is None)
        assert number_at(place / "a.pt") == 1

    def test_a_manager_that_nobody_closes(self, place: Path) -> None:
        """Its directory is free as soon as it is gone."""
        training = Training()
        manager = self.manager(place)
        training.save(manager).result(60)
        gone = weakref.ref(manager)
        del manager
        wait_for(lambda: gc.collect() is not None and gone() is None)
        with self.manager(place, lock_timeout_secs=60) as other:
            training.save(other).result(60)
            assert steps(other) == [1, 2]

    # --- signals and forks ---

    def test_signal_handlers_may_save_in_the_middle_of_a_save(self, place: Path) -> None:
        """As a SIGTERM handler does; nothing that save() holds may make it wait for itself."""
        num_signals, in_handler = 0, False
        with self.saver(max_in_flight=1000) as saver:

            def handle(*args: object) -> None:
                nonlocal num_signals, in_handler
                if in_handler:
                    return
                in_handler = True
                num_signals += 1
                saver.save(state(num_signals), place / "signal.pt")
                in_handler = False

            with alarms(handle, 0.001, 0.004):
                for number in range(60):
                    saver.save(state(number, 50_000), place / "loop.pt")
        assert num_signals > 5
        assert number_at(place / "loop.pt") == 59
        assert number_at(place / "signal.pt") == num_signals

    # An interrupt within a finalizer is lost, as Python has it.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_ctrl_c_in_the_middle_of_saves(self, place: Path) -> None:
        """Whatever was interrupted, every handle settles, every file is whole, and the next save works."""

        def interrupt(*args: object) -> None:
            if interruptible:
                raise Interrupted

        interruptible, num_interrupts, kept = False, 0, {}
        chance = random.Random(SEED)
        with self.saver(max_in_flight=6) as saver:
            durations: list[float] = []
            for _ in range(6):  # the shortest: on a busy machine one alone may take far longer than those to come
                started = time.perf_counter()
                handle = saver.save(state(0, 30_000), place / "first.pt")
                durations.append(time.perf_counter() - started)
                handle.result(60)
            typical_secs = min(durations)
            for number in range(150):
                path = place / f"{number % 5}.pt"
                with alarms(interrupt, chance.uniform(0.05, 1.2) * typical_secs):
                    try:
                        interruptible = True
                        handle = saver.save(state(number, 30_000), path)
                        interruptible = False
                        kept[path] = number, handle
                    except Interrupted:
                        interruptible = False
                        num_interrupts += 1
            saver.wait(60)
            for number, handle in kept.values():
                assert number_at(handle.result(60).filepath) >= number, SEED
            saver.save(state(1000), place / "last.pt").result(60)
        assert num_interrupts > 5
        assert all(not is_temporary_name(name) for name in os.listdir(place))

    @pytest.mark.parametrize("is_taken_at_once", [False, True])
    def test_ctrl_c_at_every_call_of_a_hand_over(self, place: Path, is_taken_at_once: bool) -> None:
        """A save is either on its way or not: its memory is never given back while somebody means to write it."""
        num_interrupts = 0
        with self.saver(max_in_flight=2, when_full="raise") as saver:
            saver.save(state(0), place / "a.pt").result(60)
            while True:
                saved = num_interrupts + 1
                try:
                    with interrupted_at(num_interrupts, pause_secs=0.005 if is_taken_at_once else 0.0):
                        saver.save(state(saved), place / "a.pt")
                except Interrupted:
                    num_interrupts += 1
                    saver.wait(60)  # no save failed
                    assert number_at(place / "a.pt") in (saved, saved - 1)
                    both = [saver.save(state(saved), place / name) for name in ("a.pt", "b.pt")]  # there is room again
                    assert all(handle.result(60).filepath for handle in both)
                else:
                    break
        assert num_interrupts > 5

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12: other threads may be running
    def test_forked_children(self, place: Path, disk: Disk) -> None:
        """Can't use what is the parent's, harm nothing by ending, and keep nothing alive by staying."""
        training = Training()
        with self.manager(place) as manager:
            training.save(manager).result(60)
            with disk.held():
                handle = training.save(manager)
                disk.wait_until_held()
                ending, staying = fork_child(manager, leave_at_once=True), fork_child(manager, leave_at_once=False)
                assert os.waitstatus_to_exitcode(os.waitpid(ending, 0)[1]) == 0
            try:
                handle.result(60)
                training.save(manager).result(60)
                manager.close(60)
                with self.manager(place, lock_timeout_secs=5) as other:
                    training.save(other).result(60)
                    assert steps(other) == [1, 2, 3, 4]
            finally:
                os.kill(staying, signal.SIGKILL)
                os.waitpid(staying, 0)

    def test_where_memory_can_not_be_shared(self, place: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A limit on files counts for memory that has a descriptor: threads write then, and that is said once."""
        with self.saver() as saver, file_size_limit(1 << 20):
            for number in range(3):
                saver.save(state(number), place / "a.pt").result(60)
            error = saver.save(state(3, 1_000_000), place / "a.pt").exception(60)
        assert isinstance(error, CheckpointWriteError)
        assert error.errno == errno.EFBIG
        assert number_at(place / "a.pt") == 2
        assert caplog.text.count("memory can't be shared") == (1 if self.writer == "process" else 0)


def fork_child(manager: CheckpointManager, *, leave_at_once: bool) -> int:
    """A child that tries to save, and then ends with 0 if that was refused, or stays."""
    pid = os.fork()
    if pid:
        return pid
    try:
        try:
            Training().save(manager)
        except SaverClosedError:
            manager.close()
            if not leave_at_once:
                signal.pause()
            os._exit(0)
    finally:
        os._exit(1)


@contextmanager
def alarms(handler: Any, first_secs: float, then_secs: float = 0.0) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, first_secs, then_secs)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Interrupted(BaseException):
    """What a signal handler raises, wherever the program is."""


HAND_OVER = {
    function.__code__
    for function in (
        AsyncCheckpointSaver._submit,
        AsyncCheckpointSaver._start,
        Ledger.enter,
        SaveQueue.submit,
        ProcessQueue.submit,
        ProcessQueue._advance,
        Handover.advance,
        Handover._send_image,
    )
}


@contextmanager
def interrupted_at(number: int, pause_secs: float) -> Iterator[None]:
    """Raise after the `number`-th call that handing over a save makes; other threads have `pause_secs` before that.

    Calls are where the interpreter looks for signals.
    """
    calls = itertools.count()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code not in HAND_OVER:
            return None
        frame.f_trace_opcodes = True
        names = {instruction.offset: instruction.opname for instruction in dis.get_instructions(frame.f_code)}
        previous = ""

        def trace_instructions(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal previous
            if event == "opcode":
                is_after_call, previous = previous.startswith("CALL"), names.get(frame.f_lasti, "")
                if is_after_call and next(calls) == number:
                    time.sleep(pause_secs)
                    raise Interrupted
            return trace_instructions

        return trace_instructions

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
