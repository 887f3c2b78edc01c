"""Files in an S3 bucket: the finished PUT, or the completion of a multipart upload, is the commit. No torch.

Parts are views of the caller's memory, sent side by side, each with its checksum, which the store holds against what
arrived. An upload in parts leaves an object that says so in its directory for as long as it lasts (a temporary name, as
a local one has), so that a later writer finds, and aborts, what a dead one has left, and nobody else's.

Whose bytes an object holds is told by a random token among its metadata: after an answer that was lost, it says whether
the commit happened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from isal.isal_zlib import crc32, crc32_combine

from asyncckpt.naming import is_temporary_name, temporary_name
from asyncckpt.storage.base import ConflictError, Lock, Reader, Storage, Upload
from asyncckpt.storage.claim import Claim, is_claimed, take_claim
from asyncckpt.storage.s3_requests import Answer, S3Requests, UploadGoneError, checksum_of, checksum_text

_SCHEME = "s3://"
_TOKEN = "asyncckpt-attempt"
_LEAST_PART_BYTES = 16 << 20
_MIB = 1 << 20
_MAX_PARTS = 10_000
_MAX_COPY_BYTES = 5 << 30  # by one request
_COPY_PART_BYTES = 1 << 30
_READ_BYTES = 8 << 20
_NUM_THREADS = 8
_MAX_KEYS = 1000


class S3Storage(Storage):
    """Objects under `s3://bucket/…`, in any store that speaks S3. `options` are s3fs's; nothing is asked before use."""

    has_versions = True

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        least_part_bytes: int = _LEAST_PART_BYTES,
        **claim_secs: float,
    ) -> None:
        self.requests = S3Requests(options or {})
        self._least_part_bytes = least_part_bytes
        self._claim_secs = claim_secs

    def begin(self, path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
        piece_bytes = self.piece_bytes(path, num_bytes)
        if num_bytes <= piece_bytes:
            return _SmallUpload(self.requests, path, num_bytes, piece_bytes, expected)
        return _PartsUpload(self.requests, path, num_bytes, piece_bytes, expected)

    def piece_bytes(self, path: str, num_bytes: int) -> int:
        return part_bytes(num_bytes, self._least_part_bytes)

    def open(self, path: str, *, follow_links: bool = True) -> S3Reader:
        return S3Reader(self.requests, path)

    def version(self, path: str) -> str:
        bucket, key = split(path)
        try:
            return str(self.requests.send("head_object", bucket, Key=key)["ETag"])
        except FileNotFoundError:
            return ""

    def list_names(self, directory: str) -> list[str]:
        bucket, prefix = split(directory + "/")
        names: set[str] = set()
        for page in self.requests.pages("list_objects_v2", bucket, Prefix=prefix, Delimiter="/"):
            names |= {entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ())}
            names |= {entry["Prefix"].removeprefix(prefix).rstrip("/") for entry in page.get("CommonPrefixes", ())}
        return sorted(names - {""})

    def delete(self, paths: Sequence[str]) -> None:
        for path in dict.fromkeys(paths):
            bucket, key = split(path)
            self.requests.send("delete_object", bucket, Key=key)

    def link(self, source: str, destination: str) -> None:
        """By a copy within the store."""
        if source == destination:
            return
        copy(self.requests, self.open(source), destination)

    def lock(self, directory: str, holder: str) -> Lock:
        return take_claim(self, directory, holder, **self._claim_secs)

    def receive_lock(self, directory: str, share: int | bytes) -> Lock:
        assert isinstance(share, bytes)
        return Claim.received(self, directory, share, **self._claim_secs)

    def is_locked(self, directory: str) -> bool:
        return is_claimed(self, directory)

    def is_near(self, directory: str) -> bool:
        return False

    def sweep(self, directory: str, *, has_lock: bool = False) -> list[str]:
        if not has_lock:  # it can't be told who is alive
            return []
        swept: list[str] = []
        with contextlib.suppress(OSError):
            for name in self.list_names(directory):
                if is_temporary_name(name) and name not in _alive:
                    path = f"{directory}/{name}"
                    with contextlib.suppress(OSError):
                        self._sweep(path)
                        swept.append(path)
        return swept

    def _sweep(self, path: str) -> None:
        bucket, key = split(self.read(path, _MAX_NOTE_BYTES).decode())
        for page in self.requests.pages("list_multipart_uploads", bucket, Prefix=key):
            for upload in page.get("Uploads", ()):
                if upload["Key"] == key:
                    with contextlib.suppress(UploadGoneError):
                        self.requests.send("abort_multipart_upload", bucket, Key=key, UploadId=upload["UploadId"])
        self.delete([path])


_MAX_NOTE_BYTES = 4096
_alive: set[str] = set()  # temporary names of this process


def split(path: str) -> tuple[str, str]:
    """`s3://bucket/a/b` as ("bucket", "a/b")."""
    assert path.startswith(_SCHEME), path
    bucket, _, key = path.removeprefix(_SCHEME).partition("/")
    return bucket, key


def part_bytes(num_bytes: int, least: int = _LEAST_PART_BYTES) -> int:
    """A size of part with which so many bytes make no more parts than S3 allows."""
    needed = -(-num_bytes // _MAX_PARTS)
    return max(least, -(-needed // _MIB) * _MIB)


class _S3Upload(Upload):
    num_threads = _NUM_THREADS

    def __init__(self, requests: S3Requests, path: str, num_bytes: int, piece_bytes: int, expected: str | None) -> None:
        self.piece_bytes = piece_bytes
        self.version = ""
        self._requests = requests
        self._path = path
        self._bucket, self._key = split(path)
        self._num_bytes = num_bytes
        self._token = secrets.token_hex(8)
        self._conditions = _conditions(expected)
        self._metadata = {_TOKEN: self._token}

    def _send(self, operation: str, **arguments: Any) -> Answer:
        return self._requests.send(operation, self._bucket, Key=self._key, **arguments)

    def _check_commit(self, error: OSError) -> None:
        """The answer was lost, or says what an earlier try of ours has brought about: is it our object that is there?

        Raises the error if it is not.
        """
        try:
            found = self._send("head_object")
        except FileNotFoundError:
            raise error from None
        if found.get("Metadata", {}).get(_TOKEN) != self._token:
            raise error
        self.version = found["ETag"]

    def reader(self) -> None:
        return None


class _SmallUpload(_S3Upload):
    """One PUT, at the commit, of what is copied until then."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._contents = bytearray(self._num_bytes)

    def write(self, offset: int, view: memoryview) -> None:
        self._contents[offset : offset + len(view)] = view

    def sync(self) -> None:
        """Nothing is durable, or lost, before the commit."""

    def commit(self) -> None:
        contents = memoryview(self._contents)
        try:
            answer = self._send(
                "put_object",
                num_bytes=len(contents),
                Body=contents,
                Metadata=self._metadata,
                ChecksumCRC32=checksum_text(crc32(contents)),
                **self._conditions,
            )
            self.version = answer["ETag"]
        except OSError as error:
            self._check_commit(error)

    def abort(self) -> None:
        self._contents = bytearray()


class _PartsUpload(_S3Upload):
    """A multipart upload, with the object beside it that tells of it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        directory, name = os.path.split(self._path)
        self._note = temporary_name(self._token, name)
        self._note_key = split(f"{directory}/{self._note}")[1]
        self._parts: dict[int, tuple[str, int, int]] = {}
        self._upload_id = ""
        self._is_over = False
        _alive.add(self._note)
        try:
            self._requests.send("put_object", self._bucket, Key=self._note_key, Body=memoryview(self._path.encode()))
            self._upload_id = self._send(
                "create_multipart_upload",
                Metadata=self._metadata,
                ChecksumAlgorithm="CRC32",
                ChecksumType="FULL_OBJECT",
            )["UploadId"]
        except BaseException:
            self.abort()
            raise

    def write(self, offset: int, view: memoryview) -> None:
        number, rest = divmod(offset, self.piece_bytes)
        assert rest == 0, "pieces are parts"
        crc = crc32(view)
        answer = self._send(
            "upload_part",
            num_bytes=len(view),
            UploadId=self._upload_id,
            PartNumber=number + 1,
            Body=view,
            ChecksumCRC32=checksum_text(crc),
        )
        self._parts[number] = (answer["ETag"], crc, len(view))

    def sync(self) -> None:
        """Every part is acknowledged: it is in the store, if not visible yet."""

    def commit(self) -> None:
        whole, num_bytes = 0, 0
        for _, crc, part_num_bytes in self._in_order():
            whole, num_bytes = crc32_combine(whole, crc, part_num_bytes), num_bytes + part_num_bytes
        if num_bytes != self._num_bytes:
            raise OSError(errno.EIO, "parts of the upload are missing")
        parts = [
            {"PartNumber": number + 1, "ETag": etag, "ChecksumCRC32": checksum_text(crc)}
            for number, (etag, crc, _) in enumerate(self._in_order())
        ]
        try:
            answer = self._send(
                "complete_multipart_upload",
                UploadId=self._upload_id,
                MultipartUpload={"Parts": parts},
                ChecksumCRC32=checksum_text(whole),
                ChecksumType="FULL_OBJECT",
                **self._conditions,
            )
            self.version = answer["ETag"]
        except OSError as error:
            self._check_commit(error)
        self._is_over = True

    def _in_order(self) -> Iterator[tuple[str, int, int]]:
        return (self._parts[number] for number in sorted(self._parts))

    def close(self) -> None:
        self._forget()

    def abort(self) -> None:
        if self._upload_id and not self._is_over:
            try:
                self._send("abort_multipart_upload", UploadId=self._upload_id)
            except UploadGoneError:
                pass
            except OSError:
                _alive.discard(self._note)
                return  # the note stays, for a sweep
        self._is_over = True
        self._forget()

    def _forget(self) -> None:
        if self._note in _alive:
            with contextlib.suppress(OSError):
                self._requests.send("delete_object", self._bucket, Key=self._note_key)
            _alive.discard(self._note)


class S3Reader(Reader):
    """One version of an object: once it is replaced or deleted, reading on is an error (ESTALE)."""

    def __init__(self, requests: S3Requests, path: str) -> None:
        self._requests = requests
        self.path = path
        self._bucket, self._key = split(path)
        if not self._key or self._key.endswith("/"):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        try:
            found = requests.send("head_object", self._bucket, Key=self._key)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        self.num_bytes = int(found["ContentLength"])
        self.version = str(found["ETag"])

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset + len(view) > self.num_bytes:
            raise EOFError(f"the file ends at byte {self.num_bytes}")
        for start in range(0, len(view), _READ_BYTES):
            self._read_piece(offset + start, view[start : start + _READ_BYTES])

    def _read_piece(self, offset: int, view: memoryview) -> None:
        try:
            answer = self._requests.send(
                "get_object",
                self._bucket,
                num_bytes=len(view),
                Key=self._key,
                Range=f"bytes={offset}-{offset + len(view) - 1}",
                IfMatch=self.version,
            )
        except (ConflictError, FileNotFoundError) as error:
            raise OSError(errno.ESTALE, "it was replaced or deleted while it was read", self.path) from error
        body = answer["Body"]
        if len(body) != len(view):
            raise EOFError(f"the file ends at byte {offset + len(body)}")
        view[:] = body

    def stored_checksum(self) -> int | None:
        found = self._requests.send(
            "head_object", self._bucket, Key=self._key, IfMatch=self.version, ChecksumMode="ENABLED"
        )
        if found.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
            return None
        return checksum_of(str(found.get("ChecksumCRC32", "")))

    def close(self) -> None:
        """Nothing is held."""


def copy(requests: S3Requests, source: S3Reader, destination: str) -> None:
    """Copy an object within the store, in one act; the checksums go with it."""
    from_bucket, from_key = split(source.path)
    bucket, key = split(destination)
    origin = {"Bucket": from_bucket, "Key": from_key}
    if source.num_bytes <= _MAX_COPY_BYTES:
        requests.send(
            "copy_object",
            bucket,
            num_bytes=source.num_bytes,
            Key=key,
            CopySource=origin,
            CopySourceIfMatch=source.version,
        )
        return
    upload_id = requests.send("create_multipart_upload", bucket, Key=key)["UploadId"]
    try:
        parts = []
        for number, start in enumerate(range(0, source.num_bytes, _COPY_PART_BYTES), 1):
            stop = min(start + _COPY_PART_BYTES, source.num_bytes)
            answer = requests.send(
                "upload_part_copy",
                bucket,
                num_bytes=stop - start,
                Key=key,
                UploadId=upload_id,
                PartNumber=number,
                CopySource=origin,
                CopySourceRange=f"bytes={start}-{stop - 1}",
                CopySourceIfMatch=source.version,
            )
            parts.append({"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]})
        requests.send(
            "complete_multipart_upload", bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
        )
    except BaseException:
        with contextlib.suppress(OSError):
            requests.send("abort_multipart_upload", bucket, Key=key, UploadId=upload_id)
        raise


def _conditions(expected: str | None) -> dict[str, str]:
    if expected is None:
        return {}
    return {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
