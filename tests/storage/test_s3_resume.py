"""An upload that a process has left is gone on with by the next one, which sends only what is missing."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncckpt.storage.s3 import S3Storage
from storage.conformance import environment, make_content, write_in_pieces
from storage.s3_proxy import Fault, s3_proxy
from storage.s3_server import BUCKET, S3Server
from storage.test_s3 import PART_BYTES

NUM_BYTES = 4 * PART_BYTES + 1


class Counted(S3Storage):
    """Counts its requests."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_sent: Counter[str] = Counter()
        send = self.requests.send

        def count(operation: str, *args: Any, **arguments: Any) -> Any:
            self.num_sent[operation] += 1
            return send(operation, *args, **arguments)

        self.requests.send = count  # type: ignore[method-assign]


@pytest.fixture
def path() -> str:
    return f"s3://{BUCKET}/{secrets.token_hex(4)}/file"


@pytest.fixture
def options(server: S3Server, tmp_path: Path) -> dict[str, Any]:
    return {"options": server.options, "least_part_bytes": PART_BYTES, "journals": str(tmp_path / "journals")}


def leave_upload(options: dict[str, Any], path: str, content: bytes, part_numbers: list[int]) -> None:
    """By a process that is killed when these parts have been sent."""
    source = f"""
import json, sys
from asyncckpt.storage.s3 import S3Storage
from storage.claimed import claimed
content = sys.stdin.buffer.read()
with claimed(sys.argv[2].rsplit("/", 1)[0]):
    upload = S3Storage(**json.loads(sys.argv[1])).begin(sys.argv[2], len(content))
for number in {part_numbers}:
    offset = number * upload.piece_bytes
    upload.write(offset, memoryview(content)[offset : offset + upload.piece_bytes])
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", source, json.dumps(options), path]
    assert subprocess.run(command, input=content, env=environment(), check=False).returncode == -9


def put(storage: S3Storage, path: str, content: bytes) -> None:
    upload = storage.begin(path, len(content))
    write_in_pieces(upload, memoryview(content), upload.piece_bytes)
    upload.sync()
    upload.commit()
    upload.close()


def uploads(storage: S3Storage) -> list[str]:
    pages = storage.requests.pages("list_multipart_uploads", BUCKET)
    return [upload["Key"] for page in pages for upload in page.get("Uploads", ())]


@pytest.fixture
def storage(options: dict[str, Any]) -> Iterator[Counted]:
    storage = Counted(**options)
    before = uploads(storage)
    yield storage
    assert uploads(storage) == before
    assert not Path(options["journals"]).exists()


@pytest.mark.parametrize("part_numbers", [[], [0], [3, 1], [0, 1, 2, 3, 4]])
def test_only_what_is_missing_is_sent(
    server: S3Server, storage: Counted, options: dict[str, Any], path: str, part_numbers: list[int]
) -> None:
    content = make_content(NUM_BYTES)
    leave_upload(options, path, content, part_numbers)
    put(storage, path, content)
    assert storage.num_sent["upload_part"] == 5 - len(part_numbers)
    assert storage.num_sent["create_multipart_upload"] == 0
    assert server.client().cat_file(path) == content
    assert storage.list_names(path.rsplit("/", 1)[0]) == ["file"]


def test_parts_that_have_changed_are_sent_again(
    server: S3Server, storage: Counted, options: dict[str, Any], path: str
) -> None:
    content = bytearray(make_content(NUM_BYTES))
    leave_upload(options, path, bytes(content), [0, 1, 2])
    content[PART_BYTES + 5] ^= 1
    put(storage, path, bytes(content))
    assert storage.num_sent["upload_part"] == 3
    assert server.client().cat_file(path) == bytes(content)


def test_an_upload_that_is_gone_is_begun_anew(
    server: S3Server, storage: Counted, options: dict[str, Any], path: str
) -> None:
    """Somebody has aborted it (a lifecycle rule, say)."""
    content = make_content(NUM_BYTES)
    leave_upload(options, path, content, [0, 1])
    key = path.removeprefix(f"s3://{BUCKET}/")
    for page in storage.requests.pages("list_multipart_uploads", BUCKET, Prefix=key):
        for upload in page["Uploads"]:
            storage.requests.send("abort_multipart_upload", BUCKET, Key=key, UploadId=upload["UploadId"])
    put(storage, path, content)
    assert storage.num_sent["upload_part"] == 5
    assert server.client().cat_file(path) == content
    assert storage.list_names(path.rsplit("/", 1)[0]) == ["file"]


def test_an_upload_whose_parts_nobody_may_list_is_begun_anew(
    server: S3Server, storage: Counted, options: dict[str, Any], path: str
) -> None:
    """The save costs a whole upload then, and is not lost; the old one and its note are gone."""
    content = make_content(NUM_BYTES)
    leave_upload(options, path, content, [0, 1])
    with s3_proxy(server) as proxy:
        proxy.refusal = (403, "AccessDenied")
        proxy.arm(Fault("refuse", "list_parts checkpoint", times=1000))
        put(Counted(**options | {"options": proxy.server.options}), path, content)
        assert proxy.num_hits == 1
    assert server.client().cat_file(path) == content
    assert storage.list_names(path.rsplit("/", 1)[0]) == ["file"]


def test_another_size_is_another_upload(server: S3Server, storage: Counted, options: dict[str, Any], path: str) -> None:
    """What cannot be gone on with is left to a sweep, by who has the directory's lock."""
    leave_upload(options, path, make_content(NUM_BYTES), [0, 1])
    content = make_content(NUM_BYTES + 1)
    put(storage, path, content)
    assert storage.num_sent["upload_part"] == 5
    assert server.client().cat_file(path) == content
    assert len(storage.sweep(path.rsplit("/", 1)[0], has_lock=True)) == 1


def test_a_sweep_leaves_what_may_go_on(storage: Counted, options: dict[str, Any], path: str) -> None:
    """Of a writer process that has died, until the next one has taken it up."""
    content = make_content(NUM_BYTES)
    leave_upload(options, path, content, [0, 1])
    directory = path.rsplit("/", 1)[0]
    assert storage.sweep(directory, has_lock=True) == []
    put(storage, path, content)
    assert storage.num_sent["upload_part"] == 3


def test_a_torn_journal(storage: Counted, options: dict[str, Any], path: str) -> None:
    """Its writer died in the middle of a line: the part is sent again."""
    content = make_content(NUM_BYTES)
    leave_upload(options, path, content, [0, 1])
    (journal,) = Path(options["journals"]).iterdir()
    journal.write_bytes(journal.read_bytes()[:-3])
    put(storage, path, content)
    assert storage.num_sent["upload_part"] == 4
