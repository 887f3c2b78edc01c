"""The sampler with a position: what it hands out, and that resuming is exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import asyncckpt
from asyncckpt.state.sampler import ResumableSampler


class Numbers(Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


@pytest.fixture(autouse=True)
def leave_the_generator_as_it_was() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


def make(
    length: int = 23, batch_size: int = 4, *, num_workers: int = 0, persistent_workers: bool = False, **options: Any
) -> tuple[ResumableSampler, DataLoader[Any]]:
    sampler = ResumableSampler(length, batch_size, **options)
    loader: DataLoader[Any] = DataLoader(
        Numbers(length), batch_sampler=sampler, num_workers=num_workers, persistent_workers=persistent_workers
    )
    return sampler, loader


def epoch_of(sampler: ResumableSampler, loader: DataLoader[Any]) -> list[list[int]]:
    return [batch.tolist() for batch in sampler.batches(loader)]


def flat(batches: list[list[int]]) -> list[int]:
    return [item for batch in batches for item in batch]


def test_an_epoch_has_everything_once() -> None:
    """Shuffled, the last batch smaller; then comes the next epoch, in another order."""
    sampler, loader = make()
    first, second = epoch_of(sampler, loader), epoch_of(sampler, loader)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(23))
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 4, 3]
    assert len(sampler) == len(loader) == 6
    assert first != second
    assert flat(first) != list(range(23))
    assert (sampler.epoch, sampler.num_consumed) == (2, 0)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    """Not on the global generator, which it leaves alone; another seed gives another order."""
    torch.manual_seed(1)
    first = epoch_of(*make())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert epoch_of(*make()) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert epoch_of(*make(seed=1)) != first


def test_without_shuffling() -> None:
    """The order of the data set, in every epoch."""
    sampler, loader = make(shuffle=False)
    assert flat(epoch_of(sampler, loader)) == flat(epoch_of(sampler, loader)) == list(range(23))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [20, 23, 24])
def test_replicas_share_evenly(length: int, num_replicas: int, drop_last: bool) -> None:
    """As many batches for each; everything at least once, or, with drop_last, nothing twice and no batch too small."""
    shares = [
        epoch_of(*make(length, 4, rank=rank, num_replicas=num_replicas, drop_last=drop_last))
        for rank in range(num_replicas)
    ]
    assert len({len(share) for share in shares}) == 1
    assert len({tuple(map(len, share)) for share in shares}) == 1
    items = flat([batch for share in shares for batch in share])
    if drop_last:
        assert len(items) == len(set(items))
        assert {len(batch) for share in shares for batch in share} == {4}
        assert length - len(items) < 4 * num_replicas + num_replicas
    else:
        assert set(items) == set(range(length))
        assert len(items) - length < num_replicas


def test_a_dataset_smaller_than_the_replicas() -> None:
    """Items are repeated as often as it takes."""
    assert [epoch_of(*make(2, 1, shuffle=False, rank=rank, num_replicas=5)) for rank in range(5)] == [
        *([[0]], [[1]], [[0]], [[1]], [[0]])
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_count_when_they_are_handed_out(num_workers: int) -> None:
    """Not when workers fetch them ahead."""
    sampler, loader = make(num_workers=num_workers)
    counts = [sampler.num_consumed for _ in sampler.batches(loader)]
    assert counts == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_loop_that_is_left_goes_on_where_it_stopped(num_workers: int, persistent: bool) -> None:
    """Nothing that workers had fetched ahead is lost or comes twice."""
    whole = epoch_of(*make())
    sampler, loader = make(num_workers=num_workers, persistent_workers=persistent)
    seen = []
    for stop in (1, 3, 6):
        for batch in sampler.batches(loader):
            seen.append(batch.tolist())
            if sampler.num_consumed == stop:
                break
    assert seen == whole
    assert (sampler.epoch, sampler.num_consumed) == (0, 6)
    assert epoch_of(sampler, loader) == []  # the body of the last batch may have been cut short: only now it is over
    assert (sampler.epoch, sampler.num_consumed) == (1, 0)


def test_a_plain_loop_iterates_the_rest_and_does_not_count() -> None:
    """For a look at the data."""
    sampler, loader = make()
    next(iter(sampler.batches(loader)))
    rest = [batch.tolist() for batch in loader]
    assert rest == epoch_of(*make())[1:]
    assert sampler.num_consumed == 1


def test_another_loader_is_refused_at_once() -> None:
    """Its batches would be counted as this sampler's."""
    sampler, _ = make()
    _, other = make()
    with pytest.raises(ValueError, match="another batch_sampler"):
        sampler.batches(other)


@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_the_position_travels_through_a_file(stop: int, tmp_path: Path) -> None:
    """Plain numbers; the seed too."""
    sampler, loader = make(seed=7)
    epoch_of(sampler, loader)
    if stop:
        for _ in sampler.batches(loader):
            if sampler.num_consumed == stop:
                break
    assert {type(value) for value in sampler.state_dict().values()} == {int, bool}
    asyncckpt.save(sampler.state_dict(), tmp_path / "a.pt").result()
    resumed, its_loader = make(seed=1)
    resumed.load_state_dict(asyncckpt.load(tmp_path / "a.pt"))
    assert (resumed.epoch, resumed.num_consumed, resumed.seed) == (1, stop, 7)
    assert epoch_of(resumed, its_loader) == epoch_of(sampler, loader)
    assert epoch_of(resumed, its_loader) == epoch_of(sampler, loader)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"length": 24}, "length was 23 and is 24"),
        ({"batch_size": 5}, "batch_size was 4 and is 5"),
        ({"shuffle": False}, "shuffle was True and is False"),
        ({"drop_last": True}, "drop_last was False and is True"),
        ({"num_replicas": 2, "rank": 0}, "num_replicas was 1 and is 2"),
    ],
)
def test_a_position_in_other_batches_is_refused(other: dict[str, Any], named: str) -> None:
    """With the difference; the sampler stays where it is."""
    sampler, loader = make(seed=7)
    next(iter(sampler.batches(loader)))
    different, _ = make(**other)
    with pytest.raises(ValueError, match=named):
        different.load_state_dict(sampler.state_dict())
    assert (different.epoch, different.num_consumed, different.seed) == (0, 0, 0)


def test_other_replicas_from_an_epochs_start_on() -> None:
    """A position between epochs is the same for any number of them."""
    sampler, loader = make()
    epoch_of(sampler, loader)
    resumed, _ = make(rank=1, num_replicas=2)
    resumed.load_state_dict(sampler.state_dict())
    assert (resumed.epoch, resumed.num_consumed) == (1, 0)


@pytest.mark.parametrize("missing", ["epoch", "num_consumed", "seed", "length"])
def test_what_is_no_position_is_refused(missing: str) -> None:
    """What is missing is named."""
    sampler, _ = make()
    state = {name: value for name, value in sampler.state_dict().items() if name != missing}
    with pytest.raises(ValueError, match=missing):
        sampler.load_state_dict(state)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"length": 0},
        {"rank": 2, "num_replicas": 2},
        {"rank": -1, "num_replicas": 2},
        {"length": 3, "drop_last": True},
    ],
)
def test_arguments_that_make_no_batch(arguments: dict[str, Any]) -> None:
    """Said at once."""
    with pytest.raises(ValueError, match=r"no sense|single batch"):
        make(**arguments)


class Seeds(Numbers):
    """Shows what a worker was seeded with."""

    def __getitem__(self, index: int) -> int:
        info = torch.utils.data.get_worker_info()
        return info.seed - info.id if info is not None else -1


def train(sampler: ResumableSampler, loader: DataLoader[Any], num_steps: int) -> list[Any]:
    """Steps of a loop that draws from the global generator, as dropout does, over as many epochs as it takes."""
    steps: list[Any] = []
    while True:
        for batch in sampler.batches(loader):
            steps.append((sampler.epoch, batch.tolist(), torch.rand(2).tolist()))
            if len(steps) == num_steps:
                return steps


@pytest.mark.parametrize("with_generator", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [2, 6, 8])
def test_a_resumed_run_draws_the_same_numbers(stop: int, num_workers: int, with_generator: bool) -> None:
    """Data and the global generator go on bit for bit, though the resumed run starts its loader once more."""

    def make_loader() -> tuple[ResumableSampler, DataLoader[Any]]:
        sampler, loader = make(num_workers=num_workers)
        if with_generator:
            loader.generator = torch.Generator()
        return sampler, loader

    torch.manual_seed(0)
    expected = train(*make_loader(), num_steps=15)

    torch.manual_seed(0)
    sampler, loader = make_loader()
    before = train(sampler, loader, stop)
    position, generator = sampler.state_dict(), torch.get_rng_state()

    torch.manual_seed(99)
    resumed, its_loader = make_loader()
    resumed.load_state_dict(position)
    torch.set_rng_state(generator)
    assert before + train(resumed, its_loader, 15 - stop) == expected


def worker_seed(seed: int, num_epochs: int, num_consumed: int) -> int:
    sampler = ResumableSampler(8, 2, seed=seed)
    loader: DataLoader[Any] = DataLoader(Seeds(8), batch_sampler=sampler, num_workers=1)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": num_epochs, "num_consumed": num_consumed})
    return int(next(iter(sampler.batches(loader)))[0])


def test_a_loaders_own_generator_is_treated_alike() -> None:
    """It decides nothing, and stays as it was: the draw of a resumed run would shift it."""
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    sampler = ResumableSampler(8, 2)
    loader: DataLoader[Any] = DataLoader(Seeds(8), batch_sampler=sampler, num_workers=1, generator=generator)
    assert int(next(iter(sampler.batches(loader)))[0]) == worker_seed(0, 0, 0)
    assert torch.equal(generator.get_state(), state)


def test_workers_are_seeded_by_seed_epoch_and_position() -> None:
    """The same for the same three, whatever the global generator; else different."""
    torch.manual_seed(1)
    first = worker_seed(0, 0, 0)
    torch.manual_seed(2)
    assert worker_seed(0, 0, 0) == first
    assert len({first, worker_seed(1, 0, 0), worker_seed(0, 1, 0), worker_seed(0, 0, 1)}) == 4
