"""What belongs into a training checkpoint, gathered from live objects. Nothing is copied: saving does that."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from asyncckpt.state.rng import capture_rng_states
from asyncckpt.state.stateful import capture_stateful


def create_checkpoint(
    model: nn.Module,
    optimizer: Any,
    scheduler: Any = None,
    epoch: int = 0,
    global_step: int = 0,
    train_loss: float | None = None,
    val_loss: float | None = None,
    val_metrics: Mapping[str, float] | None = None,
    config: Mapping[str, Any] | None = None,
    rng_states: Mapping[str, Any] | None = None,
    *,
    extra_state: Mapping[str, Any] | None = None,
    stateful: Mapping[str, Any] | None = None,
    save_rng: bool = True,
) -> dict[str, Any]:
    """A comprehensive checkpoint as a dictionary, to be given to `asyncckpt.save`.

    Its tensors are the live ones. The model is saved without its wrappers (DDP, torch.compile). `rng_states` None
    captures them all, unless `save_rng=False`. Numbers may be tensors of one element or NumPy's; they become plain
    ones, so that a safe load takes them. Raises TypeError, naming the field, for what is not a number.
    """
    checkpoint: dict[str, Any] = {
        "model_state_dict": unwrap(model).state_dict(),
        "optimizer_state_dict": optimizer.state_dict() if optimizer is not None else None,
        "scheduler_state_dict": scheduler.state_dict() if scheduler is not None else None,
        "epoch": as_int("epoch", epoch),
        "global_step": as_int("global_step", global_step),
        "train_loss": None if train_loss is None else as_float("train_loss", train_loss),
        "val_loss": None if val_loss is None else as_float("val_loss", val_loss),
        "val_metrics": {str(name): as_float(str(name), value) for name, value in (val_metrics or {}).items()},
        "config": config if config is not None else {},
        "timestamp": datetime.now(timezone.utc).isoformat(),
        "pytorch_version": str(torch.__version__),  # a TorchVersion, which safe loads refuse
    }
    if optimizer is None:
        del checkpoint["optimizer_state_dict"]
    if rng_states is not None or save_rng:
        checkpoint["rng_states"] = capture_rng_states() if rng_states is None else rng_states
    if extra_state is not None:
        checkpoint["extra_state"] = extra_state
    if stateful is not None:
        checkpoint["stateful"] = capture_stateful(stateful)
    return checkpoint


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without what is around it, in any order.

    That is DistributedDataParallel, DataParallel, torch.compile, and any other module that has nothing of its own but
    one child by the name of `module`.
    """
    while True:
        inner: Any
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or _is_wrapper(model):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)  # torch.compile's
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _is_wrapper(model: nn.Module) -> bool:
    # An averaged model (torch.optim.swa_utils) has a child `module` too, and a counter that belongs in the checkpoint.
    has_own_state = bool(model._parameters or model._buffers)
    has_own_state |= type(model).get_extra_state is not nn.Module.get_extra_state
    return [name for name, _ in model.named_children()] == ["module"] and not has_own_state


def as_int(name: str, value: Any) -> int:
    """A whole number of any kind as Python's. Raises TypeError, naming the field."""
    plain = _plain(name, value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    return int(plain)


def as_float(name: str, value: Any) -> float:
    """A number of any kind as Python's. Raises TypeError, naming the field."""
    plain = _plain(name, value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(plain)


def _plain(name: str, value: Any) -> Any:
    num_items = value.numel() if isinstance(value, torch.Tensor) else getattr(value, "size", 1)
    if num_items != 1:
        raise TypeError(f"{name} must be one number, not {num_items}")
    return value.item() if hasattr(value, "item") else value
