"""The training loop to take home resumes from the latest, the best and a path, as if it had never stopped."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import EXAMPLES, assert_same, run, state
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

from asyncckpt import CheckpointManager

SCRIPT = "train_with_checkpointing.py"
EXAMPLE = runpy.run_path(str(EXAMPLES / SCRIPT))
NUM_EPOCHS = 5


def make_scheduler(name: str, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
    if name == "none":
        return None
    return (
        StepLR(optimizer, step_size=2) if name == "step" else ReduceLROnPlateau(optimizer, threshold=10.0, patience=2)
    )


class Setting:
    """All that a run needs, made anew as a new process would."""

    def __init__(self, seed: int, model: str = "perceptron", *, scheduler: str = "step", **options: bool) -> None:
        torch.manual_seed(seed)
        self.model = EXAMPLE["make_model"](model, **options)
        self.train_loader, self.val_loader = EXAMPLE["make_loaders"](num_samples=128)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = make_scheduler(scheduler, self.optimizer)

    def train(self, manager: CheckpointManager, num_epochs: int, resume_from: str | None = None) -> nn.Module:
        trained: nn.Module = EXAMPLE["train_with_checkpointing"](
            model=self.model,
            train_loader=self.train_loader,
            val_loader=self.val_loader,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            criterion=nn.CrossEntropyLoss(),
            num_epochs=num_epochs,
            checkpoint_manager=manager,
            device=torch.device("cpu"),
            config={"learning_rate": 1e-3},
            resume_from=resume_from,
        )
        return trained


def last_state(directory: Path) -> dict[str, Any]:
    latest = CheckpointManager(directory).latest
    assert latest is not None
    assert latest.epoch == NUM_EPOCHS
    return state(latest.filepath)


def assert_last_equal(directory: Path, expected: Path) -> None:
    assert_same(last_state(directory), last_state(expected))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheduler": "plateau"},
        {"scheduler": "none"},
        {"model": "transformer"},
        {"model": "transformer", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_resume_from_latest(options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Goes on at the next epoch, and ends with the very state of an uninterrupted run, dropout and all."""
    with CheckpointManager(tmp_path / "uninterrupted") as manager:
        Setting(0, **options).train(manager, NUM_EPOCHS)
    with CheckpointManager(tmp_path / "resumed") as manager:
        Setting(0, **options).train(manager, 2)
    capsys.readouterr()
    with CheckpointManager(tmp_path / "resumed") as manager:
        Setting(1, **options).train(manager, NUM_EPOCHS, "latest")
    output = capsys.readouterr().out
    assert "Resuming from epoch 2, step 6\n" in output
    assert re.findall(r"^Epoch (\d)/5 ", output, re.MULTILINE) == ["3", "4", "5"]
    assert_last_equal(tmp_path / "resumed", tmp_path / "uninterrupted")


def test_it_learns(tmp_path: Path) -> None:
    """Loss falls, accuracy rises, and both are in the registry."""
    with CheckpointManager(tmp_path, max_checkpoints=20) as manager:
        model = Setting(0, scheduler="none").train(manager, 20)
        infos = manager.list_checkpoints()
    assert [info.epoch for info in infos] == list(range(1, 21))
    first, last = infos[0], infos[-1]
    assert first.val_loss is not None
    assert last.val_loss is not None
    assert last.val_loss < first.val_loss
    assert last.val_metrics["accuracy"] > first.val_metrics["accuracy"]
    model.load_state_dict(torch.load(last.filepath, weights_only=True)["model_state_dict"])


@pytest.mark.parametrize("source", ["best", "path"])
def test_resume_from_an_older_one(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What came after the best, or the file named, is done again, and comes out the same."""
    with CheckpointManager(tmp_path / "uninterrupted") as manager:
        Setting(0).train(manager, NUM_EPOCHS)
    with CheckpointManager(tmp_path / "resumed") as manager:
        setting = Setting(0)
        setting.train(manager, 2)
        with torch.no_grad():
            next(iter(setting.model.parameters())).fill_(7.0)  # a run gone wrong
        manager.save(setting.model, setting.optimizer, 3, 9, val_loss=100.0, scheduler=setting.scheduler)
    best = manager.best
    assert best is not None
    assert best.epoch == 2
    capsys.readouterr()
    with CheckpointManager(tmp_path / "resumed") as manager:
        Setting(1).train(manager, NUM_EPOCHS, "best" if source == "best" else str(best.filepath))
    assert "Resuming from epoch 2, step 6\n" in capsys.readouterr().out
    assert_last_equal(tmp_path / "resumed", tmp_path / "uninterrupted")


@pytest.mark.parametrize(
    ("scheduler", "rates"), [("step", [3, 4, 4, 5, 5]), ("plateau", [3, 3, 4, 4, 4]), ("none", [3] * 5)]
)
def test_scheduler_is_stepped(
    scheduler: str, rates: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once an epoch, with the validation loss where it asks for that; the learning rates, as negative powers of ten."""
    with CheckpointManager(tmp_path) as manager:
        Setting(0, scheduler=scheduler).train(manager, NUM_EPOCHS)
    printed = re.findall(r"  lr (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert printed == [f"{10.0**-rate:.6f}" for rate in rates]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    """Recomputed activations, dropout included, give the same training; and they are recomputed."""
    num_forwards = []
    for name, recompute in (("kept", False), ("recomputed", True)):
        setting = Setting(0, "transformer", gradient_checkpointing=recompute)
        calls: list[int] = []
        setting.model.layers[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with CheckpointManager(tmp_path / name) as manager:
            setting.train(manager, NUM_EPOCHS)
        num_forwards.append(len(calls))
    assert num_forwards[1] > num_forwards[0]
    assert_last_equal(tmp_path / "recomputed", tmp_path / "kept")


def test_nothing_to_resume_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From an empty directory, "latest" and "best" begin at the beginning."""
    for source in ("latest", "best"):
        with CheckpointManager(tmp_path / source) as manager:
            Setting(0).train(manager, 1, source)
        assert "Resuming from epoch 0, step 0\nEpoch 1/1 " in capsys.readouterr().out


def test_script(tmp_path: Path) -> None:
    """As its first lines say: train, then go on."""
    options = ("--checkpoint-dir", tmp_path, "--model", "transformer", "--gradient-checkpointing")
    run(SCRIPT, *options, "--epochs", "2")
    output = run(SCRIPT, *options, "--epochs", "3", "--resume-from", "latest").stdout
    assert re.search(r"^Resuming from epoch 2, step 24\nEpoch 3/3 ", output, re.MULTILINE), output
    assert re.findall(r"^checkpoint_epoch000(\d)_\S+  accuracy 0\.\d{4}", output, re.MULTILINE) == ["1", "2", "3"]
    assert output.count("  best\n") == 1
