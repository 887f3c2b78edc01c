"""`asyncckpt inspect`, and how it maps files."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncckpt
from asyncckpt.cli.tensors import format_path, format_value, load_mapped
from asyncckpt.storage.local import LocalStorage
from cli.directories import files
from cli.running import error_of, run, run_json


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.pt"


def keys_of(path: Path) -> dict[str, object]:
    return {format_path(key): value for key, value in load_mapped(LocalStorage(), str(path)).leaves.items()}


def test_a_managers_file(directory: Path) -> None:
    """Tensors with dtype, shape and bytes, other entries in brief, metadata, totals."""
    path = files(directory)[0]
    inspected = run_json("inspect", path)
    weight = next(row for row in inspected["tensors"] if row["key"] == "model_state_dict.weight")
    assert weight == {"key": "model_state_dict.weight", "dtype": "float32", "shape": [4, 8], "num_bytes": 128}
    assert {"key": "epoch", "type": "int", "value": "1"} in inspected["entries"]
    assert inspected["metadata"]["name"] == path.name
    assert inspected["file_bytes"] == path.stat().st_size
    assert inspected["tensor_bytes"] == sum(row["num_bytes"] for row in inspected["tensors"])
    lines = run("inspect", path).stdout.splitlines()
    assert [line.split() for line in lines if line.startswith("model_state_dict.weight")] == [
        ["model_state_dict.weight", "float32", "4", "×", "8", "128"]
    ]
    assert f"{len(inspected['tensors'])} tensors" in lines[-1]


def test_a_file_of_torch_save(path: Path) -> None:
    """Has no metadata; the state may be a lone tensor."""
    torch.save(torch.ones(3), path)
    inspected = run_json("inspect", path)
    assert inspected["metadata"] is None
    assert inspected["tensors"] == [{"key": ".", "dtype": "float32", "shape": [3], "num_bytes": 12}]


def test_shared_memory_is_counted_once(path: Path) -> None:
    """Tied weights and views: the elements of each, and what the file holds for them together."""
    weight = torch.ones(1000, 10)
    torch.save({"a": weight, "tied": weight, "view": weight[:5]}, path)
    inspected = run_json("inspect", path)
    assert (inspected["tensor_bytes"], inspected["storage_bytes"]) == (80_200, 40_000)
    assert "80.2 kB (in 40 kB of memory" in run("inspect", path).stdout


@pytest.mark.filterwarnings("ignore:Sparse")
def test_every_kind_of_tensor(path: Path) -> None:
    """Also those that have no storage of their own."""
    dense = torch.eye(3)
    state = {
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(dense),
        "sparse": dense.to_sparse(),
        "rows": dense.to_sparse_csr(),
        "float8": torch.ones(4).to(torch.float8_e4m3fn),
        "storage": torch.ones(2).untyped_storage(),
    }
    asyncckpt.save(state, path).result(60)
    rows = {row["key"]: row for row in run_json("inspect", path)["tensors"]}
    assert list(rows) == list(state)
    assert rows["scalar"]["shape"] == []
    assert rows["empty"]["num_bytes"] == 0
    assert rows["sparse"]["dtype"] == "float32 sparse_coo"
    assert rows["sparse"]["num_bytes"] == 3 * 4 + 6 * 8
    assert rows["rows"]["num_bytes"] == 3 * 4 + 3 * 8 + 4 * 8
    assert rows["storage"]["num_bytes"] == 8


def test_tensors_are_not_read(path: Path) -> None:
    """The file is mapped, and its pages are not touched."""
    if sys.platform != "linux":
        pytest.skip("no /proc")
    num_bytes = 256 << 20
    torch.save({"large": torch.zeros(num_bytes // 4)}, path)
    before = mapped_bytes()
    checkpoint = load_mapped(LocalStorage(), str(path))
    assert mapped_bytes() - before < num_bytes // 4
    (tensor,) = checkpoint.leaves.values()
    assert isinstance(tensor, torch.Tensor)
    tensor.sum()
    assert mapped_bytes() - before > num_bytes // 2


def mapped_bytes() -> int:
    match = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def test_leaves(path: Path) -> None:
    """Lists of plain values stay whole, as do empty containers; all else is taken apart."""
    state = {
        "numbers": [1, 2.5, None],
        "mixed": [1, {"a": 2}],
        "pairs": [(1, 2), (3, 4)],
        "empty": {},
        "none": [],
        "ordered": OrderedDict(b=1),
        3: "three",
        "a.b": 0,
    }
    torch.save(state, path)
    assert keys_of(path) == {
        "numbers": [1, 2.5, None],
        "mixed.0": 1,
        "mixed.1.a": 2,
        "pairs.0": (1, 2),
        "pairs.1": (3, 4),
        "empty": {},
        "none": [],
        "ordered.b": 1,
        "3": "three",
        "a.b": 0,
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (1.5, "1.5"),
        ("short", "'short'"),
        (torch.float32, "torch.float32"),
        (torch.zeros(2, 3), "tensor float32 2 × 3"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        pytest.param(10**5000, "<int>", id="large"),
        (object(), "<object>"),
    ],
)
def test_values_in_brief(value: object, text: str) -> None:
    """Short whatever they are."""
    assert format_value(value) == text


def test_long_text_is_cut() -> None:
    """Strings keep their beginning and their end."""
    text = format_value("start" + "x" * 10_000 + "end")
    assert len(text) == 80
    assert text.startswith("'start")
    assert text.endswith("end'")


def test_text_from_the_file_is_escaped(path: Path) -> None:
    """Keys, values and metadata."""
    hostile = "[red]\x1b[31m\n"
    with asyncckpt.AsyncCheckpointSaver() as saver:
        state = {hostile: 1, "t": {hostile: torch.ones(1)}, "value": hostile}
        saver.save(state, path, metadata={hostile: hostile, "nested": {"a": hostile}}).result(60)
    text = run("inspect", path).stdout
    assert all(char.isprintable() or char == "\n" for char in text)
    assert text.count(r"[red]\x1b[31m") == 3  # in keys and values
    assert text.count(r"[red]\u001b[31m") == 3  # in the metadata, which is shown as JSON


class _Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("attacked",)


def test_nothing_in_the_file_is_run(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The error is one line, and names what the file wanted."""
    torch.save({"a": _Attack()}, path)
    error = error_of("inspect", path)
    assert "print" in error
    assert "attacked" not in capfd.readouterr().out


def test_a_state_that_holds_itself(path: Path) -> None:
    """Is an error, not an endless list."""
    state: dict[str, object] = {}
    state["self"] = state
    torch.save(state, path)
    assert "holds itself" in error_of("inspect", path)


def test_what_is_no_checkpoint(path: Path) -> None:
    """Missing, a directory, text, cut off: errors in one line."""
    assert "no checkpoint at" in error_of("inspect", path)
    assert "is a directory" in error_of("inspect", f"{path.parent}/")
    path.write_text("text")
    assert "not a torch zip archive" in error_of("inspect", path)
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "is damaged" in error_of("inspect", path)
