"""Restoring: from a loaded checkpoint into live objects, all or nothing as far as can be told beforehand."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from asyncckpt.errors import CheckpointError
from asyncckpt.state.capture import unwrap
from asyncckpt.state.rng import restore_rng_states
from asyncckpt.state.stateful import cloned, restore_stateful

logger = logging.getLogger("asyncckpt")

_MAX_NAMED = 5


def restore_checkpoint(
    checkpoint: Mapping[str, Any],
    model: nn.Module,
    optimizer: Any = None,
    scheduler: Any = None,
    device: torch.device | str | None = None,
    *,
    stateful: Mapping[str, Any] | None = None,
    strict: bool = True,
    restore_rng: bool = True,
) -> None:
    """Put a checkpoint's states into the objects given. Blocks.

    Nothing that lives on is mapped from the checkpoint's file. Raises `CheckpointError`, before anything is changed,
    if it lacks what is asked for, or does not fit the model or optimizer; with `strict=False` what is missing is left
    as it is, with a warning.
    """
    module = unwrap(model)
    weights = _without_prefix(checkpoint.get("model_state_dict", {}))
    _check(checkpoint, weights, module, optimizer, scheduler, stateful or {}, strict=strict)
    _load_weights(module, weights, strict=strict)
    if device is not None:
        model.to(device)
    for thing, key in ((optimizer, "optimizer_state_dict"), (scheduler, "scheduler_state_dict")):
        if thing is not None and checkpoint.get(key) is not None:
            thing.load_state_dict(cloned(checkpoint[key]))
    restore_stateful(stateful or {}, checkpoint.get("stateful", {}), strict=strict)
    if restore_rng and checkpoint.get("rng_states") is not None:
        restore_rng_states(checkpoint["rng_states"])


def _check(
    checkpoint: Mapping[str, Any],
    weights: Mapping[str, Any],
    module: nn.Module,
    optimizer: Any,
    scheduler: Any,
    stateful: Mapping[str, Any],
    *,
    strict: bool,
) -> None:
    problems = []
    asked = {"model": module, "optimizer": optimizer, "scheduler": scheduler}
    for name, thing in asked.items():
        if thing is not None and checkpoint.get(f"{name}_state_dict") is None:
            problems.append(f"it has no {name}_state_dict")
    missing = [name for name in stateful if name not in checkpoint.get("stateful", {})]
    if missing:
        problems.append(f"it has no state for {', '.join(missing)}")
    problems += _misfits(weights, module)
    groups = (checkpoint.get("optimizer_state_dict") or {}).get("param_groups")
    if optimizer is not None and groups is not None and hasattr(optimizer, "param_groups"):
        saved, own = ([len(group["params"]) for group in which] for which in (groups, optimizer.param_groups))
        if saved != own:
            raise CheckpointError(f"the checkpoint's optimizer has parameter groups of {saved}, this one of {own}")
    if problems and strict:
        raise CheckpointError(
            f"the checkpoint does not fit: {'; '.join(problems)}; nothing was changed (strict=False takes what fits)"
        )
    for problem in problems:
        logger.warning("the checkpoint does not fit: %s; that is left as it is", problem)


def _misfits(weights: Mapping[str, Any], module: nn.Module) -> list[str]:
    own = module.state_dict()
    problems = []
    for what, keys in (
        ("lacks the model's", [key for key in own if key not in weights]),
        ("has more than the model:", [key for key in weights if key not in own]),
        ("has other shapes for", [key for key in own if key in weights and _shape(own[key]) != _shape(weights[key])]),
    ):
        if keys:
            more = f" and {len(keys) - _MAX_NAMED} more" if len(keys) > _MAX_NAMED else ""
            problems.append(f"it {what} {', '.join(keys[:_MAX_NAMED])}{more}")
    return problems


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _load_weights(module: nn.Module, weights: Mapping[str, Any], *, strict: bool) -> None:
    if not strict:
        own = module.state_dict()
        weights = {key: value for key, value in weights.items() if key in own and _shape(value) == _shape(own[key])}
    module.load_state_dict(weights, strict=strict)


def _without_prefix(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """As saved from inside a wrapper by other means: `module.` of DDP, `_orig_mod.` of torch.compile."""
    for prefix in ("module.", "_orig_mod."):
        if weights and all(key.startswith(prefix) for key in weights):
            return _without_prefix({key.removeprefix(prefix): value for key, value in weights.items()})
    return weights
