"""Directories from elsewhere: nothing outside is read, written or deleted, and nothing hangs or eats memory."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.running import run as command
from image.images import image_of, payloads
from storage.seam import Call, Seam
from typer.testing import CliRunner

import asyncckpt
from asyncckpt import CheckpointError, CheckpointManager, KeepLast
from asyncckpt.cli.app import app
from asyncckpt.image.layout import METADATA_RECORD
from asyncckpt.naming import BEST_NAME, LOCK_NAME, REGISTRY_NAME

from . import gates
from .test_fuzz_parsers import archive_of, write_run

HOSTILE_NAME = "a\n\x1b[31mERROR all is lost\x1b[0m.pt"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "run"
    write_run(path)
    return path


@pytest.fixture(scope="module")
def used() -> Iterator[list[str]]:
    """Which directories got through; the gate's line of figures comes of it."""
    names: list[str] = []
    yield names
    gates.report("hostile directories", f"{len(names)} hand-made ones used in every way, {len(BOMBS)} bombs among them")


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "run")


@pytest.fixture
def outside(pristine: Path, tmp_path: Path) -> Path:
    """Somebody else's files: checkpoints of the same run, a registry, a secret."""
    path = shutil.copytree(pristine, tmp_path / "outside")
    (path / "secret").write_bytes(b"secret")
    (path / "secret").chmod(0o644)
    return path


def newest(directory: Path) -> Path:
    return max(directory.glob("checkpoint_*.pt"))


def edit_registry(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((directory / REGISTRY_NAME).read_bytes())
    change(document)
    (directory / REGISTRY_NAME).write_text(json.dumps(document))


def rename_entry(document: dict[str, Any], name: str) -> None:
    document["checkpoints"][-1]["filepath"] = name


def replace_by_link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def replace_by_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def replace_by_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mknod(path, stat.S_IFSOCK | 0o600)


def replace_by_directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def rewrite_metadata(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    records = payloads(path.read_bytes())
    metadata = json.loads(records[METADATA_RECORD])
    change(metadata)
    path.write_bytes(archive_of({**records, METADATA_RECORD: json.dumps(metadata).encode()}))


def unrecord(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Without a registry; and the newest file tells lies of itself."""
    (directory / REGISTRY_NAME).unlink()
    rewrite_metadata(newest(directory), change)


def delete_by_a_link(directory: Path, outside: Path) -> None:
    (directory / "x.pt").symlink_to(newest(outside))
    edit_registry(directory, lambda registry: registry["pending_deletes"].append({"name": "x.pt", "sequence": 3}))


def record_hostile_name(directory: Path, outside: Path) -> None:
    shutil.copy(newest(directory), directory / HOSTILE_NAME)
    edit_registry(directory, lambda registry: rename_entry(registry, HOSTILE_NAME))


def lock_a_secret(directory: Path, outside: Path) -> None:
    (directory / LOCK_NAME).unlink()
    os.link(outside / "secret", directory / LOCK_NAME)


def link_everything(directory: Path, outside: Path) -> None:
    for path in list(directory.iterdir()):
        replace_by_link(path, outside / path.name)


TEMPORARY = ".asyncckpt-0123456789abcdef-x.pt.tmp"

HOSTILE: dict[str, Callable[[Path, Path], object]] = {
    "an absolute path": lambda d, o: edit_registry(d, lambda r: rename_entry(r, str(newest(o)))),
    "a path upwards": lambda d, o: edit_registry(d, lambda r: rename_entry(r, f"../outside/{newest(o).name}")),
    "a delete of an absolute path": lambda d, o: edit_registry(
        d, lambda r: r["pending_deletes"].append({"name": str(newest(o)), "sequence": 3})
    ),
    "a delete of what is needed": lambda d, o: edit_registry(
        d, lambda r: r["pending_deletes"].extend([{"name": n, "sequence": 3} for n in (BEST_NAME, REGISTRY_NAME)])
    ),
    "a delete by a link": delete_by_a_link,
    "a name with an escape sequence": record_hostile_name,
    "a file of such a name": lambda d, o: shutil.copy(newest(d), d / HOSTILE_NAME),
    "a file of such a name, gone": lambda d, o: edit_registry(d, lambda r: rename_entry(r, HOSTILE_NAME)),
    "a directory of such a name": lambda d, o: (d / HOSTILE_NAME).mkdir(),
    "a metric of such a name": lambda d, o: edit_registry(
        d, lambda r: r["checkpoints"][0]["val_metrics"].update({HOSTILE_NAME: 1.0})
    ),
    "a monitored metric of such a name": lambda d, o: edit_registry(d, lambda r: r.update(monitor_metric=HOSTILE_NAME)),
    "a name that no file system has": lambda d, o: edit_registry(d, lambda r: rename_entry(r, "\udc80\ud800.pt")),
    "a name that is too long": lambda d, o: edit_registry(d, lambda r: rename_entry(r, "x" * 5000 + ".pt")),
    "numbers at their end": lambda d, o: edit_registry(d, lambda r: r.update(last_sequence=2**62 - 1)),
    "an epoch of a thousand digits": lambda d, o: edit_registry(
        d, lambda r: r["checkpoints"][0].update(epoch=10**1000, global_step=-(10**1000))
    ),
    "a time that is none": lambda d, o: edit_registry(d, lambda r: r["checkpoints"][0].update(timestamp="\x1b[31m")),
    "a file that names another": lambda d, o: unrecord(d, lambda m: m.update(name=f"../outside/{newest(o).name}")),
    "a file of a later time": lambda d, o: unrecord(d, lambda m: m.update(created="zzz")),
    "a file with a number at the end": lambda d, o: unrecord(d, lambda m: m["metadata"].update(sequence=2**62 - 1)),
    "a checkpoint that is a link": lambda d, o: replace_by_link(newest(d), newest(o)),
    "a checkpoint that is a link to a secret": lambda d, o: replace_by_link(newest(d), o / "secret"),
    "a checkpoint that is a pipe": lambda d, o: replace_by_pipe(newest(d)),
    "a checkpoint that is a socket": lambda d, o: replace_by_socket(newest(d)),
    "a checkpoint that is a directory": lambda d, o: replace_by_directory(newest(d)),
    "a stranger that is a link": lambda d, o: (d / "stranger.pt").symlink_to(newest(o)),
    "a best that is a link": lambda d, o: replace_by_link(d / BEST_NAME, newest(o)),
    "a best that is a pipe": lambda d, o: replace_by_pipe(d / BEST_NAME),
    "a registry that is a link": lambda d, o: replace_by_link(d / REGISTRY_NAME, o / REGISTRY_NAME),
    "a registry that is a pipe": lambda d, o: replace_by_pipe(d / REGISTRY_NAME),
    "a registry that is a directory": lambda d, o: replace_by_directory(d / REGISTRY_NAME),
    "a lock that is a link": lambda d, o: replace_by_link(d / LOCK_NAME, o / "secret"),
    "a lock that is a pipe": lambda d, o: replace_by_pipe(d / LOCK_NAME),
    "a lock that is a directory": lambda d, o: replace_by_directory(d / LOCK_NAME),
    "a lock that is another name of a secret": lock_a_secret,
    "a temporary file that is a link": lambda d, o: (d / TEMPORARY).symlink_to(o / "secret"),
    "a temporary file that is a pipe": lambda d, o: os.mkfifo(d / TEMPORARY),
    "a temporary file that is a directory": lambda d, o: (d / TEMPORARY).mkdir(),
    "all of it is links": link_everything,
}


@contextmanager
def nothing_outside_is_opened(directory: Path) -> Iterator[None]:
    """By any call through the seam, links followed; but for the directory's parent, whose entries are synced."""
    opened: list[str] = []

    def look(call: Call) -> None:
        if call.name == "open_file" and not call.args[1] & os.O_DIRECTORY:
            follows = not call.args[1] & os.O_NOFOLLOW and not call.args[1] & os.O_EXCL
            path = os.path.realpath(call.path) if follows else call.path
            if str(directory) not in (path, os.path.dirname(path)):
                opened.append(call.path)

    with Seam(look):
        yield
    assert not opened


def attempt(*actions: Callable[[], object]) -> int:
    """How many of them were refused, each by an error of ours."""
    refused = 0
    for action in actions:
        try:
            action()
        except CheckpointError:
            refused += 1
    return refused


def use(directory: Path) -> int:
    """Everything that a manager does."""
    model = torch.nn.Linear(2, 2)
    with CheckpointManager(directory, max_checkpoints=2, lock_timeout_secs=0.0) as manager:
        return attempt(
            manager.list_checkpoints,
            manager.verify,
            lambda: manager.load_latest(model),
            lambda: manager.load_best(model),
            lambda: manager.load(3, model),
            lambda: manager.save(model, None, 9, 9, 0.5, 0.01, {"accuracy": 0.5}),
            manager.wait,
            lambda: manager.prune(KeepLast(1)),
        )


COMMANDS = (
    ["list"],
    ["verify"],
    ["prune", "--dry-run", "--keep-last=1", "--keep-every-hours=1"],
    ["repair"],
    ["prune", "--keep-last=1"],
    ["list"],
)


def run_commands(directory: Path) -> str:
    """All that they print."""
    printed = ""
    for arguments in COMMANDS:
        for more in ([], ["--json"]):
            printed += outcome_of([arguments[0], str(directory), *arguments[1:], *more])
    for path in sorted(directory.glob("*.pt")):
        if not path.is_symlink():  # following one that the user names is no fault
            printed += outcome_of(["inspect", str(path)])
    return printed


def outcome_of(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, arguments, prog_name="asyncckpt")
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert result.exit_code in (0, 1, 3), (arguments, result.output)
    return result.output


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.lstat().st_mtime_ns) for path in directory.iterdir()}


def is_plain(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text) and "\nERROR" not in text


@pytest.mark.timeout(120)
@pytest.mark.parametrize("order", ["manager first", "commands first"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_directory(
    name: str, order: str, directory: Path, outside: Path, caplog: pytest.LogCaptureFixture, used: list[str]
) -> None:
    """Every method and every command: errors of ours, plain lines, and nothing but the directory is touched."""
    caplog.set_level(logging.DEBUG, "asyncckpt")
    HOSTILE[name](directory, outside)
    before = contents(outside)
    printed = ""
    with nothing_outside_is_opened(directory):
        if order == "commands first":
            printed = run_commands(directory)
        use(directory)
        printed += run_commands(directory)
    assert contents(outside) == before
    assert sorted(path.name for path in directory.parent.iterdir()) == ["outside", "run"]
    assert is_plain(printed)
    assert all(is_plain(record.getMessage()) and "\n" not in record.getMessage() for record in caplog.records)
    used.append(name)


def test_numbers_that_are_used_up_lose_no_save(directory: Path) -> None:
    """A save is refused, rather than acknowledged and not found again."""
    edit_registry(directory, lambda registry: registry.update(last_sequence=2**62 - 1))
    model = torch.nn.Linear(2, 2)
    with CheckpointManager(directory) as manager:
        with pytest.raises(asyncckpt.RegistryError, match="beyond all reason"):
            manager.save(model, None, 9, 9, 0.5, 0.01)
        assert len(manager.list_checkpoints()) == 3


# --- memory and time ---

LIMIT_BYTES = 1 << 30
NUM_ENTRIES = gates.count(3_000, full=60_000)  # all that a registry may hold
NUM_METRICS = gates.count(50_000, full=1_000_000)
NUM_LISTS = gates.count(2_000_000, full=10_000_000)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def fill_registry(directory: Path, body: bytes) -> None:
    document = json.loads((directory / REGISTRY_NAME).read_bytes())
    text = json.dumps(document).encode()
    (directory / REGISTRY_NAME).write_bytes(text[:-1] + b"," + body + b"}")


def many_entries(directory: Path) -> None:
    def add(document: dict[str, Any]) -> None:
        entry = document["checkpoints"][0]
        document["checkpoints"] += [{**entry, "filepath": f"{n}.pt", "sequence": 10 + n} for n in range(NUM_ENTRIES)]

    edit_registry(directory, add)


def many_metrics(directory: Path) -> None:
    edit_registry(
        directory, lambda r: r["checkpoints"][0]["val_metrics"].update({f"m{n}": 0.5 for n in range(NUM_METRICS)})
    )


def large_metadata(directory: Path) -> None:
    records = payloads(newest(directory).read_bytes())
    newest(directory).write_bytes(
        archive_of({**records, METADATA_RECORD: b'{"a":[' + b"[]," * (NUM_LISTS // 2) + b"[]]}"})
    )


BOMBS: dict[str, Callable[[Path], object]] = {
    "a registry of empty lists": lambda d: fill_registry(d, b'"x":[' + b"[]," * NUM_LISTS + b"[]]"),
    "a registry nested deeply": lambda d: fill_registry(d, b'"x":' + nested(NUM_LISTS)),
    "a registry of gigabytes": lambda d: os.truncate(d / REGISTRY_NAME, 1 << 36),
    "a registry of many entries": many_entries,
    "a registry of many metrics": many_metrics,
    "large metadata": large_metadata,
    "a version of a million digits": lambda d: (d / REGISTRY_NAME).write_bytes(
        b'{"version":' + b"9" * 1_000_000 + b"}"
    ),
    "a sparse checkpoint of gigabytes": lambda d: os.truncate(newest(d), 1 << 36),
    "a lock of gigabytes": lambda d: os.truncate(d / LOCK_NAME, 1 << 36),
}


def limited(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process that may not use more memory than that."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))

    return subprocess.run(
        [sys.executable, "-m", "asyncckpt", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, directory: Path, used: list[str]) -> None:
    """In a gigabyte of address space, each command answers."""
    BOMBS[name](directory)
    for arguments in (["list"], ["verify"], ["repair"], ["list", "--json"]):
        done = limited(arguments[0], str(directory), *arguments[1:])
        assert done.returncode in (0, 1, 3), done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert "MemoryError" not in done.stderr
    used.append(name)


def billions(levels: int) -> Any:
    value: Any = [1.0]
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.timeout(60)
def test_a_few_lists_that_unfold_to_billions(tmp_path: Path) -> None:
    """Each is there twice in the next: a restore copies each once, and `inspect` gives up soon."""
    model = torch.nn.Linear(2, 2)
    state = {"model_state_dict": model.state_dict(), "stateful": {"thing": billions(60)}, "epoch": 1}
    path = tmp_path / "a.pt"
    path.write_bytes(image_of(state))

    class Thing:
        given: Any = None

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            self.given = state

    thing = Thing()
    with CheckpointManager(tmp_path / "run") as manager:
        manager.load(path, model, stateful={"thing": thing}, restore_rng=False)
    assert thing.given[0] is thing.given[1]
    assert "more entries than can be shown" in command("inspect", path, code=3).stderr


@pytest.mark.timeout(60)
def test_a_state_nested_deeply(tmp_path: Path) -> None:
    """An error of ours, by a manager and by `inspect`; nothing is changed."""
    deep = b"]" * 100_000 + b"a" * 99_999  # empty lists, each appended to the one before
    pickle = b"\x80\x02}(X\x10\0\0\0model_state_dict}X\x14\0\0\0scheduler_state_dict" + deep + b"u."
    path = tmp_path / "a.pt"
    path.write_bytes(archive_of({"data.pkl": pickle, "byteorder": sys.byteorder.encode(), "version": b"3\n"}))
    model = torch.nn.Linear(2, 2)
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 1)
    with CheckpointManager(tmp_path / "run") as manager, pytest.raises(CheckpointError):
        manager.load(path, model, scheduler=scheduler, restore_rng=False, strict=False)
    command("inspect", path, code=3)
