"""What a process and all its children hold, by the kernel's own account."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 512  # of st_blocks


@dataclass(frozen=True)
class Usage:
    """Of one moment. `descriptors` by kind; `memfd_bytes` are pages that memfds really have; `checkpoint_mappings` are
    of `.pt` files, deleted or not.

    `private_bytes` is resident memory without files' and memfds' pages; `python_blocks` is what this interpreter has
    allocated. Children are counted in everything but that.
    """

    processes: int
    threads: int
    descriptors: dict[str, int]
    num_mappings: int
    mapped_bytes: int
    arena_mappings: int
    checkpoint_mappings: int
    memfd_bytes: int
    private_bytes: int
    python_blocks: int


def usage() -> Usage:
    """Now, after all garbage is collected and malloc has given back what it can."""
    for _ in range(3):
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pids = [os.getpid(), *descendants(os.getpid())]
    descriptors: Counter[str] = Counter()
    memfds: dict[int, int] = {}
    for pid in pids:
        for kind, inode, num_bytes in _open_files(pid):
            descriptors[kind] += 1
            if kind == "memfd:asyncckpt":
                memfds[inode] = num_bytes
    maps = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return Usage(
        processes=len(pids),
        threads=sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids),
        descriptors=dict(sorted(descriptors.items())),
        num_mappings=len(maps),
        mapped_bytes=sum(map(_length, maps)),
        arena_mappings=sum("memfd:asyncckpt" in line for line in maps),
        checkpoint_mappings=sum(line.removesuffix(" (deleted)").endswith(".pt") for line in maps),
        memfd_bytes=sum(memfds.values()),
        private_bytes=sum(_anonymous_bytes(pid) for pid in pids),
        python_blocks=sys.getallocatedblocks(),
    )


def descendants(pid: int) -> list[int]:
    """The processes below, however deep."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def _open_files(pid: int) -> list[tuple[str, int, int]]:
    """Kind, inode and allocated bytes of each; sockets and pipes are kinds of their own."""
    files = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target, status = os.readlink(link), link.stat()
        except FileNotFoundError:  # the descriptor that lists them
            continue
        kind = target.removesuffix(" (deleted)").lstrip("/") if "memfd:" in target else target.split(":")[0]
        files.append((kind, status.st_ino, status.st_blocks * _BLOCK_BYTES))
    return files


def _length(line: str) -> int:
    start, stop = line.split(maxsplit=1)[0].split("-")
    return int(stop, 16) - int(start, 16)


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell RssAnon")
