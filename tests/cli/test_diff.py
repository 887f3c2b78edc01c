"""`asyncckpt diff`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt.cli import difference
from asyncckpt.cli.difference import compare_tensors
from cli.directories import files
from cli.running import error_of, run, run_json

NAN, INF = math.nan, math.inf


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (
        torch.tensor(values, dtype=torch.float32).to(dtype)
        if dtype.is_floating_point
        else torch.tensor(values, dtype=dtype)
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (tensor(1, 2), tensor(1, 2)),
        (tensor(1, NAN), tensor(1, NAN)),
        (torch.tensor([NAN]), -torch.tensor([NAN])),
        (tensor(INF, -INF), tensor(INF, -INF)),
        (tensor(0.0), tensor(-0.0)),
        (torch.tensor(3.0), torch.tensor(3.0)),
        (torch.empty(0, 4), torch.empty(0, 4)),
        (torch.arange(6.0).reshape(2, 3).t(), torch.arange(6.0).reshape(2, 3).t().contiguous()),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        (tensor(1, 2, dtype=torch.float8_e5m2), tensor(1, 2, dtype=torch.float8_e5m2)),
        (torch.tensor([True, False]), torch.tensor([True, False])),
        (torch.ones(1, 5).expand(4, 5), torch.ones(4, 5)),
        (torch.nn.Parameter(torch.ones(2)), torch.ones(2)),
        (torch.ones(2, device="meta"), torch.ones(2, device="meta")),
    ],
)
def test_equal_tensors(a: torch.Tensor, b: torch.Tensor) -> None:
    """The elements count, wherever and however they lie; NaN equals NaN."""
    assert compare_tensors("key", a, b) is None


@pytest.mark.parametrize(
    ("a", "b", "num_differing", "max_abs", "relative"),
    [
        (tensor(1, 2, 4), tensor(1, 2.5, 3), 2, 1, 0.25),
        (tensor(0, 0), tensor(0, 3), 1, 3, INF),
        (tensor(1, 2), tensor(1, NAN), 1, NAN, NAN),
        (tensor(NAN, 2), tensor(NAN, 4), 1, 2, 1),
        (tensor(NAN, 2), tensor(1, 5), 2, NAN, NAN),
        (tensor(INF, 2), tensor(INF, 4), 1, 2, 1),
        (tensor(1, 2), tensor(1, INF), 1, INF, INF),
        (tensor(-INF), tensor(INF), 1, INF, INF),
        (torch.tensor(1.0), torch.tensor(3.0), 1, 2, 2),
        (tensor(3, 200, dtype=torch.uint8), tensor(200, 3, dtype=torch.uint8), 2, 197, 0.985),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1, 1, 1),
        (tensor(2**60, dtype=torch.int64), tensor(2**60 + 1, dtype=torch.int64), 1, 1, 2.0**-60),
        (tensor(-(2**63), dtype=torch.int64), tensor(2**63 - 1, dtype=torch.int64), 1, 2.0**64, 2),
        (tensor(1, dtype=torch.uint32), tensor(4, dtype=torch.uint32), 1, 3, 3),
        (tensor(1, 2, dtype=torch.float8_e5m2), tensor(1, 3, dtype=torch.float8_e5m2), 1, 1, 0.5),
        (tensor(1, 2, dtype=torch.bfloat16), tensor(1, 4, dtype=torch.bfloat16), 1, 2, 1),
        (torch.tensor([3 + 4j]), torch.tensor([0j]), 1, 5, 1),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]), 1, 4, 4 / math.sqrt(5)),
        (torch.arange(6.0).reshape(2, 3).t(), torch.arange(6.0).reshape(3, 2), 4, 2, 0.4),
        (tensor(1, 2), tensor(1, 2, dtype=torch.float64), 0, 0, 0),
        (tensor(1, 2), tensor(1, 4, dtype=torch.int64), 1, 2, 1),
    ],
)
@pytest.mark.parametrize("piece_elements", [1, 1 << 20])
def test_tensors_that_differ(
    monkeypatch: pytest.MonkeyPatch,
    a: torch.Tensor,
    b: torch.Tensor,
    num_differing: int,
    max_abs: float,
    relative: float,
    piece_elements: int,
) -> None:
    """How many elements, by how much, and against the largest; in one piece or in many."""
    monkeypatch.setattr(difference, "_PIECE_ELEMENTS", piece_elements)
    found = compare_tensors("key", a, b)
    assert found is not None
    assert (found.num_differing, found.num_elements) == (num_differing, a.numel())
    assert found.max_abs == pytest.approx(max_abs, nan_ok=True)
    assert found.relative == pytest.approx(relative, nan_ok=True)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(1), torch.tensor(1.0)),
        (torch.ones(2), torch.ones(2, device="meta")),
        (torch.ones(2, device="meta"), torch.ones(2, device="meta", dtype=torch.int8)),
    ],
)
def test_tensors_that_can_not_be_held_against_each_other(a: torch.Tensor, b: torch.Tensor) -> None:
    """They differ, without figures."""
    found = compare_tensors("key", a, b)
    assert found is not None
    assert (found.num_differing, found.max_abs, found.relative) == (None, None, None)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("to_sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc])
def test_sparse_tensors(to_sparse: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """By their indices and values; a dense one is another kind."""
    dense = torch.eye(3)
    other = dense.clone()
    other[0, 0] = 5
    assert compare_tensors("key", to_sparse(dense), to_sparse(dense.clone())) is None
    found = compare_tensors("key", to_sparse(dense), to_sparse(other))
    assert found is not None
    assert (found.num_differing, found.max_abs) == (1, 4)
    assert compare_tensors("key", to_sparse(dense), dense) is not None
    assert compare_tensors("key", to_sparse(dense), to_sparse(torch.ones(3, 3))) is not None


def test_a_tensor_is_split_however_it_is_shaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element is in exactly one piece, and no piece is too large."""
    monkeypatch.setattr(difference, "_PIECE_ELEMENTS", 7)
    whole = torch.arange(3 * 5 * 11).reshape(3, 5, 11).transpose(0, 2)
    pieces = list(difference._pieces(whole, whole))
    assert all(piece.numel() <= 7 for piece, _ in pieces)
    elements = [int(value) for piece, _ in pieces for value in piece.flatten()]
    assert sorted(elements) == list(range(whole.numel()))


# --- files ---


def compare(tmp_path: Path, a: object, b: object) -> Any:
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    is_equal = run("diff", tmp_path / "a.pt", tmp_path / "b.pt", code=0 if a is b else 1).stdout.startswith("no diff")
    assert is_equal == (a is b)
    return run_json("diff", tmp_path / "a.pt", tmp_path / "b.pt", code=0 if a is b else 1)


def test_a_file_and_its_copy(directory: Path, tmp_path: Path) -> None:
    """Equal: exit code 0."""
    copy = tmp_path / "copy.pt"
    shutil.copy(files(directory)[0], copy)
    compared = run_json("diff", files(directory)[0], copy)
    assert compared["equal"] is True
    assert compared["num_equal_tensors"] > 4
    assert compared["num_equal_entries"] > 4


def test_two_checkpoints_of_one_run(directory: Path) -> None:
    """Their weights differ by a little, their steps and losses altogether."""
    a, b = files(directory)[:2]
    compared = run_json("diff", a, b, code=1)
    weight = next(row for row in compared["tensors"] if row["key"] == "model_state_dict.weight")
    assert weight["num_differing"] == weight["num_elements"] == 32
    assert 0 < weight["max_abs"] < 0.01
    assert {"key": "global_step", "a": "100", "b": "200"} in compared["entries"]
    text = run("diff", a, b, code=1).stdout
    assert "32 of 32" in text
    assert f"{len(compared['tensors'])} tensors differ" in text.splitlines()[-1]


def test_nan_everywhere_is_equal_to_itself(tmp_path: Path) -> None:
    """In tensors, in entries, in lists."""
    state = {"tensor": torch.tensor([NAN]), "loss": NAN, "history": [1.0, NAN], "empty": {}}
    compared = compare(tmp_path, state, state)
    assert (compared["num_equal_tensors"], compared["num_equal_entries"]) == (1, 3)


def test_keys_of_one_side(tmp_path: Path) -> None:
    """An empty container is one too."""
    compared = compare(tmp_path, {"x": 1, "state": {}, "w": torch.ones(1)}, {"x": 1, "state": {"a": torch.ones(2)}})
    assert compared["only_in_a"] == ["state", "w"]
    assert compared["only_in_b"] == ["state.a"]
    text = run("diff", tmp_path / "a.pt", tmp_path / "b.pt", code=1).stdout
    assert "only in A: w\n" in text
    assert "only in B: state.a\n" in text


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 2),
        ("a", "b"),
        (1.0, NAN),
        ([1, 2], [1, 2, 3]),
        ([1.0, NAN], [2.0, NAN]),
        (None, 0),
        (torch.float32, torch.float64),
        (torch.ones(1), 1),
        (1, torch.ones(1)),
    ],
)
def test_entries_that_differ(tmp_path: Path, a: object, b: object) -> None:
    """Shown in brief, from both sides."""
    (entry,) = compare(tmp_path, {"key": a}, {"key": b})["entries"]
    assert entry["key"] == "key"
    assert entry["a"] != entry["b"]


def test_changes_of_dtype_and_shape_are_shown(tmp_path: Path) -> None:
    """As from → to."""
    a, b = {"t": torch.ones(2), "s": torch.ones(2)}, {"t": torch.ones(2).bfloat16(), "s": torch.ones(3)}
    compared = compare(tmp_path, a, b)
    assert compared["tensors"][0]["num_differing"] == 0
    assert compared["tensors"][1]["num_differing"] is None
    text = run("diff", tmp_path / "a.pt", tmp_path / "b.pt", code=1).stdout
    assert "float32 → bfloat16" in text
    assert "2 → 3" in text


def test_a_missing_file_is_an_error(directory: Path) -> None:
    """Not a difference."""
    assert "no checkpoint at" in error_of("diff", files(directory)[0], directory / "nothing.pt")
