"""A real SFTP server, OpenSSH's, in a process of its own, for as long as the tests run."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko
import pytest

from storage.background import Background, background

_MAX_START_SECS = 30.0


@dataclass(frozen=True)
class SFTPServer:
    """Where it is, and what it is opened with. It serves this machine's own files."""

    port: int
    key_file: Path
    requests: Path  # the log of them
    process_id: int

    @property
    def options(self) -> dict[str, Any]:
        """As fsspec's sftp takes them."""
        return {
            "port": self.port,
            "username": getpass.getuser(),
            "key_filename": str(self.key_file),
            "look_for_keys": False,
            "allow_agent": False,
        }

    @staticmethod
    def url(path: Path) -> str:
        return f"sftp://127.0.0.1{path}"


def sshd() -> str | None:
    """The server's program, which wants to be called by its whole path."""
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _subsystem() -> str:
    """The program that does what SFTP asks."""
    places = ("/usr/lib/openssh", "/usr/libexec/openssh", "/usr/lib/ssh", "/usr/libexec")
    return next(path for place in places if os.path.exists(path := f"{place}/sftp-server"))


@contextmanager
def sftp_server(directory: Path) -> Iterator[SFTPServer]:
    """A server whose keys and log are in `directory`. Only root, or the user it logs in, can run it."""
    program = sshd()
    assert program is not None, "apt-get install openssh-server"
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(command, check=True)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "HostKey": directory / "host",
        "AuthorizedKeysFile": directory / "user.pub",
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "Subsystem": f"sftp {_subsystem()} -e -l VERBOSE 2>>{directory / 'requests'}",
    }
    (directory / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    os.makedirs("/run/sshd", exist_ok=True)  # where root's has no privileges; Debian's service makes it
    with background([program, "-D", "-e", "-f", directory / "config"], directory / "log") as process:
        server = SFTPServer(port, directory / "user", directory / "requests", process.pid)
        _await(server, process)
        yield server


def _await(server: SFTPServer, process: Background) -> None:
    deadline = time.monotonic() + _MAX_START_SECS
    while True:
        process.check(deadline)
        with paramiko.SSHClient() as client:
            client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
            try:
                client.connect("127.0.0.1", **server.options)
                return
            except (OSError, paramiko.SSHException):
                time.sleep(0.05)


@pytest.fixture(scope="session")
def ssh_server() -> Iterator[SFTPServer]:
    from reliability.gates import not_checked

    if sshd() is None:
        not_checked("there is no sshd")
    with tempfile.TemporaryDirectory() as directory, sftp_server(Path(directory)) as running:
        yield running
