"""What a process and all its children hold, by the kernel's own account."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 512  # of st_blocks


@dataclass(frozen=True)
class Usage:
    """Of one moment. `descriptors` by kind, but for those of arenas.

    `arenas` are this process's memfds, `forgotten_arenas` those that only a child holds any more, `arena_bytes` the
    pages that all these really have. `checkpoint_mappings` are of `.pt` files, deleted or not.

    `private_bytes` is resident memory without files' and memfds' pages; `python_blocks` is what this interpreter has
    allocated. Children are counted in everything but that.
    """

    processes: int
    threads: int
    descriptors: dict[str, int]
    num_mappings: int
    mapped_bytes: int
    arenas: int
    forgotten_arenas: int
    arena_mappings: int
    checkpoint_mappings: int
    arena_bytes: int
    private_bytes: int
    python_blocks: int


def usage() -> Usage:
    """Now, after all garbage is collected and malloc has given back what it can."""
    for _ in range(3):
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pids = [os.getpid(), *descendants(os.getpid())]
    descriptors: Counter[str] = Counter()
    arenas: dict[int, int] = {}
    own: set[int] = set()
    for pid in pids:
        for kind, inode, num_bytes in _open_files(pid):
            if kind != "memfd:asyncckpt":
                descriptors[kind] += 1
                continue
            arenas[inode] = num_bytes
            if pid == os.getpid():
                own.add(inode)
    maps = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return Usage(
        processes=len(pids),
        threads=sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids),
        descriptors=dict(sorted(descriptors.items())),
        num_mappings=len(maps),
        mapped_bytes=sum(map(_length, maps)),
        arenas=len(own),
        forgotten_arenas=len(arenas.keys() - own),
        arena_mappings=sum("memfd:asyncckpt" in line for line in maps),
        checkpoint_mappings=sum(line.removesuffix(" (deleted)").endswith(".pt") for line in maps),
        arena_bytes=sum(arenas.values()),
        private_bytes=sum(_anonymous_bytes(pid) for pid in pids),
        python_blocks=sys.getallocatedblocks(),
    )


def settled_usage(timeout_secs: float = 10.0) -> Usage:
    """As `usage`, once children have let go of the arenas that they were told to forget."""
    deadline = time.monotonic() + timeout_secs
    while (now := usage()).forgotten_arenas and time.monotonic() < deadline:
        time.sleep(0.01)
    return now


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
