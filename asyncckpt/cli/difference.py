"""`asyncckpt diff`: which entries of two checkpoints differ, and by how much.

Tensors are compared in pieces, mapped from their files, so that memory stays bounded. Types of containers are not
compared, nor what the files say of themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from asyncckpt.cli.output import clean, format_count, format_number, make_table
from asyncckpt.cli.tensors import (
    format_dtype,
    format_path,
    format_shape,
    format_value,
    load_mapped,
    strided_parts,
)
from asyncckpt.storage.base import Storage

_PIECE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TensorDifference:
    """Two tensors of one key that differ.

    `max_abs` is the largest |b − a|, NaN if one of two that differ is NaN; `relative` is that divided by the largest
    finite |a|. All three figures are None where elements can't be held against each other, such as for other shapes.
    """

    key: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    num_elements: int
    num_differing: int | None = None
    max_abs: float | None = None
    relative: float | None = None


@dataclass(frozen=True)
class EntryDifference:
    """Two entries of one key that differ, not both of them tensors; cut short."""

    key: str
    a: str
    b: str


@dataclass(frozen=True)
class Compared:
    """How two checkpoints differ, and how much of them is equal."""

    a: str
    b: str
    equal: bool
    num_equal_tensors: int
    num_equal_entries: int
    tensors: Sequence[TensorDifference]
    entries: Sequence[EntryDifference]
    only_in_a: Sequence[str]
    only_in_b: Sequence[str]


def gather(storage: Storage, path_a: str, path_b: str) -> Compared:
    """Compare two files; blocks, and reads both. Raises as `load_mapped` does."""
    leaves_a, leaves_b = load_mapped(storage, path_a).leaves, load_mapped(storage, path_b).leaves
    tensors: list[TensorDifference] = []
    entries: list[EntryDifference] = []
    num_equal_tensors = num_equal_entries = 0
    for path, a in leaves_a.items():
        if path not in leaves_b:
            continue
        b = leaves_b[path]
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            difference = compare_tensors(format_path(path), a, b)
            num_equal_tensors += difference is None
            tensors += [] if difference is None else [difference]
        elif _is_same(a, b):
            num_equal_entries += 1
        else:
            entries.append(EntryDifference(format_path(path), format_value(a), format_value(b)))
    only_in_a = [format_path(path) for path in leaves_a if path not in leaves_b]
    only_in_b = [format_path(path) for path in leaves_b if path not in leaves_a]
    equal = not (tensors or entries or only_in_a or only_in_b)
    return Compared(path_a, path_b, equal, num_equal_tensors, num_equal_entries, tensors, entries, only_in_a, only_in_b)


def draw(compared: Compared, console: Console) -> None:
    """Tensors that differ, other entries, and keys of one side."""
    if compared.tensors:
        numbers = ("differing", "max abs", "relative")
        table = make_table("tensor", "dtype", "shape", *numbers, right=numbers)
        for row in compared.tensors:
            differing = "-" if row.num_differing is None else f"{row.num_differing:,} of {row.num_elements:,}"
            shape = _change(format_shape(row.shape_a), format_shape(row.shape_b))
            figures = (differing, format_number(row.max_abs), format_number(row.relative))
            table.add_row(clean(row.key), _change(row.dtype_a, row.dtype_b), shape, *figures)
        console.print(table)
        console.print()
    if compared.entries:
        table = make_table("entry", "A", "B")
        for entry in compared.entries:
            table.add_row(clean(entry.key), clean(entry.a), clean(entry.b))
        console.print(table)
        console.print()
    for side, keys in (("A", compared.only_in_a), ("B", compared.only_in_b)):
        for key in keys:
            console.print(f"only in {side}: {clean(key)}", soft_wrap=True)
    console.print(_summary(compared), soft_wrap=True)


def _change(a: str, b: str) -> str:
    return a if a == b else f"{a} → {b}"


def _summary(compared: Compared) -> str:
    tensors = format_count(compared.num_equal_tensors, "tensor")
    equal = f"{tensors} and {compared.num_equal_entries} other equal"
    if compared.equal:
        return f"no difference: {equal}"
    parts = [
        (len(compared.tensors), "tensors differ"),
        (len(compared.entries), "other differ"),
        (len(compared.only_in_a), "only in A"),
        (len(compared.only_in_b), "only in B"),
    ]
    return "; ".join([*(f"{num} {text}" for num, text in parts if num), equal])


def _is_same(a: object, b: object) -> bool:
    """Equal, NaN with NaN too; False for what can't be compared."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    try:
        return bool(a == b)
    except Exception:
        return False


# --- tensors ---


def compare_tensors(key: str, a: torch.Tensor, b: torch.Tensor) -> TensorDifference | None:
    """None if they are equal: dtype, layout, shape and elements, NaN with NaN too."""
    difference = TensorDifference(
        key, format_dtype(a), format_dtype(b), tuple(a.shape), tuple(b.shape), num_elements=a.numel()
    )
    is_same_kind = (difference.dtype_a, difference.shape_a) == (difference.dtype_b, difference.shape_b)
    parts_a, parts_b = strided_parts(a), strided_parts(b)
    if [part.shape for part in parts_a] != [part.shape for part in parts_b]:
        return difference
    if a.is_meta or b.is_meta:
        return None if is_same_kind and a.is_meta == b.is_meta else difference
    tally = _Tally()
    for part_a, part_b in zip(parts_a, parts_b, strict=True):
        if part_a.dtype != part_b.dtype or not _has_same_bytes(part_a, part_b):
            for piece_a, piece_b in _pieces(part_a, part_b):
                tally.add(_widened(piece_a), _widened(piece_b))
    if is_same_kind and tally.num_differing == 0:
        return None
    return replace(difference, num_differing=tally.num_differing, max_abs=tally.max_abs, relative=tally.relative)


class _Tally:
    """How much the pieces seen so far differ."""

    def __init__(self) -> None:
        self.num_differing = 0
        self.max_abs = 0.0
        self._scale = 0.0

    @property
    def relative(self) -> float:
        if self.num_differing == 0:
            return 0.0
        return self.max_abs / self._scale if self._scale else math.inf * self.max_abs

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Count in a piece of each, widened."""
        size = (a if a.is_complex() else a.double()).abs()
        self._scale = max(self._scale, float(torch.where(size.isfinite(), size, 0.0).max()))
        differs = (a != b) & ~(a.isnan() & b.isnan())
        num_differing = int(differs.count_nonzero())
        if num_differing == 0:
            return
        self.num_differing += num_differing
        largest = float(_distance(a[differs], b[differs]).max())
        self.max_abs = largest if math.isnan(largest) or largest > self.max_abs else self.max_abs


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype != torch.int64 or b.dtype != torch.int64:
        return (a - b).abs().double()
    # A double can't tell neighbours above 2^53 apart; a difference of integers may overflow, but only if it is large.
    far = (a.double() - b.double()).abs()
    return torch.where(far < 2.0**62, (a - b).abs().double(), far)


def _has_same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The fast way to equality; False means only that it takes a closer look.

    What is not contiguous would be copied whole for this.
    """
    if a.is_conj() or b.is_conj() or a.is_neg() or b.is_neg() or not (a.is_contiguous() and b.is_contiguous()):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _pieces(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two tensors of one shape in parts that are small enough, however they lie in memory."""
    if a.numel() == 0:
        return
    if a.numel() <= _PIECE_ELEMENTS:
        yield a, b
        return
    dimension = max(range(a.dim()), key=lambda index: a.shape[index])
    half = a.shape[dimension] // 2
    for start, length in ((0, half), (half, a.shape[dimension] - half)):
        yield from _pieces(a.narrow(dimension, start, length), b.narrow(dimension, start, length))


def _widened(piece: torch.Tensor) -> torch.Tensor:
    """The same values in a type that has arithmetic, which small and unsigned ones have not."""
    if piece.dtype.is_complex:
        return piece.to(torch.complex128)
    try:
        return piece.to(torch.float64 if piece.dtype.is_floating_point else torch.int64)
    except (RuntimeError, NotImplementedError):  # packed types: their bytes
        return piece.contiguous().reshape(-1).view(torch.uint8).to(torch.int64)
