"""The sampler's arguments, and loops that would count each other's batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import asyncckpt
from asyncckpt.state.sampler import ResumableSampler


def make(length: int = 10, batch_size: int = 2, **options: Any) -> tuple[ResumableSampler, DataLoader[Any]]:
    sampler = ResumableSampler(length, batch_size, **options)
    return sampler, DataLoader(torch.arange(length), batch_sampler=sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize("advance", ["a batch", "to the end"])
def test_an_older_loop_may_not_go_on(advance: str) -> None:
    """Its batches would be counted twice; the newer one's position stays right."""
    sampler, loader = make()
    older = sampler.batches(loader)
    for _ in range(1 if advance == "a batch" else len(sampler)):
        next(older)
    newer = [batch.tolist() for batch in sampler.batches(loader)]
    with pytest.raises(RuntimeError, match="another loop"):
        next(older)
    assert len(newer) == (4 if advance == "a batch" else 0)
    assert (sampler.epoch, sampler.num_consumed) == (1, 0)


def test_a_loop_may_not_go_on_from_a_position_that_was_loaded_meanwhile() -> None:
    """After a rollback inside the loop: the next batch would be one of the old position."""
    sampler, loader = make()
    start = sampler.state_dict()
    loop = sampler.batches(loader)
    first = next(loop)
    next(loop)
    sampler.load_state_dict(start)
    with pytest.raises(RuntimeError, match="another position loaded"):
        next(loop)
    assert torch.equal(next(iter(sampler.batches(loader))), first)


def test_a_loop_that_was_not_begun_takes_the_position_it_finds() -> None:
    """Made before the checkpoint was loaded, begun after."""
    sampler, loader = make(shuffle=False)
    loop = sampler.batches(loader)
    sampler.load_state_dict({**sampler.state_dict(), "num_consumed": 3})
    assert [batch.tolist() for batch in loop] == [[6, 7], [8, 9]]


@pytest.mark.parametrize("position", [{"num_consumed": 6}, {"num_consumed": -1}, {"epoch": -1}])
def test_there_are_no_such_positions(position: dict[str, int]) -> None:
    """Refused, and nothing changes."""
    sampler, _ = make()
    before = sampler.state_dict()
    with pytest.raises(ValueError, match="no such position"):
        sampler.load_state_dict({**before, **position})
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"length": True}, TypeError),
        ({"batch_size": True}, TypeError),
        ({"batch_size": 2.0}, TypeError),
        ({"batch_size": "2"}, TypeError),
        ({"seed": True}, TypeError),
        ({"seed": 0.5}, TypeError),
        ({"rank": 0.0, "num_replicas": 1}, TypeError),
        ({"rank": 0, "num_replicas": True}, TypeError),
        ({"length": -3}, ValueError),
        ({"batch_size": -1}, ValueError),
        ({"rank": 0, "num_replicas": 0}, ValueError),
    ],
    ids=str,
)
def test_arguments_that_are_no_such_numbers(arguments: dict[str, Any], error: type[Exception]) -> None:
    """Said at once, with the argument's name or value."""
    with pytest.raises(error, match=r"must be a whole number|no sense|single batch"):
        ResumableSampler(**{"dataset": arguments.pop("length", 10), "batch_size": 2, **arguments})


def test_numbers_of_numpy(tmp_path: Path) -> None:
    """They become Python's: a safe load takes the state, and large seeds do not overflow."""
    plain = ResumableSampler(10, 3, seed=2**62, rank=1, num_replicas=2)
    of_numpy = ResumableSampler(
        numpy.int32(10),
        numpy.int64(3),
        shuffle=numpy.bool_(True),  # type: ignore[arg-type]
        seed=numpy.int64(2**62),
        rank=numpy.int64(1),
        num_replicas=numpy.int64(2),
    )
    assert list(of_numpy) == list(plain)
    asyncckpt.save(of_numpy.state_dict(), tmp_path / "a.pt").result()
    assert asyncckpt.load(tmp_path / "a.pt") == plain.state_dict()


def test_orders_depend_on_seed_and_epoch_alone() -> None:
    """Every pair has an order of its own, the same in any instance, whatever the global generator."""

    def orders() -> list[str]:
        torch.manual_seed(torch.seed())
        found = []
        for seed in range(5):
            sampler, loader = make(40, 40, seed=seed)
            found += [str([batch.tolist() for batch in sampler.batches(loader)]) for _ in range(5)]
        return found

    assert orders() == orders()
    assert len(set(orders())) == 25


class Seeds(Dataset[int]):
    """Shows the seed that workers' own are counted from."""

    def __getitem__(self, _: int) -> int:
        worker = get_worker_info()
        assert worker is not None
        return worker.seed - worker.id


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_of_each_rank_draw_other_numbers() -> None:
    """Augmentation would be the same on all of them."""
    seeds = []
    for rank in range(2):
        sampler = ResumableSampler(8, 2, rank=rank, num_replicas=2)
        loader: DataLoader[Any] = DataLoader(Seeds(), batch_sampler=sampler, num_workers=1)
        seeds.append(int(next(iter(sampler.batches(loader)))[0]))
    assert seeds[0] != seeds[1]
