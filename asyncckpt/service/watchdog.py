"""The watchdog: tells of storage operations that do not return. No torch.

A thread that waits in the kernel for a dead disk or server can't be told to give up; it can only be noticed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from asyncckpt.records import Timings
from asyncckpt.threads import log_quietly

_UPDATE_SECS = 1.0  # how stale `Timings.stalled_secs` may be during a stall

Report = Callable[[str, str], None]


class Watchdog:
    """Reports, by path and one line, each save's operations that take longer than `timeout_secs`. Thread-safe.

    One thread, which sleeps until the oldest operation's time is up. After `stop` it ends once nothing is watched and
    `is_busy` says that nothing more will be.
    """

    def __init__(self, timeout_secs: float, report: Report, is_busy: Callable[[], bool]) -> None:
        self._timeout_secs = timeout_secs
        self._report = report
        self._is_busy = is_busy
        self._changed = threading.Condition()
        self._watches: set[Watch] = set()
        self._running: dict[_Operation, None] = {}  # in the order of their beginnings, so of their deadlines
        self._stalled: dict[_Operation, None] = {}
        self._sleeps_on = True  # whether it must be woken for a new operation
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="asyncckpt-watchdog", daemon=True)
        self._thread.start()

    def watch(self, path: str, timings: Timings) -> Watch:
        """Begin to watch the operations of one save; `with` ends it."""
        watch = Watch(self, path, timings)
        with self._changed:
            self._watches.add(watch)
        return watch

    def stop(self) -> None:
        """End the thread when it has no more to do. Does not wait."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def join(self, timeout: float | None) -> bool:
        """Wait for the thread to end; False on time-out."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def begin(self, operation: _Operation) -> None:
        with self._changed:
            operation.deadline = time.monotonic() + self._timeout_secs
            self._running[operation] = None
            if self._sleeps_on:
                self._changed.notify()

    def end(self, operation: _Operation) -> None:
        watch = operation.watch
        with self._changed:
            if operation in self._running:
                del self._running[operation]
                return
            del self._stalled[operation]
            self._update(watch)
            if any(other.watch is watch for other in self._stalled):
                return
            watch.earlier_secs = watch.timings.stalled_secs
        secs = time.monotonic() - operation.deadline + self._timeout_secs
        log_quietly(logging.WARNING, f"{watch.path}: {operation.name} has returned, after {secs:.3g} s")

    def end_watch(self, watch: Watch) -> None:
        with self._changed:
            self._watches.discard(watch)
            if self._stopped:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                found = self._find_stalled()
                if not found:
                    if self._stopped and not self._watches and not self._is_busy():
                        return
                    self._sleep()
            for operation in found:  # not under the lock: a log handler may take its time
                line = f"{operation.name} has not returned for {self._timeout_secs:g} s"
                log_quietly(logging.WARNING, f"{operation.watch.path}: {line}: the storage hangs, training goes on")
                self._report(operation.watch.path, line)

    def _find_stalled(self) -> list[_Operation]:
        """Those whose time is up; of several of one save (its pieces are written side by side) the first."""
        now = time.monotonic()
        stalled_before = {operation.watch for operation in self._stalled}
        found: dict[Watch, _Operation] = {}
        for operation in list(self._running):
            if operation.deadline > now:
                break
            del self._running[operation]
            self._stalled[operation] = None
            if operation.watch not in stalled_before and operation.watch not in found:
                found[operation.watch] = operation
                operation.watch.stalled_since = operation.deadline
        for watch in {operation.watch for operation in self._stalled}:
            self._update(watch)
        return list(found.values())

    def _update(self, watch: Watch) -> None:
        watch.timings.stalled_secs = watch.earlier_secs + time.monotonic() - watch.stalled_since

    def _sleep(self) -> None:
        oldest = next(iter(self._running), None)
        secs = None if oldest is None else oldest.deadline - time.monotonic()
        if self._stalled:
            secs = _UPDATE_SECS if secs is None else min(secs, _UPDATE_SECS)
        self._sleeps_on = secs is None
        self._changed.wait(secs if secs is None else max(0.0, secs))
        self._sleeps_on = False


class Watch:
    """The watchdog's eye on one save."""

    def __init__(self, watchdog: Watchdog, path: str, timings: Timings) -> None:
        self.path = path
        self.timings = timings
        self.stalled_since = 0.0
        self.earlier_secs = 0.0  # in stalls that are over
        self._watchdog = watchdog

    def during(self, name: str) -> _Operation:
        """A block of one storage operation, `name` being what people are told of it."""
        return _Operation(self._watchdog, self, name)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watchdog.end_watch(self)


class _Operation:
    def __init__(self, watchdog: Watchdog, watch: Watch, name: str) -> None:
        self.watch = watch
        self.name = name
        self.deadline = 0.0
        self._watchdog = watchdog

    def __enter__(self) -> None:
        self._watchdog.begin(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watchdog.end(self)
