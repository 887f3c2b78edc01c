"""The manager among ranks: one checkpoint for all, every rank's own state, one decision, and nobody left waiting."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from asyncckpt import CheckpointError, CheckpointManager
from distributed import checks
from distributed.group import RankGroup
from distributed.training import Training, own_numbers, seed_own_numbers


def files(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.glob("checkpoint_*.pt"))


# --- one checkpoint for all ---


def test_rank_0_writes_and_all_load_the_same(pair: RankGroup, tmp_path: Path) -> None:
    """Saved wrapped, loaded wrapped and plain: the bits of weights and optimizer are the same everywhere."""
    first, second = pair.run(checks.save, tmp_path)
    assert (first["skipped"], second["skipped"], second["done"]) == (False, True, True)
    assert len(files(tmp_path)) == 1
    assert {first["digest"]} == {
        *pair.run(checks.load, tmp_path, True),
        *pair.run(checks.load, tmp_path, False),
    }


def test_a_single_process_takes_the_weights_without_ado(
    pair: RankGroup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights alone: no warning. With the optimizer it may be a resume, whose random numbers can't be everybody's."""
    digest = pair.run(checks.save, tmp_path)[0]["digest"]
    with CheckpointManager(tmp_path) as manager:
        manager.load_best(Training(7, wrapped=False).model)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        training = Training(7, wrapped=False)
        seed_own_numbers(99)
        training.load(manager, stateful={})
    numbers = own_numbers()
    assert "saved by 2 ranks and loaded by 1" in caplog.text
    assert training.digest() == digest
    assert numbers == checks.numbers_of_seed(99)


def test_saved_by_a_single_process(pair: RankGroup, tmp_path: Path) -> None:
    """Loaded wrapped by two."""
    training = Training(wrapped=False).advance(2)
    with CheckpointManager(tmp_path) as manager:
        training.save(manager)
    assert pair.run(checks.load, tmp_path, True) == [training.digest()] * 2


# --- what is each rank's own ---


def test_own_state_stays_with_its_rank(pair: RankGroup, tmp_path: Path) -> None:
    """Random numbers and rank_stateful are each rank's; stateful is rank 0's for all."""
    numbers = pair.run(checks.save_own, tmp_path)
    assert numbers[0] != numbers[1]
    assert pair.run(checks.load_own, tmp_path) == [[numbers[0], 10, 20], [numbers[1], 10, 21]]


def test_another_number_of_ranks_leaves_own_state_alone(
    pair: RankGroup, trio: RankGroup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By three, and by one, strictly; what no rank ever saved is an error all the same."""
    pair.run(checks.save_own, tmp_path)
    assert trio.run(checks.load_own, tmp_path) == [[checks.numbers_of_seed(99), 10, 0]] * 3
    training, shared, loader = Training(wrapped=False), checks.Loader(), checks.Loader()
    with CheckpointManager(tmp_path) as manager:
        training.load(manager, stateful={"shared": shared}, rank_stateful={"loader": loader})
        assert (shared.position, loader.position) == (10, 0)
        assert "saved by 2 ranks and loaded by 1" in caplog.text
        with pytest.raises(CheckpointError, match="no state for lodaer"):
            training.load(manager, rank_stateful={"lodaer": loader})


def test_one_name_for_two_things(tmp_path: Path) -> None:
    """One of them would be lost."""
    with CheckpointManager(tmp_path) as manager:
        training = Training(wrapped=False)
        for act in (training.save, training.load):
            with pytest.raises(ValueError, match="sampler can't be both in stateful and in rank_stateful"):
                act(manager, rank_stateful={"sampler": training.sampler})
            training.save(manager)
            manager.wait()


# --- one decision ---


def test_save_best_only_is_decided_by_rank_0(pair: RankGroup, tmp_path: Path) -> None:
    """None on all ranks or on none."""
    assert (
        pair.run(checks.save_best_only, tmp_path, [3.0, 4.0, 2.0, 2.0, 1.0]) == [[True, False, True, False, True]] * 2
    )


def test_steps_are_counted_alike(pair: RankGroup, tmp_path: Path) -> None:
    """A policy by steps asks nobody; all ranks know what was saved, and what was skipped for lack of room."""
    first, second = pair.run(checks.decide_by_steps, tmp_path)
    assert first == second == [3, 6, 7, 8, 9, 12]


@pytest.mark.parametrize(("late_rank", "expected"), [(0, True), (1, False)])
def test_the_clock_is_rank_0s(pair: RankGroup, tmp_path: Path, late_rank: int, expected: bool) -> None:
    """Ranks whose clocks differ decide alike."""
    assert pair.run(checks.decide_by_time, tmp_path, late_rank) == [expected] * 2


@pytest.mark.parametrize("blind_rank", [0, 1])
def test_what_one_rank_cannot_read_none_loads(pair: RankGroup, tmp_path: Path, blind_rank: int) -> None:
    """All fall back to the same older checkpoint."""
    answers = pair.run(checks.fall_back, tmp_path, blind_rank, "EIO")
    assert [(answer["result"], answer["digest"]) for answer in answers] == [(1, answers[0]["saved"])] * 2


def test_what_is_no_damage_is_raised_on_all(pair: RankGroup, tmp_path: Path) -> None:
    """A rank without memory is no reason for an older checkpoint."""
    assert [answer["raised"] for answer in pair.run(checks.fall_back, tmp_path, 1, "memory")] == ["MemoryError"] * 2


def test_a_damaged_file_is_passed_over_by_all(pair: RankGroup, tmp_path: Path) -> None:
    """Real damage, which every rank sees."""
    digest = pair.run(checks.save, tmp_path, 1)[0]["digest"]
    pair.run(checks.save, tmp_path, 2)
    with open(tmp_path / files(tmp_path)[1], "r+b") as file:
        file.seek(-2000, os.SEEK_END)
        file.write(b"\xff" * 500)
    assert pair.run(checks.load, tmp_path) == [digest] * 2


def test_nothing_to_load(pair: RankGroup, tmp_path: Path) -> None:
    """(0, {}) on all."""
    assert pair.run(checks.load_from_nothing, tmp_path / "none") == [{"result": [[0, {}], [0, {}]]}] * 2


def test_rank_0_says_which_checkpoint(pair: RankGroup, tmp_path: Path) -> None:
    """Also by name or step; one that is not there is an error on all."""
    pair.run(checks.save, tmp_path)
    assert pair.run(checks.load_by_name, tmp_path, 2) == [{"result": 2}] * 2
    assert pair.run(checks.load_by_name, tmp_path, files(tmp_path)[0]) == [{"result": 2}] * 2
    for answer in (*pair.run(checks.load_by_name, tmp_path, 3), *pair.run(checks.load_by_name, tmp_path, "other.pt")):
        assert answer["raised"] == "CheckpointNotFoundError"


# --- errors ---


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("unsafe config on 0", "UnsafeCheckpointError"),
        ("missing metric on 0", "MetricNotFoundError"),
        ("epoch on 0", "TypeError"),
        ("stateful on 0", "TypeError"),
        ("rank_stateful on 0", "TypeError"),
        ("rank_stateful on 1", "TypeError"),
        ("no pickle on 1", "TypeError"),
        ("one name twice on 1", "ValueError"),
    ],
)
def test_what_is_wrong_on_one_rank_is_raised_on_all(pair: RankGroup, tmp_path: Path, what: str, error: str) -> None:
    """The same type; nobody waits, nothing is saved."""
    answers = pair.run(checks.save_wrongly, tmp_path, what)
    failing = int(what[-1])
    assert [answer["raised"] for answer in answers] == [error] * 2
    assert answers[1 - failing]["met_on"] == failing
    assert not files(tmp_path)


def test_a_directory_that_cannot_be_opened(pair: RankGroup, tmp_path: Path) -> None:
    """Rank 0 finds out, all raise."""
    for answer in pair.run(checks.save_where_it_cannot_be, tmp_path):
        assert [failed["raised"] for failed in answer] == ["CheckpointWriteError", "StorageBusyError"]


def test_a_model_that_fits_on_one_rank_only(pair: RankGroup, tmp_path: Path) -> None:
    """The other one does not go on alone."""
    pair.run(checks.save, tmp_path)
    answers = pair.run(checks.load_misfit, tmp_path)
    assert [(answer["raised"], answer["met_on"]) for answer in answers] == [
        ("CheckpointError", 1),
        ("CheckpointError", None),
    ]


# --- waiting, and the end ---


def test_wait_is_a_barrier(pair: RankGroup, tmp_path: Path) -> None:
    """No rank comes out of it before the checkpoint is there."""
    os.mkfifo(tmp_path / "pipe")
    assert pair.run(checks.wait_for_rank_0, tmp_path / "run", tmp_path / "pipe") == [False, False]


def test_wait_raises_on_all(pair: RankGroup, tmp_path: Path) -> None:
    """What failed on rank 0; and only once."""
    for failed, after in pair.run(checks.wait_for_what_fails, tmp_path):
        assert failed["raised"] == "CheckpointWriteError"
        assert "Input/output error" in failed["message"]
        assert after == {"result": None}


@pytest.mark.parametrize(("alone", "pruned"), [(0, [2]), (1, [])])
def test_one_rank_may_look_and_prune_alone(pair: RankGroup, tmp_path: Path, alone: int, pruned: list[int]) -> None:
    """No collective is in it; a rank that is not the first prunes nothing, and does not take the directory."""
    answers = pair.run(checks.act_alone, tmp_path, alone)
    assert answers[alone][0] == pruned
    assert [saved for _, saved in answers] == [{"result": None}] * 2


@pytest.mark.parametrize("kind", ["ValueError", "KeyboardInterrupt"])
def test_leaving_waits_for_nobody(pair: RankGroup, tmp_path: Path, kind: str) -> None:
    """Neither the first rank, while the other is still inside, nor one that raises there."""
    first, second = pair.run(checks.leave_early, tmp_path, kind)
    assert first == {"result": 1}
    assert second["raised"] == kind


def test_another_rank_is_killed(fresh_pair: RankGroup, tmp_path: Path) -> None:
    """The next save raises instead of waiting for ever; what was in flight is durable at the end."""
    (answer,) = fresh_pair.run(checks.die, tmp_path, survivors=[0])
    assert answer["raised"] == "CheckpointError"
    assert "one of them has died" in answer["message"]
    assert answer["found"] == [0]


# --- a whole run ---


def test_a_resumed_run_is_bit_for_bit_the_same(pair: RankGroup, fresh_pair: RankGroup, tmp_path: Path) -> None:
    """Six steps across an epoch, with dropout and sharded data; and three, new processes, three."""
    whole = pair.run(checks.train, tmp_path / "whole", 6, False)
    half = pair.run(checks.train, tmp_path / "parts", 3, False)
    rest = fresh_pair.run(checks.train, tmp_path / "parts", 3, True)
    assert whole[0]["losses"] != whole[1]["losses"]
    for rank in range(2):
        assert half[rank]["losses"] + rest[rank]["losses"] == whole[rank]["losses"]
        assert {**rest[rank], "losses": None} == {**whole[rank], "losses": None}
