"""What a test sees of files, descriptors and children, by other means than the code under test."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from asyncckpt.naming import is_temporary_name


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def temporaries(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if is_temporary_name(path.name)]


def descriptors() -> dict[tuple[int, int, int], bool]:
    """This process's descriptors, each with the file that it is open on, under whatever name; and which are sockets."""
    found: dict[tuple[int, int, int], bool] = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the one that has listed them
            status = os.fstat(number)
            found[number, status.st_dev, status.st_ino] = stat.S_ISSOCK(status.st_mode)
    return found


@contextmanager
def no_descriptor_leaks() -> Iterator[None]:
    """Nothing is left open, and nothing closed that was open before, but for what a server has hung up meanwhile."""
    before = descriptors()
    yield
    after = descriptors()
    assert not after.keys() - before.keys()
    assert all(before[gone] for gone in before.keys() - after.keys())


def open_in_forked_child(directory: Path) -> list[str]:
    """What a child that is forked now holds open below the directory."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads may be running
        pid = os.fork()
    if pid == 0:
        links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        held = [os.readlink(link) for link in links if os.path.lexists(link)]
        os.write(write, "\0".join(path for path in held if path.startswith(f"{directory}")).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        paths = answer.read()
    os.waitpid(pid, 0)
    return paths.split("\0") if paths else []


@contextmanager
def forked_child() -> Iterator[Callable[[], None]]:
    """A child that does nothing until told to exit."""
    read, write = os.pipe()
    started, start = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads may be running
        pid = os.fork()
    if pid == 0:
        os.close(write)
        os.write(start, b"1")
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    os.read(started, 1)  # what runs in the child at fork has run
    os.close(started)
    os.close(start)
    ended = False

    def end() -> None:
        nonlocal ended
        if not ended:
            ended = True
            os.close(write)
            os.waitpid(pid, 0)

    try:
        yield end
    finally:
        end()
