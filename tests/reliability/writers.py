"""Which writers the gates of long runs go through, and how each is asked for."""

from __future__ import annotations

from typing import Any

WRITERS = ["thread", "process"]


def writer_options(writer: str) -> dict[str, Any]:
    """The keyword arguments of a saver or manager; the thread writer is the default."""
    return {} if writer == "thread" else {"writer": writer}
