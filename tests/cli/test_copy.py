"""`asyncckpt copy`: files and directories, between local disks and a real S3 server."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from storage.s3_server import KEY, SECRET, S3Server

import asyncckpt
from asyncckpt.cli.verification import STORED
from asyncckpt.naming import REGISTRY_NAME
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.retention import KeepLast
from asyncckpt.storage.local import LocalReader
from asyncckpt.storage.places import Places
from asyncckpt.storage.s3 import S3Storage
from cli.directories import BEST, files, make_directory
from cli.running import error_of, on_a_terminal, run, run_json

BUCKET = "copies"


@pytest.fixture
def url(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new place in the store, which the environment knows how to reach."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = server.client()
    if not client.exists(BUCKET):
        client.mkdir(BUCKET)
    return f"s3://{BUCKET}/{secrets.token_hex(4)}/run"


@pytest.fixture(params=["local", "s3"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "copy" / "deep") if request.param == "local" else request.getfixturevalue("url")


def contents(directory: str) -> dict[str, bytes]:
    """All that counts in a directory: not whose claim to it the registry was written under."""
    storage = Places()
    names = [name for name in storage.list_names(directory) if name.endswith(".pt") or name == REGISTRY_NAME]
    found = {name: storage.read(os.path.join(directory, name), 1 << 30) for name in names}
    return {name: re.sub(rb',\n  "claim": "[0-9a-f]{16}"', b"", found[name]) for name in names}


def outcomes(source: object, destination: object, code: int = 0) -> dict[str, str]:
    """By the files' names, in order."""
    report = run_json("copy", source, destination, code=code)
    assert report["ok"] == (code == 0)
    return {os.path.basename(file["source"]): file["outcome"] for file in report["files"]}


def test_a_directory(directory: Path, destination: str, tmp_path: Path) -> None:
    """There and back: the same files and the same registry, byte for byte; the best goes first, then the newest."""
    run("pin", directory, 100)
    done = outcomes(directory, destination)
    names = [path.name for path in files(directory)]
    order = [names[BEST], *reversed([name for name in names if name != names[BEST]])]
    assert list(done) == order
    assert set(done.values()) == {"copied"}
    assert contents(destination) == contents(str(directory))
    assert set(outcomes(destination, tmp_path / "back").values()) == {"copied"}
    assert contents(str(tmp_path / "back")) == contents(str(directory))
    assert set(outcomes(directory, destination).values()) == {"already there"}
    assert contents(destination) == contents(str(directory))
    assert run("repair", destination).stdout == "nothing to do\n"


def test_training_goes_on_in_the_copy(directory: Path, destination: str) -> None:
    """It is the same run's; retention is applied there by whoever trains, and by no copy."""
    run("copy", directory, destination)
    model = torch.nn.Linear(8, 4)
    with asyncckpt.CheckpointManager(destination, max_checkpoints=2, writer="thread") as manager:
        assert manager.load_latest(model)[0] == 5
        manager.save(model, None, 6, 600, val_loss=9.0)
        manager.wait(60)
        assert [info.global_step for info in manager.list_checkpoints()] == [300, 500, 600]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files whose bytes were sent to the store."""
    names: list[str] = []
    begin = S3Storage.begin

    def note(self: S3Storage, path: str, num_bytes: int, *, expected: str | None = None) -> Any:
        names.append(os.path.basename(path))
        return begin(self, path, num_bytes, expected=expected)

    monkeypatch.setattr(S3Storage, "begin", note)
    return names


@pytest.mark.parametrize("is_committed", [False, True])
def test_an_interrupted_copy_goes_on(
    directory: Path, url: str, is_committed: bool, monkeypatch: pytest.MonkeyPatch, sent: list[str]
) -> None:
    """What is there is not sent again, also a file that was committed, and not listed yet."""
    record = CheckpointDirectory.record
    num_recorded = 0

    def interrupt(self: CheckpointDirectory, listing: Any, commit: Any) -> Any:
        nonlocal num_recorded
        if num_recorded == 2:
            if is_committed:
                commit()
            raise KeyboardInterrupt
        num_recorded += 1
        return record(self, listing, commit)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointDirectory, "record", interrupt)
        run("copy", directory, url, code=130)
    listed = run_json("list", url)["checkpoints"]
    assert [info["global_step"] for info in listed] == [300, 500]
    assert len(contents(url)) == 2 + 2 + is_committed  # the registry and the best link
    sent.clear()
    done = outcomes(directory, url)
    num_there = 2 + is_committed
    assert list(done.values()) == ["already there"] * num_there + ["copied"] * (5 - num_there)
    assert [name for name in sent if name.startswith("checkpoint_")] == list(done)[num_there:]
    assert contents(url) == contents(str(directory))


def damage(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)


def test_damage_is_not_copied(directory: Path, destination: str) -> None:
    """The others are; the exit code says so, and the line names the record."""
    damaged = files(directory)[1]
    damage(damaged)
    outcome = run("copy", directory, destination, code=1)
    line = next(line for line in outcome.stdout.splitlines() if line.startswith("failed: "))
    assert line.startswith(f"failed: {damaged.name}: {damaged} is damaged: record archive/")
    assert outcome.stdout.splitlines()[-1].endswith("; 1 failed")
    assert set(contents(destination)) == set(contents(str(directory))) - {damaged.name}
    assert [info["global_step"] for info in run_json("list", destination)["checkpoints"]] == [100, 300, 400, 500]


def test_a_damaged_copy_is_replaced(directory: Path, tmp_path: Path) -> None:
    """It is the same checkpoint, by its directory."""
    run("copy", directory, tmp_path / "copy")
    name = files(directory)[0].name
    damage(tmp_path / "copy" / name)
    done = outcomes(directory, tmp_path / "copy")
    assert (done.pop(name), set(done.values())) == ("copied", {"already there"})
    assert contents(str(tmp_path / "copy")) == contents(str(directory))


def test_another_runs_directory_is_left_alone(directory: Path, destination: str, tmp_path: Path) -> None:
    """So is another file of a checkpoint's name."""
    make_directory(tmp_path / "other")
    run("copy", tmp_path / "other", destination)
    before = contents(destination)
    assert "holds another run's checkpoints" in error_of("copy", directory, destination)
    assert contents(destination) == before


def test_other_files_are_not_overwritten(directory: Path, destination: str) -> None:
    """They are somebody's."""
    name = files(directory)[3].name
    Places().replace(os.path.join(destination, name), b"mine")
    done = outcomes(directory, destination, code=1)
    assert (done.pop(name), set(done.values())) == ("failed", {"copied"})
    assert contents(destination)[name] == b"mine"
    path = files(directory)[2]
    assert "is another file" in error_of("copy", path, os.path.join(destination, name))
    assert contents(destination)[name] == b"mine"


def test_a_destination_that_somebody_writes_to(directory: Path, tmp_path: Path) -> None:
    run("copy", directory, tmp_path / "copy")
    with asyncckpt.CheckpointManager(tmp_path / "copy") as manager:
        manager.prune(KeepLast(9))
        assert "is being written to by" in error_of("copy", directory, tmp_path / "copy")


def test_what_retention_drops_meanwhile(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is no failure; what is gone though it is listed is one."""
    first = files(directory)[0]
    open_for_writing = CheckpointDirectory.open_for_writing

    def open_and_prune(self: CheckpointDirectory) -> None:
        open_for_writing(self)
        patch.undo()
        run("prune", directory, "--keep-last", 1)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointDirectory, "open_for_writing", open_and_prune)
        done = outcomes(directory, tmp_path / "copy")
    assert sorted(done.values()) == ["copied", "copied", "gone", "gone", "gone"]
    assert done[first.name] == "gone"


# --- files ---


def test_a_file(directory: Path, url: str, tmp_path: Path) -> None:
    """Under another name, or into a directory by its own; a second time it is there."""
    path = files(directory)[0]
    assert list(outcomes(path, f"{url}/mine.pt").values()) == ["copied"]
    assert list(outcomes(path, f"{url}/").values()) == ["copied"]
    assert list(outcomes(path, url).values()) == ["already there"]
    assert contents(url) == {"mine.pt": path.read_bytes(), path.name: path.read_bytes()}
    shutil.copytree(directory, tmp_path / "there")
    (tmp_path / "there" / path.name).unlink()
    assert list(outcomes(f"{url}/{path.name}", tmp_path / "there").values()) == ["copied"]
    assert (tmp_path / "there" / path.name).read_bytes() == path.read_bytes()


def test_a_large_file_goes_in_parts(url: str, tmp_path: Path) -> None:
    """The store has its checksum afterwards; it comes back as it went."""
    path = tmp_path / "large.pt"
    asyncckpt.save({"a": torch.randn(10_000_000), "b": [torch.ones(n) for n in range(100)]}, path).result(60)
    run("copy", path, f"{url}/large.pt")
    (file,) = run_json("verify", "--quick", f"{url}/large.pt")["files"]
    assert (file["ok"], file["method"]) == (True, STORED)
    run("copy", f"{url}/large.pt", tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_bytes() == path.read_bytes()


def test_a_file_of_torch_save(url: str, tmp_path: Path) -> None:
    """Its records are checked; a damaged one is refused, and leaves nothing."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.randn(100_000), "b": torch.ones(3)}, path)
    run("copy", path, f"{url}/a.pt")
    assert contents(url) == {"a.pt": path.read_bytes()}
    damage(path)
    assert "does not match its checksum; it was not copied" in error_of("copy", path, f"{url}/b.pt")
    path.write_bytes(path.read_bytes()[:-10])
    assert "is damaged" in error_of("copy", path, f"{url}/b.pt")
    assert Places().list_names(url) == ["a.pt"]


@pytest.mark.parametrize("kind", ["ours", "torch.save"])
def test_damage_on_the_way_is_no_copy(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was whole when it was looked at must be whole when it is sent."""
    path = tmp_path / "a.pt"
    state = {"a": torch.randn(3_000_000)}
    if kind == "ours":
        asyncckpt.save(state, path).result(60)
    else:
        torch.save(state, path)
    read_into = LocalReader.read_into

    def disturb(self: LocalReader, offset: int, view: memoryview) -> None:
        read_into(self, offset, view)
        if len(view) >= 1 << 22 and offset == 0:  # a piece of the copy
            view[1_000_000] ^= 1

    monkeypatch.setattr(LocalReader, "read_into", disturb)
    assert "is damaged" in error_of("copy", path, tmp_path / "copies" / "b.pt")
    assert os.listdir(tmp_path / "copies") == []


def test_what_can_not_be_copied(directory: Path, tmp_path: Path) -> None:
    """Nothing, nothing there, and a place onto itself."""
    assert "there is no checkpoint at" in error_of("copy", tmp_path / "no.pt", tmp_path / "b.pt")
    (tmp_path / "empty").mkdir()
    assert "there are no checkpoints in" in error_of("copy", tmp_path / "empty", tmp_path / "b")
    assert "into itself" in error_of("copy", directory, f"{directory}/")
    assert "onto itself" in error_of("copy", files(directory)[0], directory)
    run("copy", directory, "", code=2)
    for source in (directory, files(directory)[0]):
        assert "carrier-pigeon://" in error_of("copy", source, "carrier-pigeon://bucket/run")
    assert not (tmp_path / "b").exists()


def test_a_terminal_sees_how_far_it_is(directory: Path, tmp_path: Path) -> None:
    """On stderr."""
    command = [sys.executable, "-m", "asyncckpt", "copy", str(directory), str(tmp_path / "copy"), "--json"]
    stdout, drawn = on_a_terminal(command)
    assert json.loads(stdout)["ok"] is True
    assert b"copying" in drawn


@pytest.fixture(autouse=True)
def no_temporary_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("source", ["file", "directory"])
def test_into_memory_that_nobody_sees_again(tmp_path: Path, source: str) -> None:
    """It would say that it has copied, and take the copy with it."""
    make_directory(tmp_path / "run")
    path = tmp_path / "run" if source == "directory" else files(tmp_path / "run")[BEST]
    assert "memory, and gone when it ends" in error_of("copy", path, "memory://there/run")
