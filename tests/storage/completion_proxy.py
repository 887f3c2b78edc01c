"""A way to an S3 server on which the completion of an upload in parts meets with an accident."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

_COMPLETION = re.compile(rb"^POST \S+[?&]uploadId=", re.MULTILINE)
_READ_BYTES = 1 << 16


class CompletionProxy:
    """Passes everything on, but holds completions (`holds`), or loses the answers to them, to those sent again too.

    `has_met` is set once that has happened. HTTP heads are taken to come in one piece, as they do here.
    """

    def __init__(self, server: str, *, holds: bool) -> None:
        place = urlsplit(server)
        assert place.port is not None
        self._server = (place.hostname, place.port)
        self._holds = holds
        self.has_met = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += (client, server)
                loses = threading.Event()
                for source, target, up in ((client, server, True), (server, client, False)):
                    thread = threading.Thread(target=self._pass, args=(source, target, up, loses))
                    thread.start()
                    self._threads.append(thread)

    def close(self) -> None:
        for open_socket in self._sockets:
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for open_socket in self._sockets:
            open_socket.close()

    def _pass(self, source: socket.socket, target: socket.socket, up: bool, loses: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_READ_BYTES):
                if up and _COMPLETION.search(data):
                    loses.set()
                    self.has_met.set()
                    if self._holds:
                        return
                elif not up and loses.is_set():
                    break
                target.sendall(data)
            for end in (source, target):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def completion_proxy(server: str, *, holds: bool) -> Iterator[CompletionProxy]:
    proxy = CompletionProxy(server, holds=holds)
    thread = threading.Thread(target=proxy.serve)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
