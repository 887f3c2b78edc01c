"""How fast: to the disk by our own uploads, memory to memory, checksums. Small, since the machine may be training."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable

from isal.isal_zlib import crc32

from asyncckpt.cli.output import format_bytes, format_secs
from asyncckpt.doctor.finding import NOTE, OK, Finding, Place, format_latency
from asyncckpt.image.arena import Arena
from asyncckpt.service.memory import default_memory_limit
from asyncckpt.storage import system_calls
from asyncckpt.storage.local import LocalStorage, LocalUpload
from asyncckpt.threads import ThreadGroup

_FIRST_BYTES = 8 << 20
_MOST_BYTES = 256 << 20
_NOISE_BYTES = 1 << 20
_MEMORY_BYTES = 64 << 20
_SECS = 0.4  # of each writing, about
_SHARE = 8  # of the room that there is, on the disk and in memory, take no more than one eighth
_SLOW = 100e6
_GIGABYTE = 10**9


def check_writing_speed(place: Place) -> Finding:
    """Until it is durable, past the page cache and through it."""
    status = system_calls.file_system_status(place.directory)
    room = min(status.f_bavail * status.f_frsize, default_memory_limit(place.root)) // _SHARE
    if room < _FIRST_BYTES:
        return Finding(NOTE, "not measured: there is too little room")
    most = min(room, _MOST_BYTES) // _FIRST_BYTES * _FIRST_BYTES
    arena = Arena(most)
    num_bytes = _FIRST_BYTES
    threads = ThreadGroup("doctor", LocalUpload.num_threads)
    try:
        _fill(arena)
        first = num_bytes / _write_secs(LocalStorage(), place, arena.buffer[:num_bytes], threads)
        num_bytes = max(_FIRST_BYTES, min(most, int(first * _SECS) // _FIRST_BYTES * _FIRST_BYTES))
        direct = num_bytes / _write_secs(LocalStorage(), place, arena.buffer[:num_bytes], threads)
        num_bytes = max(_FIRST_BYTES, num_bytes // 4)  # it may be much slower
        buffered = num_bytes / _write_secs(LocalStorage(direct=False), place, arena.buffer[:num_bytes], threads)
    finally:
        threads.stop()
        threads.join(None)
        arena.close()
    found = f"{format_bytes(int(direct))}/s as asyncckpt writes, {format_bytes(int(buffered))}/s buffered"
    choice = f"1 GB is durable after about {format_secs(_GIGABYTE / direct)}"
    if direct < _SLOW:
        advice = "save less often: `asyncckpt interval --write-secs` says how often"
        return Finding(NOTE, found, choice, advice)
    return Finding(OK, found, choice)


def _fill(arena: Arena) -> None:
    """With noise, which no file system can compress."""
    noise = os.urandom(_NOISE_BYTES)
    arena.prefault(arena.num_bytes)
    for offset in range(0, arena.num_bytes, _NOISE_BYTES):
        arena.buffer[offset : offset + _NOISE_BYTES] = noise


def _write_secs(storage: LocalStorage, place: Place, contents: memoryview, threads: ThreadGroup) -> float:
    """Until all is durable; the file is thrown away afterwards."""
    started = time.perf_counter()
    upload = storage.begin(place.probe, len(contents))
    offsets = iter(range(0, len(contents), upload.piece_bytes))
    taking = threading.Lock()

    def write_pieces() -> None:
        while True:
            with taking:
                offset = next(offsets, None)
            if offset is None:
                return
            upload.write(offset, contents[offset : offset + upload.piece_bytes])

    try:
        threads.run_on_all(write_pieces, upload.num_threads)
        upload.sync()
        return time.perf_counter() - started
    finally:
        upload.abort()


def check_memory_speed(place: Place) -> Finding:
    """What a snapshot costs at least, and the checksums beside the writing."""
    num_bytes = min(_MEMORY_BYTES, default_memory_limit(place.root) // _SHARE // 2)
    if num_bytes < _FIRST_BYTES:
        return Finding(NOTE, "not measured: there is too little memory")
    arena = Arena(2 * num_bytes)
    try:
        arena.prefault(arena.num_bytes)
        source, destination = arena.address, arena.address + num_bytes
        copy_secs = min(_secs(lambda: ctypes.memmove(destination, source, num_bytes)) for _ in range(3))
        checksum_secs = min(_secs(lambda: crc32(arena.buffer[:num_bytes])) for _ in range(3))
    finally:
        arena.close()
    copy, checksum = num_bytes / copy_secs, num_bytes / checksum_secs
    found = f"one core copies {format_bytes(int(copy))}/s, checksums {format_bytes(int(checksum))}/s"
    return Finding(OK, found, f"a snapshot of 1 GB takes at most about {format_latency(_GIGABYTE / copy)}")


def _secs(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
