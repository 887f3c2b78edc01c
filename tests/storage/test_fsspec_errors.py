"""What clients raise, as OSErrors with an errno, and without what they were told."""

from __future__ import annotations

import asyncio
import errno
import socket

import pytest

from asyncckpt.service.messages import describe_error
from asyncckpt.storage.base import ConflictError
from asyncckpt.storage.fsspec_errors import explained, release_frames


class HttpError(Exception):
    """As gcsfs has it."""

    def __init__(self, code: int) -> None:
        super().__init__("canary")
        self.code = code


class ServiceRequestError(Exception):
    """As azure has it, when nobody is there."""


class ClientConnectorError(Exception):
    """As aiohttp has it."""


@pytest.mark.parametrize(
    ("error", "kind", "number"),
    [
        (FileNotFoundError("canary"), FileNotFoundError, errno.ENOENT),
        (HttpError(404), FileNotFoundError, errno.ENOENT),
        (HttpError(401), PermissionError, errno.EACCES),
        (HttpError(403), PermissionError, errno.EACCES),
        (HttpError(412), ConflictError, errno.EEXIST),
        (HttpError(429), OSError, errno.ETIMEDOUT),
        (HttpError(503), OSError, errno.ETIMEDOUT),
        (HttpError(400), OSError, errno.ETIMEDOUT),
        (OSError(errno.ENOSPC, "canary"), OSError, errno.ENOSPC),
        (OSError("canary"), OSError, errno.ETIMEDOUT),
        (TimeoutError("canary"), TimeoutError, errno.ETIMEDOUT),
        (socket.gaierror(socket.EAI_NONAME, "canary"), OSError, errno.ENETUNREACH),
        (EOFError("canary"), OSError, errno.ENETDOWN),
        (ClientConnectorError("canary"), OSError, errno.ENETDOWN),
        (ServiceRequestError("canary"), OSError, errno.ETIMEDOUT),
        (ValueError("canary"), OSError, errno.EINVAL),
    ],
    ids=lambda value: getattr(value, "__name__", None) or repr(value),
)
def test_what_errors_mean(error: Exception, kind: type[OSError], number: int) -> None:
    with pytest.raises(kind) as meant, explained("gs://bucket/run"):
        raise error
    assert meant.value.errno == number
    assert meant.value.filename == "gs://bucket/run"
    assert "canary" not in str(meant.value)
    assert meant.value.__cause__ is error


def test_what_is_no_error() -> None:
    """An interrupt goes through as it is."""
    with pytest.raises(KeyboardInterrupt), explained("gs://bucket/run"):
        raise KeyboardInterrupt


def test_one_error_for_two_requests() -> None:
    """As when aiohttp looks a name up for both: what the one gives up, the other may be trying again."""
    error = OSError("no such host")

    async def look_up() -> None:
        raise error

    async def ask_twice(again: asyncio.Event) -> str:
        try:
            await look_up()
        except OSError:
            await again.wait()
        return "answer"

    async def both() -> str:
        again = asyncio.Event()
        patient = asyncio.ensure_future(ask_twice(again))
        await asyncio.sleep(0)
        with pytest.raises(OSError, match="no such host"):
            await look_up()
        release_frames(error)
        again.set()
        return await patient

    assert asyncio.run(both()) == "answer"


def test_errors_in_a_circle() -> None:
    """As of a client that raises what has failed first from what has failed then."""
    first, then = ConnectionError("first"), TimeoutError("then")
    first.__cause__, then.__cause__ = then, first
    with pytest.raises(OSError, match="the connection is lost") as meant, explained("sftp://host/run"):
        raise first
    assert describe_error(meant.value).cause is not None
