"""After a restore nothing maps the file, whatever was restored; what shared memory still does."""

from __future__ import annotations

import gc
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import asyncckpt
from asyncckpt import CheckpointManager, UnsafeCheckpointError
from asyncckpt.state.stateful import cloned


class Mixed(torch.optim.SGD):
    """Keeps a float32 copy of each parameter, whatever the parameter's own type is."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("master", parameter.detach().float())
        return super().step(closure)


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3]),
    "SequentialLR": sequential,
}


class Run:
    def __init__(self, schedule: str, dtype: torch.dtype) -> None:
        self.model = nn.Linear(8, 8).to(dtype)
        self.optimizer = Mixed(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = SCHEDULERS[schedule](self.optimizer)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)

    def step(self) -> float:
        self.model(torch.ones(1, 8, dtype=self.model.weight.dtype)).square().sum().backward()
        self.optimizer.step()
        self.scheduler.step(*[1.0] * isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau))
        self.average.update_parameters(self.model)
        return float(self.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_nothing_maps_the_file(schedule: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Schedules go on as they would have, an averaged model comes along, and the file's space can be freed."""
    run, resumed = Run(schedule, dtype), Run(schedule, dtype)
    run.step()
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(run.model, run.optimizer, 1, 1, 0.5, 0.5, scheduler=run.scheduler, stateful={"ema": run.average})
        manager.wait(60)
        _, checkpoint = manager.load_latest(
            resumed.model, resumed.optimizer, resumed.scheduler, stateful={"ema": resumed.average}
        )
        assert str(tmp_path) in Path("/proc/self/maps").read_text()  # else the next check could not fail
        del checkpoint
        gc.collect()
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    torch.testing.assert_close(resumed.average.state_dict(), run.average.state_dict(), rtol=0, atol=0)
    assert resumed.scheduler.state_dict() == run.scheduler.state_dict()
    assert "master" in resumed.optimizer.state[resumed.model.weight]
    assert [resumed.step() for _ in range(4)] == [run.step() for _ in range(4)]


class Unsafe:
    """Keeps a class in its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"kinds": [Counter, Unsafe]}

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError("never saved")


def test_an_unsafe_state_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    """With its place in the checkpoint; nothing is written."""
    run = Run("MultiStepLR", torch.float32)
    with CheckpointManager(tmp_path / "run") as manager:
        with pytest.raises(UnsafeCheckpointError, match=r"stateful\.loader\.kinds\[1\] refers to"):
            manager.save(run.model, run.optimizer, 1, 1, stateful={"loader": Unsafe()})
        assert manager.list_checkpoints() == []


def test_views_of_one_storage_still_share_it(tmp_path: Path) -> None:
    """A flat buffer and the views that write to it, as flattened optimizers keep them."""
    flat = torch.arange(6.0)
    asyncckpt.save({"flat": flat, "views": [flat[:3], flat.view(2, 3).t()]}, tmp_path / "a.pt").result()
    loaded = asyncckpt.load(tmp_path / "a.pt")
    copy = cloned(loaded)
    copy["views"][0].mul_(10)
    assert copy["flat"].tolist() == [0, 10, 20, 3, 4, 5]
    assert copy["views"][1].tolist() == [[0, 3], [10, 4], [20, 5]]
    assert loaded["flat"].tolist() == [0, 1, 2, 3, 4, 5]


def test_shared_state_of_an_optimizer_stays_shared(tmp_path: Path) -> None:
    """Through the whole of save and restore."""
    model = nn.Linear(2, 2)
    saved, restored = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    flat = torch.arange(6.0)
    for parameter, part in zip(model.parameters(), (flat[:4].view(2, 2), flat[4:]), strict=True):
        saved.state[parameter] = {"part": part, "flat": flat}
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(model, saved, 1, 1)
        manager.wait(60)
        manager.load_latest(model, restored)
    weight, bias = (restored.state[parameter] for parameter in model.parameters())
    weight["part"].zero_()
    bias["part"].fill_(9)
    assert weight["flat"].tolist() == bias["flat"].tolist() == [0, 0, 0, 0, 9, 9]


def with_metadata() -> Any:
    weights: Any = nn.BatchNorm1d(2).state_dict()
    assert weights._metadata
    return weights


@pytest.mark.parametrize(
    "value",
    [with_metadata(), Counter({1: 2}), defaultdict(list, a=[torch.ones(1)]), OrderedDict(a=torch.ones(1))],
    ids=["of a module", "Counter", "defaultdict", "OrderedDict"],
)
def test_dictionaries_keep_their_kind_and_attributes(value: Any) -> None:
    """A module's state carries its versions in one."""
    copy = cloned(value)
    assert type(copy) is type(value)
    torch.testing.assert_close(dict(copy), dict(value), rtol=0, atol=0)
    assert getattr(copy, "_metadata", None) == getattr(value, "_metadata", None)
    assert getattr(copy, "default_factory", None) == getattr(value, "default_factory", None)
