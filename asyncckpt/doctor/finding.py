"""What a check looks at, and what it finds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from asyncckpt.storage.base import Storage
from asyncckpt.storage.local import LocalStorage

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """`status`: "ok"; "note", worth knowing; "warning", better mended; "problem", checkpoints are not safe so.

    `found` is what there is, `choice` what asyncckpt will do, `advice` what to change; each may be empty.
    """

    status: str
    found: str
    choice: str = ""
    advice: str = ""
    name: str = ""  # the check's


@dataclass(frozen=True)
class Place:
    """The directory, or URL, that files are tried in, with the path for a file to be tried; what is around the process.

    `root` is where /proc and /sys are.
    """

    directory: str
    probe: str = ""
    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    storage: Storage = field(default_factory=LocalStorage)

    def read(self, path: str) -> str:
        """A file of the kernel's. Raises OSError."""
        return (self.root / path).read_text(errors="replace")


def format_latency(secs: float) -> str:
    """0.00025 → "250 µs"."""
    for unit, unit_secs in (("s", 1.0), ("ms", 1e-3)):
        if secs >= unit_secs:
            return f"{secs / unit_secs:.3g} {unit}"
    return f"{secs * 1e6:.3g} µs"


def reason(error: OSError) -> str:
    """In the system's own words, without the path."""
    return error.strerror or str(error)
