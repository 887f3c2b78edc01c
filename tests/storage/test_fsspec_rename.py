"""File systems that fsspec opens and that rename: the contract, by fsspec's own way to this machine's files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_storage_options

from asyncckpt.storage.fsspec_rename import RenameStorage
from storage.conformance import StorageConformance, put_by_upload


class TestRename(StorageConformance):
    storage_class = "asyncckpt.storage.fsspec_rename:RenameStorage"
    options: Mapping[str, Any] = {"beat_secs": 0.2, "lease_secs": 3.0}
    keeps_what_is_read = False
    sees_who_lives = False

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}"

    def put(self, path: str, content: bytes) -> None:
        on_disk(path).write_bytes(content)

    def get(self, path: str) -> bytes | None:
        try:
            return on_disk(path).read_bytes()
        except FileNotFoundError:
            return None

    def list_names(self, directory: str) -> set[str]:
        return set(os.listdir(on_disk(directory)))

    def remove(self, path: str) -> None:
        on_disk(path).unlink()


def on_disk(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def test_where_a_rename_does_not_replace(tmp_path: Path) -> None:
    """A new file can be written; one that is there stays as it is; and no registry is begun."""
    storage = RenameStorage(replaces=False)
    path = f"file://{tmp_path}/file"
    put_by_upload(storage, path, b"1")
    with pytest.raises(FileExistsError, match="save to another path"):
        storage.replace(path, b"2")
    assert (tmp_path / "file").read_bytes() == b"1"
    with pytest.raises(OSError, match="as a registry needs it"):
        storage.lock(f"file://{tmp_path}", "me")
    assert os.listdir(tmp_path) == ["file"]


class Expanding(LocalFileSystem):  # type: ignore[misc]
    """Its mv is fsspec's own, which takes names for patterns; `mv_file`, where there is one, does not."""

    protocol = "expanding"
    mv = fsspec.AbstractFileSystem.mv


class Moving(Expanding):
    protocol = "moving"

    def mv_file(self, path1: str, path2: str) -> None:
        os.rename(path1, path2)


@pytest.mark.parametrize("name", ["a*b", "a[1]", "a?b", "[!a]", "**"])
def test_names_that_are_patterns(tmp_path: Path, name: str) -> None:
    """A file has its name as it is; what moves another in its place, or none, acknowledges nothing."""
    for kind in (Expanding, Moving):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
    storage = RenameStorage()
    for kind, is_moved in ((Moving, True), (Expanding, False)):
        directory = tmp_path / kind.protocol / name
        directory.mkdir(parents=True)
        (directory / name).write_bytes(b"old")
        path = f"{kind.protocol}://{directory}/{name}"
        with nullcontext() if is_moved else pytest.raises(OSError, match="Errno"):
            storage.replace(path, b"new")
        assert os.listdir(directory) == [name]
        assert (directory / name).read_bytes() == (b"new" if is_moved else b"old")


class Cutting(LocalFileSystem):  # type: ignore[misc]
    """It reads URLs as smb, hdfs and webhdfs do."""

    protocol = "cutting"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        place: str = infer_storage_options(path)["path"]
        return place


@pytest.mark.parametrize("name", ["a?b", "a#", "a\tb"])
def test_names_that_would_be_cut_off(tmp_path: Path, name: str) -> None:
    """Are refused: what is named by the rest is another file."""
    fsspec.register_implementation(Cutting.protocol, Cutting, clobber=True)
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="takes no such name"):
        RenameStorage().replace(f"cutting://server{tmp_path}/{name}", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
