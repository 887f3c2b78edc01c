"""Which storage a URL names, and what is said when it can't be had."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointError, CheckpointManager
from asyncckpt.errors import MissingExtraError
from asyncckpt.paths import as_path
from asyncckpt.storage import schemes
from asyncckpt.storage.places import Places, full_path


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("S3://bucket//run/", "s3://bucket/run"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("abfs://container@account.dfs.core.windows.net/run", "abfs://container@account.dfs.core.windows.net/run"),
        ("sftp://me@server/runs/1", "sftp://me@server/runs/1"),
        ("memory://run", "memory://run"),
        ("memory:///run/1", "memory://run/1"),
        ("s3a://bucket/run", "s3://bucket/run"),
        ("sftp://me@corp@server:2222/runs/1", "sftp://me@corp@server:2222/runs/1"),
        ("sftp://[::1]:22/run", "sftp://[::1]:22/run"),
        (Path("s3://bucket/run"), "s3://bucket/run"),
        (Path("S3A://bucket") / "run", "s3://bucket/run"),
        (Path("sftp://me@server/runs/1"), "sftp://me@server/runs/1"),
        (Path("memory:///run/1"), "memory://run/1"),
        (as_path("gs://bucket/run"), "gs://bucket/run"),
    ],
)
def test_urls_that_can_be_used(url: str | Path, plain: str) -> None:
    """A Path that was made of one, too, though pathlib makes one slash of two."""
    assert full_path(url) == plain


@pytest.mark.parametrize("path", ["./s3:/run", "steps:/run", "a/s3:/run", "a/b::c:/run", "a::b", "s3:run"])
def test_paths_of_this_machine_that_resemble_urls(path: str) -> None:
    assert full_path(path) == os.path.abspath(path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://a/b", "not a kind of storage that is supported"),
        ("http://server/run", "not a kind of storage that is supported"),
        ("file:///tmp/run", "not a kind of storage that is supported"),
        ("simplecache://a/b", "not a kind of storage that is supported"),
        ("dropbox://a/run", "needs another package"),
        ("s3://bucket", "add a path"),
        ("s3://key@bucket/run", "storage_options"),
        ("sftp://me:canary@server/run", "storage_options"),
        ("sftp:///run/1", "name the server"),
        ("gs://bucket/../run", "may not be"),
        ("sftp://me:can/canary@server/run", "storage_options"),
        ("sftp://me:canary@server/run/", "storage_options"),
        ("sftp://me:/canary@server/run", "storage_options"),
        ("sftp://[::1]:canary/run", "storage_options"),
        ("s3a://KEY:can/canary@bucket/run", "storage_options"),
        ("gs://KEY:1/canary@bucket/run", "storage_options"),
        ("s3://arn:aws:s3:us-east-1:123456789012:accesspoint/name/run", "has an alias"),
        ("s3:/bucket/canary/run", r"write s3://… for a URL, \./s3:/… for a path"),
        ("file:/canary/run", "write file://… for a URL"),
        ("simplecache::s3://bucket/canary", "can't be chained"),
        (Path("simplecache::s3://bucket/canary"), "can't be chained"),
        (Path("s3://KEY:can/canary@bucket/run"), "storage_options"),
        (Path("s3://bucket"), "add a path"),
        (Path("file:///tmp/run"), "not a kind of storage that is supported"),
    ],
)
def test_urls_that_can_not(url: str | Path, message: str) -> None:
    """By the manager, the saver and a load alike, before anything is done."""
    uses: list[Callable[[], object]] = [
        lambda: CheckpointManager(url),
        lambda: asyncckpt.load(url),
        lambda: asyncckpt.verify(url),
    ]
    for use in uses:
        with pytest.raises(CheckpointError, match=message) as refused:
            use()
        assert "canary" not in str(refused.value)
    with AsyncCheckpointSaver() as saver, pytest.raises(CheckpointError, match=message):
        saver.save({}, url)


@pytest.mark.parametrize(
    ("scheme", "package", "install"),
    [
        ("s3", "s3fs", "'asyncckpt[s3]'"),
        ("gs", "gcsfs", "'asyncckpt[gcs]'"),
        ("az", "adlfs", "'asyncckpt[azure]'"),
        ("sftp", "paramiko", "'asyncckpt[sftp]'"),
        ("memory", "fsspec", "fsspec"),
        ("smb", "smbprotocol", "smbprotocol fsspec"),
    ],
)
def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str, install: str) -> None:
    """The error says what to install."""
    find = importlib.util.find_spec
    monkeypatch.setattr(schemes, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(MissingExtraError) as missing:
        CheckpointManager(f"{scheme}://place/run")
    assert str(missing.value) == f"{scheme}:// needs {package}: pip install {install}"


class Disk(LocalFileSystem):  # type: ignore[misc]
    """It renames."""

    protocol = "disk"
    __module__ = "__main__"  # as in a script, or a notebook


class Bare(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """It can't."""

    protocol = "bare"


class Shelf(MemoryFileSystem):  # type: ignore[misc]
    """It has its files in memory."""

    protocol = "shelf"


@pytest.mark.parametrize(("kind", "way"), [(Disk, "rename"), (Bare, "objects"), (Shelf, "memory")])
def test_file_systems_that_are_registered_here(kind: Any, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """By what their class can; where that is a guess the log says so, once. No other process can open them."""
    fsspec.register_implementation(kind.protocol, kind, clobber=True)
    with caplog.at_level(logging.WARNING):
        found = [schemes.scheme_named(kind.protocol) for _ in range(2)]
    assert [scheme.way for scheme in found] == [way, way]
    assert caplog.text.count("is not among the file systems whose ways are known") == (0 if way == "memory" else 1)
    assert not Places().is_shared(f"{kind.protocol}://a/b")


def test_another_class_in_a_known_ones_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has put another class in the place of one that is known: then only this process has that."""
    assert Places().is_shared("sftp://a/b")
    monkeypatch.setitem(_registry, "sftp", Disk)
    assert not Places().is_shared("sftp://a/b")


_LOADED = """
import fsspec, gcsfs
from asyncckpt.storage import schemes
from asyncckpt.storage.places import Places
before = schemes.scheme_named("gs")
assert fsspec.get_filesystem_class("gs") is gcsfs.GCSFileSystem is fsspec.registry["gs"]
assert schemes.scheme_named("gs") is before
assert Places().is_shared("gs://bucket/run")
"""


def test_a_known_class_that_is_loaded() -> None:
    """It changes nothing that this process has loaded the class, whatever that is called in its package."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GCSFS")}
    subprocess.run([sys.executable, "-c", _LOADED], env=environment, check=True, timeout=60)


@pytest.mark.parametrize("make", [lambda options: AsyncCheckpointSaver(storage_options=options), Places])
def test_options_whose_names_are_no_text(make: Callable[[Any], object]) -> None:
    """Refused at once: no writer process, and no client, could take them; the value is not told."""
    with pytest.raises(TypeError, match="the name of an option is a str, not int") as refused:
        make({5: "canary"})
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "is_plain"),
    [
        ({}, True),
        ({"key": "a", "client_kwargs": {"region_name": "x"}, "anon": False, "ports": [1, 2]}, True),
        ({"credential": object()}, False),
        ({"ports": (1, 2)}, False),  # another process would have a list
    ],
)
def test_options_that_another_process_can_be_told(options: dict[str, Any], is_plain: bool) -> None:
    places = Places(options)
    assert places.plain_options == (options if is_plain else {})
    assert places.is_shared("s3://bucket/run") == is_plain
    assert places.is_shared("/local/run")
