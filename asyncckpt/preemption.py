"""Preemption: a signal says that the job will be ended soon; what is saved until then survives."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, Protocol

from asyncckpt.distributed.ranks import Ranks
from asyncckpt.threads import log_quietly


class SavesInProcess(Protocol):
    """What the guard needs of a `CheckpointManager` or an `AsyncCheckpointSaver`."""

    def use_writer_process(self) -> bool:
        """From now on let a writer process write; False where there is none."""
        ...

    def leave_to_writer(self) -> None:
        """What is in flight is the writer process's now: nothing here waits for it any more."""
        ...


class PreemptionGuard:
    """Notices that the job is to be ended, and tells the training loop, which saves and stops.

    Constructing it, on the main thread, installs handlers for the signals and starts the writer process (unless the
    saver was made with `writer="thread"`), so that what is staged survives the end of this process. The first signal
    makes `should_stop` true; from then on `remaining_secs` counts down from `grace_secs`. When the time is up, or at a
    second signal, whatever is staged is left to the writer process: `wait()` raises `WaitTimeoutError`, and neither
    `close()` nor the interpreter's exit waits for it any more. The second signal also raises SystemExit on the main
    thread. Handlers that were there before run too, after ours. Forked children get those handlers back.

        with asyncckpt.PreemptionGuard(manager, grace_secs=30) as guard:
            for step in range(first, last):
                train_one_step()
                if guard.should_stop:
                    manager.save(model, optimizer, epoch, step)
                    manager.wait(timeout=guard.remaining_secs)
                    break

    Args:
        saver: the manager (or saver) whose saves are to survive.
        signals: those that announce the end; what they did by default, they no longer do.
        grace_secs: how long the scheduler waits between the signal and SIGKILL.

    Raises ValueError when it is not constructed on the main thread.
    """

    def __init__(
        self, saver: SavesInProcess, signals: Sequence[signal.Signals] = (signal.SIGTERM,), *, grace_secs: float = 30.0
    ) -> None:
        if not grace_secs > 0:
            raise ValueError(f"grace_secs must be above 0, not {grace_secs!r}")
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("a PreemptionGuard must be made on the main thread: only that one may handle signals")
        self._saver = saver
        self._grace_secs = grace_secs
        self._deadline: float | None = None
        # Not an Event: a signal handler that interrupts another one in the middle of `set` would wait for ever.
        self._wake: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        saver.use_writer_process()
        self._watcher = threading.Thread(target=self._watch, name="asyncckpt-preemption", daemon=True)
        self._watcher.start()
        self._before: dict[signal.Signals, Any] = {}
        for number in signals:
            try:
                self._before[number] = signal.signal(number, self._handle)
            except (OSError, ValueError) as error:
                self.close()
                raise ValueError(f"{number!r} is no signal that a program can handle") from error
        _guards.add(self)

    @property
    def should_stop(self) -> bool:
        """Whether a signal has come. In a distributed run, whether one has come on any rank: every rank asks after the
        same step, and all get the same answer; that takes a small message each time.
        """
        return Ranks().any(self._deadline is not None)

    @property
    def remaining_secs(self) -> float | None:
        """What is left of the grace period on this rank, in seconds, at least 0; None before any signal."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def close(self) -> None:
        """Put the earlier handlers back, where nobody has installed others since. Safe to call twice.

        The grace period of a signal that has come goes on: the job is being ended all the same.
        """
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
        if self._deadline is None:
            self._wake.put(None)
            self._watcher.join()

    def __enter__(self) -> PreemptionGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_second = self._deadline is not None
        if not is_second:
            self._deadline = time.monotonic() + self._grace_secs
            self._wake.put(self._deadline)
        earlier: Callable[[int, FrameType | None], object] | Any = self._before.get(signal.Signals(number))
        if callable(earlier):
            earlier(number, frame)
        if is_second:
            self._wake.put(None)
            self._saver.leave_to_writer()
            raise SystemExit(128 + number)

    def _watch(self) -> None:
        deadline = self._wake.get()
        if deadline is None:
            return
        log_quietly(logging.WARNING, f"this job is to be ended: {self._grace_secs:g} s are left to save what there is")
        try:
            self._wake.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self._saver.leave_to_writer()

    def _restore_in_child(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}


_guards: weakref.WeakSet[PreemptionGuard] = weakref.WeakSet()


def _restore_in_child() -> None:
    """A DataLoader worker must end at SIGTERM."""
    for guard in list(_guards):
        guard._restore_in_child()


os.register_at_fork(after_in_child=_restore_in_child)
