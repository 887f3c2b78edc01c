"""The command line on URLs: the same commands, on a real S3 server."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from storage.s3_server import KEY, SECRET, S3Server

import asyncckpt
from asyncckpt.cli.options import storage_options
from asyncckpt.naming import BEST_NAME, REGISTRY_NAME
from asyncckpt.storage.places import Places
from asyncckpt.storage.s3 import S3Reader
from cli.directories import files
from cli.running import Outcome, error_of, on_a_terminal, run, run_json

BUCKET = "cli"
STEPS = (100, 200, 300, 400, 500)


class Place:
    """A directory in a bucket, with the five checkpoints of the local one."""

    def __init__(self, server: S3Server, directory: Path) -> None:
        self.server = server
        self.client = server.client()
        self.url = f"s3://{BUCKET}/{secrets.token_hex(4)}/run"
        if not self.client.exists(BUCKET):
            self.client.mkdir(BUCKET)
        self.names = [path.name for path in files(directory)]
        storage = Places(server.options)
        for name in (*self.names, BEST_NAME, REGISTRY_NAME):
            storage.replace(f"{self.url}/{name}", (directory / name).read_bytes())

    @property
    def options(self) -> list[str]:
        """As arguments."""
        given = {**self.server.options, "client_kwargs": json.dumps(self.server.options["client_kwargs"])}
        return [f"--storage-option={name}={value}" for name, value in given.items()]

    def get(self, name: str) -> bytes:
        contents: bytes = self.client.cat_file(f"{self.url}/{name}")
        return contents

    def put(self, name: str, contents: bytes) -> None:
        self.client.pipe_file(f"{self.url}/{name}", contents)

    def present(self) -> set[str]:
        """The checkpoints' names."""
        names = {path.rsplit("/", 1)[1] for path in self.client.ls(self.url, detail=False)}
        return {name for name in names if name.startswith("checkpoint_")}

    def steps(self) -> list[int | None]:
        manager = asyncckpt.CheckpointManager(self.url, storage_options=self.server.options)
        try:
            return [info.global_step for info in manager.list_checkpoints()]
        finally:
            manager.close(60)


@pytest.fixture
def place(server: S3Server, directory: Path) -> Place:
    return Place(server, directory)


@pytest.fixture
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What users of s3fs have in theirs."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture(autouse=True)
def nothing_secret_is_printed(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err


def checked(outcome: Outcome) -> Outcome:
    assert SECRET not in outcome.stdout + outcome.stderr
    return outcome


@pytest.mark.usefixtures("environment")
def test_list(place: Place, directory: Path) -> None:
    """The same table as of the local directory, by what the environment says."""
    remote, local = run("list", place.url + "/"), run("list", directory)
    assert remote.stdout == local.stdout
    listed = run_json("list", place.url)
    assert listed == {**run_json("list", directory), "directory": place.url}


def test_options_on_the_command_line(place: Place) -> None:
    """Take the place of the environment."""
    assert [entry["global_step"] for entry in run_json("list", place.url, *place.options)["checkpoints"]] == [*STEPS]


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ([], {}),
        (["anon=true", "profile=mine"], {"anon": True, "profile": "mine"}),
        (['client_kwargs={"region_name": "x"}'], {"client_kwargs": {"region_name": "x"}}),
        (["key=123", "secret=0=1", "token=null"], {"key": "123", "secret": "0=1", "token": "null"}),
        (["endpoint_url="], {"endpoint_url": ""}),
    ],
)
def test_storage_options(given: Sequence[str], options: dict[str, Any]) -> None:
    """JSON where it is that; keys and secrets never are."""
    assert storage_options(given) == options


@pytest.mark.parametrize("option", [SECRET, f"={SECRET}", f"a b={SECRET}"])
def test_what_is_no_option_is_not_repeated(option: str) -> None:
    """It may be a secret."""
    outcome = checked(run("list", "s3://bucket/run", "--storage-option", option, code=2))
    assert "KEY=VALUE" in outcome.stderr


@pytest.mark.usefixtures("environment")
def test_verify(place: Place) -> None:
    """A file, a directory, the copy that is the best; then damage."""
    url = f"{place.url}/{place.names[0]}"
    assert run("verify", url).stdout.startswith(f"whole   {url} (")
    verified = run_json("verify", place.url)
    assert [os.path.basename(file["path"]) for file in verified["files"]] == [BEST_NAME, *place.names]
    assert {file["method"] for file in verified["files"]} == {"read"}
    contents = bytearray(place.get(place.names[1]))
    contents[len(contents) // 2] ^= 1
    place.put(place.names[1], bytes(contents))
    verified = run_json("verify", place.url, code=1)
    assert [file["path"] for file in verified["files"] if not file["ok"]] == [f"{place.url}/{place.names[1]}"]
    assert "no checkpoint at" in error_of("verify", f"{place.url}/nothing.pt")


@pytest.mark.usefixtures("environment")
def test_quick_verification_reads_no_payloads(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's checksum of the whole is held against the file's own; it says so, and finds damage too."""
    state = {"model": torch.arange(3_000_000.0), "odd": torch.ones(7)}
    with asyncckpt.AsyncCheckpointSaver(storage_options=place.server.options, writer="thread") as saver:
        saver.save(state, f"{place.url}/large.pt").result(60)
    read = 0
    read_into = S3Reader.read_into

    def count(self: S3Reader, offset: int, view: memoryview) -> None:
        nonlocal read
        read += len(view)
        read_into(self, offset, view)

    monkeypatch.setattr(S3Reader, "read_into", count)
    (file,) = run_json("verify", "--quick", f"{place.url}/large.pt")["files"]
    assert (file["ok"], file["method"]) == (True, "checksum of the store")
    assert 0 < read < 500_000 < file["num_bytes"]
    assert "by the checksum of the store, not read" in run("verify", "--quick", f"{place.url}/large.pt").stdout
    contents = bytearray(place.get("large.pt"))
    contents[1_000_000] ^= 1
    Places(place.server.options).replace(f"{place.url}/large.pt", bytes(contents))  # the store finds nothing wrong
    (file,) = run_json("verify", "--quick", f"{place.url}/large.pt", code=1)["files"]
    assert file["problems"] == ["the store's checksum of it is not the one that its directory asks for"]


@pytest.mark.usefixtures("environment")
def test_quick_verification_reads_what_has_no_such_checksum(place: Place, tmp_path: Path, directory: Path) -> None:
    """Files of torch.save, whose gaps no directory tells of; files that the store has no checksum of; local ones."""
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pt")
    Places(place.server.options).replace(f"{place.url}/a.pt", (tmp_path / "a.pt").read_bytes())
    for path in (f"{place.url}/a.pt", files(directory)[0]):
        (file,) = run_json("verify", "--quick", path)["files"]
        assert (file["ok"], file["method"]) == (True, "read")


@pytest.mark.usefixtures("environment")
def test_inspect_and_diff(place: Place, directory: Path) -> None:
    """As of local files, and of one of each."""
    remote, local = f"{place.url}/{place.names[0]}", files(directory)[0]
    assert run_json("inspect", remote) == {**run_json("inspect", local), "path": remote}
    assert run_json("diff", remote, local)["equal"]
    compared = run_json("diff", remote, f"{place.url}/{place.names[1]}", code=1)
    assert compared["tensors"] == run_json("diff", *files(directory)[:2], code=1)["tensors"]


@pytest.mark.usefixtures("environment")
def test_inspect_and_partial_loads_fetch_only_what_they_need(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint in a store; and what is loaded is what was saved."""
    state = {"model_state_dict": {"a": torch.arange(2e6), "b": torch.ones(9)}, "other": torch.zeros(3_000_000)}
    with asyncckpt.AsyncCheckpointSaver(storage_options=place.server.options, writer="thread") as saver:
        saver.save(state, f"{place.url}/large.pt").result(60)
    num_read = 0
    read_into = S3Reader.read_into

    def count(self: S3Reader, offset: int, view: memoryview) -> None:
        nonlocal num_read
        num_read += len(view)
        read_into(self, offset, view)

    monkeypatch.setattr(S3Reader, "read_into", count)
    run("inspect", f"{place.url}/large.pt")
    assert 0 < num_read < 500_000
    num_read = 0
    part = asyncckpt.load(f"{place.url}/large.pt", keys=["model_state_dict"], storage_options=place.server.options)
    assert list(part) == ["model_state_dict"]
    assert torch.equal(part["model_state_dict"]["a"], torch.arange(2e6))
    assert torch.equal(part["model_state_dict"]["b"], torch.ones(9))
    assert 8_000_000 < num_read < 8_500_000


_LOAD = """
import sys, asyncckpt, asyncckpt.image.file as file, asyncckpt.image.sparse_file as sparse_file
for after_secs in sys.argv[2:]:
    file.BAR_AFTER_SECS = sparse_file.BAR_AFTER_SECS = float(after_secs)
    for keys in (None, ["epoch"]):
        print(asyncckpt.load(sys.argv[1], keys=keys)["epoch"])
    sys.modules["rich.console"] = None
"""


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("after_secs", "num_bars"), [((0,), 2), ((600, 0), 0)])
def test_a_load_that_takes_long_shows_a_bar(place: Place, after_secs: Sequence[int], num_bars: int) -> None:
    """On a terminal, where rich is installed; it is gone at the end, and stdout is the program's."""
    command = [sys.executable, "-c", _LOAD, f"{place.url}/{place.names[0]}", *map(str, after_secs)]
    stdout, drawn = on_a_terminal(command)
    assert stdout == "1\n1\n" * len(after_secs)
    assert (b"fetching" in drawn) == bool(num_bars)
    assert drawn.count(b"\x1b[?25l") >= num_bars  # the cursor is hidden while there is one
    assert drawn.count(b"\x1b[?25l") == drawn.count(b"\x1b[?25h")
    assert num_bars or drawn == b""


@pytest.mark.usefixtures("environment")
def test_prune_and_pin(place: Place) -> None:
    """Changed in the store, and durable there; a dry run changes nothing."""
    assert len(run_json("prune", place.url, "--keep-last", 1, "--dry-run")["deleted"]) == 3
    assert place.present() == set(place.names)
    assert run("pin", place.url, 100).stdout == f"pinned {place.names[0]}\n"
    assert "pinned" in run("list", place.url).stdout
    assert len(run_json("prune", place.url, "--keep-last", 1)["deleted"]) == 2
    assert place.present() == {place.names[index] for index in (0, 2, 4)}
    assert run("unpin", place.url, 100).stdout == f"unpinned {place.names[0]}\n"
    run("prune", place.url, "--keep-last", 1)
    assert place.steps() == [300, 500]


@pytest.mark.usefixtures("environment")
def test_repair(place: Place) -> None:
    """Of a registry that is junk, from the files; twice does nothing."""
    place.put(REGISTRY_NAME, b"junk")
    actions = run_json("repair", place.url)["actions"]
    assert [action["file"] for action in actions] == [REGISTRY_NAME, *place.names]
    assert place.steps() == [*STEPS]
    assert run("repair", place.url).stdout == "nothing to do\n"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("command", ["list", "verify", "inspect", "repair"])
def test_errors_name_the_url_and_the_remedy(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no secrets."""
    url = "s3://no-such-bucket/run/a.pt"
    error = error_of(command, url)
    assert url in error
    assert "there is no bucket 'no-such-bucket'; make it first" in error or "no checkpoint at" in error
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"wrong-{SECRET}")
    error = error_of(command, f"s3://{BUCKET}/run")
    assert f"s3://{BUCKET}/run" in error
    assert "check key and secret in storage_options" in error
    assert SECRET not in error


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("carrier-pigeon://bucket/run", "carrier-pigeon://"),
        ("s3://bucket", "alone is no place"),
        (f"s3://{KEY}:{SECRET}@bucket/run", "credentials don't belong into a URL"),
        (f"sftp://me:a/{SECRET}@server/run/", "credentials don't belong into a URL"),
        (f"s3:/{KEY}:{SECRET}@bucket/run", "write s3://… for a URL"),
        (f"simplecache::s3://{KEY}:{SECRET}@bucket/run", "can't be chained"),
    ],
)
def test_urls_that_can_not_be_used(url: str, message: str) -> None:
    for command in ("list", "verify", "inspect", "doctor"):
        error = error_of(command, url)
        assert message in error
        assert SECRET not in error
