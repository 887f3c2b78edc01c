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


RECORD = b'{"epoch":12,"token":"0123456789abcdef","holder":"process 1 on here","released":true}'
SIGN = b"0123456789abcdef 17"


def contents_of(storage: MemoryStorage, directory: str) -> dict[str, bytes]:
    return {name: storage.read(f"{directory}/{name}", 1 << 20) for name in storage.list_names(directory)}


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        (CLAIM_NAME, b'{"author": "me", "epoch": 3}'),
        (CLAIM_NAME, b'{"epoch":3,"loss":0.5}'),
        (CLAIM_NAME, b"[1]"),
        (CLAIM_NAME, b"12345"),
        (CLAIM_NAME, b"\xff\xfe"),
        (CLAIM_NAME, b"[" * 4000),
        (CLAIM_NAME, b" " * 5000),
        (ALIVE_NAME, b"mine"),
        (ALIVE_NAME, b"12345"),  # somebody's process
        (ALIVE_NAME, SIGN + b"\n"),
        (ALIVE_NAME, b"0" * 5000),
    ],
)
def test_files_of_others_are_left_alone(storage: MemoryStorage, directory: str, name: str, contents: bytes) -> None:
    """Whoever would claim the directory is told which file it is, and changes nothing; reading goes on."""
    storage.replace(f"{directory}/{name}", contents)
    with pytest.raises(RegistryError, match=f"{directory}/{name} can't be used: .*move it away"):
        storage.lock(directory, "me")
    assert contents_of(storage, directory) == {name: contents}
    assert storage.holder(directory) == ""
    assert not storage.is_locked(directory)


@pytest.mark.parametrize("num_zeros", [0, 100])
def test_a_torn_claim_locks_nobody_out(directory: str, num_zeros: int) -> None:
    """Wherever it is cut, and though its sign of life is too."""
    storage = MemoryStorage(beat_secs=0.01, lease_secs=0.02)
    for num_bytes in range(len(RECORD)):
        storage.replace(f"{directory}/{CLAIM_NAME}", RECORD[:num_bytes] + bytes(num_zeros))
        storage.replace(f"{directory}/{ALIVE_NAME}", SIGN[: num_bytes % len(SIGN)] + bytes(num_zeros))
        storage.lock(directory, "me").release()


@pytest.mark.parametrize("sign", [SIGN, b"", bytes(18)])
def test_a_sign_of_life_alone_locks_nobody_out(storage: MemoryStorage, directory: str, sign: bytes) -> None:
    """Somebody has removed the claim, to get in."""
    storage.replace(f"{directory}/{ALIVE_NAME}", sign)
    storage.lock(directory, "me").release()
