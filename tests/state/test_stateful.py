"""Objects that keep a state: every kind there and back through a file, and copies that share no memory."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt import CheckpointError
from asyncckpt.state.stateful import capture_stateful, cloned, restore_stateful, storages_of


class Keeper:
    """Keeps whatever it is given, as careless objects do."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def through_file(state: Any, path: Path) -> Any:
    asyncckpt.save(state, path).result()
    return asyncckpt.load(path)


def of_bits(name: str) -> Callable[[int], numpy.random.Generator]:
    return lambda seed: numpy.random.Generator(getattr(numpy.random, name)(seed))


def draw_numpy(generator: Any) -> list[float]:
    return [*generator.normal(size=3).tolist(), *generator.integers(0, 7, size=1, dtype="uint16").tolist()]


def draw_legacy(generator: Any) -> list[float]:
    return generator.normal(size=3).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda seed: torch.Generator().manual_seed(seed), lambda it: torch.rand(3, generator=it).tolist()),
        (random.Random, lambda it: [it.gauss(0, 1), it.random()]),
        *[
            pytest.param(of_bits(name), draw_numpy, id=name)
            for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
        ],
        pytest.param(numpy.random.RandomState, draw_legacy, id="RandomState"),
    ],
)
def test_generators_there_and_back(make: Callable[[int], Any], draw: Callable[[Any], Any], tmp_path: Path) -> None:
    """A safe load takes the state, and another generator goes on exactly where the first one was."""
    saved, other = make(2**31 + 5), make(1)
    draw(saved)  # leaves a cached half of a number behind
    loaded = through_file(capture_stateful({"it": saved}), tmp_path / "state.pt")
    restore_stateful({"it": other}, loaded)
    assert draw(other) == draw(saved)
    assert draw(other) == draw(saved)


def test_a_generator_of_another_kind() -> None:
    """It is named, with both kinds, and left as it was."""
    states = capture_stateful({"order": numpy.random.Generator(numpy.random.MT19937(1))})
    other = numpy.random.default_rng(1)
    with pytest.raises(CheckpointError, match=r"order.*MT19937.*PCG64"):
        restore_stateful({"order": other}, states)
    assert other.random() == numpy.random.default_rng(1).random()


def test_by_methods(tmp_path: Path) -> None:
    """What has state_dict and load_state_dict: here a module."""
    saved, other = nn.Linear(3, 2), nn.Linear(3, 2)
    restore_stateful({"head": other}, through_file(capture_stateful({"head": saved}), tmp_path / "state.pt"))
    assert torch.equal(saved.weight, other.weight)


@pytest.mark.parametrize("act", [capture_stateful, lambda objects: restore_stateful(objects, {"good": 1, "loader": 1})])
def test_what_has_no_state_is_named(act: Callable[[Any], object]) -> None:
    """By its name and type, before anything else is touched."""
    good = Keeper("untouched")
    with pytest.raises(TypeError, match=r"stateful\['loader'\].*: list"):
        act({"good": good, "loader": [1]})
    assert good.state == "untouched"


def test_a_missing_state_is_named_with_those_there_are() -> None:
    """And nothing is changed."""
    present = Keeper("untouched")
    with pytest.raises(CheckpointError, match=r"no state for loader; it has: average, sampler"):
        restore_stateful({"average": present, "loader": Keeper()}, {"average": "new", "sampler": 1})
    assert present.state == "untouched"


def test_a_missing_state_is_a_warning_if_not_strict(caplog: pytest.LogCaptureFixture) -> None:
    """The rest is restored."""
    present, absent = Keeper(), Keeper("untouched")
    restore_stateful({"average": present, "loader": absent}, {"average": "new"}, strict=False)
    assert (present.state, absent.state) == ("new", "untouched")
    assert [record.getMessage() for record in caplog.records if "loader" in record.getMessage()]


def test_what_is_kept_is_not_mapped_from_the_file(tmp_path: Path) -> None:
    """However deep it is, and whatever the object does with it."""
    loaded = through_file({"it": {"deep": [(torch.arange(5),), OrderedDict(a=torch.ones(2))]}}, tmp_path / "state.pt")
    keeper = Keeper()
    restore_stateful({"it": keeper}, loaded)
    assert not storages_of(keeper.state) & storages_of(loaded)
    assert torch.equal(keeper.state["deep"][0][0], torch.arange(5))
    assert type(keeper.state["deep"][1]) is OrderedDict


def expanded() -> torch.Tensor:
    return torch.arange(4.0).expand(3, 4)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).view(2, 3, 4).transpose(0, 2),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.arange(100)[10:20:3],
        expanded(),
        torch.tensor(3.0),
        torch.empty(0, 3),
        torch.arange(4, dtype=torch.bfloat16),
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.tensor([True, False]),
        torch.eye(3).to_sparse(),
        torch.randn(5 << 20),  # 20 MiB: in parts, on threads
        torch.randn(1 << 12, 3 << 10).t(),  # 48 MiB, and no parts
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}-{tensor.layout}",
)
def test_copies_are_equal_and_separate(tensor: torch.Tensor) -> None:
    """Every kind of tensor: the same values and type, in other memory."""
    copy = cloned(tensor)
    assert copy.dtype == tensor.dtype
    assert torch.equal(copy.to_dense(), tensor.to_dense())
    for one, other in zip(parts_of(copy), parts_of(tensor), strict=True):
        assert not one.numel() or one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]


def test_copies_keep_no_graph_and_no_memory_of_the_original() -> None:
    """A parameter stays a parameter, a leaf of its own: a graph would hold on to the mapped file."""
    original = {"weight": nn.Parameter(torch.ones(2)), "leaf": torch.ones(2, requires_grad=True)}
    copy = cloned(original)
    assert type(copy["weight"]) is nn.Parameter
    assert copy["leaf"].requires_grad
    assert all(tensor.is_leaf and tensor.grad_fn is None for tensor in copy.values())


def test_a_tensor_that_is_there_twice_is_copied_once() -> None:
    """Identity survives."""
    tensor = torch.ones(2)
    copy = cloned({"a": tensor, "b": [tensor]})
    assert copy["a"] is copy["b"][0]
    assert copy["a"] is not tensor


def test_only_what_uses_the_given_memory_is_copied() -> None:
    """The rest stays the same object."""
    mapped, own = torch.ones(2), torch.ones(2)
    copy = cloned({"mapped": mapped[1:], "own": own}, only=storages_of([mapped]))
    assert copy["own"] is own
    assert not storages_of(copy["mapped"]) & storages_of(mapped)


def test_copies_made_in_inference_mode_can_be_trained_on() -> None:
    """An inference tensor in an optimizer's state would fail at the first step outside."""
    tensor = torch.ones(2)
    with torch.inference_mode():
        copy = cloned({"a": tensor})["a"]
    assert not copy.is_inference()
