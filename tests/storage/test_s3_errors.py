"""What can't work with a store says so at once, with the URL and what to do, and harms nothing that is there."""

from __future__ import annotations

import secrets
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointManager, CheckpointWriteError
from asyncckpt.errors import MissingExtraError
from asyncckpt.storage import s3_requests
from storage.s3_proxy import Fault, S3Proxy, s3_proxy
from storage.s3_server import S3Server

BUCKET = "errors"
TIMEOUT_SECS = 120.0
# What is wrong: the bucket, what the server is opened with, and what the message has to say.
WRONG: dict[str, tuple[str, Callable[[S3Server], dict[str, Any]], str]] = {
    "no bucket": ("no-such-bucket", lambda server: server.options, "there is no bucket 'no-such-bucket'; make it"),
    "secret": (BUCKET, lambda server: server.options | {"secret": "wrong"}, "check key and secret in storage_options"),
    "key": (BUCKET, lambda server: server.options | {"key": "wrong"}, "check key and secret in storage_options"),
    "no server": (
        BUCKET,
        lambda server: server.options | {"endpoint_url": f"http://127.0.0.1:{closed_port()}"},
        "can't be reached; check the network and endpoint_url",
    ),
}


def closed_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def proxy(server: S3Server) -> Iterator[S3Proxy]:
    with s3_proxy(server, BUCKET) as proxy:
        yield proxy


@pytest.fixture
def place() -> str:
    return secrets.token_hex(4)


def error_of(action: Callable[[], object]) -> OSError | None:
    try:
        action()
    except OSError as error:
        return error
    return None


def save_by_saver(url: str, options: dict[str, Any]) -> BaseException | None:
    """In the writer process, as it is by default."""
    with AsyncCheckpointSaver(storage_options=options) as saver:
        return saver.save({"a": torch.arange(10.0)}, f"{url}/latest.pt").exception(TIMEOUT_SECS)


def save_by_manager(url: str, options: dict[str, Any]) -> BaseException | None:
    with CheckpointManager(url, writer="thread", storage_options=options) as manager:
        try:
            handle = manager.save(torch.nn.Linear(2, 2), None, epoch=0, global_step=1, val_loss=1.0)
        except CheckpointWriteError as error:
            return error
        assert handle is not None
        return handle.exception(TIMEOUT_SECS)


def load(url: str, options: dict[str, Any]) -> BaseException | None:
    return error_of(partial(asyncckpt.load, f"{url}/latest.pt", storage_options=options))


def load_by_manager(url: str, options: dict[str, Any]) -> BaseException | None:
    with CheckpointManager(url, storage_options=options) as manager:
        return error_of(partial(manager.load_latest, torch.nn.Linear(2, 2)))


def load_by_name(url: str, options: dict[str, Any]) -> BaseException | None:
    with CheckpointManager(url, storage_options=options) as manager:
        return error_of(partial(manager.load, "latest.pt", torch.nn.Linear(2, 2)))


WAYS = (save_by_saver, save_by_manager, load, load_by_manager)
CASES = [(wrong, way) for wrong in ("no bucket", "secret", "key", "no server") for way in WAYS]
CASES += [("secret", load_by_name)]


@pytest.mark.parametrize(("wrong", "way"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_the_error_says_what_to_do(
    proxy: S3Proxy, place: str, wrong: str, way: Callable[[str, dict[str, Any]], BaseException | None]
) -> None:
    """An OSError of ours or of the system, with the URL; nothing that can't help is tried again."""
    bucket, options, says = WRONG[wrong]
    url = f"s3://{bucket}/{place}"
    proxy.arm(None)
    error = way(url, options(proxy.server))
    assert isinstance(error, CheckpointWriteError if way in (save_by_saver, save_by_manager) else OSError)
    assert url in str(error)
    assert says in str(error)
    assert "disk" not in str(error)
    assert "directory must be" not in str(error)
    tries = Counter(kind for kind in proxy.seen if kind != "head bucket")  # which is asked for every object
    assert all(number == 1 for number in tries.values()), proxy.seen


@pytest.mark.parametrize("save", [save_by_saver, save_by_manager])
def test_what_is_there_stays(
    server: S3Server, place: str, save: Callable[[str, dict[str, Any]], BaseException | None]
) -> None:
    """A save that fails costs nothing, and once the cause is gone the next one succeeds."""
    url, client = f"s3://{BUCKET}/{place}", server.client()
    assert save(url, server.options) is None
    before = {path: client.cat_file(path) for path in client.find(url) if path.endswith((".pt", "registry.json"))}
    assert before
    assert save(url, server.options | {"secret": "wrong"}) is not None
    assert {path: client.cat_file(path) for path in before} == before
    assert save(url, server.options) is None


@pytest.mark.parametrize("package", ["s3fs", "tenacity"])
def test_a_missing_package_is_named(
    server: S3Server, place: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, where it is asked for, whatever is asked."""
    monkeypatch.setitem(sys.modules, package, None)
    url, says = f"s3://{BUCKET}/{place}", rf"needs {package}: pip install 'asyncckpt\[s3\]'"
    with AsyncCheckpointSaver(storage_options=server.options) as saver, pytest.raises(MissingExtraError, match=says):
        saver.save({}, f"{url}/latest.pt")
    for way in (save_by_manager, load_by_manager):
        with pytest.raises(MissingExtraError, match=says):
            way(url, server.options)
    with pytest.raises(MissingExtraError, match=says):
        asyncckpt.load(f"{url}/latest.pt", storage_options=server.options)


@pytest.mark.parametrize("code", ["QuotaExceeded", "AccessDenied", "Odd\u202e"])
def test_a_refusal_is_in_the_stores_own_words(
    proxy: S3Proxy, place: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one line, whatever they hold: only they may say why."""
    monkeypatch.setattr(proxy, "refusal", (403, code))
    proxy.arm(Fault("refuse", "put_object checkpoint", times=1000))
    error = save_by_saver(f"s3://{BUCKET}/{place}", proxy.server.options)
    assert f"({code}: Please reduce your request rate.)".replace("\u202e", "\\u202e") in str(error)
    assert "key and secret" not in str(error)


def test_a_refusal_without_words_names_the_right_to_list(proxy: S3Proxy, place: str) -> None:
    """What is not there can't be told from what may not be read, by who may not list."""
    proxy.arm(None)
    proxy.denied = {"head_object"}
    error = load(f"s3://{BUCKET}/{place}", proxy.server.options)
    assert isinstance(error, PermissionError)
    assert "(403: Forbidden); without the right to s3:ListBucket" in str(error)


class _Greeter(BaseHTTPRequestHandler):
    """A web server that is glad of everything."""

    protocol_version = "HTTP/1.1"

    def _greet(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET = do_PUT = do_POST = do_DELETE = _greet

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.mark.parametrize("way", [save_by_saver, load])
def test_what_is_no_s3_server_is_told(server: S3Server, place: str, way: Callable[..., BaseException | None]) -> None:
    """However well it answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Greeter) as greeter:
        thread = threading.Thread(target=greeter.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        options = server.options | {"endpoint_url": f"http://127.0.0.1:{greeter.server_port}"}
        error = way(f"s3://{BUCKET}/{place}", options)
        greeter.shutdown()
        thread.join()
    assert "what answers there does not speak S3" in str(error)
    assert "check endpoint_url" in str(error)


def test_a_token_that_no_request_can_hold_is_told_at_once(
    proxy: S3Proxy, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes from: one that was read from a file with its line end. Nothing is tried again."""
    for name, value in {**proxy.server.environment, "AWS_SESSION_TOKEN": "canary-71c4\n"}.items():
        monkeypatch.setenv(name, value)
    error = load(f"s3://{BUCKET}/{place}", {})
    assert isinstance(error, PermissionError)
    assert "the session token has a line end in it" in str(error)
    assert "canary-71c4" not in "".join(traceback.format_exception(error))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_requests, "_MAX_TRIES", 2)
    monkeypatch.setattr(s3_requests, "_FIRST_PAUSE_SECS", 0.01)


@pytest.mark.usefixtures("impatient")
def test_a_store_that_fails_for_a_while_is_no_damage(proxy: S3Proxy, place: str) -> None:
    """A load does not take an older checkpoint because of it, and opening does not take it for another writer."""
    url, options = f"s3://{BUCKET}/{place}", proxy.server.options
    proxy.arm(None)
    model = torch.nn.Linear(2, 2)
    with CheckpointManager(url, writer="thread", storage_options=options) as manager:
        for step in (1, 2):
            manager.save(model, None, epoch=1, global_step=step)
    with CheckpointManager(url, writer="thread", storage_options=options) as manager:
        for kind in ("get_object checkpoint", "head_object checkpoint", "get_object registry"):
            proxy.arm(Fault("refuse", kind, times=100))
            with pytest.raises(TimeoutError, match=url):
                manager.load_latest(model)
        proxy.arm(Fault("refuse", "get_object claim", times=100))
        with pytest.raises(CheckpointWriteError, match="reduce your request rate"):
            manager.save(model, None, epoch=1, global_step=3)
        proxy.arm(None)
        assert manager.load_latest(model)[1]["global_step"] == 2
