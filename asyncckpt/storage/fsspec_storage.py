"""What all file systems that fsspec opens have in common: connecting, listing, deleting, claims, errors. No torch.

fsspec has no conditional writes that all of them share, so a claim is only as good as its holder's manners: of two
writers that start within the same moment both may go on for a few seconds, until the first look at each other's claim.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from asyncckpt.paths import scheme_of
from asyncckpt.storage.base import Reader, committing
from asyncckpt.storage.claim import ClaimedStorage
from asyncckpt.storage.fsspec_errors import explained
from asyncckpt.storage.fsspec_files import RangeReader, Temporary
from asyncckpt.storage.options import own_options


class FsspecStorage(ClaimedStorage):
    """Files in one kind of file system. `options` are those of fsspec's class for it; nothing is asked before use.

    `is_elsewhere_too` says whether another process can open the same file system by the same scheme and options.
    """

    def __init__(
        self, options: Mapping[str, Any] | None = None, *, is_elsewhere_too: bool = True, **claim_secs: float
    ) -> None:
        super().__init__(**claim_secs)
        self._options = own_options(options or {})
        self._is_elsewhere_too = is_elsewhere_too
        self._connecting = threading.Lock()
        self._file_systems: dict[tuple[int, str], Any] = {}

    # --- connecting ---

    def find(self, path: str) -> tuple[Any, str]:
        """The file system that a URL is on, connected, and the path there. Blocks the first time."""
        key = (os.getpid(), "/".join(path.split("/", 3)[:3]))  # a forked child connects anew
        with self._connecting:
            file_system = self._file_systems.get(key)
            if file_system is None or not self.is_connected(file_system):
                with explained(key[1]):
                    file_system = self._file_systems[key] = self.connect(path)
        return file_system, self.place(file_system, path)

    def place(self, file_system: Any, path: str) -> str:
        """The path on the file system. Raises OSError (EINVAL) if it would not be all of the URL's.

        Some take "?" for the beginning of a query, as fsspec's own parser of URLs does, and leave it out.
        """
        place: str = file_system._strip_protocol(path)
        if not self.key(file_system, place).endswith(path.split("://", 1)[1].partition("/")[2].rstrip("/")):
            raise OSError(
                errno.EINVAL,
                f"{scheme_of(path)}:// takes no such name: it cuts it off at a '?', a '#', or a tab",
                path,
            )
        return place

    def key(self, file_system: Any, place: str) -> str:
        """What the file system takes for the file's name, of a path on it."""
        return place

    def connect(self, path: str) -> Any:
        """A new connection to the file system that a URL is on, one that nobody else uses."""
        from fsspec import get_filesystem_class
        from fsspec.dircache import DirCache

        kind = get_filesystem_class(scheme_of(path))
        server = "/".join(path.split("/", 3)[:3])  # a path's "?" or "#" would be taken for options
        file_system = kind(**{**kind._get_kwargs_from_urls(server), **self._options}, skip_instance_cache=True)
        file_system.dircache = DirCache(use_listings_cache=False)  # as an option not all kinds take it
        return file_system

    def is_connected(self, file_system: Any) -> bool:
        """Whether it is still good for requests."""
        return True

    # --- reading ---

    def open(self, path: str, *, follow_links: bool = True) -> Reader:
        return RangeReader(*self.find(path), path)

    def list_names(self, directory: str) -> list[str]:
        file_system, place = self.find(directory)
        with explained(directory):
            entries = file_system.ls(place, detail=True)
        names = {entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if not _is_itself(entry, place)}
        return sorted(names)

    # --- writing ---

    def delete(self, paths: Sequence[str]) -> None:
        for path in dict.fromkeys(paths):
            file_system, place = self.find(path)
            with contextlib.suppress(FileNotFoundError), explained(path):
                file_system.rm_file(place)

    def link(self, source: str, destination: str) -> None:
        """By reading and writing all of it, where a kind of file system has nothing better."""
        if source != destination:
            self.copy(source, destination)

    def copy(self, source: str, destination: str) -> None:
        """Write `destination` anew with what `source` holds."""
        with (
            self.open(source, follow_links=False) as reader,
            committing(self.begin(destination, reader.num_bytes)) as upload,
        ):
            buffer = memoryview(bytearray(min(upload.piece_bytes, reader.num_bytes)))
            for offset in range(0, reader.num_bytes, upload.piece_bytes):
                piece = buffer[: reader.num_bytes - offset]
                reader.read_into(offset, piece)
                upload.write(offset, piece)

    # --- who writes ---

    def is_shared(self, directory: str) -> bool:
        return self._is_elsewhere_too

    def alive_names(self) -> Collection[str]:
        return Temporary.alive

    def sweep_file(self, path: str) -> bool:
        self.delete([path])
        return True


def _is_itself(entry: Mapping[str, Any], place: str) -> bool:
    """Some list a file as its own directory, or a directory's marker in it."""
    return bool(entry["name"].strip("/") == place.strip("/"))
