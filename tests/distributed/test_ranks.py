"""How ranks speak with each other: results, contributions, and errors of every kind on any rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed import checks
from distributed.group import RankGroup


@pytest.mark.parametrize("method", ["on_first", "on_all", "contribute"])
def test_results_reach_all(trio: RankGroup, method: str) -> None:
    """The first rank's result, each rank's own, and everybody's contributions."""
    answers = trio.run(checks.fail, method, {})
    assert [answer["result"] for answer in answers] == [["done"] * 3 if method == "contribute" else "done"] * 3


@pytest.mark.parametrize("method", ["on_first", "on_all", "contribute"])
@pytest.mark.parametrize("kind", ["ValueError", "CorruptCheckpointError", "OSError"])
def test_the_first_ranks_error_is_everybodys(trio: RankGroup, method: str, kind: str) -> None:
    """The same type and message on all; on the others with the rank and its traceback as the cause."""
    answers = trio.run(checks.fail, method, {"0": kind})
    assert [answer["raised"] for answer in answers] == [kind] * 3
    assert len({answer["message"] for answer in answers}) == 1
    assert [answer["met_on"] for answer in answers] == [None, 0, 0]


@pytest.mark.parametrize("method", ["on_all", "contribute"])
def test_another_ranks_error_is_everybodys(trio: RankGroup, method: str) -> None:
    """So that nobody waits for the rank that failed."""
    answers = trio.run(checks.fail, method, {"1": "OSError"})
    assert [answer["raised"] for answer in answers] == ["OSError"] * 3
    assert [answer["met_on"] for answer in answers] == [1, None, 1]


@pytest.mark.parametrize("method", ["on_all", "contribute"])
def test_of_several_errors_one_counts(trio: RankGroup, method: str) -> None:
    """That of the lowest rank, on every rank: all of them do the same next."""
    answers = trio.run(checks.fail, method, {"1": "ValueError", "2": "OSError"})
    assert [answer["raised"] for answer in answers] == ["ValueError"] * 3


@pytest.mark.parametrize("kind", ["UnpicklableError", "SaysMoreError"])
@pytest.mark.parametrize(("method", "failing"), [("on_first", 0), ("on_all", 1), ("contribute", 1), ("contribute", 0)])
def test_errors_without_a_pickle(pair: RankGroup, method: str, failing: int, kind: str) -> None:
    """They are themselves where they were met, and told as a CheckpointError elsewhere."""
    answers = pair.run(checks.fail, method, {str(failing): kind})
    assert answers[failing]["raised"] == kind
    assert answers[1 - failing]["raised"] == "CheckpointError"
    assert answers[1 - failing]["message"].startswith(f"{kind}: ")
    assert "boo" in answers[1 - failing]["message"]


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "SystemExit"])
@pytest.mark.parametrize(
    ("method", "failing", "others"),
    [("on_first", 0, None), ("on_all", 1, None), ("contribute", 1, None), ("contribute", 1, "OSError")],
)
def test_what_ends_a_process(pair: RankGroup, method: str, failing: int, others: str | None, kind: str) -> None:
    """It stays on its rank, whatever the others meet; they hear of it instead of waiting."""
    kinds = {str(failing): kind} | ({str(1 - failing): others} if others else {})
    answers = pair.run(checks.fail, method, kinds)
    assert answers[failing]["raised"] == kind
    assert answers[1 - failing]["raised"] == (others or "CheckpointError")
    if not others:
        assert f"rank {failing} was ended by {kind}" in answers[1 - failing]["message"]


def test_contributions_come_in_order_and_on_the_cpu(trio: RankGroup) -> None:
    """Also tensors."""
    expected: list[Any] = [[rank, [rank, rank]] for rank in range(3)]
    assert trio.run(checks.contribute) == [expected] * 3


def test_results_without_a_pickle(pair: RankGroup) -> None:
    """An error on all ranks, rather than a rank that waits for ever."""
    for answer in pair.run(checks.tell_what_has_no_pickle):
        assert [result["raised"] for result in answer] == ["TypeError", "TypeError"]


def test_no_backend_for_the_cpu(pair: RankGroup, tmp_path: Path) -> None:
    """As under NCCL alone: a gloo group is made beside it, anew for each default group."""
    everything = ["told", "all", *[[[0, [0, 0]], [1, [1, 1]]]] * 2]
    assert pair.run(checks.without_a_backend_for_the_cpu, tmp_path) == [[everything] * 3] * 2


@pytest.mark.parametrize("signalled_rank", [0, 2])
def test_a_signal_to_one_rank_stops_all(trio: RankGroup, signalled_rank: int) -> None:
    """After the same step, whichever rank was told that the job will end."""
    answers = trio.run(checks.stop_together, signalled_rank)
    assert answers == [[False, True, rank == signalled_rank] for rank in range(3)]
