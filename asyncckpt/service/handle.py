"""What `save()` returns: a future with a checkpoint's story attached. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from asyncckpt.records import CheckpointInfo, Timings
from asyncckpt.threads import Latch


class SaveHandle(Future[CheckpointInfo]):
    """A save that was accepted: a `concurrent.futures.Future` of the durable checkpoint's `CheckpointInfo`.

    It is running from the start, so `cancel()` does nothing and nobody's time-out can cancel a save. When it resolves,
    the checkpoint survives power loss. Thread-safe. Callbacks added to it run on the saver's callback thread, never on
    a worker. A save skipped for lack of room is a settled handle with `skipped` true, whose result is None.
    `mirrored` is a second future, of the checkpoint in the manager's mirror, whose result is None if it was not brought
    there, since the mirror's retention would have deleted it at once, or it was saved again. Without a mirror, and
    for a save that never began, it is None itself.
    """

    def __init__(self, path: str, run_callback: Callable[[Callable[[], object]], None]) -> None:
        super().__init__()
        self.path = path
        self.skipped = False
        self.timings = Timings()
        self.looked_at = False
        self.is_submitted = False  # a worker will settle it
        self.mirrored: Future[CheckpointInfo | None] | None = None
        self._submitted = time.perf_counter()
        self._staged = Latch()
        self._over = Latch()
        self._let_pass: Callable[[], None] | None = None
        self._run_callback = run_callback
        self.set_running_or_notify_cancel()

    @property
    def staged(self) -> bool:
        """Whether the snapshot is complete, so that any state may be changed in any way."""
        return self.wait_staged(0)

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Wait until the snapshot is complete; False when `timeout` seconds pass before that.

        True also when the save failed: nothing is read from live state any more then.
        """
        is_staged = self._staged.wait(timeout)
        if is_staged and (let_pass := self._let_pass) is not None:
            let_pass()
        return is_staged

    def result(self, timeout: float | None = None) -> CheckpointInfo:
        """The durable checkpoint. Blocks up to `timeout` seconds; raises what made the save fail, or TimeoutError."""
        try:
            return super().result(timeout)
        finally:
            self.looked_at = self.looked_at or self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What made the save fail, None if it succeeded. Blocks up to `timeout` seconds."""
        try:
            return super().exception(timeout)
        finally:
            self.looked_at = self.looked_at or self.done()

    def failure(self) -> BaseException | None:
        """The error of a settled save, without counting as having looked at it."""
        return super().exception(0)

    def wait_settled(self, timeout: float | None = None) -> bool:
        """Wait until the save has succeeded, failed or been skipped, without raising; False on time-out."""
        try:
            super().exception(timeout)
        except FutureTimeoutError:
            return False
        return True

    def wait_over(self, timeout: float | None = None) -> bool:
        """Wait until the save has settled and what it replaced is deleted; False on time-out."""
        return self._over.wait(timeout)

    def add_done_callback(self, fn: Callable[[Future[CheckpointInfo]], Any]) -> None:
        """Call `fn(handle)` on the callback thread once the save has settled; an error in it is logged."""
        super().add_done_callback(lambda handle: self._run_callback(lambda: fn(handle)))

    def call_at_once(self, fn: Callable[[Future[CheckpointInfo]], Any]) -> None:
        """The mirror's: as `add_done_callback`, but on the thread that settles the save, which `fn` must not hold up.

        What users do in their callbacks does not come before it.
        """
        super().add_done_callback(fn)

    def tell_when_seen(self, let_pass: Callable[[], None]) -> None:
        """The saver's: call this once somebody has been told that the snapshot is complete, and may write."""
        self._let_pass = let_pass

    def mark_staged(self) -> None:
        """The saver's: the snapshot is complete, or given up."""
        self._staged.set()

    def skip(self) -> None:
        """The saver's: this save is not done."""
        self.skipped = True
        self.settle(None, None)
        self.mark_over()

    def mark_over(self) -> None:
        """The saver's: nothing more is done for this save."""
        self._over.set()

    def settle(self, info: CheckpointInfo | None, error: BaseException | None) -> None:
        """The saver's: the save has succeeded, failed, or (with neither) was skipped."""
        self.timings.durable_secs = time.perf_counter() - self._submitted
        self._staged.set()
        self._let_pass = None  # it holds the image
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(info)  # type: ignore[arg-type]
