"""Waiting for a writer that finishes a dead trainer's checkpoints, where there are locks and where there are claims."""

from __future__ import annotations

import logging
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from storage.s3_server import BUCKET, S3Server
from storage.s3_server import server as s3  # noqa: F401 (a fixture)

from asyncckpt.registry import turns
from asyncckpt.storage.base import Storage
from asyncckpt.storage.fsspec_memory import MemoryStorage
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.s3 import S3Storage

CLAIM_SECS: dict[str, Any] = {"beat_secs": 0.2, "lease_secs": 2.0}
TIMEOUT_SECS = 60.0


@pytest.fixture(params=["local", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    if request.param == "local":
        return LocalStorage(), str(tmp_path)
    if request.param == "memory":
        return MemoryStorage(**CLAIM_SECS), f"memory://{secrets.token_hex(4)}"
    server: S3Server = request.getfixturevalue("s3")
    return S3Storage(server.options, **CLAIM_SECS), f"s3://{BUCKET}/{secrets.token_hex(4)}"


class Reader:
    """Somebody who wants to load, on a thread."""

    def __init__(self, storage: Storage, directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits = threading.Event()
        announce: Callable[[str, str], None] = turns._announce

        def announced(directory: str, holder: str) -> None:
            announce(directory, holder)
            self.waits.set()

        monkeypatch.setattr(turns, "_announce", announced)
        self._thread = threading.Thread(target=turns.await_finishing, args=(storage, directory, TIMEOUT_SECS))
        self._thread.start()

    @property
    def is_waiting(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(TIMEOUT_SECS / 2)
        assert not self.is_waiting


def name_of_the_dead() -> str:
    """As a trainer names itself that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{turns._name(process.pid)}, since yesterday"


@pytest.mark.parametrize("says_so_at_once", [True, False])
def test_who_finishes_is_waited_for(
    place: tuple[Storage, str],
    says_so_at_once: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until he has let go, renewing his claim, if it is one. At first it may still be in the trainer's name."""
    storage, directory = place
    lock = storage.lock(directory, name_of_the_dead())
    if says_so_at_once:
        lock.describe(turns.name_of_finisher())
    with caplog.at_level(logging.WARNING):
        reader = Reader(storage, directory, monkeypatch)
        assert reader.waits.wait(TIMEOUT_SECS)
    assert storage.is_locked(directory)  # he shows that he lives
    assert reader.is_waiting
    lock.describe(turns.name_of_finisher())
    assert storage.is_locked(directory)
    assert reader.is_waiting
    lock.release()
    reader.join()
    assert f"waiting for what still writes to {directory}: " in caplog.text


def test_nobody_else_is(place: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that goes on is no reason to wait; nor is an empty place."""
    storage, directory = place
    turns.await_finishing(storage, f"{directory}/empty", TIMEOUT_SECS)
    lock = turns.take_lock(storage, directory, 0)
    monkeypatch.setattr(storage, "is_locked", None)  # which may block: not asked
    turns.await_finishing(storage, directory, TIMEOUT_SECS)
    lock.release()


def test_the_dead_are_not(place: tuple[Storage, str]) -> None:
    """Whoever said that he finishes, and was killed, is known by his silence."""
    storage, directory = place
    lock = storage.lock(directory, turns.name_of_finisher())
    names = {name: storage.read(f"{directory}/{name}", 1000) for name in storage.list_names(directory)}
    for name, contents in names.items():  # as they are once nobody has them any more
        storage.replace(f"{directory}/copy/{name}", contents)
    lock.release()
    assert storage.holder(f"{directory}/copy") == turns.name_of_finisher()
    turns.await_finishing(storage, f"{directory}/copy", TIMEOUT_SECS)
