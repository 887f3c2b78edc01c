"""An S3 server that throws away what it is sent, for the ceiling of a client: `python -m benchmarks.discarding_s3`.

Says its port on stdout, and serves until killed. Uploads only: nothing is kept, checked, or can be read.
"""

from __future__ import annotations

import asyncio
import re

_CHUNK_BYTES = 1 << 20
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_EXPECTS = re.compile(rb"\r\nexpect: *100-continue", re.IGNORECASE)
_CREATED = "<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
_COMPLETED = '<CompleteMultipartUploadResult><ETag>"1"</ETag></CompleteMultipartUploadResult>'


class _Connection(asyncio.BufferedProtocol):
    """One client. A head is collected until its blank line; of a body only the length is looked at."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._buffer = bytearray(_CHUNK_BYTES)
        self._head = b""
        self._rest = 0
        self._answer = b""

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, num_bytes: int) -> None:
        taken = min(num_bytes, self._rest)
        self._rest -= taken
        if self._answer and self._rest == 0:
            self._finish()
        if taken < num_bytes:
            self._head += bytes(self._buffer[taken:num_bytes])
            self._take_head()

    def _take_head(self) -> None:
        while b"\r\n\r\n" in self._head:
            head, _, self._head = self._head.partition(b"\r\n\r\n")
            length = _LENGTH.search(head)
            self._answer = _answer(head.split(b"\r\n", 1)[0].decode())
            if _EXPECTS.search(head):
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            size = int(length[1]) if length else 0
            taken = min(size, len(self._head))
            self._head, self._rest = self._head[taken:], size - taken
            if self._rest:
                return
            self._finish()

    def _finish(self) -> None:
        self._transport.write(self._answer)
        self._answer = b""


def _answer(request: str) -> bytes:
    method, target, _ = request.split(" ", 2)
    body, status = "", "200 OK"
    if method == "POST":
        body = _CREATED if "uploadId=" not in target else _COMPLETED
    elif method == "DELETE":
        status = "204 No Content"
    head = f'HTTP/1.1 {status}\r\nETag: "1"\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n'
    return (head + body).encode()


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
