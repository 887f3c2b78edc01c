"""What the errors of file systems that fsspec opens mean. No torch.

Every client has errors of its own, few of them OSErrors. Their texts may hold what was sent, so they are not passed on.
What may pass has an errno that is worth a retry, but never EAGAIN: that is what a lock says that is taken; nor EIO, by
which a load takes a file for lost, and an older one in its place.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
from collections.abc import Iterator

from asyncckpt.storage.base import ConflictError

_PASSING_STATUSES = frozenset({408, 425, 429})


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Whatever a client raises about `path` becomes an OSError with an errno.

    Raises FileNotFoundError, PermissionError, `ConflictError`, or OSError.
    """
    try:
        yield
    except Exception as error:
        release_frames(error)
        raise _meaning(error, path) from error


def release_frames(error: BaseException) -> None:
    """Let go what the calls that have failed held.

    Clients keep errors in locals (fsspec's `sync`, tenacity, retries do), and an error knows the calls that it came
    through: such a circle keeps all who have called until Python looks for circles, a manager with its mirror too. What
    failed on the loop's thread knows nobody here once the way from there to here is cut off; of what failed here the
    locals go. Those of coroutines stay: one may have caught the same error, and be at its next try.
    """
    found: BaseException | None = error
    seen: set[int] = set()  # some clients raise in circles
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        entry = found.__traceback__
        while entry is not None and not entry.tb_frame.f_code.co_flags & inspect.CO_COROUTINE:
            if not entry.tb_frame.f_code.co_flags & inspect.CO_GENERATOR:
                with contextlib.suppress(RuntimeError):  # still running
                    entry.tb_frame.clear()
            entry = entry.tb_next
        if entry is not None:
            found.__traceback__ = entry
        found = found.__cause__ or found.__context__


def _meaning(error: Exception, path: str) -> OSError:
    status, name = _status(error), type(error).__name__
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if isinstance(error, ConflictError) or status in (409, 412):
        return ConflictError(errno.EEXIST, "somebody else has written it meanwhile", path)
    if isinstance(error, PermissionError) or status in (401, 403) or "Auth" in name or "Credential" in name:
        return PermissionError(errno.EACCES, f"the server refuses it ({name}): check the credentials", path)
    if isinstance(error, TimeoutError) or "Timeout" in name:
        return OSError(errno.ETIMEDOUT, "the server does not answer", path)
    if status >= 500 or status in _PASSING_STATUSES:
        return OSError(errno.ETIMEDOUT, f"the server can't serve it now (status {status})", path)
    if isinstance(error, OSError) and error.errno is not None and error.errno < 0:  # of the resolver
        return OSError(errno.ENETUNREACH, f"the server can't be found ({name})", path)
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, os.strerror(error.errno), path)
    if isinstance(error, TypeError):  # it names what is too much, or missing
        return OSError(errno.EINVAL, f"the storage_options don't fit: {error}", path)
    if isinstance(error, ValueError):
        return OSError(errno.EINVAL, "the storage_options don't fit: some are missing, or make no sense", path)
    if isinstance(error, EOFError) or "Connect" in name or "SSH" in name:
        return OSError(errno.ENETDOWN, f"the connection is lost ({name})", path)
    return OSError(errno.ETIMEDOUT, f"the server fails ({name}{f', status {status}' if status else ''})", path)


def _status(error: Exception) -> int:
    """The HTTP status, where a client tells of one."""
    for attribute in ("status_code", "status", "code"):
        number = getattr(error, attribute, None)
        if isinstance(number, int):
            return number
    return 0
