"""The mirror: a second place that every checkpoint of a directory comes to, in the background. No torch.

It never holds up training or the directory itself: while the second place does not answer, what it lacks waits, and is
brought there when it answers again, or by the next run.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import Future

from asyncckpt.errors import CheckpointError, CorruptCheckpointError
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import Report
from asyncckpt.registry.replication import Replica
from asyncckpt.threads import log_quietly, lower_priority

_FIRST_PAUSE_SECS = 1.0
_MAX_PAUSE_SECS = 60.0
_LOOK_UP_SECS = 0.2
_POLL_SECS = 0.02


class Mirror:
    """Copies to a replica on a thread of its own. Thread-safe.

    `mirrored` is the sequence number up to which everything has arrived, or will never arrive (it was dropped before);
    0 as long as the replica has not been seen.
    """

    def __init__(self, replica: Replica, emit: Report, *, nice: int) -> None:
        self.mirrored = 0
        self._replica = replica
        self._emit = emit
        self._nice = nice
        self._futures: dict[int, Future[CheckpointInfo]] = {}
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_stopped = False
        self._is_idle = False
        self._problem: Exception | None = None
        self._damaged: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="asyncckpt-mirror", daemon=True)
        self._thread.start()

    def expect(self, sequence: int) -> Future[CheckpointInfo]:
        """What becomes of a checkpoint that is being saved: its place in the mirror, or why it never got there."""
        future: Future[CheckpointInfo] = Future()
        future.set_running_or_notify_cancel()
        self._futures[sequence] = future
        return future

    def note_saved(self, sequence: int, error: BaseException | None) -> None:
        """The local save has settled."""
        if error is not None and (future := self._futures.pop(sequence, None)) is not None:
            future.set_exception(error)
        self._poke()

    def wait(self, timeout: float | None, *, while_down: bool = True) -> bool:
        """Wait until nothing is lacking; False on time-out, or, unless `while_down`, when nothing can be brought there.

        Whatever was saved before must be durable locally.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._is_idle = False
        self._poke()
        while not self._is_idle and self._thread.is_alive():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            if self._problem is not None and not while_down:
                return False
            time.sleep(_POLL_SECS)
        return True

    @property
    def problem(self) -> Exception | None:
        """What keeps the mirror behind at the moment."""
        return self._problem

    def close(self, timeout: float | None) -> bool:
        """Bring what is lacking, if that can be done now and in time, and end; False if something is lacking."""
        is_complete = self.wait(timeout, while_down=False)
        self._is_stopped = True
        self._poke()
        self._thread.join(timeout)
        if not is_complete:
            reason = f": {self._problem}" if self._problem is not None else ""
            log_quietly(logging.WARNING, f"the mirror lacks some checkpoints{reason}; the next run brings them there")
        return is_complete

    def _poke(self) -> None:
        self._wake.put(None)

    # --- on its thread ---

    def _run(self) -> None:
        lower_priority(self._nice)
        pause = 0.0
        while not self._is_stopped:
            self._await_poke(pause)
            try:
                self._catch_up()
                pause, self._problem = 0.0, None
            except (OSError, CheckpointError) as error:
                pause = min(max(2 * pause, _FIRST_PAUSE_SECS), _MAX_PAUSE_SECS)
                self._note_problem(error, pause)
        try:
            self._replica.close()
        except OSError as error:
            log_quietly(logging.WARNING, f"the mirror could not be given back: {error}")

    def _await_poke(self, pause: float) -> None:
        """After a failure not before the pause is over."""
        deadline = time.monotonic() + pause
        while not self._is_stopped and (rest := deadline - time.monotonic()) > 0:
            time.sleep(min(rest, _LOOK_UP_SECS))
        if pause == 0.0 and self._wake.empty():
            self._is_idle = True
            self._wake.get()
        while not self._wake.empty():
            self._wake.get()

    def _catch_up(self) -> None:
        lacking = [info for info in self._replica.lacking() if info.sequence not in self._damaged]
        self._note_mirrored(lacking)
        for number, info in enumerate(lacking):
            if self._is_stopped:
                return
            self._copy(info)
            self._note_mirrored(lacking[number + 1 :])

    def _copy(self, info: CheckpointInfo) -> None:
        assert info.sequence is not None
        try:
            copied = self._replica.copy(info)
        except CorruptCheckpointError as error:
            self._damaged.add(info.sequence)
            self._give_up(info.sequence, error)
            return
        if copied is None:
            self._give_up(info.sequence, CheckpointError(f"{info.filepath} was deleted before it was mirrored"))
        elif (future := self._futures.pop(info.sequence, None)) is not None:
            future.set_result(copied)
        if copied is not None:
            self._emit("mirrored", str(copied.filepath), "")

    def _give_up(self, sequence: int, error: Exception) -> None:
        log_quietly(logging.ERROR, str(error))
        if (future := self._futures.pop(sequence, None)) is not None:
            future.set_exception(error)

    def _note_mirrored(self, lacking: list[CheckpointInfo]) -> None:
        rest = [info.sequence for info in lacking if info.sequence is not None]
        self.mirrored = min(rest) - 1 if rest else self._replica.last_sequence
        for sequence in [sequence for sequence in list(self._futures) if sequence <= self.mirrored]:
            self._give_up(sequence, CheckpointError(f"commit {sequence} was dropped before it was mirrored"))

    def _note_problem(self, error: Exception, pause: float) -> None:
        if str(error) != str(self._problem):
            log_quietly(logging.WARNING, f"the mirror does not take anything at the moment: {error}; tried again")
            self._emit("mirror_failed", "", str(error))
        self._problem = error
