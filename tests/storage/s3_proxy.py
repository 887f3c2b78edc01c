"""A proxy before an S3 server that knows what a request is about, and does to it what a plan says. In threads.

Every request has a kind, as in "upload_part checkpoint" or "put_object registry"; a `Fault` names a kind and which of
its requests it strikes, so that the same plan strikes the same moment in every run.
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, get_args
from urllib.parse import parse_qs, urlsplit

from asyncckpt.naming import ALIVE_NAME, BEST_NAME, CLAIM_NAME, REGISTRY_NAME, is_temporary_name
from storage.s3_server import S3Server

# cut: half of the body arrives, then the connection is gone. refuse: with `S3Proxy.refusal`. lose: it is done, but the
# answer is lost. stall: nothing arrives, and no answer comes. hang: it is done, and no answer comes. delay: late, but
# well. corrupt: a bit of the request's body has changed on the way.
Harm = Literal["cut", "refuse", "lose", "stall", "hang", "delay", "corrupt"]
HARMS: tuple[Harm, ...] = get_args(Harm)
ANY = "any"  # kind of request

_DELAY_SECS = 0.3
_REFUSAL = (503, "SlowDown")
_NAMES = {REGISTRY_NAME: "registry", CLAIM_NAME: "claim", ALIVE_NAME: "beat", BEST_NAME: "best"}


@dataclass(frozen=True)
class Fault:
    """What happens to the `number`-th request of a kind (from 1) that begins after `arm`, and to `times - 1` more."""

    harm: Harm
    kind: str
    number: int = 1
    times: int = 1

    def __str__(self) -> str:
        return f"{self.harm} {self.kind} {self.number}" + (f"x{self.times}" if self.times > 1 else "")


def kind_of(method: str, target: str, is_copy: bool) -> str:
    """The operation, as boto3's client has it, and what it is done to."""
    url = urlsplit(target)
    query = parse_qs(url.query, keep_blank_values=True)
    key = url.path.lstrip("/").partition("/")[2]
    if not key:
        return "list_multipart_uploads" if "uploads" in query else f"{method.lower()} bucket"
    of_upload = {
        "POST": "create_multipart_upload" if "uploads" in query else "complete_multipart_upload",
        "PUT": "upload_part",
        "DELETE": "abort_multipart_upload",
        "GET": "list_parts",
    }
    of_object = {"PUT": "copy_object" if is_copy else "put_object", "DELETE": "delete_object"}
    is_of_upload = "uploadId" in query or "uploads" in query
    operation = (of_upload if is_of_upload else of_object).get(method, f"{method.lower()}_object")
    name = key.rpartition("/")[2]
    return f"{operation} {'note' if is_temporary_name(name) else _NAMES.get(name, 'checkpoint')}"


class S3Proxy:
    """Where it is (`server`), and what it does. Thread-safe."""

    def __init__(self, behind: S3Server) -> None:
        target = urlsplit(behind.endpoint)
        self._behind = (target.hostname or "", target.port or 0)
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._counts: Counter[str] = Counter()
        self._released = threading.Event()
        self.hit = threading.Event()
        self.num_hits = 0
        self.seen: list[str] = []  # the kinds of all requests since `arm`
        self.refusal = _REFUSAL  # status and code
        self.denied: set[str] = set()  # operations that are answered with 403, whatever they are done to
        self.lacking: set[str] = set()  # headers of writes, in lower case, that are answered with 501
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.proxy = self
        self.server = S3Server(f"http://127.0.0.1:{self._http.server_port}")

    def arm(self, fault: Fault | None) -> None:
        """From now on count anew, and strike. Whatever an earlier fault holds is let go, to nobody."""
        with self._lock:
            self._released.set()
            self._released = threading.Event()
            self._fault, self._counts, self.seen = fault, Counter(), []
            self.denied, self.lacking = set(), set()
            self.hit, self.num_hits = threading.Event(), 0

    def strike(self, kind: str) -> tuple[Harm | None, threading.Event]:
        """What is to happen to this request, and the end of a stall."""
        with self._lock:
            self.seen.append(kind)
            fault = self._fault
            if fault is None or fault.kind not in (kind, ANY):
                return None, self._released
            self._counts[fault.kind] += 1
            if not fault.number <= self._counts[fault.kind] < fault.number + fault.times:
                return None, self._released
            self.num_hits += 1
            self.hit.set()
            return fault.harm, self._released

    @contextmanager
    def running(self) -> Iterator[S3Proxy]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.arm(None)
            self._http.shutdown()
            self._http.server_close()
            thread.join()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self._behind, timeout=60)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: S3Proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are our business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy, kind = self.server.proxy, kind_of(self.command, self.path, "x-amz-copy-source" in self.headers)
        harm, released = proxy.strike(kind)
        if harm == "refuse":
            self._refuse(*proxy.refusal, "Please reduce your request rate.")
            return
        if kind.partition(" ")[0] in proxy.denied or kind in proxy.denied:
            self._refuse(403, "AccessDenied", "Not for you.")
            return
        if self.command in ("PUT", "POST") and proxy.lacking & {name.lower() for name in self.headers}:
            self._refuse(501, "NotImplemented", "A header implies functionality that is not implemented.")
            return
        if harm == "cut":
            self._send_half(body)
            self._hang_up()
            return
        if harm == "stall":
            released.wait()
            self._hang_up()
            return
        if harm == "delay":
            released.wait(_DELAY_SECS)
        if harm == "corrupt" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        status, headers, answer = self._ask(body)
        if harm == "hang":
            released.wait()
        if harm in ("lose", "hang"):
            self._hang_up()
            return
        self._answer(status, headers, answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def _begin(self, connection: http.client.HTTPConnection) -> None:
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                connection.putheader(name, value)
        connection.endheaders()

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = self.server.proxy.connect()
        try:
            self._begin(connection)
            connection.send(body)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _send_half(self, body: bytes) -> None:
        connection = self.server.proxy.connect()
        self._begin(connection)
        connection.send(body[: len(body) // 2])
        connection.close()

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self._answer(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else body.encode())

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_proxy(behind: S3Server, bucket: str = "") -> Iterator[S3Proxy]:
    """A proxy on a port of its own, until the end of the block; the bucket is made, if it is not there."""
    client = behind.client()
    if bucket and not client.exists(bucket):
        client.mkdir(bucket)
    with S3Proxy(behind).running() as proxy:
        yield proxy
