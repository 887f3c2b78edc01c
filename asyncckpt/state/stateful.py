"""Objects that keep a state: by `state_dict`, or random generators of their own."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import torch

from asyncckpt.errors import CheckpointError

logger = logging.getLogger("asyncckpt")


def capture_stateful(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The state of each; not copied. Raises TypeError for what has none."""
    return {name: _capture(name, thing) for name, thing in objects.items()}


def restore_stateful(objects: Mapping[str, Any], states: Mapping[str, Any], *, strict: bool = True) -> None:
    """Put the states back; nothing of `states` stays in use. A missing one is an error, or left out if not strict."""
    missing = [name for name in objects if name not in states]
    if missing and strict:
        known = ", ".join(sorted(states)) or "none"
        raise CheckpointError(f"the checkpoint has no state for {', '.join(missing)}; it has: {known}")
    for name in missing:
        logger.warning("the checkpoint has no state for %s: it is left as it is", name)
    for name, thing in objects.items():
        if name in states:
            _restore(thing, cloned(states[name]))


def cloned(value: Any) -> Any:
    """The same nested value with tensors of its own."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        copy = value.copy()
        copy.update((key, cloned(child)) for key, child in value.items())
        return copy
    if type(value) in (list, tuple):
        return type(value)(cloned(child) for child in value)
    return value


def _capture(name: str, thing: Any) -> Any:
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, random.Random):
        return thing.getstate()
    if _is_numpy_generator(thing):
        return _to_plain(thing.bit_generator.state)
    if hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict"):
        return thing.state_dict()
    raise TypeError(f"stateful[{name!r}] has no state_dict() and load_state_dict(): {type(thing).__name__}")


def _restore(thing: Any, state: Any) -> None:
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    elif isinstance(thing, random.Random):
        version, internal, gauss = state
        thing.setstate((version, tuple(internal), gauss))
    elif _is_numpy_generator(thing):
        thing.bit_generator.state = _from_plain(state, thing.bit_generator.state)
    else:
        thing.load_state_dict(state)


def _is_numpy_generator(thing: Any) -> bool:
    return type(thing).__module__.startswith("numpy.random") and hasattr(thing, "bit_generator")


def _to_plain(state: Any) -> Any:
    """NumPy's arrays and numbers as lists and plain numbers."""
    if isinstance(state, dict):
        return {key: _to_plain(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state


def _from_plain(state: Any, like: Any) -> Any:
    if isinstance(like, dict):
        return {key: _from_plain(state[key], like[key]) for key in like}
    if hasattr(like, "dtype") and hasattr(like, "shape") and like.shape:
        import numpy

        return numpy.array(state, dtype=like.dtype)
    return state
