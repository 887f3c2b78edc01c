"""A training script that may be killed and started again: `python interrupted_training.py JSON`.

It says `step NUMBER LOSS BATCH` after each step, the loss in full, and at the end `weights DIGEST`; `saved NUMBER` once
a checkpoint is durable. All on stdout, one line in one write.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from asyncckpt import CheckpointInfo, CheckpointManager, ResumableSampler

NUM_ITEMS, BATCH_SIZE, NUM_EPOCHS = 70, 4, 4
NUM_STEPS = NUM_EPOCHS * -(-NUM_ITEMS // BATCH_SIZE)


@dataclass
class Order:
    """Train in `directory`, saving after every so many steps; without one, straight through.

    `from_step`: go on from the checkpoint of this step, not from the latest. `wait_to_be_killed`: never end.
    """

    directory: str | None = None
    save_every: int = 3
    snapshot: Literal["copy", "overlap"] = "copy"
    from_step: int | None = None
    wait_to_be_killed: bool = False


class Items(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Each one is its index, and what follows from it."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(index), torch.sin(torch.arange(16.0) * (index + 1))

    def __len__(self) -> int:
        return NUM_ITEMS


class Training:
    """Everything that has a state: weights, moments, learning rate, position in the data, four random generators."""

    def __init__(self) -> None:
        for seed in (random.seed, numpy.random.seed, torch.manual_seed):
            seed(5)
        self.model = nn.Sequential(
            nn.Linear(16, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 1)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, NUM_STEPS)
        self.noise = torch.Generator().manual_seed(6)
        self.sampler = ResumableSampler(NUM_ITEMS, BATCH_SIZE, seed=7)
        self.loader = DataLoader(Items(), batch_sampler=self.sampler, num_workers=2)
        self.step_number = 0
        self.stateful = {"sampler": self.sampler, "noise": self.noise}

    def resume(self, manager: CheckpointManager, order: Order) -> None:
        into: tuple[Any, ...] = (self.model, self.optimizer, self.scheduler)
        if order.from_step is not None:
            _, checkpoint = manager.load(order.from_step, *into, stateful=self.stateful)
        else:
            _, checkpoint = manager.load_latest(*into, stateful=self.stateful)
        self.step_number = checkpoint.get("global_step", 0)

    def save(self, manager: CheckpointManager) -> None:
        manager.save(
            self.model,
            self.optimizer,
            self.sampler.epoch,
            self.step_number,
            scheduler=self.scheduler,
            stateful=self.stateful,
        )

    def steps(self) -> Iterator[str]:
        """Train to the end; the step, its loss and its batch."""
        while self.sampler.epoch < NUM_EPOCHS:
            for indices, inputs in self.sampler.batches(self.loader):
                loss = self.step(inputs)
                self.step_number += 1
                yield f"step {self.step_number} {loss.hex()} {indices.tolist()}"

    def step(self, inputs: torch.Tensor) -> float:
        noisy = inputs + 0.1 * torch.randn(inputs.shape, generator=self.noise)
        scale = random.uniform(0.9, 1.1) + float(numpy.random.normal(0, 0.1))
        loss = (self.model(noisy) * scale - inputs.sum(1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return float(loss.detach())

    def digest(self) -> str:
        """Of all weights and moments."""
        digest = hashlib.sha256()
        for tensor in (*self.model.state_dict().values(), *tensors_of(self.optimizer.state_dict()["state"].values())):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def tensors_of(states: Iterable[dict[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
    for state in states:
        yield from state.values()


def say(line: str) -> None:
    os.write(1, (line + "\n").encode())


def say_saved(info: CheckpointInfo) -> None:
    say(f"saved {info.global_step}")


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    training = Training()
    with ExitStack() as resources:
        manager: CheckpointManager | None = None
        if order.directory is not None:
            manager = resources.enter_context(
                CheckpointManager(order.directory, snapshot=order.snapshot, on_success=say_saved)
            )
            training.resume(manager, order)
        for line in training.steps():
            say(line)
            if manager is not None and training.step_number % order.save_every == 0:
                training.save(manager)
    say(f"weights {training.digest()}")
    while order.wait_to_be_killed:
        signal.pause()


if __name__ == "__main__":
    main()
