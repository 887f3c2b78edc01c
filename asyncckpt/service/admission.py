"""Backpressure: how many saves, and how many bytes of images, may be in flight. No torch."""

from __future__ import annotations

import threading
from typing import Literal, get_args

from asyncckpt.errors import QueueFullError

WhenFull = Literal["block", "skip", "raise"]
WHEN_FULL: tuple[str, ...] = get_args(WhenFull)


class Admission:
    """Counts saves in flight against `max_in_flight`, and their bytes against a limit. Thread-safe.

    When there is no room, `when_full` says whether entering blocks, declines (returns False), or raises.
    """

    def __init__(self, max_in_flight: int, when_full: WhenFull) -> None:
        self._max_in_flight = max_in_flight
        self._when_full = when_full
        self._num_in_flight = 0
        self._bytes_in_flight = 0
        self._changed = threading.Condition()

    def enter(self) -> bool:
        """Take a place; False when there is none and the save is to be skipped."""
        with self._changed:
            while self._num_in_flight >= self._max_in_flight:
                if not self._may_wait(f"{self._num_in_flight} saves are in flight (max_in_flight)"):
                    return False
            self._num_in_flight += 1
            return True

    def reserve(self, num_bytes: int, limit: int) -> bool:
        """Take memory for an image, having a place; False when there is none and the save is to be skipped.

        One image alone is always admitted: whether it fits at all is decided before.
        """
        with self._changed:
            while self._bytes_in_flight and self._bytes_in_flight + num_bytes > limit:
                reason = (
                    f"{self._bytes_in_flight:,} bytes are in flight, and {num_bytes:,} more would pass memory_limit"
                )
                if not self._may_wait(reason):
                    return False
            self._bytes_in_flight += num_bytes
            return True

    def leave(self, num_bytes: int) -> None:
        """Give the place, and the memory reserved for it, back."""
        with self._changed:
            self._num_in_flight -= 1
            self._bytes_in_flight -= num_bytes
            self._changed.notify_all()

    def _may_wait(self, reason: str) -> bool:
        if self._when_full == "raise":
            raise QueueFullError(f"{reason}; save less often, raise the limit, or choose when_full='block' or 'skip'")
        if self._when_full == "skip":
            return False
        self._changed.wait()
        return True
