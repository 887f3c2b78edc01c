"""Gate 8: damage at rest and during the load is always found, never loaded, and never the end of the process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncckpt
from asyncckpt import CheckpointManager, CorruptCheckpointError
from asyncckpt.image.payloads import Payloads
from asyncckpt.image.verify import verify_payloads
from asyncckpt.storage.local import LocalReader

from . import gates
from .damaged_loading import NEWEST, OLDER, Case, make, newest_path, restored_step

SCRIPT = Path(__file__).parent / "damaged_loading.py"
SHAPES = {"many small": (60, 5), "few large": (1, 750)}  # layers, width
AT_REST = gates.count(30, full=600)  # of each kind of file
DURING = gates.count(60, full=600)
WAYS = ("load", "read", "latest", "best", "one")
MOMENTS = ("verified", "unpickled", "loaded", "returned")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two checkpoints in each: the newest, to be damaged, is the best too."""
    made = {}
    for name, shape in SHAPES.items():
        made[name] = str(tmp_path_factory.mktemp("run"))
        with CheckpointManager(made[name]) as manager:
            for step in (OLDER, NEWEST):
                manager.save(*make(shape, step), 1, step, val_loss=1.0 / step)
                manager.wait(60)
    return made


def places_in(path: str, chance: random.Random) -> Iterator[int]:
    """Offsets for ever: each second one anywhere; the others around records' edges, in headers, padding, directory."""
    with LocalReader(path) as reader:
        _, payloads = verify_payloads(reader, path)
        size = reader.num_bytes
    assert payloads
    edges = [0, size - 1, *(payload.offset for payload in payloads), *(p.offset + p.num_bytes for p in payloads)]
    while True:
        yield chance.randrange(size)
        yield min(size - 1, max(0, chance.choice(edges) + chance.randrange(-40, 40)))


def damage_at_rest(path: str, offset: int, kind: str, chance: random.Random) -> Callable[[], None]:
    """Damage the file in place; what it returns mends it."""
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.seek(offset)
        lost = file.read() if kind == "truncate" else file.read(1)
        if kind == "truncate":
            file.truncate(offset)
        else:
            file.seek(offset)
            file.write(bytes([lost[0] ^ (1 << chance.randrange(8))]))

    def mend() -> None:
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(lost)
        assert os.path.getsize(path) == size

    return mend


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("files", SHAPES)
def test_damage_at_rest_is_found_and_passed_over(files: str, directories: dict[str, str]) -> None:
    """By `load`, mapped and read; and `load_latest` takes the older checkpoint, whole."""
    directory, chance = directories[files], random.Random(gates.SEED)
    path = newest_path(directory)
    places = places_in(path, chance)
    found = dict.fromkeys(("flip", "truncate"), 0)
    for number in range(AT_REST):
        kind, offset = ("truncate" if number % 3 == 0 else "flip"), next(places)
        where = f"{kind} at {offset} with seed {gates.SEED}"
        mend = damage_at_rest(path, offset, kind, chance)
        try:
            with pytest.raises(CorruptCheckpointError):
                asyncckpt.load(path, mmap=bool(number % 2))
                pytest.fail(where)
            model, optimizer = make(SHAPES[files], 0)
            with CheckpointManager(directory) as manager:
                manager.load_latest(model, optimizer)
            assert restored_step(model, optimizer) == OLDER, where
        finally:
            mend()
        found[kind] += 1
    assert asyncckpt.verify(path).ok
    gates.report("8 corruption", f"{files}: {found} of each found, and load_latest fell back every time")


def cases(directories: dict[str, str]) -> list[Case]:
    """Every way, moment and damage in turn, at places by chance: with each size of file."""
    chance = random.Random(gates.SEED)
    kinds = [(w, m, d, f) for w in WAYS for m in MOMENTS for d in ("truncate", "flip") for f in SHAPES]
    places = {files: places_in(newest_path(directory), chance) for files, directory in directories.items()}
    chosen = [kinds[number % len(kinds)] for number in range(max(DURING, len(kinds)))]
    return [
        Case(directories[files], way, moment, damage, next(places[files]) * (chance.random() > 0.1), SHAPES[files])
        for way, moment, damage, files in chosen
    ]


def run_all(chosen: Sequence[Case]) -> list[dict[str, Any]]:
    process = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input="".join(json.dumps(asdict(case)) + "\n" for case in chosen),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in process.stdout.splitlines()]


def is_right(outcome: dict[str, Any]) -> bool:
    """Loaded whole, or refused with nothing changed; the newest one only if the damage came too late for it."""
    way, moment, error, step = (outcome[key] for key in ("way", "moment", "error", "step"))
    if outcome["signal"] or (error and "UNEXPECTED" in error):
        return False
    if moment == "returned":
        return error is None and step in (None, NEWEST)
    if way == "load":
        return error is not None or moment == "loaded"
    if way == "latest":
        return step == OLDER or (step == NEWEST and not touches_restored(outcome))
    return step == 0 if error is not None else step == NEWEST and not touches_restored(outcome)


def touches_restored(outcome: dict[str, Any]) -> bool:
    """Whether bytes were lost that were still to be read: what is read once more is checked once more."""
    if outcome["way"] == "read":
        return False  # by then all of it may be in memory
    return outcome["moment"] in ("verified", "unpickled")


@pytest.mark.timeout(3600)
def test_damage_during_the_load(directories: dict[str, str]) -> None:
    """Truncated or written to when it has been verified, unpickled, compared, or returned: an error, or all is well."""
    outcomes = run_all(cases(directories))
    wrong = [outcome for outcome in outcomes if not is_right(outcome)]
    assert not wrong, f"{len(wrong)} of {len(outcomes)}, seed {gates.SEED}: {wrong[:5]}"
    assert any(outcome["way"] == "latest" and outcome["step"] == OLDER for outcome in outcomes)
    refused = sum(outcome["error"] is not None or outcome["step"] == OLDER for outcome in outcomes)
    gates.report(
        "8 corruption",
        f"{len(outcomes)} loads whose file was damaged meanwhile: {refused} noticed, the others whole; 0 SIGBUS",
    )


def test_mapped_tensors_of_a_truncated_file_are_why(directories: dict[str, str]) -> None:
    """What the gate guards against is real here: touching the mapping does end a process by SIGBUS."""
    script = (
        "import os, sys, torch\n"
        "state = torch.load(sys.argv[1], mmap=True, weights_only=True)\n"
        "os.truncate(sys.argv[1], 0)\n"
        "print(state['model_state_dict']['0.weight'].sum())\n"
    )
    path = newest_path(directories["few large"])
    pristine = Path(path).read_bytes()
    try:
        process = subprocess.run([sys.executable, "-c", script, path], capture_output=True, check=False)
    finally:
        Path(path).write_bytes(pristine)
    assert process.returncode == -7


def test_read_again_is_checked_again(tmp_path: Path) -> None:
    """Each byte of a small file's payloads, damaged between the check and the second reading."""
    path = tmp_path / "a.pt"
    asyncckpt.save({"a": torch.arange(20), "b": torch.ones(7)}, path).result()
    with LocalReader(str(path)) as reader:
        _, payloads = verify_payloads(reader, str(path))
        source = Payloads(reader, str(path), payloads)
        content = bytearray(path.read_bytes())
        for payload in payloads:
            for offset in range(payload.offset, payload.offset + payload.num_bytes):
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(bytes([content[offset] ^ 1]))
                with pytest.raises(CorruptCheckpointError, match=payload.name):
                    source.read([(payload, memoryview(bytearray(payload.num_bytes)))])
                path.write_bytes(content)
