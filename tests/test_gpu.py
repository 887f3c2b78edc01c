"""CUDA: pinned arenas, the side stream, the fence on the device. Runs wherever there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, TornSnapshotError
from asyncckpt.image import fence, staging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["copy", "overlap"])
def saver(request: pytest.FixtureRequest) -> Iterator[AsyncCheckpointSaver]:
    with AsyncCheckpointSaver(snapshot=request.param) as saver:
        yield saver


def make(fused: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 8)).cuda()
    return model, torch.optim.AdamW(model.parameters(), fused=fused)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(64, 512, device="cuda")).square().sum().backward()
    optimizer.step()


def copy_of(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: copy_of(value) for key, value in state.items()}
    if isinstance(state, list):
        return [copy_of(value) for value in state]
    return state


def assert_equal(left: Any, right: Any) -> None:
    if isinstance(right, torch.Tensor):
        assert torch.equal(left.cpu(), right)
    elif isinstance(right, dict):
        assert left.keys() == right.keys()
        for key in right:
            assert_equal(left[key], right[key])
    elif isinstance(right, list):
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


@pytest.mark.parametrize("fused", [False, True])
def test_training_goes_on_and_the_file_is_of_the_moment(
    fused: bool, saver: AsyncCheckpointSaver, tmp_path: Path
) -> None:
    model, optimizer = make(fused)
    for number in range(5):
        train_step(model, optimizer)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        expected = copy_of(state)
        handle = saver.save(state, tmp_path / f"{number}.pt", optimizers=[optimizer], modules=[model])
        for _ in range(3):
            train_step(model, optimizer)
        assert_equal(asyncckpt.load(handle.result(60).filepath), expected)
        assert_equal(torch.load(handle.result().filepath, weights_only=True, map_location="cuda"), expected)


def test_the_fence_does_not_block_the_cpu(tmp_path: Path) -> None:
    """While the device is still busy, save() and the next step are only queued, and the file is right all the same."""
    model, optimizer = make()
    train_step(model, optimizer)
    with AsyncCheckpointSaver(snapshot="overlap") as saver:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        # Adam counts steps on the CPU: with those in the state, the fence has to wait for a thread.
        tensors = dict(model.state_dict())
        saver.save(state, tmp_path / "warm.pt", optimizers=[optimizer]).result()
        expected = copy_of(tensors)
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)
        busy = torch.cuda.Event()
        busy.record()
        handle = saver.save(tensors, tmp_path / "a.pt", optimizers=[optimizer], modules=[model])
        train_step(model, optimizer)
        assert not busy.query()
        assert not handle.staged
        assert_equal(asyncckpt.load(handle.result(60).filepath), expected)


def test_an_unfenced_write_is_noticed(tmp_path: Path) -> None:
    model, optimizer = make()
    with AsyncCheckpointSaver(snapshot="overlap") as saver:
        torch.cuda._sleep(2_000_000_000)
        handle = saver.save(model.state_dict(), tmp_path / "a.pt", optimizers=[optimizer])
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        assert isinstance(handle.exception(60), TornSnapshotError)


def test_memory_freed_while_the_copy_reads_it(tmp_path: Path) -> None:
    with AsyncCheckpointSaver(snapshot="overlap") as saver:
        weight = nn.Parameter(torch.full((50_000_000,), 3.0, device="cuda"))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        handle = saver.save({"weight": weight}, tmp_path / "a.pt", optimizers=[optimizer])
        del weight, optimizer
        other = torch.full((50_000_000,), 5.0, device="cuda")
        assert torch.all(asyncckpt.load(handle.result(60).filepath)["weight"] == 3.0)
        assert torch.all(other == 5.0)


def test_arenas_are_pinned_once_and_let_go(tmp_path: Path) -> None:
    state = {"weights": torch.randn(10_000_000, device="cuda")}
    before = len(staging._registered)
    with AsyncCheckpointSaver() as saver:
        saver.prepare(state)
        assert len(staging._registered) == before + 1
        for _ in range(3):
            saver.save(state, tmp_path / "a.pt").result()
        assert len(staging._registered) == before + 1
    assert len(staging._registered) == before
    assert not fence._pending


def test_streaming_from_the_device(tmp_path: Path) -> None:
    state = {"weights": torch.randn(10_000_000, device="cuda")}
    with AsyncCheckpointSaver(memory_limit=9 << 20) as saver, pytest.warns(UserWarning, match="memory_limit"):
        saver.save(state, tmp_path / "a.pt").result()
    assert_equal(asyncckpt.load(tmp_path / "a.pt"), copy_of(state))


def test_mixed_devices(saver: AsyncCheckpointSaver, tmp_path: Path) -> None:
    state = {"cpu": torch.randn(1000), "cuda": torch.randn(1000, device="cuda"), "rng": torch.cuda.get_rng_state()}
    expected = copy_of(state)
    saver.save(state, tmp_path / "a.pt").result()
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert loaded["cuda"].device.type == "cuda"
    assert_equal(loaded, expected)
