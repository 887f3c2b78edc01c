"""`asyncckpt doctor` on URLs: a real S3 server, and stores that lack something."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from storage.s3_server import KEY, SECRET, S3Server

from asyncckpt.doctor import store
from asyncckpt.doctor.examination import STORE_CHECKS
from asyncckpt.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding, Place
from asyncckpt.storage.places import Places
from asyncckpt.storage.s3 import S3Storage
from asyncckpt.storage.s3_requests import S3Requests
from cli.running import error_of, run, run_json
from cli.test_app import drive

BUCKET = "doctor"


@pytest.fixture
def url(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place in which nothing may be left."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = server.client()
    if not client.exists(BUCKET):
        client.mkdir(BUCKET)
    prefix = secrets.token_hex(4)
    yield f"s3://{BUCKET}/{prefix}/run"
    requests = S3Requests(server.options)
    left = requests.send("list_objects_v2", BUCKET, Prefix=f"{prefix}/").get("Contents", ())
    assert [entry["Key"] for entry in left if not entry["Key"].endswith("/")] == []
    assert not requests.send("list_multipart_uploads", BUCKET, Prefix=prefix).get("Uploads")


@pytest.fixture
def place(url: str, server: S3Server) -> Place:
    return Place(url, f"{url}/asyncckpt-doctor-0123", storage=Places(server.options))


def test_a_good_store(url: str, server: S3Server) -> None:
    """Every check has its finding, without torch; and no secret is told."""
    done = drive("doctor", url)
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert SECRET not in done.stdout
    assert "does not exist yet" not in done.stdout
    for words in (
        "conditional writes are honoured",
        "the store keeps a checksum of the whole",
        server.endpoint,
        "s3fs",
    ):
        assert words in done.stdout
    report = run_json("doctor", url)
    assert [finding["name"] for finding in report["findings"]] == [check.name for check in STORE_CHECKS]
    assert {finding["status"] for finding in report["findings"][:9]} == {OK}


@pytest.mark.parametrize(
    ("variable", "value", "found"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "check key and secret"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1", "can't be reached"),
    ],
)
def test_a_store_that_can_not_be_used(
    url: str, variable: str, value: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One problem, what to do about it, and nothing more is tried there."""
    monkeypatch.setenv(variable, value)
    report = run_json("doctor", url, code=1)
    first, second = report["findings"][:2]
    assert first["status"] == PROBLEM
    assert found in first["found"]
    assert first["advice"]
    assert [finding["name"] for finding in report["findings"]] == [
        check.name for check in STORE_CHECKS if not check.writes
    ]
    assert second["name"] == "client"


def test_a_bucket_that_is_not_there(url: str) -> None:
    shown = run("doctor", "s3://no-such-bucket/run", code=1).stdout
    assert "there is no bucket 'no-such-bucket'; make it first" in shown
    assert "credentials don't belong" in error_of("doctor", f"s3://{KEY}:{SECRET}@bucket/run")


def test_versioning_and_locks(server: S3Server) -> None:
    """What keeps the space of what is deleted is told."""
    bucket = f"versions-{secrets.token_hex(4)}"
    server.client().mkdir(bucket)
    requests = S3Requests(server.options)
    place = Place(f"s3://{bucket}/run", "", storage=Places(server.options))
    assert store.check_versions(place).status == OK
    requests.send("put_bucket_versioning", bucket, VersioningConfiguration={"Status": "Enabled"})
    finding = store.check_versions(place)
    assert (finding.status, finding.found) == (NOTE, "versioning is on")
    requests.send("put_object_lock_configuration", bucket, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled"})
    finding = store.check_versions(place)
    assert (finding.status, finding.found) == (WARNING, "Object Lock is on")


class Lacking:
    """A store that refuses some requests, or takes no notice of their conditions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused: dict[str, int] = {}
        self.ignored: set[str] = set()
        send = S3Requests.send

        def lack(requests: S3Requests, operation: str, bucket: str, **arguments: Any) -> Any:
            if operation in self.refused:
                raise OSError(self.refused[operation], "not here")
            return send(
                requests, operation, bucket, **{name: arguments[name] for name in arguments.keys() - self.ignored}
            )

        monkeypatch.setattr(S3Requests, "send", lack)


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lacking]:
    with monkeypatch.context() as patch:
        yield Lacking(patch)


@pytest.mark.parametrize(
    ("refused", "check", "status", "found"),
    [
        ("list_objects_v2", "reaching", PROBLEM, "not here"),
        ("put_object", "writing", PROBLEM, "no object can be written and read: not here"),
        ("get_object", "writing", PROBLEM, "no object can be written and read: not here"),
        ("put_object", "conditions", PROBLEM, "conditional writes fail: not here"),
        ("copy_object", "copying", PROBLEM, "no object can be copied: not here"),
        ("create_multipart_upload", "parts", PROBLEM, "no upload in parts can be begun: not here"),
        ("upload_part", "speed", PROBLEM, "no file can be written in parts: not here"),
        ("get_bucket_versioning", "versions", NOTE, "unknown: not here"),
    ],
)
def test_what_is_refused(refused: str, check: str, status: str, found: str, place: Place, lacking: Lacking) -> None:
    """By the check whose business it is."""
    lacking.refused[refused] = errno.EACCES
    finding = _find(check, place)
    assert (finding.status, finding.found) == (status, found)


@pytest.mark.parametrize("refused", ["list_multipart_uploads", "list_parts", "abort_multipart_upload"])
def test_what_is_left_of_uploads_can_not_be_cleaned_up(
    refused: str, place: Place, lacking: Lacking, server: S3Server
) -> None:
    """It is told, with what these checks themselves have left for it: no more than one, and no note of it."""
    lacking.refused[refused] = errno.EACCES
    finding = _find("parts", place)
    assert finding.status == WARNING
    assert finding.found.startswith("what is left of uploads in parts can't be cleaned up: not here")
    lacking.refused.clear()
    left = _find("left", place)
    assert (left.status == WARNING) == (refused == "abort_multipart_upload")
    for upload in _uploads(server, place):
        assert upload["UploadId"] in finding.found
        assert upload["UploadId"] in left.found
        server.client().call_s3("abort_multipart_upload", Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
    assert place.storage.list_names(place.directory) == []


def _uploads(server: S3Server, place: Place) -> list[dict[str, str]]:
    prefix = place.probe.removeprefix(f"s3://{BUCKET}/")
    answer = server.client().call_s3("list_multipart_uploads", Bucket=BUCKET, Prefix=prefix)
    uploads: list[dict[str, str]] = answer.get("Uploads", [])
    return uploads


def test_what_can_not_be_deleted(place: Place, lacking: Lacking) -> None:
    """Retention would free nothing; no later check takes what is left for its own, and all of it is told."""
    lacking.refused["delete_object"] = errno.EACCES
    finding = _find("writing", place)
    assert (finding.status, finding.choice) == (WARNING, "retention frees no space")
    for check in ("conditions", "copying", "parts", "speed"):
        assert _find(check, place).status in (OK, NOTE)
    left = _find("left", place)
    lacking.refused.clear()
    names = place.storage.list_names(place.directory)
    assert (left.status, len(names) >= 5) == (WARNING, True)
    assert all(f"{place.directory}/{name}" in left.found for name in names)
    place.storage.delete([f"{place.directory}/{name}" for name in names])


@pytest.mark.parametrize("ignored", ["IfNoneMatch", "IfMatch"])
def test_conditions_that_are_ignored(ignored: str, place: Place, lacking: Lacking) -> None:
    """Two writers would not notice each other."""
    lacking.ignored.add(ignored)
    finding = _find("conditions", place)
    assert (finding.status, finding.choice) == (WARNING, "nobody is kept out")


@pytest.mark.parametrize("ignored", ["IfNoneMatch", "IfMatch"])
def test_a_store_that_ignores_conditions_is_told_of(
    ignored: str, server: S3Server, lacking: Lacking, caplog: pytest.LogCaptureFixture
) -> None:
    """By whoever opens a directory for writing there; a second writer is refused all the same."""
    storage = S3Storage(server.options, beat_secs=0.1, lease_secs=1.0)
    for ignoring in (False, True):
        lacking.ignored = {ignored} if ignoring else set()
        bucket = f"conditions-{secrets.token_hex(4)}"  # once per bucket is enough
        server.client().mkdir(bucket)
        directory = f"s3://{bucket}/run"
        lock = storage.lock(directory, "the first")
        assert ("no conditional writes" in caplog.text) == ignoring
        with pytest.raises(BlockingIOError, match="the first"):
            storage.lock(directory, "the second")
        lock.release()


def test_a_store_that_changes_bytes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or answers with others."""
    send = S3Requests.send

    def change(requests: S3Requests, operation: str, bucket: str, **arguments: Any) -> Any:
        answer = send(requests, operation, bucket, **arguments)
        if operation == "get_object":
            answer["Body"] = bytes([answer["Body"][0] ^ 1]) + answer["Body"][1:]
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(S3Requests, "send", change)
        for check in ("writing", "speed"):
            finding = _find(check, place)
            assert finding.status == PROBLEM
            assert finding.found.endswith("reads as another one")


def test_an_interrupt_leaves_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an upload in parts."""
    num_begun = 0
    begin = S3Storage.begin

    def interrupt(self: S3Storage, path: str, num_bytes: int, *, expected: str | None = None) -> Any:
        nonlocal num_begun
        num_begun += 1
        upload = begin(self, path, num_bytes, expected=expected)
        if num_bytes > upload.piece_bytes and num_begun > 1:
            monkeypatch.setattr(type(upload), "sync", _interrupt)
        return upload

    with monkeypatch.context() as patch:
        patch.setattr(S3Storage, "begin", interrupt)
        run("doctor", url, code=130)


def _interrupt(self: object) -> None:
    raise KeyboardInterrupt


def _find(name: str, place: Place) -> Finding:
    from asyncckpt.doctor.examination import _run

    return _run(next(check for check in STORE_CHECKS if check.name == name), place)
