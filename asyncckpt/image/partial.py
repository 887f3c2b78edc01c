"""Loading a part of a checkpoint: of its tensors' bytes only those that belong to the part are read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from asyncckpt.image.mapped_file import MappedFile
from asyncckpt.image.selection import leaves_of, select
from asyncckpt.image.sparse_file import open_sparse
from asyncckpt.image.torch_file import clear_errors, looks_at_nothing, map_file
from asyncckpt.storage.base import Reader

_PLAIN = frozenset({str, bytes, bytearray, int, float, complex, bool, type(None)})
_NAMED = frozenset({torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format})
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


def load_part(reader: Reader, path: str, keys: Sequence[str]) -> dict[Any, Any] | None:
    """What is at these keys (see `select`), on the CPU, every byte of it checked; loads safely. Blocks.

    The state is made over a file in memory that lacks all storages, and those that the part refers to are then filled
    in. None where it can't be told which these are: then the whole file has to be loaded.

    Raises `CorruptCheckpointError`, `UnsafeCheckpointError`, `CheckpointError` for a key that nothing is at, and
    OSError.
    """
    sparse = open_sparse(reader, path) if sys.platform == "linux" else None
    if sparse is None:
        return None
    with sparse:
        if not looks_at_nothing(sparse.payloads, "cpu"):
            return None
        with clear_errors(path, "cpu", weights_only=True):
            state = map_file(sparse.file, path, "cpu", weights_only=True)
        part = select(state, keys, path)
        storages = _storages_of(part)
        if storages is None:
            return None
        sparse.fetch(MappedFile(sparse.file, sparse.payloads).payloads_of(storages))
        return part


def _storages_of(state: Any) -> list[torch.UntypedStorage] | None:
    """Those of all tensors in it; None if there is anything that may hide one."""
    storages: dict[int, torch.UntypedStorage] = {}
    for leaf in leaves_of(state):
        if isinstance(leaf, torch.storage.TypedStorage):
            leaf = leaf.untyped()
        elif type(leaf) in _TENSORS and leaf.layout == torch.strided and not leaf.is_quantized and not vars(leaf):
            leaf = leaf.untyped_storage()
        if isinstance(leaf, torch.UntypedStorage):
            if leaf.nbytes():
                storages[leaf.data_ptr()] = leaf
        elif type(leaf) not in _PLAIN and type(leaf) not in _NAMED:
            return None
    return list(storages.values())
