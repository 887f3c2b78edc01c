"""Children forked all the time while checkpoints are written: they hold nothing, and keep nothing alive."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from asyncckpt.naming import LOCK_NAME, REGISTRY_NAME
from asyncckpt.storage import files, system_calls
from asyncckpt.storage.local import LocalStorage
from reliability.gates import count, report
from reliability.resources import settled_usage
from reliability.training_loop import NUM_KEPT, TIMEOUT_SECS, Loop
from reliability.writers import WRITERS

NUM_EPOCHS = count(4, full=100)
BATCHES_PER_EPOCH = 6
NUM_WORKERS = 2


class Holdings(Dataset[tuple[int, str]]):
    """Each sample is what the worker that made it holds of the checkpoints, which should be nothing."""

    def __len__(self) -> int:
        return BATCHES_PER_EPOCH

    def __getitem__(self, index: int) -> tuple[int, str]:
        return os.getpid(), "; ".join(held())


_of_other_tests: set[str] = set()


@pytest.fixture(autouse=True)
def others_before() -> Iterator[None]:
    """Checkpoints that earlier tests have mapped, and nobody has collected yet, are not what these are about."""
    _of_other_tests.update(what for what in held() if "memfd" not in what)
    yield
    _of_other_tests.clear()


def held() -> Iterator[str]:
    """Arenas, the directory's lock, checkpoints and their temporary files: open or mapped in this process."""
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor that lists them
            continue
        if is_of_checkpoints(target) and target not in _of_other_tests:
            yield target
    for line in Path("/proc/self/maps").read_text().splitlines():
        if is_of_checkpoints(line) and line not in _of_other_tests:
            yield line


def is_of_checkpoints(text: str) -> bool:
    name = text.removesuffix(" (deleted)")
    return "memfd:asyncckpt" in name or name.endswith((LOCK_NAME, ".pt", ".tmp", REGISTRY_NAME))


def workers_of(loader: DataLoader[tuple[int, str]]) -> list[int]:
    iterator: Any = loader._iterator
    return [worker.pid for worker in iterator._workers] if iterator is not None else []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["open_file", "close"])
def test_forked_while_a_file_is_opened_or_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Between the kernel's doing and our knowing of it: also this descriptor is not the child's to keep."""
    call = getattr(system_calls, name)
    writers: set[int] = set()
    reached, gate = threading.Event(), threading.Event()
    num_forks = 0

    def held_up(*args: Any) -> Any:
        result = call(*args) if name == "open_file" else None
        if threading.get_ident() in writers:
            reached.set()
            assert gate.wait(TIMEOUT_SECS)
            gate.clear()
        return call(*args) if name == "close" else result

    def save(path: Path) -> None:
        writers.add(threading.get_ident())
        storage = LocalStorage()
        storage.replace(str(path), b"1")
        storage.replace(str(path), b"2")
        storage.delete([str(path)])
        writers.clear()
        reached.set()

    monkeypatch.setattr(system_calls, name, held_up)
    thread = threading.Thread(target=save, args=(tmp_path / "a.pt",))
    thread.start()
    while True:
        assert reached.wait(TIMEOUT_SECS)
        reached.clear()
        if not writers:
            break
        assert held_in_a_child() == ""
        num_forks += 1
        gate.set()
    thread.join()
    assert num_forks >= 6


def test_a_child_that_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked while a temporary file is opened, it looks for that when the file has its last name: it is closed all the
    same, but not what the user has open under that name."""
    path = tmp_path / "a.pt"
    path.write_bytes(b"0")
    open_file, is_at = system_calls.open_file, files._Passing.is_at
    opened, forked, go_on = threading.Event(), threading.Event(), os.pipe()

    def open_slowly(path: str, flags: int) -> int:
        fd = open_file(path, flags)
        if path.endswith(".tmp"):
            opened.set()
            assert forked.wait(TIMEOUT_SECS)
        return fd

    def look_late(passing: Any, fd: int) -> bool:
        os.read(go_on[0], 1)
        return is_at(passing, fd)

    monkeypatch.setattr(system_calls, "open_file", open_slowly)
    monkeypatch.setattr(files._Passing, "is_at", look_late)
    with path.open("rb") as of_user:
        thread = threading.Thread(target=lambda: LocalStorage().begin(str(path), 1).commit())
        thread.start()
        assert opened.wait(TIMEOUT_SECS)

        def commit_meanwhile() -> None:
            forked.set()
            thread.join()
            assert path.read_bytes() != b"0"
            os.write(go_on[1], bytes(1000))

        assert held_in_a_child(commit_meanwhile) == f"{path} (deleted)"
        assert os.readlink(f"/proc/self/fd/{of_user.fileno()}") == f"{path} (deleted)"


def held_in_a_child(meanwhile: Callable[[], object] = lambda: None) -> str:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, "; ".join(held()).encode())
        os._exit(0)
    os.close(writing)
    meanwhile()
    with open(reading, encoding="utf-8") as pipe:
        what = pipe.read()
    os.waitpid(pid, 0)
    return what


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("persistent", [False, True], ids=["workers of one epoch", "workers that stay"])
def test_data_loader_workers(tmp_path: Path, writer: str, persistent: bool) -> None:
    """A real loader's, forked in the middle of saves: what they hold is counted in the workers themselves. Closing
    gives memory, lock and writer back although they live on."""
    loader = DataLoader(
        Holdings(),
        batch_size=None,
        num_workers=NUM_WORKERS,
        persistent_workers=persistent,
        multiprocessing_context="fork",
    )
    pids: set[int] = set()
    with Loop(tmp_path / "run", writer, snapshot="overlap") as loop:
        for _ in range(NUM_EPOCHS):
            handles = [loop.save()]  # the epoch's workers are forked while this one is written
            for pid, what_is_held in loader:
                assert what_is_held == ""
                pids.add(pid)
                handles.append(loop.save())
            loop.acknowledged += [handle.result(TIMEOUT_SECS).global_step or 0 for handle in handles]
        loop.succeed()
    assert len(pids) == NUM_WORKERS * (1 if persistent else NUM_EPOCHS)
    alive = workers_of(loader)
    assert len(alive) == (NUM_WORKERS if persistent else 0)
    usage = settled_usage()
    assert usage.arenas == usage.forgotten_arenas == usage.arena_mappings == usage.arena_bytes == 0
    assert usage.processes == 1 + len(alive)
    with Loop(tmp_path / "run", writer) as other:  # the directory is free
        other.manager.load_latest(other.model)
        other.step, other.acknowledged = loop.step, loop.acknowledged[-NUM_KEPT:]
        other.succeed()
    report(
        f"11 forks, {writer}, {'persistent' if persistent else 'new'} workers",
        f"{len(loop.acknowledged)} saves, {len(pids)} workers forked beside them: 0 held anything",
    )
    del loader
