"""Moving a checkpoint's file between storages: every byte is checked on the way, before the commit. No torch."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from isal.isal_zlib import crc32, crc32_combine

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.image.arena import Arena
from asyncckpt.image.file import num_reading_threads
from asyncckpt.image.verify import Payload, verify_payloads, verify_reader
from asyncckpt.image.whole_checksum import whole_checksum
from asyncckpt.progress import Advance
from asyncckpt.storage.base import Reader, Storage, Upload
from asyncckpt.threads import ThreadGroup


@contextmanager
def transferred(
    storage: Storage, reader: Reader, source: str, destination: str, expected: str | None, advance: Advance
) -> Iterator[Upload]:
    """All bytes of the reader, checked and synced, for the block to commit; thrown away after any error. Blocks.

    `expected` is what version must be at the destination, None being whatever is there; `advance` hears of the bytes,
    on any thread. Raises `CorruptCheckpointError` for a damaged source, and OSError.
    """
    checks = _Checks(_known_ranges(reader, source))
    upload = storage.begin(destination, reader.num_bytes, expected=expected)
    try:
        _stream(reader, source, upload, checks, advance)
        if problem := checks.problem():
            report = verify_reader(reader, source, num_threads=num_reading_threads(reader))
            named = report.problems[0] if report.problems else f"{problem} on its way"
            raise CorruptCheckpointError(f"{source} is damaged: {named}; it was not copied")
        upload.sync()
        yield upload
        upload.close()
    except BaseException:
        upload.abort()
        raise


def _known_ranges(reader: Reader, source: str) -> Sequence[Payload]:
    """Parts of the file whose checksums are known: all of it in one, or the records, where there are gaps between."""
    try:
        whole = whole_checksum(reader)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{source} is damaged: {error}; it was not copied") from error
    if whole is not None:
        return [Payload("the file", 0, reader.num_bytes, whole)]
    report, payloads = verify_payloads(reader, source, num_threads=num_reading_threads(reader))
    if not report.ok:
        raise CorruptCheckpointError(f"{source} is damaged: {report.problems[0]}; it was not copied")
    return payloads


def _stream(reader: Reader, source: str, upload: Upload, checks: _Checks, advance: Advance) -> None:
    """From one to the other, piece by piece, on several threads."""
    offsets = iter(range(0, reader.num_bytes, upload.piece_bytes))
    taking = threading.Lock()
    failed = threading.Event()

    def copy_pieces() -> None:
        arena = Arena(min(upload.piece_bytes, reader.num_bytes))  # aligned, for O_DIRECT
        try:
            while not failed.is_set():
                with taking:
                    offset = next(offsets, None)
                if offset is None:
                    return
                piece = arena.buffer[: min(upload.piece_bytes, reader.num_bytes - offset)]
                _read(reader, source, offset, piece)
                checks.add(offset, piece)
                upload.write(offset, piece)
                advance(len(piece))
        except BaseException:
            failed.set()
            raise
        finally:
            arena.close()

    threads = ThreadGroup("copy", upload.num_threads)
    try:
        threads.run_on_all(copy_pieces, upload.num_threads)
    finally:
        threads.stop()
        threads.join(None)


def _read(reader: Reader, source: str, offset: int, piece: memoryview) -> None:
    try:
        reader.read_into(offset, piece)
    except EOFError as error:
        raise CorruptCheckpointError(f"{source} was cut off while it was copied: {error}") from error


class _Checks:
    """Holds pieces of a file, in any order and from any thread, against the checksums of its ranges."""

    def __init__(self, ranges: Sequence[Payload]) -> None:
        self._ranges = sorted((known for known in ranges if known.num_bytes), key=lambda known: known.offset)
        self._starts = [known.offset for known in self._ranges]
        self._parts: list[dict[int, tuple[int, int]]] = [{} for _ in self._ranges]  # start → CRC, bytes

    def add(self, offset: int, piece: memoryview) -> None:
        """A piece of the file's bytes."""
        stop = offset + len(piece)
        for index in range(max(0, bisect_right(self._starts, offset) - 1), len(self._ranges)):
            known = self._ranges[index]
            start, end = max(offset, known.offset), min(stop, known.offset + known.num_bytes)
            if known.offset >= stop:
                return
            if start < end:
                self._parts[index][start] = (crc32(piece[start - offset : end - offset]), end - start)

    def problem(self) -> str:
        """What does not match; "" when all does."""
        for known, parts in zip(self._ranges, self._parts, strict=True):
            crc = 0
            for _, (part_crc, num_bytes) in sorted(parts.items()):
                crc = crc32_combine(crc, part_crc, num_bytes)
            if crc != known.crc:
                return f"{known.name} did not match its checksum"
        return ""
