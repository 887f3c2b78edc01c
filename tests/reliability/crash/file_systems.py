"""File systems that can do less, fail, or stand still: put underneath a recorder."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from storage.seam import FUNCTIONS, raising
from storage.test_links import copy_bytes

from asyncckpt.naming import is_checkpoint_name
from asyncckpt.storage import system_calls
from asyncckpt.storage.local import LocalUpload

TIMEOUT_SECS = 60
RUN = "run"  # the managed directory


@contextmanager
def held_before_commit(name: str) -> Iterator[Callable[[], None]]:
    """The first upload to `name` stands still once it is synced, until the returned function is called."""
    released = threading.Event()
    sync = LocalUpload.sync

    def held(upload: LocalUpload) -> None:
        sync(upload)
        if os.path.basename(upload._path) == name:
            assert released.wait(TIMEOUT_SECS)

    with mock.patch.object(LocalUpload, "sync", held):
        try:
            yield released.set
        finally:
            released.set()


@contextmanager
def patched(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """One call of the seam does this instead."""
    with mock.patch.object(system_calls, name, function):
        yield


@contextmanager
def file_system(way: str, *, direct: bool = True) -> Iterator[None]:
    """One that can link in this way, and may refuse O_DIRECT."""

    def open_buffered(path: str, flags: int, mode: int = 0o666) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd: int = FUNCTIONS["open_file"](path, flags, mode)
        return fd

    with ExitStack() as stack:
        cloning = copy_bytes if way == "clone" else raising(errno.EOPNOTSUPP, name="clone")
        stack.enter_context(patched("clone", cloning))
        if way != "hard link":
            stack.enter_context(patched("link", raising(errno.EPERM, name="link")))
        if not direct:
            stack.enter_context(patched("open_file", open_buffered))
        yield


def raising_once(name: str, error: int, of: Callable[[Any], bool], turn: int) -> Callable[..., Any]:
    """The call itself, but at its `turn`-th time for something (its last argument) that `of` is about."""
    num_calls = 0

    def call(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += of(args[-1])
        if of(args[-1]) and num_calls == turn:
            raise OSError(error, os.strerror(error))
        return FUNCTIONS[name](*args)

    return call


def is_directory(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def is_file(fd: int) -> bool:
    return not is_directory(fd)


def is_checkpoint_directory(fd: int) -> bool:
    return is_directory(fd) and os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) == RUN


def is_checkpoint(path: str) -> bool:
    return is_checkpoint_name(os.path.basename(path))


def is_any(path: str) -> bool:
    return True
