"""Claims: what happens while somebody waits to see whether a holder lives."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import pytest

from asyncckpt.storage import claim
from asyncckpt.storage.base import Lock
from asyncckpt.storage.fsspec_memory import MemoryStorage


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage(beat_secs=0.2, lease_secs=2.0)


@pytest.fixture
def directory() -> str:
    return f"memory://{secrets.token_hex(4)}"


@pytest.fixture
def first(storage: MemoryStorage, directory: str) -> Iterator[Lock]:
    lock = storage.lock(directory, "the first")
    yield lock
    lock.release()


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Sets what is done by others until a holder has shown that he lives."""

    def arrange(action: Callable[[], object]) -> None:
        def is_claimed(*_: object, **__: object) -> bool:
            action()
            return True

        monkeypatch.setattr(claim, "is_claimed", is_claimed)

    return arrange


def test_who_is_refused_hears_what_the_holder_says_by_now(
    storage: MemoryStorage, directory: str, first: Lock, meanwhile: Callable[[Callable[[], object]], None]
) -> None:
    """As that it only finishes what a dead trainer left, which is worth waiting for."""
    meanwhile(lambda: first.describe("finishing"))
    with pytest.raises(BlockingIOError) as refused:
        storage.lock(directory, "the second")
    assert refused.value.strerror == "finishing"


def test_what_was_let_go_meanwhile_can_be_had(
    storage: MemoryStorage, directory: str, first: Lock, meanwhile: Callable[[Callable[[], object]], None]
) -> None:
    meanwhile(first.release)
    second = storage.lock(directory, "the second")
    assert storage.holder(directory) == "the second"
    second.release()
