"""Gate 8: damage at rest and during the load is always found, never loaded, and never the end of the process."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from storage.seam import Call, Seam

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


@contextmanager
def failing_disk(base: Path, num_bytes: int) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A directory on a disk of its own, and what cuts the disk off behind so many bytes: reading those is EIO."""
    if sys.platform != "linux" or os.geteuid() != 0:
        gates.not_checked("a failing disk needs Linux and root")
    image, mount = base / "disk", base / "mount"
    mount.mkdir()
    image.write_bytes(b"")
    os.truncate(image, num_bytes)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        gates.not_checked(f"a failing disk: {error}")

    def cut(at: int) -> None:
        subprocess.run(["umount", str(mount)], check=True)  # nothing is in the page cache then
        subprocess.run(["mount", "-o", "loop,ro", str(image), str(mount)], check=True)
        os.truncate(image, at)  # the loop device keeps its size

    try:
        yield mount, cut
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_fails_for_real(tmp_path: Path) -> None:
    """EIO while it is read: an OSError of `load` and `verify`; `load_latest` takes the older checkpoint."""
    shapes = {OLDER: (1, 8), NEWEST: (1, 1200)}
    with failing_disk(tmp_path, 48 << 20) as (mount, cut):
        run = mount / "run"
        with CheckpointManager(run) as manager:
            for step, shape in shapes.items():
                manager.save(*make(shape, step), 1, step)
                manager.wait(60)
        path = newest_path(str(run))
        assert os.path.getsize(path) > 16 << 20
        cut(12 << 20)
        for attempt in (asyncckpt.load, asyncckpt.verify):
            with pytest.raises(OSError, match="Input/output error") as caught:
                attempt(path)
            assert caught.value.errno == errno.EIO
        model, optimizer = make(shapes[OLDER], 0)
        with CheckpointManager(run) as manager:
            assert manager.load_latest(model, optimizer)[1]["global_step"] == OLDER
        assert restored_step(model, optimizer) == OLDER


@pytest.mark.parametrize(
    ("error", "lasts", "expected"),
    [(errno.EIO, False, OLDER), (errno.EIO, True, OLDER), (errno.ESTALE, False, NEWEST), (errno.ESTALE, True, OLDER)],
)
def test_reading_fails_at_each_call(error: int, lasts: bool, expected: int, tmp_path: Path) -> None:
    """Once or from then on, at each call in turn that reads the newest file's bytes: the older one is restored, whole;
    a file that was only replaced meanwhile (ESTALE) is read anew."""
    shape = (3, 3)
    with CheckpointManager(tmp_path) as manager:
        for step in (OLDER, NEWEST):
            manager.save(*make(shape, step), 1, step)
            manager.wait(60)
    path = newest_path(str(tmp_path))

    def restored_when(failing_read: int | None) -> tuple[int, int]:
        """The step that was restored; how many reads there were."""
        num_reads = 0

        def fail(call: Call) -> None:
            nonlocal num_reads
            if call.name == "pread_into" and call.path == path:
                num_reads += 1
                if num_reads == failing_read or (lasts and num_reads > (failing_read or math.inf)):
                    raise OSError(error, os.strerror(error))

        model, optimizer = make(shape, 0)
        with Seam(fail), CheckpointManager(tmp_path) as manager:
            manager.load_latest(model, optimizer)
        return restored_step(model, optimizer), num_reads

    step, num_reads = restored_when(None)
    assert step == NEWEST
    assert num_reads > 6 * 3, "what is restored is read once more"
    assert [restored_when(number)[0] for number in range(1, num_reads + 1)] == [expected] * num_reads
    when = "from each of" if lasts else "at each of"
    what = "fell back" if expected == OLDER else "read the file anew"
    gates.report("8 corruption", f"{errno.errorcode[error]} {when} {num_reads} reads: load_latest {what}")


def test_a_file_that_is_touched_is_loaded_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As cleaners of scratch space have it: its time changes, its bytes do not. If that never ends, it is an error."""
    path = tmp_path / "a.pt"
    asyncckpt.save({"a": torch.arange(5)}, path).result()
    torch_load, num_touches = torch.load, 1

    def touch_then_load(*args: Any, **options: Any) -> Any:
        nonlocal num_touches
        if num_touches:
            num_touches -= 1
            os.utime(path, ns=(num_touches, num_touches))
        return torch_load(*args, **options)

    monkeypatch.setattr(torch, "load", touch_then_load)
    assert asyncckpt.load(path)["a"].tolist() == [0, 1, 2, 3, 4]
    assert num_touches == 0
    num_touches = 100
    with pytest.raises(CorruptCheckpointError, match="keeps being written to"):
        asyncckpt.load(path)


LOOKED_AT: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["plain", *LOOKED_AT])
def test_what_torch_looks_at_is_not_mapped(kind: str, tmp_path: Path) -> None:
    """Making a sparse tensor of mapped memory would look at it, and the file might be gone."""
    path = tmp_path / "a.pt"
    asyncckpt.save({"a": torch.ones(3), "b": LOOKED_AT.get(kind, lambda: 1)()}, path).result()
    loaded = asyncckpt.load(path)
    assert (str(path) in Path("/proc/self/maps").read_text()) == (kind == "plain")
    assert loaded["a"].tolist() == [1, 1, 1]


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
