"""Requests to an SFTP server that paramiko has no calls for: many at a time, fsync, hard links. No torch.

All are for a client that no other thread uses meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from typing import Any

from asyncckpt.threads import log_quietly

_REQUEST_BYTES = 32768  # the most that every server takes


class _Answers:
    """Takes the answers to requests that are on their way together, in whatever order they come."""

    def __init__(self, client: Any, handle: bytes) -> None:
        self._client, self._handle = client, handle
        self._waiting: dict[int, Any] = {}
        self.by_request: dict[Any, tuple[int, Any]] = {}

    def ask(self, request: Any, kind: int, *arguments: Any) -> None:
        self._waiting[self._client._async_request(self, kind, self._handle, *arguments)] = request

    def await_all(self) -> None:
        while self._waiting:
            self._client._read_response()

    def _async_response(self, kind: int, message: Any, number: int) -> None:
        """Called by paramiko."""
        self.by_request[self._waiting.pop(number)] = (kind, message)


def write(client: Any, handle: bytes, offset: int, view: memoryview) -> None:
    """Write all of the view. Blocks until the server has it; raises OSError."""
    from paramiko.sftp import CMD_WRITE, int64

    answers = _Answers(client, handle)
    for start in range(0, len(view), _REQUEST_BYTES):
        answers.ask(start, CMD_WRITE, int64(offset + start), view[start : start + _REQUEST_BYTES])
    answers.await_all()
    for _, message in answers.by_request.values():
        client._convert_status(message)


def read_into(client: Any, handle: bytes, offset: int, view: memoryview) -> int:
    """Fill the view as far as the file goes; how many bytes that is. Blocks; raises OSError."""
    from paramiko.sftp import CMD_DATA, CMD_READ, int64

    position = 0
    while position < len(view):  # a server may answer with less than was asked for
        answers = _Answers(client, handle)
        for start in range(position, len(view), _REQUEST_BYTES):
            answers.ask(start, CMD_READ, int64(offset + start), min(_REQUEST_BYTES, len(view) - start))
        answers.await_all()
        for start, (kind, message) in sorted(answers.by_request.items()):
            if kind != CMD_DATA:
                try:
                    client._convert_status(message)
                except EOFError:
                    return position
                raise OSError("data were expected")
            contents = message.get_string()
            view[start : start + len(contents)] = contents
            position = start + len(contents)
            if position != min(start + _REQUEST_BYTES, len(view)):
                break
    return position


def sync_file(client: Any, handle: bytes) -> None:
    """fsync, where the server offers it. Raises OSError if that fails."""
    try:
        _extended(client, "fsync@openssh.com", handle)
    except OSError as error:
        if not _is_unsupported(error):
            raise
        _say_once("the SFTP server offers no fsync: whether what it was given survives a power cut only it knows")


def sync_directory(client: Any, place: str) -> None:
    """fsync of a directory, where the server lets it be opened, as OpenSSH's does."""
    try:
        directory = client.open(place, "r")
    except OSError:
        return
    with contextlib.closing(directory):
        sync_file(client, directory.handle)


def rename(client: Any, source: str, destination: str) -> None:
    """Rename, replacing what is there in one act. Raises OSError, with EOPNOTSUPP where the server can't replace."""
    try:
        client.posix_rename(source, destination)
    except OSError as error:
        if _is_unsupported(error):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from error
        raise


def make_link(client: Any, source: str, destination: str) -> None:
    """A hard link. Raises OSError, also where the server makes none."""
    _extended(client, "hardlink@openssh.com", source, destination)


def _is_unsupported(error: OSError) -> bool:
    """paramiko keeps the server's words, not its number."""
    return error.errno is None and "unsupported" in str(error).lower()


def _extended(client: Any, name: str, *arguments: Any) -> None:
    from paramiko.sftp import CMD_EXTENDED

    client._request(CMD_EXTENDED, name, *arguments)


_told: set[str] = set()


def _say_once(what: str) -> None:
    if what not in _told:
        _told.add(what)
        log_quietly(logging.WARNING, what)
