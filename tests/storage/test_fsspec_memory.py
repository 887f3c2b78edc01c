"""memory://: the contract, within the one process that has it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import fsspec
import pytest

from storage.conformance import StorageConformance


class TestMemory(StorageConformance):
    storage_class = "asyncckpt.storage.fsspec_memory:MemoryStorage"
    options: Mapping[str, Any] = {"beat_secs": 0.05, "lease_secs": 1.5}
    has_directories = False

    # Nobody else can have these files, and nobody who dies leaves any.
    test_a_dead_holder_is_still_named = None  # type: ignore[assignment]
    test_another_process_has_the_lock = None  # type: ignore[assignment]
    test_another_process_wants_the_lock = None  # type: ignore[assignment]
    test_a_child_does_not_keep_the_lock = None  # type: ignore[assignment]
    test_sweeps_what_a_killed_writer_left = None  # type: ignore[assignment]
    test_never_sweeps_the_living = None  # type: ignore[assignment]
    test_sweeps_only_that_directory = None  # type: ignore[assignment]

    @pytest.fixture
    def place(self) -> str:
        return f"memory://{secrets.token_hex(4)}"

    def put(self, path: str, content: bytes) -> None:
        fsspec.filesystem("memory").pipe_file(path, content)

    def get(self, path: str) -> bytes | None:
        try:
            content: bytes = fsspec.filesystem("memory").cat_file(path)
        except FileNotFoundError:
            return None
        return content

    def list_names(self, directory: str) -> set[str]:
        try:
            return {path.rsplit("/", 1)[1] for path in fsspec.filesystem("memory").ls(directory, detail=False)}
        except FileNotFoundError:
            return set()

    def remove(self, path: str) -> None:
        fsspec.filesystem("memory").rm_file(path)
