"""S3 through obstore, a client in Rust, chosen by `storage_options={"client": "obstore", …}`. No torch.

It sends a checkpoint several times as fast as Python does, for a fraction of the processor time, and without the GIL.
What it costs: an upload that is cut starts anew, deadlines and retries are obstore's own, a save that is being sent
can't be given up, and it is sent within the commit, so that one save follows the other. What version it replaces is
looked at before it is sent, not at its end: obstore binds no upload in parts to a condition.

Only the contents of files go through it; conditions, claims, small files, listings, notes and sweeps are `S3Storage`'s.
Only the writer process uses it: once a process has, its forked children hang in obstore, their own use of it included,
and can make the process hang too. Elsewhere (streaming, where there can be no writer process, loading) this is
`S3Storage`.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from asyncckpt.errors import CheckpointError, MissingExtraError
from asyncckpt.storage.base import Upload
from asyncckpt.storage.s3 import Note, S3Reader, S3Storage, S3Upload, part_bytes
from asyncckpt.storage.s3_requests import Answer, S3Requests, explained
from asyncckpt.threads import log_quietly

_PAGE_BYTES = 4096
_LEAST_BYTES = 16 << 20  # smaller files are not worth it
_CONNECT_SECS = 5
_LEAST_SECS = 20
_LEAST_BYTES_PER_SEC = 1 << 20  # of all parts that are on their way
_MAX_CONCURRENCY = 8
_MAX_RETRIES = 4
_MAX_RETRY_SECS = 60
_CREDENTIALS_SECS = 600  # botocore renews what lasts less than that

# What obstore can be told of s3fs's options; whatever else there is it would ignore without a word.
_OPTIONS = {
    "": {"key", "secret", "token", "username", "password", "anon", "profile", "endpoint_url", "use_ssl"}
    | {"client_kwargs", "config_kwargs", "s3_additional_kwargs"},
    "client_kwargs": {"region_name", "endpoint_url", "use_ssl"},
    "config_kwargs": {"region_name", "connect_timeout", "read_timeout", "retries", "max_pool_connections"},
    "s3_additional_kwargs": {"ServerSideEncryption", "SSEKMSKeyId"},
}


class ObstoreStorage(S3Storage):
    """`S3Storage` whose files of more than `least_bytes` are written and read by obstore, if this process never forks.

    Raises `MissingExtraError`, and `CheckpointError` for options that obstore would not heed.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        never_forks: bool = False,
        least_bytes: int = _LEAST_BYTES,
        **settings: Any,
    ) -> None:
        super().__init__(options, **settings)
        _check_options(options or {})
        if importlib.util.find_spec("obstore") is None:
            raise MissingExtraError(
                "client 'obstore' needs obstore (and Python 3.11): pip install asyncckpt[obstore], or leave it out"
            )
        self._stores = _Stores(self.requests, (options or {}).get("s3_additional_kwargs", {})) if never_forks else None
        self._least_bytes = least_bytes
        self._has_told = False

    def begin(self, path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
        if self._is_worth_it(num_bytes):
            if self._stores is not None:
                chunk_bytes = part_bytes(num_bytes, self._least_part_bytes)
                return _ObstoreUpload(self._stores, self.requests, path, num_bytes, chunk_bytes, expected)
            self._tell(path)
        return super().begin(path, num_bytes, expected=expected)

    def piece_bytes(self, path: str, num_bytes: int) -> int:
        if self._stores is not None and self._is_worth_it(num_bytes):
            return _whole_pages(num_bytes)
        return super().piece_bytes(path, num_bytes)

    def open(self, path: str, *, follow_links: bool = True) -> S3Reader:
        if self._stores is None:
            return super().open(path, follow_links=follow_links)
        return _ObstoreReader(self._stores, self.requests, path, self._least_bytes)

    def _is_worth_it(self, num_bytes: int) -> bool:
        return num_bytes > self._least_bytes

    def _tell(self, path: str) -> None:
        if not self._has_told:
            self._has_told = True
            log_quietly(logging.INFO, f"{path}: sent by s3fs: only the writer process can use obstore")


class _Stores:
    """obstore's clients, one per bucket, made at their first use. Thread-safe."""

    def __init__(self, requests: S3Requests, encryption: Mapping[str, str]) -> None:
        self._requests = requests
        self._encryption = encryption
        self._lock = threading.Lock()
        self._by_bucket: dict[str, Any] = {}

    def put(self, bucket: str, key: str, view: memoryview, metadata: dict[str, str], chunk_bytes: int) -> Answer:
        """Send all of `view`, in parts if it is longer than one. Answers, and raises, as `S3Requests.send` does."""
        import obstore

        store = self._store(bucket)
        try:
            answer = obstore.put(
                store, key, view, attributes=metadata, chunk_size=chunk_bytes, max_concurrency=_MAX_CONCURRENCY
            )
        except Exception as error:
            raise _explained(error, "put", bucket) from error
        return {"ETag": str(answer["e_tag"])}

    def get(self, bucket: str, key: str, offset: int, num_bytes: int, version: str) -> memoryview:
        """A range of one version. Raises as `S3Requests.send` does."""
        import obstore

        store = self._store(bucket)
        try:
            answer = obstore.get(store, key, options={"range": (offset, offset + num_bytes), "if_match": version})
            return memoryview(answer.bytes())
        except Exception as error:
            raise _explained(error, "get", bucket) from error

    def _store(self, bucket: str) -> Any:
        with self._lock:
            if bucket not in self._by_bucket:
                self._by_bucket[bucket] = self._connect(bucket)
            return self._by_bucket[bucket]

    def _connect(self, bucket: str) -> Any:
        from obstore.store import S3Store

        connection = self._requests.connection()
        signing: dict[str, Any] = {"credential_provider": self._credentials}
        if not connection.secret:
            signing = {"skip_signature": True}
        encryption: dict[str, Any] = {_ENCRYPTION[name]: value for name, value in self._encryption.items()}
        part_secs = _LEAST_SECS + _MAX_CONCURRENCY * part_bytes(0) / _LEAST_BYTES_PER_SEC
        return S3Store(
            bucket,
            endpoint=connection.endpoint,
            region=connection.region,
            checksum_algorithm="crc64nvme",  # made of what is in memory, held by the store against what arrived
            client_options={
                "allow_http": connection.endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=_CONNECT_SECS),
                "timeout": timedelta(seconds=part_secs),
            },
            retry_config={"max_retries": _MAX_RETRIES, "retry_timeout": timedelta(seconds=_MAX_RETRY_SECS)},
            **signing,
            **encryption,
        )

    def _credentials(self) -> dict[str, Any]:
        """For obstore, which asks again before they run out."""
        connection = self._requests.connection()
        return {
            "access_key_id": connection.key,
            "secret_access_key": connection.secret,
            "token": connection.token,
            "expires_at": datetime.now(timezone.utc) + timedelta(seconds=_CREDENTIALS_SECS),
        }


_ENCRYPTION = {"ServerSideEncryption": "server_side_encryption", "SSEKMSKeyId": "sse_kms_key_id"}


class _ObstoreUpload(S3Upload):
    """The view of the whole file that the one `write` brings is sent by `commit`."""

    num_threads = 1

    def __init__(
        self,
        stores: _Stores,
        requests: S3Requests,
        path: str,
        num_bytes: int,
        chunk_bytes: int,
        expected: str | None,
    ) -> None:
        super().__init__(requests, path, num_bytes, _whole_pages(num_bytes), expected)
        self._stores = stores
        self._chunk_bytes = chunk_bytes
        self._view: memoryview | None = None
        self._has_failed = False
        self._note = Note.of(requests, path, self._token)
        try:
            self._note.leave()
        except BaseException:
            self._note.remove()
            raise

    def write(self, offset: int, view: memoryview) -> None:
        assert offset == 0, "the file is one piece"
        self._view = view

    def sync(self) -> None:
        """Nothing is durable, or lost, before the commit."""

    def commit(self) -> None:
        view, self._view = self._view, None
        if view is None or len(view) != self._num_bytes:
            raise OSError(errno.EIO, "a part of the upload is missing")
        self._check_version(self._expected)
        self._has_failed = True
        self._make_visible(
            lambda **_: self._stores.put(self._bucket, self._key, view, self._metadata, self._chunk_bytes)
        )
        self._has_failed = False

    def close(self) -> None:
        self._note.remove()

    def abort(self) -> None:
        self._view = None
        if self._has_failed and self._may_have_left_parts():
            self._note.hand_over()
        else:
            self._note.remove()

    def _may_have_left_parts(self) -> bool:
        """obstore aborts an upload that fails, but does not say whether that has worked."""
        try:
            pages = self._requests.pages("list_multipart_uploads", self._bucket, Prefix=self._key)
            return any(upload["Key"] == self._key for page in pages for upload in page.get("Uploads", ()))
        except OSError:
            return True


class _ObstoreReader(S3Reader):
    def __init__(self, stores: _Stores, requests: S3Requests, path: str, least_bytes: int) -> None:
        super().__init__(requests, path)
        self._stores = stores
        self._least_bytes = least_bytes

    def _get(self, offset: int, num_bytes: int) -> bytes | memoryview:
        if self.num_bytes <= self._least_bytes:
            return super()._get(offset, num_bytes)
        return self._stores.get(self._bucket, self._key, offset, num_bytes, self.version)


def _whole_pages(num_bytes: int) -> int:
    return max(1, -(-num_bytes // _PAGE_BYTES)) * _PAGE_BYTES


def _check_options(options: Mapping[str, Any]) -> None:
    unheeded = sorted(_unheeded(options))
    if unheeded:
        raise CheckpointError(
            f"storage_options: client 'obstore' would not heed {', '.join(unheeded)}; leave that out, or the client"
        )


def _unheeded(options: Mapping[str, Any]) -> Iterator[str]:
    for group, known in _OPTIONS.items():
        given = options.get(group) or {} if group else options
        yield from (f"{group}.{name}" if group else name for name in given if name not in known)


class _RefusalError(Exception):
    """What the store has answered, in the form of botocore's errors."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}


def _explained(error: Exception, operation: str, bucket: str) -> OSError:
    """What an error of obstore's means; it says so only in its text, which holds no secrets."""
    text = str(error)
    if (status := re.search(r"status code: (\d{3})", text)) is not None:
        code, message = re.search(r"<Code>(\w+)</Code>", text), re.search(r"<Message>([^<]*)</Message>", text)
        refusal = _RefusalError(int(status[1]), code[1] if code else status[1], message[1] if message else "")
        return explained(refusal, operation, bucket)
    if type(error).__name__ == "UnauthenticatedError":
        return PermissionError(errno.EACCES, "no credentials for the store were found")
    if "kind: Connect" in text:
        return OSError(errno.ECONNREFUSED, "the store can't be reached: check the endpoint")
    if "kind: Timeout" in text:
        return OSError(errno.ETIMEDOUT, f"{operation}: no answer in time")
    return OSError(errno.ETIMEDOUT, f"{operation}: {type(error).__name__}")
