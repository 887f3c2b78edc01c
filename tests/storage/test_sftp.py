"""sftp, by a real server: the contract, and what only a connection can do to us."""

from __future__ import annotations

import errno
import os
import signal
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from asyncckpt.naming import is_temporary_name
from asyncckpt.storage.base import Storage
from asyncckpt.storage.sftp import SFTPStorage
from storage.conformance import StorageConformance, put_by_upload
from storage.sftp_server import SFTPServer

CLAIM_SECS = {"beat_secs": 0.2, "lease_secs": 3.0}


@pytest.fixture(scope="module")
def connected(ssh_server: SFTPServer) -> SFTPStorage:
    """One connection for all tests: each takes a good part of a second."""
    return SFTPStorage(ssh_server.options, **CLAIM_SECS)


class TestSFTP(StorageConformance):
    storage_class = "asyncckpt.storage.sftp:SFTPStorage"
    sees_who_lives = False
    options: Mapping[str, Any] = {}

    @pytest.fixture(autouse=True)
    def use(self, ssh_server: SFTPServer) -> None:
        self.options = {"options": ssh_server.options, **CLAIM_SECS}

    @pytest.fixture
    def storage(self, connected: SFTPStorage) -> Storage:
        return connected

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return SFTPServer.url(tmp_path)

    def put(self, path: str, content: bytes) -> None:
        _on_disk(path).write_bytes(content)

    def get(self, path: str) -> bytes | None:
        try:
            return _on_disk(path).read_bytes()
        except FileNotFoundError:
            return None

    def list_names(self, directory: str) -> set[str]:
        return set(os.listdir(_on_disk(directory)))

    def remove(self, path: str) -> None:
        _on_disk(path).unlink()


def _on_disk(path: str) -> Path:
    """The server serves this machine's own files."""
    return Path("/" + path.split("/", 3)[3])


# --- the connection ---


@pytest.fixture
def storage(ssh_server: SFTPServer) -> SFTPStorage:
    return SFTPStorage(ssh_server.options, **CLAIM_SECS)


def end_connections(server: SFTPServer) -> None:
    """Kill the server's processes that serve connections, as a network that is cut would look from here."""
    listening = server.process_id
    children = Path(f"/proc/{listening}/task/{listening}/children").read_text().split()
    assert children
    for child in children:
        os.kill(int(child), signal.SIGKILL)


def test_a_connection_that_is_cut(storage: SFTPStorage, ssh_server: SFTPServer, tmp_path: Path) -> None:
    """What is under way fails with an error that is worth a retry, which connects anew; nothing half is visible."""
    path = f"{SFTPServer.url(tmp_path)}/file"
    upload = storage.begin(path, 3)
    end_connections(ssh_server)
    with pytest.raises(OSError, match="connection is lost") as lost:
        while True:
            upload.write(0, memoryview(b"abc"))
    assert lost.value.errno == errno.ENETDOWN
    upload.abort()
    put_by_upload(storage, path, b"abc")
    assert os.listdir(tmp_path) == ["file"]


def test_a_name_that_looks_like_options(storage: SFTPStorage, tmp_path: Path) -> None:
    """Is a name, also where it is the first that the server is asked for."""
    put_by_upload(storage, f"{SFTPServer.url(tmp_path)}/a?port=1#b", b"1")
    assert os.listdir(tmp_path) == ["a?port=1#b"]


def test_more_uploads_than_one_connection_takes(storage: SFTPStorage, tmp_path: Path) -> None:
    """A server opens ten clients on one connection; then another connection is made."""
    uploads = [storage.begin(f"{SFTPServer.url(tmp_path)}/{number}", 1) for number in range(14)]
    for upload in uploads:
        upload.write(0, memoryview(b"1"))
        upload.sync()
        upload.commit()
    assert len(os.listdir(tmp_path)) == 14


def test_who_is_not_let_in(ssh_server: SFTPServer, tmp_path: Path) -> None:
    """The error names the server, and no secret."""
    options = {**ssh_server.options, "key_filename": None, "password": "canary-7c1e"}
    with pytest.raises(PermissionError, match="check the credentials") as refused:
        SFTPStorage(options).list_names(SFTPServer.url(tmp_path))
    assert refused.value.filename == "sftp://127.0.0.1"
    assert "canary" not in "".join(traceback.format_exception(refused.value))


def test_links_share_their_bytes(storage: SFTPStorage, tmp_path: Path) -> None:
    """Nothing is sent for a link, where the server makes hard links, as this one does."""
    (tmp_path / "source").write_bytes(b"1")
    storage.link(f"{SFTPServer.url(tmp_path)}/source", f"{SFTPServer.url(tmp_path)}/best")
    assert (tmp_path / "source").samefile(tmp_path / "best")


def test_links_where_the_server_makes_none(
    storage: SFTPStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second copy, by reading and writing."""

    def refuse(*_: object) -> None:
        raise OSError("Operation unsupported")

    monkeypatch.setattr("asyncckpt.storage.sftp.make_link", refuse)
    (tmp_path / "source").write_bytes(b"1" * 100_000)
    storage.link(f"{SFTPServer.url(tmp_path)}/source", f"{SFTPServer.url(tmp_path)}/best")
    assert (tmp_path / "best").read_bytes() == b"1" * 100_000
    assert not (tmp_path / "source").samefile(tmp_path / "best")


def test_files_and_their_directories_are_synced(ssh_server: SFTPServer, storage: SFTPStorage, tmp_path: Path) -> None:
    """As the server's own log tells: the file before its rename, its directory after it."""
    put_by_upload(storage, f"{SFTPServer.url(tmp_path)}/new/file", b"1")
    new, acts = tmp_path / "new", ("mkdir", "fsync", "posix-rename")
    lines = [line.split('"') for line in ssh_server.requests.read_text().splitlines() if line.startswith(acts)]
    told = [(act.split()[0], path) for act, path, *_ in lines if path.startswith(str(tmp_path))]
    [temporary] = [path for act, path in told if act == "posix-rename"]
    assert is_temporary_name(Path(temporary).name)
    assert [(act, Path(path)) for act, path in told] == [
        ("mkdir", new),
        ("fsync", tmp_path),
        ("fsync", Path(temporary)),
        ("posix-rename", Path(temporary)),
        ("fsync", new),
    ]
