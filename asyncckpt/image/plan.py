"""Planning: pickle the state with its storages by reference, and lay out the whole file.

The pickle is the one that torch.save writes, for CPU state byte for byte (a test holds this against the installed
torch, kind by kind); only plain tensors, which are nearly all of them, take a shorter way to the same bytes. After
planning, nothing but the storages' bytes is still shared with live training state.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch.nn.parameter import is_lazy
from torch.storage import TypedStorage, UntypedStorage

from asyncckpt.errors import UnsupportedStateError
from asyncckpt.image.layout import MAX_METADATA_BYTES, METADATA_RECORD, Layout, plan_layout

PICKLE_PROTOCOL = 2  # torch.save's
SERIALIZATION_ID_BYTES = 40

_STORAGE_CLASSES: frozenset[type] = frozenset(torch._storage_classes)
_GLOBAL_TYPES = (type, types.FunctionType, types.BuiltinFunctionType)
_NO_DIGEST = "0" * 64
_MAX_PATH_CHARS = 400
_MAX_PATH_LEVELS = 200


@dataclass
class Plan:
    """Where every byte of the image will come from.

    `contents` runs parallel to `layout.records`: bytes that are final already, a storage still to be copied, or None
    for the serialization id, which depends on the checksums. `versions` holds each tensor with its `_version` when it
    was planned. `views` maps a storage's key to the plain tensors that look into it; a storage missing there is also
    reached in some other way (a raw storage, a subclass, a sparse tensor).
    """

    layout: Layout
    contents: list[bytes | UntypedStorage | None]
    versions: list[tuple[torch.Tensor, int]]
    views: dict[int, list[torch.Tensor]]
    globals: set[str] = field(default_factory=set)
    array_bytes: int = 0  # of NumPy arrays, pickled inline

    @property
    def storages(self) -> list[UntypedStorage]:
        return [content for content in self.contents if isinstance(content, UntypedStorage)]


def plan_state(state: object, metadata: Mapping[str, object] | None = None) -> Plan:
    """Plan the image of `state`; `metadata` travels inside the file as JSON.

    Blocks for milliseconds per thousand tensors; copies no tensor data. Raises `UnsupportedStateError`, with the
    key's path, for what torch.save can't save either.
    """
    pickled = io.BytesIO()
    pickler = _StatePickler(pickled)
    with _collector_paused():
        try:
            pickler.dump(state)
        except Exception as error:
            raise _explain(state, error) from error
        return _lay_out(pickled.getvalue(), pickler, metadata or {})


def find_unsafe(state: object, plan: Plan) -> tuple[str, str] | None:
    """The path of what a safe load (`weights_only=True`) of the planned state would refuse, and why; None if nothing.

    What the user allowed by `torch.serialization.add_safe_globals` is safe.
    """
    allowed = _allowed_globals()
    if plan.globals <= allowed:
        return None

    def is_unsafe(pickler: _StatePickler, child: object) -> bool:
        pickler.dump(child)
        return not pickler.globals <= allowed

    path, _ = _innermost(state, "state", is_unsafe)
    return _shortened(path), min(plan.globals - allowed)


def _allowed_globals() -> frozenset[str]:
    names = set(torch._weights_only_unpickler._get_allowed_globals())
    for allowed in torch.serialization.get_safe_globals():
        thing, name = allowed if isinstance(allowed, tuple) else (allowed, None)
        names.add(name or f"{thing.__module__}.{thing.__qualname__}")
    return frozenset(names)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Planning only allocates; scanning that over and over for cycles was half the time at 100,000 tensors."""
    global _collector_was_enabled
    was_enabled = gc.isenabled()
    try:
        _collector_was_enabled = _collector_was_enabled or was_enabled
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()
            _collector_was_enabled = False


_collector_was_enabled = False  # before the pause that is on, if one is


def _end_pause_in_child() -> None:
    if _collector_was_enabled:
        gc.enable()


os.register_at_fork(after_in_child=_end_pause_in_child)


def _lay_out(pickled: bytes, pickler: _StatePickler, metadata: Mapping[str, object]) -> Plan:
    contents: list[bytes | UntypedStorage | None] = [pickled, sys.byteorder.encode()]
    sizes = [("data.pkl", len(pickled)), ("byteorder", len(sys.byteorder))]
    for key, storage in enumerate(pickler.storages):
        sizes.append((f"data/{key}", storage.nbytes()))
    contents.extend(pickler.storages)
    # The digest is a fixed number of characters, so that the layout it describes doesn't depend on it.
    try:
        description = msgspec.json.encode({**metadata, "layout_digest": _NO_DIGEST})
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise UnsupportedStateError(f"metadata must be plain data that JSON can hold: {error}") from error
    if len(description) > MAX_METADATA_BYTES:
        raise UnsupportedStateError(f"metadata takes {len(description):,} bytes; put large data into the state")
    sizes.append(("version", 2))
    sizes.append((".data/serialization_id", SERIALIZATION_ID_BYTES))
    sizes.append((METADATA_RECORD, len(description)))
    layout = plan_layout(sizes)
    description = msgspec.json.encode({**metadata, "layout_digest": layout.digest()})
    contents.extend((b"3\n", None, description))
    return Plan(layout, contents, pickler.versions, pickler.views, pickler.globals, pickler.array_bytes)


class _StorageReference:
    """Stands in the pickle's argument tuple where torch has a TypedStorage, at a tenth of its cost."""

    __slots__ = ("persistent_id",)

    def __init__(self, persistent_id: tuple[str, type, str, str, int]) -> None:
        self.persistent_id = persistent_id


class _StatePickler(pickle.Pickler):
    """Emits torch.save's pickle, and notes storages, tensor versions and the globals that a load will look up."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=PICKLE_PROTOCOL)
        self.storages: list[UntypedStorage] = []
        self.versions: list[tuple[torch.Tensor, int]] = []
        self.views: dict[int, list[torch.Tensor]] = {}
        self.globals: set[str] = set()
        self.array_bytes = 0
        self._keys: dict[int, int] = {}  # storage identity → key
        self._key_names: list[str] = []
        self._dtypes: list[torch.dtype] = []
        self._dtype_at_address: dict[int, torch.dtype] = {}
        self._locations: dict[torch.device, str] = {}

    def persistent_id(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is _StorageReference:
            return obj.persistent_id
        if kind not in _STORAGE_CLASSES:
            return None
        if isinstance(obj, TypedStorage):
            storage, dtype = obj._untyped_storage, obj.dtype
            storage_type = getattr(torch, obj._pickle_storage_type())
            numel = obj._size()
        else:
            storage, dtype = obj, torch.uint8
            storage_type = torch.serialization.normalize_storage_type(kind)
            numel = storage.nbytes()
        key = self._add_storage(storage, dtype)
        self.views.pop(key, None)
        self._dtypes[key] = dtype
        return ("storage", storage_type, self._key_names[key], self._locations[storage.device], numel)

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is torch.Tensor:
            if not obj.is_inference():
                self.versions.append((obj, obj._version))
            storage_type = _plain_storage_type(obj)
            if storage_type is not None:
                return self._reduce_plain_tensor(obj, storage_type)
        elif kind is OrderedDict:
            # Same bytes; the default way recomputes the class's slots every time, a quarter of the whole pickling.
            if not obj and not obj.__dict__:
                return OrderedDict, ()
        elif isinstance(obj, torch.Tensor):
            # A lazy module's parameter has no data yet, and refuses to be asked about it.
            if not is_lazy(obj) and not obj.is_inference():
                self.versions.append((obj, obj._version))
        elif isinstance(obj, _GLOBAL_TYPES):
            self.globals.add(f"{obj.__module__}.{obj.__qualname__}")
        elif kind is torch.dtype:
            self.globals.add(str(obj))
        elif obj is Ellipsis or obj is NotImplemented:
            self.globals.add(f"builtins.{obj!r}")
        elif kind.__name__ == "ndarray":
            self.array_bytes += obj.nbytes
        return NotImplemented

    def _reduce_plain_tensor(self, tensor: torch.Tensor, storage_type: type) -> Any:
        """What Tensor.__reduce_ex__ gives for a dense tensor without Python state."""
        storage = tensor.untyped_storage()
        dtype = tensor.dtype
        known = len(self.storages)
        key = self._add_storage(storage, dtype)
        if key == known:
            self.views[key] = [tensor]
        elif key in self.views:
            self.views[key].append(tensor)
        numel = storage.nbytes() // dtype.itemsize
        location = self._locations[storage.device]
        reference = _StorageReference(("storage", storage_type, self._key_names[key], location, numel))
        return torch._utils._rebuild_tensor_v2, (
            reference,
            tensor.storage_offset(),
            tuple(tensor.size()),
            tensor.stride(),
            tensor.requires_grad,
            OrderedDict(),
        )

    def _add_storage(self, storage: UntypedStorage, dtype: torch.dtype) -> int:
        """The storage's key: storages are told apart by identity, so that views and tied weights stay shared."""
        identity = storage._cdata
        key = self._keys.get(identity)
        if key is None:
            if storage.device.type == "meta":
                raise UnsupportedStateError("a storage on the meta device holds no data")
            if storage.device not in self._locations:
                self._locations[storage.device] = torch.serialization.location_tag(storage)
            key = len(self.storages)
            self._check_dtype(storage, dtype)
            self._keys[identity] = key
            self.storages.append(storage)
            self._key_names.append(str(key))
            self._dtypes.append(dtype)
        elif self._dtypes[key] is not dtype:
            self._check_dtype(storage, dtype)
        return key

    def _check_dtype(self, storage: UntypedStorage, dtype: torch.dtype) -> None:
        """The format names one dtype per storage, so a second one would load wrong: torch.save refuses it too."""
        if storage.data_ptr() == 0:
            return
        known = self._dtype_at_address.setdefault(storage.data_ptr(), dtype)
        if known is not dtype:
            raise UnsupportedStateError(
                f"two tensors view the same memory as {known} and as {dtype}, which the torch format can't hold; "
                "clone one of them before saving"
            )


_STORAGE_TYPES: dict[torch.dtype, type] = {
    dtype: getattr(torch, name)
    for dtype, name in torch.storage._dtype_to_storage_type_map().items()
    if not dtype.is_floating_point or dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if dtype not in (torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4)
}


def _plain_storage_type(tensor: torch.Tensor) -> type | None:
    """The storage type to name for a dense tensor without hooks or attributes; None where torch must reduce it."""
    if (
        tensor.layout is not torch.strided
        or tensor.device.type not in ("cpu", "cuda")
        or tensor.is_nested
        or tensor._backward_hooks
        or tensor.__dict__
        or torch._C._get_tensor_metadata(tensor)  # type: ignore[attr-defined]
    ):
        return None
    return _STORAGE_TYPES.get(tensor.dtype)


def _explain(state: object, error: Exception) -> UnsupportedStateError:
    """Find the innermost element that can't be pickled, and name its path."""

    def fails(pickler: _StatePickler, child: object) -> bool:
        try:
            pickler.dump(child)
        except Exception:
            return True
        return False

    path, culprit = _innermost(state, "state", fails)
    kind = f"{type(culprit).__module__}.{type(culprit).__qualname__}"
    return UnsupportedStateError(
        f"{_shortened(path)} can't be saved: {error} (it is a {kind}); remove it from the state, or save its "
        "state_dict() in its place"
    )


def _innermost(value: object, path: str, is_culprit: Callable[[_StatePickler, object], bool]) -> tuple[str, object]:
    """Descend into the first child that is a culprit after what comes before it: two views may be fine one by one."""
    before: list[object] = []
    for _ in range(_MAX_PATH_LEVELS):  # an object may hold itself, and a list may be too deep
        pickler = _StatePickler(io.BytesIO())
        pickler.dump(before)
        for child_path, child in _children(value, path):
            if is_culprit(pickler, child):
                path, value = child_path, child
                break
            before.append(child)
        else:
            break
    return path, value


def _shortened(path: str) -> str:
    if len(path) <= _MAX_PATH_CHARS:
        return path
    return f"{path[: _MAX_PATH_CHARS // 2]} … {path[-_MAX_PATH_CHARS // 2 :]}"


def _children(value: object, path: str) -> list[tuple[str, object]]:
    if isinstance(value, Mapping):
        keys = [(f"key {key!r} of {path}", key) for key in value]
        return keys + [(f"{path}[{key!r}]", child) for key, child in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"{path}[{index}]", child) for index, child in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [(f"an element of {path}", child) for child in value]
    if isinstance(value, (type, types.ModuleType, types.FunctionType, BaseException)):
        return []  # not pickled by their attributes (and looking at an exception's would give it some)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        return [(f"{path}.{name}", child) for name, child in attributes.items()]
    return []
