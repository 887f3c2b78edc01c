"""Overlapped snapshots: what the fence guards, what it does not, and when it steps aside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from asyncckpt import AsyncCheckpointSaver, SaveHandle, TornSnapshotError
from asyncckpt.image import fence
from asyncckpt.storage import system_calls

State = dict[str, Any]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False),
    "sgd fused": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "adam plain": lambda params: torch.optim.Adam(params, foreach=False, fused=False),
    "adamw foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "adamw fused": lambda params: torch.optim.AdamW(params, fused=True),
    "adagrad": lambda params: torch.optim.Adagrad(params),
    "lbfgs": lambda params: torch.optim.LBFGS(params, max_iter=3),
}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 1))


def train_step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    data = torch.randn(8, 20)

    def closure() -> torch.Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss: torch.Tensor = model(data).square().sum()
        loss.backward()
        return loss

    closure()
    for optimizer in optimizers:
        optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()


def state_of(model: nn.Module, *optimizers: torch.optim.Optimizer) -> State:
    return {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from flatten(child, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from flatten(child, f"{path}/{index}")


def copy_of(state: State) -> dict[str, torch.Tensor]:
    return {path: tensor.detach().clone() for path, tensor in flatten(state)}


def assert_saved(handle: SaveHandle, expected: dict[str, torch.Tensor]) -> None:
    saved = dict(flatten(torch.load(handle.result(60).filepath, weights_only=True)))
    assert saved.keys() == expected.keys()
    for path, tensor in expected.items():
        assert torch.equal(saved[path], tensor), path


@pytest.fixture
def saver() -> Iterator[AsyncCheckpointSaver]:
    with AsyncCheckpointSaver(snapshot="overlap") as saver:
        yield saver


@contextmanager
def staging_held(saver: AsyncCheckpointSaver) -> Iterator[threading.Event]:
    """Keeps the staging thread from starting until the event is set."""
    gate = threading.Event()
    saver._stagers.put(gate.wait)
    try:
        yield gate
    finally:
        gate.set()


def hold_at_fsync(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """The first event is set when all is staged and written, the second lets the save go on to its commit."""
    written, gate = threading.Event(), threading.Event()
    fsync = system_calls.fsync

    def held(fd: int) -> None:
        written.set()
        assert gate.wait(60)
        fsync(fd)

    monkeypatch.setattr(system_calls, "fsync", held)
    return written, gate


class Probe:
    """Opens the gate once training has arrived at the fence, so that nothing depends on time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
        self.num_holds = 0
        hold = fence.LateStaging.hold

        def counted(staging: fence.LateStaging) -> None:
            self.num_holds += 1
            gate.set()
            hold(staging)

        monkeypatch.setattr(fence.LateStaging, "hold", counted)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_neither_forward_nor_step_changes_the_file(
    name: str, saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(2):
        train_step(model, optimizer)
    state = state_of(model, optimizer)
    expected = copy_of(state)
    with staging_held(saver) as gate:
        probe = Probe(monkeypatch, gate)
        handle = saver.save(state, tmp_path / "a.pt", optimizers=[optimizer], modules=[model])
        assert not handle.staged
        train_step(model, optimizer)  # forward writes the BatchNorm buffers, step everything else
        assert probe.num_holds >= 1
        assert handle.wait_staged(60)
    changed = copy_of(state_of(model, optimizer))
    assert any(not torch.equal(changed[path], tensor) for path, tensor in expected.items())
    assert_saved(handle, expected)


def test_only_what_the_optimizer_owns_is_late(saver: AsyncCheckpointSaver, tmp_path: Path) -> None:
    """Buffers, averaged weights, frozen weights and views of anything else are copied before save() returns."""
    model = make_model()
    frozen = nn.Linear(3, 3)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer)
    state = {**state_of(model, optimizer), "average": average, "frozen": frozen.state_dict()}
    expected = copy_of(state)
    with staging_held(saver):
        handle = saver.save(state, tmp_path / "a.pt", optimizers=[optimizer])
        for tensor in (*average.values(), *frozen.state_dict().values(), *model.buffers()):
            tensor.fill_(77)
        assert not handle.staged
    assert_saved(handle, expected)


def test_a_storage_shared_with_something_else_is_not_late(saver: AsyncCheckpointSaver, tmp_path: Path) -> None:
    flat = torch.zeros(10)
    weight = nn.Parameter(flat[:5])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with staging_held(saver):
        handle = saver.save({"weight": weight, "rest": flat[5:]}, tmp_path / "a.pt", optimizers=[optimizer])
        assert handle.staged
        flat.fill_(9)
    assert torch.equal(torch.load(handle.result().filepath)["rest"], torch.zeros(5))


def test_several_optimizers_wait_each_for_their_own(
    saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GAN's other optimizer passes the fence; the two that are being staged do not."""
    models = [make_model() for _ in range(3)]
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train_step(model, optimizer)
    state = [state_of(models[0], optimizers[0]), state_of(models[1], optimizers[1])]
    expected = copy_of({"state": state})
    with staging_held(saver) as gate:
        probe = Probe(monkeypatch, gate)
        handle = saver.save({"state": state}, tmp_path / "a.pt", optimizers=optimizers[:2])
        train_step(models[2], optimizers[2])
        assert probe.num_holds == 0
        train_step(models[1], optimizers[1])
        assert probe.num_holds == 1
        train_step(models[0], optimizers[0])
    assert_saved(handle, expected)


def test_gradient_accumulation_and_skipped_steps(
    saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward passes without a step, and GradScaler's skipped ones, need no fence; the next real step does."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    train_step(model, optimizer)
    state = {**state_of(model, optimizer), "scaler": scaler.state_dict()}
    expected = copy_of(state)

    def scaled_step(factor: float) -> None:
        optimizer.zero_grad()
        for _ in range(2):
            scaler.scale(model(torch.randn(8, 20)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    scaled_step(1.0)
    expected = copy_of(state := {**state_of(model, optimizer), "scaler": scaler.state_dict()})
    with staging_held(saver) as gate:
        probe = Probe(monkeypatch, gate)
        handle = saver.save(state, tmp_path / "a.pt", optimizers=[optimizer])
        scaled_step(float("inf"))
        assert probe.num_holds == 0
        scaled_step(1.0)
        assert probe.num_holds == 1
    assert_saved(handle, expected)


@pytest.mark.filterwarnings("default::DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("hooked_before", [True, False])
def test_a_compiled_step_stops_at_the_fence(
    hooked_before: bool, saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it was compiled before the first overlapped save put the fence up."""
    torch._dynamo.reset()
    if not hooked_before:
        _global_optimizer_pre_hooks.clear()
        monkeypatch.setattr(fence, "_step_is_hooked", False)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 20)).sum().backward()
        compiled()

    for _ in range(3):
        step()
    state = state_of(model, optimizer)
    expected = copy_of(state)
    with staging_held(saver) as gate:
        probe = Probe(monkeypatch, gate)
        handle = saver.save(state, tmp_path / "a.pt", optimizers=[optimizer])
        step()
        assert probe.num_holds == 1
    assert_saved(handle, expected)


def test_wrapped_optimizers_are_fenced(
    saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Accelerate wraps them: a subclass that delegates, whose own step has no hooks."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups, self.state = optimizer.param_groups, optimizer.state

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.optimizer.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad(set_to_none)

        def __hash__(self) -> int:
            return id(self)

        def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
            return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer)
    wrapper = Wrapper(optimizer)
    state = state_of(model, optimizer)
    expected = copy_of(state)
    with staging_held(saver) as gate:
        probe = Probe(monkeypatch, gate)
        handle = saver.save(state, tmp_path / "a.pt", optimizers=[wrapper])
        assert not handle.staged
        train_step(model, wrapper)
        assert probe.num_holds == 1
    assert_saved(handle, expected)


@pytest.mark.parametrize("target", ["model", "optimizer"])
def test_load_state_dict_stops_at_the_fence(
    target: str, saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer)
    state = state_of(model, optimizer)
    expected = copy_of(state)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    with staging_held(saver) as gate:
        probe = Probe(monkeypatch, gate)
        handle = saver.save(state, tmp_path / "a.pt", optimizers=[optimizer], modules=[model])
        if target == "model":
            model.load_state_dict(zeros)
        else:
            optimizer.load_state_dict(optimizer.state_dict())
        assert probe.num_holds == 1
    assert_saved(handle, expected)


def test_a_write_that_no_fence_sees_fails_the_save(saver: AsyncCheckpointSaver, tmp_path: Path) -> None:
    """Loudly, and the file that was there stays."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    saver.save({"old": 1}, tmp_path / "a.pt").result()
    with staging_held(saver):
        handle = saver.save(state_of(model, optimizer), tmp_path / "a.pt", optimizers=[optimizer])
        with torch.no_grad():
            next(model.parameters()).mul_(2)
    assert isinstance(handle.exception(60), TornSnapshotError)
    assert torch.load(tmp_path / "a.pt") == {"old": 1}


def test_wait_staged_makes_other_writers_safe(saver: AsyncCheckpointSaver, tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    expected = copy_of(state := state_of(model, optimizer))
    handle = saver.save(state, tmp_path / "a.pt", optimizers=[optimizer])
    assert handle.wait_staged(60)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_saved(handle, expected)


class Unhooked:
    """An optimizer-like class of somebody's own."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params)}]
        self.state: dict[Any, Any] = {}

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(1)


@pytest.mark.parametrize(
    ("reason", "make_optimizer", "make_extra"),
    [
        ("has no step hooks", Unhooked, None),
        ("is capturable", lambda params: torch.optim.Adam(params, capturable=True), None),
        ("has max_norm", torch.optim.SGD, lambda: nn.Embedding(4, 4, max_norm=1.0)),
    ],
)
def test_what_the_fence_cannot_guard_is_copied_at_once(
    reason: str, make_optimizer: Any, make_extra: Any, saver: AsyncCheckpointSaver, tmp_path: Path
) -> None:
    model = make_model()
    if make_extra is not None:
        model.append(make_extra())
    optimizer = make_optimizer(model.parameters())
    with staging_held(saver), pytest.warns(UserWarning, match=f"fell back to 'copy'.*{reason}"):
        handle = saver.save(model.state_dict(), tmp_path / "a.pt", optimizers=[optimizer], modules=[model])
        assert handle.staged


def test_a_save_inside_a_step_is_copied_at_once(saver: AsyncCheckpointSaver, tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    handles: list[SaveHandle] = []
    expected: list[dict[str, torch.Tensor]] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.ones(8, 20)).square().sum()
        loss.backward()
        if not handles:
            expected.append(copy_of(state := state_of(model)))
            handles.append(saver.save(state, tmp_path / "a.pt", optimizers=[optimizer]))
            assert handles[0].staged
        return loss

    with pytest.warns(UserWarning, match=r"inside optimizer\.step"):
        optimizer.step(closure)
    assert_saved(handles[0], expected[0])


def test_an_error_while_staging_opens_the_fence(
    saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())

    def fail(copies: Any) -> None:
        raise MemoryError("no more")

    with staging_held(saver):
        handle = saver.save(state_of(model, optimizer), tmp_path / "a.pt", optimizers=[optimizer])
        monkeypatch.setattr("asyncckpt.image.staging.StorageCopies.copy_host", fail)
    train_step(model, optimizer)
    assert isinstance(handle.exception(60), MemoryError)
    assert not (tmp_path / "a.pt").exists()


def test_what_only_a_wrapper_owns_is_not_late(saver: AsyncCheckpointSaver, tmp_path: Path) -> None:
    """A mixed-precision wrapper steps float32 masters, then writes the saved parameters by itself."""
    weight = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    master = nn.Parameter(weight.detach().float())

    class Wrapper:
        def __init__(self) -> None:
            self.optimizer = torch.optim.SGD([master], lr=1.0)
            self.param_groups = [{"params": [weight]}]
            self.state: dict[Any, Any] = {}

        def step(self) -> None:
            self.optimizer.step()
            weight.data.copy_(master)

    wrapper = Wrapper()
    master.grad = torch.ones(1000)
    with staging_held(saver) as gate:
        handle = saver.save({"weight": weight, "master": master}, tmp_path / "a.pt", optimizers=[wrapper])
        gate.set()
        wrapper.step()
    loaded = torch.load(handle.result(60).filepath, weights_only=True)
    assert torch.all(loaded["weight"] == 0)
    assert torch.all(loaded["master"] == 0)


def test_a_write_that_ends_after_the_copy_fails_the_save(
    saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operation bumps the version when it ends: the last look is taken just before the commit."""
    weight = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    written, gate = hold_at_fsync(monkeypatch)
    handle = saver.save({"weight": weight.detach()}, tmp_path / "a.pt", optimizers=[optimizer])
    assert written.wait(60)  # staged, checked and written, but nobody was told that it is staged
    with torch.no_grad():
        weight.add_(1)
    gate.set()
    assert isinstance(handle.exception(60), TornSnapshotError)
    assert not (tmp_path / "a.pt").exists()


def test_a_step_between_staging_and_commit_is_no_tear(
    saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer)
    expected = copy_of(state := state_of(model, optimizer))
    written, gate = hold_at_fsync(monkeypatch)
    handle = saver.save(state, tmp_path / "a.pt", optimizers=[optimizer])
    assert written.wait(60)
    train_step(model, optimizer)
    gate.set()
    assert_saved(handle, expected)
    assert not fence._pending


def test_a_storage_that_shrinks_is_not_read(saver: AsyncCheckpointSaver, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.zeros(10_000_000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with staging_held(saver):
        handle = saver.save({"weight": weight}, tmp_path / "a.pt", optimizers=[optimizer])
        weight.untyped_storage().resize_(0)
    assert isinstance(handle.exception(60), TornSnapshotError)


def test_an_interrupt_while_the_fence_is_put_up(
    saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later steps must not wait for a snapshot that nobody takes, and its memory comes back."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    stand = fence.LateStaging.stand

    def interrupted(staging: fence.LateStaging) -> None:
        stand(staging)
        raise KeyboardInterrupt

    monkeypatch.setattr(fence.LateStaging, "stand", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saver.save(state_of(model, optimizer), tmp_path / "a.pt", optimizers=[optimizer])
    train_step(model, optimizer)
    assert not fence._pending
    assert not saver._snapshots._pool._lent
