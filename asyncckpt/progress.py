"""A bar on stderr for what takes long, where somebody looks; and a reader that moves it on. No torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from asyncckpt.storage.base import Reader

if TYPE_CHECKING:
    from rich.progress import Progress

Advance = Callable[[int], None]


@contextmanager
def progress_bar(title: str, total_bytes: int, *, after_secs: float = 0.0) -> Iterator[Advance]:
    """A bar that is gone at the end. Call what it yields with the bytes done, on any thread.

    There is none unless stderr is a terminal and rich is installed, on other ranks than the first, and before it has
    taken `after_secs`.
    """
    progress = _make(title)
    if progress is None:
        yield lambda num_bytes: None
        return
    task = progress.add_task(title, total=total_bytes)
    began = time.monotonic()
    is_over = False

    def advance(num_bytes: int) -> None:
        progress.advance(task, num_bytes)
        if time.monotonic() - began >= after_secs and not is_over:
            progress.start()  # nothing happens if it runs already

    try:
        yield advance
    finally:
        is_over = True
        progress.stop()


def _make(title: str) -> Progress | None:
    if sys.stderr is None or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        return None
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
    except ImportError:
        return None
    columns = (TextColumn(title, markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # the program's own
        redirect_stderr=False,
    )


class CountingReader(Reader):
    """Tells how many bytes were read."""

    def __init__(self, reader: Reader, advance: Advance) -> None:
        self._reader = reader
        self._advance = advance
        self.num_bytes, self.version = reader.num_bytes, reader.version

    def read_into(self, offset: int, view: memoryview) -> None:
        self._reader.read_into(offset, view)
        self._advance(len(view))

    def stored_checksum(self) -> int | None:
        return self._reader.stored_checksum()

    def close(self) -> None:
        self._reader.close()
