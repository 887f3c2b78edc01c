"""Objects that keep a state: by `state_dict`, or random generators of their own. Copies of states in fresh memory."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from copy import copy as shallow_copy
from typing import Any

import torch
from torch import nn
from torch.storage import UntypedStorage

from asyncckpt.errors import CheckpointError
from asyncckpt.image.staging import copy_threads
from asyncckpt.naming import printable
from asyncckpt.state.rng import numpy_from_plain, numpy_to_plain, python_state

logger = logging.getLogger("asyncckpt")

_WORTH_THREADS_BYTES = 16 << 20
_PART_BYTES = 8 << 20


def capture_stateful(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The state of each object, by its name; tensors are not copied.

    Takes what has `state_dict()` and `load_state_dict()`, `torch.Generator`, `random.Random`, and
    `numpy.random.Generator` and `RandomState`, whose states become plain data. Raises TypeError, naming the object, for
    anything else.
    """
    check_stateful(objects)
    return {name: _capture(thing) for name, thing in objects.items()}


def restore_stateful(objects: Mapping[str, Any], states: Mapping[str, Any], *, strict: bool = True) -> None:
    """Put the states back into the objects; nothing of `states` stays in use.

    Raises TypeError as `capture_stateful` does, and CheckpointError if a name is missing, before anything is changed;
    with `strict=False` what is missing is left as it is, with a warning in the log. Also raises CheckpointError for a
    random generator of another kind, and what an object's own `load_state_dict` raises.
    """
    check_stateful(objects)
    missing = [name for name in objects if name not in states]
    if missing and strict:
        known = ", ".join(map(str, states)) or "none"
        raise CheckpointError(f"the checkpoint has no state for {', '.join(missing)}; it has: {known}")
    for name in missing:
        logger.warning("the checkpoint has no state for %s: it is left as it is", printable(name))
    for name, thing in objects.items():
        if name in states:
            _restore(name, thing, states[name])


def check_stateful(objects: Mapping[str, Any]) -> None:
    """Raise TypeError, naming the object, unless each is of a kind that has a state."""
    for name, thing in objects.items():
        has_methods = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
        if not (has_methods or isinstance(thing, (torch.Generator, random.Random)) or _is_numpy(thing)):
            raise TypeError(f"stateful[{name!r}] has no state_dict() and load_state_dict(): {type(thing).__name__}")


def _capture(thing: Any) -> Any:
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, random.Random):
        return thing.getstate()
    if _is_numpy(thing):
        return numpy_to_plain(_numpy_state(thing))
    return thing.state_dict()


def _restore(name: str, thing: Any, state: Any) -> None:
    if isinstance(thing, torch.Generator):
        thing.set_state(state.cpu())
    elif isinstance(thing, random.Random):
        thing.setstate(python_state(state))
    elif _is_numpy(thing):
        try:
            arrays = numpy_from_plain(state, _numpy_state(thing))
        except ValueError as error:
            raise CheckpointError(f"the checkpoint's state for {name} does not fit: {error}") from error
        if hasattr(thing, "bit_generator"):
            thing.bit_generator.state = arrays
        else:
            thing.set_state(arrays)
    else:
        thing.load_state_dict(cloned(state))


def _is_numpy(thing: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(thing, (numpy.random.Generator, numpy.random.RandomState))


def _numpy_state(thing: Any) -> Any:
    return thing.bit_generator.state if hasattr(thing, "bit_generator") else thing.get_state(legacy=False)


def cloned(value: Any, only: Set[int] | None = None, read: Read | None = None) -> Any:
    """The same nested dictionaries, lists and tuples, with tensors in fresh memory. Blocks, without the GIL.

    What shares memory still does: a tensor that is there twice, and views of one storage. With `only`, just tensors in
    one of these storages (`storages_of`) are copied. On threads of our own: torch would wake an OpenMP team per tensor,
    and with the cores busy 0.84 GB took 2.2 to 3.3 s in place of 0.35 to 0.46 (2 cores). `read` fills storages by other
    means than copying, and returns those that it does not know.
    """
    pairs: list[_Pair] = []
    with torch.inference_mode(False), torch.no_grad():
        copy = _Copies(pairs, only).of(value)
        _copy(read(pairs) if read is not None else pairs)
    return copy


_Pair = tuple[torch.Tensor, torch.Tensor]  # destination, source: all bytes of a storage
Read = Callable[[list[_Pair]], list[_Pair]]


def storages_of(value: Any) -> set[int]:
    """The addresses of all memory that tensors in a nested value use."""
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(value) if _is_plain(tensor)}


class _Copies:
    """Builds the copies, and notes in `pairs` what is still to be copied into them."""

    def __init__(self, pairs: list[_Pair], only: Set[int] | None) -> None:
        self._pairs = pairs
        self._only = only
        self._copies: dict[int, Any] = {}  # by the identity of the original
        self._storages: dict[int, UntypedStorage] = {}  # by the address of the original

    def of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in self._copies:
                self._copies[id(value)] = self._of_tensor(value)
            return self._copies[id(value)]
        # What is there twice is copied once: a few nested lists, each there twice in the next, are billions.
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, dict):
            copy = self._copies[id(value)] = shallow_copy(value)  # with its attributes: a module's state has versions
            for key, child in value.items():
                copy[key] = self.of(child)  # not by update(): a Counter (MultiStepLR has one) would add
            return copy
        if type(value) is list:
            children: list[Any] = []
            self._copies[id(value)] = children
            children.extend(map(self.of, value))
            return children
        if type(value) is tuple:
            return self._copies.setdefault(id(value), tuple(map(self.of, value)))
        return value

    def _of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._only is not None and not _may_use(tensor, self._only):
            return tensor
        source = tensor.detach()
        if tensor.is_conj() or tensor.is_neg():  # plain memory, to be seen as something else
            plain = source.conj() if tensor.is_conj() else torch._neg_view(source)
            copy = self._of_tensor(plain)
            copy = copy.conj() if tensor.is_conj() else torch._neg_view(copy)
            return copy.requires_grad_(tensor.requires_grad)
        if _is_plain(tensor):
            storage = self._of_storage(tensor.untyped_storage())
            copy = source.new_empty(0).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
        else:
            copy = source.clone()
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(copy, tensor.requires_grad)
        return copy.requires_grad_(tensor.requires_grad)

    def _of_storage(self, storage: UntypedStorage) -> UntypedStorage:
        address = storage.data_ptr()
        if address not in self._storages:
            self._storages[address] = UntypedStorage(storage.nbytes())
            self._pairs.append((_bytes_of(self._storages[address]), _bytes_of(storage)))
        return self._storages[address]


def _bytes_of(storage: UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _may_use(tensor: torch.Tensor, storages: Set[int]) -> bool:
    if _is_plain(tensor):
        return tensor.untyped_storage().data_ptr() in storages
    return tensor.device.type == "cpu"  # sparse, say: it has storages, but does not show them


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is ordinary host memory, as what is mapped from a file is."""
    is_dense = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    return is_dense and tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, nn.Parameter)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _tensors(child)


def _copy(pairs: list[_Pair]) -> None:
    parts = iter([part for pair in pairs for part in _parts(*pair)])

    def copy() -> None:  # on each thread; the iterator is shared, so each takes what comes next
        for destination, source in parts:
            destination.copy_(source)

    if sum(source.nbytes for _, source in pairs) < _WORTH_THREADS_BYTES:
        copy()
        return
    copiers = copy_threads()
    try:
        copiers.run_on_all(copy)
    finally:
        copiers.stop()
        copiers.join(None)


def _parts(destination: torch.Tensor, source: torch.Tensor) -> Iterable[_Pair]:
    """A large storage in parts, so that several threads share it."""
    return zip(destination.split(_PART_BYTES), source.split(_PART_BYTES), strict=True)
