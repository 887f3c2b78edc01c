"""Object stores that fsspec opens, by servers that stand in for them: the contract."""

from __future__ import annotations

import errno
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch
from reliability.gates import FULL

from asyncckpt import CheckpointManager
from asyncckpt.storage.base import Storage
from asyncckpt.storage.fsspec_objects import ObjectStorage
from asyncckpt.storage.places import Places
from asyncckpt.storage.schemes import make_storage
from storage.conformance import StorageConformance, make_content, put_by_upload, write_in_pieces
from storage.object_servers import BUCKET, ObjectServer

PIECE_BYTES = 1 << 20


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's; ignored by default
class ObjectsConformance(StorageConformance):
    storage_class = "asyncckpt.storage.fsspec_objects:ObjectStorage"
    has_directories = False
    keeps_what_is_read = False
    shows_what_is_not_committed = False
    dead_upload_bytes = 2 * PIECE_BYTES + 1
    options: Mapping[str, Any] = {}
    server: ObjectServer

    # The store forgets what a dead writer has sent; nobody can see it.
    test_sweeps_what_a_killed_writer_left = None  # type: ignore[assignment]
    test_sweeps_only_that_directory = None  # type: ignore[assignment]
    sees_who_lives = False

    def use(self, server: ObjectServer, **more: Any) -> None:
        self.options = {
            "options": server.options,
            "has_buckets": True,
            "piece_bytes": PIECE_BYTES,
            "beat_secs": 0.2,
            "lease_secs": 3.0,
            **more,
        }
        self.server, self.client = server, server.client()

    @pytest.fixture
    def place(self) -> str:
        return f"{self.server.scheme}://{BUCKET}/{secrets.token_hex(4)}"

    def put(self, path: str, content: bytes) -> None:
        with self.client.open(path, "wb") as file:
            file.write(content)

    def get(self, path: str) -> bytes | None:
        try:
            content: bytes = self.client.cat_file(path)
        except FileNotFoundError:
            return None
        return content

    def list_names(self, directory: str) -> set[str]:
        try:
            return {path.rstrip("/").rsplit("/", 1)[1] for path in self.client.ls(directory, detail=False)}
        except FileNotFoundError:
            return set()

    @pytest.mark.parametrize("end", ["aborted", "committed"])
    @pytest.mark.parametrize("old", [None, b"old"])
    def test_a_large_upload_shows_at_its_commit(
        self, storage: Storage, place: str, old: bytes | None, end: str
    ) -> None:
        """Not while it is sent, and not when nobody wants it any more."""
        content = make_content(3 * PIECE_BYTES + 1)
        if old is not None:
            self.put(f"{place}/file", old)
        upload = storage.begin(f"{place}/file", len(content))
        write_in_pieces(upload, memoryview(content)[: 2 * PIECE_BYTES], PIECE_BYTES)
        assert self.get(f"{place}/file") == old
        if end == "committed":
            with pytest.raises(OSError, match="parts of the upload are missing"):
                upload.commit()
            assert self.get(f"{place}/file") == old
            for start in (2 * PIECE_BYTES, 3 * PIECE_BYTES):
                upload.write(start, memoryview(content)[start : start + PIECE_BYTES])
            upload.sync()
            upload.commit()
            upload.close()
        else:
            upload.abort()
        assert self.get(f"{place}/file") == (content if end == "committed" else old)

    def test_an_upload_left_open_at_exit(self, place: str) -> None:
        """The process ends, quietly, and its files' own ends publish nothing."""
        script = (
            "import json, sys\n"
            "from asyncckpt.storage.fsspec_objects import ObjectStorage\n"
            f"upload = ObjectStorage(**json.loads(sys.argv[1])).begin(sys.argv[2], {3 * PIECE_BYTES})\n"
            f"upload.write(0, memoryview(bytes({PIECE_BYTES})))\n"
        )
        command = [sys.executable, "-c", script, json.dumps(self.options), f"{place}/file"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
        assert self.get(f"{place}/file") is None

    @pytest.mark.parametrize("name", ["a#1", "a?generation=1", "a?versionid=1"])
    def test_names_of_older_versions(self, place: str, name: str) -> None:
        """Are refused where the client looks for such: what is replaced would be the file itself."""
        self.put(f"{place}/a", b"old")
        storage = ObjectStorage({**self.server.options, "version_aware": True}, has_buckets=True)
        with suppress(OSError):
            storage.replace(f"{place}/{name}", b"new")
            assert self.list_names(place) == {"a", name}
        assert self.get(f"{place}/a") == b"old"

    def test_a_bucket_that_is_not_there(self, place: str) -> None:
        """Is no empty directory: loads, listings, and saves of any size fail, and name it."""
        url, options = f"{self.server.scheme}://no-such-bucket/run", self.server.options
        storage, manager = Places(options), CheckpointManager(url, storage_options=options)
        acts: list[Callable[[], object]] = [
            lambda: storage.list_names(url),
            lambda: storage.replace(f"{url}/file", b"1"),
            lambda: put_by_upload(storage, f"{url}/file", bytes(33 << 20)),
            lambda: manager.load_latest(torch.nn.Linear(1, 1)),
        ]
        for act in acts:
            with pytest.raises(OSError, match="there is no bucket 'no-such-bucket'; make it first") as missing:
                act()
            assert missing.value.errno == errno.ENODEV
        manager.close(60)
        assert storage.list_names(f"{place}/nothing") == []

    def test_a_bucket_that_one_may_not_ask_for(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rights to objects alone are enough: then a bucket that is not seen counts as there."""
        storage = make_storage(self.server.scheme, self.server.options)
        assert isinstance(storage, ObjectStorage)

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EACCES, "not yours")

        monkeypatch.setattr(storage.find(place)[0], "info", refuse)
        assert storage.list_names(f"{place}/nothing") == []

    def remove(self, path: str) -> None:
        self.client.rm_file(path)


class TestGCS(ObjectsConformance):
    @pytest.fixture(autouse=True)
    def use_gcs(self, gcs: ObjectServer) -> None:
        self.use(gcs)


_SAVE_AS_USERS_DO = """
import json, sys
import fsspec, gcsfs, torch
import asyncckpt

async def bucket_type(self, bucket):  # which Google would tell, and no server here
    from gcsfs.extended_gcsfs import BucketType
    return BucketType.NON_HIERARCHICAL

gcsfs.GCSFileSystem._get_bucket_type = bucket_type
options, url = json.loads(sys.argv[1]), sys.argv[2]
fsspec.filesystem("gs", **options).ls(url.rsplit("/", 2)[0])
with asyncckpt.AsyncCheckpointSaver(storage_options=options, writer="thread") as saver:
    saver.save({"large": torch.arange(10_000_000.0)}, url).result(60)
    saver.save({"small": torch.ones(1)}, f"{url}.small").result(60)
assert torch.equal(asyncckpt.load(url, storage_options=options)["large"], torch.arange(10_000_000.0))
"""


def test_gs_as_users_have_it(gcs: ObjectServer) -> None:
    """With the class that gcsfs chooses by itself, loaded before; names are no patterns, and nothing is left over."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GCSFS")}
    url = f"gs://{BUCKET}/{secrets.token_hex(4)}/run [1]*/a*.pt"
    gcs.client().pipe_file(f"{url.rsplit('/', 2)[0]}/other", b"1")
    command = [sys.executable, "-c", _SAVE_AS_USERS_DO, json.dumps(gcs.options), url]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    names = gcs.client().ls(url.rsplit("/", 1)[0])
    assert [f"gs://{name}" for name in sorted(names)] == [url, f"{url}.small"]


if FULL:  # the same code, by another client and server

    class TestAzure(ObjectsConformance):
        refused = frozenset({"a#", "a\tb", "a?versionid=1"})

        @pytest.fixture(autouse=True)
        def use_azure(self, azure: ObjectServer) -> None:
            self.use(azure, can_copy=False)
