"""Which storage a path belongs to: the local file system, or the one that its URL names. No torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asyncckpt.errors import CheckpointError
from asyncckpt.paths import scheme_of
from asyncckpt.storage.base import Lock, Reader, Storage, Upload
from asyncckpt.storage.local import LocalStorage


def full_path(path: str | os.PathLike[str], what: str = "a checkpoint's path") -> str:
    """The absolute form of a path on this machine, or a URL without what makes no difference.

    Raises TypeError, ValueError, and `CheckpointError` for a URL that can't be used.
    """
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"{what} is a str or a Path, not {type(name).__name__}")
    if not name or "\0" in name:
        raise ValueError(f"{what} names a file or a directory, not {name!r}")
    scheme = scheme_of(name)
    if not scheme:
        return os.path.abspath(name)
    if scheme not in _MAKERS:
        known = ", ".join(f"{known}://" for known in sorted(_MAKERS))
        raise CheckpointError(
            f"{scheme}:// is not a kind of storage that is supported; these are: local paths, {known}"
        )
    rest = name[len(scheme) + len("://") :]
    if "@" in rest.split("/", 1)[0]:
        raise CheckpointError(f"{scheme}://…: credentials don't belong into a URL; pass them in storage_options")
    if any(part in (".", "..") for part in rest.split("/")):
        raise CheckpointError(f"{name}: a URL's parts may not be '.' or '..'")
    parts = [part for part in rest.split("/") if part]
    if len(parts) < 2:
        raise CheckpointError(f"{name}: a bucket alone is no place; add a path, as in {scheme}://bucket/run")
    return f"{scheme}://" + "/".join(parts)


def is_directory(storage: Storage, path: str) -> bool:
    """Whether there is a directory at the path; in a store, anything below it, and no file at it. Blocks."""
    if not scheme_of(path):
        return os.path.isdir(path)
    try:
        with storage.open(path):
            return False
    except FileNotFoundError:
        return bool(storage.list_names(path))


class Places(Storage):
    """Every place there is, with one set of `storage_options` for those that a URL names."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(options or {})
        self._lock = threading.Lock()
        self._local = LocalStorage()
        self._by_scheme: dict[str, Storage] = {}

    def storage_of(self, path: str) -> Storage:
        """The storage that knows this path."""
        scheme = scheme_of(path)
        if not scheme:
            return self._local
        with self._lock:
            if scheme not in self._by_scheme:
                self._by_scheme[scheme] = _MAKERS[scheme](self.options)
            return self._by_scheme[scheme]

    def begin(self, path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
        return self.storage_of(path).begin(path, num_bytes, expected=expected)

    def piece_bytes(self, path: str, num_bytes: int) -> int:
        return self.storage_of(path).piece_bytes(path, num_bytes)

    def open(self, path: str, *, follow_links: bool = True) -> Reader:
        return self.storage_of(path).open(path, follow_links=follow_links)

    def version(self, path: str) -> str:
        return self.storage_of(path).version(path)

    def list_names(self, directory: str) -> list[str]:
        return self.storage_of(directory).list_names(directory)

    def delete(self, paths: Sequence[str]) -> None:
        for storage in {self.storage_of(path) for path in paths}:
            storage.delete([path for path in paths if self.storage_of(path) is storage])

    def link(self, source: str, destination: str) -> None:
        self.storage_of(destination).link(source, destination)

    def lock(self, directory: str, holder: str) -> Lock:
        return self.storage_of(directory).lock(directory, holder)

    def receive_lock(self, directory: str, share: int | bytes) -> Lock:
        return self.storage_of(directory).receive_lock(directory, share)

    def is_locked(self, directory: str) -> bool:
        return self.storage_of(directory).is_locked(directory)

    def is_near(self, directory: str) -> bool:
        return self.storage_of(directory).is_near(directory)

    def device(self, directory: str) -> int | None:
        return self.storage_of(directory).device(directory)

    def sweep(self, directory: str, *, has_lock: bool = False) -> list[str]:
        return self.storage_of(directory).sweep(directory, has_lock=has_lock)


def _make_s3(options: Mapping[str, Any]) -> Storage:
    from asyncckpt.storage.s3 import S3Storage

    return S3Storage(options)


_MAKERS: dict[str, Callable[[Mapping[str, Any]], Storage]] = {"s3": _make_s3}
