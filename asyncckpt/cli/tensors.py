"""A checkpoint's contents, mapped from the file: nothing of a tensor is read before somebody looks at it."""

from __future__ import annotations

import pickle
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from asyncckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from asyncckpt.image.file import file_path, open_to_load
from asyncckpt.image.verify import read_archive, read_metadata
from asyncckpt.storage.base import Storage

KeyPath = tuple[object, ...]

_PLAIN = (str, bytes, bytearray, int, float, complex, bool, type(None), set, frozenset)
_NAMED = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_STORAGES = (torch.UntypedStorage, torch.storage.TypedStorage)

_MAX_KEYS = 5_000_000  # in the paths of all leaves together

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80
_brief.maxlist = _brief.maxtuple = 8


@dataclass(frozen=True)
class MappedCheckpoint:
    """A file's leaves by the paths of their keys, tensors mapped onto the CPU, and what it says of itself."""

    path: str
    num_bytes: int
    metadata: Mapping[str, object] | None
    leaves: Mapping[KeyPath, object]


def load_mapped(storage: Storage, path: str) -> MappedCheckpoint:
    """Open a file of asyncckpt or torch.save without reading its tensors, and without running anything in it.

    Checksums are not looked at. Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, `UnsafeCheckpointError`,
    and OSError when the file can't be read.
    """
    name = file_path(path)
    with open_to_load(storage, name) as reader:
        try:
            read_archive(reader)  # torch believes whatever the directory says about places
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{name} is damaged: {error}") from error
        metadata, num_bytes = read_metadata(reader), reader.num_bytes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of tensors that torch would rather not have
            state = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
            leaves = _all_leaves(state)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(f"{name} holds more than a safe load takes: {_reason(error)}") from error
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{name} is nested too deeply, or holds itself") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise CorruptCheckpointError(f"{name} can't be loaded: {error}") from error
    return MappedCheckpoint(path, num_bytes, metadata, leaves)


def format_path(path: KeyPath) -> str:
    """`model_state_dict.layers.0.weight`; "." is the whole state."""
    return ".".join(str(key) if isinstance(key, str | int) else _brief.repr(key) for key in path) or "."


def format_value(value: object) -> str:
    """A value, cut short."""
    if isinstance(value, torch.Tensor):
        return f"tensor {format_dtype(value)} {format_shape(tuple(value.shape))}"
    if isinstance(value, _NAMED):
        return str(value)
    if not isinstance(value, (*_PLAIN, list, tuple, Mapping)):
        return f"<{type(value).__name__}>"
    try:
        return _brief.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"<{type(value).__name__}>"


def format_dtype(tensor: torch.Tensor) -> str:
    """float32; with its layout, unless it is a strided one as most are."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return dtype if tensor.layout == torch.strided else f"{dtype} {str(tensor.layout).removeprefix('torch.')}"


def format_shape(shape: tuple[int, ...]) -> str:
    """3 × 4; "scalar" without dimensions."""
    return " × ".join(map(str, shape)) or "scalar"


def strided_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the elements of one of any layout: itself, or a sparse one's indices and values."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.dequantize() if tensor.is_quantized else tensor]


def _all_leaves(state: Any) -> dict[KeyPath, object]:
    """Raises `CheckpointError` for more than anybody has: a few nested lists, each there twice in the next."""
    leaves: dict[KeyPath, object] = {}
    total = 0
    for path, value in _leaves(state, ()):
        leaves[path] = value
        total += 1 + len(path)
        if total > _MAX_KEYS:
            raise CheckpointError(f"it holds more entries than can be shown: over {len(leaves):,}")
    return leaves


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, object]]:
    """Tensors, plain values, sequences of plain values, and empty containers."""
    if isinstance(value, _STORAGES):
        value = torch.empty(0, dtype=torch.uint8).set_(value.untyped())  # type: ignore[no-untyped-call]
    if isinstance(value, Mapping) and value:
        children = list(value.items())
    elif isinstance(value, list | tuple) and not all(isinstance(item, (*_PLAIN, *_NAMED)) for item in value):
        children = list(enumerate(value))
    else:
        yield path, value
        return
    for key, child in children:
        yield from _leaves(child, (*path, key))


def _reason(error: Exception) -> str:
    """torch's one line of fact in a page of advice."""
    lines = [line.strip() for line in str(error).splitlines()]
    marked = [
        line.partition("WeightsUnpickler error:")[2].strip() for line in lines if "WeightsUnpickler error" in line
    ]
    return next(filter(None, [*marked, *lines]), type(error).__name__)
