"""The zip layout: where every byte of a checkpoint file lies, known before a single byte is copied. No torch.

The file is what torch.save writes, a zip archive of stored (never compressed) records inside one folder. Two things
differ, both invisible to readers: sizes are known up front, so headers carry them and no data descriptors follow the
payloads; and large payloads are page-aligned. Format reference: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FOLDER = "archive"  # always the same, so that renaming the file is harmless
METADATA_RECORD = "asyncckpt.json"
MAX_METADATA_BYTES = 16 << 20

# Small records stay dense (page alignment everywhere made 419 MB out of 28 MB of small tensors).
SMALL_ALIGNMENT = 64
LARGE_ALIGNMENT = 4096
LARGE_RECORD_BYTES = 1 << 20

_LOCAL_HEADER = struct.Struct("<IHHHHHIIIHH")
_CENTRAL_HEADER = struct.Struct("<IHHHHHHIIIHHHHHII")
_ZIP64_END = struct.Struct("<IQHHIIQQQQ")
_ZIP64_LOCATOR = struct.Struct("<IIQI")
_END = struct.Struct("<IHHHHIIH")
_ZIP64_EXTRA = struct.Struct("<HHQQ")
_PADDING_EXTRA = struct.Struct("<HH")

_PADDING_ID = 0x4246  # "FB", the extra field that torch pads with
_ZIP64_ID = 0x0001
_MAX32 = 0xFFFFFFFF
_MAX16 = 0xFFFF
_VERSION = 20
_VERSION_ZIP64 = 45
_DOS_DATE = 0x21  # 1980-01-01: equal states give equal files


class Record(NamedTuple):
    """One member of the archive: its header starts at `header_offset`, its payload at `offset`."""

    name: str
    header_offset: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Layout:
    """Every record's place; `num_bytes` is the size of the finished file."""

    records: Sequence[Record]
    directory_offset: int
    num_bytes: int

    def digest(self) -> str:
        """A SHA-256 of all offsets and sizes: equal digests mean that equal keys lie at equal places."""
        numbers = array("Q")
        for record in self.records:
            numbers.append(record.offset)
            numbers.append(record.num_bytes)
        return hashlib.sha256(numbers.tobytes()).hexdigest()


def plan_layout(sizes: Iterable[tuple[str, int]]) -> Layout:
    """Lay out records of the given (name, bytes), in this order."""
    records: list[Record] = []
    position = 0
    directory_bytes = 0
    name_overhead = len(FOLDER) + 1
    for name, num_bytes in sizes:
        name_bytes = name_overhead + len(name)
        zip64 = num_bytes >= _MAX32
        start = position + _LOCAL_HEADER.size + name_bytes + _PADDING_EXTRA.size
        if zip64:
            start += _ZIP64_EXTRA.size
        alignment = LARGE_ALIGNMENT if num_bytes >= LARGE_RECORD_BYTES else SMALL_ALIGNMENT
        offset = -(-start // alignment) * alignment
        records.append(Record(name, position, offset, num_bytes))
        directory_bytes += _CENTRAL_HEADER.size + name_bytes
        directory_bytes += _zip64_central_bytes(num_bytes, position)
        position = offset + num_bytes
    end_bytes = _END.size
    if _needs_zip64_end(len(records), position, directory_bytes):
        end_bytes += _ZIP64_END.size + _ZIP64_LOCATOR.size
    return Layout(records, position, position + directory_bytes + end_bytes)


def local_header(record: Record, crc: int) -> bytes:
    """The bytes from `record.header_offset` up to its payload: header, name, zip64 sizes, zero padding."""
    name = f"{FOLDER}/{record.name}".encode("ascii")
    zip64 = record.num_bytes >= _MAX32
    size32 = _MAX32 if zip64 else record.num_bytes
    extra_bytes = record.offset - record.header_offset - _LOCAL_HEADER.size - len(name)
    header = _LOCAL_HEADER.pack(
        0x04034B50,
        _VERSION_ZIP64 if zip64 else _VERSION,
        0,
        0,
        0,
        _DOS_DATE,
        crc,
        size32,
        size32,
        len(name),
        extra_bytes,
    )
    zip64_extra = _ZIP64_EXTRA.pack(_ZIP64_ID, 16, record.num_bytes, record.num_bytes) if zip64 else b""
    padding_bytes = extra_bytes - len(zip64_extra) - _PADDING_EXTRA.size
    return b"".join((header, name, zip64_extra, _PADDING_EXTRA.pack(_PADDING_ID, padding_bytes), bytes(padding_bytes)))


def central_directory(layout: Layout, crcs: Sequence[int]) -> bytes:
    """The bytes from `layout.directory_offset` to the end of the file."""
    parts: list[bytes] = []
    for record, crc in zip(layout.records, crcs, strict=True):
        parts.append(_central_header(record, crc))
    directory_bytes = sum(map(len, parts))
    num_records = len(layout.records)
    offset = layout.directory_offset
    if _needs_zip64_end(num_records, offset, directory_bytes):
        end_offset = offset + directory_bytes
        parts.append(
            _ZIP64_END.pack(
                0x06064B50,
                _ZIP64_END.size - 12,
                _VERSION_ZIP64,
                _VERSION_ZIP64,
                0,
                0,
                num_records,
                num_records,
                directory_bytes,
                offset,
            )
        )
        parts.append(_ZIP64_LOCATOR.pack(0x07064B50, 0, end_offset, 1))
    parts.append(
        _END.pack(
            0x06054B50,
            0,
            0,
            min(num_records, _MAX16),
            min(num_records, _MAX16),
            min(directory_bytes, _MAX32),
            min(offset, _MAX32),
            0,
        )
    )
    return b"".join(parts)


def _central_header(record: Record, crc: int) -> bytes:
    name = f"{FOLDER}/{record.name}".encode("ascii")
    large = record.num_bytes >= _MAX32
    far = record.header_offset >= _MAX32
    size32 = _MAX32 if large else record.num_bytes
    offset32 = _MAX32 if far else record.header_offset
    wide = ([record.num_bytes, record.num_bytes] if large else []) + ([record.header_offset] if far else [])
    extra = struct.pack(f"<HH{len(wide)}Q", _ZIP64_ID, 8 * len(wide), *wide) if wide else b""
    version = _VERSION_ZIP64 if wide else _VERSION
    header = _CENTRAL_HEADER.pack(
        0x02014B50,
        version,
        version,
        0,
        0,
        0,
        _DOS_DATE,
        crc,
        size32,
        size32,
        len(name),
        len(extra),
        0,
        0,
        0,
        0,
        offset32,
    )
    return header + name + extra


def _zip64_central_bytes(num_bytes: int, header_offset: int) -> int:
    wide = (2 if num_bytes >= _MAX32 else 0) + (1 if header_offset >= _MAX32 else 0)
    return 4 + 8 * wide if wide else 0


def _needs_zip64_end(num_records: int, directory_offset: int, directory_bytes: int) -> bool:
    return num_records >= _MAX16 or directory_offset >= _MAX32 or directory_bytes >= _MAX32
