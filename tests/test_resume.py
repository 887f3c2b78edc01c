"""Killed by SIGKILL and started again, a training script goes on bit by bit as if nothing had happened.

`ASYNCCKPT_SEED` chooses when it is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from interrupted_training import NUM_STEPS, Order

from asyncckpt import CheckpointManager

SEED = int(os.environ.get("ASYNCCKPT_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
NUM_KILLS = 3
LONGEST_PAUSE_SECS = 0.05
SCRIPT = Path(__file__).parent / "interrupted_training.py"


def run(order: Order, num_saved: int | None = None, pause_secs: float = 0.0) -> list[str]:
    """What the script says; killed, if `num_saved` is given, some time after it has said so many times `saved`."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(asdict(order))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    output, said = process.stdout.fileno(), b""
    with process.stdout:
        while b"weights" not in said and (num_saved is None or said.count(b"saved") < num_saved):
            received = os.read(output, 65536)
            assert received, f"ended after {said[-300:]!r}"
            said += received
        if num_saved is not None:
            time.sleep(pause_secs)
            process.kill()
        process.wait(60)
        os.set_blocking(output, False)  # the loader's workers, which outlive it for a while, have copies
        with contextlib.suppress(BlockingIOError):
            while received := os.read(output, 65536):
                said += received
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # these workers
    return said.decode().split("\n")[:-1]


def steps(lines: list[str]) -> dict[int, str]:
    """Loss and batch of each step."""
    words = [line.split(" ", 2) for line in lines if line.startswith("step ")]
    return {int(number): said for _, number, said in words}


def newest_saved(lines: list[str]) -> int:
    return max([0, *(int(line.split()[1]) for line in lines if line.startswith("saved "))])


@pytest.fixture(scope="module")
def uninterrupted() -> list[str]:
    """Without a manager: saving must not change what training does either."""
    lines = run(Order())
    assert list(steps(lines)) == list(range(1, NUM_STEPS + 1))
    assert len(set(steps(lines).values())) == NUM_STEPS
    return lines


def test_from_the_latest(tmp_path: Path, uninterrupted: list[str]) -> None:
    """Killed several times in one run: every loss, every batch and the final weights are the same."""
    chance = random.Random(SEED)
    expected, newest, resumed = steps(uninterrupted), 0, []
    directory = str(tmp_path / "run")
    for kill in range(NUM_KILLS):
        order = Order(directory, snapshot="overlap" if kill % 2 else "copy", wait_to_be_killed=True)
        lines = run(order, chance.randrange(1, 5), chance.uniform(0, LONGEST_PAUSE_SECS))
        where = f"kill {kill} with seed {SEED}"
        check_steps(lines, expected, newest, where)
        newest = max(newest, newest_saved(lines))
        assert newest > 0, where
        resumed.append(min(steps(lines), default=NUM_STEPS + 1) - 1)
    lines = run(Order(directory))
    check_steps(lines, expected, newest, f"the last run with seed {SEED}")
    assert lines[-1] == uninterrupted[-1], f"seed {SEED}"
    print(f"{NUM_KILLS} kills, seed {SEED}: went on after the steps {resumed}, equal in every bit to the end")


def check_steps(lines: list[str], expected: dict[int, str], newest: int, where: str) -> None:
    """It went on from the newest checkpoint that was known to be durable, or a newer one, and just as it should."""
    found = steps(lines)
    assert min(found, default=NUM_STEPS + 1) > newest, where
    assert found == {number: expected[number] for number in found}, where


def test_from_a_step_of_the_past(tmp_path: Path, uninterrupted: list[str]) -> None:
    """Taken back behind the latest checkpoint, in the middle of an epoch."""
    order = Order(str(tmp_path / "run"), wait_to_be_killed=True)
    run(order, num_saved=7)
    with CheckpointManager(tmp_path / "run") as manager:
        (oldest, *_, latest) = [info.global_step for info in manager.list_checkpoints()]
    assert oldest is not None
    assert latest != oldest
    lines = run(Order(order.directory, from_step=oldest))
    expected = steps(uninterrupted)
    assert steps(lines) == {number: expected[number] for number in range(oldest + 1, NUM_STEPS + 1)}
    assert lines[-1] == uninterrupted[-1]
