"""Our own threads: daemon, so that a stuck disk can't hold up exit for ever, and started early, since Python 3.12
starts none at exit. No torch."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable

from asyncckpt.naming import printable

logger = logging.getLogger("asyncckpt")


class ThreadGroup:
    """A few threads that run what is put to them, in order of arrival. `at_start` runs first on each."""

    def __init__(self, name: str, num_threads: int, at_start: Callable[[], None] | None = None) -> None:
        self.num_threads = num_threads
        self._actions: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # signal handlers may save in the middle of a save
        self._stopped = False
        self._at_start = at_start
        self._threads = [
            threading.Thread(target=self._run, name=f"asyncckpt-{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no memory for one more: the others must not wait for ever
            self.stop()
            raise

    def put(self, action: Callable[[], object]) -> None:
        """Run `action` on one of the threads; after `stop`, at once. An error that it raises is logged."""
        with self._lock:
            if not self._stopped:
                self._actions.put(action)
                return
        _run_logged(action)

    def run_on_all(self, action: Callable[[], object], num_threads: int | None = None) -> None:
        """Run `action` on that many of the threads (all of them) at once, and wait; raises the first error.

        Also an interrupt (Ctrl-C, a signal handler that raises) is only raised when all have finished: what they work
        on must not be given away before.
        """
        count = min(num_threads or self.num_threads, self.num_threads)
        tickets = list(range(count))
        remaining = count
        lock = threading.Lock()
        done = Latch()
        errors: list[BaseException] = []

        def run() -> None:
            nonlocal remaining
            try:
                tickets.pop()
            except IndexError:
                return  # put once too often, by a loop that was interrupted
            try:
                action()
            except BaseException as error:
                errors.append(error)
            with lock:
                remaining -= 1
                if remaining == 0:
                    done.set()

        num_put = 0
        interrupt: BaseException | None = None
        while not done.is_set():
            try:
                while num_put < count:
                    self.put(run)
                    num_put += 1
                done.wait()
            except BaseException as caught:
                interrupt = caught
        try:
            if interrupt is not None:
                raise interrupt
            if errors:
                raise errors[0]
        finally:  # else this frame and the error's traceback would keep each other, and the image, until a collection
            interrupt = None
            errors.clear()

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
        """Wait for the threads to end; False when `timeout` seconds were not enough."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        if self._at_start is not None:
            _run_logged(self._at_start)
        while True:
            action = self._actions.get()
            if action is None:
                return
            _run_logged(action)
            # An action may hold an image of gigabytes: drop it before waiting for the next one.
            action = None


class Latch:
    """Closed until `set`, open for good then: as `threading.Event`, but one that Ctrl-C can't leave locked.

    An interrupt in the middle of `Event.set` keeps the event's own lock taken, and the next `set` waits for ever.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        with contextlib.suppress(RuntimeError):  # it is open already
            self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is open; False when `timeout` seconds pass before that."""
        if not self._is_set and self._lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            self.set()  # for the next who waits
        return self._is_set


def _run_logged(action: Callable[[], object]) -> None:
    try:
        action()
    except BaseException:
        logger.exception("error in a background action")


def log_quietly(level: int, message: str) -> None:
    """Log one line, whatever the user's logging handlers do: what comes after must happen.

    Names of files and keys come from anywhere: they can't break the line, or reach a terminal as control sequences.
    """
    with contextlib.suppress(Exception):
        logger.log(level, "%s", printable(message))


def once(action: Callable[[], object]) -> Callable[[], None]:
    """`action` for the first call only: whoever can't know whether an interrupt came before a put may put it again."""
    tickets = [None]

    def run() -> None:
        try:
            tickets.pop()
        except IndexError:
            return
        action()

    return run


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lower_priority(nice: int) -> None:
    """Let everybody else have the cores first, where a thread has a priority of its own (Linux).

    By so many steps from where the thread is, which the user may have moved: a nice trainer's writer is nicer still.
    """
    try:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)
    except (AttributeError, OSError):
        logger.debug("the priority of a writer thread can't be lowered here")
