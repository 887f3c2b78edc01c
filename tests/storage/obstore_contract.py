"""The contract, held against obstore; `test_obstore.py` runs it in a process that ends with it.

A process that has used obstore must not fork any more, which other tests do. What obstore has no part in (names, locks,
links) is `test_s3.py`'s.
"""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from asyncckpt.storage.base import Storage, Upload
from asyncckpt.storage.obstore_client import ObstoreStorage, _Stores
from asyncckpt.storage.s3 import split
from asyncckpt.storage.s3_requests import Connection, S3Requests
from storage import test_s3
from storage.completion_proxy import CompletionProxy, completion_proxy
from storage.s3_server import BUCKET, KEY, SECRET, S3Server


class TestObstore(test_s3.TestS3):
    storage_class = "asyncckpt.storage.obstore_client:ObstoreStorage"

    @pytest.fixture(autouse=True)
    def use_obstore(self, use: None) -> None:
        self.options = {**self.options, "never_forks": True, "least_bytes": 16 << 10}

    def commit(self, storage: Storage, path: str, num_bytes: int = test_s3.PART_BYTES + 1) -> Upload:
        upload = storage.begin(path, num_bytes)
        upload.write(0, memoryview(bytes(num_bytes)))
        upload.sync()
        upload.commit()
        upload.close()
        return upload

    def look(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.call_s3("head_object", **_where(path), ChecksumMode="ENABLED")
        return found

    def unfinished(self, path: str) -> list[str]:
        """Uploads in parts that the store still knows."""
        answer = self.client.call_s3("list_multipart_uploads", Bucket=BUCKET)
        return [upload["Key"] for upload in answer.get("Uploads", ()) if upload["Key"] == _where(path)["Key"]]

    def test_versions_are_those_of_other_clients(self, storage: Storage, place: str) -> None:
        """What a commit says is what everybody else sees."""
        upload = self.commit(storage, f"{place}/file")
        assert upload.version == storage.version(f"{place}/file") == self.look(f"{place}/file")["ETag"]

    def test_the_store_holds_every_byte_against_a_checksum(self, storage: Storage, place: str) -> None:
        """One over the whole file is kept with it."""
        self.commit(storage, f"{place}/file")
        found = self.look(f"{place}/file")
        assert found["ChecksumType"] == "FULL_OBJECT"
        assert found["ChecksumCRC64NVME"]

    def test_encryption_is_asked_for(self, server: S3Server, place: str) -> None:
        """As s3fs would."""
        encrypted = {**server.options, "s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}
        self.commit(ObstoreStorage(encrypted, never_forks=True, least_bytes=0), f"{place}/file", 3)
        assert self.look(f"{place}/file")["ServerSideEncryption"] == "AES256"

    def test_an_aborted_file_leaves_nothing(self, storage: Storage, place: str) -> None:
        """Begun or written, the old file stays, alone."""
        self.put(f"{place}/file", b"old")
        for writes in (False, True):
            upload = storage.begin(f"{place}/file", test_s3.PART_BYTES)
            assert len(self.list_names(place)) == 2
            if writes:
                upload.write(0, memoryview(bytes(test_s3.PART_BYTES)))
            upload.abort()
            upload.abort()
            assert self.get(f"{place}/file") == b"old"
            assert self.list_names(place) == {"file"}

    def test_half_a_file_is_not_committed(self, storage: Storage, place: str) -> None:
        """Nothing is sent."""
        upload = storage.begin(f"{place}/file", test_s3.PART_BYTES)
        upload.write(0, memoryview(bytes(test_s3.PART_BYTES - 1)))
        with pytest.raises(OSError, match="missing"):
            upload.commit()
        upload.abort()
        assert self.get(f"{place}/file") is None

    def test_a_lost_answer(self, server: S3Server, storage: Storage, place: str) -> None:
        """The upload is complete, but nobody says so: it is found out that the object there is ours."""
        with completion_proxy(server.endpoint, holds=False) as proxy:
            self.commit(self.through(proxy), f"{place}/file")
            assert proxy.has_met.is_set()
        assert len(self.get(f"{place}/file") or b"") == test_s3.PART_BYTES + 1
        assert self.list_names(place) == {"file"}
        assert self.unfinished(f"{place}/file") == []

    def test_a_killed_process_leaves_what_a_sweep_finds(self, server: S3Server, storage: Storage, place: str) -> None:
        """In the middle of a commit: nothing is visible, and the parts that have been sent can be given back."""
        self.put(f"{place}/other", b"other")
        with completion_proxy(server.endpoint, holds=True) as proxy:
            self.options = {**self.options, "options": {**server.options, "endpoint_url": proxy.endpoint}}
            with self.uploading_process(f"{place}/file", is_claimed=True) as process:
                assert process.stdin is not None
                process.stdin.write("go on\n")
                process.stdin.flush()
                assert proxy.has_met.wait(60)
                assert self.get(f"{place}/file") is None
        assert self.unfinished(f"{place}/file") != []
        assert len(self.sweep(storage, place)) == 1
        assert self.unfinished(f"{place}/file") == []
        assert self.list_names(place) == {"other"}

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"bucket": "nobucket"}, "no bucket 'nobucket'"),
            ({"secret": "wrong"}, "check key and secret"),
            ({"endpoint": "http://127.0.0.1:9"}, "can't be reached"),
        ],
    )
    def test_what_obstore_says_is_explained(self, server: S3Server, wrong: dict[str, str], message: str) -> None:
        """In the words of the other client, and without a secret."""
        there = Connection(wrong.get("endpoint", server.endpoint), "us-east-1", KEY, wrong.get("secret", SECRET))
        requests = S3Requests({})
        requests.connection = lambda: there  # type: ignore[method-assign]
        stores = _Stores(requests, {})
        with pytest.raises(OSError, match=message) as caught:
            stores.put(wrong.get("bucket", BUCKET), "a", memoryview(bytes(10)), {}, 5)
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    def through(self, proxy: CompletionProxy) -> Storage:
        options = {**self.options["options"], "endpoint_url": proxy.endpoint}
        return ObstoreStorage(**{**self.options, "options": options})


def _where(path: str) -> dict[str, str]:
    bucket, key = split(path)
    return {"Bucket": bucket, "Key": key}
