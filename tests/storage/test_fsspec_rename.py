"""File systems that fsspec opens and that rename: the contract, by fsspec's own way to this machine's files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

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
