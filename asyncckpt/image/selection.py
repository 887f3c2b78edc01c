"""Parts of a state, by dotted paths of keys, as `asyncckpt inspect` prints them. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from asyncckpt.errors import CheckpointError

_MAX_NAMED = 10


def select(state: Any, keys: Sequence[str], path: str) -> dict[Any, Any]:
    """The entries of nested dictionaries at and below these keys; what is none is taken whole or not at all.

    `model_state_dict` is all of it, `model_state_dict.encoder` what begins with `encoder.` in there. `path` is for
    messages. Raises `CheckpointError` for a key that nothing is at.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, no dictionary to choose keys from")
    found: set[str] = set()
    selected = _selected(state, "", keys, found)
    if missing := [key for key in keys if key not in found]:
        there = ", ".join(str(key) for key in list(state)[:_MAX_NAMED])
        raise CheckpointError(f"{path} holds nothing at {', '.join(missing)}; its keys begin with {there}")
    return selected


def _selected(state: Mapping[Any, Any], path: str, keys: Sequence[str], found: set[str]) -> dict[Any, Any]:
    selected: dict[Any, Any] = type(state)() if type(state) is OrderedDict else {}
    if isinstance(selected, OrderedDict):
        vars(selected).update(vars(state))  # torch keeps versions there
    for name, value in state.items():
        own_path = f"{path}.{name}" if path else str(name)
        at_or_above = [key for key in keys if own_path == key or own_path.startswith(f"{key}.")]
        if at_or_above:
            found.update(at_or_above)
            selected[name] = value
        elif isinstance(value, Mapping) and any(key.startswith(f"{own_path}.") for key in keys):
            below = _selected(value, own_path, keys, found)
            selected.update({name: below} if below else {})
    return selected


def leaves_of(state: Any) -> Iterator[Any]:
    """Everything in nested dictionaries, lists, tuples and sets that is none itself; containers of other kinds too."""
    pending, seen = [state], set[int]()
    while pending:
        value = pending.pop()
        if type(value) in (dict, OrderedDict, list, tuple, set, frozenset):
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, dict):
                pending += [*value.keys(), *value.values(), *getattr(value, "__dict__", {}).values()]
            else:
                pending += value
        else:
            yield value
