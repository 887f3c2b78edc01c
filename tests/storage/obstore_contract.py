"""The contract, held against obstore; `test_obstore.py` runs it in a process that ends with it.

A process that has used obstore must not fork any more, which other tests do. What obstore has no part in (names, locks,
links) is `test_s3.py`'s.
"""

from __future__ import annotations

import pytest

from asyncckpt.storage.base import Storage
from asyncckpt.storage.obstore_client import ObstoreStorage
from storage import test_s3
from storage.s3_server import S3Server


class TestObstore(test_s3.TestS3):
    storage_class = "asyncckpt.storage.obstore_client:ObstoreStorage"

    @pytest.fixture(autouse=True)
    def use_obstore(self, use: None) -> None:
        self.options = {**self.options, "never_forks": True, "least_bytes": 16 << 10}

    def test_versions_are_those_of_other_clients(self, storage: Storage, place: str) -> None:
        """What a commit says is what everybody else sees."""
        content = memoryview(bytearray(test_s3.PART_BYTES + 1))
        upload = storage.begin(f"{place}/file", len(content))
        upload.write(0, content)
        upload.commit()
        upload.close()
        assert upload.version == storage.version(f"{place}/file") != ""
        with storage.open(f"{place}/file") as reader:
            assert reader.version == upload.version

    def test_the_store_holds_every_byte_against_a_checksum(self, storage: Storage, place: str) -> None:
        """One over the whole file is kept with it."""
        content = memoryview(bytearray(test_s3.PART_BYTES + 1))
        upload = storage.begin(f"{place}/file", len(content))
        upload.write(0, content)
        upload.commit()
        upload.close()
        found = self.client.call_s3(
            "head_object",
            Bucket=test_s3.BUCKET,
            Key=f"{place}/file".removeprefix(f"s3://{test_s3.BUCKET}/"),
            ChecksumMode="ENABLED",
        )
        assert found["ChecksumType"] == "FULL_OBJECT"
        assert found["ChecksumCRC64NVME"]

    def test_encryption_is_asked_for(self, server: S3Server, place: str) -> None:
        """As s3fs would."""
        encrypted = {**server.options, "s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}
        storage = ObstoreStorage(encrypted, never_forks=True, least_bytes=0)
        upload = storage.begin(f"{place}/file", 3)
        upload.write(0, memoryview(b"123"))
        upload.commit()
        upload.close()
        found = self.client.call_s3(
            "head_object", Bucket=test_s3.BUCKET, Key=f"{place}/file".removeprefix(f"s3://{test_s3.BUCKET}/")
        )
        assert found["ServerSideEncryption"] == "AES256"
