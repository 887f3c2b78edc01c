"""Restoring: exact continuation, all or nothing, and no memory shared with the checkpoint's file."""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import asyncckpt
from asyncckpt import CheckpointError
from asyncckpt.state.capture import create_checkpoint
from asyncckpt.state.restore import restore_checkpoint
from asyncckpt.state.sampler import ResumableSampler
from asyncckpt.state.stateful import storages_of


@pytest.fixture(autouse=True)
def leave_generators_as_they_were() -> Iterator[None]:
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    numpy.random.set_state(before[1])
    torch.set_rng_state(before[2])


def through_file(state: Any, path: Path) -> Any:
    asyncckpt.save(state, path).result()
    return asyncckpt.load(path)


class Training:
    """A model with dropout and BatchNorm, Adam, a schedule, and data in an order of its own from workers."""

    def __init__(self, seed: int, num_workers: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)
        items = torch.arange(32.0).view(8, 4) / 32
        self.sampler = ResumableSampler(8, 3, seed=seed)
        self.loader: DataLoader[Any] = DataLoader(
            TensorDataset(items), batch_sampler=self.sampler, num_workers=num_workers
        )
        self.noise = numpy.random.default_rng(seed)

    @property
    def stateful(self) -> dict[str, Any]:
        return {"sampler": self.sampler, "noise": self.noise}

    def step(self, inputs: torch.Tensor) -> float:
        noise = self.noise.normal() + random.random() + numpy.random.rand()
        loss: torch.Tensor = (self.model(inputs) + noise).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def train(self, num_steps: int) -> list[float]:
        losses: list[float] = []
        while True:
            for (inputs,) in self.sampler.batches(self.loader):
                losses.append(self.step(inputs))
                if len(losses) == num_steps:
                    return losses

    def checkpoint(self) -> dict[str, Any]:
        return create_checkpoint(self.model, self.optimizer, self.scheduler, stateful=self.stateful)

    def restore(self, checkpoint: Any, **options: Any) -> None:
        restore_checkpoint(checkpoint, self.model, self.optimizer, self.scheduler, stateful=self.stateful, **options)


def state_of(training: Training) -> Any:
    return [training.model.state_dict(), training.optimizer.state_dict(), training.scheduler.state_dict()]


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_goes_on_bit_for_bit(num_workers: int, tmp_path: Path) -> None:
    """Five steps, a checkpoint, five more; new objects with other seeds, restored: the same five."""
    training = Training(0, num_workers)
    training.train(5)  # in the middle of the second epoch
    asyncckpt.save(training.checkpoint(), tmp_path / "a.pt").result()
    expected = training.train(5)

    resumed = Training(1, num_workers)
    resumed.train(3)
    resumed.restore(asyncckpt.load(tmp_path / "a.pt"))
    assert resumed.train(5) == expected
    assert_equal(state_of(resumed)[:2], state_of(training)[:2])
    assert resumed.scheduler.state_dict() == training.scheduler.state_dict()


def test_random_numbers_can_be_left_alone() -> None:
    """With restore_rng=False."""
    training = Training(0)
    checkpoint = training.checkpoint()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    training.restore(checkpoint, restore_rng=False)
    assert torch.equal(torch.get_rng_state(), state)
    training.restore(checkpoint)
    assert not torch.equal(torch.get_rng_state(), state)


# --- no memory of the file ---


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, max_iter=3, history_size=3)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "Adam foreach": lambda parameters: torch.optim.Adam(parameters, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "Adam, lr a tensor": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01)),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "LBFGS": lbfgs,
}


def make(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    return model, OPTIMIZERS[kind](model.parameters())


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inputs = torch.linspace(-1, 1, 32).view(4, 8).to(next(model.parameters()).dtype)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(inputs).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_is_as_torch_loads_it_and_keeps_nothing_of_the_file(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The same tensors, types and next step as by torch.load and load_state_dict, in memory of its own."""
    model, optimizer = make(kind, dtype)
    for _ in range(3):
        step(model, optimizer)
    checkpoint = through_file(create_checkpoint(model, optimizer), tmp_path / "a.pt")

    by_torch, its_optimizer = make(kind, dtype, seed=1)
    plain = torch.load(tmp_path / "a.pt", weights_only=True)
    by_torch.load_state_dict(plain["model_state_dict"])
    its_optimizer.load_state_dict(plain["optimizer_state_dict"])

    restored, own = make(kind, dtype, seed=2)
    restore_checkpoint(checkpoint, restored, own)
    assert_equal(own.state_dict(), its_optimizer.state_dict())
    kept = [list(own.state.values()), own.param_groups, restored.state_dict()]
    assert storages_of(kept)
    assert not storages_of(kept) & storages_of(checkpoint)

    before = torch.load(tmp_path / "a.pt", weights_only=True)
    step(restored, own)
    step(by_torch, its_optimizer)
    assert_equal(restored.state_dict(), by_torch.state_dict())
    assert_equal(checkpoint["optimizer_state_dict"], before["optimizer_state_dict"])


def test_state_of_another_type_than_the_parameter(tmp_path: Path) -> None:
    """Saved in float32, loaded for bfloat16 parameters: cast as torch does, `step` left as it is."""
    model, optimizer = make("Adam")
    step(model, optimizer)
    checkpoint = through_file(create_checkpoint(model, optimizer), tmp_path / "a.pt")
    half, its_optimizer = make("Adam", torch.bfloat16)
    restore_checkpoint(checkpoint, half, its_optimizer)
    state = its_optimizer.state[next(half.parameters())]
    assert (state["exp_avg"].dtype, state["step"].dtype) == (torch.bfloat16, torch.float32)
    assert not storages_of(dict(its_optimizer.state)) & storages_of(checkpoint)


class Careless(torch.optim.SGD):
    """Keeps the whole state that it is given, as an optimizer with a load_state_dict of its own may."""

    given: Any = None

    def load_state_dict(self, state_dict: Any) -> None:
        self.given = state_dict
        super().load_state_dict(state_dict)


def test_an_optimizer_with_a_load_of_its_own(tmp_path: Path) -> None:
    """It never sees the file's memory."""
    model, _ = make("SGD")
    optimizer = Careless(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    checkpoint = through_file(create_checkpoint(model, optimizer), tmp_path / "a.pt")
    restore_checkpoint(checkpoint, model, optimizer)
    assert storages_of(optimizer.given)
    assert not storages_of([optimizer.given, dict(optimizer.state)]) & storages_of(checkpoint)


class Keeper:
    kept: Any = None

    def state_dict(self) -> Any:
        return {"deep": [torch.ones(3)]}

    def load_state_dict(self, state: Any) -> None:
        self.kept = state


class WithExtraState(nn.Linear):
    extra: Any = None

    def get_extra_state(self) -> Any:
        return {"seen": torch.ones(3)}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_nor_do_scheduler_stateful_objects_and_extra_state_keep_any(tmp_path: Path) -> None:
    """They may keep what they are given."""
    model, scheduler, keeper = WithExtraState(2, 2), Keeper(), Keeper()
    state = create_checkpoint(model, None, scheduler, stateful={"keeper": keeper})
    checkpoint = through_file(state, tmp_path / "a.pt")
    restore_checkpoint(checkpoint, model, scheduler=scheduler, stateful={"keeper": keeper})
    kept = [model.extra, scheduler.kept, keeper.kept]
    assert len(storages_of(kept)) == 3
    assert not storages_of(kept) & storages_of(checkpoint)


# --- all or nothing ---


def without(*keys: str) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: [checkpoint.pop(key) for key in keys]


def change_weights(**changes: Any) -> Callable[[dict[str, Any]], object]:
    """None takes a key away; dots are written as underscores twice."""

    def change(checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["model_state_dict"] = OrderedDict(checkpoint["model_state_dict"])
        for name, value in changes.items():
            key = name.replace("__", ".")
            weights.pop(key, None)
            if value is not None:
                weights[key] = value

    return change


def split_groups(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["optimizer_state_dict"]
    (group,) = state["param_groups"]
    groups = [{**group, "params": group["params"][:1]}, {**group, "params": group["params"][1:]}]
    checkpoint["optimizer_state_dict"] = {**state, "param_groups": groups}


def drop_parameter(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["optimizer_state_dict"]
    (group,) = state["param_groups"]
    checkpoint["optimizer_state_dict"] = {**state, "param_groups": [{**group, "params": group["params"][1:]}]}


MISFITS = {
    "no model": (without("model_state_dict"), "no model_state_dict"),
    "no optimizer": (without("optimizer_state_dict"), "no optimizer_state_dict"),
    "no scheduler": (without("scheduler_state_dict"), "no scheduler_state_dict"),
    "scheduler None": (lambda checkpoint: checkpoint.update(scheduler_state_dict=None), "no scheduler_state_dict"),
    "no stateful": (without("stateful"), r"no state for sampler, noise \(it has: none\)"),
    "stateful name": (
        lambda checkpoint: checkpoint.update(stateful={"sampler": checkpoint["stateful"]["sampler"]}),
        r"no state for noise \(it has: sampler\)",
    ),
    "missing key": (change_weights(**{"0__weight": None}), r"lacks the model's 0\.weight"),
    "other key": (change_weights(head=torch.ones(1)), r"has more than the model: head"),
    "shape": (change_weights(**{"3__bias": torch.ones(2)}), r"other shapes for 3\.bias \(\(2,\) saved, \(1,\) here\)"),
}
MISFITS_OF_OPTIMIZER: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "groups": (split_groups, r"2 parameter groups of \[1, 5\] parameters, this one 1 of \[6\]"),
    "parameters": (drop_parameter, r"1 parameter groups of \[5\] parameters, this one 1 of \[6\]"),
}


def fingerprint(training: Training) -> Any:
    generators = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    states = [*state_of(training), training.sampler.state_dict(), training.noise.bit_generator.state]
    return generators, repr(states)


@pytest.mark.parametrize("name", [*MISFITS, *MISFITS_OF_OPTIMIZER])
def test_what_does_not_fit_changes_nothing(name: str) -> None:
    """The error names what is missing or different."""
    trained, fresh = Training(0), Training(1)
    trained.train(2)
    checkpoint = trained.checkpoint()
    spoil, message = {**MISFITS, **MISFITS_OF_OPTIMIZER}[name]
    spoil(checkpoint)
    before = fingerprint(fresh)
    with pytest.raises(CheckpointError, match=message):
        fresh.restore(checkpoint)
    assert fingerprint(fresh) == before


def test_an_object_without_a_state_changes_nothing() -> None:
    """It is found before anything is restored."""
    trained, fresh = Training(0), Training(1)
    before = fingerprint(fresh)
    with pytest.raises(TypeError, match="loader"):
        restore_checkpoint(trained.checkpoint(), fresh.model, stateful={"sampler": fresh.sampler, "loader": [1]})
    assert fingerprint(fresh) == before


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_left_out_if_not_strict(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """One warning in the log; all the rest is restored."""
    trained, fresh = Training(0), Training(1)
    trained.train(2)
    checkpoint = trained.checkpoint()
    spoil, _ = MISFITS[name]
    spoil(checkpoint)
    untouched = {key: value.clone() for key, value in fresh.model.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="asyncckpt"):
        fresh.restore(checkpoint, strict=False)
    assert len(caplog.records) == 1

    weights = checkpoint.get("model_state_dict", {})
    for key, value in fresh.model.state_dict().items():
        fits = key in weights and weights[key].shape == value.shape
        assert torch.equal(value, weights[key] if fits else untouched[key])
    assert (len(fresh.optimizer.state) == 6) == (checkpoint.get("optimizer_state_dict") is not None)
    assert fresh.scheduler.last_epoch == (2 if checkpoint.get("scheduler_state_dict") else 0)
    assert fresh.sampler.num_consumed == (2 if "stateful" in checkpoint else 0)
    assert torch.equal(torch.get_rng_state(), checkpoint["rng_states"]["torch"])


def test_an_optimizer_with_other_groups_is_an_error_all_the_same() -> None:
    """There is no part of it that would fit."""
    checkpoint = Training(0).checkpoint()
    split_groups(checkpoint)
    with pytest.raises(CheckpointError, match="parameter groups"):
        Training(1).restore(checkpoint, strict=False)


def test_many_keys_are_summed_up() -> None:
    """Not a page of them."""
    wide = nn.ModuleList(nn.Linear(1, 1) for _ in range(10))
    with pytest.raises(CheckpointError, match=r"0\.weight, .* and 15 more"):
        restore_checkpoint({"model_state_dict": {}}, wide)


# --- models of all kinds ---


class Growing(nn.Module):
    """A buffer that takes whatever size was saved, as observers and metrics do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("seen", torch.arange(float(size)))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        self.seen = torch.empty_like(state_dict[f"{prefix}seen"])
        super()._load_from_state_dict(state_dict, prefix, *others)


@pytest.mark.parametrize("strict", [True, False])
def test_modules_that_load_by_code_of_their_own_may_take_other_shapes(strict: bool, tmp_path: Path) -> None:
    """What such a model saves, it can load."""
    saved, fresh = nn.Sequential(Growing(5), nn.Linear(1, 1)), nn.Sequential(Growing(0), nn.Linear(1, 1))
    restore_checkpoint(through_file(create_checkpoint(saved, None), tmp_path / "a.pt"), fresh, strict=strict)
    assert_equal(fresh.state_dict(), saved.state_dict())


def test_they_may_beside_what_does_not_fit() -> None:
    """With strict=False the misfit elsewhere does not keep them from it."""
    saved, fresh = nn.Sequential(Growing(5), nn.Linear(1, 1)), nn.Sequential(Growing(0), nn.Linear(1, 2))
    restore_checkpoint(create_checkpoint(saved, None), fresh, strict=False)
    assert torch.equal(fresh.state_dict()["0.seen"], torch.arange(5.0))


def test_a_lazy_module_takes_its_shape(tmp_path: Path) -> None:
    """It has none to compare yet."""
    saved, lazy = nn.Linear(3, 2), nn.LazyLinear(2)
    checkpoint = through_file(create_checkpoint(saved, None), tmp_path / "a.pt")
    restore_checkpoint(checkpoint, lazy)
    assert_equal(lazy.state_dict(), saved.state_dict())
    assert not storages_of(lazy.state_dict()) & storages_of(checkpoint)


class Versioned(nn.Linear):
    _version = 7
    found: Any = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *others: Any) -> None:
        self.found = metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, metadata, *others)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_modules_see_the_version_that_saved_them(prefix: str, strict: bool, tmp_path: Path) -> None:
    """Else they would upgrade what is not old, also behind a wrapper's prefix."""
    model: nn.Module = nn.Sequential(Versioned(1, 1))
    for name in reversed(prefix.split(".")[:-1]):
        model = nn.ModuleDict({name: model})
    checkpoint = through_file({"model_state_dict": model.state_dict()}, tmp_path / "a.pt")
    fresh = Versioned(1, 1)
    restore_checkpoint(checkpoint, nn.Sequential(fresh), strict=strict)
    assert fresh.found == 7


@pytest.fixture
def process_group() -> Iterator[None]:
    store = distributed.HashStore()  # type: ignore[attr-defined]  # not in its __all__
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda model: model,
    "DDP": lambda model: nn.parallel.DistributedDataParallel(model),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
    "DDP of compiled": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("loaded", WRAPPERS)
@pytest.mark.parametrize("saved", WRAPPERS)
@pytest.mark.parametrize("by_us", [True, False], ids=["create_checkpoint", "state_dict"])
def test_wrapped_and_plain_models_are_alike(by_us: bool, saved: str, loaded: str, tmp_path: Path) -> None:
    """Saved from one, restored into another, also where somebody else's keys have the wrappers' prefixes."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    wrapped = WRAPPERS[saved](model)
    state = create_checkpoint(wrapped, None) if by_us else {"model_state_dict": wrapped.state_dict()}
    restore_checkpoint(through_file(state, tmp_path / "a.pt"), WRAPPERS[loaded](other))
    assert_equal(other.state_dict(), model.state_dict())


class Pair(nn.Module):
    """All its keys begin with `module.`, and it is no wrapper: its activation is a child as well."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(1, 1)
        self.activation = nn.ReLU()


def test_a_models_own_keys_are_not_taken_for_a_prefix(tmp_path: Path) -> None:
    """`module.` may be the name of a child."""
    saved, fresh = Pair(), Pair()
    restore_checkpoint(through_file(create_checkpoint(saved, None), tmp_path / "a.pt"), fresh)
    assert_equal(fresh.state_dict(), saved.state_dict())


class Noting(nn.Linear):
    """Notes when it is loaded and moved."""

    events: list[str]

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        self.events.append("load")
        return super().load_state_dict(*arguments, **options)

    def to(self, *arguments: Any, **options: Any) -> Any:
        self.events.append(f"to {arguments[0]}")
        return super().to(*arguments, **options)


def test_the_optimizer_is_loaded_when_the_model_is_where_it_belongs() -> None:
    """Its state is put where the parameters are by then."""
    model = Noting(1, 1)
    model.events = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_load_state_dict_post_hook(lambda _: model.events.append("optimizer"))
    restore_checkpoint(create_checkpoint(model, optimizer), model, optimizer, device="cpu")
    assert model.events == ["load", "to cpu", "optimizer"]
