"""What a mirror lacks: as tables, and that bringing it there, in any order, ends with what its policy keeps of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.backlog import Mirrored, backlog_of
from asyncckpt.registry.registry import Registry
from asyncckpt.registry.retention import KeepBest, KeepLast, RetentionPolicy, retained
from registry.test_retention import HISTORIES, MILESTONES, OTHERS, info

_MAX_COPIES = 100


def registry(infos: Sequence[CheckpointInfo]) -> Registry:
    return Registry("0" * 16, "val_loss", "min").with_checkpoints(infos)


def commits(*sequences: int, loss: float | None = None) -> list[CheckpointInfo]:
    return [info(sequence, sequence, loss=loss) for sequence in sequences]


@pytest.mark.parametrize(
    ("here", "there", "wanted", "unwanted"),
    [
        ([], [], [], set()),
        ([1, 2, 3], [], [2, 3], {1}),
        ([1, 2, 3], [1], [2, 3], set()),
        ([1, 2, 3], [1, 3], [2], set()),  # the newest was first
        ([1, 2, 3], [2, 3], [], {1}),  # it was there, and has been dropped
        ([3], [1, 2], [3], set()),
        ([1, 2], [8, 9], [], {1, 2}),  # an old directory came back
        ([], [8, 9], [], set()),
    ],
)
def test_what_is_lacking(here: list[int], there: list[int], wanted: list[int], unwanted: set[int]) -> None:
    backlog = backlog_of(registry(commits(*here)), registry(commits(*there)), KeepLast(2))
    assert [info.sequence for info in backlog.wanted] == wanted
    assert backlog.unwanted == unwanted
    assert backlog.mirrored == Mirrored(max([0, *here, *there]), frozenset(wanted))


def test_what_is_left_out() -> None:
    """What can't be brought there takes nobody's place."""
    here = [*commits(1, 2), replace(info(3, 3), damaged=True), info(4, 4)]
    backlog = backlog_of(registry(here), registry([]), KeepLast(2), without={4})
    assert [info.sequence for info in backlog.wanted] == [1, 2]


def test_the_best_and_the_pinned() -> None:
    here = [info(1, loss=0.5), replace(info(2), pinned=True), info(3, loss=0.7), info(4), info(5)]
    backlog = backlog_of(registry(here), registry([]), KeepLast(1))
    assert [info.sequence for info in backlog.wanted] == [1, 2, 5]
    better = [info(9, loss=0.1)]
    assert [info.sequence for info in backlog_of(registry(here), registry(better), KeepLast(1)).wanted] == [2]


def test_what_the_source_protects() -> None:
    """Since it has lost its registry: the mirror has one."""
    here = [replace(info, protected=True) for info in commits(1, 2, 3)]
    assert [info.sequence for info in backlog_of(registry(here), registry([]), KeepLast(1)).wanted] == [3]


def test_a_name_that_was_saved_again() -> None:
    earlier, later = replace(info(1), filepath=Path("a.pt")), replace(info(5), filepath=Path("a.pt"))
    assert backlog_of(registry([later]), registry([earlier]), KeepLast(9)).wanted == (later,)
    assert backlog_of(registry([earlier]), registry([later]), KeepLast(9)).wanted == ()
    earlier, later, other = replace(earlier, val_loss=0.1), replace(later, val_loss=0.5), info(4, loss=0.3)
    wanted = backlog_of(registry([other, later]), registry([earlier]), KeepLast(1)).wanted
    assert [info.sequence for info in wanted] == [4, 5]  # the best one there goes


def test_what_the_mirror_had_once() -> None:
    """Its numbers are not given again."""
    mirror = replace(registry(commits(1)), last_sequence=9)
    assert backlog_of(registry(commits(1)), mirror, KeepLast(2)).mirrored == Mirrored(9)


def test_without_a_policy() -> None:
    assert len(backlog_of(registry(commits(1, 2, 3)), registry([]), None).wanted) == 3


def test_what_a_mirror_awaits() -> None:
    mirrored = Mirrored(5, frozenset({3}))
    assert [sequence for sequence in range(1, 8) if mirrored.awaits(sequence)] == [3, 6, 7]
    assert not mirrored.awaits(None)


@given(st.lists(MILESTONES | OTHERS, min_size=1, max_size=3), HISTORIES, st.data())
def test_in_any_order(policies: list[RetentionPolicy], history: list[CheckpointInfo], data: st.DataObject) -> None:
    """Though the run goes on, and the mirror deletes by what is there: in the end it has what its policy keeps."""
    policy = policies[0]
    for other in policies[1:]:
        policy = policy | other
    history = [replace(info, filepath=Path(f"{info.sequence}.pt")) for info in history]
    num_seen = data.draw(st.integers(0, len(history)))
    mirror = registry([])
    num_copies = 0
    while True:
        backlog = backlog_of(registry(history[:num_seen]), mirror, policy)
        wanted = backlog.wanted
        if not wanted and num_seen == len(history):
            break
        if data.draw(st.booleans()) and wanted:
            chosen: CheckpointInfo = data.draw(st.sampled_from(wanted))
            mirror = mirror.with_checkpoint(chosen)
            mirror = mirror.keeping(retained(policy, mirror.checkpoints) | backlog.kept)
            assert chosen.sequence in [info.sequence for info in mirror.checkpoints]
            num_copies += 1
            assert num_copies < _MAX_COPIES
        num_seen = min(num_seen + 1, len(history))
    whole = registry(history)
    assert {info.sequence for info in mirror.checkpoints} == retained(policy, whole.checkpoints)


def test_a_best_one_that_was_dropped_here() -> None:
    """Only what there is can be brought there."""
    assert backlog_of(registry(commits(7)), registry(commits(2, loss=0.1)), KeepBest(1)).wanted == tuple(commits(7))
