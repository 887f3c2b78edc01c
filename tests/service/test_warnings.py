"""A warning points at the line that the user can change."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointManager
from asyncckpt.service import queues

ARRAYS = {"table": np.zeros(3 << 20)}
UNSAFE = {"place": Path("here")}


def by_the_function(path: Path, state: dict[str, Any]) -> None:
    asyncckpt.save(state, path / "a.pt").result(60)


def by_a_saver(path: Path, state: dict[str, Any]) -> None:
    with AsyncCheckpointSaver() as saver:
        saver.save(state, path / "a.pt").result(60)


def by_a_manager(path: Path, state: dict[str, Any]) -> None:
    with CheckpointManager(path, weights_only=False) as manager:
        manager.save(nn.Linear(2, 2), None, 1, 1, config=state)


def streamed(path: Path, state: dict[str, Any]) -> None:
    with AsyncCheckpointSaver(memory_limit=1 << 20) as saver:
        saver.save({"weights": torch.zeros(1 << 20)}, path / "a.pt").result(60)


@pytest.mark.parametrize(
    ("save", "state", "text"),
    [
        (by_the_function, ARRAYS, "NumPy arrays"),
        (by_the_function, UNSAFE, "weights_only=False"),
        (by_a_saver, ARRAYS, "NumPy arrays"),
        (by_a_saver, UNSAFE, "weights_only=False"),
        (by_a_manager, ARRAYS, "NumPy arrays"),
        (streamed, {}, "memory_limit"),
    ],
)
def test_of_the_state(
    save: Callable[[Path, dict[str, Any]], None], state: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(tmp_path, state)
    assert [warning.filename for warning in caught if text in str(warning.message)] == [__file__]


def made_with_one() -> None:
    AsyncCheckpointSaver(writer="process").close()


def taken_on_the_way() -> None:
    with AsyncCheckpointSaver() as saver:
        saver.use_writer_process()


@pytest.mark.parametrize("make", [made_with_one, taken_on_the_way])
def test_of_no_writer_process(make: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "why_not", lambda: "there are no processes here")
    with pytest.warns(UserWarning, match="threads write the checkpoints instead") as caught:
        make()
    assert {warning.filename for warning in caught} == {__file__}
