"""The connection between the trainer and its writer process: packets with descriptors, over a UNIX socket. No torch.

One packet is one message and one system call, so that neither threads nor signal handlers that send at the same time
need a lock, and a process that is killed leaves no half of a message. What is too large for a packet travels in a memfd
beside it.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import weakref

_MAX_PACKET_BYTES = 4 << 10  # so that a hundred fit into the socket before anybody receives
_BUFFER_BYTES = 1 << 20  # as far as the system lets us
_MAX_DESCRIPTORS = 2
_INLINE, _IN_MEMFD = b"\0", b"\1"
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})


class Connection:
    """One end. `send` is thread-safe and reentrant; one thread receives. A forked child closes its copy."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        _connections.add(self)

    def send(self, body: bytes, fds: tuple[int, ...] = ()) -> bool:
        """Send a message with copies of the descriptors; False if nobody is there any more.

        Blocks only while the other end does not receive and some hundred messages lie before it.
        """
        if len(body) <= _MAX_PACKET_BYTES:
            return self._send_packet(_INLINE + body, fds)
        memfd = os.memfd_create("asyncckpt-message", os.MFD_CLOEXEC)
        try:
            os.write(memfd, body)
            return self._send_packet(_IN_MEMFD, (*fds, memfd))
        finally:
            os.close(memfd)

    def _send_packet(self, packet: bytes, fds: tuple[int, ...]) -> bool:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([packet], rights, socket.MSG_NOSIGNAL)
        except OSError as error:
            if self._is_gone(error):
                return False
            raise
        return True

    def receive(self) -> tuple[bytes, list[int]] | None:
        """The next message, and its descriptors, which belong to the caller; None at the end. Blocks."""
        size = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        try:
            packet, ancillary, _, _ = self._socket.recvmsg(_MAX_PACKET_BYTES + 1, size, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            if self._is_gone(error):
                return None
            raise
        if not packet:
            return None
        fds = array.array("i")
        for level, kind, rights in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
        received = list(fds)
        if packet[:1] == _IN_MEMFD:
            memfd = received.pop()
            try:
                return os.pread(memfd, os.fstat(memfd).st_size, 0), received
            finally:
                os.close(memfd)
        return packet[1:], received

    def _is_gone(self, error: OSError) -> bool:
        return error.errno in _GONE or self._socket.fileno() == -1  # else it is a descriptor beside the message

    def wait(self, other_fd: int) -> bool:
        """Wait for a message (or the end), or until `other_fd` can be read. False if there is no message by then."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(other_fd, select.POLLIN)
        ready = dict(poll.poll())
        return self._socket.fileno() in ready

    def has_more(self) -> bool:
        """Whether something has arrived that is not received yet: messages, or the end."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def shut_down(self) -> None:
        """Let both ends receive what is under way, and then the end. From any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nobody may use it any more. Safe to call twice."""
        with contextlib.suppress(OSError):
            self._socket.close()


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _close_in_child() -> None:
    for connection in list(_connections):
        connection.close()


os.register_at_fork(after_in_child=_close_in_child)
