"""S3, by a real server: the contract, and what only a network and a store can do to us."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import pytest

from storage.conformance import StorageConformance
from storage.s3_server import BUCKET, S3Server

PART_BYTES = 5 << 20  # the least that S3 takes


class TestS3(StorageConformance):
    storage_class = "asyncckpt.storage.s3:S3Storage"
    has_directories = False
    keeps_what_is_read = False
    shows_what_is_not_committed = False
    sees_who_lives = False
    dead_upload_bytes = PART_BYTES + 1
    options: Mapping[str, Any] = {}

    @pytest.fixture(autouse=True)
    def use(self, server: S3Server) -> None:
        self.options = {
            "options": server.options,
            "least_part_bytes": PART_BYTES,
            "beat_secs": 0.2,
            "lease_secs": 3.0,
        }
        self.client = server.client()

    @pytest.fixture
    def place(self) -> str:
        return f"s3://{BUCKET}/{secrets.token_hex(4)}"

    def put(self, path: str, content: bytes) -> None:
        self.client.pipe_file(path, content)

    def get(self, path: str) -> bytes | None:
        try:
            content: bytes = self.client.cat_file(path)
        except FileNotFoundError:
            return None
        return content

    def list_names(self, directory: str) -> set[str]:
        try:
            return {path.rsplit("/", 1)[1] for path in self.client.ls(directory, detail=False)}
        except FileNotFoundError:
            return set()

    def remove(self, path: str) -> None:
        self.client.rm_file(path)
