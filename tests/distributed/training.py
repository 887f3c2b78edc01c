"""A small distributed training whose every number can be compared: dropout, shuffled and sharded data, Adam."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from asyncckpt import CheckpointManager, ResumableSampler, SaveHandle

_ITEMS = torch.arange(120, dtype=torch.float32).reshape(20, 6) / 120


class Training:
    """Wrapped in DDP where there are ranks. Each rank has random numbers of its own."""

    def __init__(self, seed: int = 0, *, wrapped: bool = True, width: int = 16) -> None:
        torch.manual_seed(seed)
        self.plain = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.model: nn.Module = DistributedDataParallel(self.plain) if wrapped else self.plain
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.sampler = ResumableSampler(len(_ITEMS), batch_size=2, seed=5)  # five batches an epoch on each of two ranks
        self.step = 0
        self.losses: list[float] = []
        self._batches: Iterator[torch.Tensor] | None = None
        seed_own_numbers(100 * seed + (distributed.get_rank() if wrapped else 0))

    def advance(self, num_steps: int) -> Training:
        self._batches = self._batches or self._all_batches()
        for _ in range(num_steps):
            (items,) = next(self._batches)
            noise = random.random() + float(numpy.random.rand())
            loss = (self.model(items) - noise).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            self.losses.append(float(loss.detach()))
        return self

    def _all_batches(self) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(TensorDataset(_ITEMS), batch_sampler=self.sampler)
        while True:
            yield from self.sampler.batches(loader)

    def save(self, manager: CheckpointManager, **changes: Any) -> SaveHandle | None:
        given = {"epoch": 1, "global_step": self.step, "val_loss": 1.0, "stateful": {"sampler": self.sampler}}
        return manager.save(self.model, self.optimizer, **{**given, **changes})

    def load(self, manager: CheckpointManager, **changes: Any) -> Training:
        _, checkpoint = manager.load_latest(
            self.model, self.optimizer, **{"stateful": {"sampler": self.sampler}, **changes}
        )
        self.step = checkpoint["global_step"]
        return self

    def digest(self) -> str:
        """Of every bit of the weights and the optimizer's state."""
        digest = hashlib.sha256()
        _add(digest, self.plain.state_dict())
        _add(digest, self.optimizer.state_dict())
        return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(value.numpy().tobytes())
    elif isinstance(value, dict):
        for key, child in value.items():
            digest.update(repr(key).encode())
            _add(digest, child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            _add(digest, child)
    else:
        digest.update(repr(value).encode())


def seed_own_numbers(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def own_numbers() -> list[float]:
    """The next ones of every kind."""
    return [random.random(), float(numpy.random.rand()), float(torch.rand(1))]
