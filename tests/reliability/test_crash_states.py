"""Every crash state that strict POSIX allows during a save, an overwrite, a delete, a recovery, …: nothing acknowledged
is lost, nothing torn is listed, nothing is left over, and a reader sees the same as the next writer."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import pytest
import torch
from storage.mounts import memory_directory
from torch import nn

import asyncckpt
from asyncckpt import CheckpointManager
from reliability.crash.exploring import Recording, Seen, Verdict, describe, verdicts
from reliability.crash.workloads import RUN, WORKLOADS, runs_of
from reliability.gates import SEED, count, report

NUM_STATES = count(60, full=1200)  # of each workload, at least
LOADED_EVERY = 40  # so many states one is loaded by torch too


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Recovery says what it does in each of thousands of directories."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def totals() -> Iterator[dict[str, int]]:
    totals = dict.fromkeys(("workloads", "runs", "states", "bad", "loads"), 0)
    yield totals
    report(
        "1 crash states",
        f"{totals['states']} distinct states of {totals['runs']} runs of {totals['workloads']} workloads, "
        f"{totals['bad']} bad; {totals['loads']} of them loaded by torch too",
    )


@pytest.mark.timeout(count(300, full=3600))
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_crash_state_keeps_the_promise(name: str, totals: dict[str, int]) -> None:
    """The workload is run, with other losses and sizes each time, until there were so many states."""
    chance = random.Random(f"{SEED} {name}")
    seen: Seen = set()
    while len(seen) < NUM_STATES:
        for recorded in runs_of(name, chance):
            for verdict in verdicts(recorded, chance, seen):
                totals["bad"] += bool(verdict.faults)
                assert not verdict.faults, f"seed {SEED}: {describe(recorded, verdict)}"
                if len(seen) % LOADED_EVERY == 0:
                    totals["loads"] += check_loading(recorded, verdict)
            totals["runs"] += 1
    totals["workloads"] += 1
    totals["states"] += len(seen)


def check_loading(recorded: Recording, verdict: Verdict) -> bool:
    """The newest checkpoint is what a manager resumes from, if there is one."""
    newest = verdict.findings.newest
    if newest is None:
        return False
    with memory_directory() as base:
        verdict.tree.write(base)
        (path,) = base.rglob(newest.name)
        loaded = asyncckpt.load(path)
        if path.parent.name != RUN:
            tensor = loaded["tensor"]
        else:
            model = nn.ParameterList([nn.Parameter(torch.zeros_like(next(iter(loaded["model_state_dict"].values()))))])
            CheckpointManager(path.parent).load_latest(model)
            tensor = model[0].detach()
        assert bool((tensor == newest.number).all()), describe(recorded, verdict)
        return True
