"""The manager: what it saves, keeps, finds again, refuses, and says."""

from __future__ import annotations

import argparse
import errno
import gc
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from storage.mounts import remount, small_file_system
from storage.seam import Call, Seam
from torch import nn

import asyncckpt
from asyncckpt import (
    CheckpointError,
    CheckpointManager,
    CheckpointNotFoundError,
    CheckpointWriteError,
    CorruptCheckpointError,
    EveryMinutes,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLast,
    MetricNotFoundError,
    SaverClosedError,
    StorageBusyError,
    UnsafeCheckpointError,
)
from asyncckpt.image.file import open_to_load
from asyncckpt.storage.base import Storage


class Training:
    """A model, an optimizer and a scheduler that have done a few steps."""

    def __init__(self, seed: int = 0, num_steps: int = 2) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.step = 0
        for _ in range(num_steps):
            self.advance()

    def advance(self) -> float:
        loss = self.model(torch.randn(16, 4)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return float(loss.detach())

    def save(self, manager: CheckpointManager, **changes: Any) -> asyncckpt.SaveHandle | None:
        given = {"epoch": 1, "global_step": self.step, "train_loss": 1.0, "val_loss": 1.0, "scheduler": self.scheduler}
        return manager.save(self.model, self.optimizer, **{**given, **changes})


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_state(a: Training, b: Training) -> bool:
    return all(
        equal(getattr(a, name).state_dict(), getattr(b, name).state_dict())
        for name in ("model", "optimizer", "scheduler")
    )


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., CheckpointManager]]:
    """Managers of one directory, closed at the end."""
    managers: list[CheckpointManager] = []

    def make(path: Path = tmp_path / "run", **options: Any) -> CheckpointManager:
        manager = CheckpointManager(path, **{"lock_timeout_secs": 0.1, "retries": 0, **options})
        managers.append(manager)
        return manager

    yield make
    for manager in managers:
        manager.close(60)


def steps(manager: CheckpointManager) -> list[int | None]:
    return [info.global_step for info in manager.list_checkpoints()]


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}


# --- the reference: arguments, files, names ---


def test_the_references_arguments_by_position(tmp_path: Path) -> None:
    with CheckpointManager(str(tmp_path), 3, "accuracy", "max", False) as manager:
        assert manager.checkpoint_dir == tmp_path
        assert (manager.max_checkpoints, manager.monitor_metric, manager.monitor_mode) == (3, "accuracy", "max")
        assert manager.best_score == -math.inf
        assert manager.best_checkpoint_path is None
        training = Training()
        handle = manager.save(
            training.model, training.optimizer, 4, 1234, 0.25, 0.5, {"accuracy": 0.75}, training.scheduler,
            {"lr": 0.01}, {"note": "x"},
        )  # fmt: skip
        assert handle is not None
        info = handle.result(60)
    assert info.filepath == tmp_path / "checkpoint_epoch0004_step00001234_loss0.5000_accuracy0.7500.pt"
    assert (info.epoch, info.global_step, info.val_loss, info.val_metrics) == (4, 1234, 0.5, {"accuracy": 0.75})
    assert (info.is_best, info.train_loss, info.sequence) == (True, 0.25, 1)
    assert info.num_bytes == info.filepath.stat().st_size
    assert manager.best_score == 0.75
    assert manager.best_checkpoint_path == tmp_path / "best_model.pt"


def test_what_is_in_a_checkpoint(make: Callable[..., CheckpointManager]) -> None:
    """Torch alone opens it, safely; the keys are the reference's."""
    training = Training()
    manager = make()
    handle = training.save(
        manager, val_metrics={"f1": 0.5}, config={"lr": 0.01, "layers": [4, 8]}, extra_state={"a": 1}
    )
    assert handle is not None
    path = handle.result(60).filepath
    assert path.name == f"checkpoint_epoch0001_step{training.step:08}_loss1.0000.pt"
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert set(loaded) == {
        *("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "epoch", "global_step", "train_loss"),
        *("val_loss", "val_metrics", "config", "timestamp", "pytorch_version", "rng_states", "extra_state"),
    }
    assert equal(loaded["model_state_dict"], dict(training.model.state_dict()))
    assert loaded["config"] == {"lr": 0.01, "layers": [4, 8]}
    assert loaded["extra_state"] == {"a": 1}
    assert loaded["pytorch_version"] == str(torch.__version__)
    assert type(loaded["pytorch_version"]) is str


def test_files_in_the_directory(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make()
    training.save(manager)
    manager.wait(60)
    (checkpoint,) = manager.list_checkpoints()
    assert names(manager.checkpoint_dir) == {checkpoint.filepath.name, "best_model.pt", "registry.json"}
    assert os.path.samefile(manager.checkpoint_dir / "best_model.pt", checkpoint.filepath)
    document = json.loads((manager.checkpoint_dir / "registry.json").read_text())
    assert document["best_score"] == 1.0
    assert [entry["filepath"] for entry in document["checkpoints"]] == [checkpoint.filepath.name]


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        ("val/loss", 0.5, "checkpoint_epoch0001_step00000007_loss1.0000_val-loss0.5000.pt"),
        ("../../x", 2.0, "checkpoint_epoch0001_step00000007_loss1.0000_x2.0000.pt"),
        ("f1", math.nan, "checkpoint_epoch0001_step00000007_loss1.0000_f1nan.pt"),
        ("…", -math.inf, "checkpoint_epoch0001_step00000007_loss1.0000_metric-inf.pt"),
    ],
)
def test_names_of_files(make: Callable[..., CheckpointManager], metric: str, value: float, expected: str) -> None:
    manager = make(monitor_metric=metric)
    handle = Training(num_steps=1).save(manager, global_step=7, val_metrics={metric: value})
    assert handle is not None
    assert handle.result(60).filepath == manager.checkpoint_dir / expected


def test_numbers_of_any_kind(make: Callable[..., CheckpointManager]) -> None:
    """NumPy scalars and tensors become plain numbers, which safe loads and JSON know."""
    numpy = pytest.importorskip("numpy")
    manager = make(monitor_metric="acc", monitor_mode="max")
    handle = Training().save(
        manager,
        epoch=numpy.int64(3),
        global_step=torch.tensor(5),
        train_loss=numpy.float32(0.5),
        val_loss=torch.tensor([0.25]),
        val_metrics={"acc": numpy.float64(0.75)},
    )
    assert handle is not None
    info = handle.result(60)
    assert (info.epoch, info.global_step, info.train_loss, info.val_loss) == (3, 5, 0.5, 0.25)
    loaded = asyncckpt.load(info.filepath)
    assert [type(loaded[key]) for key in ("epoch", "global_step", "train_loss", "val_loss")] == [int, int, float, float]


@pytest.mark.parametrize(
    ("field", "value"), [("epoch", "1"), ("global_step", 1.5), ("val_loss", "low"), ("train_loss", torch.zeros(2))]
)
def test_what_is_no_number_is_refused(make: Callable[..., CheckpointManager], field: str, value: object) -> None:
    manager = make()
    with pytest.raises((TypeError, ValueError), match=field):
        Training().save(manager, **{field: value})
    assert not manager.checkpoint_dir.exists()


# --- best ---


def test_save_best_only(make: Callable[..., CheckpointManager]) -> None:
    """None when it is no improvement, on what is still being written too."""
    training, manager = Training(), make(save_best_only=True, max_in_flight=9)
    results = [
        training.save(manager, global_step=step, val_loss=loss) for step, loss in enumerate([3, 4, 2, 2, math.nan, 1])
    ]
    assert [handle is not None for handle in results] == [True, False, True, False, False, True]
    manager.wait(60)
    assert steps(manager) == [0, 2, 5]
    with pytest.raises(MetricNotFoundError):
        training.save(manager, val_loss=None)


def test_best_stays_through_restarts_and_worse_saves(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make(max_checkpoints=1)
    training.save(manager, global_step=1, val_loss=0.1)
    manager.close()
    for step in (2, 3, 4):
        manager = make(max_checkpoints=1)
        training.save(manager, global_step=step, val_loss=0.1 * step)
        manager.close()
    assert manager.best is not None
    assert manager.best.global_step == 1
    assert manager.best_score == 0.1
    assert steps(manager) == [1, 4]
    fresh = Training(1)
    epoch, loaded = manager.load_best(fresh.model)
    assert (epoch, loaded["global_step"]) == (1, 1)


def test_a_missing_metric_is_an_error_that_names_it(make: Callable[..., CheckpointManager]) -> None:
    manager = make(monitor_metric="accuracy", monitor_mode="max")
    training = Training()
    with pytest.raises(MetricNotFoundError, match=r"'accuracy'.*val_loss, acc$"):
        training.save(manager, val_metrics={"acc": 0.5})
    with pytest.raises(MetricNotFoundError):
        training.save(manager)  # a val_loss alone is not fallen back to
    assert not manager.checkpoint_dir.exists()


def test_saves_in_mid_epoch(make: Callable[..., CheckpointManager]) -> None:
    """No metrics at all: never the best, but the latest."""
    training, manager = Training(), make()
    training.save(manager, global_step=1, val_loss=0.5)
    handle = training.save(manager, global_step=2, val_loss=None, train_loss=None)
    assert handle is not None
    assert handle.result(60).filepath.name == "checkpoint_epoch0001_step00000002.pt"
    assert (manager.latest and manager.latest.global_step) == 2
    assert (manager.best and manager.best.global_step) == 1
    assert manager.load_latest(training.model)[1]["global_step"] == 2


@pytest.mark.parametrize(
    "options",
    [
        {"monitor_mode": "median"},
        {"monitor_metric": ""},
        {"max_checkpoints": 0},
        {"max_checkpoints": True},
        {"checkpoint_dir": ""},
        {"checkpoint_dir": "a\0b"},
        {"nonsense": 1},
        {"when_full": "panic"},
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        CheckpointManager(**{"checkpoint_dir": tmp_path, **options})


# --- retention ---


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (KeepLast(2), [5, 9, 10]),
        (KeepLast(1) | KeepBest(2), [5, 6, 10]),
        (KeepLast(1) | KeepEvery(steps=4), [4, 5, 8, 10]),
        (KeepEvery(epochs=5), [5, 10]),
    ],
)
def test_retention_policies(make: Callable[..., CheckpointManager], retention: Any, expected: list[int]) -> None:
    """The policy's choice, the best and the newest; `wait` is also the barrier for what is deleted."""
    losses = [9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    training, manager = Training(), make(retention=retention)
    for step, loss in enumerate(losses, 1):
        training.save(manager, epoch=step, global_step=step, val_loss=loss)
    manager.wait(60)
    assert steps(manager) == expected
    files = {info.filepath.name for info in manager.list_checkpoints()}
    assert names(manager.checkpoint_dir) == {*files, "best_model.pt", "registry.json"}


def test_an_improving_run_keeps_what_the_policy_says(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make(max_checkpoints=3)
    for step in range(1, 10):
        training.save(manager, global_step=step, val_loss=1 / step)
    manager.wait(60)
    assert steps(manager) == [7, 8, 9]
    assert len(names(manager.checkpoint_dir)) == 5


def test_rollback(make: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture) -> None:
    """Trains on from an older step: the new branch is the latest, nothing of it is pruned as old, and it says so."""
    training, manager = Training(), make(max_checkpoints=3)
    for step in (8000, 9000, 10_000):
        training.save(manager, global_step=step)
    manager.wait(60)
    manager.load(8000, training.model, training.optimizer)
    training.save(manager, global_step=8100)
    manager.wait(60)
    assert "step 8100 is below the newest checkpoint's, 10000" in caplog.text
    assert (manager.latest and manager.latest.global_step) == 8100
    caplog.clear()
    for step in (8200, 8300):
        training.save(manager, global_step=step)
    manager.wait(60)
    assert steps(manager) == [8000, 8100, 8200, 8300]  # 8000 is the best
    assert "below" not in caplog.text
    assert manager.load_latest(training.model)[1]["global_step"] == 8300


def test_prune(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make()
    for step in (1, 2, 3):
        training.save(manager, global_step=step)
    manager.wait(60)
    assert [info.global_step for info in manager.prune(KeepLast(1), dry_run=True)] == [2]
    assert steps(manager) == [1, 2, 3]
    (dropped,) = manager.prune(KeepLast(1))
    assert not dropped.filepath.exists()
    assert steps(manager) == [1, 3]
    assert manager.prune() == []


@pytest.mark.parametrize("writer", ["thread", "process"])
def test_pin(make: Callable[..., CheckpointManager], writer: str) -> None:
    """Whoever writes knows of it, and whoever opens the directory next; it is durable on return."""
    training, manager = Training(), make(max_checkpoints=1, writer=writer)
    training.save(manager, global_step=1, val_loss=9.0)
    (pinned,) = manager.pin(1)
    assert (pinned.pinned, pinned.filepath.exists()) == (True, True)
    assert [info.pinned for info in CheckpointManager(manager.checkpoint_dir).list_checkpoints()] == [True]
    for step in (2, 3, 4):
        training.save(manager, global_step=step, val_loss=1.0 / step)
    manager.wait(60)
    assert steps(manager) == [1, 4]
    manager.close()
    manager = make(max_checkpoints=1, writer=writer)
    assert manager.prune(KeepLast(1)) == []
    assert [info.pinned for info in manager.list_checkpoints()] == [True, False]
    with pytest.raises(CheckpointNotFoundError):
        manager.pin(7)
    with pytest.raises(TypeError, match="step"):
        manager.pin("1")  # type: ignore[arg-type]
    assert [info.filepath for info in manager.unpin(1)] == [pinned.filepath]
    assert [info.global_step for info in manager.prune()] == [1]


# --- loading ---


def test_resume_is_exact(make: Callable[..., CheckpointManager]) -> None:
    """Weights, optimizer, scheduler and random numbers: the next steps are bit-equal."""
    training, manager = Training(), make()
    training.save(manager, epoch=2)
    manager.close()
    expected = [training.advance() for _ in range(5)]
    resumed = Training(seed=99, num_steps=0)
    epoch, checkpoint = make().load_latest(resumed.model, resumed.optimizer, resumed.scheduler)
    assert (epoch, checkpoint["global_step"]) == (2, 2)
    del checkpoint
    assert [resumed.advance() for _ in range(5)] == expected
    assert same_state(training, resumed)


def test_nothing_to_load(make: Callable[..., CheckpointManager]) -> None:
    """An epoch of 0 and an empty dict, as in the reference; the directory is not even made."""
    training, manager = Training(), make()
    before = {key: value.clone() for key, value in training.model.state_dict().items()}
    assert manager.load_latest(training.model, training.optimizer) == (0, {})
    assert manager.load_best(training.model) == (0, {})
    assert equal(before, dict(training.model.state_dict()))
    assert not manager.checkpoint_dir.exists()
    assert (manager.latest, manager.best, manager.list_checkpoints()) == (None, None, [])


def test_load_by_step_path_and_name(make: Callable[..., CheckpointManager], tmp_path: Path) -> None:
    training, manager = Training(), make()
    for step in (1, 2):
        training.advance()
        training.save(manager, global_step=step)
    manager.wait(60)
    first = manager.list_checkpoints()[0].filepath
    link = tmp_path / "link.pt"
    link.symlink_to(first)
    for which in (1, first, str(first), first.name, link):
        assert manager.load(which, training.model)[1]["global_step"] == 1
    assert manager.load("best_model.pt", training.model)[1]["global_step"] == 1
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 3; it has 1, 2"):
        manager.load(3, training.model)
    with pytest.raises(CheckpointNotFoundError):
        manager.load("nothing.pt", training.model)


def test_of_one_step_the_newest_is_loaded(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make()
    training.save(manager, global_step=1, val_loss=0.5)
    training.save(manager, global_step=1, val_loss=0.7)
    manager.wait(60)
    assert manager.load(1, training.model)[1]["val_loss"] == 0.7


def damage(path: Path) -> None:
    """A new file with one bit flipped: the best link keeps the old one."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["damaged", "truncated", "empty", "gone"])
def test_falls_back_to_the_newest_valid(
    make: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """And says so, in the log and by an event."""
    events: list[asyncckpt.Event] = []
    training, manager = Training(), make(on_event=events.append)
    for step in (1, 2, 3):
        training.save(manager, global_step=step)
    manager.close()
    newest = manager.list_checkpoints()[-1].filepath
    if how == "gone":
        newest.unlink()
    elif how == "damaged":
        damage(newest)
    else:
        newest.write_bytes(newest.read_bytes()[: 0 if how == "empty" else 1000])
    reader = make(on_event=events.append)
    events.clear()
    assert reader.load_latest(training.model)[1]["global_step"] == 2
    if how != "gone":
        assert "trying the next one" in caplog.text
        assert newest.name in caplog.text
        reader.close()
        assert [event.kind for event in events] == ["fallback"]
        assert events[0].path == str(newest)


def test_nothing_valid_is_an_error(make: Callable[..., CheckpointManager]) -> None:
    """Never a silent start from the beginning."""
    training, manager = Training(), make()
    for step in (1, 2):
        training.save(manager, global_step=step)
    manager.wait(60)
    for info in manager.list_checkpoints():
        damage(info.filepath)
    before = {key: value.clone() for key, value in training.model.state_dict().items()}
    with pytest.raises(CorruptCheckpointError, match=r"no checkpoint in .* can be read"):
        manager.load_latest(training.model)
    assert equal(before, dict(training.model.state_dict()))


def test_a_damaged_best_is_an_error(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make()
    for step in (1, 2):
        training.save(manager, global_step=step, val_loss=float(step))
    manager.wait(60)
    damage(manager.list_checkpoints()[0].filepath)
    (manager.checkpoint_dir / "best_model.pt").unlink()
    with pytest.raises(CorruptCheckpointError):
        manager.load_best(training.model)
    assert [report.ok for report in manager.verify()] == [False, True]


def test_load_to_a_device(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make()
    training.save(manager)
    manager.wait(60)
    resumed = Training(5)
    manager.load_latest(resumed.model, resumed.optimizer, resumed.scheduler, torch.device("cpu"))
    assert same_state(training, resumed)


def test_strict_or_not(make: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture) -> None:
    """Strict: an error that says what does not fit, and nothing is changed."""
    training, manager = Training(), make()
    training.save(manager, scheduler=None)
    manager.wait(60)
    larger = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Linear(1, 1))
    before = {key: value.clone() for key, value in larger.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"4\.weight"):
        manager.load_latest(larger)
    assert equal(before, dict(larger.state_dict()))
    with pytest.raises(CheckpointError, match="scheduler"):
        manager.load_latest(training.model, training.optimizer, training.scheduler)
    manager.load_latest(larger, strict=False)
    assert torch.equal(larger.state_dict()["0.weight"], training.model.state_dict()["0.weight"])


def test_extra_and_stateful(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make()
    average = torch.optim.swa_utils.AveragedModel(training.model)
    generator = torch.Generator().manual_seed(7)
    training.save(manager, stateful={"average": average, "generator": generator}, extra_state={"patience": 3})
    manager.wait(60)
    expected = torch.rand(3, generator=generator)
    other, fresh = torch.optim.swa_utils.AveragedModel(Training(3).model), torch.Generator()
    _, checkpoint = manager.load_latest(training.model, stateful={"average": other, "generator": fresh})
    assert checkpoint["extra_state"] == {"patience": 3}
    assert equal(dict(other.state_dict()), dict(average.state_dict()))
    assert torch.equal(torch.rand(3, generator=fresh), expected)
    with pytest.raises(CheckpointError, match="loader"):
        manager.load_latest(training.model, stateful={"loader": fresh})


def test_rng_can_be_left_alone(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make()
    training.save(manager)
    manager.wait(60)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    manager.load_latest(training.model, restore_rng=False)
    assert torch.equal(torch.get_rng_state(), state)
    manager.load_latest(training.model)
    assert not torch.equal(torch.get_rng_state(), state)


def test_rng_need_not_be_saved(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make(save_rng=False)
    training.save(manager)
    manager.wait(60)
    state = torch.get_rng_state()
    _, checkpoint = manager.load_latest(training.model)
    assert "rng_states" not in checkpoint
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_optimizer_keeps_no_file(make: Callable[..., CheckpointManager]) -> None:
    """A pruned file gives its space back: nothing that lives on is mapped from it."""
    training, manager = Training(), make()
    training.save(manager)
    manager.wait(60)
    resumed = Training(5)
    _, checkpoint = manager.load_latest(resumed.model, resumed.optimizer, resumed.scheduler)
    del checkpoint
    gc.collect()
    assert str(manager.checkpoint_dir) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("compiled_first", [True, False])
def test_wrapped_and_plain_models_are_alike(make: Callable[..., CheckpointManager], compiled_first: bool) -> None:
    training, resumed, manager = Training(), Training(5), make()
    saved, loaded = training.model, resumed.model

    def wrap(model: nn.Module) -> nn.Module:
        wrapped: Any = torch.compile(model, backend="eager")
        assert wrapped is not model
        return wrapped  # type: ignore[no-any-return]

    manager.save(wrap(saved) if compiled_first else saved, training.optimizer, 1, 1, 0.5, 0.5)
    manager.wait(60)
    manager.load_latest(loaded if compiled_first else wrap(loaded), resumed.optimizer)
    assert equal(dict(training.model.state_dict()), dict(resumed.model.state_dict()))


# --- safety ---


class Choice:
    """Something that a safe load refuses."""


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"config": {"optimizer_cls": Choice}}, "config.optimizer_cls refers to"),
        ({"config": argparse.Namespace(lr=1)}, "config refers to argparse.Namespace"),
        ({"config": {"paths": [{"data": Path("x")}]}}, r"config\.paths\[0\]\.data refers to pathlib"),
        ({"extra_state": {"a": Choice()}}, r"extra_state\.a refers to"),
    ],
)
def test_unsafe_state_is_refused_when_it_is_saved(
    make: Callable[..., CheckpointManager], changes: dict[str, Any], path: str
) -> None:
    """With the key's path, before anything is written."""
    manager = make()
    with pytest.raises(UnsafeCheckpointError, match=path):
        Training().save(manager, **changes)
    assert manager.list_checkpoints() == []
    assert names(manager.checkpoint_dir) == set()


def test_unsafe_state_by_name(make: Callable[..., CheckpointManager]) -> None:
    """Whoever allows it at both ends gets it; the other end refuses."""
    training, manager = Training(), make(weights_only=False)
    training.save(manager, config={"kind": Choice})
    manager.wait(60)
    assert manager.load_latest(training.model)[1]["config"] == {"kind": Choice}
    safe = make()
    with pytest.raises(UnsafeCheckpointError, match="Choice"):
        safe.load_latest(training.model)
    assert safe.load_latest(training.model, weights_only=False)[0] == 1


# --- writers, readers, and their ends ---


def test_constructing_and_reading_change_nothing(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make()
    assert not manager.checkpoint_dir.exists()
    training.save(manager)
    manager.wait(60)
    before = {path.name: path.stat().st_mtime_ns for path in manager.checkpoint_dir.iterdir()}
    reader = make()
    reader.load_latest(training.model)
    reader.load_best(training.model)
    assert reader.list_checkpoints() == manager.list_checkpoints()
    assert [report.ok for report in reader.verify()] == [True]
    assert {path.name: path.stat().st_mtime_ns for path in manager.checkpoint_dir.iterdir()} == before


def test_two_managers(make: Callable[..., CheckpointManager]) -> None:
    """The second writer is refused, told who the first one is, and loses nothing; a closed or dropped one is none."""
    training, first, second = Training(), make(), make()
    training.save(first)
    with pytest.raises(StorageBusyError, match=f"process {os.getpid()} on"):
        training.save(second)
    with pytest.raises(StorageBusyError):
        second.prune()
    first.close()
    training.save(second, global_step=5)
    second.wait(60)
    assert steps(second) == steps(first) == [2, 5]


def test_a_cell_run_again(tmp_path: Path) -> None:
    """A manager that is dropped without being closed gives the directory back once its saves are done."""
    training = Training()
    for step in range(3):
        manager = CheckpointManager(tmp_path, lock_timeout_secs=30)
        training.save(manager, global_step=step)
        reference = weakref.ref(manager)
        del manager
        assert reference() is None
    with CheckpointManager(tmp_path, lock_timeout_secs=30) as manager:
        training.save(manager, global_step=3)
    assert steps(manager) == [0, 1, 2, 3]


OTHER_PROCESS = """
import sys, torch, asyncckpt
model = torch.nn.Linear(2, 2)
manager = asyncckpt.CheckpointManager(sys.argv[1], lock_timeout_secs=0.1)
try:
    manager.save(model, None, 1, 77, 0.5, 0.5)
    manager.wait()
    print("saved", flush=True)
    sys.stdin.readline()
except asyncckpt.StorageBusyError as error:
    print(error, flush=True)
"""


def test_another_process(make: Callable[..., CheckpointManager]) -> None:
    """Holds the directory as long as it lives, and not a moment longer when it is killed."""
    training, manager = Training(), make()
    command = [sys.executable, "-c", OTHER_PROCESS, str(manager.checkpoint_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "saved\n"
        with pytest.raises(StorageBusyError, match=f"process {other.pid} on"):
            training.save(manager)
        other.kill()
    training.save(manager)
    manager.wait(60)
    assert steps(manager) == [77, 2]
    refused = subprocess.run(command, capture_output=True, text=True, input="")
    assert f"process {os.getpid()} on" in refused.stdout


def test_closed(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make()
    training.save(manager)
    manager.close()
    manager.close()
    with pytest.raises(SaverClosedError):
        training.save(manager)
    assert manager.load_latest(training.model)[1]["global_step"] == 2


def test_an_error_in_the_block_flushes_all_the_same(tmp_path: Path) -> None:
    training = Training()
    with pytest.raises(KeyError), CheckpointManager(tmp_path) as manager:
        training.save(manager)
        raise KeyError
    assert steps(manager) == [2]


def test_skipped_for_lack_of_room(make: Callable[..., CheckpointManager]) -> None:
    """A settled handle that says so; the checkpoint is not listed, and nothing waits for it."""
    training = Training()
    manager = make(max_in_flight=1, when_full="skip")
    handles = [training.save(manager, global_step=step) for step in range(30)]
    manager.wait(60)
    done = [step for step, handle in enumerate(handles) if handle is not None and not handle.skipped]
    assert set(steps(manager)) <= set(done)
    assert any(handle is not None and handle.skipped for handle in handles)


def test_a_read_only_directory(make: Callable[..., CheckpointManager], tmp_path: Path) -> None:
    """Loads and lists; the first save says what is wrong."""
    training = Training()
    with small_file_system(tmp_path / "mounted", "size=16m") as place:
        manager = make(place / "run")
        training.save(manager)
        manager.close()
        remount(place, "ro")
        reader = make(place / "run")
        assert reader.load_latest(training.model)[1]["global_step"] == 2
        with pytest.raises(CheckpointWriteError, match=r"can't be opened for writing: Read-only") as caught:
            training.save(reader)
        assert caught.value.errno == errno.EROFS
        reader.close()


def test_failures_reach_everybody(make: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture) -> None:
    failed: list[BaseException] = []
    training, manager = Training(), make(on_failure=lambda handle, error: failed.append(error))
    training.save(manager)
    manager.wait(60)
    caplog.set_level(logging.CRITICAL)

    def fail(call: Call) -> None:
        if call.name == "pwrite":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with Seam(fail):
        handle = training.save(manager, global_step=5)
        assert handle is not None
        handle.wait_settled(60)
    with pytest.raises(CheckpointWriteError, match="the quota is used up"):
        manager.wait(60)
    assert steps(manager) == [2]
    training.save(manager, global_step=6)
    manager.wait(60)
    assert steps(manager) == [2, 6]
    manager.close()
    assert len(failed) == 1


def test_verify_after_save(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make(verify_after_save=True)
    training.save(manager)
    manager.wait(60)
    assert [report.ok for report in manager.verify()] == [True]


def test_overlapped_saves(make: Callable[..., CheckpointManager]) -> None:
    """The manager knows its optimizer: training goes on at once, and the file is of one moment."""
    training, manager = Training(num_steps=3), make(snapshot="overlap")
    expected = {key: value.clone() for key, value in training.model.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = training.save(manager)
    assert not caught
    for _ in range(5):
        training.advance()
    assert handle is not None
    loaded = asyncckpt.load(handle.result(60).filepath)
    assert equal(dict(loaded["model_state_dict"]), expected)


# --- when to save ---


def test_should_save(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make(save_policy=EverySteps(3))
    saved = []
    for step in range(1, 10):
        if manager.should_save(step):
            saved.append(step)
            training.save(manager, global_step=step)
    assert saved == [3, 6, 9]
    assert not manager.should_save(9)
    manager.wait(60)
    manager.load(3, training.model)
    assert [step for step in range(4, 8) if manager.should_save(step)] == [6, 7]
    assert make().should_save(1)
    assert not make(save_policy=EveryMinutes(5)).should_save(1)


def test_adaptive_interval_learns_from_the_saves(make: Callable[..., CheckpointManager]) -> None:
    """Saves at the first opportunity, and then not before the measured stall is within its budget."""
    training = Training()
    manager = make(save_policy=asyncckpt.AdaptiveInterval(max_overhead=1e-9))
    assert manager.should_save(1)
    training.save(manager, global_step=1)
    assert not manager.should_save(2)  # before the write is over, too
    manager.wait(60)
    assert not any(manager.should_save(step) for step in range(2, 50))
    eager = make(Path(str(manager.checkpoint_dir) + "2"), save_policy=asyncckpt.AdaptiveInterval(max_overhead=1.0))
    handle = training.save(eager, global_step=1)
    assert handle is not None
    handle.result(60)
    while not eager.should_save(2):  # once the time that the write took has passed
        pass


# --- what the outside does ---


def test_a_disk_that_fills_while_the_registry_is_written(
    make: Callable[..., CheckpointManager], tmp_path: Path
) -> None:
    """No inode is left for the registry's new file: found before anything is committed, and nothing is lost."""
    training = Training()
    with small_file_system(tmp_path / "mounted", "size=16m", "nr_inodes=7") as place:
        manager = make(place / "run")
        training.save(manager, global_step=1, val_loss=0.5)
        manager.wait(60)
        training.save(manager, global_step=2, val_loss=0.4)
        with pytest.raises(CheckpointWriteError, match=r"was not saved: No space left"):
            manager.wait(60)
        reader = make(place / "run")
        assert steps(reader) == [1]
        assert all(report.ok for report in reader.verify())
        remount(place, "nr_inodes=20")
        training.save(manager, global_step=3, val_loss=0.6)
        manager.wait(60)
        assert steps(reader) == steps(manager) == [1, 3]
        assert (reader.best and reader.best.global_step) == 1
        assert names(place / "run") == {
            "best_model.pt",
            "registry.json",
            *(info.filepath.name for info in reader.list_checkpoints()),
        }
        manager.close()


def test_an_opening_that_fails_at_its_end_is_raised(make: Callable[..., CheckpointManager]) -> None:
    """The run has not begun: every first save raises, however far the opening came, and none counts as a failure."""
    training = Training()
    first = make()
    training.save(first)
    first.close(60)
    (first.checkpoint_dir / "registry.json").unlink()

    def fill(call: Call) -> None:
        if call.name == "rename":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    manager = make(max_consecutive_failures=2)
    with Seam(fill):
        for _ in range(4):
            with pytest.raises(CheckpointWriteError, match=r"can't be opened for writing: No space left"):
                training.save(manager, global_step=3)
    training.save(manager, global_step=3)
    manager.wait(60)
    assert steps(manager) == [2, 3]


def test_the_best_link_stands_in_for_the_best_file(make: Callable[..., CheckpointManager]) -> None:
    """Where it is a copy of its own."""
    training, manager = Training(), make()
    for step in (1, 2):
        training.save(manager, global_step=step, val_loss=float(step))
    manager.close()
    best = manager.list_checkpoints()[0].filepath
    damage(best)
    assert manager.load_best(training.model)[1]["global_step"] == 1


def test_pruned_under_a_reader(make: Callable[..., CheckpointManager], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reader was about to load is dropped by the writer: it looks again, and takes the newest there is now."""
    training, writer = Training(), make(max_checkpoints=1)
    training.save(writer, global_step=1, val_loss=1.0)
    training.save(writer, global_step=2, val_loss=2.0)
    writer.wait(60)
    reader, opened = make(), []

    def prune_first(storage: Storage, path: str, **options: Any) -> Any:
        opened.append(os.path.basename(path))
        if len(opened) == 1:
            training.save(writer, global_step=3, val_loss=3.0)
            writer.wait(60)
        return open_to_load(storage, path, **options)

    monkeypatch.setattr("asyncckpt.registry.directory.open_to_load", prune_first)
    assert reader.load_latest(training.model)[1]["global_step"] == 3
    assert [name.split("_")[2] for name in opened] == ["step00000002", "step00000003"]


@pytest.mark.parametrize("number", [2**62, -(2**70), 10**400])
def test_numbers_that_are_too_large(make: Callable[..., CheckpointManager], number: int) -> None:
    """Saved and found again, or refused before anything is written."""
    training, manager = Training(), make()
    try:
        training.save(manager, global_step=number)
    except (CheckpointError, ValueError, OverflowError):
        assert manager.list_checkpoints() == []
        assert names(manager.checkpoint_dir) == set()
    else:
        manager.wait(60)
        assert steps(make()) == [number]


# --- never a silent start from the beginning ---


def lose_registry_and_tear_files(directory: Path) -> None:
    (directory / "registry.json").unlink()
    for path in directory.glob("*.pt"):
        content = path.read_bytes()[:1000]
        path.unlink()
        path.write_bytes(content)


def lose_files(directory: Path) -> None:
    for path in directory.glob("*.pt"):
        path.unlink()


def lose_files_and_tear_registry(directory: Path) -> None:
    lose_files(directory)
    (directory / "registry.json").write_bytes(b'{"version": 1, "ru')


def lose_all_but_a_torn_best_link(directory: Path) -> None:
    lose_registry_and_tear_files(directory)
    for path in directory.glob("checkpoint_*.pt"):
        path.unlink()


LOSSES = [lose_registry_and_tear_files, lose_files, lose_files_and_tear_registry, lose_all_but_a_torn_best_link]


@pytest.mark.parametrize("lose", LOSSES)
def test_checkpoints_that_are_lost_are_an_error(
    make: Callable[..., CheckpointManager], lose: Callable[[Path], None]
) -> None:
    training, manager = Training(), make()
    training.save(manager)
    manager.close()
    lose(manager.checkpoint_dir)
    for load in (make().load_latest, make().load_best):
        with pytest.raises(CorruptCheckpointError, match=r"had checkpoints, and none of them can be read: \w"):
            load(training.model)


def test_files_that_can_not_be_read_now_are_an_error(make: Callable[..., CheckpointManager]) -> None:
    """Without a registry, and with no descriptor left to look at the files: not taken for an empty directory."""
    training, manager = Training(), make()
    training.save(manager)
    manager.close()
    (manager.checkpoint_dir / "registry.json").unlink()

    def fail(call: Call) -> None:
        if call.name == "open_file" and call.path.endswith(".pt"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with Seam(fail), pytest.raises(OSError, match="Too many open files"):
        make().load_latest(training.model)
    assert make().load_latest(training.model)[0] == 1


def test_strangers_are_pointed_out(make: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture) -> None:
    manager = make()
    manager.checkpoint_dir.mkdir()
    torch.save({"mine": 1}, manager.checkpoint_dir / "old.pt")
    assert manager.load_latest(Training().model) == (0, {})
    assert "holds 1 .pt files that are not this run's, old.pt for one" in caplog.text


def test_another_runs_file_under_a_listed_name_is_not_loaded(
    make: Callable[..., CheckpointManager], tmp_path: Path
) -> None:
    training, ours, theirs = Training(), make(), make(tmp_path / "theirs")
    for manager, loss in ((ours, 0.9), (theirs, 0.5)):
        training.save(manager, global_step=1, val_loss=loss)
        training.save(manager, global_step=2, val_loss=0.5)
        manager.close()
    ours.list_checkpoints()[-1].filepath.write_bytes(theirs.list_checkpoints()[-1].filepath.read_bytes())
    assert make().load_latest(training.model)[1]["global_step"] == 1


# --- ends and interruptions ---


def test_closing_twice_waits_twice(make: Callable[..., CheckpointManager]) -> None:
    """The directory is held until nothing is in flight, whatever the first close's time-out said."""
    training, manager = Training(), make()
    training.save(manager, global_step=1)
    manager.wait(60)
    gate = threading.Event()

    def hold(call: Call) -> None:
        if call.name == "rename" and "registry.json" in str(call.args[1]):
            assert gate.wait(60)

    with Seam(hold):
        handle = training.save(manager, global_step=2)
        assert handle is not None
        for _ in range(2):
            with pytest.raises(asyncckpt.WaitTimeoutError):
                manager.close(0.05)
        with pytest.raises(StorageBusyError):
            training.save(make())
        gate.set()
        manager.close(60)
    assert handle.result().global_step == 2
    later = make()
    training.save(later, global_step=3)
    later.wait(60)
    assert steps(later) == [1, 2, 3]


def test_a_failed_save_does_not_keep_the_directory(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make()
    training.save(manager, global_step=1)
    manager.wait(60)

    def fail(call: Call) -> None:
        if call.name == "pwrite":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Seam(fail):
        handle = training.save(manager, global_step=2)
        assert handle is not None
        handle.wait_settled(60)
        with pytest.raises(CheckpointWriteError, match="No space"):
            manager.close()
    later = make()
    training.save(later, global_step=3)
    later.wait(60)
    assert steps(later) == [1, 3]
    with pytest.raises(SaverClosedError):
        manager.prune()


def test_a_signal_handler_saves_during_prune(make: Callable[..., CheckpointManager]) -> None:
    """With no room in flight, too: prune works on a worker, so nobody waits for himself."""
    training, manager = Training(), make(max_in_flight=1)
    for step in (1, 2, 3):
        training.save(manager, global_step=step)
    manager.wait(60)
    saved: list[asyncckpt.SaveHandle | None] = []

    def save_twice(*_: object) -> None:
        saved.extend(training.save(manager, global_step=step) for step in (4, 5))

    def interrupt(call: Call) -> None:
        if call.name == "rename" and "registry.json" in str(call.args[1]) and not saved:
            signal.raise_signal(signal.SIGUSR1)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, save_twice)
    try:
        with Seam(interrupt):
            manager.prune(KeepLast(1))
            manager.wait(60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(saved) >= 2
    assert steps(manager)[0] == 1
    assert steps(manager)[-2:] == [4, 5]


def test_damaged_checkpoints_take_nobodys_place(make: Callable[..., CheckpointManager]) -> None:
    """A resumed run keeps what it resumed from, until there is something newer that is whole."""
    training, manager = Training(), make(max_checkpoints=2)
    for step in (1, 2):
        training.save(manager, global_step=step, val_loss=None)
    manager.close()
    damage(manager.list_checkpoints()[-1].filepath)
    resumed = make(max_checkpoints=2)
    assert resumed.load_latest(training.model)[1]["global_step"] == 1
    assert [info.damaged for info in resumed.list_checkpoints()] == [False, True]
    training.save(resumed, global_step=3, val_loss=None)
    resumed.wait(60)
    assert steps(resumed) == [1, 2, 3]
    for step in (4, 5):
        training.save(resumed, global_step=step, val_loss=None)
    resumed.wait(60)
    assert steps(resumed) == [4, 5]


def test_save_best_only_after_the_best_was_damaged(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make(save_best_only=True)
    training.save(manager, global_step=1, val_loss=0.5)
    manager.close()
    for path in manager.checkpoint_dir.glob("*.pt"):
        damage(path)
    resumed = make(save_best_only=True)
    with pytest.raises(CorruptCheckpointError):
        resumed.load_latest(training.model)
    assert training.save(resumed, global_step=2, val_loss=0.6) is not None
    resumed.wait(60)
    assert (resumed.best and resumed.best.global_step) == 2


def test_val_loss_among_the_metrics(make: Callable[..., CheckpointManager]) -> None:
    manager = make()
    Training().save(manager, val_loss=None, val_metrics={"val_loss": 0.25})
    manager.wait(60)
    assert manager.best_score == 0.25


def test_steps_of_any_integer_type(make: Callable[..., CheckpointManager]) -> None:
    numpy = pytest.importorskip("numpy")
    training, manager = Training(), make()
    training.save(manager, global_step=7)
    manager.wait(60)
    assert manager.load(numpy.int64(7), training.model)[0] == 1


@pytest.mark.parametrize("first", [True, False])
def test_the_lock_is_removed_under_what_is_in_flight(make: Callable[..., CheckpointManager], first: bool) -> None:
    """Opened anew, before anything was recorded too: it is the same run, and what was acknowledged loads."""
    training, manager = Training(), make()
    if not first:
        training.save(manager, global_step=1)
        manager.wait(60)
    gate = threading.Event()

    def hold(call: Call) -> None:
        if call.name == "fsync" and "step00000002" in call.path:
            assert gate.wait(60)

    with Seam(hold):
        handle = training.save(manager, global_step=2)
        (manager.checkpoint_dir / ".asyncckpt.lock").unlink()
        pruner = threading.Thread(target=manager.prune)
        pruner.start()
        pruner.join(0.3)
        gate.set()
        pruner.join(60)
        assert not pruner.is_alive()
    assert handle is not None
    assert handle.result(60).global_step == 2
    training.save(manager, global_step=3)
    manager.wait(60)
    assert steps(make())[-2:] == [2, 3]
    assert make().load(2, training.model)[0] == 1


def test_closing_waits_for_a_prune(make: Callable[..., CheckpointManager]) -> None:
    """The directory is not another's while a prune still writes."""
    training, manager = Training(), make()
    for step in (1, 2, 3):
        training.save(manager, global_step=step)
    manager.wait(60)
    gate, reached = threading.Event(), threading.Event()

    def hold(call: Call) -> None:
        if call.name == "rename" and "registry.json" in str(call.args[1]):
            reached.set()
            assert gate.wait(60)

    with Seam(hold):
        pruner = threading.Thread(target=lambda: manager.prune(KeepLast(1)))
        pruner.start()
        assert reached.wait(60)
        with pytest.raises(asyncckpt.WaitTimeoutError):
            manager.close(0.05)
        with pytest.raises(StorageBusyError):
            training.save(make())
        gate.set()
        pruner.join(60)
    manager.close(60)
    with pytest.raises(SaverClosedError):
        manager.prune()
    later = make()
    training.save(later, global_step=4)
    later.wait(60)
    assert steps(later) == [1, 3, 4]


def test_damage_is_remembered(make: Callable[..., CheckpointManager]) -> None:
    """By the next process too, which does not put a damaged file in the place of a whole best link."""
    training, manager = Training(), make()
    for step, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
        training.save(manager, global_step=step, val_loss=loss)
    manager.close()
    (manager.checkpoint_dir / "best_model.pt").unlink()
    damage(manager.list_checkpoints()[1].filepath)
    second = make()
    with pytest.raises(CorruptCheckpointError):
        second.load_best(training.model)
    training.save(second, global_step=4, val_loss=0.9)
    second.close()
    third = make()
    assert (third.best and third.best.global_step) == 3
    training.save(third, global_step=5, val_loss=0.9)
    third.wait(60)
    assert third.load_best(training.model)[1]["global_step"] == 3
    assert asyncckpt.verify(third.checkpoint_dir / "best_model.pt").ok


def test_a_file_that_comes_into_the_way(make: Callable[..., CheckpointManager]) -> None:
    """Made by somebody while the directory is open: the checkpoint gets another name."""
    training, manager = Training(), make()
    training.save(manager, global_step=1)
    manager.wait(60)
    path = manager.checkpoint_dir / "checkpoint_epoch0001_step00000002_loss1.0000.pt"
    path.write_text("mine")
    handle = training.save(manager, global_step=2)
    assert handle is not None
    assert handle.result(60).filepath.name == path.name.replace(".pt", "_2.pt")
    assert path.read_text() == "mine"


@pytest.mark.parametrize("how", ["failed", "refused", "skipped"])
def test_the_name_of_a_save_that_came_to_nothing_is_given_up(
    make: Callable[..., CheckpointManager], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What somebody puts there afterwards is theirs: the next save of that name takes another one."""
    training, manager = Training(), make(max_in_flight=1, when_full="skip")
    training.save(manager, global_step=1)
    manager.wait(60)
    gate = threading.Event()

    def interfere(call: Call) -> None:
        if how == "failed" and call.name == "allocate":
            raise OSError(errno.ENOSPC, "full")
        if how == "skipped" and call.name == "fsync":
            assert gate.wait(60)

    with Seam(interfere):
        if how == "refused":
            with pytest.raises(UnsafeCheckpointError):
                training.save(manager, global_step=2, config={"optimizer": torch.optim.SGD})
        if how == "skipped":
            training.save(manager, global_step=3)
        if how != "refused":
            handle = training.save(manager, global_step=2)
            assert handle is not None
            assert handle.skipped == (how == "skipped")
            assert how == "skipped" or handle.exception(60) is not None
        gate.set()
        manager._saver.wait_idle()
    theirs = manager.checkpoint_dir / asyncckpt.naming.checkpoint_name(1, 2, {"loss": 1.0})
    theirs.write_text("theirs")
    handle = training.save(manager, global_step=2)
    assert handle is not None
    assert handle.result(60).filepath != theirs
    assert theirs.read_text() == "theirs"


def test_a_text_in_the_place_of_a_checkpoint_is_not_deleted(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make(max_checkpoints=1)
    training.save(manager, global_step=1, val_loss=None)
    manager.wait(60)
    path = manager.list_checkpoints()[0].filepath
    path.write_text("notes of mine")
    training.save(manager, global_step=2, val_loss=None)
    manager.wait(60)
    assert path.read_text() == "notes of mine"
    assert steps(manager) == [2]


def test_handles_do_not_pile_up(make: Callable[..., CheckpointManager]) -> None:
    training, manager = Training(), make()
    for step in range(5):
        handle = training.save(manager, global_step=step)
        assert handle is not None
        handle.result(60)
    assert len(manager._pace.in_flight) <= 1
