"""A long run: thousands of saves of changing sizes leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reliability import soak
from reliability.gates import SEED, count, report
from reliability.writers import WRITERS

NUM_SAVES = count(200, full=2000)
NUM_WARM_UP = 2  # rounds until the arenas are as large as they get
LARGEST_IMAGE = 2 * 4 * soak.LARGEST  # bytes: weights and momentum
ARENA_BYTES = LARGEST_IMAGE * 33 // 32 + (2 << 20)  # with what an arena has to spare
NUM_ARENAS = 2 + 2  # at most: two saves in flight in each, the manager and the saver
MALLOC_MAPPINGS = 6  # one for each large block, of which the interpreter has a few more or less
QUIET_BLOCKS = 500  # of Python's memory, whose free lists fill by and by; a handle that is kept is some twenty
# Allocators keep what was freed, each thread's of its own. This one gives large blocks back, so that a leak shows.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def run(directory: Path, writer: str) -> list[dict[str, Any]]:
    """What the long run said, at `start`, `running` after each round, at its `end`; it leaves no temporary files."""
    (temporary := directory / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, soak.__file__, str(directory / "saved"), writer, str(NUM_SAVES), str(SEED)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(temporary.glob("asyncckpt-*")) == []
    return [json.loads(line) for line in done.stdout.splitlines()]


def spread(moments: list[dict[str, Any]], name: str) -> int:
    values = [moment[name] for moment in moments]
    return int(max(values) - min(values))


def assert_flat(rounds: list[dict[str, Any]]) -> None:
    """From round to round: not one descriptor, thread or mapping more, and memory within one arena."""
    first = rounds[0]
    for moment in rounds:
        for name in ("processes", "threads", "descriptors"):
            assert moment[name] == first[name], name
        assert moment["checkpoint_mappings"] == moment["forgotten_arenas"] == 0
        assert moment["arenas"] <= NUM_ARENAS
        assert moment["arena_mappings"] <= NUM_ARENAS * moment["processes"]
        assert moment["arena_bytes"] <= NUM_ARENAS * ARENA_BYTES
    assert spread(rounds, "num_mappings") <= MALLOC_MAPPINGS
    assert spread(rounds, "mapped_bytes") <= NUM_ARENAS * ARENA_BYTES
    assert rounds[-1]["private_bytes"] <= first["private_bytes"] + ARENA_BYTES
    assert rounds[-1]["python_blocks"] <= first["python_blocks"] + QUIET_BLOCKS


def assert_given_back(start: dict[str, Any], end: dict[str, Any]) -> None:
    for name in ("processes", "threads", "descriptors"):
        assert end[name] == start[name], name
    assert end["num_mappings"] <= start["num_mappings"] + MALLOC_MAPPINGS
    assert end["arenas"] == end["forgotten_arenas"] == end["arena_mappings"] == end["checkpoint_mappings"] == 0
    assert end["private_bytes"] <= start["private_bytes"] + ARENA_BYTES
    assert end["mapped_bytes"] <= start["mapped_bytes"] + ARENA_BYTES


def assert_files_are_those_kept(moment: dict[str, Any]) -> None:
    assert set(moment["files"]) == {"explicit", "long", "coming and going"}
    assert moment["files"]["explicit"] == [f"{number}.pt" for number in range(soak.NUM_PATHS)]
    for name in ("long", "coming and going"):
        others = [file for file in moment["files"][name] if not file.startswith("checkpoint_")]
        assert others == [".asyncckpt.lock", "best_model.pt", "registry.json"]
        # The best is one of the newest, or kept besides.
        assert len(moment["files"][name]) - len(others) in (soak.NUM_KEPT, soak.NUM_KEPT + 1)


def counts(end: dict[str, Any]) -> str:
    return (
        f"{end['num_saved']} saves, {end['num_failed']} failures, {end['num_refused']} refused, "
        f"{end['num_streamed']} streamed, {end['num_loaded']} resumed"
    )


def figures(start: dict[str, Any], steady: list[dict[str, Any]], end: dict[str, Any]) -> str:
    first, last = steady[0], steady[-1]
    descriptors = [sum(moment["descriptors"].values()) for moment in (first, last)]
    private = [f"{moment['private_bytes'] / 1e6:.1f}" for moment in (first, last, start, end)]
    return (
        f"after the warm-up → after the last round: {first['processes']} → {last['processes']} processes, "
        f"{first['threads']} → {last['threads']} threads, {descriptors[0]} → {descriptors[1]} descriptors, "
        f"{first['num_mappings']} → {last['num_mappings']} mappings, {private[0]} → {private[1]} MB private, "
        f"{first['arena_bytes'] / 1e6:.1f} → {last['arena_bytes'] / 1e6:.1f} MB in arenas; "
        f"before all → after close: {private[2]} → {private[3]} MB private"
    )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("writer", WRITERS)
def test_long_run(tmp_path: Path, writer: str) -> None:
    """Sizes that grow, shrink and jump, copied and overlapped, streamed, failing, resumed: everything stays flat, and
    all is given back in the end."""
    start, *rounds, end = run(tmp_path, writer)
    steady = rounds[NUM_WARM_UP:]
    assert end["num_saved"] >= NUM_SAVES
    assert min(end["num_failed"], end["num_refused"], end["num_streamed"], end["num_loaded"]) >= len(rounds)
    for moment in (start, *rounds, end):
        assert_files_are_those_kept(moment)
    report(
        f"11 soak, {writer}", f"{counts(end)}, {len(rounds)} managers opened and closed; {figures(start, steady, end)}"
    )
    assert_flat(steady)
    assert_given_back(start, end)
