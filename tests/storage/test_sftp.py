"""sftp, by a real server: the contract, and what only a connection can do to us."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from storage.conformance import StorageConformance
from storage.sftp_server import SFTPServer


class TestSFTP(StorageConformance):
    storage_class = "asyncckpt.storage.sftp:SFTPStorage"
    sees_who_lives = False
    options: Mapping[str, Any] = {}

    @pytest.fixture(autouse=True)
    def use(self, ssh_server: SFTPServer) -> None:
        self.options = {"options": ssh_server.options, "beat_secs": 0.2, "lease_secs": 1.0}

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return SFTPServer.url(tmp_path)

    def put(self, path: str, content: bytes) -> None:
        _on_disk(path).write_bytes(content)

    def get(self, path: str) -> bytes | None:
        try:
            return _on_disk(path).read_bytes()
        except FileNotFoundError:
            return None

    def list_names(self, directory: str) -> set[str]:
        return set(os.listdir(_on_disk(directory)))

    def remove(self, path: str) -> None:
        _on_disk(path).unlink()


def _on_disk(path: str) -> Path:
    """The server serves this machine's own files."""
    return Path("/" + path.split("/", 3)[3])
