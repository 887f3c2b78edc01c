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
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from isal.isal_zlib import crc32, crc32_combine

from asyncckpt.storage.base import ConflictError, Reader, Upload
from asyncckpt.storage.claim import ClaimedStorage, new_temporary_name
from asyncckpt.storage.journal import Journal, Journals, Part, UploadRecord
from asyncckpt.storage.s3_requests import (
    Answer,
    S3Requests,
    UnsupportedError,
    UploadGoneError,
    checksum_of,
    checksum_text,
)
from asyncckpt.threads import log_quietly

_SCHEME = "s3://"
_TOKEN = "asyncckpt-attempt"
_LEAST_PART_BYTES = 16 << 20
_MIB = 1 << 20
_MAX_PARTS = 10_000
_MAX_COPY_BYTES = 5 << 30  # by one request
_COPY_PART_BYTES = 1 << 30
_READ_BYTES = 8 << 20
_NUM_THREADS = 8
_MD5 = re.compile("[0-9a-f]{32}")
# What a store may turn out not to have (`S3Requests.unsupported`).
_CONDITIONS = "conditions of writes"
_WHOLE_CHECKSUMS = "checksums of whole objects"


class S3Storage(ClaimedStorage):
    """Objects under `s3://bucket/…`, in any store that speaks S3. `options` are s3fs's; nothing is asked before use."""

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        journals: str | None = None,
        least_part_bytes: int = _LEAST_PART_BYTES,
        **claim_secs: float,
    ) -> None:
        super().__init__(**claim_secs)
        self._journals = Journals(journals)
        self.requests = S3Requests(options or {})
        self._least_part_bytes = least_part_bytes

    def has_versions(self, directory: str) -> bool:
        return True

    @property
    def binds_writes(self) -> bool:
        return _CONDITIONS not in self.requests.unsupported

    def begin(self, path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
        piece_bytes = self.piece_bytes(path, num_bytes)
        if num_bytes <= piece_bytes:
            return _SmallUpload(self.requests, path, num_bytes, piece_bytes, expected)
        return _PartsUpload(self.requests, path, num_bytes, piece_bytes, expected, self._journals)

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

    def alive_names(self) -> set[str]:
        return _alive | self._journals.notes

    def sweep_file(self, path: str) -> bool:
        """Abort the upload that the note tells of, and delete it.

        Where nobody has had the time to note which one that was, it is one of those that were begun after the note.
        """
        destination, upload_id = Note.parse(self.read(path, _MAX_NOTE_BYTES))
        if os.path.dirname(destination) != os.path.dirname(path):
            return False
        bucket, key = split(destination)
        for upload in [upload_id] if upload_id else self._uploads_since(path, key):
            with contextlib.suppress(UploadGoneError):
                self.requests.send("abort_multipart_upload", bucket, Key=key, UploadId=upload)
        self.delete([path])
        return True

    def _uploads_since(self, path: str, key: str) -> list[str]:
        """Of uploads to `key`, those that were begun when the object at `path` was there, by the store's own clock."""
        bucket, key_of_note = split(path)
        written: datetime = self.requests.send("head_object", bucket, Key=key_of_note)["LastModified"]
        pages = self.requests.pages("list_multipart_uploads", bucket, Prefix=key)
        return [
            upload["UploadId"]
            for page in pages
            for upload in page.get("Uploads", ())
            if upload["Key"] == key and upload["Initiated"] >= written  # which is of a whole second
        ]


_MAX_NOTE_BYTES = 4096
_alive: set[str] = set()  # temporary names of this process
# By path, the tokens of this process's attempts at a conditional write that may have arrived, or may still do so.
_in_doubt: dict[str, set[str]] = {}


def split(path: str) -> tuple[str, str]:
    """`s3://bucket/a/b` as ("bucket", "a/b")."""
    assert path.startswith(_SCHEME), path
    bucket, _, key = path.removeprefix(_SCHEME).partition("/")
    return bucket, key


def part_bytes(num_bytes: int, least: int = _LEAST_PART_BYTES) -> int:
    """A size of part with which so many bytes make no more parts than S3 allows."""
    needed = -(-num_bytes // _MAX_PARTS)
    return max(least, -(-needed // _MIB) * _MIB)


class S3Upload(Upload):
    """What every way of uploading an object shares."""

    num_threads = _NUM_THREADS

    def __init__(self, requests: S3Requests, path: str, num_bytes: int, piece_bytes: int, expected: str | None) -> None:
        self.piece_bytes = piece_bytes
        self.version = ""
        self._requests = requests
        self._path = path
        self._bucket, self._key = split(path)
        self._num_bytes = num_bytes
        self._token = secrets.token_hex(8)
        self._expected = expected
        self._metadata = {**requests.metadata, _TOKEN: self._token}

    def _send(self, operation: str, **arguments: Any) -> Answer:
        return self._requests.send(operation, self._bucket, Key=self._key, **arguments)

    def _make_visible(self, send: Callable[..., Answer]) -> None:
        """By `send`, which takes the conditions of the request."""
        try:
            self.version = self._send_bound(send, self._expected)["ETag"]
        except OSError as error:
            self.version = self._version_all_the_same(error, send)
        _in_doubt.pop(self._path, None)

    def _send_bound(self, send: Callable[..., Answer], expected: str | None) -> Answer:
        """Replacing nothing but `expected`; where the store takes no conditions, that is looked at before."""
        if expected is None:
            return send()
        if _CONDITIONS not in self._requests.unsupported:
            with contextlib.suppress(UnsupportedError):
                return send(**_conditions(expected))
        self._check_version(expected)
        answer = send()
        self._requests.unsupported.add(_CONDITIONS)
        return answer

    def _version_all_the_same(self, error: OSError, send: Callable[..., Answer]) -> str:
        """The answer was lost, or says what an earlier try of ours has brought about: is it our object that is there?

        Raises the error if it is not.
        """
        try:
            found = self._send("head_object")
        except OSError:
            found = {}
        token = found.get("Metadata", {}).get(_TOKEN)
        if token == self._token:
            return str(found["ETag"])
        if isinstance(error, FileNotFoundError) and not isinstance(error, UploadGoneError) and self._expected:
            error = ConflictError(errno.EEXIST, "somebody has removed it meanwhile")  # so says AWS
        if isinstance(error, ConflictError):
            if token in _in_doubt.get(self._path, ()):  # given up, and it has arrived: so that is what we replace
                return str(self._send_bound(send, str(found["ETag"]))["ETag"])
        elif self._expected is not None:
            _in_doubt.setdefault(self._path, set()).add(self._token)
        raise error from None

    def _check_version(self, expected: str | None) -> None:
        """Raise `ConflictError` for what is not to be replaced, where the commit itself can't be bound to that."""
        if expected is not None:
            try:
                version = str(self._send("head_object")["ETag"])
            except FileNotFoundError:
                version = ""
            if version != expected:
                raise ConflictError(errno.EEXIST, "somebody else has written it meanwhile")

    def reader(self) -> None:
        return None


class _SmallUpload(S3Upload):
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
        self._make_visible(
            partial(
                self._send,
                "put_object",
                num_bytes=len(contents),
                Body=contents,
                Metadata=self._metadata,
                ChecksumCRC32=checksum_text(crc32(contents)),
            )
        )

    def abort(self) -> None:
        self._contents = bytearray()


class _PartsUpload(S3Upload):
    """A multipart upload, whose parts are the pieces, with a journal of them."""

    def __init__(
        self,
        requests: S3Requests,
        path: str,
        num_bytes: int,
        piece_bytes: int,
        expected: str | None,
        journals: Journals,
    ) -> None:
        super().__init__(requests, path, num_bytes, piece_bytes, expected)
        self._parts: dict[int, Part] = {}
        self._sent_before: dict[int, Part] = {}
        self._has_whole_checksum = True
        self._journal = journals.take(path, num_bytes, piece_bytes)
        left = self._go_on(self._journal) if self._journal is not None else None
        self._multipart = left or self._begin(journals)

    def _begin(self, journals: Journals) -> _Multipart:
        multipart = self._begun()
        self._journal = journals.begin(
            UploadRecord(
                self._path,
                multipart.id,
                self._token,
                multipart.note.name,
                self._num_bytes,
                self.piece_bytes,
                self._has_whole_checksum,
            )
        )
        return multipart

    def _begun(self) -> _Multipart:
        """A new one, with a checksum of the whole object, where the store has such."""
        begin = partial(
            _Multipart.begun,
            self._requests,
            self._path,
            self._token,
            Metadata=self._metadata,
            ChecksumAlgorithm="CRC32",
        )
        unsupported = self._requests.unsupported
        if _WHOLE_CHECKSUMS not in unsupported:
            with contextlib.suppress(UnsupportedError):
                return begin(ChecksumType="FULL_OBJECT")
        multipart = begin()
        self._has_whole_checksum = False
        if _WHOLE_CHECKSUMS not in unsupported:
            unsupported.add(_WHOLE_CHECKSUMS)
            what = "the store keeps no checksums of whole objects: its parts are checked, one by one"
            log_quietly(logging.WARNING, f"{_SCHEME}{self._bucket}: {what}")
        return multipart

    def _go_on(self, journal: Journal) -> _Multipart | None:
        """With an upload that a process of ours has left; None when the store does not say what it has of it."""
        left = journal.upload
        note = Note(self._requests, self._path, left.note)
        multipart = _Multipart(self._requests, self._path, note, left.upload_id)
        there: dict[int, tuple[str, int]] = {}
        try:
            for page in multipart.pages("list_parts"):
                there |= {part["PartNumber"] - 1: (part["ETag"], part["Size"]) for part in page.get("Parts", ())}
        except OSError:  # gone (it may even have been completed), or nobody may ask: sending all of it costs less
            multipart.abort()
            journal.remove()
            return None
        self._token, self._has_whole_checksum = left.token, left.has_whole_checksum
        self._sent_before = {
            number: part for number, part in journal.parts.items() if there.get(number) == (part.etag, part.num_bytes)
        }
        return multipart

    def write(self, offset: int, view: memoryview) -> None:
        number, rest = divmod(offset, self.piece_bytes)
        assert rest == 0, "pieces are parts"
        crc = crc32(view)
        part = self._sent_before.get(number)
        if part is None or not _is_same(part, crc, view):
            part = self._send_part(number, crc, view)
        self._parts[number] = part

    def _send_part(self, number: int, crc: int, view: memoryview) -> Part:
        answer = self._multipart.send(
            "upload_part", num_bytes=len(view), PartNumber=number + 1, Body=view, ChecksumCRC32=checksum_text(crc)
        )
        part = Part(number, answer["ETag"], crc, len(view))
        if self._journal is not None:
            self._journal.add(part)
        return part

    def sync(self) -> None:
        """Every part is acknowledged: it is in the store, if not visible yet."""

    def commit(self) -> None:
        parts = [self._parts[number] for number in sorted(self._parts)]
        if sum(part.num_bytes for part in parts) != self._num_bytes:
            raise OSError(errno.EIO, "parts of the upload are missing")
        whole = 0
        for part in parts:
            whole = crc32_combine(whole, part.crc, part.num_bytes)
        listed = [
            {"PartNumber": part.number + 1, "ETag": part.etag, "ChecksumCRC32": checksum_text(part.crc)}
            for part in parts
        ]
        checksum = {"ChecksumCRC32": checksum_text(whole), "ChecksumType": "FULL_OBJECT"}
        self._make_visible(partial(self._multipart.complete, listed, **(checksum if self._has_whole_checksum else {})))
        self._multipart.is_over = True

    def close(self) -> None:
        self._multipart.forget()
        if self._journal is not None:
            self._journal.remove()

    def abort(self) -> None:
        self._multipart.abort()
        if self._journal is not None:
            self._journal.remove()


def _is_same(part: Part, crc: int, view: memoryview) -> bool:
    """Whether the store has these bytes already. The tag of a part is its MD5, unless a key service encrypts it."""
    if (part.crc, part.num_bytes) != (crc, len(view)):
        return False
    tag = part.etag.strip('"')
    return not _MD5.fullmatch(tag) or hashlib.md5(view, usedforsecurity=False).hexdigest() == tag


class Note:
    """The object beside an upload in parts that tells of it, for as long as it lasts; `name` is a temporary one."""

    def __init__(self, requests: S3Requests, path: str, name: str) -> None:
        self.name = name
        self._requests = requests
        self._path = path
        self._bucket, self._key = split(f"{os.path.dirname(path)}/{name}")
        _alive.add(name)

    @classmethod
    def of(cls, requests: S3Requests, path: str, token: str) -> Note:
        """One for an upload that begins."""
        return cls(requests, path, new_temporary_name(path, token))

    @staticmethod
    def parse(contents: bytes) -> tuple[str, str]:
        """Where the upload goes, and what the store calls it; "" where that is not known."""
        path, _, upload_id = contents.decode("utf-8", "replace").rpartition("\n")
        return path, upload_id

    def leave(self, upload_id: str = "") -> None:
        """Make it, or say in it which upload it is."""
        contents = memoryview(f"{self._path}\n{upload_id}".encode())
        self._requests.send("put_object", self._bucket, Key=self._key, Body=contents)

    def remove(self) -> None:
        """The upload is over. Safe to call twice."""
        if self.name in _alive:
            with contextlib.suppress(OSError):
                self._requests.send("delete_object", self._bucket, Key=self._key)
            self.hand_over()

    def hand_over(self) -> None:
        """To the next sweep: something of the upload may be left."""
        _alive.discard(self.name)


class _Multipart:
    """A multipart upload of the store's, with its note.

    Where the store may have begun one of which we know nothing, or ours can't be aborted, the note stays, for a sweep.
    """

    def __init__(self, requests: S3Requests, path: str, note: Note, upload_id: str) -> None:
        self.note, self.id = note, upload_id
        self.is_over = False
        self._requests = requests
        self._bucket, self._key = split(path)
        self._leaves_nothing = True

    @classmethod
    def begun(cls, requests: S3Requests, path: str, token: str, **arguments: Any) -> _Multipart:
        """A new one, its note first."""
        upload = cls(requests, path, Note.of(requests, path, token), "")
        try:
            upload.note.leave()
            answer = requests.send(
                "create_multipart_upload", upload._bucket, Key=upload._key, note_failure=upload._leave, **arguments
            )
            upload.id = answer["UploadId"]
            if upload._leaves_nothing:  # else there may be another one, begun by a request whose answer was lost
                upload.note.leave(upload.id)
        except BaseException:
            upload.abort()
            raise
        return upload

    def _leave(self) -> None:
        self._leaves_nothing = False

    def pages(self, operation: str) -> Iterator[Answer]:
        """All pages of what there is to say of it."""
        return self._requests.pages(operation, self._bucket, Key=self._key, UploadId=self.id)

    def send(self, operation: str, **arguments: Any) -> Answer:
        """What is done to the upload."""
        return self._requests.send(operation, self._bucket, Key=self._key, UploadId=self.id, **arguments)

    def complete(self, parts: Sequence[Mapping[str, Any]], **arguments: Any) -> Answer:
        return self.send("complete_multipart_upload", MultipartUpload={"Parts": parts}, **arguments)

    def abort(self) -> None:
        if self.id and not self.is_over:
            try:
                self.send("abort_multipart_upload")
            except UploadGoneError:
                pass
            except OSError:
                self._leave()
        self.is_over = True
        self.forget()

    def forget(self) -> None:
        """It is over, and nothing of it is left, if that is known."""
        if self._leaves_nothing:
            self.note.remove()
        else:
            self.note.hand_over()


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
            body = self._get(offset, len(view))
        except (ConflictError, FileNotFoundError) as error:
            raise OSError(errno.ESTALE, "it was replaced or deleted while it was read", self.path) from error
        if len(body) != len(view):
            raise EOFError(f"the file ends at byte {offset + len(body)}")
        view[:] = body

    def _get(self, offset: int, num_bytes: int) -> bytes | memoryview:
        answer = self._requests.send(
            "get_object",
            self._bucket,
            num_bytes=num_bytes,
            Key=self._key,
            Range=f"bytes={offset}-{offset + num_bytes - 1}",
            IfMatch=self.version,
        )
        body: bytes = answer["Body"]
        return body

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
    upload = _Multipart.begun(requests, destination, secrets.token_hex(8))
    try:
        parts = []
        for number, start in enumerate(range(0, source.num_bytes, _COPY_PART_BYTES), 1):
            stop = min(start + _COPY_PART_BYTES, source.num_bytes)
            answer = upload.send(
                "upload_part_copy",
                num_bytes=stop - start,
                PartNumber=number,
                CopySource=origin,
                CopySourceRange=f"bytes={start}-{stop - 1}",
                CopySourceIfMatch=source.version,
            )
            parts.append({"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]})
        upload.complete(parts)
        upload.is_over = True
    finally:
        upload.abort()


def _conditions(expected: str | None) -> dict[str, str]:
    if expected is None:
        return {}
    return {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
