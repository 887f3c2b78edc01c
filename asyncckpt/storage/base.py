"""The storage contract: bytes in, bytes out, one atomic commit. No torch.

Everything above writes through an `Upload` and reads through a `Reader`; what atomic and durable mean for a kind of
storage is known only to its implementation. `tests/storage/conformance.py` is the contract as tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType


class Upload(ABC):
    """One file on its way: invisible at its path until `commit`. `write` is thread-safe, the rest is not.

    `piece_bytes` is how large the writes should be, `num_threads` how many may usefully run at once. Any error leaves
    the upload fit only for `abort`.
    """

    piece_bytes: int
    num_threads: int

    @abstractmethod
    def write(self, offset: int, view: memoryview) -> None:
        """Write all of `view` at `offset`. Blocks. Every byte of the file is written exactly once."""

    @abstractmethod
    def sync(self) -> None:
        """Make the contents durable. Blocks."""

    @abstractmethod
    def reader(self) -> Reader:
        """Read back what was written, before it is committed."""

    @abstractmethod
    def commit(self) -> None:
        """Make the synced file visible at its path, replacing what was there, in one act; durable on return. Blocks.

        After an OSError the path holds the old file or the new one, each whole; the new one may not be durable.
        """

    @abstractmethod
    def abort(self) -> None:
        """Throw the upload away. Safe after an error and after `commit`; never raises OSError."""

    def close(self) -> None:  # noqa: B027
        """Give up what is still held after `commit`. It may take a while; nobody needs to wait for it."""


class Reader(ABC):
    """One open file: it stays the same file whatever is renamed or deleted around it. Thread-safe but for `close`."""

    num_bytes: int

    @abstractmethod
    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`. Blocks. Raises `EOFError` when the file ends before, OSError when it can't."""

    @abstractmethod
    def close(self) -> None:
        """Give the file up."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Storage(ABC):
    """A place for files. Stateless and thread-safe."""

    @abstractmethod
    def begin(self, path: str, num_bytes: int) -> Upload:
        """Start writing a file of `num_bytes` at `path`, making its directories as needed. Blocks.

        Raises OSError when the place can't be written; nothing is left behind then.
        """

    @abstractmethod
    def open(self, path: str) -> Reader:
        """Open a committed file. Raises FileNotFoundError when there is none, IsADirectoryError for a directory."""

    @abstractmethod
    def sweep(self, directory: str) -> list[str]:
        """Remove what dead writers left half-written in `directory`, and return the paths.

        Uploads that are still alive, in this process or any other, and files of other programs are never touched. What
        can't be listed or removed is left for the next sweep. Blocks.
        """
