"""A sampler with a position: where in which epoch the training loop is, so that it can go on from there."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader, Sampler

from asyncckpt.state.capture import as_int

_FIXED = ("length", "batch_size", "shuffle", "drop_last")


class ResumableSampler(Sampler[list[int]]):
    """Batches of indices for a plain DataLoader, in an order that depends on `seed` and epoch alone.

        sampler = ResumableSampler(dataset, batch_size=32)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)
        for batch in sampler.batches(loader):
            ...

    It counts the batches that the loop was given, not those that workers have fetched ahead; give it to the manager as
    a stateful object, and a resumed loop goes on with the next batch. Not thread-safe.

    Args:
        dataset: what to sample from, or how many items it has.
        batch_size: items in a batch, on each rank.
        shuffle: another random order in each epoch; False keeps the data set's.
        drop_last: leave out what does not fill a batch on every rank; else the last batch is smaller, and the first
            items are repeated so that every rank gets as many.
        seed: the same on every rank.
        rank, num_replicas: this process's place among those that share the data; None asks torch.distributed.
    """

    def __init__(
        self,
        dataset: Sized | int,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        is_distributed = distributed.is_available() and distributed.is_initialized()
        self.length = as_int("dataset", dataset) if isinstance(dataset, (int, numbers.Integral)) else len(dataset)
        self.batch_size = as_int("batch_size", batch_size)
        self.shuffle = bool(shuffle)  # NumPy's would make the state one that safe loads refuse
        self.drop_last = bool(drop_last)
        self.seed = as_int("seed", seed)
        if rank is None:
            rank = distributed.get_rank() if is_distributed else 0
        if num_replicas is None:
            num_replicas = distributed.get_world_size() if is_distributed else 1
        self.rank, self.num_replicas = as_int("rank", rank), as_int("num_replicas", num_replicas)
        if self.batch_size < 1 or not 0 <= self.rank < self.num_replicas:
            raise ValueError(
                f"batch_size={batch_size}, rank={self.rank}, num_replicas={self.num_replicas} make no sense"
            )
        if self.length < 1 or len(self) < 1:
            raise ValueError(f"{self.length} items do not make a single batch of {batch_size} on every rank")
        self._epoch = 0
        self._num_consumed = 0
        self._turn = object()  # of the loop that counts; only the last one that was started may

    @property
    def epoch(self) -> int:
        """The epoch that `batches` is in, or starts next."""
        return self._epoch

    @property
    def num_consumed(self) -> int:
        """How many batches of this epoch the loop was given."""
        return self._num_consumed

    def __len__(self) -> int:
        """Batches in a whole epoch, on each rank."""
        num_items = self._num_own_items()
        return num_items // self.batch_size if self.drop_last else -(-num_items // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches from the present position to the end of the epoch. Moves nothing: only `batches` counts."""
        own = self._own_items()
        for index in range(self._num_consumed, len(self)):
            yield own[index * self.batch_size : (index + 1) * self.batch_size].tolist()

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """The rest of this epoch's batches from `loader`; each counts as consumed when the loop gets it.

        Raises ValueError at once if the loader's batch_sampler is another one. Only one loop counts at a time: once
        another one was started, or another position loaded, going on with this one raises RuntimeError.

        After the last one the next epoch begins. A loop that is left early goes on from there. If the checkpoint was
        saved after an epoch's last batch, the rest is empty, and what follows an epoch (validation, say) is done.

        Starting a loader draws a seed for its workers from torch's global generator. Here that seed comes from `seed`,
        epoch, rank and the position where the loop started, and the global generator stays as it was, so that resuming
        does not shift it. Randomness inside workers (augmentation) is thereby another one after a resume in mid-epoch,
        unless the data set seeds it by the index.
        """
        if loader.batch_sampler is not self:
            raise ValueError(
                "the loader has another batch_sampler: make it by DataLoader(dataset, batch_sampler=sampler)"
            )
        return self._count(loader)

    def _count(self, loader: DataLoader[Any]) -> Iterator[Any]:
        turn = self._turn = object()
        if self._num_consumed < len(self):
            for batch in self._start(loader):
                self._check_turn(turn)
                self._num_consumed += 1
                yield batch
            self._check_turn(turn)
        self._epoch += 1
        self._num_consumed = 0

    def state_dict(self) -> dict[str, int | bool]:
        """The position, and what it depends on: plain numbers."""
        fixed = {name: getattr(self, name) for name in _FIXED}
        position = {"epoch": self._epoch, "num_consumed": self._num_consumed}
        return {**position, "seed": self.seed, "num_replicas": self.num_replicas, **fixed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position. Raises ValueError if it is one in other data, or in other batches; then nothing changes.

        `num_replicas` may differ between epochs, not within one.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(f"this is no position of a sampler: it has no {', '.join(missing)}")
        differing = [name for name in _FIXED if state[name] != getattr(self, name)]
        if state["num_consumed"] and state["num_replicas"] != self.num_replicas:
            differing.append("num_replicas")
        if differing:
            raise ValueError(
                "the position is of another sampler: "
                + ", ".join(f"{name} was {state[name]} and is {getattr(self, name)}" for name in differing)
            )
        if state["epoch"] < 0 or not 0 <= state["num_consumed"] <= len(self):
            raise ValueError(
                f"there is no such position: batch {state['num_consumed']} of {len(self)} in epoch {state['epoch']}"
            )
        self.seed = int(state["seed"])
        self._epoch, self._num_consumed = int(state["epoch"]), int(state["num_consumed"])
        self._turn = object()

    def _num_own_items(self) -> int:
        return self.length // self.num_replicas if self.drop_last else -(-self.length // self.num_replicas)

    def _own_items(self) -> torch.Tensor:
        """This rank's items in this epoch's order: int64, on the CPU."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(self._mixed_seed(0))
            order = torch.randperm(self.length, generator=generator)
        else:
            order = torch.arange(self.length)
        num_items = self._num_own_items() * self.num_replicas
        return order[torch.arange(self.rank, num_items, self.num_replicas) % self.length]

    def _check_turn(self, turn: object) -> None:
        if turn is not self._turn:
            raise RuntimeError(
                "another loop over batches() was started, or another position loaded, since this one: its batches "
                "would be counted as the other's; start a new one"
            )

    def _start(self, loader: DataLoader[Any]) -> Iterable[Any]:
        generators = [torch.default_generator] + ([loader.generator] if loader.generator is not None else [])
        states = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(self._mixed_seed(1 + self._num_consumed * self.num_replicas + self.rank))
            return iter(loader)
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    def _mixed_seed(self, purpose: int) -> int:
        """One number from seed, epoch and purpose. Odd factors: torch's CPU generator only takes the lower 32 bits."""
        return (self.seed * 0x9E3779B97F4A7C15 + self._epoch * 0xBF58476D1CE4E5B9 + purpose) % 2**63
