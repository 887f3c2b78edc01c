"""Restoring: from a loaded checkpoint into live objects, all or nothing as far as can be told beforehand."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from asyncckpt.errors import CheckpointError
from asyncckpt.image.load import Loaded
from asyncckpt.state.capture import unwrap
from asyncckpt.state.rng import restore_rng_states
from asyncckpt.state.stateful import check_stateful, cloned, restore_stateful, storages_of
from asyncckpt.threads import log_quietly

_MAX_NAMED = 5
_EXTRA_STATE = "_extra_state"  # what torch appends to the prefix of a module that has get_extra_state()


def taken_apart(states: Mapping[str, Any], loaded: Loaded, keys: Iterable[str]) -> dict[str, Any]:
    """The states of a loaded checkpoint, those under `keys` each in memory of its own. Blocks, without the GIL.

    What is mapped is read from the file, which must still be open, against its checksums. Raises
    `CorruptCheckpointError` if that is damaged by now, and OSError when it can't be read.
    """
    read = loaded.file.fill if loaded.file is not None else None
    try:
        return {**states, **{key: cloned(states[key], read=read) for key in keys if key in states}}
    except RecursionError as error:
        raise CheckpointError("the checkpoint is nested too deeply") from error


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
    gives_memory: bool = False,
) -> None:
    """Put a checkpoint's states into the objects given. Blocks.

    The model may be wrapped (DDP, torch.compile) or plain, whichever it was when saved. It is moved to `device` before
    the optimizer's state follows its parameters there; random number generators come last. Nothing that lives on is
    mapped from the checkpoint's file: the memory of tensors is copied once. A checkpoint that `gives_memory` has memory
    of its own, which nobody else needs: the optimizer may keep it.

    Raises TypeError for a stateful object without a state, and CheckpointError if the checkpoint lacks what is asked
    for, does not fit the model or optimizer, or the model is on the meta device, both before anything is changed. What
    fits is for torch to say: old keys that a module's hooks adapt do. With `strict=False` what is missing is left as it
    is, with a warning in the log; an optimizer with other parameter groups is an error all the same. What an object's
    own `load_state_dict` raises comes when those before it have been restored.
    """
    stateful = stateful or {}
    module = unwrap(model)
    own = module.state_dict()
    weights = _without_prefix(checkpoint.get("model_state_dict") or {}, own)
    check_stateful(stateful)
    _check_memory(own)
    _check_optimizer(checkpoint, optimizer)
    problems = _missing(checkpoint, optimizer, scheduler, stateful)
    misfits = _misfits(weights, own) if checkpoint.get("model_state_dict") is not None else []
    if misfits and _takes_all_the_same(module, weights):
        misfits = []
    problems += misfits
    if problems and strict:
        raise CheckpointError(
            f"the checkpoint does not fit: {'; '.join(problems)}; nothing was changed (strict=False takes what fits)"
        )
    for problem in problems:
        log_quietly(logging.WARNING, f"the checkpoint does not fit: {problem}; that is left as it is")

    _load_weights(module, _only_fitting(weights, own, module) if misfits else weights, strict=strict)
    if device is not None:
        model.to(device)
    if optimizer is not None and checkpoint.get("optimizer_state_dict") is not None:
        if gives_memory:
            optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        else:
            _load_optimizer(optimizer, checkpoint["optimizer_state_dict"])
    if scheduler is not None and checkpoint.get("scheduler_state_dict") is not None:
        scheduler.load_state_dict(cloned(checkpoint["scheduler_state_dict"]))
    states = checkpoint.get("stateful") or {}
    restore_stateful({name: thing for name, thing in stateful.items() if name in states}, states)
    if restore_rng and checkpoint.get("rng_states") is not None:
        restore_rng_states(checkpoint["rng_states"])


def _missing(checkpoint: Mapping[str, Any], optimizer: Any, scheduler: Any, stateful: Mapping[str, Any]) -> list[str]:
    keys = ["model_state_dict"]
    keys += ["optimizer_state_dict"] * (optimizer is not None) + ["scheduler_state_dict"] * (scheduler is not None)
    problems = [f"it has no {key}" for key in keys if checkpoint.get(key) is None]
    states = checkpoint.get("stateful") or {}
    lacking = [name for name in stateful if name not in states]
    if lacking:
        known = ", ".join(map(str, states)) or "none"
        problems.append(f"it has no state for {', '.join(lacking)} (it has: {known})")
    return problems


def _check_memory(own: Mapping[str, Any]) -> None:
    on_meta = [key for key, value in own.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if on_meta:
        raise CheckpointError(
            f'the model has no memory for {_named(on_meta)} (device "meta"), so nothing was changed; give it some by '
            "model.to_empty(device=...) first"
        )


def _check_optimizer(checkpoint: Mapping[str, Any], optimizer: Any) -> None:
    groups = (checkpoint.get("optimizer_state_dict") or {}).get("param_groups")
    if optimizer is None or groups is None or not hasattr(optimizer, "param_groups"):
        return
    if getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None):
        return  # they may make the groups fit
    saved, own = ([len(group["params"]) for group in which] for which in (groups, optimizer.param_groups))
    if saved != own:
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(saved)} parameter groups of {saved} parameters, this one {len(own)} "
            f"of {own}; nothing was changed"
        )


def _misfits(weights: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What torch's load_state_dict would refuse; it would have changed half of the model by then."""
    shapes = [
        f"{key} ({_shape(weights[key])} saved, {_shape(own[key])} here)"
        for key in own
        if key in weights and not _fits(weights[key], own[key], key)
    ]
    problems = []
    for what, keys in (
        ("lacks the model's", [key for key in own if key not in weights]),
        ("has more than the model:", [key for key in weights if key not in own]),
        ("has other shapes for", shapes),
    ):
        if keys:
            problems.append(f"it {what} {_named(keys)}")
    return problems


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - _MAX_NAMED} more" if len(keys) > _MAX_NAMED else ""
    return ", ".join(keys[:_MAX_NAMED]) + more


def _takes_all_the_same(module: nn.Module, weights: Mapping[str, Any]) -> bool:
    """Whether torch loads weights that look like misfits: modules may adapt old keys and shapes by hooks or overrides.

    Only torch can tell, by loading, so it loads into a copy of the module that has no memory for its tensors. A module
    that can't be copied takes nothing but what fits.
    """
    try:
        empty: dict[int, Any] = {id(tensor): _without_memory(tensor) for tensor in _parameters_and_buffers(module)}
        described = {key: _without_memory(value) for key, value in weights.items()}
        trial = copy.deepcopy(module, empty)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what hooks make on the CPU
            trial.load_state_dict(_with_metadata(described, getattr(weights, "_metadata", None)))
    except Exception:
        return False
    return True


def _parameters_and_buffers(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _without_memory(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or nn.parameter.is_lazy(value):
        return value
    empty = torch.empty_like(value, device="meta")
    return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty


def _fits(saved: Any, own: Any, key: str) -> bool:
    return _is_extra_state(key) or nn.parameter.is_lazy(own) or _shape(saved) == _shape(own)


def _is_extra_state(key: str) -> bool:
    return key.rpartition(".")[2] == _EXTRA_STATE


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _only_fitting(weights: Mapping[str, Any], own: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """Without what has another shape, but for modules with code of their own, which may take it (observers, metrics).

    Keys that the model does not have may be old ones that its hooks adapt.
    """
    flexible = tuple(
        f"{name}." if name else ""
        for name, child in module.named_modules()
        if not type(child)._load_from_state_dict.__module__.startswith("torch.nn.modules.")
    )
    fitting = {
        key: value
        for key, value in weights.items()
        if key not in own or key.startswith(flexible) or _fits(value, own[key], key)
    }
    return _with_metadata(fitting, getattr(weights, "_metadata", None))


def _load_weights(module: nn.Module, weights: Mapping[str, Any], *, strict: bool) -> None:
    """Parameters and buffers are copied by torch; extra state may be kept as it is given."""
    unmapped = {key: cloned(value) if _is_extra_state(key) else value for key, value in weights.items()}
    try:
        module.load_state_dict(_with_metadata(unmapped, getattr(weights, "_metadata", None)), strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit the model: {error}") from error


def _with_metadata(weights: Mapping[str, Any], metadata: Any) -> Mapping[str, Any]:
    """Modules' versions, which torch keeps in an attribute: without them weights count as those of an old torch."""
    described: Any = OrderedDict(weights)
    if metadata is not None:
        described._metadata = metadata
    return cast(Mapping[str, Any], described)


def _load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        optimizer.load_state_dict(cloned(state))
        return
    # It keeps what is of the right type and device already, and copies the rest. Copying the mapped ones that it kept,
    # rather than all of them beforehand, copies nothing twice.
    mapped = storages_of(state)
    optimizer.load_state_dict(state)
    for owner, kept in cloned(dict(optimizer.state), only=mapped).items():
        optimizer.state[owner] = kept


def _without_prefix(weights: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """As saved from inside a wrapper by other means: `module.` of DDP, `_orig_mod.` of torch.compile."""
    for prefix in ("module.", "_orig_mod."):
        if _all_start_with(weights, prefix) and not _all_start_with(own, prefix):
            metadata = getattr(weights, "_metadata", None)
            if metadata is not None:  # its keys have no dot at the end, and "" is the wrapper
                metadata = {
                    key[len(prefix) :]: value for key, value in metadata.items() if f"{key}.".startswith(prefix)
                }
            shortened = {key.removeprefix(prefix): value for key, value in weights.items()}
            return _without_prefix(_with_metadata(shortened, metadata), own)
    return weights


def _all_start_with(keys: Mapping[str, Any], prefix: str) -> bool:
    return bool(keys) and all(key.startswith(prefix) for key in keys)
