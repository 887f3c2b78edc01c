"""Clocks that jump: the wall clock under a run, and the monotonic one from one process of it to the next."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import asyncckpt
from reliability import clock_run
from reliability.gates import SEED, not_checked
from reliability.training_loop import Loop
from reliability.writers import WRITERS

AHEAD_SECS = 100_000_000


def run(directory: Path, writer: str, prefix: Sequence[str] = ()) -> float:
    """What the run's monotonic clock said at its end."""
    done = subprocess.run(
        [*prefix, sys.executable, str(Path(clock_run.__file__)), str(directory), writer, str(SEED)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, f"seed {SEED}: {done.stderr}"
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize("writer", WRITERS)
def test_wall_clock(tmp_path: Path, writer: str) -> None:
    """Set by hours, days and decades, to and fro, between saves and while somebody waits: the order of checkpoints,
    retention, policies and deadlines don't care."""
    run(tmp_path, writer)


@pytest.mark.parametrize("writer", WRITERS)
def test_monotonic_clock_of_another_boot(tmp_path: Path, writer: str) -> None:
    """A real one, three years ahead, in a time namespace: the run of another boot is gone on with, there and back."""
    prefix = ["unshare", "--time", "--fork", "--monotonic", str(AHEAD_SECS), "--boottime", str(AHEAD_SECS)]
    if os.geteuid() != 0 or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
        not_checked("time namespaces are refused here")
    with Loop(tmp_path / "before", writer, 1000) as loop:
        loop.succeed()
        loop.succeed()
    assert run(tmp_path, writer, prefix) > time.monotonic() + AHEAD_SECS / 2
    with Loop(tmp_path / "before", writer, 1000) as loop:
        assert loop.manager.load_latest(loop.model)[1]["global_step"] == 3
        loop.step, loop.acknowledged = 3, [1, 2, 3]
        loop.succeed()


def test_durations_are_measured_by_clocks_that_nobody_sets() -> None:
    """The package asks for the time of day to note it down, never to compute with it."""
    found = set()
    for path in sorted(Path(asyncckpt.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp | ast.Compare) and "now(" in ast.unparse(node):
                found.add(path.name)
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "time.time":
                found.add(path.name)
    # When an event happened; when a Slurm job ends, and when credentials do, by the wall clock.
    assert found == {"events.py", "process.py", "obstore_client.py"}
