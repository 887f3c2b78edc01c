"""The saver's own threads: daemon, so that a stuck disk can't hold up exit for ever, and started early, since Python
3.12 starts none at exit. No torch."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger("asyncckpt")


class ThreadGroup:
    """A few threads that run what is put to them, in order of arrival.

    `nice` lowers their priority where the platform has one per thread (Linux), so that training wins the cores.
    """

    def __init__(self, name: str, num_threads: int, *, nice: int = 0) -> None:
        self.num_threads = num_threads
        self._actions: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopped = False
        self._nice = nice
        self._threads = [
            threading.Thread(target=self._run, name=f"asyncckpt-{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, action: Callable[[], object]) -> None:
        """Run `action` on one of the threads; after `stop`, at once. An error that it raises is logged."""
        with self._lock:
            if not self._stopped:
                self._actions.put(action)
                return
        _run_logged(action)

    def contains_current_thread(self) -> bool:
        return threading.current_thread() in self._threads

    def stop(self) -> None:
        """End the threads once they have run what was put before. Does not wait."""
        with self._lock:
            self._stopped = True
            for _ in self._threads:
                self._actions.put(None)

    def drain(self, timeout: float | None) -> bool:
        """Wait until what was put before has run (on a group of one thread); False on time-out."""
        reached = threading.Event()
        self.put(reached.set)
        return reached.wait(timeout)

    def join(self, timeout: float | None) -> bool:
        """Wait for the threads to end; False when `timeout` seconds (for each) were not enough."""
        for thread in self._threads:
            thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        if self._nice:
            _lower_priority(self._nice)
        while True:
            action = self._actions.get()
            if action is None:
                return
            _run_logged(action)
            # An action may hold an image of gigabytes: drop it before waiting for the next one.
            action = None


def _run_logged(action: Callable[[], object]) -> None:
    try:
        action()
    except BaseException:
        logger.exception("error in a background action")


def _lower_priority(nice: int) -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    except (AttributeError, OSError):
        logger.debug("the priority of a writer thread can't be lowered here")
