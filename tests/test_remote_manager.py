"""The manager and the saver where files are not this machine's: the same on every kind of storage."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import paramiko
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from storage.s3_server import S3Server
from storage.s3_server import server as s3  # noqa: F401 (a fixture)
from storage.sftp_server import SFTPServer, ssh_server  # noqa: F401
from torch import nn

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointManager, KeepLast, RegistryError, StorageBusyError

KINDS = ("s3", "sftp", "memory")
BUCKET = "managed"


@dataclass(frozen=True)
class Place:
    """An empty directory somewhere, and what it is opened with."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)

    def names(self) -> set[str]:
        """What is there, by other means."""
        file_system, path = fsspec.url_to_fs(self.url, **self.options, skip_instance_cache=True)
        return {name.rsplit("/", 1)[1] for name in file_system.ls(path, detail=False)}


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "memory":
        return Place(f"memory://{secrets.token_hex(4)}/run")
    if request.param == "sftp":
        ssh: SFTPServer = request.getfixturevalue("ssh_server")
        return Place(SFTPServer.url(tmp_path / "run"), ssh.options)
    server: S3Server = request.getfixturevalue("s3")
    if not server.client().exists(BUCKET):
        server.client().mkdir(BUCKET)
    return Place(f"s3://{BUCKET}/{secrets.token_hex(4)}", server.options)


@pytest.fixture
def make(place: Place) -> Iterator[Callable[..., CheckpointManager]]:
    """Managers of one directory, closed at the end."""
    managers: list[CheckpointManager] = []

    def make(**options: Any) -> CheckpointManager:
        managers.append(CheckpointManager(place.url, storage_options=place.options, **options))
        return managers[-1]

    yield make
    for manager in managers:
        manager.close(60)


class Training:
    """A model whose weights say which step it is at."""

    def __init__(self) -> None:
        self.model = nn.Linear(300, 300)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def save(self, manager: CheckpointManager, step: int, val_loss: float) -> None:
        with torch.no_grad():
            self.model.weight.fill_(step)
        manager.save(self.model, self.optimizer, 1, step, 1.0, val_loss)

    def at(self) -> float:
        return float(self.model.weight[7, 7].detach())


def test_a_run(make: Callable[..., CheckpointManager], place: Place) -> None:
    """Saved, listed, dropped by retention, found again: the latest, the best, by another manager too."""
    manager, training = make(retention=KeepLast(2)), Training()
    for step, val_loss in ((1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6)):
        training.save(manager, step, val_loss)
    manager.wait(60)
    assert [info.global_step for info in manager.list_checkpoints()] == [2, 3, 4]
    assert manager.best is not None
    assert manager.best.global_step == 2
    manager.load_best(training.model)
    assert training.at() == 2
    manager.close(60)
    names = place.names()
    assert {"registry.json", "best_model.pt"} < names
    assert len([name for name in names if name.startswith("checkpoint_")]) == 3
    # The writer process may have ended within a beat of its claim; the next writer sweeps that.
    assert not [name for name in names if name.endswith(".tmp") and "-writer." not in name]

    manager = make()
    assert manager.load_latest(training.model)[0] == 1
    assert training.at() == 4
    assert all(report.ok for report in manager.verify())
    training.save(manager, 5, 0.1)
    manager.wait(60)
    manager.load_best(training.model)
    assert training.at() == 5


def test_one_writer_at_a_time(make: Callable[..., CheckpointManager]) -> None:
    """The second manager is refused, and told by whom; once the first is closed it may write."""
    first, training = make(), Training()
    training.save(first, 1, 0.5)
    first.wait(60)
    second = make(lock_timeout_secs=0.1)
    with pytest.raises(StorageBusyError, match="is being written to by process"):
        training.save(second, 2, 0.5)
    first.close(60)
    training.save(second, 2, 0.5)
    second.wait(60)
    assert [info.global_step for info in second.list_checkpoints()] == [1, 2]


@pytest.mark.parametrize("name", ["writer.json", "writer.alive"])
@pytest.mark.parametrize("contents", [b"mine", bytes(5000)], ids=["small", "large"])
def test_files_of_others_where_a_claim_would_be(
    make: Callable[..., CheckpointManager], place: Place, name: str, contents: bytes
) -> None:
    """No save replaces them, or writes anything else there; what they are is no matter for a load."""
    file_system, path = fsspec.url_to_fs(f"{place.url}/{name}", **place.options, skip_instance_cache=True)
    file_system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    file_system.pipe_file(path, contents)
    manager, training = make(), Training()
    with pytest.raises(RegistryError, match=f"{name} can't be used: .*move it away"):
        training.save(manager, 1, 0.5)
    assert place.names() == {name}
    assert file_system.cat_file(path) == contents
    assert manager.load_latest(training.model) == (0, {})
    file_system.rm_file(path)
    training.save(manager, 1, 0.5)
    manager.wait(60)


def test_a_saver(place: Place) -> None:
    """Explicit paths, any depth; what is there is replaced; the file is what a load, and a verification, finds."""
    path = f"{place.url}/deep/a.pt"
    with AsyncCheckpointSaver(storage_options=place.options) as saver:
        for number in (1, 2):
            saver.save({"number": number, "tensor": torch.arange(3_000_000)}, path).result(60)
    assert asyncckpt.verify(path, storage_options=place.options).ok
    loaded = asyncckpt.load(path, storage_options=place.options)
    assert loaded["number"] == 2
    assert torch.equal(loaded["tensor"], torch.arange(3_000_000))
    assert Place(f"{place.url}/deep", place.options).names() == {"a.pt"}


# --- what another process can't open ---


class Registered(MemoryFileSystem):  # type: ignore[misc]
    """A file system that only this process knows."""

    protocol = "registered"
    store: dict[str, Any] = {}  # noqa: RUF012 (as its base has it)


@pytest.fixture
def registered() -> None:
    fsspec.register_implementation("registered", Registered, clobber=True)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("scheme", ["memory", "registered"])
def test_a_file_system_that_only_this_process_has(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its files are nowhere else."""
    assert_threads_write(f"{scheme}://{secrets.token_hex(4)}/a.pt", {}, caplog)


def test_options_that_only_this_process_has(
    ssh_server: SFTPServer,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A key as an object, which can't be told to another process."""
    key = paramiko.Ed25519Key.from_private_key_file(str(ssh_server.key_file))
    assert_threads_write(
        SFTPServer.url(tmp_path / "a.pt"), {**ssh_server.options, "key_filename": None, "pkey": key}, caplog
    )


def assert_threads_write(path: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """The log says so, once."""
    with AsyncCheckpointSaver(storage_options=options) as saver:
        saver.save({"a": 1}, path).result(60)
    assert asyncckpt.load(path, storage_options=options) == {"a": 1}
    assert caplog.text.count("another process can't open this") == 1
    with AsyncCheckpointSaver(writer="process", storage_options=options) as saver:
        for number in (2, 3):
            saver.save({"a": number}, path).result(60)
    assert asyncckpt.load(path, storage_options=options) == {"a": 3}
    assert caplog.text.count("the writer process can't open") == 1
