"""Streaming: the bytes of an image that does not fit into memory, window by window, from state that stays frozen.

A record's header comes before its payload and holds its checksum, so the state is read twice: once for the checksums,
once for the bytes. The caller keeps the state unchanged (by waiting) until everything is written; if somebody changes
it all the same, the two readings differ, and the save fails.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator

import torch
from isal.isal_zlib import crc32
from torch.storage import UntypedStorage

from asyncckpt.errors import TornSnapshotError
from asyncckpt.image.arena import Arena
from asyncckpt.image.checksum import SERIALIZATION_ID_RECORD, Piece, serialization_id
from asyncckpt.image.layout import central_directory, local_header
from asyncckpt.image.plan import Plan

_WINDOW_BYTES = 256 << 20


def window_bytes(limit: int, piece_bytes: int = 8 << 20) -> int:
    """How much memory to stream through under the given limit: whole pieces, at least one."""
    return max(piece_bytes, min(limit, _WINDOW_BYTES) // piece_bytes * piece_bytes)


class StreamedImage:
    """An `ImageSource` that stages one window of the image at a time into `arena`."""

    def __init__(self, plan: Plan, arena: Arena, num_bytes: int) -> None:
        self.num_bytes = plan.layout.num_bytes
        self.checksum_secs = 0.0
        self._plan = plan
        self._buffer = arena.buffer[:num_bytes]
        self._crcs: list[int] = []
        self._second_crcs: list[int] = []
        self._serialization_id = b""

    def windows(self, piece_bytes: int) -> Iterator[Iterator[Piece]]:
        if not self._crcs:
            started = time.perf_counter()
            self._checksum()
            self.checksum_secs = time.perf_counter() - started
        tail = central_directory(self._plan.layout, self._crcs)
        window = len(self._buffer) // piece_bytes * piece_bytes
        self._second_crcs = [0] * len(self._crcs)
        for start in range(0, self.num_bytes, window):
            stop = min(start + window, self.num_bytes)
            self._fill(start, stop, tail)
            yield self._pieces(start, stop, piece_bytes)

    def _pieces(self, start: int, stop: int, piece_bytes: int) -> Iterator[Piece]:
        for offset in range(start, stop, piece_bytes):
            end = min(offset + piece_bytes, stop)
            yield Piece(offset, self._buffer[offset - start : end - start])

    def _checksum(self) -> None:
        crcs: list[int] = []
        for record, content in zip(self._plan.layout.records, self._plan.contents, strict=True):
            if record.name == SERIALIZATION_ID_RECORD:
                self._serialization_id = serialization_id(self._plan.layout, crcs)
                crcs.append(crc32(self._serialization_id))
            elif isinstance(content, UntypedStorage):
                crcs.append(self._checksum_storage(content))
            else:
                crcs.append(crc32(content or b""))
        self._crcs = crcs

    def _checksum_storage(self, storage: UntypedStorage) -> int:
        num_bytes = storage.nbytes()
        if num_bytes == 0:
            return 0
        if storage.device.type == "cpu":
            return crc32((ctypes.c_char * num_bytes).from_address(storage.data_ptr()))
        crc = 0
        for start in range(0, num_bytes, len(self._buffer)):
            view = self._buffer[: min(len(self._buffer), num_bytes - start)]
            _copy_slice(storage, start, view)
            crc = crc32(view, crc)
        return crc

    def _fill(self, start: int, stop: int, tail: bytes) -> None:
        """Put the image's bytes from `start` to `stop` at the beginning of the buffer."""
        layout = self._plan.layout
        for index, (record, content, crc) in enumerate(
            zip(layout.records, self._plan.contents, self._crcs, strict=True)
        ):
            end = record.offset + record.num_bytes
            if end <= start or record.header_offset >= stop:
                continue
            self._put_bytes(record.header_offset, local_header(record, crc), start, stop)
            if isinstance(content, UntypedStorage):
                first, last = max(start, record.offset), min(stop, end)
                if first < last:
                    view = self._buffer[first - start : last - start]
                    _copy_slice(content, first - record.offset, view)
                    self._second_crcs[index] = crc32(view, self._second_crcs[index])
                    if last == end and self._second_crcs[index] != crc:
                        raise TornSnapshotError(
                            f"the state changed while it was being written in pieces ({record.name}), so the "
                            "snapshot was thrown away; leave it alone until save() returns"
                        )
            else:
                self._put_bytes(record.offset, content or self._serialization_id, start, stop)
        self._put_bytes(layout.directory_offset, tail, start, stop)

    def _put_bytes(self, offset: int, content: bytes, start: int, stop: int) -> None:
        first, last = max(start, offset), min(stop, offset + len(content))
        if first < last:
            self._buffer[first - start : last - start] = content[first - offset : last - offset]


def _copy_slice(storage: UntypedStorage, start: int, view: memoryview) -> None:
    with torch.no_grad():
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        torch.frombuffer(view, dtype=torch.uint8).copy_(source[start : start + len(view)])
