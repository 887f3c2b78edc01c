"""The saver: takes live state, returns at once, and makes it durable in the background."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

import torch

from asyncckpt.errors import CheckpointWriteError, SaverClosedError, WaitTimeoutError
from asyncckpt.events import Event, EventKind
from asyncckpt.image.load import local_path
from asyncckpt.image.plan import Plan, find_unsafe, plan_state
from asyncckpt.image.snapshot import SNAPSHOT_MODES, Snapshot, SnapshotMode, Snapshotter
from asyncckpt.image.staging import copy_threads
from asyncckpt.image.streaming import window_bytes
from asyncckpt.records import CheckpointInfo
from asyncckpt.service import exit
from asyncckpt.service.admission import WHEN_FULL, Admission, Place, WhenFull
from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.memory import default_memory_limit
from asyncckpt.service.queue import Emit, SaveQueue
from asyncckpt.storage.local import LocalStorage
from asyncckpt.threads import ThreadGroup, log_quietly
from asyncckpt.version import __version__

logger = logging.getLogger("asyncckpt")

_MAX_CALLBACK_SECS = 30.0  # at exit

_LARGE_ARRAYS_BYTES = 16 << 20


class AsyncCheckpointSaver:
    """Saves nested state of any shape to explicit paths, in the background. All methods are thread-safe.

    Args:
        num_workers: how many checkpoints may be written at the same time. Commits in one directory keep their order.
        snapshot: "copy" stages everything before `save` returns; "overlap" stages what only `optimizer.step` writes in
            the background, and holds the next step until that is done.
        max_in_flight: how many saves may be under way, each with an image of the state in memory.
        when_full: what `save` does when there is no room: "block", "skip" (the handle is settled and `skipped`), or
            "raise" (`QueueFullError`).
        memory_limit: bytes that images may take together; None means 0.6 of what the machine and its control groups
            leave available at the first save. A larger state is written in pieces while the caller waits.
        on_success, on_failure, on_event: called on a thread of their own with the `CheckpointInfo`, with the handle and
            its error, with each `Event`. An error in a callback is logged and harms nothing.
        retries: how often a write that failed in a way that may pass is tried anew, from a new file.
        verify_after_save: read each file back and check it before it is committed.
        max_consecutive_failures: after so many failed saves in a row, `save` itself raises (once; the next one tries
            again, and raises again if that fails too).
        nice: how far below the trainer the writing threads' priority is (0 to 19, Linux only). The default lets
            training have the cores; 0 writes faster while they are busy.
        exit_timeout_secs: how long the interpreter's exit may be held up for what is still in flight.
        exit_code: the process's exit code if that fails while it would have been 0; None leaves it alone.
    """

    def __init__(
        self,
        num_workers: int = 1,
        *,
        snapshot: SnapshotMode = "copy",
        max_in_flight: int = 2,
        when_full: WhenFull = "block",
        memory_limit: int | None = None,
        on_success: Callable[[CheckpointInfo], object] | None = None,
        on_failure: Callable[[SaveHandle, BaseException], object] | None = None,
        on_event: Callable[[Event], object] | None = None,
        retries: int = 2,
        verify_after_save: bool = False,
        max_consecutive_failures: int = 3,
        nice: int = 10,
        exit_timeout_secs: float = 600.0,
        exit_code: int | None = 74,
    ) -> None:
        _check_choice("snapshot", snapshot, SNAPSHOT_MODES)
        _check_choice("when_full", when_full, WHEN_FULL)
        _check_at_least("num_workers", num_workers, 1)
        _check_at_least("max_in_flight", max_in_flight, 1)
        _check_at_least("retries", retries, 0)
        _check_at_least("max_consecutive_failures", max_consecutive_failures, 1)
        _check_at_least("nice", nice, 0)
        if memory_limit is not None:
            _check_at_least("memory_limit", memory_limit, 1)
        if exit_timeout_secs < 0:
            raise ValueError(f"exit_timeout_secs must be at least 0, not {exit_timeout_secs}")
        self.exit_code = exit_code
        self._memory_limit = memory_limit
        self._on_success, self._on_failure = on_success, on_failure
        self._callbacks = ThreadGroup("callback", 1)
        self._emit = _emitter(on_event, self._callbacks)
        self._max_consecutive_failures = max_consecutive_failures
        self._exit_timeout_secs = exit_timeout_secs
        self._exit_deadline: float | None = None

        self._lock = threading.RLock()  # guards what follows; reentrant, since signal handlers may save
        self._unsettled: dict[SaveHandle, None] = {}
        self._unseen_failures: list[SaveHandle] = []
        self._num_consecutive_failures = 0
        self._closed = False
        self._pid = os.getpid()

        self._admission = Admission(max_in_flight, when_full)
        self._queue = SaveQueue(
            LocalStorage(),
            num_workers,
            nice=nice,
            retries=retries,
            verify_after_save=verify_after_save,
            emit=self._emit,
        )
        self._stagers = ThreadGroup("staging", 1)  # training may be waiting for these two: full priority
        self._copiers = copy_threads()
        self._snapshots = Snapshotter(snapshot, max_in_flight, self._stagers, self._copiers)
        self._thread_groups = (*self._queue.thread_groups, self._stagers, self._copiers, self._callbacks)
        self._finalizer = weakref.finalize(self, _abandon, self._thread_groups, self._snapshots, self._pid)
        self._finalizer.atexit = False
        exit.register(self)

    def save(
        self,
        checkpoint: object,
        filepath: str | os.PathLike[str],
        *,
        optimizers: Sequence[Any] = (),
        modules: Sequence[torch.nn.Module] = (),
        metadata: Mapping[str, object] | None = None,
    ) -> SaveHandle:
        """Snapshot `checkpoint` and write it to `filepath` in the background.

        Blocks for one memory copy of the state (for milliseconds with `snapshot="overlap"`), and before that until
        there is room in flight. On return nothing that the caller may do to `checkpoint` changes what is written; in
        overlap mode that holds for everything but the tensors that `optimizers` update, which `optimizer.step` (and
        `load_state_dict` of the optimizers and `modules`) waits for by itself, and any other writer must wait for by
        `handle.wait_staged()`. Nothing is durable on return: `handle.result()` or `wait()` say when.

        Args:
            checkpoint: what torch.save takes: tensors on any device, containers, any picklable object.
            filepath: a local path. Missing directories are made. What is there is replaced in one act; a symbolic link
                is replaced by the file.
            optimizers: whose parameters and state may be staged late ("overlap" only).
            modules: the models that they train, so that `load_state_dict` waits too, and what writes weights in forward
                is noticed.
            metadata: plain data to store in the file as JSON.

        Raises:
            UnsupportedStateError: something in `checkpoint` can't be saved; the message names its path.
            TornSnapshotError: a tensor was written to by another thread meanwhile.
            QueueFullError: there is no room, and `when_full="raise"`.
            CheckpointWriteError: the last `max_consecutive_failures` saves failed.
            SaverClosedError: the saver is closed, or belongs to another process.
        """
        started = time.perf_counter()
        path = local_path(filepath)
        self._check_usable()
        handle = SaveHandle(path, self._callbacks.put)
        place: Place | None = None
        snapshot: Snapshot | None = None
        try:
            place = self._admission.enter()
            if place is None:
                return self._skip(handle)
            planned = time.perf_counter()
            plan = plan_state(checkpoint, self._describe(path, metadata))
            handle.timings.plan_secs = time.perf_counter() - planned
            handle.timings.num_bytes = plan.layout.num_bytes
            _warn_of_arrays(plan)
            _warn_of_unsafe(checkpoint, plan)
            limit = self._limit()
            streaming = plan.layout.num_bytes > limit
            if streaming:
                _warn_of_streaming(plan, limit)
            window = window_bytes(limit) if streaming else plan.layout.num_bytes
            if not place.reserve(window, limit):
                place.leave()
                return self._skip(handle)
            if streaming:
                snapshot = self._snapshots.stream(plan, window)
            else:
                snapshot = self._snapshots.take(plan, optimizers, modules, handle.timings, lambda: self._staged(handle))
            handle.tell_when_seen(snapshot.let_pass)
            self._submit(handle, snapshot, place)
        except BaseException:
            if not handle.is_submitted:
                if snapshot is not None:
                    snapshot.release()
                if place is not None:
                    place.leave()
            raise
        finally:
            if place is not None:
                place.saving_thread = None
        if streaming:
            handle.wait_staged()  # which it is when all has been written: until then the state must not change
        if exit.is_over():
            handle.wait_settled(self._exit_timeout_secs)  # nobody else will wait for it
        handle.timings.blocked_secs = time.perf_counter() - started
        return handle

    def prepare(self, state: object) -> None:
        """Warm the memory for images of this state, so that already the first save costs only the copy.

        Blocks for as long as the system takes to hand out fresh memory (up to two seconds a gigabyte), without holding
        the GIL; call it while the data loads, or in a thread. Copies nothing, writes nothing.
        """
        self._check_usable()
        plan = plan_state(state, self._describe("", None))
        if plan.layout.num_bytes <= self._limit():
            self._snapshots.prepare(plan)

    def wait(self, timeout: float | None = None) -> None:
        """The barrier: return once every save submitted before is durable.

        Blocks up to `timeout` seconds, then raises `WaitTimeoutError`; the saves go on. Raises what made a save fail if
        nobody has looked at it yet (by `handle.result()`, `handle.exception()` or an earlier `wait`). Does not wait for
        callbacks.
        """
        self._check_owner()
        self._check_not_in_callback("wait")
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            handles = list(self._unsettled)
        pending = [handle for handle in handles if not handle.wait_settled(_remaining(deadline))]
        if pending:
            raise WaitTimeoutError(
                f"{len(pending)} of {len(handles)} saves are not durable yet: {pending[0].path}"
                + (" and others" if len(pending) > 1 else "")
            )
        self._raise_unseen_failures()

    def close(self, timeout: float | None = None) -> None:
        """Take no more saves, wait until all are durable and all callbacks have run, and give threads and memory back.

        Blocks up to `timeout` seconds. Raises as `wait` does. Closing again does nothing; in a forked child it does
        nothing at all.
        """
        if os.getpid() != self._pid:
            return
        self._check_not_in_callback("close")
        with self._lock:
            if self._closed:
                return
            self._closed = True
        deadline = None if timeout is None else time.monotonic() + timeout
        self._queue.hurry()
        try:
            self.wait(timeout)
        finally:
            for group in self._thread_groups:
                group.stop()
                group.join(_remaining(deadline))
            self._snapshots.close()

    def __enter__(self) -> AsyncCheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception:
            # The body's own error is the one to raise; failed saves are in the log already.
            logger.exception("saves failed while another error was on its way")

    # --- what happens to one save, in order ---

    def _describe(self, path: str, metadata: Mapping[str, object] | None) -> Mapping[str, object]:
        """The JSON record inside the file."""
        return {
            "asyncckpt": __version__,
            "name": os.path.basename(path).encode("utf-8", "backslashreplace").decode(),
            "created": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            "torch": str(torch.__version__),
            "metadata": metadata or {},
        }

    def _limit(self) -> int:
        with self._lock:
            if self._memory_limit is None:
                self._memory_limit = default_memory_limit()
            return self._memory_limit

    def _submit(self, handle: SaveHandle, snapshot: Snapshot, place: Place) -> None:
        with self._lock:
            closed = self._closed
            if not closed:
                self._emit("submitted", handle.path, f"{handle.timings.num_bytes:,} bytes")
                self._queue.submit(handle, snapshot, lambda info, error: self._settle(handle, place, info, error))
                # Only now: a signal handler's wait() must not wait for a save that this thread has still to submit.
                if not handle.done():
                    self._unsettled[handle] = None
        if closed:
            raise SaverClosedError("the saver was closed while this save was being staged")

    def _staged(self, handle: SaveHandle) -> None:
        handle.mark_staged()
        self._emit("staged", handle.path, "")

    def _settle(
        self, handle: SaveHandle, place: Place, info: CheckpointInfo | None, error: BaseException | None
    ) -> None:
        """On a worker, the image's memory being free again; so is the place, before anybody hears of it."""
        place.leave()
        with self._lock:
            self._unseen_failures = [failed for failed in self._unseen_failures if not failed.looked_at]
            if error is None:
                self._num_consecutive_failures = 0
            else:
                self._num_consecutive_failures += 1
                self._unseen_failures.append(handle)
            handle.settle(info, error)
            self._unsettled.pop(handle, None)
        if error is not None:
            log_quietly(logging.ERROR, str(error))
        if info is not None:
            self._emit("committed", handle.path, "")
            if (on_success := self._on_success) is not None:
                self._callbacks.put(lambda: on_success(info))
        elif error is not None:
            self._emit("failed", handle.path, str(error))
            if (on_failure := self._on_failure) is not None:
                self._callbacks.put(lambda: on_failure(handle, error))

    def _skip(self, handle: SaveHandle) -> SaveHandle:
        handle.skipped = True
        handle.settle(None, None)
        self._emit("skipped", handle.path, "no room in flight")
        return handle

    def _raise_unseen_failures(self) -> None:
        with self._lock:
            unseen = [handle for handle in self._unseen_failures if not handle.looked_at]
            self._unseen_failures.clear()
        errors = [error for handle in unseen if (error := handle.exception()) is not None]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise CheckpointWriteError(
                f"{len(errors)} saves failed; the first: {errors[0]}", failures=errors
            ) from errors[0]

    # --- guards ---

    def _check_usable(self) -> None:
        self._check_owner()
        self._check_not_in_callback("save")
        with self._lock:
            if self._closed:
                raise SaverClosedError("this saver is closed; make another one")
            if self._num_consecutive_failures >= self._max_consecutive_failures:
                # One more is let through next time: the cause may be gone by then.
                self._num_consecutive_failures = self._max_consecutive_failures - 1
                last = self._unseen_failures[-1] if self._unseen_failures else None
                raise CheckpointWriteError(
                    f"the last {self._max_consecutive_failures} saves failed, so training goes on without checkpoints"
                    + (f"; the last: {last.failure()}" if last is not None else "")
                )

    def _check_owner(self) -> None:
        # Before any lock: at the time of the fork another thread may have held it.
        if os.getpid() != self._pid:
            raise SaverClosedError(
                f"this saver belongs to process {self._pid}, which forked this one; make another one"
            )

    def _check_not_in_callback(self, name: str) -> None:
        if self._callbacks.contains_current_thread():
            raise RuntimeError(f"{name}() inside a callback would wait for itself; hand the work to another thread")

    # --- for the exit module ---

    def flush_at_exit(self, *, final: bool) -> bool:
        if self._exit_deadline is None:
            self._exit_deadline = time.monotonic() + self._exit_timeout_secs
        try:
            self.wait(_remaining(self._exit_deadline))
        except WaitTimeoutError as error:
            if final:
                log_quietly(logging.ERROR, f"at exit, after {self._exit_timeout_secs} s: {error}")
            return not final
        except BaseException as error:
            log_quietly(logging.ERROR, f"at exit: {error!r}")
            return False
        finally:
            self._callbacks.drain(min(_MAX_CALLBACK_SECS, _remaining(self._exit_deadline) or 0.0))
        return True

    def forget_after_fork(self) -> None:
        self._finalizer.detach()


def _abandon(groups: Sequence[ThreadGroup], snapshots: Snapshotter, pid: int) -> None:
    """A saver was dropped without `close()`: what is in flight still finishes, then everything is given back."""
    if os.getpid() == pid:
        for group in groups:
            group.stop()
        snapshots.close()


def _emitter(on_event: Callable[[Event], object] | None, callbacks: ThreadGroup) -> Emit:
    """Hands events to the callback's thread, without keeping the saver alive."""

    def emit(kind: EventKind, path: str, detail: str) -> None:
        if on_event is not None:
            event = Event(kind, path, detail)
            callbacks.put(lambda: on_event(event))

    return emit


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _warn_of_arrays(plan: Plan) -> None:
    if plan.array_bytes > _LARGE_ARRAYS_BYTES:
        warnings.warn(
            f"the state holds {plan.array_bytes:,} bytes of NumPy arrays, which torch's format pickles inline, slowly "
            "and with several times their size in memory; torch.from_numpy makes tensors of them without a copy",
            stacklevel=3,
        )


def _warn_of_unsafe(checkpoint: object, plan: Plan) -> None:
    unsafe = find_unsafe(checkpoint, plan)
    if unsafe is not None:
        path, name = unsafe
        warnings.warn(
            f"{path} refers to {name}, so only a load with weights_only=False, which can run code, will open this "
            "checkpoint; save plain data and state_dicts, or allow it by torch.serialization.add_safe_globals",
            stacklevel=3,
        )


def _warn_of_streaming(plan: Plan, limit: int) -> None:
    warnings.warn(
        f"the state's image ({plan.layout.num_bytes:,} bytes) is over memory_limit ({limit:,} bytes): it is written in "
        "pieces, and save() blocks until it is durable",
        stacklevel=3,
    )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def _check_at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
