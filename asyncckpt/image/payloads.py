"""The records of a verified file, read once more: what was verified may have been damaged since. No torch.

Whoever uses a file's bytes reads them through here, not from a mapping: a file that is truncated, or whose disk fails,
then gives an error, where touching a mapped page would end the process by SIGBUS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from isal.isal_zlib import crc32, crc32_combine

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.image.verify import READ_BYTES, Payload, default_num_threads
from asyncckpt.storage.base import Reader

_PART_BYTES = 8 << 20
_WORTH_THREADS_BYTES = 16 << 20


class Payloads:
    """The payloads of an open file that was verified, or is not yet. Thread-safe. `path` is for messages.

    `by_record` has them by their names without the archive's folder. One read takes `piece_bytes` at most.
    """

    def __init__(
        self,
        reader: Reader,
        path: str,
        payloads: Sequence[Payload],
        *,
        num_threads: int | None = None,
        piece_bytes: int = READ_BYTES,
        is_verified: bool = True,
    ) -> None:
        folder = payloads[0].name.partition("/")[0]  # torch looks into the first record's only
        self.by_record = {
            payload.name[len(folder) + 1 :]: payload for payload in payloads if payload.name.startswith(f"{folder}/")
        }
        self._reader = reader
        self._path = path
        self._num_threads = num_threads or default_num_threads()
        self._piece_bytes = piece_bytes
        self._is_verified = is_verified
        self._by_offset = {payload.offset: payload for payload in payloads if payload.num_bytes}

    def at(self, offset: int) -> Payload | None:
        """The payload that starts there."""
        return self._by_offset.get(offset)

    def read(self, wanted: Sequence[tuple[Payload, memoryview]]) -> None:
        """Fill each view with its payload, and hold it against its checksum. Blocks, without the GIL.

        Raises `CorruptCheckpointError` for what is no longer what was verified, and OSError when it can't be read.
        """
        crcs: list[list[int]] = [[0] * -(-payload.num_bytes // _PART_BYTES) for payload, _ in wanted]
        parts = iter([(index, part) for index, of_record in enumerate(crcs) for part in range(len(of_record))])

        def read_parts() -> None:  # on each thread; the iterator is shared, so each takes what comes next
            for index, part in parts:
                payload, view = wanted[index]
                start = part * _PART_BYTES
                crcs[index][part] = self._read_part(payload, start, view[start : start + _PART_BYTES])

        self._run(read_parts, sum(payload.num_bytes for payload, _ in wanted))
        for (payload, _), of_record in zip(wanted, crcs, strict=True):
            if _joined(of_record, payload.num_bytes) != payload.crc:
                raise self._damaged(payload, "does not match its checksum" + " any more" * self._is_verified)

    def contents(self, record: str) -> bytes:
        """The bytes of a small one; none if it is not there. Raises as `read` does."""
        payload = self.by_record.get(record)
        if payload is None:
            return b""
        buffer = bytearray(payload.num_bytes)
        self.read([(payload, memoryview(buffer))])
        return bytes(buffer)

    def _read_part(self, payload: Payload, start: int, view: memoryview) -> int:
        crc = 0
        try:
            for position in range(0, len(view), self._piece_bytes):
                piece = view[position : position + self._piece_bytes]
                self._reader.read_into(payload.offset + start + position, piece)
                crc = crc32(piece, crc)
        except EOFError as error:
            raise self._damaged(payload, f"was cut off: {error}") from error
        return crc

    def _damaged(self, payload: Payload, how: str) -> CorruptCheckpointError:
        when = "was damaged while it was loaded" if self._is_verified else "is damaged"
        return CorruptCheckpointError(f"{self._path} {when}: record {payload.name} {how}; load an earlier checkpoint")

    def _run(self, read_parts: Callable[[], None], num_bytes: int) -> None:
        if num_bytes < _WORTH_THREADS_BYTES or self._num_threads == 1:
            read_parts()
            return
        with ThreadPoolExecutor(self._num_threads, "asyncckpt-read") as threads:
            for future in [threads.submit(read_parts) for _ in range(self._num_threads)]:
                future.result()


def _joined(crcs: Sequence[int], num_bytes: int) -> int:
    joined = 0
    for crc, part_bytes in zip(crcs, _sizes(num_bytes), strict=True):
        joined = crc32_combine(joined, crc, part_bytes)
    return joined


def _sizes(num_bytes: int) -> Iterator[int]:
    for start in range(0, num_bytes, _PART_BYTES):
        yield min(_PART_BYTES, num_bytes - start)
