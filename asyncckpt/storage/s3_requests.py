"""Requests to an S3 store, the one place that issues them: through the client that s3fs sets up. No torch.

s3fs knows what users know (`storage_options`, profiles, environment, endpoints, proxies, encryption); its own file
objects are not used, since they publish half a file on an exception. Every request has a deadline, and is sent again
when its failure may pass.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import io
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from asyncckpt.errors import CheckpointError, MissingExtraError
from asyncckpt.naming import printable
from asyncckpt.storage.base import ConflictError
from asyncckpt.storage.fsspec_errors import release_frames
from asyncckpt.storage.options import s3_options, unusable

if TYPE_CHECKING:
    from tenacity import RetryCallState

Answer = dict[str, Any]
T = TypeVar("T")

_MAX_TRIES = 6
_MAX_TRIES_TO_CONNECT = 3
_MAX_TRYING_SECS = 45.0  # no further try than the second begins after that
_FIRST_PAUSE_SECS = 0.2
_MAX_PAUSE_SECS = 5.0
_CONNECT_SECS = 3.0
_LEAST_SECS = 15.0
_LEAST_BYTES_PER_SEC = 1 << 20  # of all that is on its way; slower than this counts as a stall
_LOOK_SECS = 1.0  # how long a request may go on without a look at how many share the line
_PAGE_KEYS = 1000

_ABSENT = frozenset({"404", "NoSuchKey", "NotFound"})
_CONFLICT = frozenset({"412", "PreconditionFailed"})
# The request has come to harm on the way, or met another one: sent again, it may do.
_PASSING = frozenset(
    {
        *("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody", "RequestTimeout"),
        *("MalformedXML", "InvalidPart", "InvalidPartOrder"),  # what we send is well-formed, and the parts are there
        *("ConditionalRequestConflict", "OperationAborted"),
    }
)
# The store has too much to do: so say AWS's services (as botocore knows them), and other stores in words of their own.
_THROTTLING = frozenset(
    {
        *("SlowDown", "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled"),
        *("RequestThrottledException", "TooManyRequests", "TooManyRequestsException", "TooMuchConcurrency"),
        *("RequestLimitExceeded", "BandwidthLimitExceeded", "LimitExceededException", "RateLimitExceeded"),
        *("PriorRequestNotComplete", "ProvisionedThroughputExceededException"),
        *("SlowDownRead", "SlowDownWrite", "ServiceUnavailable", "ServerBusy", "Busy"),
    }
)
_PASSING_STATUSES = frozenset({408, 425, 429})  # and all of 500 and above
_CREDENTIALS = "check key and secret in storage_options, or what the environment has of credentials"
_REFUSALS = {
    "InvalidAccessKeyId": f"the store knows no such access key; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret is not that of the access key; {_CREDENTIALS}",
    "AccessDenied": "these credentials do not allow {operation}; let them, or use others",
    "ExpiredToken": "the session token has expired; get another one",
    "InvalidToken": f"the session token is not valid; {_CREDENTIALS}",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it right",
}
_WITHOUT_LISTING = "without the right to s3:ListBucket this is also said of what is not there: give it; else "
_MAX_SAID_CHARS = 300
_WRONG_REGION = frozenset({"301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"})


# Without these an answer is none of S3's, whatever its status.
_ESSENTIAL = {
    "head_object": "ETag",
    "put_object": "ETag",
    "upload_part": "ETag",
    "upload_part_copy": "CopyPartResult",
    "create_multipart_upload": "UploadId",
    "complete_multipart_upload": "ETag",
}

# Ours, or of a client's code: neither the store nor the network is to blame, and no other try can help.
_MISTAKES = (AttributeError, NameError, AssertionError, ImportError, LookupError, NotImplementedError)


class UploadGoneError(OSError):
    """The store knows no such multipart upload (any more)."""


class UnsupportedError(OSError):
    """The store does not have what the request asks for, and will not have it either when it is asked again."""


@dataclass(frozen=True, repr=False)
class Connection:
    """Where requests go, and with what they are signed at present; no `secret` means that they are not signed."""

    endpoint: str
    region: str
    key: str = ""
    secret: str = ""
    token: str | None = None


# What a forked child has inherited, never to be let go there: it would be closed on another loop than its own, of which
# asyncio complains on stderr.
_of_parents: list[Any] = []


class S3Requests:
    """Requests with one set of `storage_options`, as s3fs takes them. Thread-safe; a forked child connects anew."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises `MissingExtraError`, and `CheckpointError` for options that can't be used."""
        _check_packages()
        self._options = s3_options(options)
        _check_endpoint(self._options)
        self._lock = threading.Lock()
        self._file_system: Any = None
        self._pid = 0
        self._num_sharing = 0  # requests that carry bytes, at present; of the loop's thread
        self._known_buckets: set[str] = set()
        self.unsupported: set[str] = set()  # what the store was found not to have, in its users' words

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the user wants every object to have; what a request says of metadata takes its place."""
        found: Mapping[str, str] = self._options.get("s3_additional_kwargs", {}).get("Metadata", {})
        return found

    def send(
        self,
        operation: str,
        bucket: str,
        *,
        num_bytes: int = 0,
        note_failure: Callable[[], None] = lambda: None,
        **arguments: Any,
    ) -> Answer:
        """The answer to one operation of boto3's client, by its name. Blocks until the deadline, `num_bytes` being what
        goes over the wire, which requests beside it share; a failure that may pass is tried again, and noted, since the
        store may have done it.

        Raises FileNotFoundError, PermissionError, `ConflictError`, `UploadGoneError`, `UnsupportedError`, or OSError,
        naming the URL.
        """
        from tenacity import Retrying, retry_if_exception, wait_random_exponential

        retrying = Retrying(
            stop=_is_enough,
            wait=wait_random_exponential(_FIRST_PAUSE_SECS, max=_MAX_PAUSE_SECS),
            retry=retry_if_exception(_may_pass),
            after=lambda state: note_failure(),
            reraise=True,
        )
        try:
            answer: Answer = retrying(self._send_once, operation, bucket, num_bytes, arguments)
        except OSError as error:
            release_frames(error)
            error.filename = f"s3://{bucket}/{arguments.get('Key', arguments.get('Prefix', ''))}"
            if isinstance(error, FileNotFoundError):
                self._check_bucket(bucket, error.filename)
            raise
        self._known_buckets.add(bucket)
        return answer

    def pages(self, operation: str, bucket: str, **arguments: Any) -> Iterator[Answer]:
        """All pages of a listing."""
        arguments[_PAGE_SIZES[operation]] = _PAGE_KEYS
        while True:
            page = self.send(operation, bucket, **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            following = {name: page[answer] for name, answer in _NEXT_PAGE.items() if page.get(answer)}
            if following.items() <= arguments.items():
                raise OSError(errno.EPROTO, f"{operation}: the store does not say where the next page begins")
            arguments |= following

    def _check_bucket(self, bucket: str, url: str) -> None:
        """What is not there may be the bucket, of which the answer to a HEAD says nothing."""
        if bucket in self._known_buckets:
            return
        with contextlib.suppress(PermissionError):
            try:
                self._send_once("head_bucket", bucket, 0, {})
            except FileNotFoundError:
                error = _no_bucket(bucket)
                error.filename = url
                raise error from None

    def connection(self) -> Connection:
        """For another client to the same store. Blocks: credentials that run out soon are renewed.

        Raises PermissionError, or OSError.
        """
        file_system = self._connected()

        async def ask() -> Connection:
            client = await file_system.set_session()
            where = (client.meta.endpoint_url, client.meta.region_name)
            credentials = client._get_credentials()  # None: anonymous
            if credentials is None:
                return Connection(*where)
            frozen = await credentials.get_frozen_credentials()
            return Connection(*where, frozen.access_key, frozen.secret_key, frozen.token)

        return self._run(file_system.loop, asyncio.wait_for(ask(), _LEAST_SECS), "connecting", "")

    def describe(self) -> str:
        """The client, and where it goes to, for people; nothing secret. Asks the store nothing."""
        endpoint = urlsplit(str(self._connected().s3.meta.endpoint_url))
        return f"s3fs {version('s3fs')}, to {endpoint.scheme}://{endpoint.hostname}:{endpoint.port or 443}"

    def _send_once(self, operation: str, bucket: str, num_bytes: int, arguments: Mapping[str, Any]) -> Answer:
        file_system = self._connected()
        body = arguments.get("Body")
        if isinstance(body, memoryview):
            arguments = {**arguments, "Body": _Body(body), "ContentLength": len(body)}

        async def send() -> Answer:
            answer: Answer = await file_system._call_s3(operation, Bucket=bucket, **arguments)
            if "Body" in answer:
                async with answer["Body"] as stream:
                    answer["Body"] = await stream.read()
            return answer

        answer = self._run(file_system.loop, self._in_its_share(send(), num_bytes), operation, bucket)
        if _ESSENTIAL.get(operation, "ResponseMetadata") not in answer:
            lacks = f"its answer to {operation} has no {_ESSENTIAL[operation]}"
            raise OSError(errno.EPROTO, f"what answers there does not speak S3 ({lacks}); check endpoint_url")
        return answer

    async def _in_its_share(self, work: Coroutine[Any, Any, T], num_bytes: int) -> T:
        """What `work` returns, or TimeoutError, when a line of `_LEAST_BYTES_PER_SEC`, which all requests that carry
        bytes have in equal shares, would have carried `num_bytes`, and `_LEAST_SECS` are over besides.
        """
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        secs_left = num_bytes / _LEAST_BYTES_PER_SEC  # of the whole line
        self._num_sharing += num_bytes > 0
        try:
            await asyncio.wait({task}, timeout=_LEAST_SECS)
            while not task.done() and secs_left > 0:
                started = loop.time()
                await asyncio.wait({task}, timeout=min(secs_left * self._num_sharing, _LOOK_SECS))
                secs_left -= (loop.time() - started) / self._num_sharing
            if not task.done():
                raise TimeoutError
            return task.result()
        finally:
            self._num_sharing -= num_bytes > 0
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _run(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], operation: str, bucket: str) -> T:
        """Run `work`, which has a deadline, on s3fs's loop, in terms of OSError."""
        started = time.monotonic()
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except (TimeoutError, asyncio.TimeoutError) as error:
            message = f"{operation}: no answer within {time.monotonic() - started:.0f} s"
            raise OSError(errno.ETIMEDOUT, message) from error
        except BaseException as error:
            future.cancel()
            if isinstance(error, Exception) and not isinstance(error, _MISTAKES):
                raise explained(error, operation, bucket) from error
            raise

    def _connected(self) -> Any:
        with self._lock:
            if self._file_system is None or self._pid != os.getpid():
                _of_parents.append(self._file_system)  # None in a process that has not connected before
                self._file_system, self._pid, self._num_sharing = self._connect(), os.getpid(), 0
            return self._file_system

    def _connect(self) -> Any:
        """A client of s3fs that is set up. Blocks: credentials may have to be fetched.

        Raises `CheckpointError` for options that it can't be set up with, and OSError.
        """
        try:
            file_system = _make_file_system(self._options)
            self._run(file_system.loop, asyncio.wait_for(file_system.set_session(), _LEAST_SECS), "connecting", "")
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) or not _is_of_options(cause):
                raise
            raise unusable(cause, self._options) from cause
        return file_system


_PAGE_SIZES = {"list_objects_v2": "MaxKeys", "list_multipart_uploads": "MaxUploads", "list_parts": "MaxParts"}
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
    """What an error of the client means, as an OSError with an errno; without the request, which holds secrets.

    What may pass is never EAGAIN, which a lock says that is taken; nor EIO, by which a load takes a file for lost.
    """
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, "response"):
        cause = cause.__cause__
    response = getattr(cause, "response", None)
    if isinstance(response, dict):
        return _explained_answer(response, operation, bucket)
    return _explained_failure(error, operation)


def _explained_answer(response: Answer, operation: str, bucket: str) -> OSError:
    """The store has answered, and refuses."""
    code = str(response.get("Error", {}).get("Code", ""))
    said = _said(response)
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return _no_bucket(bucket)
    if code == "NoSuchUpload":
        return UploadGoneError(errno.ENOENT, "the multipart upload is gone")
    if code in _ABSENT:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if code in _CONFLICT or status == 412:
        return ConflictError(errno.EEXIST, "somebody else has written it meanwhile")
    if code in _REFUSALS:
        return PermissionError(errno.EACCES, f"{_REFUSALS[code].format(operation=operation)} ({said})")
    if code in _WRONG_REGION:
        return OSError(errno.EINVAL, f"the bucket is in another region ({said}); set region_name in client_kwargs")
    if status == 501 or code == "NotImplemented":
        return UnsupportedError(errno.EOPNOTSUPP, f"{operation}: {said}")
    if status >= 500 or status in _PASSING_STATUSES or code in _PASSING | _THROTTLING:
        return OSError(errno.ETIMEDOUT, f"{operation}: {said}")
    if status in (401, 403):
        if code != str(status):
            return PermissionError(errno.EACCES, f"the store refuses {operation} ({said})")
        advice = _CREDENTIALS  # to a HEAD no reasons are given
        if operation == "head_object":
            advice = _WITHOUT_LISTING + advice
        return PermissionError(errno.EACCES, f"the store refuses {operation} ({said}); {advice}")
    return OSError(errno.EINVAL, f"{operation}: {said}")


def _said(response: Answer) -> str:
    """In the store's own words, as far as they fit on a line. No store repeats a token, and a secret it never gets."""
    code, message = (str(response.get("Error", {}).get(name) or "") for name in ("Code", "Message"))
    return printable(": ".join(dict.fromkeys(filter(None, (code, message)))))[:_MAX_SAID_CHARS]


def _explained_failure(error: Exception, operation: str) -> OSError:
    """There is no answer."""
    from botocore import exceptions as of_client

    name = type(error).__name__
    if isinstance(error, (of_client.NoCredentialsError, of_client.PartialCredentialsError)):
        return PermissionError(errno.EACCES, f"no credentials for the store were found; {_CREDENTIALS}")
    if isinstance(error, (of_client.EndpointConnectionError, of_client.ConnectTimeoutError)):
        return OSError(errno.ECONNREFUSED, "the store can't be reached; check the network and endpoint_url")
    if isinstance(error, of_client.ConnectionClosedError):
        return OSError(errno.ECONNRESET, f"{operation}: the connection broke")
    if isinstance(error, of_client.SSLError):
        return OSError(errno.EPROTO, f"{operation}: no secure connection; check endpoint_url and its certificate")
    if isinstance(error, of_client.HTTPClientError):
        if isinstance(error.kwargs.get("error"), ValueError):  # no header can hold it
            return PermissionError(errno.EACCES, f"the key or the session token has a line end in it; {_CREDENTIALS}")
        return OSError(errno.ETIMEDOUT, f"{operation}: {name}")
    if isinstance(error, (of_client.BotoCoreError, TypeError, ValueError)):
        return OSError(errno.EINVAL, f"{operation}: {name}; check storage_options and the URL")
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, f"{operation}: {error.strerror or name}")
    return OSError(errno.ETIMEDOUT, f"{operation}: {name}")


def _no_bucket(bucket: str) -> OSError:
    return OSError(errno.ENODEV, f"there is no bucket {bucket!r}; make it first, or correct the URL")


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, (ConflictError, UploadGoneError)) or not isinstance(error, OSError):
        return False
    return error.errno in (errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED)


def _is_enough(state: RetryCallState) -> bool:
    """Whether to give up, after a failure that may pass."""
    error = state.outcome.exception() if state.outcome is not None else None
    is_refused = isinstance(error, OSError) and error.errno == errno.ECONNREFUSED
    max_tries = _MAX_TRIES_TO_CONNECT if is_refused else _MAX_TRIES
    is_late = state.attempt_number > 1 and (state.seconds_since_start or 0.0) >= _MAX_TRYING_SECS
    return state.attempt_number >= max_tries or is_late


def _check_packages() -> None:
    missing = [name for name in ("s3fs", "tenacity") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"s3:// needs {' and '.join(missing)}: pip install 'asyncckpt[s3]'")


def _check_endpoint(options: Mapping[str, Any]) -> None:
    """An endpoint goes into messages."""
    for endpoint in (options.get("endpoint_url"), (options.get("client_kwargs") or {}).get("endpoint_url")):
        if "@" in urlsplit(str(endpoint or "")).netloc:
            raise CheckpointError("credentials don't belong into endpoint_url; pass them as key and secret")


def _is_of_options(error: BaseException) -> bool:
    """Whether a client that can't be set up fails for what it was given, rather than for what it asks others."""
    from botocore import exceptions as of_client

    if isinstance(error, (of_client.ProfileNotFound, of_client.ConfigNotFound, of_client.ConfigParseError)):
        return True
    return isinstance(error, (TypeError, ValueError, AttributeError, LookupError))


def _with_key_of_source(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is copied within the store is encrypted with the customer's key already: it is to be read with that."""
    of_source = {f"CopySource{name}": value for name, value in arguments.items() if name.startswith("SSECustomer")}
    return {**of_source, **arguments}


def _make_file_system(options: Mapping[str, Any]) -> Any:
    import s3fs

    config = {
        "connect_timeout": _CONNECT_SECS,
        "read_timeout": None,  # the deadline is ours
        "retries": {"max_attempts": 0},
        "max_pool_connections": 32,
    }
    options = {**options, "config_kwargs": {**config, **options.get("config_kwargs", {})}}
    options["s3_additional_kwargs"] = _with_key_of_source(options.get("s3_additional_kwargs", {}))
    file_system = s3fs.S3FileSystem(**options, skip_instance_cache=True, use_listings_cache=False)
    file_system.retries = 1  # ours know deadlines
    return file_system
