"""Parts of a checkpoint: what is read of the file, and that nothing unread gets through."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncckpt
from asyncckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from asyncckpt.image.partial import load_part
from asyncckpt.image.selection import select
from asyncckpt.image.verify import verify_payloads

from .compare import assert_same
from .images import BytesReader, image_of
from .states import random_state

LARGE = 300_000


class NotedReader(BytesReader):
    """Notes how many bytes were read."""

    num_read = 0

    def read_into(self, offset: int, view: memoryview) -> None:
        super().read_into(offset, view)
        self.num_read += len(view)


def training_state() -> dict[str, Any]:
    model = OrderedDict({"encoder.weight": torch.arange(float(LARGE)), "head.weight": torch.ones(10)})
    model["tied"] = model["encoder.weight"][10:20]
    moments = {0: {"exp_avg": torch.full((LARGE,), 2.0), "step": torch.tensor(3.0)}}
    return {
        "model_state_dict": model,
        "optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 3,
    }


@pytest.mark.parametrize(
    ("keys", "num_large"),
    [
        (["model_state_dict"], 1),
        (["model_state_dict", "epoch"], 1),
        (["model_state_dict.head"], 0),
        (["model_state_dict.tied"], 1),
        (["optimizer_state_dict.state.0.exp_avg", "epoch"], 1),
        (["optimizer_state_dict.param_groups"], 0),
        (["epoch"], 0),
        (["model_state_dict", "optimizer_state_dict"], 2),
    ],
)
def test_only_the_part_is_read(keys: list[str], num_large: int) -> None:
    """And it is what the whole has there."""
    state = training_state()
    reader = NotedReader(image_of(state, {}))
    part = load_part(reader, "a.pt", keys)
    assert part is not None
    assert_same(part, select(state, keys, "a.pt"))
    assert num_large * 4 * LARGE <= reader.num_read < num_large * 4 * LARGE + 100_000


def test_the_part_can_be_written_to(tmp_path: Path) -> None:
    """Views keep sharing, the file stays as it is, and what is gone under a mapping disturbs nobody."""
    path = tmp_path / "a.pt"
    path.write_bytes(contents := image_of(training_state(), {}))
    part = asyncckpt.load(path, keys=["model_state_dict"])
    assert part["model_state_dict"]["tied"][0] == 10
    part["model_state_dict"]["encoder.weight"][10] = 77
    assert part["model_state_dict"]["tied"][0] == 77
    assert path.read_bytes() == contents
    path.write_bytes(b"")
    assert part["model_state_dict"]["encoder.weight"][LARGE - 1] == LARGE - 1


@pytest.mark.parametrize("seed", range(20))
def test_parts_of_random_states(seed: int) -> None:
    """Each key of its own, whatever kinds of tensors are there: the same, or not at all but for the whole."""
    state = random_state(seed, max_tensors=20, max_bytes=5000)
    image = image_of(state, {"seed": seed})
    for key in state if isinstance(state, dict) else ():
        part = load_part(BytesReader(image), "a.pt", [str(key)])
        if part is not None:
            assert_same(part, select(state, [str(key)], "a.pt"))


def test_damage_is_found_where_it_is_read() -> None:
    """In every byte of the part, and of the pickle; what is not read is not looked at."""
    image = image_of(training_state(), {})
    _, payloads = verify_payloads(BytesReader(image), "a.pt")
    at = {payload.name.split("/", 1)[1]: payload for payload in payloads}
    for name in ("data.pkl", "data/0", "byteorder", "version"):
        for position in (0, at[name].num_bytes - 1):
            damaged = bytearray(image)
            damaged[at[name].offset + position] ^= 1
            with pytest.raises(CorruptCheckpointError, match=re.escape(f"a.pt is damaged: record archive/{name} ")):
                load_part(BytesReader(damaged), "a.pt", ["model_state_dict"])
    damaged = bytearray(image)
    damaged[at["data/2"].offset] ^= 1
    assert load_part(BytesReader(damaged), "a.pt", ["model_state_dict"]) is not None
    with pytest.raises(CorruptCheckpointError):
        load_part(BytesReader(damaged), "a.pt", ["optimizer_state_dict"])


def test_a_damaged_directory_takes_the_whole(tmp_path: Path) -> None:
    """Which says what is wrong."""
    image = bytearray(image_of(training_state(), {}))
    image[image.rindex(b"PK\x01\x02") + 4] ^= 1
    assert load_part(BytesReader(image), "a.pt", ["epoch"]) is None
    (tmp_path / "a.pt").write_bytes(image)
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        asyncckpt.load(tmp_path / "a.pt", keys=["epoch"])


UNUSUAL: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "storage": lambda: torch.ones(3).storage(),
    "empty": lambda: torch.empty(0),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_unusual_tensors(kind: str, tmp_path: Path) -> None:
    """Are loaded as of the whole file, by whatever way."""
    odd = UNUSUAL[kind]()
    (tmp_path / "a.pt").write_bytes(image_of({"odd": odd, "other": torch.ones(5)}, {}))
    assert_same(asyncckpt.load(tmp_path / "a.pt", keys=["odd"]), {"odd": odd})


def test_the_other_byte_order_takes_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch turns bytes around where they are mapped: what is filled in later would not be seen."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "byteorder", "big")
        image = image_of({"a": torch.arange(3, dtype=torch.int32)}, {})
    (tmp_path / "a.pt").write_bytes(image)
    assert load_part(BytesReader(image), "a.pt", ["a"]) is None
    assert asyncckpt.load(tmp_path / "a.pt", keys=["a"])["a"].tolist() == [0, 1 << 24, 2 << 24]


class Box:
    """What may hide a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_what_may_hide_a_tensor_takes_the_whole(tmp_path: Path) -> None:
    """A class that the user allows: its tensor is no zeros."""
    (tmp_path / "a.pt").write_bytes(image_of({"box": Box(torch.ones(5)), "other": torch.ones(5)}, {}))
    with torch.serialization.safe_globals([Box]):
        assert load_part(BytesReader((tmp_path / "a.pt").read_bytes()), "a.pt", ["box"]) is None
        assert load_part(BytesReader((tmp_path / "a.pt").read_bytes()), "a.pt", ["other"]) is not None
        assert torch.equal(asyncckpt.load(tmp_path / "a.pt", keys=["box"])["box"].tensor, torch.ones(5))
    with pytest.raises(UnsafeCheckpointError):
        asyncckpt.load(tmp_path / "a.pt", keys=["other"])
    assert list(asyncckpt.load(tmp_path / "a.pt", keys=["other"], weights_only=False)) == ["other"]


@pytest.mark.parametrize("options", [{}, {"mmap": False}, {"map_location": "meta"}, {"weights_only": False}])
def test_files_of_torch_save_and_other_ways_to_load(options: dict[str, Any], tmp_path: Path) -> None:
    """Everything is read, and the part is the same."""
    torch.save(training_state(), tmp_path / "a.pt")
    part = asyncckpt.load(tmp_path / "a.pt", keys=["model_state_dict.head", "epoch"], **options)
    assert part["epoch"] == 3
    assert list(part["model_state_dict"]) == ["head.weight"]
    assert len(part) == 2


def test_keys_that_nothing_is_at(tmp_path: Path) -> None:
    """An error that names them and what there is; half a name is none."""
    path = tmp_path / "a.pt"
    path.write_bytes(image_of(training_state(), {}))
    with pytest.raises(CheckpointError, match=r"nothing at model, model_state_dict\.enc; its keys begin with model_st"):
        asyncckpt.load(path, keys=["model", "epoch", "model_state_dict.enc"])
    for keys in ("model_state_dict", [], [""], [3]):
        with pytest.raises(TypeError, match="list of paths of keys"):
            asyncckpt.load(path, keys=keys)  # type: ignore[arg-type]
    path.write_bytes(image_of([torch.ones(3)], {}))
    with pytest.raises(CheckpointError, match="holds a list, no dictionary"):
        asyncckpt.load(path, keys=["0"])
