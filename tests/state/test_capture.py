"""What goes into a checkpoint."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt.state.capture import as_float, as_int, create_checkpoint, unwrap

REFERENCE_PARAMETERS = [
    *("model", "optimizer", "scheduler", "epoch", "global_step", "train_loss", "val_loss", "val_metrics", "config"),
    "rng_states",
]
REFERENCE_KEYS = {
    *("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "epoch", "global_step", "train_loss"),
    *("val_loss", "val_metrics", "config", "timestamp", "pytorch_version", "rng_states"),
}


def make() -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    return model, torch.optim.Adam(model.parameters())


def test_the_references_parameters_by_position() -> None:
    """The same ten, in the same order."""
    assert list(inspect.signature(create_checkpoint).parameters)[:10] == REFERENCE_PARAMETERS


def test_everything_through_a_file(tmp_path: Path) -> None:
    """The reference's keys, nothing else, all of it taken by a safe load."""
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    checkpoint = create_checkpoint(
        model, optimizer, scheduler, 3, 40, 0.5, 0.25, {"accuracy": numpy.float32(0.5)}, {"lr": 0.1}
    )
    asyncckpt.save(checkpoint, tmp_path / "a.pt").result()
    loaded = asyncckpt.load(tmp_path / "a.pt")
    assert set(loaded) == REFERENCE_KEYS
    assert torch.equal(loaded["model_state_dict"]["weight"], model.weight)
    assert (loaded["epoch"], loaded["global_step"], loaded["train_loss"], loaded["val_loss"]) == (3, 40, 0.5, 0.25)
    assert loaded["val_metrics"] == {"accuracy": 0.5}
    assert loaded["config"] == {"lr": 0.1}
    assert loaded["scheduler_state_dict"] == scheduler.state_dict()
    assert datetime.fromisoformat(loaded["timestamp"]).utcoffset() == timedelta(0)
    assert type(checkpoint["pytorch_version"]) is str


def test_what_is_left_out() -> None:
    """Without optimizer and scheduler, without metrics, without random states."""
    checkpoint = create_checkpoint(nn.Linear(1, 1), None, save_rng=False)
    assert set(checkpoint) == REFERENCE_KEYS - {"optimizer_state_dict", "rng_states"}
    assert checkpoint["scheduler_state_dict"] is None
    assert (checkpoint["config"], checkpoint["val_metrics"], checkpoint["val_loss"]) == ({}, {}, None)


def test_what_is_added() -> None:
    """Extra and stateful parts when given; random states as given, even with save_rng=False."""
    generator = torch.Generator()
    checkpoint = create_checkpoint(
        nn.Linear(1, 1), None, rng_states={"mine": 1}, extra_state={"a": 1}, stateful={"g": generator}, save_rng=False
    )
    assert checkpoint["rng_states"] == {"mine": 1}
    assert checkpoint["extra_state"] == {"a": 1}
    assert torch.equal(checkpoint["stateful"]["g"], generator.get_state())


def test_tensors_are_the_live_ones() -> None:
    """Copying is what saving is for."""
    model, optimizer = make()
    checkpoint = create_checkpoint(model, optimizer)
    assert checkpoint["model_state_dict"]["weight"].data_ptr() == model.weight.data_ptr()


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Scaled(Wrapper):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.scale = nn.Parameter(torch.ones(1))


class TwoHeads(Wrapper):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.head = nn.Linear(1, 1)


class WithExtraState(Wrapper):
    def get_extra_state(self) -> int:
        return 1


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        nn.DataParallel,
        compiled,
        Wrapper,
        lambda model: compiled(nn.DataParallel(model)),
        lambda model: nn.DataParallel(compiled(model)),
        lambda model: compiled(Wrapper(nn.DataParallel(compiled(model)))),
    ],
)
def test_wrappers_come_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """In any order; the model itself is left."""
    model = nn.Linear(1, 1)
    assert unwrap(wrap(model)) is model


@pytest.mark.parametrize("kind", [Scaled, TwoHeads, WithExtraState, torch.optim.swa_utils.AveragedModel])
def test_what_has_a_state_of_its_own_is_no_wrapper(kind: Callable[[nn.Module], nn.Module]) -> None:
    """Its parameters, buffers, other children or extra state would be lost."""
    model = kind(nn.Linear(1, 1))
    assert unwrap(model) is model


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (torch.tensor(3), 3),
        (torch.tensor([[3]]), 3),
        (numpy.int64(3), 3),
        (numpy.array([3], dtype="uint8"), 3),
    ],
)
def test_whole_numbers(value: object, expected: int) -> None:
    """Of every kind, as Python's."""
    number = as_int("epoch", value)
    assert number == expected
    assert type(number) is int


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3.0),
        (0.5, 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (nn.Parameter(torch.tensor([0.5])), 0.5),
        (numpy.float32(0.5), 0.5),
        (numpy.array(0.5), 0.5),
        (math.inf, math.inf),
    ],
)
def test_numbers(value: object, expected: float) -> None:
    """Of every kind, as Python's."""
    number = as_float("loss", value)
    assert number == expected
    assert type(number) is float


NOT_NUMBERS = [
    *(True, "3", None, [3], {"a": 3}, 3j, torch.tensor(True), torch.tensor([1, 2]), torch.tensor([])),
    *(numpy.bool_(True), numpy.array([1, 2]), numpy.array([]), numpy.array("a")),
]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0.5, torch.tensor(3.0)], ids=repr)
def test_no_whole_numbers(value: object) -> None:
    """The field is named."""
    with pytest.raises(TypeError, match=r"^epoch must be"):
        as_int("epoch", value)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_no_numbers(value: object) -> None:
    """The field is named."""
    with pytest.raises(TypeError, match=r"^loss must be"):
        as_float("loss", value)
