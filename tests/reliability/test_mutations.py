"""The gates can fail: bugs are put into the package's own commit path, and each is caught by the gate that should."""

from __future__ import annotations

import errno
import functools
import logging
import random
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass

import pytest

from asyncckpt import CheckpointWriteError
from reliability.bugs import BUGS, Patch
from reliability.crash import workloads
from reliability.crash.damage import faults_after_damage
from reliability.crash.exploring import verdicts
from reliability.crash.file_systems import is_checkpoint, is_checkpoint_directory, is_file
from reliability.crash.workloads import Workload, best_changes, failing, kept
from reliability.gates import SEED, report

MAX_RUNS = 60  # of one workload, each time with other losses, sizes and faults

Check = Callable[[random.Random], Iterator[list[str]]]


def crash(workload: Workload) -> Check:
    """Every crash state of a run; and no save may fail for no reason."""

    def check(chance: random.Random) -> Iterator[list[str]]:
        try:
            recorded = workload(chance)
        except CheckpointWriteError as error:
            yield [f"a save failed: {error}"]
            return
        for verdict in verdicts(recorded, chance):
            yield verdict.faults

    return check


@dataclass(frozen=True)
class Catch:
    """How a bug is to be caught: by which gate, by which of its checks, and what that says."""

    gate: str
    check: Check
    symptom: str


STATES, ERRORS, FSYNCGATE, DAMAGE = "1 crash states", "5 I/O errors", "6 fsyncgate", "8 corruption"
LOST = "was acknowledged, and the newest that loads is"
UNRECORDED = "the registry on the disk does not name it"
UNLINKED = "the best link holds"
TORN = "is listed: |is there: "

KEEPING_ONE, KEEPING_TWO = crash(kept(1)), crash(kept(2))
BEST_CHANGES, BEST_STAYS = crash(best_changes("hard link")), crash(workloads.best_stays)

CATCHES = {
    "the checkpoint's file is not synced": Catch(STATES, KEEPING_TWO, TORN),
    "the registry's file is not synced": Catch(STATES, KEEPING_TWO, "the registry is damaged"),
    "the directory is not synced after the checkpoint's rename": Catch(STATES, KEEPING_TWO, "which is gone"),
    "the directory is not synced after the registry's rename": Catch(STATES, BEST_STAYS, UNRECORDED),
    "the directory is not synced after the best link's rename": Catch(STATES, BEST_CHANGES, UNLINKED),
    "the best link's reflink is not synced": Catch(STATES, crash(best_changes("clone")), UNLINKED),
    "the parent of a directory that was made is not synced": Catch(STATES, crash(workloads.deep_directory), LOST),
    "renamed into place, then synced": Catch(STATES, crash(workloads.overwritten_path), TORN),
    "a failed sync is tried again on the same descriptor": Catch(
        FSYNCGATE, crash(failing("fsync", errno.EIO, is_file, 4)), f"{TORN}|the registry is damaged"
    ),
    "a failed sync of the directory is no error": Catch(
        FSYNCGATE, crash(failing("fsync", errno.EIO, is_checkpoint_directory, 6)), f"{LOST}|{UNRECORDED}|which is gone"
    ),
    "the registry is written before the checkpoint is there": Catch(STATES, KEEPING_TWO, "which is gone"),
    "old files are deleted before the registry is written": Catch(STATES, KEEPING_ONE, "which is gone"),
    "acknowledged when it is staged": Catch(STATES, crash(workloads.overwritten_path), "and 1 was acknowledged"),
    "acknowledged when it is committed, not recorded": Catch(STATES, KEEPING_TWO, UNRECORDED),
    "acknowledged when it is recorded, the best not linked": Catch(STATES, BEST_CHANGES, UNLINKED),
    "temporary files in another directory": Catch(STATES, KEEPING_TWO, f"{LOST}|{UNRECORDED}"),
    "the registry is written in place": Catch(STATES, KEEPING_TWO, "the registry is damaged"),
    "temporary files are swept though they are locked": Catch(
        STATES, crash(workloads.ranks_side_by_side), "a save failed"
    ),
    "temporary files are never swept": Catch(STATES, KEEPING_TWO, "left over"),
    "readers sweep": Catch(STATES, KEEPING_TWO, "reading changed it"),
    "what is to be deleted is forgotten when it is dropped": Catch(STATES, KEEPING_ONE, "is nobody's file"),
    "a delete that failed counts as done": Catch(
        ERRORS, crash(failing("unlink", errno.EIO, is_checkpoint, 2)), "nobody's file"
    ),
    "retention drops the best": Catch(STATES, BEST_STAYS, "is gone, though only"),
    "the best link is made once": Catch(STATES, BEST_CHANGES, UNLINKED),
    "the best link is not renewed by recovery": Catch(STATES, BEST_CHANGES, "once opened, the best link holds"),
    "an older commit is not announced": Catch(STATES, crash(workloads.late_mirror), "is nobody's file"),
    "the best link is known by its name": Catch(STATES, crash(workloads.same_name), UNLINKED),
    "a commit that failed counts as done": Catch(
        ERRORS, crash(failing("rename", errno.ENOSPC, is_checkpoint, 3)), "which is gone"
    ),
    "what was not recorded is taken in unverified": Catch(DAMAGE, faults_after_damage, "though it is damaged"),
    "recovery deletes though what replaced it is damaged": Catch(DAMAGE, faults_after_damage, "nothing that is whole"),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Recovery says what it does in each of thousands of directories."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def caught() -> Iterator[list[str]]:
    caught: list[str] = []
    yield caught
    report("2 mutations", f"{len(caught)} of {len(BUGS)} seeded bugs caught, by name → gate:")
    for line in caught:
        report("2 mutations", line)


def faults_of(check: Check, patch: Patch, run: int) -> Generator[str, None, None]:
    with patch():
        for faults in check(random.Random(f"{SEED} {run}")):
            yield from faults


@functools.cache
def faults_without_bug(check: Check, run: int) -> list[str]:
    return list(faults_of(check, nullcontext, run))


@pytest.mark.parametrize("name", BUGS)
def test_a_seeded_bug_is_caught(name: str, caught: list[str]) -> None:
    """By what its gate checks, for the reason that it should; the same runs without the bug pass."""
    catch = CATCHES[name]
    for run in range(MAX_RUNS):
        with closing(faults_of(catch.check, BUGS[name], run)) as faults:
            fault = next((fault for fault in faults if re.search(catch.symptom, fault)), None)
        assert not faults_without_bug(catch.check, run), f"seed {SEED}: also without the bug"
        if fault is not None:
            caught.append(f"{name} → {catch.gate}: {fault}")
            return
    pytest.fail(f"seed {SEED}: not caught in {MAX_RUNS} runs")
