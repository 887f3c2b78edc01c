"""A checkpoint's contents, mapped from the file: nothing of a tensor is read before somebody looks at it."""

from __future__ import annotations

import pickle
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from asyncckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from asyncckpt.image.file import file_path, open_checkpoint, read_anew, to_be_mapped
from asyncckpt.image.sparse_file import open_sparse
from asyncckpt.image.torch_file import looks_at_nothing, map_file
from asyncckpt.image.verify import read_archive, read_metadata
from asyncckpt.storage.base import Storage
from asyncckpt.storage.local import LocalReader

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


def load_mapped(storage: Storage, path: str, *, reads_tensors: bool = True) -> MappedCheckpoint:
    """Open a file of asyncckpt or torch.save without reading its tensors, and without running anything in it.

    Checksums are not looked at. A file in a store is fetched, unless `reads_tensors` is False: then its tensors may
    have no bytes. Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, `UnsafeCheckpointError`, and OSError when
    the file can't be read.
    """
    name = file_path(path)

    def read() -> MappedCheckpoint:
        with _opened(storage, name, reads_tensors=reads_tensors) as reader, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of tensors that torch would rather not have
            metadata, num_bytes = read_metadata(reader), reader.num_bytes
            leaves = _all_leaves(map_file(reader, name, "cpu", weights_only=True))
        return MappedCheckpoint(path, num_bytes, metadata, leaves)

    try:
        return read_anew(name, read)
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


@contextmanager
def _opened(storage: Storage, name: str, *, reads_tensors: bool) -> Iterator[LocalReader]:
    """The file, to be mapped."""
    with ExitStack() as opened:
        reader = opened.enter_context(open_checkpoint(storage, name))
        try:
            read_archive(reader)  # torch believes whatever the directory says about places
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{name} is damaged: {error}") from error
        if not reads_tensors and not isinstance(reader, LocalReader):
            sparse = open_sparse(reader, name)
            if sparse is not None and looks_at_nothing(opened.enter_context(sparse).payloads, "cpu"):
                yield sparse.file
                return
        yield opened.enter_context(to_be_mapped(reader))


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
