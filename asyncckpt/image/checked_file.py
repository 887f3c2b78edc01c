"""A verified file as torch's reader takes it: nothing that was not checked gets through. No torch."""

from __future__ import annotations

import io
from bisect import bisect_right

from asyncckpt.image.layout import central_directory, local_header, plan_layout
from asyncckpt.image.payloads import Payloads


class CheckedFile(io.RawIOBase):
    """The same records, read through `Payloads`; all that lies around them is made anew, from what was verified.

    torch's reader is C++ and C, so `readinto` raises nothing: it says that the file ends, and keeps why in `error`.
    """

    def __init__(self, payloads: Payloads) -> None:
        self.error: Exception | None = None
        self._source = payloads
        records = {name: payload for name, payload in payloads.by_record.items() if name.isascii()}  # as torch's are
        self._payloads = list(records.values())
        self._layout = plan_layout((name, payload.num_bytes) for name, payload in records.items())
        self._starts = [record.header_offset for record in self._layout.records]
        self._directory = central_directory(self._layout, [payload.crc for payload in self._payloads])
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._layout.num_bytes}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        whole = memoryview(buffer).cast("B")
        view = whole[: max(0, self._layout.num_bytes - self._position)]
        try:
            self._fill(self._position, view)
        except Exception as error:
            self.error = error
            return 0
        self._position += len(view)
        return len(view)

    def _fill(self, start: int, view: memoryview) -> None:
        stop = start + len(view)
        before_directory = max(0, min(len(view), self._layout.directory_offset - start))
        if before_directory:
            self._fill_records(start, view[:before_directory], scans=stop > self._layout.directory_offset)
        first = start + before_directory - self._layout.directory_offset
        view[before_directory:] = self._directory[first : first + len(view) - before_directory]

    def _fill_records(self, start: int, view: memoryview, *, scans: bool) -> None:
        """A header, or a whole payload; zeros for what is read only in search of the directory's end."""
        index = bisect_right(self._starts, start) - 1
        record, payload = self._layout.records[index], self._payloads[index]
        if start == record.offset and len(view) == record.num_bytes:
            self._source.read([(payload, view)])
        elif start + len(view) <= record.offset:
            at = start - record.header_offset
            view[:] = local_header(record, payload.crc)[at : at + len(view)]
        elif scans:
            view[:] = bytes(len(view))
        else:
            raise io.UnsupportedOperation(f"torch reads only a part of record {payload.name}")
