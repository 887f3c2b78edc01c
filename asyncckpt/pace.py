"""How a run saves: what is in flight, what saving has cost, and so whether it is time for the next. No torch."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque

from asyncckpt.overhead import OverheadMeter
from asyncckpt.policies import Progress, SavePolicy
from asyncckpt.records import CheckpointInfo, Timings
from asyncckpt.service.handle import SaveHandle

_NUM_RECENT_SAVES = 5


class Pace:
    """The saves of one manager. Thread-safe.

    `last_step` is where training was when it saved last, or was resumed.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant, since signal handlers may save
        self._in_flight: list[tuple[SaveHandle, CheckpointInfo]] = []
        self._recent: deque[Timings] = deque(maxlen=_NUM_RECENT_SAVES)
        self._overhead = OverheadMeter()
        self.last_step = 0
        self._last_secs = time.monotonic()

    def note_save(self, handle: SaveHandle, info: CheckpointInfo) -> None:
        """A save is under way."""
        with self._lock:
            self.mark(info.global_step or 0)
            self._forget_settled()
            self._in_flight.append((handle, info))
            self._overhead.note_save()

    def mark(self, step: int) -> None:
        """Training is at this step, and what is there is saved."""
        self.last_step, self._last_secs = step, time.monotonic()

    @property
    def in_flight(self) -> list[CheckpointInfo]:
        """What is still being written."""
        with self._lock:
            self._forget_settled()
            return [info for _, info in self._in_flight]

    def should_save(self, policy: SavePolicy, step: int) -> bool:
        """Whether a policy wants a checkpoint after this step; asked after every step."""
        return policy.should_save(self._progress(step))

    def _progress(self, step: int) -> Progress:
        with self._lock:
            self._forget_settled()
            recent = list(self._recent)
            in_flight = [handle.timings for handle, _ in self._in_flight]
            now = time.monotonic()
            self._overhead.note_step(now, is_writing=bool(in_flight))
            slower_secs = self._overhead.slower_secs()
        stalls = [timings.blocked_secs + timings.fence_secs for timings in [*recent, *in_flight]]
        writes = [timings.durable_secs for timings in recent]
        return Progress(
            step=step,
            secs=now,
            last_step=self.last_step,
            last_secs=self._last_secs,
            cost_secs=statistics.median(stalls) + slower_secs if stalls else None,
            write_secs=statistics.median(writes) if writes else None,
        )

    def _forget_settled(self) -> None:
        settled = [handle for handle, _ in self._in_flight if handle.done()]
        self._recent.extend(handle.timings for handle in settled if handle.failure() is None)
        self._in_flight = [pending for pending in self._in_flight if pending[0] not in settled]
