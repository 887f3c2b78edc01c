"""Kinds of state: what torch.save saves is saved, to the bit, and stock torch.load opens it; the rest is refused."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import fractions
import functools
import io
import math
import pathlib
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import types
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt.errors import UnsafeCheckpointError, UnsupportedStateError

from .compare import assert_same
from .images import payloads, torch_file

NOT_IN_OURS = {".format_version", ".storage_alignment"}  # they make newer torch compute offsets: see the design
ONLY_IN_OURS = {"asyncckpt.json"}


@pytest.fixture(scope="module")
def saver() -> Iterator[asyncckpt.AsyncCheckpointSaver]:
    with asyncckpt.AsyncCheckpointSaver() as saver:
        yield saver


def check(saver: asyncckpt.AsyncCheckpointSaver, state: object, directory: pathlib.Path) -> None:
    """Save with both, and compare the records, what torch.load makes of them, and what asyncckpt.load makes of ours."""
    path, torch_path = directory / "ours.pt", directory / "theirs.pt"
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".*weights_only=False", UserWarning)
        handle = saver.save(state, path)
    warned = any("weights_only=False" in str(warning.message) for warning in caught)
    torch.save(state, torch_path)
    assert handle.result(60).filepath == path

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    ours, theirs = payloads(path.read_bytes()), payloads(torch_path.read_bytes())
    assert ours.keys() - ONLY_IN_OURS == theirs.keys() - NOT_IN_OURS
    for name in ours.keys() - ONLY_IN_OURS - {".data/serialization_id"}:
        assert ours[name] == theirs[name], name
    assert len(ours[".data/serialization_id"]) == len(theirs[".data/serialization_id"])

    for mmap in (True, False):
        try:
            expected = torch.load(torch_path, weights_only=True, mmap=mmap)
            weights_only = True
        except pickle.UnpicklingError:
            expected = torch.load(torch_path, weights_only=False, mmap=mmap)
            weights_only = False
        assert warned == (not weights_only), "save() warns of just what a safe load refuses"
        assert_same(torch.load(path, weights_only=weights_only, mmap=mmap), expected)
        assert_same(asyncckpt.load(path, None, weights_only=weights_only, mmap=mmap), expected)
        if not weights_only:
            with pytest.raises(UnsafeCheckpointError):
                asyncckpt.load(path, mmap=mmap)


WARNS_ITSELF = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "Sparse (CSR|CSC|BSR|BSC) tensor support is in beta",
        "The PyTorch API of nested tensors is in prototype",
        "TypedStorage is deprecated",
        "Lazy modules are a new feature",
        "ComplexHalf support",
        ".*quantize_per_",
        ".*torch.ao.quantization",
        ".*non-leaf Tensor",
        ".*is deprecated",
    )
]


def warns_itself(function: Any) -> Any:
    """torch's own warnings about making or loading such things."""
    return functools.reduce(lambda wrapped, mark: mark(wrapped), WARNS_ITSELF, function)


# --- tensors ---


def _bits(dtype: torch.dtype) -> torch.Tensor:
    """Every byte value, read as `dtype`: NaN of all kinds, infinities, subnormals."""
    return torch.arange(256, dtype=torch.uint8).view(dtype)


def _dtypes() -> list[torch.dtype]:
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return sorted((dtype for dtype in found if not str(dtype).startswith("torch.q")), key=str)


SUB_BYTE = [dtype for dtype in _dtypes() if re.match(r"torch\.u?int[1-7]$", str(dtype))]  # no storage type yet


@warns_itself
@pytest.mark.parametrize("dtype", [dtype for dtype in _dtypes() if dtype not in SUB_BYTE], ids=str)
def test_dtypes(dtype: torch.dtype, saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path) -> None:
    bits = torch.tensor([0, 1, 1, 0] * 64, dtype=torch.bool) if dtype is torch.bool else _bits(dtype)
    check(saver, {"all": bits, "view": bits[3:9], "empty": bits[:0], "scalar": bits[1]}, tmp_path)


def test_dtypes_without_storage_are_refused(saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UnsupportedStateError, match=r"state\['x'\]"):
        saver.save({"x": _bits(SUB_BYTE[0])}, tmp_path / "x.pt")


class Tagged(torch.Tensor):
    """A subclass without storage of its own kind, as `as_subclass` gives."""


class Pair(torch.Tensor):
    """A wrapper: it has no storage, its parts have."""

    first: torch.Tensor
    second: torch.Tensor

    @staticmethod
    def __new__(cls, first: torch.Tensor, second: torch.Tensor) -> Pair:
        wrapper: Pair = torch.Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype)
        wrapper.first, wrapper.second = first, second
        return wrapper

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["first", "second"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: object) -> Pair:
        return Pair(inner["first"], inner["second"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} on a wrapper")


def _with_attributes() -> torch.Tensor:
    tensor = torch.rand(3)
    tensor.tag = {"origin": "test", "twin": torch.ones(2)}  # type: ignore[attr-defined]
    return tensor


def _marked_parameter() -> nn.Parameter:
    parameter = nn.Parameter(torch.rand(2))
    parameter.is_tied = True  # type: ignore[attr-defined]
    return parameter


def _aliased() -> dict[str, Any]:
    base = torch.arange(24.0)
    return {
        "base": base,
        "same": base,
        "slice": base[4:10],
        "strided": base[1::5],
        "transposed": base.view(4, 6).t(),
        "expanded": base[:1].expand(5, 1),
        "overlapping": base.as_strided((5, 3), (2, 1), 3),
        "detached": base.detach(),
        "reversed": [base.view(2, 12)[1], base],
    }


def _tied() -> dict[str, Any]:
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    return {
        "embedding": embedding.state_dict(),
        "head": head.state_dict(),
        "parameters": [embedding.weight, head.weight],
    }


def _inference() -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return {"a": torch.rand(3), "b": torch.rand(2, 2).t()}


def _sparse(layout: torch.layout) -> torch.Tensor:
    dense = torch.tensor([[0.0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 4, 0], [0, 5, 0, 6]])
    block = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    return dense.to_sparse(layout=layout, blocksize=block)


def _uncoalesced() -> torch.Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 2]]), torch.tensor([1.0, 2.0, 3.0]), (4,), check_invariants=True
    )


TENSORS: dict[str, Callable[[], object]] = {
    "bare": lambda: torch.rand(3),
    "empty shapes": lambda: [torch.empty(0), torch.empty(3, 0, 2), torch.empty(0, dtype=torch.int8)],
    "scalars": lambda: [torch.tensor(1.5), torch.tensor(True), torch.tensor(3 + 4j)],
    "aliased": _aliased,
    "small view of a large storage": lambda: torch.rand(10_000)[5:6],
    "channels last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "conj": lambda: torch.rand(3, dtype=torch.complex64).conj(),
    "neg bit": lambda: torch.rand(3, dtype=torch.complex64).conj().imag,
    "requires grad": lambda: [torch.rand(2, requires_grad=True), torch.rand(2, requires_grad=True) * 2],
    "parameters": lambda: [nn.Parameter(torch.rand(2)), nn.Parameter(torch.arange(2), requires_grad=False)],
    "tied weights": _tied,
    "inference mode": _inference,
    "python attributes": _with_attributes,
    "parameter with attributes": _marked_parameter,
    "as_subclass": lambda: torch.rand(4).as_subclass(Tagged),
    "wrapper subclass": lambda: Pair(torch.rand(3), torch.rand(5)),
    "lazily cloned": lambda: (lambda a: [a, torch._lazy_clone(a)])(torch.rand(5)),
    "uninitialised": lambda: [nn.LazyLinear(3).state_dict(), nn.LazyBatchNorm1d().state_dict()],
    "meta": lambda: {"meta": torch.empty(3, 4, device="meta"), "view": torch.empty(4, 3, device="meta").t()},
    "sparse COO": lambda: _sparse(torch.sparse_coo),
    "sparse COO, not coalesced": _uncoalesced,
    "sparse CSR": lambda: _sparse(torch.sparse_csr),
    "sparse CSC": lambda: _sparse(torch.sparse_csc),
    "sparse BSR": lambda: _sparse(torch.sparse_bsr),
    "sparse BSC": lambda: _sparse(torch.sparse_bsc),
    "nested, jagged": lambda: torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(4, 3)], layout=torch.jagged),
    "nested, strided": lambda: torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(4, 3)]),
    "quantized per tensor": lambda: torch.quantize_per_tensor(torch.rand(4), 0.1, 3, torch.qint8),
    "quantized per channel": lambda: torch.quantize_per_channel(
        torch.rand(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([1, 2]), 0, torch.quint8
    ),
    "untyped storage": lambda: torch.arange(5).untyped_storage(),
    "typed storage": lambda: torch.FloatStorage([1.0, 2.0]),
    "storage and its tensor": lambda: (lambda t: [t, t.untyped_storage()])(torch.arange(4, dtype=torch.uint8)),
    "generator": lambda: torch.Generator().manual_seed(5),
}


@warns_itself
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_tensors(make: Callable[[], object], saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path) -> None:
    state = make()
    check(saver, state, tmp_path)


@pytest.mark.parametrize("make", [_aliased, _tied], ids=["views", "tied weights"])
def test_shared_storages_are_stored_once(
    make: Callable[[], object], saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path
) -> None:
    saver.save(make(), tmp_path / "x.pt").result(60)
    assert [name for name in payloads((tmp_path / "x.pt").read_bytes()) if name.startswith("data/")] == ["data/0"]


def test_dtensor(saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path) -> None:
    import torch.distributed as distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weights = {place: distribute_tensor(torch.rand(4, 2), mesh, [place]) for place in (Shard(0), Replicate())}
        check(saver, {str(place): tensor for place, tensor in weights.items()}, tmp_path)
    finally:
        distributed.destroy_process_group()


# --- everything else ---


@dataclasses.dataclass
class Config:
    width: int
    weights: torch.Tensor
    names: list[str] = dataclasses.field(default_factory=list)


class Colour(enum.Enum):
    RED = "red"


class Point(NamedTuple):
    x: float
    y: torch.Tensor


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]


class Model(nn.Module):
    """Parameters, a buffer, a shared submodule and a Python attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = self.layer
        self.norm = nn.BatchNorm1d(4)
        self.config = Config(4, torch.ones(1), ["a"])


def _nested(value: object, depth: int) -> object:
    for _ in range(depth):
        value = [value]
    return value


def _cyclic() -> list[Any]:
    cycle: list[Any] = [1, {}]
    cycle[1]["self"] = cycle
    return cycle


def _ordered_with_metadata() -> object:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()  # an OrderedDict with an attribute


def _rng() -> dict[str, object]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "generator": np.random.default_rng(3).bit_generator.state,
        "torch": torch.get_rng_state(),
        "objects": [random.Random(5), np.random.default_rng(7)],
    }


VALUES: dict[str, Callable[[], object]] = {
    "empty dict": dict,
    "None": lambda: None,
    "constants": lambda: [None, True, False, Ellipsis, NotImplemented],
    "numbers": lambda: [0, -1, 2**31, 2**63, -(2**200), 0.1, math.inf, -0.0, math.nan, 1 + 2j],
    "text": lambda: {"": "", "Gewicht/ü": "日本語\n\0\U0001f600", "surrogate": "\ud800", "long": "x" * 70_000},
    "bytes": lambda: [b"", b"\0\xff" * 300, bytearray(b"abc"), bytearray()],
    "containers": lambda: [(), (1,), (1, 2, 3, 4), [], {}, {1, 2}, set(), frozenset({3}), [[[]]]],
    "non-string keys": lambda: {1: "a", 2.5: "b", (1, "x"): "c", None: "d", False: "e", b"k": "f", torch.float32: "g"},
    "ordered": lambda: [
        collections.OrderedDict(b=1, a=torch.ones(1)),
        collections.OrderedDict(),
        _ordered_with_metadata(),
    ],
    "collections": lambda: [
        collections.defaultdict(list, {"a": [1]}),
        collections.Counter("aab"),
        collections.deque([1, 2], maxlen=3),
    ],
    "deep": lambda: _nested(torch.ones(2), 300),
    "shared objects": lambda: (lambda shared: {"a": shared, "b": [shared, shared]})([1, "s"]),
    "cyclic": _cyclic,
    "torch values": lambda: [torch.float32, torch.Size([2, 3]), torch.device("cpu"), torch.strided, torch.__version__],
    "classes and functions": lambda: [nn.Linear, torch.relu, len, Config, _cyclic, functools.partial(max, 1)],
    "dataclass": lambda: Config(3, torch.rand(2), ["x"]),
    "enum": lambda: [Colour.RED, {Colour.RED: 1}],
    "named tuple": lambda: Point(1.0, torch.rand(2)),
    "slots": lambda: Slotted([1, 2]),
    "standard library": lambda: [
        datetime.datetime(2026, 1, 1),
        fractions.Fraction(1, 3),
        pathlib.PurePosixPath("a/b"),
        range(3),
        slice(1, 2),
        types.SimpleNamespace(a=1),
    ],
    "numpy arrays": lambda: {
        "float": np.random.rand(3, 4),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "view": np.arange(10)[::3],
        "empty": np.empty((0, 2)),
        "scalar": np.array(5),
        "structured": np.zeros(2, dtype=[("a", "<i4"), ("b", "<f8")]),
        "text": np.array(["a", "bc"]),
        "objects": np.array([None, "x", 1], dtype=object),
    },
    "numpy scalars": lambda: [np.float32(1.5), np.int64(-3), np.bool_(True), np.float64(math.nan), np.complex64(1j)],
    "random generators": _rng,
    "module": Model,
    "grad scaler": lambda: torch.amp.GradScaler("cpu").state_dict(),
    "exception": lambda: ValueError("kept"),
}


@warns_itself
@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_values(make: Callable[[], object], saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path) -> None:
    check(saver, make(), tmp_path)


def test_dataclass_with_safe_globals(saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path) -> None:
    state = Config(3, torch.rand(2), ["x"])
    with torch.serialization.safe_globals([Config]):
        check(saver, state, tmp_path)
        assert_same(asyncckpt.load(tmp_path / "ours.pt"), state)
    with pytest.raises(UnsafeCheckpointError, match=r"refers to .*test_kinds\.Config"):
        asyncckpt.load(tmp_path / "ours.pt")


def test_grad_scaler_that_was_used(saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    check(saver, scaler.state_dict(), tmp_path)


def _train(optimizer_class: type[torch.optim.Optimizer]) -> dict[str, object]:
    """One step, so that there is state."""
    sparse = optimizer_class is torch.optim.SparseAdam
    model: nn.Module = nn.Embedding(6, 4, sparse=True) if sparse else nn.Linear(4, 4, bias=False)
    options: dict[str, Any] = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = optimizer_class(model.parameters(), lr=0.01, **options)  # type: ignore[call-arg]

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.tensor([1, 3]) if sparse else torch.ones(2, 4)).pow(2).sum()
        loss.backward()
        return float(loss.detach())

    for _ in range(2):
        optimizer.step(closure)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "whole": optimizer}


OPTIMIZERS = [
    value
    for value in vars(torch.optim).values()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_optimizers(
    optimizer_class: type[torch.optim.Optimizer], saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path
) -> None:
    state = _train(optimizer_class)
    whole = state.pop("whole")
    assert state["optimizer"]["state"]  # type: ignore[index]
    check(saver, state, tmp_path)
    assert asyncckpt.verify(tmp_path / "ours.pt").ok
    asyncckpt.load(tmp_path / "ours.pt")  # every optimizer's state_dict is safe to load
    check(saver, whole, tmp_path)


SCHEDULERS: dict[str, dict[str, Any]] = {
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1},
    "ExponentialLR": {"gamma": 0.9},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "MultiStepLR": {"milestones": [1, 3]},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},
    "PolynomialLR": {"total_iters": 5},
    "StepLR": {"step_size": 2},
}


def _scheduler(name: str, optimizer: torch.optim.Optimizer) -> Any:
    lr_scheduler: Any = torch.optim.lr_scheduler
    if name in ("SequentialLR", "ChainedScheduler"):
        parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return (
            lr_scheduler.ChainedScheduler(parts) if name[0] == "C" else lr_scheduler.SequentialLR(optimizer, parts, [2])
        )
    return getattr(lr_scheduler, name)(optimizer, **SCHEDULERS.get(name, {}))


SCHEDULER_NAMES = sorted(
    name
    for name, value in vars(torch.optim.lr_scheduler).items()
    if isinstance(value, type) and issubclass(value, torch.optim.lr_scheduler.LRScheduler) and not name.startswith("_")
    if name != "LRScheduler"
)


@warns_itself
@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_schedulers(name: str, saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    scheduler = _scheduler(name, optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step(*([0.5] if name == "ReduceLROnPlateau" else []))
    check(saver, {"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path)


# --- surroundings ---


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_default_device_does_not_matter(
    device: str, saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path
) -> None:
    state = _aliased()
    with torch.device(device):
        check(saver, state, tmp_path)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_mode_does_not_matter(
    mode: Callable[[], Any], saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path
) -> None:
    state = {"leaf": torch.rand(3, requires_grad=True), "inference": _inference()}
    with mode():
        handle = saver.save(state, tmp_path / "x.pt")
    handle.result(60)
    assert_same(asyncckpt.load(tmp_path / "x.pt"), state)


def test_drop_in_functions(tmp_path: pathlib.Path) -> None:
    """asyncckpt.save, wait and load as torch.save and load are used; the state may change at once."""
    state = _aliased()
    expected = torch.load(io.BytesIO(torch_file(state)))
    for index in range(3):
        asyncckpt.save(state, tmp_path / f"{index}.pt").wait_staged()
        state["base"].add_(1)
    asyncckpt.wait(60)
    for index in range(3):
        assert_same(asyncckpt.load(tmp_path / f"{index}.pt"), expected)
        expected["base"].add_(1)


def test_100_000_small_tensors(saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path) -> None:
    """More entries than a zip without zip64 can count; every reader finds them."""
    state = {f"weight.{index}": torch.full((3,), float(index)) for index in range(100_000)}
    path = tmp_path / "x.pt"
    saver.save(state, path).result(120)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 100_005
        reference = io.BytesIO()
        torch.save(state, reference)
        assert archive.read("archive/data.pkl") == zipfile.ZipFile(reference).read("archive/data.pkl")
    assert subprocess.run(["unzip", "-tqq", path], capture_output=True).returncode == 0
    loaded = torch.load(path, mmap=True)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    del loaded
    assert asyncckpt.verify(path).num_records == 100_005


# --- what is refused ---


def _generator() -> Iterator[int]:
    yield 1


def _local_class() -> object:
    class Local:
        pass

    return Local()


def _two_dtypes() -> object:
    tensor = torch.rand(4)
    return {"float": tensor, "bits": tensor.view(torch.int32)}


def _raising() -> object:
    return Raising()


class Raising:
    def __reduce__(self) -> str:
        raise ZeroDivisionError("no")


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "lambda": (lambda: lambda: 1, ""),
    "lambda in an object": (lambda: types.SimpleNamespace(hook=[lambda: 1]), ".hook[0]"),
    "generator": (_generator, ""),
    "lock": (threading.Lock, ""),
    "thread": (lambda: threading.Thread(), "._started._cond._lock"),
    "socket": (lambda: socket.socket(), ""),
    "file": (lambda: open(sys.executable, "rb"), ""),  # noqa: SIM115
    "local class": (lambda: type(_local_class()), ""),
    "module": (lambda: [sys], "[0]"),
    "weak reference": (lambda: weakref.ref(Model), ""),
    "memory view": (lambda: memoryview(b"x"), ""),
    "dictionary view": (lambda: {}.keys(), ""),
    "match": (lambda: re.match("x", "x"), ""),
    "two dtypes": (_two_dtypes, "['bits']"),
    "raising": (_raising, ""),
    "meta storage": (lambda: torch.UntypedStorage(8, device="meta"), ""),
    "opaque tensor": (lambda: torch.rand(2).to_mkldnn(), ""),
    "zero tensor": (lambda: torch._efficientzerotensor(3), ""),
    "too deep": (lambda: _nested(0, 100_000), "[0]"),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("make", "where"), REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused_with_its_path(
    make: Callable[[], object], where: str, saver: asyncckpt.AsyncCheckpointSaver, tmp_path: pathlib.Path
) -> None:
    """By save() itself, before anything is written; the saver goes on."""
    culprit = make()
    state = {"model": {"weight": torch.rand(3)}, "extra": [1, ("x", {7: culprit})], "epoch": 3}
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        torch_file(state)
    with pytest.raises(UnsupportedStateError, match=re.escape(f"state['extra'][1][1][7]{where}")) as caught:
        saver.save(state, tmp_path / "x.pt")
    assert isinstance(caught.value, TypeError)
    assert type(caught.value.__cause__) in (type(theirs.value), UnsupportedStateError, RuntimeError)
    assert len(str(caught.value)) < 1500
    assert list(tmp_path.iterdir()) == []
    saver.save({"epoch": 3}, tmp_path / "x.pt").result(60)
    assert asyncckpt.load(tmp_path / "x.pt") == {"epoch": 3}


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"hooks": {len: 1, lambda: 1: 2}}, "key <function"),
        ({"seen": {1, "a", threading.current_thread}}, None),
        ({"seen": frozenset({_local_class})}, None),
        ({"tuple": (1, (2, [3, threading.Lock()]))}, "state['tuple'][1][1][1]"),
        (Config(1, torch.ones(1), [threading.Lock()]), "state.names[0]"),  # type: ignore[list-item]
        ({"seen": {1, "a", _local_class()}}, "an element of state['seen']"),
        (
            {"first": {"w": (shared := torch.ones(2))}, "second": [0, {"v": shared.view(torch.int32)}]},
            "state['second'][1]['v']",
        ),
    ],
    ids=["key", "function", "function in a set", "tuple", "dataclass", "set", "storage seen before"],
)
def test_paths_of_what_is_refused(state: object, where: str | None, tmp_path: pathlib.Path) -> None:
    if where is None:
        torch_file(state)
        return
    with pytest.raises(UnsupportedStateError, match=re.escape(where)):
        asyncckpt.save(state, tmp_path / "x.pt")


# --- gigantic ones ---


def _check_with_tools(path: pathlib.Path) -> zipfile.ZipFile:
    assert subprocess.run(["unzip", "-tqq", path], capture_output=True).returncode == 0
    return zipfile.ZipFile(path)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("streamed", [False, True])
def test_record_past_4_gib(streamed: bool, tmp_path: pathlib.Path) -> None:
    num_bytes = (4 << 30) + 12_345
    tensor = torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8))  # pages that nobody touches cost nothing
    places = torch.tensor([0, 1 << 20, (4 << 30) - 1, 4 << 30, num_bytes - 1])
    tensor[places] = torch.arange(1, 6, dtype=torch.uint8)
    path = tmp_path / "large.pt"
    with asyncckpt.AsyncCheckpointSaver(memory_limit=(64 << 20) if streamed else 6 << 30) as saver:
        if streamed:
            with pytest.warns(UserWarning, match="in pieces"):
                saver.save({"before": torch.ones(3), "large": tensor, "after": torch.ones(5)}, path)
        else:
            saver.save({"before": torch.ones(3), "large": tensor, "after": torch.ones(5)}, path)
        saver.wait(600)
    del tensor
    try:
        with _check_with_tools(path) as archive:
            assert archive.getinfo("archive/data/1").file_size == num_bytes
        for load in (asyncckpt.load, torch.load):
            loaded = load(path, mmap=True)
            assert loaded["large"][places].tolist() == [1, 2, 3, 4, 5]
            assert int(loaded["large"][: 1 << 24].sum()) == 1 + 2
            assert loaded["after"].tolist() == [1.0] * 5
            del loaded
        with path.open("r+b") as file:
            file.seek(-(1 << 20), 2)
            file.write(b"\x55")
        assert "archive/data/1" in asyncckpt.verify(path).problems[0]
    finally:
        path.unlink()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_archive_past_4_gib_with_many_records(tmp_path: pathlib.Path) -> None:
    state = {index: torch.from_numpy(np.zeros(1 << 22, dtype=np.uint8)) for index in range(1100)}
    for index in range(0, 70_000, 7):
        state[10_000 + index] = torch.full((2,), index)
    for index in range(1100):
        state[index][index] = 7
    path = tmp_path / "many.pt"
    with asyncckpt.AsyncCheckpointSaver(memory_limit=6 << 30) as saver:
        saver.save(state, path).result(600)
    try:
        with _check_with_tools(path) as archive:
            infos = archive.infolist()
            assert len(infos) == len(state) + 5
            assert infos[-1].header_offset > 4 << 30
        assert asyncckpt.verify(path).ok
        loaded = torch.load(path, mmap=True)
        assert loaded.keys() == state.keys()
        assert all(loaded[index].nonzero().tolist() == [[index]] for index in range(0, 1100, 100))
        assert all(torch.equal(loaded[key], state[key]) for key in state if key >= 10_000)
        del loaded
    finally:
        path.unlink()
