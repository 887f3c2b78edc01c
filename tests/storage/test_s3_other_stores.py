"""Stores that speak S3, but not all of it: what they lack costs as little as can be."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator

import pytest

from asyncckpt.storage import claim, s3
from asyncckpt.storage.base import ConflictError
from asyncckpt.storage.s3 import S3Storage
from asyncckpt.storage.s3_requests import UnsupportedError
from storage.conformance import make_content, put_by_upload
from storage.s3_proxy import S3Proxy, s3_proxy
from storage.s3_server import S3Server

BUCKET = "others"
PART_BYTES = 5 << 20
NUM_BYTES = PART_BYTES + 1
CONDITIONS = {"if-match", "if-none-match"}


@pytest.fixture(scope="module")
def proxy(server: S3Server) -> Iterator[S3Proxy]:
    with s3_proxy(server, BUCKET) as proxy:
        yield proxy


@pytest.fixture
def storage(proxy: S3Proxy) -> S3Storage:
    proxy.arm(None)
    return S3Storage(proxy.server.options, least_part_bytes=PART_BYTES, beat_secs=0.2, lease_secs=2.0)


@pytest.fixture
def place(proxy: S3Proxy) -> str:
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


def test_what_a_store_does_not_implement_is_not_asked_for_again(storage: S3Storage, proxy: S3Proxy, place: str) -> None:
    """It will not have learned it a moment later."""
    proxy.lacking = {"x-amz-checksum-crc32"}
    with pytest.raises(
        UnsupportedError, match="put_object: NotImplemented: A header implies functionality that is not implemented"
    ):
        storage.replace(f"{place}/file", b"1")
    assert proxy.seen.count("put_object checkpoint") == 1


def test_without_checksums_of_whole_objects(
    storage: S3Storage, server: S3Server, proxy: S3Proxy, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of the parts remain; that is said once, and found out once."""
    proxy.lacking = {"x-amz-checksum-type"}
    contents = make_content(NUM_BYTES)
    for name in ("a", "b"):
        put_by_upload(storage, f"{place}/{name}", contents)
        assert server.client().cat_file(f"{place}/{name}") == contents
        with storage.open(f"{place}/{name}") as reader:
            assert reader.stored_checksum() is None
    assert proxy.seen.count("create_multipart_upload checkpoint") == 3
    assert caplog.text.count("the store keeps no checksums of whole objects") == 1
    assert storage.list_names(place) == ["a", "b"]


def test_a_claim_without_conditions_of_writes(
    storage: S3Storage, proxy: S3Proxy, place: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is advisory, as the log says; whoever comes later is refused all the same."""
    monkeypatch.setattr(claim, "_told", set())
    proxy.lacking = CONDITIONS
    lock = storage.lock(place, "the first")
    assert "has no conditional writes that can be used here" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    other = S3Storage(proxy.server.options, beat_secs=0.2, lease_secs=2.0)
    with pytest.raises(BlockingIOError, match="the first"):
        other.lock(place, "the second")
    lock.release()
    other.lock(place, "the second").release()


@pytest.mark.parametrize("num_bytes", [10, NUM_BYTES])
def test_what_a_write_replaces_is_looked_at_where_it_can_not_be_bound(
    storage: S3Storage, server: S3Server, proxy: S3Proxy, place: str, num_bytes: int
) -> None:
    """A file that is not the expected one stays."""
    proxy.lacking = CONDITIONS
    path, contents = f"{place}/file", make_content(num_bytes)
    server.client().pipe_file(path, b"theirs")
    with pytest.raises(ConflictError):
        storage.replace(path, contents, expected="")
    assert server.client().cat_file(path) == b"theirs"
    storage.replace(path, contents, expected=storage.version(path))
    assert server.client().cat_file(path) == contents


@pytest.fixture
def encrypting(proxy: S3Proxy) -> S3Storage:
    """With a key of the customer's."""
    proxy.arm(None)
    key = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": secrets.token_hex(16)}
    return S3Storage(proxy.server.options | {"s3_additional_kwargs": key}, least_part_bytes=PART_BYTES)


def test_a_copy_of_what_a_key_of_the_customer_encrypts(encrypting: S3Storage, server: S3Server, place: str) -> None:
    """The source is read with the key that it was written with, and the copy is not readable without it either."""
    contents = make_content(NUM_BYTES)
    put_by_upload(encrypting, f"{place}/file", contents)
    encrypting.link(f"{place}/file", f"{place}/link")
    assert encrypting.read(f"{place}/link", NUM_BYTES) == contents
    with pytest.raises(OSError, match=f"{place}/link"):
        S3Storage(server.options).read(f"{place}/link", NUM_BYTES)


def test_a_copy_in_parts_of_what_a_key_of_the_customer_encrypts(
    encrypting: S3Storage, proxy: S3Proxy, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is asked for with the source's key. (SeaweedFS knows no such copies, so the proxy looks at that.)"""
    monkeypatch.setattr(s3, "_MAX_COPY_BYTES", PART_BYTES)
    put_by_upload(encrypting, f"{place}/file", make_content(NUM_BYTES))
    proxy.lacking = {"x-amz-copy-source-server-side-encryption-customer-key"}
    with pytest.raises(UnsupportedError, match="upload_part_copy: NotImplemented: A header implies functionality"):
        encrypting.link(f"{place}/file", f"{place}/link")
