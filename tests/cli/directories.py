"""The directories of checkpoints that the tests run on."""

from __future__ import annotations

from pathlib import Path

import torch

import asyncckpt

VAL_LOSSES = (3.0, 2.0, 1.0, 1.5, float("nan"))
BEST = 2  # the index of the best


def make_directory(directory: Path) -> None:
    """Train for five epochs of a hundred steps each, and save after every one."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    with asyncckpt.CheckpointManager(directory, max_checkpoints=10) as manager:
        for epoch, val_loss in enumerate(VAL_LOSSES, start=1):
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            accuracy = {"accuracy": epoch / 10}
            manager.save(model, optimizer, epoch, epoch * 100, 1 / epoch, val_loss, val_metrics=accuracy)
            manager.wait()


def files(directory: Path) -> list[Path]:
    """The manager's checkpoints, in order."""
    return sorted(directory.glob("checkpoint_*.pt"))
