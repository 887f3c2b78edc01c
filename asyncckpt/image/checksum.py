"""Sealing: checksum every record of a staged image in place, patch the headers, hand out pieces to write. No torch."""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from isal.isal_zlib import crc32

from asyncckpt.image.layout import Layout, central_directory, local_header

SERIALIZATION_ID_RECORD = ".data/serialization_id"


class Piece(NamedTuple):
    """A run of the file's final bytes; the view stays valid until its window is exhausted and all were written."""

    offset: int
    view: memoryview


class ImageSource(Protocol):
    """Where the bytes of one checkpoint file come from.

    `windows` may be called again to write the same bytes anew. Pieces within a window may be written in parallel and
    in any order; the next window must be asked for only when all pieces of the one before are written.
    """

    num_bytes: int
    checksum_secs: float

    def windows(self, piece_bytes: int) -> Iterator[Iterator[Piece]]: ...


class StagedImage:
    """An image whose payloads lie in `buffer` as `layout` says; headers and checksums are filled in on the way out."""

    def __init__(self, layout: Layout, buffer: memoryview) -> None:
        self.layout = layout
        self.num_bytes = layout.num_bytes
        self.checksum_secs = 0.0
        self._buffer = buffer[: layout.num_bytes]

    def windows(self, piece_bytes: int) -> Iterator[Iterator[Piece]]:
        yield self._pieces(piece_bytes)

    def _pieces(self, piece_bytes: int) -> Iterator[Piece]:
        """Pieces in order, each as soon as every header in it has its checksum: writing starts almost at once."""
        buffer = self._buffer
        crcs: list[int] = []
        position = 0
        started = time.perf_counter()
        for record in self.layout.records:
            payload = buffer[record.offset : record.offset + record.num_bytes]
            if record.name == SERIALIZATION_ID_RECORD:
                payload[:] = serialization_id(self.layout, crcs)
            crc = crc32(payload)
            crcs.append(crc)
            buffer[record.header_offset : record.offset] = local_header(record, crc)
            sealed = record.offset + record.num_bytes
            while position + piece_bytes <= sealed:
                self.checksum_secs += time.perf_counter() - started
                yield Piece(position, buffer[position : position + piece_bytes])
                started = time.perf_counter()
                position += piece_bytes
        buffer[self.layout.directory_offset :] = central_directory(self.layout, crcs)
        self.checksum_secs += time.perf_counter() - started
        while position < self.num_bytes:
            yield Piece(position, buffer[position : position + piece_bytes])
            position += piece_bytes


def serialization_id(layout: Layout, crcs: list[int]) -> bytes:
    """40 decimal digits, as torch writes: 20 from the records' names and places, 20 from their checksums."""
    places = int(layout.digest()[:16], 16)
    contents = int(hashlib.sha256(array("Q", crcs).tobytes()).hexdigest()[:16], 16)
    return f"{places:020d}{contents:020d}".encode("ascii")
