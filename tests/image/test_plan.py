"""Planning: what it notes about the state besides the pickle, and what it costs."""

from __future__ import annotations

import gc
import io
import json
import pickletools
import time
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from asyncckpt.errors import UnsupportedStateError
from asyncckpt.image.plan import Plan, plan_state

from .images import torch_file
from .test_kinds import Model, Tagged, warns_itself

PYTHON_2_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # protocol 2 writes these


def globals_in_pickle(plan: Plan) -> set[str]:
    """What a load will look up, read from the opcodes."""
    found = set()
    content = plan.contents[0]
    assert isinstance(content, bytes)
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ")
            found.add(f"{PYTHON_2_NAMES.get(module, module)}.{name}")
    return found


GLOBALS: dict[str, Any] = {
    "tensors": lambda: {"f": torch.ones(2), "b": torch.ones(2, dtype=torch.bool), "v3": torch.ones(2).to(torch.uint16)},
    "ordered": lambda: OrderedDict(a=1),
    "parameter": lambda: nn.Parameter(torch.ones(1)),
    "numpy": lambda: [np.float32(1), np.arange(3)],
    "module": Model,
    "values": lambda: [{1}, 1j, bytearray(b"x"), torch.Size([1]), torch.device("cpu"), torch.strided],
    "constants": lambda: [Ellipsis, NotImplemented, None],
    "dtypes": lambda: [torch.float32, {torch.int8: 1}],
    "sparse": lambda: torch.eye(3).to_sparse(),
    "functions": lambda: [len, torch.relu, nn.Linear.forward],
}


@warns_itself
@pytest.mark.parametrize("make", GLOBALS.values(), ids=GLOBALS)
def test_globals_are_those_of_the_pickle(make: Any) -> None:
    plan = plan_state(make())
    assert globals_in_pickle(plan) <= plan.globals


def test_views_and_versions() -> None:
    base, other, raw = torch.ones(4), torch.zeros(3), torch.ones(2, dtype=torch.uint8)
    view = base[1:]
    base.add_(1)
    plan = plan_state([base, {"view": view}, other, other, raw, raw.untyped_storage()])
    assert [storage.data_ptr() for storage in plan.storages] == [t.data_ptr() for t in (base, other, raw)]
    assert {key: [id(t) for t in found] for key, found in plan.views.items()} == {
        0: [id(base), id(view)],
        1: [id(other)],
    }
    assert [(id(tensor), version) for tensor, version in plan.versions] == [
        (id(base), 1),
        (id(view), 1),
        (id(other), 0),
        (id(raw), 0),
    ]


@pytest.mark.parametrize(
    ("dtype", "reach"),
    [
        (torch.uint8, lambda t: t.untyped_storage()),
        (torch.float32, lambda t: t.as_subclass(Tagged)),
        (torch.complex64, lambda t: t.conj()),
    ],
    ids=["storage", "subclass", "conj"],
)
@pytest.mark.parametrize("order", [1, -1])
def test_storage_reached_in_another_way_has_no_views(dtype: torch.dtype, reach: Any, order: int) -> None:
    """So that overlap mode won't take it for one that only known tensors write to."""
    tensor = torch.ones(2, dtype=dtype)
    assert plan_state([tensor, reach(tensor)][::order]).views == {}


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        tensor = torch.ones(2)
    assert plan_state([tensor]).versions == []


def test_arrays_are_counted() -> None:
    assert plan_state([np.zeros(100), {"a": np.zeros(10, dtype=np.int8)}]).array_bytes == 810


def test_metadata_travels_with_the_layouts_digest() -> None:
    plan = plan_state({"a": torch.ones(2)}, {"epoch": 3, "name": "ü"})
    description = plan.contents[-1]
    assert isinstance(description, bytes)
    assert json.loads(description) == {"epoch": 3, "name": "ü", "layout_digest": plan.layout.digest()}


def test_metadata_must_be_plain() -> None:
    with pytest.raises(TypeError, match=r"JSON|serial|support|Encoding"):
        plan_state({}, {"bad": object()})


def test_a_failed_plan_leaves_the_collector_as_it_was() -> None:
    for enabled in (True, False):
        gc.enable() if enabled else gc.disable()
        try:
            with pytest.raises(UnsupportedStateError):
                plan_state({"bad": lambda: 1})
            plan_state({"good": 1})
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


def test_plan_holds_no_copy_of_tensor_data() -> None:
    tensor = torch.ones(1000)
    (storage,) = plan_state({"a": tensor}).storages
    assert storage.data_ptr() == tensor.data_ptr()


def _plan_secs(num_tensors: int) -> float:
    state = {f"weight.{index}": torch.ones(2) for index in range(num_tensors)}
    times = []
    for _ in range(3):
        started = time.thread_time()
        plan_state(state)
        times.append(time.thread_time() - started)
    return min(times)


def test_planning_is_linear() -> None:
    assert _plan_secs(24_000) < 10 * _plan_secs(4_000)


def test_planning_is_not_slower_than_torchs_pickling() -> None:
    state = {f"weight.{index}": torch.ones(2) for index in range(10_000)}
    times: dict[Any, float] = {}
    for _ in range(3):
        for function in (plan_state, torch_file):
            started = time.thread_time()
            function(state)
            times[function] = min(times.get(function, 1e9), time.thread_time() - started)
    assert times[plan_state] < times[torch_file]


def test_pickle_is_torchs_byte_for_byte() -> None:
    """Kind by kind in test_kinds; here for what repeats, so that the memo is used."""
    tensor = torch.ones(3)
    state = {"a": [tensor, tensor, tensor[1:]], "b": OrderedDict(x=tensor), "c": [OrderedDict(), "cpu", "storage"]}
    with zipfile.ZipFile(io.BytesIO(torch_file(state))) as archive:
        assert plan_state(state).contents[0] == archive.read("archive/data.pkl")
