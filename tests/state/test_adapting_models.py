"""Models that load what looks as if it did not fit: restoring is as strict as torch is, and no stricter."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt import CheckpointError
from asyncckpt.state.restore import restore_checkpoint


class Renamed(nn.Module):
    """Its layer had another name once; counts how often its hook ran on it, not on a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(2, 2)
        self.num_loads = 0
        self._register_load_state_dict_pre_hook(self._rename)  # type: ignore[no-untyped-call]

    def _rename(self, weights: dict[str, Any], prefix: str, *_: Any) -> None:
        self.num_loads += 1
        for key in [key for key in weights if key.startswith(f"{prefix}old.")]:
            weights[f"{prefix}new.{key.rpartition('.')[2]}"] = weights.pop(key)


class Scalar(nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(value)


def old_batch_norm() -> dict[str, Any]:
    """As torch 0.4 saved it: no version, no count of batches."""
    weights = {"running_mean": torch.ones(3), "running_var": torch.full((3,), 2.0)}
    return {**weights, "weight": torch.full((3,), 3.0), "bias": torch.full((3,), 4.0)}


def old_weight_norm() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(2, 2)).state_dict()


ADAPTED: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "a hook that renames": (Renamed, lambda: {"old.weight": torch.ones(2, 2), "old.bias": torch.ones(2)}),
    "BatchNorm without a version": (lambda: nn.BatchNorm1d(3), old_batch_norm),
    "weight_norm of old": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), old_weight_norm),
    "a scalar with one dimension": (lambda: Scalar(torch.tensor(0.0)), lambda: {"scale": torch.ones(1)}),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ADAPTED)
def test_what_torch_loads_is_loaded(name: str, strict: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """The same as by load_state_dict itself, and no warning."""
    make, saved = ADAPTED[name]
    weights = saved()
    expected, restored = make(), make()
    expected.load_state_dict(weights)
    asyncckpt.save({"model_state_dict": weights}, tmp_path / "a.pt").result()
    restore_checkpoint(asyncckpt.load(tmp_path / "a.pt"), restored, strict=strict)
    torch.testing.assert_close(restored.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert not caplog.records


def test_asking_torch_changes_nothing() -> None:
    """A hook adapts one key, another one is missing: the model is as it was, and its own hook did not run."""
    model = nn.ModuleDict({"renamed": Renamed(), "norm": nn.BatchNorm1d(3), "other": nn.Linear(1, 1)})
    weights = {key.replace(".new.", ".old."): value + 1 for key, value in model.state_dict().items()}
    del weights["other.bias"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"lacks the model's .*other\.bias.*nothing was changed"):
        restore_checkpoint({"model_state_dict": weights}, model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model["renamed"].num_loads == 0


def test_what_hooks_adapt_is_loaded_beside_what_is_missing() -> None:
    """With strict=False the old names still find their new places."""
    model = nn.ModuleDict({"renamed": Renamed(), "other": nn.Linear(1, 1)})
    restore_checkpoint({"model_state_dict": {"renamed.old.weight": torch.full((2, 2), 7.0)}}, model, strict=False)
    assert torch.equal(model.state_dict()["renamed.new.weight"], torch.full((2, 2), 7.0))


def test_a_model_that_cannot_be_copied_takes_only_what_fits() -> None:
    """There is nothing to try it on."""
    model = Renamed()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"lacks the model's new\.weight"):
        restore_checkpoint({"model_state_dict": ADAPTED["a hook that renames"][1]()}, model)
    weights = {"new.weight": torch.ones(2, 2), "new.bias": torch.ones(2)}
    restore_checkpoint({"model_state_dict": weights}, model)
    assert torch.equal(model.new.weight, torch.ones(2, 2))


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_without_memory_is_refused(strict: bool) -> None:
    """Torch would copy into nothing, with a warning at most."""
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"no memory for weight, bias.*to_empty"):
        restore_checkpoint({"model_state_dict": nn.Linear(2, 2).state_dict()}, model, strict=strict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_cast(dtype: torch.dtype) -> None:
    """Parameters and buffers keep the model's own types, as with torch."""
    saved, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3).to(dtype)
    saved.running_mean = torch.full((3,), 0.5)
    restore_checkpoint({"model_state_dict": saved.state_dict()}, model)
    assert model.running_mean is not None
    assert model.running_mean.dtype == dtype
    assert model.running_mean.tolist() == [0.5] * 3


def test_hooks_of_the_optimizer_may_make_its_groups_fit() -> None:
    """Two groups saved, one here, and a hook that merges them."""
    model = nn.Linear(2, 2)
    saved = torch.optim.SGD([{"params": [parameter]} for parameter in model.parameters()], lr=0.25)
    merging = torch.optim.SGD(model.parameters(), lr=0.5)

    def merge(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        groups = state["param_groups"]
        whole = {**groups[0], "params": [index for group in groups for index in group["params"]]}
        return {**state, "param_groups": [whole]}

    merging.register_load_state_dict_pre_hook(merge)
    checkpoint = {"model_state_dict": model.state_dict(), "optimizer_state_dict": saved.state_dict()}
    restore_checkpoint(checkpoint, model, merging)
    assert merging.param_groups[0]["lr"] == 0.25
