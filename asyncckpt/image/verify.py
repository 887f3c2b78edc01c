"""Verification: read every byte of a checkpoint file and hold it against its checksums. No torch.

Files are read, never mapped: a file truncated underneath a mapping, or a disk error, would be a SIGBUS, and nothing
could fall back from that. In our own files the layout says what every byte outside the payloads must be, so headers,
padding and directory are checked too; files of torch.save get their records' checksums and headers checked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
from isal.isal_zlib import crc32, crc32_combine

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.image.layout import (
    MAX_METADATA_BYTES,
    METADATA_RECORD,
    Layout,
    central_directory,
    local_header,
    plan_layout,
)
from asyncckpt.records import VerifyReport
from asyncckpt.storage.base import Reader
from asyncckpt.threads import num_cores

READ_BYTES = 2 << 20  # about the second-level cache: the checksum then runs at its speed
_MAX_PROBLEMS = 20
_MAX_FIELD_BYTES = 0xFFFF  # of a name, an extra field, a comment
_LOCAL_HEADER = struct.Struct("<IHHHHHIIIHH")
_CENTRAL_HEADER = struct.Struct("<IHHHHHHIIIHHHHHII")
_ZIP64_END = struct.Struct("<IQHHIIQQQQ")
_ZIP64_LOCATOR = struct.Struct("<IIQI")
_END = struct.Struct("<IHHHHIIH")
_MAX32 = 0xFFFFFFFF
_MOST_HEADER_BYTES = _LOCAL_HEADER.size + 2 * _MAX_FIELD_BYTES


class Payload(NamedTuple):
    """A record's bytes, where they were found and proven to match; `name` includes the archive's folder."""

    name: str
    offset: int
    num_bytes: int
    crc: int


class Entry(NamedTuple):
    """One record as the central directory describes it; `name` includes the archive's folder."""

    name: str
    header_offset: int
    num_bytes: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """A parsed central directory, in order of the records' places."""

    entries: Sequence[Entry]
    directory_offset: int
    directory: bytes

    @property
    def folder(self) -> str:
        return self.entries[0].name.split("/", 1)[0]

    def find(self, record: str) -> Entry | None:
        name = f"{self.folder}/{record}"
        return next((entry for entry in self.entries if entry.name == name), None)


def verify_reader(reader: Reader, path: str, *, num_threads: int = 1) -> VerifyReport:
    """Read and check everything; problems are reported, not raised. Blocks. `path` is for messages.

    `num_threads=1` starts no thread, so that it works at interpreter exit.
    """
    report, _ = verify_payloads(reader, path, num_threads=num_threads)
    return report


def verify_payloads(reader: Reader, path: str, *, num_threads: int = 1) -> tuple[VerifyReport, Sequence[Payload]]:
    """As `verify_reader`, with where each record's bytes lie; none if there are problems."""
    try:
        archive = read_archive(reader)
        metadata = _read_metadata(reader, archive)
        layout = layout_of(archive) if metadata is not None else None
    except CorruptCheckpointError as error:
        return VerifyReport(path, reader.num_bytes, 0, (str(error),), None), ()
    problems: list[str] = []
    if archive.find("data.pkl") is None:
        problems.append("it is a zip archive, but not a checkpoint: it has no record data.pkl")
    if layout is not None and archive.directory != central_directory(layout, [entry.crc for entry in archive.entries]):
        problems.append("the central directory is damaged")
    checker = _Checker(reader, archive, layout)
    if num_threads == 1:
        for found in map(checker.check, _spans(archive)):
            problems += found
    else:
        with ThreadPoolExecutor(num_threads, "asyncckpt-verify") as threads:
            for found in threads.map(checker.check, _spans(archive)):
                problems += found
    problems += checker.combine()
    report = VerifyReport(path, reader.num_bytes, len(archive.entries), tuple(problems[:_MAX_PROBLEMS]), metadata)
    return report, () if problems else checker.payloads()


def read_metadata(reader: Reader) -> Mapping[str, object] | None:
    """What the file says of itself, without reading the rest; None for files that asyncckpt did not write.

    Raises `CorruptCheckpointError` if its directory or this record is damaged.
    """
    archive = read_archive(reader)
    return _read_metadata(reader, archive)


def default_num_threads() -> int:
    """Enough to read faster than one thread can, without flooding a large machine."""
    return min(8, num_cores())


def read_archive(reader: Reader) -> Archive:
    """Parse the central directory.

    Raises `CorruptCheckpointError` for anything but a well-formed archive; the message leaves the path to the caller.
    """
    size = reader.num_bytes
    if size == 0:
        raise CorruptCheckpointError("it is empty")
    directory_offset, directory_bytes, num_records = _find_directory(reader)
    # Not a byte may be read on the word of a damaged number: it could be the whole file, or more than the memory.
    least, most = num_records * _CENTRAL_HEADER.size, num_records * (_CENTRAL_HEADER.size + 3 * _MAX_FIELD_BYTES)
    end_bytes = size - directory_offset - directory_bytes
    most_end_bytes = _ZIP64_END.size + _ZIP64_LOCATOR.size + _END.size + _MAX_FIELD_BYTES
    if not (least <= directory_bytes <= most and _END.size <= end_bytes <= most_end_bytes):
        raise CorruptCheckpointError("its directory does not fit into the file")
    directory = _read(reader, directory_offset, size - directory_offset, "its directory")
    entries = list(_parse_entries(directory[:directory_bytes], num_records))
    entries.sort(key=lambda entry: entry.header_offset)
    _check_places(entries, directory_offset)
    return Archive(entries, directory_offset, directory)


def _find_directory(reader: Reader) -> tuple[int, int, int]:
    """Offset, bytes and number of records of the central directory."""
    size = reader.num_bytes
    tail_bytes = min(size, _END.size + _MAX_FIELD_BYTES + _ZIP64_LOCATOR.size)
    tail = _read(reader, size - tail_bytes, tail_bytes, "its end")
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        starts_as_zip = _read(reader, 0, min(4, size), "its start") == b"PK\x03\x04"
        reason = "its end is missing, so it was truncated" if starts_as_zip else "it is not a torch zip archive"
        raise CorruptCheckpointError(reason)
    _, _, _, _, num_records, directory_bytes, offset, _ = _END.unpack_from(tail, at)
    locator_at = at - _ZIP64_LOCATOR.size
    if locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\x06\x07":
        _, _, end_offset, _ = _ZIP64_LOCATOR.unpack_from(tail, locator_at)
        if end_offset + _ZIP64_END.size > size:
            raise CorruptCheckpointError("its zip64 end record lies outside the file")
        end = _ZIP64_END.unpack(_read(reader, end_offset, _ZIP64_END.size, "its zip64 end record"))
        if end[0] != 0x06064B50:
            raise CorruptCheckpointError("it has no zip64 end record where its locator says")
        num_records, directory_bytes, offset = end[7], end[8], end[9]
    return offset, directory_bytes, num_records


def _parse_entries(directory: bytes, num_records: int) -> Iterator[Entry]:
    position = 0
    for index in range(num_records):
        if position + _CENTRAL_HEADER.size > len(directory):
            raise CorruptCheckpointError(f"its directory ends within record {index}")
        fields = _CENTRAL_HEADER.unpack_from(directory, position)
        signature, method, crc, compressed, num_bytes = fields[0], fields[4], *fields[7:10]
        name_bytes, extra_bytes, comment_bytes, header_offset = *fields[10:13], fields[16]
        start = position + _CENTRAL_HEADER.size
        if signature != 0x02014B50 or start + name_bytes + extra_bytes > len(directory):
            raise CorruptCheckpointError(f"directory entry {index} is not one")
        name = directory[start : start + name_bytes].decode("utf-8", "backslashreplace")
        extra = directory[start + name_bytes : start + name_bytes + extra_bytes]
        wide = _wide_fields(extra)
        if num_bytes == _MAX32:
            num_bytes = next(wide, num_bytes)
        if compressed == _MAX32:
            compressed = next(wide, compressed)
        if header_offset == _MAX32:
            header_offset = next(wide, header_offset)
        if method != 0 or compressed != num_bytes:
            raise CorruptCheckpointError(f"record {name} is compressed, which torch never writes")
        yield Entry(name, header_offset, num_bytes, crc)
        position = start + name_bytes + extra_bytes + comment_bytes
    if position != len(directory):
        raise CorruptCheckpointError(f"its directory holds more than its {num_records} records")


def _wide_fields(extra: bytes) -> Iterator[int]:
    """The 64-bit numbers of a zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        body = extra[position + 4 : position + 4 + length]
        if kind == 0x0001:
            yield from struct.unpack_from(f"<{len(body) // 8}Q", body)
        position += 4 + length


def _check_places(entries: Sequence[Entry], directory_offset: int) -> None:
    """No record may lie outside the file, over another one, or under another one's name."""
    if not entries:
        raise CorruptCheckpointError("it holds no records")
    if len({entry.name for entry in entries}) != len(entries):
        raise CorruptCheckpointError("two records have one name")
    ends = [*entries[1:], Entry("", directory_offset, 0, 0)]
    for entry, following in zip(entries, ends, strict=True):
        least = entry.header_offset + _LOCAL_HEADER.size + entry.num_bytes
        if least > following.header_offset:
            raise CorruptCheckpointError(f"record {entry.name} reaches over what follows it")


def _read_metadata(reader: Reader, archive: Archive) -> Mapping[str, object] | None:
    """The JSON that our own files carry; None in others."""
    entry = archive.find(METADATA_RECORD)
    if entry is None:
        return None
    if entry.num_bytes > MAX_METADATA_BYTES:
        raise CorruptCheckpointError(f"record {entry.name} is too large to be metadata")
    header = _LOCAL_HEADER.unpack(_read(reader, entry.header_offset, _LOCAL_HEADER.size, f"record {entry.name}"))
    offset = entry.header_offset + _LOCAL_HEADER.size + header[9] + header[10]
    content = _read(reader, offset, entry.num_bytes, f"record {entry.name}")
    if crc32(content) != entry.crc:  # it may say what is plausible, and false
        raise CorruptCheckpointError(f"record {entry.name} does not match its checksum")
    try:
        return msgspec.json.decode(content, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpointError(f"record {entry.name} is not valid metadata: {error}") from error


def layout_of(archive: Archive) -> Layout:
    """The layout that we would have given these records, to be compared with what is there.

    Raises `CorruptCheckpointError` for names that we never write.
    """
    if odd := [entry.name for entry in archive.entries if not entry.name.isascii()]:
        raise CorruptCheckpointError(f"record {odd[0]} has a name that no record of a checkpoint has")
    prefix = len(archive.folder) + 1
    return plan_layout((entry.name[prefix:], entry.num_bytes) for entry in archive.entries)


class _Span(NamedTuple):
    """Work for one thread: either whole records that lie together, or a part of the payload of one large record."""

    first: int
    last: int
    start: int  # within the payload, for a part of a large record
    stop: int


def _spans(archive: Archive) -> Iterator[_Span]:
    first, position = 0, 0
    for index, entry in enumerate(archive.entries):
        if entry.num_bytes > READ_BYTES:
            if first < index:
                yield _Span(first, index, 0, 0)
            part_bytes = 16 * READ_BYTES
            for start in range(0, entry.num_bytes, part_bytes):
                yield _Span(index, index + 1, start, min(start + part_bytes, entry.num_bytes))
            first = index + 1
        elif first < index and entry.header_offset + entry.num_bytes - position > READ_BYTES:
            yield _Span(first, index, 0, 0)
            first = index
        if first == index:
            position = entry.header_offset
    if first < len(archive.entries):
        yield _Span(first, len(archive.entries), 0, 0)


class _Checker:
    """Checks spans, from several threads; each names what it found wrong."""

    def __init__(self, reader: Reader, archive: Archive, layout: Layout | None) -> None:
        self._reader = reader
        self._archive = archive
        self._layout = layout
        self._parts: dict[int, dict[int, tuple[int, int]]] = {}  # record → start → (crc, bytes)
        self._offsets: dict[int, int] = {}  # record → where its payload starts
        self._buffers: list[bytearray] = []

    def check(self, span: _Span) -> list[str]:
        buffer = self._buffers.pop() if self._buffers else bytearray(READ_BYTES + _MOST_HEADER_BYTES)
        try:
            if span.stop:
                return self._check_part(span, memoryview(buffer))
            return list(self._check_records(span, memoryview(buffer)))
        except (EOFError, CorruptCheckpointError) as error:  # the file shrank while it was read
            return [f"record {self._archive.entries[span.first].name}: {error}"]
        finally:
            self._buffers.append(buffer)

    def combine(self) -> list[str]:
        """Join the checksums of the large records' parts."""
        problems = []
        for index, parts in self._parts.items():
            crc, total = 0, 0
            for _, (part_crc, num_bytes) in sorted(parts.items()):
                crc = crc32_combine(crc, part_crc, num_bytes)
                total += num_bytes
            entry = self._archive.entries[index]
            if total == entry.num_bytes and crc != entry.crc:
                problems.append(f"record {entry.name} does not match its checksum")
        return problems

    def payloads(self) -> Sequence[Payload]:
        """Where the records' bytes lie; only after everything was found whole."""
        entries = enumerate(self._archive.entries)
        return [Payload(entry.name, self._offsets[index], entry.num_bytes, entry.crc) for index, entry in entries]

    def _check_records(self, span: _Span, buffer: memoryview) -> Iterator[str]:
        entries = self._archive.entries[span.first : span.last]
        start = entries[0].header_offset
        # Not all the way to the next record: the gap may be gigabytes if the directory lies about a size.
        stop = min(self._end_of(span.last - 1), entries[-1].header_offset + _MOST_HEADER_BYTES + entries[-1].num_bytes)
        data = buffer[: stop - start]
        self._reader.read_into(start, data)
        for index, entry in enumerate(entries, span.first):
            header_at = entry.header_offset - start
            payload_at = self._payload_offset(entry, data[header_at:])
            if payload_at is None or header_at + payload_at + entry.num_bytes > len(data):
                yield f"record {entry.name}: its header is damaged"
                continue
            if not self._header_is_ours(index, data[header_at : header_at + payload_at]):
                yield f"record {entry.name}: its header or padding is damaged"
            self._offsets[index] = entry.header_offset + payload_at
            payload = data[header_at + payload_at : header_at + payload_at + entry.num_bytes]
            if crc32(payload) != entry.crc:
                yield f"record {entry.name} does not match its checksum"

    def _check_part(self, span: _Span, buffer: memoryview) -> list[str]:
        entry = self._archive.entries[span.first]
        probe_bytes = min(_MOST_HEADER_BYTES, self._end_of(span.first) - entry.header_offset)
        header = memoryview(_read(self._reader, entry.header_offset, probe_bytes, entry.name))
        payload_at = self._payload_offset(entry, header)
        if payload_at is None or entry.header_offset + payload_at + entry.num_bytes > self._end_of(span.first):
            return [f"record {entry.name}: its header is damaged"] if span.start == 0 else []
        self._offsets[span.first] = offset = entry.header_offset + payload_at
        crc = 0
        for start in range(span.start, span.stop, READ_BYTES):
            view = buffer[: min(READ_BYTES, span.stop - start)]
            self._reader.read_into(offset + start, view)
            crc = crc32(view, crc)
        self._parts.setdefault(span.first, {})[span.start] = (crc, span.stop - span.start)
        if span.start == 0 and not self._header_is_ours(span.first, header[:payload_at]):
            return [f"record {entry.name}: its header or padding is damaged"]
        return []

    def _end_of(self, index: int) -> int:
        """Where the record after this one starts."""
        entries = self._archive.entries
        return entries[index + 1].header_offset if index + 1 < len(entries) else self._archive.directory_offset

    def _payload_offset(self, entry: Entry, header: memoryview) -> int | None:
        """Bytes from a record's header to its payload; None if it is not this record's header."""
        if len(header) < _LOCAL_HEADER.size:
            return None
        fields = _LOCAL_HEADER.unpack_from(header)
        name_bytes: int = fields[9]
        extra_bytes: int = fields[10]
        name = bytes(header[_LOCAL_HEADER.size : _LOCAL_HEADER.size + name_bytes])
        if fields[0] != 0x04034B50 or name.decode("utf-8", "backslashreplace") != entry.name:
            return None
        return _LOCAL_HEADER.size + name_bytes + extra_bytes

    def _header_is_ours(self, index: int, header: memoryview) -> bool:
        if self._layout is None:
            return True
        record, entry = self._layout.records[index], self._archive.entries[index]
        if record.header_offset != entry.header_offset or len(header) != record.offset - record.header_offset:
            return False
        return bytes(header) == local_header(record, entry.crc)


def _read(reader: Reader, offset: int, num_bytes: int, what: str) -> bytes:
    buffer = bytearray(num_bytes)
    try:
        reader.read_into(offset, memoryview(buffer))
    except EOFError as error:
        raise CorruptCheckpointError(f"{what} is truncated: {error}") from error
    return bytes(buffer)
