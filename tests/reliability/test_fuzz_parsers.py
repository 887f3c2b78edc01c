"""Mutated files and registries: what parses them answers in its own words, and never believes a lie.

The mutants are made by chance from valid ones (`ASYNCCKPT_SEED` repeats them): bytes, fields, and whole JSON values.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from image.images import BytesReader, image_of, payloads, torch_file
from storage.mounts import memory_directory

import asyncckpt
from asyncckpt import CheckpointError, CheckpointManager, CorruptCheckpointError, KeepLast, RegistryError
from asyncckpt.image.layout import METADATA_RECORD, central_directory, local_header, plan_layout
from asyncckpt.image.verify import read_metadata, verify_reader
from asyncckpt.naming import REGISTRY_NAME, is_checkpoint_name
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.recovery import survey
from asyncckpt.registry.registry import DamagedRegistryError, decode_registry, encode_registry, read_description
from asyncckpt.storage.local import LocalStorage

from . import gates

NUM_MUTANTS = gates.count(400, full=20_000)
NUM_DIRECTORIES = gates.count(30, full=1_000)
NUM_LOADS = gates.count(60, full=2_000)

STATE = {"weights": {str(i): torch.arange(i) for i in range(9)}, "step": 7, "list": [1, [2.5, "x" * 20]]}
SIGNATURES = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07")
NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 2**62, 2**63, 2**64 - 1)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One to three changes: bits, runs of bytes, and fields of the archive's structures."""
    changed = bytearray(content)
    for _ in range(chance.randrange(1, 4)):
        kind = chance.randrange(6)
        at = chance.randrange(max(1, len(changed)))
        if kind == 0 and changed:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[at : at + chance.choice((1, 16, 300, len(changed)))]
        elif kind == 2:
            changed[at:at] = chance.randbytes(chance.choice((1, 4, 64)))
        elif kind == 3:
            start = chance.randrange(max(1, len(changed)))
            changed[at:at] = changed[start : start + chance.randrange(200)]
        else:
            structures = [p for s in SIGNATURES for p in [changed.find(s, at)] if p >= 0]
            form = chance.choice(("<H", "<I", "<Q"))
            place = (chance.choice(structures) + chance.randrange(4, 60)) if structures else at
            if place + struct.calcsize(form) <= len(changed):
                struct.pack_into(form, changed, place, chance.choice(NUMBERS) & (256 ** struct.calcsize(form) - 1))
    return bytes(changed)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("writer", ["asyncckpt", "torch"])
def test_mutated_archives(writer: str) -> None:
    """A report with problems and no exception; of our own files every mutant is found."""
    content = image_of(STATE, {"epoch": 3}) if writer == "asyncckpt" else torch_file(STATE)
    chance = random.Random(gates.SEED)
    num_found = 0
    for number in range(NUM_MUTANTS):
        mutant = mutated(content, chance)
        report = verify_reader(BytesReader(mutant), "x.pt", num_threads=1)
        if mutant == content:
            assert report.ok
            continue
        num_found += not report.ok
        assert writer == "torch" or not report.ok, f"mutant {number} with seed {gates.SEED}"
        with contextlib.suppress(CorruptCheckpointError):
            read_description(read_metadata(BytesReader(mutant)), len(mutant))
    gates.report(
        "hostile directories", f"{NUM_MUTANTS} mutants of a file of {writer}: {num_found} refused, no surprise"
    )


def archive_of(records: dict[str, bytes]) -> bytes:
    """A well-formed archive, with the right checksums."""
    layout = plan_layout((name, len(content)) for name, content in records.items())
    crcs = [crc32(content) for content in records.values()]
    parts = [
        local_header(record, crc) + content
        for record, crc, content in zip(layout.records, crcs, records.values(), strict=True)
    ]
    return b"".join((*parts, central_directory(layout, crcs)))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_mutated_records_with_right_checksums(mmap: bool, tmp_path: Path) -> None:
    """Made wrong on purpose, pickle and metadata and storages: what a safe load takes, or an error of ours."""
    records = payloads(image_of(STATE, {"epoch": 3}))
    chance = random.Random(gates.SEED)
    path = tmp_path / "a.pt"
    refused = 0
    for _ in range(NUM_LOADS):
        name = chance.choice(["data.pkl"] * 3 + [METADATA_RECORD, "byteorder", "data/5", "version"])
        path.write_bytes(archive_of({**records, name: mutated(records[name], chance)}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                asyncckpt.load(path, mmap=mmap)
            except (CheckpointError, MemoryError):
                refused += 1
    gates.report(
        "hostile directories", f"{NUM_LOADS} files with mutated records loaded: {refused} refused, no surprise"
    )


# --- registries ---

VALUES: tuple[Any, ...] = (
    *(None, True, "", "x", [], {}, 0, -1, 1.5, 1e308, -0.0, "NaN", "Infinity", "nan", 2**61, 2**62 - 1, 2**62, 2**63),
    *(2**64, 10**400, "../x.pt", "/etc/x.pt", "a/../b.pt", "\ud800.pt", "a\n\x1b[31mb.pt", "x" * 300 + ".pt", "\0.pt"),
    *(".pt", "..", "best_model.pt", "registry.json", "0" * 16, "min", "max", "9999-99-99", "2026-01-01T00:00:00+99:00"),
)


def mutated_json(document: Any, chance: random.Random) -> Any:
    """One to three values replaced, removed, doubled, or exchanged for values from elsewhere in it."""
    changed = json.loads(json.dumps(document))
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = list(places_in(changed))
        container, key = chance.choice(places)
        kind = chance.randrange(5)
        if kind == 0 and isinstance(container, dict):
            del container[key]
        elif kind == 1 and isinstance(container, list):
            container.append(container[key])
        elif kind == 2:
            other, its_key = chance.choice(places)
            container[key] = json.loads(json.dumps(other[its_key]))
        else:
            container[key] = chance.choice(VALUES)
        if not list(places_in(changed)):
            break
    return changed


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places_in(value[key])


def write_run(directory: Path, num_saves: int = 3) -> None:
    model = torch.nn.Linear(2, 2)
    with CheckpointManager(directory) as manager:
        for step in range(1, num_saves + 1):
            manager.save(model, None, step, step, 0.5, 1.0 / step, {"accuracy": 0.5})
            manager.wait(60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    write_run(path)
    return path


@pytest.mark.timeout(3600)
def test_mutated_registries(run: Path) -> None:
    """A registry that says the same once it is written and read again, or one of the two errors."""
    chance = random.Random(gates.SEED)
    text = (run / REGISTRY_NAME).read_bytes()
    document = json.loads(text)
    document["pending_deletes"] = [{"name": "old.pt", "sequence": 1}]
    num_read = 0
    for number in range(NUM_MUTANTS):
        mutant = mutated(text, chance) if number % 4 == 0 else json.dumps(mutated_json(document, chance)).encode()
        try:
            registry = decode_registry(mutant)
        except (RegistryError, DamagedRegistryError):
            continue
        num_read += 1
        where = f"mutant {number} with seed {gates.SEED}"
        names = [*(str(info.filepath) for info in registry.checkpoints), *(d.name for d in registry.pending_deletes)]
        assert all(map(is_checkpoint_name, names)), where
        written = encode_registry(registry)
        assert encode_registry(decode_registry(written)) == written, where
        encode_registry(registry.keeping([]).monitoring("accuracy", "max"))
    assert num_read
    gates.report("hostile directories", f"{NUM_MUTANTS} mutated registries: {num_read} read, the others refused")


def describe(content: bytes, chance: random.Random) -> bytes:
    """A checkpoint whose metadata lies, with the right checksums."""
    records = payloads(content)
    metadata = mutated_json(json.loads(records[METADATA_RECORD]), chance)
    return archive_of({**records, METADATA_RECORD: json.dumps(metadata).encode()})


def change_directory(directory: Path, chance: random.Random) -> None:
    """The registry, the files, their descriptions, and what a name is: each by chance."""
    registry = directory / REGISTRY_NAME
    document = json.loads(registry.read_bytes())
    files = sorted(directory.glob("checkpoint_*.pt"))
    victim = chance.choice(files)
    whole = victim.read_bytes()
    changes: list[Callable[[], object]] = [
        lambda: registry.write_text(json.dumps(mutated_json(document, chance))),
        lambda: registry.write_bytes(mutated(registry.read_bytes(), chance)),
        lambda: registry.unlink(),
        lambda: victim.write_bytes(mutated(victim.read_bytes(), chance)),
        lambda: victim.write_bytes(describe(whole, chance)),
        lambda: shutil.copy(victim, directory / chance.choice(("other.pt", "a\n\x1b[31mb.pt", "x" * 200 + ".pt"))),
        lambda: (directory / "best_model.pt").unlink(),
        lambda: (directory / "sub.pt").mkdir(),
    ]
    for change in chance.sample(changes, chance.randrange(1, 4)):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            change()


@pytest.mark.timeout(3600)
def test_mutated_directories(run: Path) -> None:
    """Looked at, taken over, saved into, pruned: typed errors, nothing of anybody else's is lost, and it ends in order.

    What a save acknowledged is there; a second opening changes nothing.
    """
    chance = random.Random(gates.SEED)
    num_opened = 0
    model = torch.nn.Linear(2, 2)
    with memory_directory() as base:
        for number in range(NUM_DIRECTORIES):
            where = f"directory {number} with seed {gates.SEED}"
            directory = base / f"{number}" / "run"
            shutil.copytree(run, directory)
            change_directory(directory, chance)
            outside = base / f"{number}" / "x.pt"
            outside.write_bytes(b"not yours")
            try:
                survey(LocalStorage(), str(directory))
                with CheckpointManager(directory, max_checkpoints=2) as manager:
                    manager.save(model, None, 9, 900, 0.5, 0.01)
                    manager.wait(60)
                    assert manager.load_latest(model)[1]["global_step"] == 900, where
                    manager.prune(KeepLast(1))
                opened = CheckpointDirectory(str(directory), LocalStorage())
                opened.open_for_writing()
                opened.close()
                before = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}
                opened.open_for_writing()
                opened.close()
                assert {path: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before, where
                num_opened += 1
            except CheckpointError:
                pass
            assert outside.read_bytes() == b"not yours", where
            assert sorted(path.name for path in outside.parent.iterdir()) == ["run", "x.pt"], where
            shutil.rmtree(outside.parent)
    assert num_opened
    gates.report("hostile directories", f"{NUM_DIRECTORIES} mutated directories: {num_opened} taken over and in order")
