"""Questions to a storage that may not answer."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from asyncckpt.storage.bounded import BoundedStorage, NoAnswerError

HANG_SECS = 60.0


@pytest.fixture
def storage() -> Iterator[BoundedStorage]:
    storage = BoundedStorage()
    yield storage
    storage.end(lambda: None)
    assert storage.join(HANG_SECS)


def test_answers_and_errors(storage: BoundedStorage) -> None:
    """Come back as they are, also an error that is itself a time-out."""
    assert storage.ask(lambda: 3, HANG_SECS) == 3
    with pytest.raises(TimeoutError, match="the server's"):
        storage.ask(lambda: (_ for _ in ()).throw(TimeoutError("the server's")), HANG_SECS)


def test_nobody_waits_a_second_time(storage: BoundedStorage) -> None:
    """While a question that was given up has no answer; once it has one, asking is possible again."""
    gate = threading.Event()
    with pytest.raises(NoAnswerError):
        storage.ask(lambda: gate.wait(HANG_SECS), 0.05)
    asked = []
    with pytest.raises(NoAnswerError):  # with all the time in the world: a hang is this test's time-out
        storage.ask(lambda: asked.append(1), 1000 * HANG_SECS)
    assert not asked
    gate.set()
    deadline = time.monotonic() + HANG_SECS
    while True:
        try:
            assert storage.ask(lambda: 4, HANG_SECS) == 4
            break
        except NoAnswerError:
            assert time.monotonic() < deadline


def test_progress_is_an_answer(storage: BoundedStorage) -> None:
    """Reading a large file may take longer than the time-out."""

    def read() -> int:
        for _ in range(10):
            threading.Event().wait(0.1)
            storage.note_progress()
        return 5

    assert storage.ask(read, 0.8) == 5


def test_several_threads_ask(storage: BoundedStorage) -> None:
    """One waits for the other's question to be answered, and does not take it for a hang."""
    gate, begun = threading.Event(), threading.Event()
    asked: list[int] = []
    answers: list[int] = []

    def first() -> int:
        begun.set()
        assert gate.wait(HANG_SECS)
        asked.append(1)
        return 1

    def second() -> int:
        asked.append(2)
        return 2

    threads = [threading.Thread(target=lambda: answers.append(storage.ask(first, HANG_SECS)))]
    threads[0].start()
    assert begun.wait(HANG_SECS)
    threads.append(threading.Thread(target=lambda: answers.append(storage.ask(second, HANG_SECS))))
    threads[1].start()
    gate.set()
    for thread in threads:
        thread.join(HANG_SECS)
    assert asked == [1, 2]
    assert sorted(answers) == [1, 2]  # who goes on first is nobody's business


def test_after_the_end(storage: BoundedStorage) -> None:
    """The last word is said even when it had to wait; nothing is asked any more; ending twice does no harm."""
    said = []
    storage.end(lambda: said.append("last"))
    storage.end(lambda: said.append("again"))
    assert storage.join(HANG_SECS)
    assert said == ["last"]
    with pytest.raises(NoAnswerError):
        storage.ask(lambda: 1, HANG_SECS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_a_forked_child(storage: BoundedStorage) -> None:
    """There is no thread: the caller asks by itself."""
    if (pid := os.fork()) == 0:
        os._exit(storage.ask(lambda: 7, 0.01))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
