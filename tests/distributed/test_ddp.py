"""The reference's two functions: one file, saved by rank 0 and loaded by all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asyncckpt import load_distributed_checkpoint, save_distributed_checkpoint
from distributed import checks
from distributed.group import RankGroup
from distributed.training import Training


def test_all_load_what_rank_0_saved(pair: RankGroup, tmp_path: Path) -> None:
    """Durable on return, on every rank; saved wrapped, loaded wrapped, and plain in a single process."""
    path = tmp_path / "file.pt"
    saved = pair.run(checks.save_file, path)
    assert all(answer["exists"] for answer in saved)
    loaded = pair.run(checks.load_file, path)
    assert [(answer["result"], answer["digest"]) for answer in loaded] == [(3, saved[0]["digest"])] * 2
    training = Training(7, wrapped=False)
    assert load_distributed_checkpoint(training.model, training.optimizer, path, torch.device("cpu")) == 3
    assert training.digest() == saved[0]["digest"]


def test_a_wrong_rank(pair: RankGroup, tmp_path: Path) -> None:
    """Rank 1 gave 0; both raise, nothing is saved."""
    answers = pair.run(checks.save_file, tmp_path / "file.pt", True)
    assert [(answer["raised"], answer["met_on"], answer["exists"]) for answer in answers] == [
        ("ValueError", 1, False),
        ("ValueError", None, False),
    ]


def test_a_file_that_cannot_be_written(pair: RankGroup, tmp_path: Path) -> None:
    """Rank 0 finds out, both raise."""
    (tmp_path / "file").touch()
    answers = pair.run(checks.save_file, tmp_path / "file" / "file.pt")
    assert [(answer["raised"], answer["met_on"]) for answer in answers] == [
        ("CheckpointWriteError", None),
        ("CheckpointWriteError", 0),
    ]


@pytest.mark.parametrize("blind_rank", [0, 1])
def test_one_rank_cannot_read(pair: RankGroup, tmp_path: Path, blind_rank: int) -> None:
    """All raise the same, and nothing has changed anywhere."""
    pair.run(checks.save_file, tmp_path / "file.pt")
    for answer in pair.run(checks.load_file, tmp_path / "file.pt", blind_rank):
        assert (answer["raised"], answer["changed"]) == ("CheckpointNotFoundError", False)


def test_what_does_not_fit(pair: RankGroup, tmp_path: Path) -> None:
    """All raise, and nothing has changed anywhere."""
    pair.run(checks.save_file, tmp_path / "file.pt")
    for answer in pair.run(checks.load_file, tmp_path / "file.pt", None, 8):
        assert (answer["raised"], answer["changed"]) == ("CheckpointError", False)


@pytest.mark.parametrize("state", [[1], {"epoch": 1}, {"model_state_dict": {}}])
def test_another_kind_of_file(tmp_path: Path, state: object) -> None:
    """An error that names the file, not a KeyError."""
    torch.save(state, tmp_path / "file.pt")
    training = Training(wrapped=False)
    with pytest.raises(Exception, match=r"file\.pt' is whole, but has no model_state_dict and epoch") as caught:
        load_distributed_checkpoint(training.model, training.optimizer, tmp_path / "file.pt")
    assert caught.typename == "CheckpointError"


def test_without_a_process_group_the_given_rank_counts(tmp_path: Path) -> None:
    """As in the reference: only rank 0 saves."""
    training = Training(wrapped=False)
    for rank, exists in ((1, False), (0, True)):
        save_distributed_checkpoint(training.model, training.optimizer, 1, tmp_path / "file.pt", rank)
        assert (tmp_path / "file.pt").exists() is exists
