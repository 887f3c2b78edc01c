"""What saving costs training, measured while it runs. Pure: time comes in as an argument. No torch."""

from __future__ import annotations

import statistics
from collections import deque

_NUM_STEPS = 64
_NUM_SAVES = 5


class OverheadMeter:
    """Tells the stall of saves, and how much slower steps are while a checkpoint is being written. Not thread-safe."""

    def __init__(self) -> None:
        self._quiet_steps: deque[float] = deque(maxlen=_NUM_STEPS)
        self._slow_steps: list[float] = []  # of the write that is under way
        self._lost: deque[float] = deque(maxlen=_NUM_SAVES)
        self._last_secs: float | None = None
        self._was_writing = False
        self._has_saved = False

    def note_save(self) -> None:
        """A save was made: the step around it is no measure, since people validate there too."""
        self._has_saved = True

    def note_step(self, secs: float, *, is_writing: bool) -> None:
        """A step ended at `secs`; `is_writing`: a checkpoint is being written from now on."""
        if self._last_secs is not None and not self._has_saved:
            (self._slow_steps if self._was_writing else self._quiet_steps).append(secs - self._last_secs)
        if self._was_writing and not is_writing:
            self._close_window()
        self._last_secs, self._was_writing, self._has_saved = secs, is_writing, False

    def slower_secs(self) -> float:
        """What one write costs training by slower steps: medians, so that a pause here or there does not count."""
        return statistics.median(self._lost) if self._lost else 0.0

    def _close_window(self) -> None:
        if self._slow_steps and self._quiet_steps:
            slower = statistics.median(self._slow_steps) - statistics.median(self._quiet_steps)
            self._lost.append(max(0.0, len(self._slow_steps) * slower))
        self._slow_steps.clear()
