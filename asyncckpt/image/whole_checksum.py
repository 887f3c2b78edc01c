"""What the checksum of a whole file must be, by its records' own: known without reading them. No torch."""

from __future__ import annotations

from isal.isal_zlib import crc32, crc32_combine

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.image.layout import METADATA_RECORD, central_directory, local_header
from asyncckpt.image.verify import layout_of, read_archive
from asyncckpt.storage.base import Reader


def whole_checksum(reader: Reader) -> int | None:
    """The CRC32 that all bytes of a file of ours must have; None for files of others, which have gaps.

    Blocks for reading the directory at the file's end. The layout says what headers and padding are. Raises
    `CorruptCheckpointError` if the directory is damaged, and OSError when it can't be read.
    """
    archive = read_archive(reader)
    if archive.find(METADATA_RECORD) is None:
        return None
    layout = layout_of(archive)
    crcs = [entry.crc for entry in archive.entries]
    if archive.directory != central_directory(layout, crcs):
        raise CorruptCheckpointError("the central directory is damaged")
    whole = 0
    for record, crc in zip(layout.records, crcs, strict=True):
        whole = crc32_combine(crc32(local_header(record, crc), whole), crc, record.num_bytes)
    return crc32(archive.directory, whole)


def matches_store(reader: Reader) -> bool | None:
    """Whether the checksum that the storage keeps of the file is the one that its directory asks for.

    None where the storage keeps none, and for files of others. Blocks, and raises, as `whole_checksum`.
    """
    stored = reader.stored_checksum()
    if stored is None:
        return None
    whole = whole_checksum(reader)
    return None if whole is None else whole == stored
