"""Paths that may be URLs. Pure."""

from __future__ import annotations

import re
from pathlib import Path, PosixPath

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def scheme_of(path: str) -> str:
    """The scheme of a URL; "" for a path on this machine."""
    found = _SCHEME.match(path)
    return found[1].lower() if found else ""


class URLPath(PosixPath):
    """A URL with a path's parts (`name`, `parent`, `/`), and its own form as text: nothing on this machine."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)


def as_path(path: str) -> Path:
    """A path, or URL, as people handle it."""
    return URLPath(path) if scheme_of(path) else Path(path)
