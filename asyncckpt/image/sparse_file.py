"""A file in memory with holes: what lies in another place is fetched from there when it is needed. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.image.fetch import PIECE_BYTES, memory_file, writable
from asyncckpt.image.file import BAR_AFTER_SECS, num_reading_threads
from asyncckpt.image.layout import FOLDER, METADATA_RECORD, Layout, central_directory, local_header
from asyncckpt.image.payloads import Payloads
from asyncckpt.image.verify import READ_BYTES, Payload, layout_of, read_archive
from asyncckpt.progress import Advance, CountingReader, progress_bar
from asyncckpt.storage.base import Reader
from asyncckpt.storage.local import LocalReader

_STORAGE = re.compile(r"data/\d+")


class SparseFile:
    """A checkpoint of ours, as torch maps it, whose tensors' bytes are zeros before `fetch`; all else is there.

    `file` is the one to map. Whatever is read was held against its checksum; headers and padding, which nobody reads,
    are what the layout says. The mapping outlives `close`, and `reader`, which stays the caller's, must not be closed
    before.
    """

    def __init__(self, reader: Reader, path: str, layout: Layout, crcs: Sequence[int]) -> None:
        self._advance: Advance = _nothing
        payloads = [
            Payload(f"{FOLDER}/{record.name}", record.offset, record.num_bytes, crc)
            for record, crc in zip(layout.records, crcs, strict=True)
        ]
        counted = CountingReader(reader, lambda num_bytes: self._advance(num_bytes))
        self.payloads = Payloads(
            counted,
            path,
            payloads,
            num_threads=num_reading_threads(reader),
            piece_bytes=READ_BYTES if isinstance(reader, LocalReader) else PIECE_BYTES,
            is_verified=False,
        )
        self.file = memory_file(layout.num_bytes)
        try:
            self._arena = writable(self.file)
        except BaseException:
            self.file.close()
            raise
        try:
            for record, crc in zip(layout.records, crcs, strict=True):
                self._arena.buffer[record.header_offset : record.offset] = local_header(record, crc)
            self._arena.buffer[layout.directory_offset :] = central_directory(layout, crcs)
            self.fetch([payload for name, payload in self.payloads.by_record.items() if not _STORAGE.fullmatch(name)])
        except BaseException:
            self.close()
            raise

    def fetch(self, wanted: Sequence[Payload]) -> None:
        """Fill in these records. Blocks, with a bar on a terminal when it takes long.

        Raises `CorruptCheckpointError` for one that does not match its checksum, and OSError when it can't be read.
        """
        total = sum(payload.num_bytes for payload in wanted)
        with progress_bar("fetching", total, after_secs=BAR_AFTER_SECS) as self._advance:
            self.payloads.read([(payload, self._view_of(payload)) for payload in wanted])
        self._advance = _nothing

    def _view_of(self, payload: Payload) -> memoryview:
        return self._arena.buffer[payload.offset : payload.offset + payload.num_bytes]

    def close(self) -> None:
        """Give up what is not mapped elsewhere."""
        self._arena.close()
        self.file.close()

    def __enter__(self) -> SparseFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _nothing(num_bytes: int) -> None:
    pass


def open_sparse(reader: Reader, path: str) -> SparseFile | None:
    """None for files that are not laid out as ours are, damaged ones among them: those have to be read whole.

    Blocks for a few small reads. `path` is for messages. Raises as `SparseFile.fetch` does.
    """
    try:
        archive = read_archive(reader)
        layout, crcs = layout_of(archive), [entry.crc for entry in archive.entries]
    except CorruptCheckpointError:
        return None
    if archive.find(METADATA_RECORD) is None or archive.directory != central_directory(layout, crcs):
        return None
    return SparseFile(reader, path, layout, crcs)
