"""The saver: takes live state, returns at once, and makes it durable in the background."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from asyncckpt.errors import SaverClosedError, WaitTimeoutError
from asyncckpt.events import Event
from asyncckpt.image.file import file_path
from asyncckpt.image.snapshot import Snapshot, SnapshotMode, Snapshotter
from asyncckpt.image.staging import copy_threads
from asyncckpt.image.streaming import window_bytes
from asyncckpt.records import CheckpointInfo, Timings
from asyncckpt.registry.directory import Listing
from asyncckpt.service import exit
from asyncckpt.service.admission import Admission, Place, WhenFull
from asyncckpt.service.callbacks import Callbacks
from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.ledger import Ledger
from asyncckpt.service.memory import default_memory_limit
from asyncckpt.service.messages import Setup
from asyncckpt.service.options import WriterKind, check_options
from asyncckpt.service.queue import SaveQueue, Submission
from asyncckpt.service.queues import AnyQueue, in_process, in_threads
from asyncckpt.service.request import Request, warn_of_streaming
from asyncckpt.storage.journal import journals_directory
from asyncckpt.storage.places import Places
from asyncckpt.threads import ThreadGroup, log_quietly

T = TypeVar("T")

logger = logging.getLogger("asyncckpt")

_MAX_CALLBACK_SECS = 30.0  # at exit
_LOOK_UP_SECS = 0.2


class AsyncCheckpointSaver:
    """Saves nested state of any shape to explicit paths, in the background. All methods are thread-safe.

    Args:
        num_workers: how many checkpoints may be written at the same time. Commits in one directory keep their order.
        snapshot: "copy" stages everything before `save` returns; "overlap" stages what only `optimizer.step` writes in
            the background, and holds the next step until that is done.
        writer: "thread" writes in threads of this process; "process" in a light child process, which has a GIL of its
            own and finishes what is staged when this process is killed. "auto" is "thread" until a URL is saved to, or
            a `PreemptionGuard` asks for the process.
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
        stall_timeout_secs: a storage operation that takes longer is reported, by a `stalled` event, a warning in the
            log and `handle.timings.stalled_secs`. It can't be ended; training goes on.
        exit_timeout_secs: how long the interpreter's exit, or that of a `with` block, may be held up for what is still
            in flight.
        exit_code: the process's exit code, 1 to 255, if that fails while it would have been 0; None leaves it alone.
        storage_options: how to open what a URL names, as fsspec's filesystem for it takes them.
    """

    def __init__(
        self,
        num_workers: int = 1,
        *,
        snapshot: SnapshotMode = "copy",
        writer: WriterKind = "auto",
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
        stall_timeout_secs: float = 60.0,
        exit_timeout_secs: float = 600.0,
        exit_code: int | None = 74,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_options(
            num_workers=num_workers,
            snapshot=snapshot,
            writer=writer,
            max_in_flight=max_in_flight,
            when_full=when_full,
            memory_limit=memory_limit,
            retries=retries,
            max_consecutive_failures=max_consecutive_failures,
            nice=nice,
            stall_timeout_secs=stall_timeout_secs,
            exit_timeout_secs=exit_timeout_secs,
            exit_code=exit_code,
        )
        self.exit_code = exit_code
        self.exit_timeout_secs = exit_timeout_secs
        self._exit_deadline: float | None = None
        self.nice = nice
        self.stall_timeout_secs = stall_timeout_secs
        self.writer = writer
        self._switching = threading.RLock()  # guards the next; reentrant, since signal handlers may save
        self._is_switching = False  # to the writer process
        self._may_switch = writer == "auto"
        self._has_told_of_threads = False
        self._is_left = False  # to the writer process
        self._memory_limit = memory_limit
        self._pid = os.getpid()

        self.storage = storage = Places(storage_options, journals_directory())
        self._callbacks = Callbacks(on_success, on_failure, on_event)
        self.emit = self._callbacks.emit
        self.run_callback = self._callbacks.thread.put
        self._ledger = Ledger(max_consecutive_failures)
        self._admission = Admission(max_in_flight, when_full)
        self._setup = Setup(
            num_workers, nice, retries, verify_after_save, stall_timeout_secs, storage.plain_options, storage.journals
        )
        with contextlib.ExitStack() as started:  # there may be no memory for one more thread
            started.callback(self._callbacks.thread.stop)
            self._queue: AnyQueue = in_threads(storage, self._setup, self.emit)
            started.callback(lambda: self._queue.stop())  # whichever it is by then
            if writer == "process":
                self._queue = in_process(self._queue, self._setup, self.emit)
            self._stagers = ThreadGroup("staging", 1)  # training may be waiting for these two: full priority
            started.callback(self._stagers.stop)
            self._copiers = copy_threads()
            started.pop_all()
        self._snapshots = Snapshotter(snapshot, max_in_flight, self._stagers, self._copiers)
        self._thread_groups = (self._stagers, self._copiers, self._callbacks.thread)
        self._finalizer = self._make_finalizer()
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
            filepath: a path, or a URL (`s3://bucket/run/step100.pt`). Missing directories are made. What is there is
                replaced in one act; a symbolic link is replaced by the file.
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
        return self._save(Request(checkpoint, file_path(filepath), optimizers, modules, metadata))

    def save_listed(
        self,
        checkpoint: object,
        listing: Listing,
        *,
        optimizers: Sequence[Any] = (),
        modules: Sequence[torch.nn.Module] = (),
        weights_only: bool = True,
    ) -> SaveHandle:
        """The manager's: save to a directory that is open for writing, and list the checkpoint there.

        As `save`, but acknowledged only once the registry and the best link are durable too. Raises
        `UnsafeCheckpointError`, unless `weights_only=False`, for a state that a safe load would refuse.
        """
        directory, info = listing.directory, listing.info
        path, metadata = directory.path_of(str(info.filepath)), directory.describe(info)
        return self._save(Request(checkpoint, path, optimizers, modules, metadata, listing, weights_only))

    def fail(self, path: str, error: BaseException) -> SaveHandle:
        """The manager's: a save that failed before it could begin; everybody hears of it as of any other."""
        handle = SaveHandle(path, self._callbacks.thread.put)
        self._settle(handle, None, None, error)
        handle.mark_over()
        return handle

    def prepare(self, state: object) -> None:
        """Warm the memory for images of this state, so that already the first save costs only the copy.

        Blocks for as long as the system takes to hand out fresh memory (up to two seconds a gigabyte), without holding
        the GIL; call it while the data loads, or in a thread. Copies nothing, writes nothing.
        """
        self.check_usable()
        plan = Request(state, "").plan(Timings())
        if plan.layout.num_bytes <= self._limit():
            self._snapshots.prepare(plan)

    def wait(self, timeout: float | None = None) -> None:
        """The barrier: return once every save submitted before is durable, and what it replaced is deleted.

        Blocks up to `timeout` seconds, then raises `WaitTimeoutError`; the saves go on. Raises what made a save fail if
        nobody has looked at it yet (by `handle.result()`, `handle.exception()` or an earlier `wait`). Does not wait for
        callbacks.
        """
        self._check_owner()
        self.check_not_in_callback("wait")
        deadline = None if timeout is None else time.monotonic() + timeout
        handles = self._ledger.submitted()
        pending = [handle for handle in handles if not self._wait_over(handle, deadline)]
        if pending:
            raise WaitTimeoutError(
                f"{len(pending)} of {len(handles)} saves are not durable yet: {pending[0].path}"
                + (" and others" if len(pending) > 1 else "")
            )
        self._ledger.raise_unseen()

    def _wait_over(self, handle: SaveHandle, deadline: float | None) -> bool:
        """Looks up now and then: what is left to the writer process is not waited for any more."""
        while not self._is_left and (rest := _remaining(deadline)) != 0.0:
            if handle.wait_over(_LOOK_UP_SECS if rest is None else min(rest, _LOOK_UP_SECS)):
                return True
        return handle.wait_over(0)

    def close(self, timeout: float | None = None, *, before_end: Callable[[], None] | None = None) -> None:
        """Take no more saves, wait until all are durable and all callbacks have run, and give threads and memory back.

        Blocks up to `timeout` seconds. Raises as `wait` does. May be called again, from any thread, and then waits
        again for what is still in flight; in a forked child it does nothing. `before_end` is called when that has been
        waited for, while the callbacks' thread still runs.
        """
        if os.getpid() != self._pid:
            return
        self.check_not_in_callback("close")
        self._ledger.close()
        deadline = None if timeout is None else time.monotonic() + timeout
        self._queue.hurry()
        try:
            self.wait(timeout)
        except WaitTimeoutError as error:
            if not self._is_left:
                raise
            log_quietly(logging.WARNING, f"left to the writer process: {error}")
        finally:
            try:
                if before_end is not None:
                    before_end()
            finally:
                self._end(deadline)

    def _end(self, deadline: float | None) -> None:
        self._queue.stop()
        for group in self._thread_groups:
            group.stop()
        for group in (*self._queue.thread_groups, *self._thread_groups):
            group.join(0.0 if self._is_left else _remaining(deadline))
        self._snapshots.close()

    def use_writer_process(self) -> bool:
        """From now on let a writer process write, which finishes what is staged when this process is killed.

        Blocks until the saves in flight are done. False where no process can be had, or with `writer="thread"`.
        """
        self.check_usable()
        if self._may_switch and isinstance(self._queue, SaveQueue):
            with self._switching:
                if self._may_switch and isinstance(self._queue, SaveQueue) and not self._is_switching:
                    self._is_switching = True
                    try:
                        self._switch_to_process(self._queue)
                    finally:
                        self._is_switching = False
        return self._queue.survives_exit

    def _switch_to_process(self, threads: SaveQueue) -> None:
        self.wait_idle()
        queue = in_process(threads, self._setup, self.emit)
        self._may_switch = queue is not threads  # where there can be none, nobody waits for it again
        is_switched = False
        while not is_switched:
            self.wait_idle()  # for what came meanwhile: threads and process never write at the same time
            with self._ledger.lock:
                if is_switched := not self._ledger.submitted():
                    self._queue = queue
        self._finalizer.detach()
        self._finalizer = self._make_finalizer()

    def leave_to_writer(self) -> None:
        """What is staged is the writer process's now: `wait()` and `close()` return, and exit does not wait for it.

        Without a writer process nothing changes. From any thread, and from signal handlers.
        """
        self._is_left = self._queue.survives_exit

    def run_on_worker(self, action: Callable[[], T], name: str, path: str) -> T:
        """The manager's: run `action` where saves are written, and wait for it; `name` and `path` say what it is.

        Not on the calling thread, so that a signal handler that interrupts the wait may still save.
        """
        self._check_owner()
        outcome: Future[T] = Future()
        handle = SaveHandle("other work", self._callbacks.thread.put)  # so that it counts as in flight

        def run() -> None:
            try:
                outcome.set_result(action())
            except BaseException as error:
                outcome.set_exception(error)
            finally:
                self._ledger.finish(handle)

        def submit() -> None:
            self._queue.run(run, name, path)
            handle.is_submitted = True

        if not self._ledger.enter(handle, submit):
            raise SaverClosedError("this saver is closed; make another one")
        return outcome.result()

    def wait_idle(self, timeout: float | None = None) -> bool:
        """The manager's: wait until nothing is in flight, whatever became of it; False on time-out."""
        deadline = None if timeout is None else time.monotonic() + timeout
        handles = self._ledger.submitted()
        return all(handle.wait_over(_remaining(deadline)) for handle in handles)

    def call_when_idle(self, action: Callable[[], object]) -> bool:
        """The manager's: call `action` once nothing is in flight any more, at once if that is so: then True."""
        return self._ledger.call_when_idle(action)

    def __enter__(self) -> AsyncCheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        close_after(error, lambda: self.close(self.exit_timeout_secs))

    # --- what happens to one save, in order ---

    def _save(self, request: Request) -> SaveHandle:
        started = time.perf_counter()
        self.check_usable()
        self._choose_writer(request.path)
        handle = SaveHandle(request.path, self._callbacks.thread.put)
        place: Place | None = None
        snapshot: Snapshot | None = None
        try:
            place = self._admission.enter()
            if place is None:
                return self._skip(handle)
            plan = request.plan(handle.timings)
            request.check(plan)
            limit = self._limit()
            streaming = plan.layout.num_bytes > limit
            piece_bytes = self.storage.piece_bytes(request.path, plan.layout.num_bytes)
            window = window_bytes(limit, piece_bytes) if streaming else plan.layout.num_bytes
            if not place.reserve(window, limit):
                place.leave()
                return self._skip(handle)
            if streaming:
                warn_of_streaming(plan, limit)
                snapshot = self._snapshots.stream(plan, window)
            else:
                snapshot = self._snapshots.take(
                    plan, request.optimizers, request.modules, handle.timings, lambda: self._staged(handle)
                )
            handle.tell_when_seen(snapshot.let_pass)
            self._submit(handle, snapshot, place, request.listing)
        except BaseException:
            if not handle.is_submitted:
                self._take_back(handle, snapshot, place)
            raise
        finally:
            if place is not None:
                place.saving_thread = None
        if streaming:
            handle.wait_staged()  # which it is when all has been written: until then the state must not change
        if exit.is_over():
            handle.wait_over(self.exit_timeout_secs)  # nobody else will wait for it
        handle.timings.blocked_secs = time.perf_counter() - started
        return handle

    def _choose_writer(self, path: str) -> None:
        """A network is no business of a process whose GIL is busy; but not every place can be had in another one."""
        with self._switching:  # another thread's switch is waited for, lest it wait for ever for a quiet moment
            pass
        if self.storage.is_shared(path):
            if not self.storage.is_near(path):
                self.use_writer_process()
        elif self.writer == "auto" and not self._has_told_of_threads:
            self._has_told_of_threads = True
            log_quietly(
                logging.WARNING,
                f"{path}: another process can't open this as this one does (by class or storage_options): threads "
                "write it, and don't outlive the trainer",
            )

    def _limit(self) -> int:
        with self._ledger.lock:
            if self._memory_limit is None:
                self._memory_limit = default_memory_limit()
            return self._memory_limit

    def _submit(self, handle: SaveHandle, snapshot: Snapshot, place: Place, listing: Listing | None) -> None:
        submission = Submission(
            handle,
            snapshot,
            settle=lambda info, error: self._settle(handle, place, info, error),
            finish=lambda: self._ledger.finish(handle),
            listing=listing,
        )
        if not self._ledger.enter(handle, partial(self._start, submission)):
            raise SaverClosedError("the saver was closed while this save was being staged")

    def _start(self, submission: Submission) -> None:
        handle = submission.handle
        self.emit("submitted", handle.path, f"{handle.timings.num_bytes:,} bytes")
        self._queue.submit(submission)

    def _take_back(self, handle: SaveHandle, snapshot: Snapshot | None, place: Place | None) -> None:
        """It can't be submitted: what it has taken is there for others again."""
        self._ledger.withdraw(handle)
        if snapshot is not None:
            snapshot.release()
        if place is not None:
            place.leave()

    def _staged(self, handle: SaveHandle) -> None:
        self._queue.staged(handle)
        handle.mark_staged()
        self.emit("staged", handle.path, "")

    def _settle(
        self, handle: SaveHandle, place: Place | None, info: CheckpointInfo | None, error: BaseException | None
    ) -> None:
        """On a worker, the image's memory being free again; so is the place, before anybody hears of it."""
        if place is not None:
            place.leave()
        self._ledger.settle(handle, info, error)
        if error is not None:
            log_quietly(logging.ERROR, str(error))
        self._callbacks.tell_of(handle, info, error)

    def _skip(self, handle: SaveHandle) -> SaveHandle:
        handle.skip()
        self.emit("skipped", handle.path, "no room in flight")
        return handle

    # --- guards ---

    def check_open(self) -> None:
        """Raise `SaverClosedError` if it is closed, or another process's."""
        self._check_owner()
        self._ledger.check_open()

    def check_usable(self) -> None:
        """Raise what `save` would raise before it looks at anything."""
        self._check_owner()
        self.check_not_in_callback("save")
        self.check_open()
        self._ledger.check_failures()

    def _check_owner(self) -> None:
        # Before any lock: at the time of the fork another thread may have held it.
        if os.getpid() != self._pid:
            raise SaverClosedError(
                f"this saver belongs to process {self._pid}, which forked this one; make another one"
            )

    def check_not_in_callback(self, name: str) -> None:
        """Raise if this is the thread that runs callbacks."""
        self._callbacks.check_not_inside(name)

    # --- for the exit module ---

    def flush_at_exit(self, *, final: bool) -> bool:
        if self._exit_deadline is None:
            self._exit_deadline = time.monotonic() + self.exit_timeout_secs
        try:
            self.wait(_remaining(self._exit_deadline))
        except WaitTimeoutError as error:
            if not final:
                return True
            if self._queue.is_handed_over:
                log_quietly(logging.WARNING, f"at exit: the writer process goes on: {error}")
                return True
            when = "" if self._is_left else f", after {self.exit_timeout_secs} s"
            log_quietly(logging.ERROR, f"at exit{when}: {error}")
            return False
        except BaseException as error:
            log_quietly(logging.ERROR, f"at exit: {error!r}")
            return False
        finally:
            if final:
                self._queue.leave()
            self._callbacks.thread.drain(min(_MAX_CALLBACK_SECS, _remaining(self._exit_deadline) or 0.0))
        return True

    def _make_finalizer(self) -> weakref.finalize[..., AsyncCheckpointSaver]:
        finalizer = weakref.finalize(self, _abandon, self._queue, self._thread_groups, self._snapshots, self._pid)
        finalizer.atexit = False
        return finalizer

    def forget_after_fork(self) -> None:
        self._finalizer.detach()


def close_after(error: BaseException | None, close: Callable[[], None]) -> None:
    """Close at the end of a block, which has ended with `error`: that is the one to raise; failed saves are in the log
    already."""
    try:
        close()
    except Exception:
        if error is None:
            raise
        logger.exception("saves failed while another error was on its way")


def _abandon(queue: AnyQueue, groups: Sequence[ThreadGroup], snapshots: Snapshotter, pid: int) -> None:
    """A saver was dropped without `close()`: what is in flight still finishes, then everything is given back."""
    if os.getpid() == pid:
        queue.stop()
        for group in groups:
            group.stop()
        snapshots.close()


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
