"""Requests to an S3 store, the one place that issues them: through the client that s3fs sets up. No torch.

s3fs knows what users know (`storage_options`, profiles, environment, endpoints, proxies, encryption); its own file
objects are not used, since they publish half a file on an exception. Every request has a deadline, and is sent again
when its failure may pass.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import os
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from asyncckpt.errors import MissingExtraError
from asyncckpt.storage.base import ConflictError

Answer = dict[str, Any]

_MAX_TRIES = 4
_FIRST_PAUSE_SECS = 0.2
_MAX_PAUSE_SECS = 5.0
_CONNECT_SECS = 5.0
_LEAST_SECS = 20.0
_LEAST_BYTES_PER_SEC = 1 << 20  # slower than this counts as a stall
_PAGE_KEYS = 1000

_DENIED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"})
_ABSENT = frozenset({"404", "NoSuchKey", "NoSuchUpload", "NotFound"})
_CONFLICT = frozenset({"412", "PreconditionFailed", "ConditionalRequestConflict", "409"})


class UploadGoneError(OSError):
    """The store knows no such multipart upload (any more)."""


class S3Requests:
    """Requests with one set of `storage_options`, as s3fs takes them. Thread-safe; a forked child connects anew."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._lock = threading.Lock()
        self._file_system: Any = None
        self._pid = 0

    def send(self, operation: str, bucket: str, *, num_bytes: int = 0, **arguments: Any) -> Answer:
        """The answer to one operation of boto3's client, by its name. Blocks until the deadline, `num_bytes` being what
        goes over the wire; a failure that may pass is tried again.

        Raises FileNotFoundError, PermissionError, `ConflictError`, `UploadGoneError`, or OSError.
        """
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

        retrying = Retrying(
            stop=stop_after_attempt(_MAX_TRIES),
            wait=wait_random_exponential(_FIRST_PAUSE_SECS, max=_MAX_PAUSE_SECS),
            retry=retry_if_exception(_may_pass),
            reraise=True,
        )
        answer: Answer = retrying(self._send_once, operation, bucket, num_bytes, arguments)
        return answer

    def pages(self, operation: str, bucket: str, **arguments: Any) -> Iterator[Answer]:
        """All pages of a listing."""
        while True:
            page = self.send(operation, bucket, **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            arguments |= {name: page[answer] for name, answer in _NEXT_PAGE.items() if answer in page}

    def describe(self) -> str:
        """The client, and where it goes to, for people; nothing secret. Asks the store nothing."""
        endpoint = urlsplit(str(self._connected().s3.meta.endpoint_url))
        return f"s3fs {version('s3fs')}, to {endpoint.scheme}://{endpoint.hostname}:{endpoint.port or 443}"

    def _send_once(self, operation: str, bucket: str, num_bytes: int, arguments: Mapping[str, Any]) -> Answer:
        file_system = self._connected()
        secs = _LEAST_SECS + num_bytes / _LEAST_BYTES_PER_SEC
        body = arguments.get("Body")
        if isinstance(body, memoryview):
            arguments = {**arguments, "Body": _Body(body), "ContentLength": len(body)}

        async def send() -> Answer:
            answer: Answer = await file_system._call_s3(operation, Bucket=bucket, **arguments)
            if "Body" in answer:
                async with answer["Body"] as stream:
                    answer["Body"] = await stream.read()
            return answer

        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(send(), secs), file_system.loop)
        try:
            return future.result()
        except (TimeoutError, asyncio.TimeoutError) as error:
            message = f"{operation}: no answer within {secs:.0f} s"
            raise OSError(errno.ETIMEDOUT, message) from error
        except BaseException as error:
            future.cancel()
            if isinstance(error, Exception):
                raise explained(error, operation, bucket) from error
            raise

    def _connected(self) -> Any:
        with self._lock:
            if self._file_system is None or self._pid != os.getpid():
                self._file_system, self._pid = _connect(self._options), os.getpid()
            return self._file_system


_NEXT_PAGE = {
    "ContinuationToken": "NextContinuationToken",
    "KeyMarker": "NextKeyMarker",
    "UploadIdMarker": "NextUploadIdMarker",
    "PartNumberMarker": "NextPartNumberMarker",
}


class _Body(io.RawIOBase):
    """A view of memory as a file that botocore reads, and rewinds to send again, without a copy of the whole."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), len(self._view) - self._position))
        buffer[:count] = self._view[self._position : self._position + count]
        self._position += count
        return count


def checksum_text(crc: int) -> str:
    """A CRC32 as S3's headers have it."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def checksum_of(text: str) -> int | None:
    """The CRC32 that a header holds; None for one of parts only (`…-3`), and for none at all."""
    try:
        crc = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return int.from_bytes(crc, "big") if len(crc) == 4 else None


def explained(error: Exception, operation: str, bucket: str) -> OSError:
    """What an error of the client means, as an OSError with an errno; without the request, which holds secrets."""
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, "response"):
        cause = cause.__cause__
    response = getattr(cause, "response", None)
    code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
    name = type(error.__cause__ or error).__name__
    if code == "NoSuchBucket":
        return OSError(errno.ENODEV, f"there is no bucket {bucket!r}; make it first")
    if code == "NoSuchUpload":
        return UploadGoneError(errno.ENOENT, "the multipart upload is gone")
    if code in _ABSENT or isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if code in _CONFLICT:
        return ConflictError(errno.EEXIST, "somebody else has written it meanwhile")
    if code in _DENIED or isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, f"the store refuses {operation} ({code or 'denied'}): check credentials")
    if "Credentials" in name:
        return PermissionError(errno.EACCES, "no credentials for the store were found")
    if response is not None:
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        number = errno.EAGAIN if status >= 500 or code in ("SlowDown", "RequestTimeout") else errno.EINVAL
        return OSError(number, f"{operation}: {response.get('Error', {}).get('Message') or code}")
    if "Connect" in name or "EndpointConnection" in name:
        return OSError(errno.ECONNREFUSED, "the store can't be reached: check the endpoint")
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, f"{operation}: {error.strerror or name}")
    return OSError(errno.EAGAIN, f"{operation}: {name}")


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, (ConflictError, UploadGoneError)) or not isinstance(error, OSError):
        return False
    return error.errno in (errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED)


def _connect(options: Mapping[str, Any]) -> Any:
    try:
        import s3fs
        import tenacity  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("s3:// needs s3fs: pip install asyncckpt[s3]") from error
    config = {"connect_timeout": _CONNECT_SECS, "retries": {"max_attempts": 1}, "max_pool_connections": 32}
    options = {**options, "config_kwargs": {**config, **options.get("config_kwargs", {})}}
    file_system = s3fs.S3FileSystem(**options, skip_instance_cache=True, use_listings_cache=False)
    file_system.retries = 1  # ours know deadlines
    return file_system
