"""Equality as a checkpoint needs it: types, places and bits, not just values."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.storage import TypedStorage, UntypedStorage

_ATOMS: tuple[type, ...] = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    range,
    slice,
    torch.dtype,
    torch.device,
    torch.Size,
    type,
)
_ATOMS += (type(None), type(Ellipsis), types.FunctionType, types.BuiltinFunctionType, torch.layout, torch.memory_format)


def storage_bytes(storage: UntypedStorage) -> bytes:
    """All bytes of a storage in host memory."""
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy().tobytes()


class _Comparison:
    """Remembers which objects and storages were paired up, so that sharing is compared too."""

    def __init__(self) -> None:
        self._pairs: dict[int, Any] = {}
        self._storages: dict[int, int] = {}
        self._keep: list[Any] = []  # identities stay unique only while the objects live

    def check(self, actual: Any, expected: Any, path: str) -> None:
        assert type(actual) is type(expected), f"{path}: {type(actual)} in place of {type(expected)}"
        if isinstance(expected, _ATOMS):
            assert repr(actual) == repr(expected), f"{path}: {actual!r} in place of {expected!r}"
            return
        if id(expected) in self._pairs:
            assert self._pairs[id(expected)] is actual, f"{path}: one object became two"
            return
        self._pairs[id(expected)] = actual
        self._keep += (actual, expected)
        self._check_contents(actual, expected, path)

    def _check_contents(self, actual: Any, expected: Any, path: str) -> None:
        if isinstance(expected, torch.Tensor):
            self._check_tensor(actual, expected, path)
        elif isinstance(expected, UntypedStorage):
            self._check_storage(actual, expected, path)
        elif isinstance(expected, TypedStorage):
            assert actual.dtype == expected.dtype, path
            self._check_storage(actual._untyped_storage, expected._untyped_storage, path)
        elif isinstance(expected, (np.ndarray, np.generic)):
            assert actual.dtype == expected.dtype, path
            assert actual.shape == expected.shape, path
            if expected.dtype.hasobject:
                self.check(actual.tolist(), expected.tolist(), path)
            else:
                assert actual.tobytes() == expected.tobytes(), path
        elif isinstance(expected, Mapping):
            assert len(actual) == len(expected), path
            for (key, value), (expected_key, expected_value) in zip(actual.items(), expected.items(), strict=True):
                self.check(key, expected_key, f"a key of {path}")
                self.check(value, expected_value, f"{path}[{expected_key!r}]")
            self._check_attributes(actual, expected, path)
        elif isinstance(expected, (list, tuple)):
            assert len(actual) == len(expected), path
            for index, (value, expected_value) in enumerate(zip(actual, expected, strict=True)):
                self.check(value, expected_value, f"{path}[{index}]")
        elif isinstance(expected, (random.Random, np.random.Generator, torch.Generator)):
            assert _state(actual) == _state(expected), path
        elif isinstance(expected, BaseException):
            self.check(actual.args, expected.args, path)
        elif isinstance(expected, functools.partial):
            for name in ("func", "args", "keywords"):
                self.check(getattr(actual, name), getattr(expected, name), f"{path}.{name}")
        elif getattr(expected, "__dict__", None):
            self._check_attributes(actual, expected, path)
        else:
            assert actual == expected, f"{path}: {actual!r} in place of {expected!r}"

    def _check_attributes(self, actual: Any, expected: Any, path: str) -> None:
        attributes, expected_attributes = getattr(actual, "__dict__", {}), getattr(expected, "__dict__", {})
        assert attributes.keys() == expected_attributes.keys(), path
        for name, value in expected_attributes.items():
            self.check(attributes[name], value, f"{path}.{name}")

    def _check_tensor(self, actual: torch.Tensor, expected: torch.Tensor, path: str) -> None:
        if is_lazy(expected):
            self._check_attributes(actual, expected, path)
            return
        for name in ("dtype", "layout", "device", "requires_grad", "is_nested", "is_quantized"):
            assert getattr(actual, name) == getattr(expected, name), f"{path}.{name}"
        if not expected.is_nested:  # a jagged one's shape and attributes hold a process-wide number
            assert actual.shape == expected.shape, f"{path}.shape"
            self._check_attributes(actual, expected, path)
        if hasattr(expected, "__tensor_flatten__"):
            names, context = expected.__tensor_flatten__()
            actual_names, actual_context = actual.__tensor_flatten__()  # type: ignore[attr-defined]
            assert actual_names == names, path
            if not expected.is_nested:
                assert repr(actual_context) == repr(context), path
            for name in names:
                self.check(getattr(actual, name), getattr(expected, name), f"{path}.{name}")
        elif expected.is_nested:
            parts = zip(actual.unbind(), expected.unbind(), strict=True)
            for index, (part, expected_part) in enumerate(parts):
                self.check(part, expected_part, f"{path}.unbind()[{index}]")
        elif expected.layout is torch.sparse_coo:
            assert actual.is_coalesced() == expected.is_coalesced(), path
            self.check(actual._indices(), expected._indices(), f"{path}.indices")
            self.check(actual._values(), expected._values(), f"{path}.values")
        elif expected.layout is not torch.strided:
            by_row = expected.layout in (torch.sparse_csr, torch.sparse_bsr)
            names = ("crow_indices", "col_indices") if by_row else ("ccol_indices", "row_indices")
            for name in (*names, "values"):
                self.check(getattr(actual, name)(), getattr(expected, name)(), f"{path}.{name}")
        else:
            self._check_strided(actual, expected, path)

    def _check_strided(self, actual: torch.Tensor, expected: torch.Tensor, path: str) -> None:
        assert actual.stride() == expected.stride(), f"{path}: strides"
        assert actual.storage_offset() == expected.storage_offset(), f"{path}: offset"
        assert actual.is_conj() == expected.is_conj(), f"{path}: conj bit"
        assert actual.is_neg() == expected.is_neg(), f"{path}: neg bit"
        if expected.is_quantized:
            assert actual.qscheme() == expected.qscheme(), path
            assert str(actual) == str(expected), path
        if expected.device.type == "cpu":
            self._check_storage(actual.untyped_storage(), expected.untyped_storage(), path)

    def _check_storage(self, actual: UntypedStorage, expected: UntypedStorage, path: str) -> None:
        assert actual.nbytes() == expected.nbytes(), f"{path}: storage size"
        if expected.nbytes() == 0 or expected.device.type == "meta":
            return
        paired = self._storages.setdefault(expected._cdata, actual._cdata)
        assert paired == actual._cdata, f"{path}: sharing of storages changed"
        self._keep += (actual, expected)
        assert storage_bytes(actual) == storage_bytes(expected), f"{path}: bytes"


def assert_same(actual: object, expected: object) -> None:
    """Raise unless the two are equal to the bit, down to types, strides and which tensors share a storage."""
    for first, second in ((actual, expected), (expected, actual)):  # both ways, so that sharing is one to one
        _Comparison().check(first, second, "state")


def _state(generator: Any) -> object:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return generator.get_state().tolist()
