"""`asyncckpt inspect`: what a checkpoint file holds, without reading its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from asyncckpt.cli.output import clean, format_bytes, format_count, make_table, to_plain
from asyncckpt.cli.tensors import (
    format_dtype,
    format_path,
    format_shape,
    format_value,
    load_mapped,
    strided_parts,
)
from asyncckpt.storage.base import Storage


@dataclass(frozen=True)
class TensorRow:
    """One tensor; `num_bytes` are those of its elements."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class EntryRow:
    """Anything but a tensor, cut short."""

    key: str
    type: str
    value: str


@dataclass(frozen=True)
class Inspected:
    """A file's contents. `storage_bytes` counts what tensors share once, and what they leave unused."""

    path: str
    file_bytes: int
    tensor_bytes: int
    storage_bytes: int
    metadata: Mapping[str, object] | None
    tensors: Sequence[TensorRow]
    entries: Sequence[EntryRow]


def gather(storage: Storage, path: str) -> Inspected:
    """Open the file; raises as `load_mapped` does."""
    checkpoint = load_mapped(storage, path, reads_tensors=False)
    tensors: list[TensorRow] = []
    entries: list[EntryRow] = []
    storages: dict[int, int] = {}
    for key_path, value in checkpoint.leaves.items():
        key = format_path(key_path)
        if isinstance(value, torch.Tensor):
            parts = strided_parts(value)
            storages.update((part.untyped_storage()._cdata, part.untyped_storage().nbytes()) for part in parts)
            num_bytes = sum(part.numel() * part.element_size() for part in parts)
            tensors.append(TensorRow(key, format_dtype(value), tuple(value.shape), num_bytes))
        else:
            entries.append(EntryRow(key, type(value).__name__, format_value(value)))
    tensor_bytes = sum(row.num_bytes for row in tensors)
    return Inspected(
        path, checkpoint.num_bytes, tensor_bytes, sum(storages.values()), checkpoint.metadata, tensors, entries
    )


def draw(inspected: Inspected, console: Console) -> None:
    """Tensors, entries, metadata, totals."""
    if inspected.tensors:
        table = make_table("tensor", "dtype", "shape", "bytes", right=("bytes",))
        for row in inspected.tensors:
            table.add_row(clean(row.key), row.dtype, format_shape(row.shape), f"{row.num_bytes:,}")
        console.print(table)
        console.print()
    if inspected.entries:
        table = make_table("entry", "type", "value")
        for entry in inspected.entries:
            table.add_row(clean(entry.key), clean(entry.type), clean(entry.value))
        console.print(table)
        console.print()
    if inspected.metadata:
        table = make_table("metadata", "")
        for name, value in inspected.metadata.items():
            text = value if isinstance(value, str) else json.dumps(to_plain(value), ensure_ascii=False)
            table.add_row(clean(name), clean(text))
        console.print(table)
        console.print()
    console.print(_totals(inspected), soft_wrap=True)


def _totals(inspected: Inspected) -> str:
    tensors = f"{format_count(len(inspected.tensors), 'tensor')}, {format_bytes(inspected.tensor_bytes)}"
    if inspected.storage_bytes != inspected.tensor_bytes:
        tensors += (
            f" (in {format_bytes(inspected.storage_bytes)} of memory: some share it, or are part of a larger one)"
        )
    others = f"{len(inspected.entries):,} other " + ("entry" if len(inspected.entries) == 1 else "entries")
    return f"{tensors}; {others}; file {format_bytes(inspected.file_bytes)}"
