"""What happens to savers, and mirrors, when the process ends or forks. No torch.

At exit every saver is flushed, with a deadline. A failure that nobody has looked at turns an exit code of 0 into the
saver's `exit_code` (74, EX_IOERR): a job whose last checkpoint was lost must not look like a success.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import weakref
from typing import Protocol

logger = logging.getLogger("asyncckpt")


class Flushable(Protocol):
    """What this module needs of a saver, or of a mirror."""

    exit_code: int | None

    def flush_at_exit(self, *, final: bool) -> bool:
        """Wait until everything is durable, up to one deadline for all calls together.

        False (and a line in the log) if something is lost. What is merely late is lost only in the `final` call.
        """
        ...

    def forget_after_fork(self) -> None:
        """In a forked child: the threads are gone, and what was in flight is the parent's."""
        ...


# In the order of their registration: a mirror comes after the saver whose checkpoints it is brought.
_savers: weakref.WeakKeyDictionary[Flushable, None] = weakref.WeakKeyDictionary()


def register(saver: Flushable) -> None:
    """Flush this saver at exit."""
    _savers[saver] = None


def is_over() -> bool:
    """Whether the last flush has been: whatever is saved now must be waited for by its caller."""
    return _over


def _flush_all(*, final: bool) -> list[int]:
    """Flush every saver; the exit codes of those that failed."""
    failed = [saver for saver in list(_savers) if not saver.flush_at_exit(final=final)]
    return [saver.exit_code for saver in failed if saver.exit_code is not None]


_over = False


_failed_codes: list[int] = []


def _flush_early() -> None:
    """Before the interpreter joins threads: executors and most libraries still work."""
    _failed_codes.extend(_flush_all(final=False))


def _flush_late() -> None:
    """After non-daemon threads, which may have saved until now, and other exit handlers have ended."""
    global _over
    _failed_codes.extend(_flush_all(final=True))
    _over = True
    if _failed_codes and not _exception_ends_process():
        logger.error("exiting with code %d, because a checkpoint was not saved", _failed_codes[0])
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(_failed_codes[0])


def _exception_ends_process() -> bool:
    """An uncaught exception has set a non-zero exit code already."""
    return getattr(sys, "last_exc", None) is not None or getattr(sys, "last_value", None) is not None


def _forget_in_child() -> None:
    for saver in list(_savers):
        saver.forget_after_fork()
    _savers.clear()


atexit.register(_flush_late)
if hasattr(threading, "_register_atexit"):
    threading._register_atexit(_flush_early)
os.register_at_fork(after_in_child=_forget_in_child)
