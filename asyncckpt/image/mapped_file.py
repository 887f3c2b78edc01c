"""The bytes of mapped tensors, read from the file that they are mapped from: a mapping's pages may be gone.

torch maps the file, and does not say which tensor came from which record; the kernel knows where it is mapped, and so
which bytes of the file a tensor's address stands for.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.image.payloads import Payloads
from asyncckpt.image.verify import Payload
from asyncckpt.storage.local import LocalReader

_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) (\S+ \d+)")


class _Range(NamedTuple):
    """A part of the address space, and the part of a file that is mapped there; `file` is its device and inode."""

    start: int
    stop: int
    offset: int
    file: str


class MappedFile:
    """An open file that torch has mapped."""

    def __init__(self, reader: LocalReader, payloads: Payloads) -> None:
        self._reader = reader
        self._payloads = payloads

    def fill(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Read, into the first of each pair, the bytes that the second one maps. Both are all bytes of a storage.

        Blocks, without the GIL; touches no mapped page. Returns the pairs whose second one is not mapped from the file.
        Raises `CorruptCheckpointError` and OSError as `Payloads.read` does.
        """
        ranges = _ranges_of(self._reader)
        starts = [found.start for found in ranges]
        rest = []
        wanted: list[tuple[Payload, memoryview]] = []
        cut: list[tuple[memoryview, memoryview]] = []
        for destination, source in pairs:
            index = bisect_right(starts, source.data_ptr()) - 1
            if index < 0 or source.data_ptr() >= ranges[index].stop:
                rest.append((destination, source))
                continue
            payload = self._payload(ranges[index].offset + source.data_ptr() - starts[index], source.nbytes)
            view = _view_of(destination)
            if payload.num_bytes > len(view):  # the record holds more than the storage: its checksum is of it all
                whole = memoryview(bytearray(payload.num_bytes))
                cut.append((view, whole))
                view = whole
            wanted.append((payload, view))
        self._payloads.read(wanted)
        for view, whole in cut:
            view[:] = whole[: len(view)]
        return rest

    def payloads_of(self, storages: Sequence[torch.UntypedStorage]) -> list[Payload]:
        """The records that these are mapped from. Raises `CorruptCheckpointError` for one that is mapped from none."""
        ranges = _ranges_of(self._reader)
        starts = [found.start for found in ranges]
        found = []
        for storage in storages:
            index = bisect_right(starts, storage.data_ptr()) - 1
            offset = ranges[index].offset + storage.data_ptr() - starts[index] if index >= 0 else -1
            found.append(self._payload(offset, storage.nbytes()))
        return found

    def _payload(self, offset: int, num_bytes: int) -> Payload:
        payload = self._payloads.at(offset)
        if payload is None or payload.num_bytes < num_bytes:
            raise CorruptCheckpointError(f"a tensor's {num_bytes:,} bytes from {offset:,} on are no record of the file")
        return payload


def _view_of(storage: torch.Tensor) -> memoryview:
    return memoryview((ctypes.c_char * storage.nbytes).from_address(storage.data_ptr())).cast("B")


def _ranges_of(reader: LocalReader) -> list[_Range]:
    """Where the open file is mapped in this process, in order.

    The numbers that the kernel names it by need not be those of `fstat` (btrfs, overlayfs): a page of it, mapped here,
    tells them. It is not looked at.
    """
    try:
        page = mmap.mmap(reader.fd, 1, access=mmap.ACCESS_COPY)
    except ValueError as error:
        raise CorruptCheckpointError(f"the file was emptied while it was loaded: {error}") from error
    with page:
        start = ctypes.c_char.from_buffer(page)
        address = ctypes.addressof(start)
        del start
        ranges = list(_all_ranges())
    own = next(found for found in ranges if found.start <= address < found.stop)
    return sorted(found for found in ranges if found.file == own.file and found.start != own.start)


def _all_ranges() -> Iterator[_Range]:
    with open("/proc/self/maps") as maps:
        for line in maps:
            if found := _LINE.match(line):
                yield _Range(int(found[1], 16), int(found[2], 16), int(found[3], 16), found[4])
