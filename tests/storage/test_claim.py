"""Claims: what happens while somebody waits to see whether a holder lives."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import pytest

from asyncckpt.errors import RegistryError
from asyncckpt.naming import ALIVE_NAME, CLAIM_NAME
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


@pytest.mark.parametrize("name", [CLAIM_NAME, ALIVE_NAME])
@pytest.mark.parametrize("contents", [b"mine", b"{}", 5000 * b"0"], ids=["text", "JSON", "large"])
def test_a_file_of_others_is_not_taken_for_a_claim(
    storage: MemoryStorage, directory: str, name: str, contents: bytes
) -> None:
    """Nothing is written, and the error names it."""
    path = f"{directory}/{name}"
    storage.replace(path, contents)
    with pytest.raises(RegistryError, match=f"^{path} can't be used: it was not written by asyncckpt; .* move it away"):
        storage.lock(directory, "us")
    assert storage.list_names(directory) == [name]
    assert storage.read(path, len(contents)) == contents


def test_what_dead_writers_of_ours_left_is_taken_over(storage: MemoryStorage, directory: str) -> None:
    """A beat, or what a look at the store's conditions has left in its place."""
    for contents in (b"0123456789abcdef 12", b""):
        storage.replace(f"{directory}/{ALIVE_NAME}", contents)
        storage.lock(directory, "us").release()
