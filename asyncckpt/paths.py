"""Paths that may be URLs. Pure."""

from __future__ import annotations

import re
from pathlib import Path, PosixPath

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_COLLAPSED_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_CHAINED = re.compile(r"[A-Za-z0-9+.-]+::[^/]*:/")


def scheme_of(path: str) -> str:
    """The scheme of a URL; "" for a path on this machine."""
    found = _SCHEME.match(path)
    return found[1].lower() if found else ""


def collapsed_scheme_of(path: str) -> str:
    """The scheme of what was a URL before `pathlib` made one slash of two; "" for anything else."""
    found = _COLLAPSED_SCHEME.match(path)
    return found[1].lower() if found else ""


def is_chained(path: str) -> bool:
    """Whether it is several of fsspec's URLs in one, as `simplecache::s3://bucket/a.pt` is."""
    return _CHAINED.match(path) is not None


class URLPath(PosixPath):
    """A URL with a path's parts (`name`, `parent`, `/`), and its own form as text: nothing on this machine."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)


def as_path(path: str) -> Path:
    """A path, or URL, as people handle it."""
    return URLPath(path) if scheme_of(path) else Path(path)
