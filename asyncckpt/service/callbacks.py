"""The user's callbacks: called on a thread of their own, in order, where no error of theirs harms a save. No torch."""

from __future__ import annotations

from collections.abc import Callable

from asyncckpt.events import Event, EventKind
from asyncckpt.records import CheckpointInfo
from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.queue import Emit
from asyncckpt.threads import ThreadGroup


class Callbacks:
    """Tells `on_success`, `on_failure` and `on_event` what has happened. Thread-safe.

    A callback may know the saver, which must be collectable without `close()`. So those who hold `thread` or `emit`,
    threads among them, do not hold this.
    """

    def __init__(
        self,
        on_success: Callable[[CheckpointInfo], object] | None,
        on_failure: Callable[[SaveHandle, BaseException], object] | None,
        on_event: Callable[[Event], object] | None,
    ) -> None:
        self._on_success, self._on_failure = on_success, on_failure
        self.thread = ThreadGroup("callback", 1)
        self.emit = _emitter(on_event, self.thread)

    def tell_of(self, handle: SaveHandle, info: CheckpointInfo | None, error: BaseException | None) -> None:
        """The save is durable, or has failed."""
        if info is not None:
            self.emit("committed", handle.path, "")
            if (on_success := self._on_success) is not None:
                self.thread.put(lambda: on_success(info))
        elif error is not None:
            self.emit("failed", handle.path, str(error))
            if (on_failure := self._on_failure) is not None:
                self.thread.put(lambda: on_failure(handle, error))

    def check_not_inside(self, name: str) -> None:
        """Raise if this is their thread, which the method `name` would wait for."""
        if self.thread.contains_current_thread():
            raise RuntimeError(f"{name}() inside a callback would wait for itself; hand the work to another thread")


def _emitter(on_event: Callable[[Event], object] | None, thread: ThreadGroup) -> Emit:
    def emit(kind: EventKind, path: str, detail: str) -> None:
        if on_event is not None:
            event = Event(kind, path, detail)
            thread.put(lambda: on_event(event))

    return emit
