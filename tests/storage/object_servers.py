"""Stand-ins for object stores that fsspec opens, each in a process of its own, for as long as the tests run."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from reliability.gates import not_checked

_MAX_START_SECS = 60.0
CONTAINER = "bucket"


@dataclass(frozen=True)
class ObjectServer:
    """What it is opened with, and as what."""

    scheme: str
    options: dict[str, Any]

    def client(self) -> Any:
        """For a look by other means than the code under test."""
        return fsspec.filesystem(self.scheme, **self.options, skip_instance_cache=True, use_listings_cache=False)


def _run(command: list[str], server: ObjectServer, directory: Path) -> Iterator[ObjectServer]:
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
    try:
        _await(server, process, directory / "log")
        yield server
    finally:
        process.kill()
        process.wait()


def _await(server: ObjectServer, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _MAX_START_SECS
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        with closing(socket.socket()) as probe:
            port = int(server.options["endpoint_url" if server.scheme == "gs" else "account_host"].split(":")[-1].split("/")[0])
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                server.client().mkdir(CONTAINER)
                return
        time.sleep(0.1)


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
