"""The account of a saver's saves: what is in flight, and which failures nobody has seen yet. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable

from asyncckpt.errors import CheckpointWriteError, SaverClosedError
from asyncckpt.records import CheckpointInfo
from asyncckpt.service.handle import SaveHandle


class Ledger:
    """Lets saves in until it is closed, and is told when they are over. Thread-safe.

    `lock` guards it; whatever must not change while a save is being submitted is changed under it too.
    """

    def __init__(self, max_consecutive_failures: int) -> None:
        self.lock = threading.RLock()  # reentrant, since signal handlers may save
        self._max_consecutive_failures = max_consecutive_failures
        self._in_flight: dict[SaveHandle, None] = {}
        self._when_idle: list[Callable[[], object]] = []
        self._unseen_failures: list[SaveHandle] = []
        self._num_consecutive_failures = 0
        self._is_closed = False

    # --- letting in ---

    def close(self) -> None:
        """Let nothing more in."""
        with self.lock:
            self._is_closed = True

    def check_open(self) -> None:
        """Raise `SaverClosedError` once it is closed."""
        with self.lock:
            if self._is_closed:
                raise SaverClosedError("this saver is closed; make another one")

    def enter(self, handle: SaveHandle, submit: Callable[[], object]) -> bool:
        """Count it as in flight and `submit` it, in one act: who has closed sees all that was let in. False if closed.

        After Ctrl-C in here it is still to be withdrawn if it was not submitted.
        """
        with self.lock:
            if self._is_closed:
                return False
            self._in_flight[handle] = None
            submit()
        return True

    def withdraw(self, handle: SaveHandle) -> None:
        """It was not submitted after all."""
        with self.lock:
            self._in_flight.pop(handle, None)

    # --- in flight ---

    def submitted(self) -> list[SaveHandle]:
        """What is in flight, but for what an interrupted thread has still to submit: who waits would wait for ever."""
        with self.lock:
            return [handle for handle in self._in_flight if handle.is_submitted]

    def finish(self, handle: SaveHandle) -> None:
        """Nothing is left to be done for it."""
        with self.lock:
            handle.mark_over()
            self._in_flight.pop(handle, None)
            when_idle: list[Callable[[], object]] = []
            if not self.submitted():
                when_idle, self._when_idle = self._when_idle, []
        for action in when_idle:
            action()

    def call_when_idle(self, action: Callable[[], object]) -> bool:
        """Call `action` once nothing is in flight any more, at once if that is so: then True."""
        with self.lock:
            if self.submitted():
                self._when_idle.append(action)
                return False
        action()
        return True

    # --- failures ---

    def settle(self, handle: SaveHandle, info: CheckpointInfo | None, error: BaseException | None) -> None:
        """It is durable, or has failed."""
        with self.lock:
            self._unseen_failures = [failed for failed in self._unseen_failures if not failed.looked_at]
            if error is None:
                self._num_consecutive_failures = 0
            else:
                self._num_consecutive_failures += 1
                self._unseen_failures.append(handle)
            handle.settle(info, error)

    def check_failures(self) -> None:
        """Raise `CheckpointWriteError` after too many failures in a row."""
        with self.lock:
            if self._num_consecutive_failures >= self._max_consecutive_failures:
                # One more is let through next time: the cause may be gone by then.
                self._num_consecutive_failures = self._max_consecutive_failures - 1
                last = self._unseen_failures[-1] if self._unseen_failures else None
                raise CheckpointWriteError(
                    f"the last {self._max_consecutive_failures} saves failed, so training goes on without checkpoints"
                    + (f"; the last: {last.failure()}" if last is not None else "")
                )

    def raise_unseen(self) -> None:
        """Raise the failures that nobody has looked at; nobody is told of them twice."""
        with self.lock:
            unseen = [handle for handle in self._unseen_failures if not handle.looked_at]
            self._unseen_failures.clear()
        errors = [error for handle in unseen if (error := handle.exception()) is not None]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise CheckpointWriteError(
                f"{len(errors)} saves failed; the first: {errors[0]}", failures=errors
            ) from errors[0]
