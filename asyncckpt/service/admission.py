"""Backpressure: how many saves, and how many bytes of images, may be in flight. No torch."""

from __future__ import annotations

import threading
from typing import Literal, get_args

from asyncckpt.errors import QueueFullError
from asyncckpt.threads import Latch

WhenFull = Literal["block", "skip", "raise"]
WHEN_FULL: tuple[str, ...] = get_args(WhenFull)


class Admission:
    """Counts saves in flight against `max_in_flight`, and their bytes against a limit. Thread-safe.

    When there is no room, `when_full` says whether entering blocks, declines, or raises.
    """

    def __init__(self, max_in_flight: int, when_full: WhenFull) -> None:
        self._max_in_flight = max_in_flight
        self._when_full = when_full
        self._places: dict[Place, int] = {}  # bytes reserved
        # No condition: Ctrl-C in its Python code would leave its lock taken, or not taken, for ever.
        self._lock = threading.RLock()
        self._place_left = Latch()  # set, and replaced, when a place is given back

    def enter(self) -> Place | None:
        """Take a place; None when there is none and the save is to be skipped."""
        while True:
            with self._lock:
                if len(self._places) < self._max_in_flight or self._interrupted_own_save():
                    place = Place(self)
                    self._places[place] = 0
                    return place
                num_taken, place_left = len(self._places), self._place_left
            if not self._may_wait(f"{num_taken} saves are in flight (max_in_flight)"):
                return None
            place_left.wait()

    def reserve(self, place: Place, num_bytes: int, limit: int) -> bool:
        """Take memory for an image; False when there is none and the save is to be skipped.

        One image alone is always admitted: whether it fits at all is decided before.
        """
        while True:
            with self._lock:
                taken = self._taken_bytes()
                if not taken or taken + num_bytes <= limit or self._interrupted_own_save(place):
                    self._places[place] = num_bytes
                    return True
                place_left = self._place_left
            if not self._may_wait(f"{taken:,} bytes are in flight, and {num_bytes:,} more would pass memory_limit"):
                return False
            place_left.wait()

    def leave(self, place: Place) -> None:
        with self._lock:
            self._places.pop(place, None)
            self._place_left.set()
            self._place_left = Latch()

    def _taken_bytes(self) -> int:
        return sum(self._places.values())

    def _interrupted_own_save(self, own: Place | None = None) -> bool:
        """Whether this is a signal handler's save inside one of the same thread, which can't go on before it."""
        thread = threading.get_ident()
        return any(place.saving_thread == thread for place in list(self._places) if place is not own)

    def _may_wait(self, reason: str) -> bool:
        if self._when_full == "raise":
            raise QueueFullError(f"{reason}; save less often, raise the limit, or choose when_full='block' or 'skip'")
        return self._when_full == "block"


class Place:
    """One save's place in flight. `saving_thread` is the thread inside `save()`, None once that has returned."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.saving_thread: int | None = threading.get_ident()

    def reserve(self, num_bytes: int, limit: int) -> bool:
        """Take memory for this save's image, as `Admission.reserve`."""
        return self._admission.reserve(self, num_bytes, limit)

    def leave(self) -> None:
        """Give the place, and the memory reserved for it, back. Safe to call twice."""
        self._admission.leave(self)
