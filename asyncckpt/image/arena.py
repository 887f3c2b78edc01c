"""Arenas: reusable, page-aligned host buffers that hold images. No torch.

Fresh pages cost three to ten times the copy that fills them, so buffers are kept and handed out again, and can be
prefaulted before they are needed. On Linux a buffer is a memfd, so that another process can map it; elsewhere it is
anonymous memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable

PAGE_BYTES = 4096
_GROWTH_BYTES = 2 << 20
# One populate call holds the address space's lock, so everybody's mmap waits for it: keep each short.
_PREFAULT_BYTES = 64 << 20
_MADV_DONTFORK = 10
_MADV_POPULATE_WRITE = 23
_MAP_FAILED = ctypes.c_void_p(-1).value

_numbers = itertools.count(1)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Arena:
    """One buffer of `num_bytes`, mapped at `address`; `fd` is its memfd, None where it is anonymous memory.

    `buffer` is a writable view of all of it. The memory is given back by `close()`, after which no view may be used; of
    an arena that an interrupt (Ctrl-C) made its owner lose, with the last view. `number` tells arenas of this process
    apart, also those that are gone.
    """

    def __init__(self, num_bytes: int) -> None:
        num_bytes = -(-num_bytes // _GROWTH_BYTES) * _GROWTH_BYTES
        self._take(_create_memfd(num_bytes), num_bytes)

    @classmethod
    def received(cls, fd: int) -> Arena:
        """The arena of another process, which gave us its memfd; both see the same bytes. `fd` belongs to it now."""
        arena = cls.__new__(cls)
        arena._take(fd, os.fstat(fd).st_size)
        return arena

    def _take(self, fd: int | None, num_bytes: int) -> None:
        self.fd, self.num_bytes, self.number = fd, num_bytes, next(_numbers)
        try:
            self.address = _map(fd, num_bytes)
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise
        memory = (ctypes.c_char * num_bytes).from_address(self.address)  # every view holds it
        self._before_close: list[Callable[[], None]] = []
        self._when_lost = weakref.finalize(memory, _give_back, fd, self.address, num_bytes, self._before_close)
        self._when_lost.atexit = False
        self.buffer = memoryview(memory).cast("B")
        self.used_bytes = 0  # how far pages have been touched
        _arenas.add(self)

    def prefault(self, num_bytes: int) -> None:
        """Touch the first `num_bytes`, so that later writes find warm pages. Blocks, without holding the GIL."""
        stop = min(-(-num_bytes // PAGE_BYTES) * PAGE_BYTES, self.num_bytes)
        for start in range(self.used_bytes // PAGE_BYTES * PAGE_BYTES, stop, _PREFAULT_BYTES):
            length = min(_PREFAULT_BYTES, stop - start)
            if _libc.madvise(self.address + start, length, _MADV_POPULATE_WRITE) != 0:
                break  # a kernel before 5.14: the pages come when they are written
        self.used_bytes = max(self.used_bytes, stop)

    def before_close(self, action: Callable[[], None]) -> None:
        """Run `action` once, just before the memory is given back (a device driver's registration, say)."""
        self._before_close.append(action)

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        if self.address == 0:
            return
        self._when_lost.detach()
        self.buffer.release()
        fd, address, self.fd, self.address = self.fd, self.address, None, 0
        _give_back(fd, address, self.num_bytes, self._before_close)

    def close_descriptor(self) -> None:
        """Close the memfd alone, as a forked child must, where its memory is not mapped but kept alive."""
        self._when_lost.detach()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class ArenaPool:
    """Keeps up to `max_arenas` buffers for reuse, made by `make`. All methods are thread-safe."""

    def __init__(self, max_arenas: int, make: Callable[[int], Arena] = Arena) -> None:
        self._max_arenas = max_arenas
        self._make = make
        self._lock = threading.RLock()
        self._free: list[Arena] = []
        self._lent: weakref.WeakSet[Arena] = weakref.WeakSet()  # without those that an interrupt made somebody lose
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """Bytes of address space held, lent and free."""
        with self._lock:
            return sum(arena.num_bytes for arena in (*self._lent, *self._free))

    def acquire(self, num_bytes: int) -> Arena:
        """Lend the smallest free arena that is large enough, or make one. Never blocks for another's return."""
        with self._lock:
            while fitting := [arena for arena in self._free if arena.num_bytes >= num_bytes]:
                arena = min(fitting, key=lambda arena: arena.num_bytes)
                try:
                    self._free.remove(arena)
                except ValueError:
                    continue  # a signal handler, saving in the middle of this, has taken it
                self._lent.add(arena)
                return arena
            while self._free:  # all too small for this state, and states seldom shrink
                self._free.pop().close()
        # A little to spare, untouched and so free of charge (unless pinned): the next state is often slightly larger.
        arena = self._make(num_bytes + num_bytes // 32)
        with self._lock:
            self._lent.add(arena)
        return arena

    def release(self, arena: Arena) -> None:
        """Take a lent arena back; no view of it may be used from now on."""
        with self._lock:
            self._lent.discard(arena)
            if self._closed or len(self._lent) + len(self._free) >= self._max_arenas:
                arena.close()
            else:
                self._free.append(arena)

    def close(self) -> None:
        """Give back all free memory, and lent memory as it is returned."""
        with self._lock:
            self._closed = True
            for arena in self._free:
                arena.close()
            self._free.clear()


def _create_memfd(num_bytes: int) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None
    try:
        fd = os.memfd_create("asyncckpt", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:  # forbidden by a sandbox
        return None
    try:
        os.ftruncate(fd, num_bytes)
        # Whoever maps it may rely on every page of it: a buffer that shrank would kill them (SIGBUS).
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:  # over `ulimit -f`, which counts it as a file
        os.close(fd)
        return None
    return fd


def _map(fd: int | None, num_bytes: int) -> int:
    """Map by hand: Python's mmap duplicates the descriptor, and a forked DataLoader worker kept the memory alive."""
    if fd is None:
        flags, descriptor = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1
    else:
        flags, descriptor = mmap.MAP_SHARED, fd
    address = _libc.mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
    if address == _MAP_FAILED:
        error = ctypes.get_errno()
        raise MemoryError(
            f"no address space for a checkpoint buffer of {num_bytes:,} bytes: {os.strerror(error)}; free some memory, "
            "or set memory_limit below that, so that the checkpoint is written in pieces"
        )
    if sys.platform == "linux":
        _libc.madvise(address, num_bytes, _MADV_DONTFORK)
    return int(address)


def _give_back(fd: int | None, address: int, num_bytes: int, before: list[Callable[[], None]]) -> None:
    try:
        for action in before:
            action()
    finally:  # an interrupt within a finalizer is lost, and the memory must not be
        _libc.munmap(address, num_bytes)
        if fd is not None:
            os.close(fd)


_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()


def _close_descriptors_in_child() -> None:
    for arena in list(_arenas):
        with contextlib.suppress(OSError):
            arena.close_descriptor()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_descriptors_in_child)
