"""The names of files. Pure."""

from __future__ import annotations

import re

_TEMPORARY_NAME = re.compile(r"\.asyncckpt-[0-9a-f]{16}-.*\.tmp", re.DOTALL)
_MAX_NAME_BYTES = 143  # NAME_MAX of eCryptfs, the least we know


def temporary_name(attempt: str, name: str) -> str:
    """The temporary file of one attempt (16 hex digits, random) to write `name`; cut to what a name may hold."""
    prefix, suffix = f".asyncckpt-{attempt}-", ".tmp"
    room = _MAX_NAME_BYTES - len(prefix) - len(suffix)
    return prefix + name.encode("utf-8", "surrogateescape")[:room].decode("utf-8", "ignore") + suffix


def is_temporary_name(name: str) -> bool:
    """Whether `name` is one that `temporary_name` makes."""
    return _TEMPORARY_NAME.fullmatch(name) is not None
