"""What the machine is, and what it can do at best: copy memory, write to its disk."""

from __future__ import annotations

import os
import platform
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_CHUNK_BYTES = 8 << 20
RAW_NUM_THREADS = (1, 4)


def describe(directory: Path) -> dict[str, str]:
    """Facts for the report's head; no names of hosts, no paths."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "CPU": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "torch threads": str(torch.get_num_threads()),
        "memory": f"{memory_bytes / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": _file_system(directory),
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


def memory_copy_secs(source: torch.Tensor, destination: torch.Tensor) -> float:
    """One `copy_` from warm memory to warm memory, with torch's own threads."""
    started = time.perf_counter()
    destination.copy_(source)
    return time.perf_counter() - started


def raw_write_secs(buffer: torch.Tensor, path: Path, num_threads: int) -> float:
    """Write the buffer's bytes past the page cache, sequentially, and make file and directory entry durable."""
    view = buffer.numpy().data
    started = time.perf_counter()
    file = _open_direct(path)
    try:
        os.posix_fallocate(file, 0, len(view))
        offsets: queue.SimpleQueue[int] = queue.SimpleQueue()
        for offset in range(0, len(view), _CHUNK_BYTES):
            offsets.put(offset)
        with ThreadPoolExecutor(num_threads) as threads:
            list(threads.map(lambda _: _write_chunks(file, view, offsets), range(num_threads)))
        os.fsync(file)
    finally:
        os.close(file)
    _sync_directory(path.parent)
    secs = time.perf_counter() - started
    path.unlink()
    return secs


def drop_from_page_cache(path: Path) -> None:
    """So that the next read comes from the disk. The file must have been synced."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def warm_page_cache(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_CHUNK_BYTES)
        while file.readinto(buffer):
            pass


def _write_chunks(file: int, view: memoryview, offsets: queue.SimpleQueue[int]) -> None:
    for offset in _taken(offsets):
        chunk = view[offset : offset + _CHUNK_BYTES]
        if os.pwrite(file, chunk, offset) != len(chunk):
            raise OSError(f"a short write at byte {offset}")


def _taken(offsets: queue.SimpleQueue[int]) -> Iterator[int]:
    try:
        while True:
            yield offsets.get_nowait()
    except queue.Empty:
        return


def _open_direct(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:  # a file system without unbuffered writes: then buffered ones are its best
        return os.open(path, flags)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _file_system(directory: Path) -> str:
    """The type of the file system with the longest mount point over `directory`."""
    target = directory.resolve()
    found = (0, "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        point = Path(mount.split()[4])
        if point == target or point in target.parents:
            found = max(found, (len(point.parts), kind.split()[0]))
    return found[1]
