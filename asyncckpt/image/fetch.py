"""Fetching: a whole file from storage that is not local into memory, as a file that can be mapped. No torch."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

from asyncckpt.image.arena import Arena
from asyncckpt.storage.base import Reader
from asyncckpt.storage.local import LocalReader

PIECE_BYTES = 8 << 20
NUM_FETCHING_THREADS = 16  # most of them wait for the network


def fetch(reader: Reader) -> LocalReader:
    """All of the file, by reads side by side, in memory that lasts as long as the reader, or what it was mapped into.

    Blocks. Raises OSError, and EOFError when the file turns out to be shorter.
    """
    file = memory_file(reader.num_bytes)
    try:
        if reader.num_bytes:
            _fill(writable(file), reader)
    except BaseException:
        file.close()
        raise
    return file


def memory_file(num_bytes: int) -> LocalReader:
    """A file of so many zeros that is nowhere but in memory; those that nobody writes to take none."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("asyncckpt-fetched", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, num_bytes)
    return LocalReader.received(fd)


def writable(file: LocalReader) -> Arena:
    """The bytes of such a file, to be written; to be closed apart from it."""
    return Arena.received(os.dup(file.fd))


def _fill(arena: Arena, reader: Reader) -> None:
    try:

        def read(offset: int) -> None:
            reader.read_into(offset, arena.buffer[offset : min(offset + PIECE_BYTES, reader.num_bytes)])

        with ThreadPoolExecutor(NUM_FETCHING_THREADS, "asyncckpt-fetch") as threads:
            for _ in threads.map(read, range(0, reader.num_bytes, PIECE_BYTES)):
                pass
    finally:
        arena.close()
