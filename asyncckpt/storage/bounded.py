"""Questions to a storage that may never answer, asked by a thread that must not wait for ever. No torch."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from asyncckpt.threads import ThreadGroup

T = TypeVar("T")


class NoAnswerError(Exception):
    """The storage has not answered; the question goes on. Never leaves the package."""


class BoundedStorage:
    """One daemon thread that asks the storage. Thread-safe, also for signal handlers; in a forked child there is none,
    and the caller asks by itself."""

    def __init__(self) -> None:
        self._thread = ThreadGroup("storage", 1)
        self._pid = os.getpid()
        self._stuck_on: _Question[object] | None = None
        self._moved = 0.0
        self._has_ended = False

    def ask(self, question: Callable[[], T], timeout: float) -> T:
        """What `question` returns or raises; `NoAnswerError` when nothing has come of it for `timeout` seconds.

        Does not wait at all while an earlier question that was given up has still no answer.
        """
        if os.getpid() != self._pid:
            return question()
        if self._has_ended or (self._stuck_on is not None and not self._stuck_on.is_answered(0)):
            raise NoAnswerError
        asked: _Question[T] = _Question(question)
        self._moved = time.monotonic()
        self._thread.put(asked.answer)
        while not asked.is_answered(max(0.0, rest := self._moved + timeout - time.monotonic())):
            if rest <= 0:
                self._stuck_on = asked  # type: ignore[assignment]
                raise NoAnswerError
        return asked.outcome()

    def note_progress(self) -> None:
        """The storage has answered a part of the question: the time-out runs anew."""
        self._moved = time.monotonic()

    def end(self, last: Callable[[], object]) -> None:
        """Ask nothing more but `last`, whenever that may be. Does not wait; safe to call twice."""
        if not self._has_ended and os.getpid() == self._pid:
            self._has_ended = True
            self._thread.put(last)
            self._thread.stop()

    def join(self, timeout: float) -> bool:
        """Wait for the thread to end; False on time-out."""
        return self._thread.join(timeout)


class _Question(Generic[T]):
    def __init__(self, question: Callable[[], T]) -> None:
        self._question: Callable[[], T] | None = question
        self._result: T
        self._error: BaseException | None = None
        self._answered = threading.Event()

    def answer(self) -> None:
        assert self._question is not None
        try:
            self._result = self._question()
        except BaseException as error:
            self._error = error
        self._question = None  # it may keep a directory, and so its lock
        self._answered.set()

    def is_answered(self, timeout: float) -> bool:
        return self._answered.wait(timeout)

    def outcome(self) -> T:
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None
        return self._result
