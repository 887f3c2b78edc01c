"""What a process that has a claim to a directory does, without the claim, whose objects would be in the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from asyncckpt.storage import claim


@dataclass(eq=False)
class _Claimed:
    directory: str
    are_ours: bool = True

    def end_at_exit(self) -> None:
        pass


@contextmanager
def claimed(directory: str) -> Iterator[None]:
    """Temporary names of this process, in this directory, are those of a writer that has claimed it."""
    beats: Any = _Claimed(directory)
    claim._beating.add(beats)
    try:
        yield
    finally:
        claim._beating.discard(beats)
