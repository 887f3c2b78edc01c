"""Which storage a path belongs to: the local file system, or the one that its URL names. No torch."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from asyncckpt.errors import CheckpointError
from asyncckpt.paths import collapsed_scheme_of, is_chained, scheme_of
from asyncckpt.storage.base import Lock, Reader, Storage, Upload
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.options import s3_options
from asyncckpt.storage.schemes import Way, is_known, make_storage, scheme_named

_SAME_AS = {"s3a": "s3"}  # Hadoop's name for it
_SPELLINGS = {"gcs": "gs", "az": "abfs", "abfss": "abfs", "ssh": "sftp"}
_SERVER = re.compile(r"([^:]*@)?(\[[\da-fA-F:.]+\]|[^:@]*)(:\d+)?")  # the user's name, the host, the port


def one_spelling(place: str) -> str:
    """The same for two full paths, or URLs, that differ in the name of their scheme only."""
    scheme = scheme_of(place)
    return _SPELLINGS.get(scheme, scheme) + place[len(scheme) :]


def full_path(path: str | os.PathLike[str], what: str = "a checkpoint's path") -> str:
    """The absolute form of a path on this machine, or a URL without what makes no difference.

    Raises TypeError, ValueError, and `CheckpointError` for a URL that can't be used.
    """
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"{what} is a str or a Path, not {type(name).__name__}")
    if not name or "\0" in name:
        raise ValueError(f"{what} names a file or a directory, not {name!r}")
    name = _uncollapsed(name, is_text=isinstance(path, str))
    scheme = scheme_of(name)
    if not scheme:
        return os.path.abspath(name)
    rest = name[len(scheme) + len("://") :]
    scheme = _SAME_AS.get(scheme, scheme)
    way = scheme_named(scheme).way
    _check_server(scheme, way, rest.split("/", 1)[0])
    if any(part in (".", "..") for part in rest.split("/")):
        raise CheckpointError(f"{name}: a URL's parts may not be '.' or '..'")
    if rest.startswith("/") and way in ("sftp", "rename"):
        raise CheckpointError(f"{name}: name the server, as in {scheme}://server/run")
    parts = [part for part in rest.split("/") if part]
    if len(parts) < (1 if way == "memory" else 2):
        raise CheckpointError(f"{name}: a bucket, or a server, alone is no place; add a path: {scheme}://bucket/run")
    return f"{scheme}://" + "/".join(parts)


def _uncollapsed(name: str, *, is_text: bool) -> str:
    """What was a URL before it became a Path is that URL again. Raises `CheckpointError` for what only looks like one.

    Left alone, it would name a directory of this machine. No message repeats it: it may hold a secret.
    """
    if is_chained(name):
        raise CheckpointError(f"{name.split('::')[0]}::…: URLs can't be chained here; give the last one alone")
    scheme = collapsed_scheme_of(name)
    if not scheme or not is_known(scheme):
        return name
    if is_text:
        raise CheckpointError(f"{scheme}:/…: write {scheme}://… for a URL, ./{scheme}:/… for a path on this machine")
    return name.replace(":/", "://", 1)


def _check_server(scheme: str, way: Way, server: str) -> None:
    """Raise `CheckpointError` if there are credentials in a bucket's or a server's place; they may hold a slash."""
    if way == "s3" and server.startswith("arn:"):
        raise CheckpointError(
            f"{scheme}://arn:…: an ARN can't be used; an access point has an alias (`aws s3control get-access-point` "
            "tells it), which may stand in a bucket's place"
        )
    if way in ("s3", "objects"):
        is_plain = ":" not in server and not (way == "s3" and "@" in server)
    else:
        is_plain = way == "memory" or _SERVER.fullmatch(server) is not None
    if not is_plain:
        raise CheckpointError(f"{scheme}://…: credentials don't belong into a URL; pass them in storage_options")


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
    """Every place there is, with one set of `storage_options` for those that a URL names.

    `journals` is a directory of this machine, where uploads note how far they are; nobody else's. `never_forks` says
    that this process starts no forked children, so that it may use clients that don't survive that. `name` is what the
    user calls the options.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        journals: str | None = None,
        *,
        never_forks: bool = False,
        name: str = "storage_options",
    ) -> None:
        if not isinstance(options, Mapping | None):
            raise TypeError(f"{name} is a dict, not {type(options).__name__}")
        for option in options or ():
            if not isinstance(option, str):
                raise TypeError(f"{name}: the name of an option is a str, not {type(option).__name__}")
        self.options = dict(options or {})
        self.journals = journals
        self.never_forks = never_forks
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
                make = _MAKERS.get(scheme)
                self._by_scheme[scheme] = make(self) if make else make_storage(scheme, self.options)
            return self._by_scheme[scheme]

    def begin(self, path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
        return self.storage_of(path).begin(path, num_bytes, expected=expected)

    def piece_bytes(self, path: str, num_bytes: int) -> int:
        return self.storage_of(path).piece_bytes(path, num_bytes)

    def open(self, path: str, *, follow_links: bool = True) -> Reader:
        return self.storage_of(path).open(path, follow_links=follow_links)

    def has_versions(self, directory: str) -> bool:
        return self.storage_of(directory).has_versions(directory)

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

    def holder(self, directory: str) -> str:
        return self.storage_of(directory).holder(directory)

    def is_near(self, directory: str) -> bool:
        return self.storage_of(directory).is_near(directory)

    def is_shared(self, directory: str) -> bool:
        if not scheme_of(directory):
            return True
        return self.plain_options == self.options and self.storage_of(directory).is_shared(directory)

    @property
    def plain_options(self) -> dict[str, Any]:
        try:
            plain: dict[str, Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(self.options))
        except (TypeError, ValueError, OverflowError, RecursionError):
            return {}
        return plain if plain == self.options else {}

    def device(self, directory: str) -> int | None:
        return self.storage_of(directory).device(directory)

    def sweep(self, directory: str, *, has_lock: bool = False) -> list[str]:
        return self.storage_of(directory).sweep(directory, has_lock=has_lock)


def _make_s3(places: Places) -> Storage:
    options = s3_options(places.options)
    client = options.pop("client", "s3fs")
    if client == "s3fs":
        from asyncckpt.storage.s3 import S3Storage

        return S3Storage(options, journals=places.journals)
    if client == "obstore":
        from asyncckpt.storage.obstore_client import ObstoreStorage

        return ObstoreStorage(options, journals=places.journals, never_forks=places.never_forks)
    raise CheckpointError(f"storage_options: the client for s3:// is 's3fs' or 'obstore', not {client!r}")


_MAKERS: dict[str, Callable[[Places], Storage]] = {"s3": _make_s3}
