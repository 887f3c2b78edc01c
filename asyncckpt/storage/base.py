"""The storage contract: bytes in, bytes out, one atomic commit. No torch.

Everything above writes through an `Upload` and reads through a `Reader`; what atomic and durable mean for a kind of
storage is known only to its implementation. `tests/storage/conformance.py` is the contract as tests.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

_MAX_LOOKS = 10  # at a small file that somebody keeps replacing


class ConflictError(FileExistsError):
    """What is at the path is not the version that was expected there: somebody else has written it."""


class Upload(ABC):
    """One file on its way: invisible at its path until `commit`. `write` is thread-safe, the rest is not.

    `piece_bytes` is how large the writes are, `num_threads` how many may usefully run at once. `version` is the
    committed file's, after `commit`. Any error leaves the upload fit only for `abort`.
    """

    piece_bytes: int
    num_threads: int
    version: str = ""

    @abstractmethod
    def write(self, offset: int, view: memoryview) -> None:
        """Write all of `view` at `offset`, a multiple of `piece_bytes`; all views but the last are that long. Blocks.

        Every byte of the file is written exactly once, in any order.
        """

    @abstractmethod
    def sync(self) -> None:
        """Make the contents durable. Blocks."""

    @abstractmethod
    def reader(self) -> Reader | None:
        """Read back what was written, before it is committed.

        None where that can't be had, and the storage itself has held every piece against its checksum.
        """

    @abstractmethod
    def commit(self) -> None:
        """Make the synced file visible at its path, replacing what was there, in one act; durable on return. Blocks.

        After an OSError the path holds the old file or the new one, each whole; the new one may not be durable. Raises
        `ConflictError` if it is not the version that was expected which it would replace.
        """

    @abstractmethod
    def abort(self) -> None:
        """Throw the upload away. Safe after an error and after `commit`; never raises OSError."""

    def close(self) -> None:  # noqa: B027
        """Give up what is still held after `commit`. It may take a while; nobody needs to wait for it."""


@contextmanager
def committing(upload: Upload) -> Iterator[Upload]:
    """Sync, commit and close the upload at the end of the block; abort it after any error."""
    try:
        yield upload
        upload.sync()
        upload.commit()
        upload.close()
    except BaseException:
        upload.abort()
        raise


class Reader(ABC):
    """One open file: what is read is of one version, whatever is renamed or deleted around it, or an OSError (ESTALE).

    Thread-safe but for `close`.
    """

    num_bytes: int
    version: str = ""

    @abstractmethod
    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`. Blocks. Raises `EOFError` when the file ends before, OSError when it can't."""

    def stored_checksum(self) -> int | None:
        """The CRC32 of the whole file that the storage keeps, and answers for; None where it keeps none. Blocks."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give the file up."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


# How a lock's holder begins what it says of itself when it only finishes what a process that ended has left to it: it
# is worth waiting for.
FINISHING = "finishing: "


class Lock(ABC):
    """The right to write in a directory, until `release` or this process ends, however it ends. Not thread-safe.

    Neither forked children nor other programs that this process starts inherit it. It may be shared with another
    process, by sending it `share()` and `Storage.receive_lock` there: then it lasts until `release`, or until both have
    ended. Storage without locks of its own has claims, which outlast a dead holder for some seconds.
    """

    @abstractmethod
    def is_intact(self) -> bool:
        """Whether it still guards the directory at its path, which somebody may have moved, removed or taken over."""

    @abstractmethod
    def describe(self, holder: str) -> None:
        """Tell others who has it. Never raises OSError: it is a courtesy."""

    @abstractmethod
    def share(self) -> int | bytes:
        """What to send to the process that is to hold it too: a descriptor, which stays ours, or plain bytes."""

    @abstractmethod
    def inherit(self) -> None:
        """Whoever shared it has ended: from now on it is ours alone, and `release` lets the next one in."""

    @property
    def claim(self) -> str:
        """What tells this holder's writes from those of all others, ever; "" for a lock that can't be taken over."""
        return ""

    def is_taken_over(self) -> bool:
        """Whether somebody else has it by now, as the storage says when it is asked. Blocks."""
        return False

    @abstractmethod
    def release(self) -> None:
        """Let the next one in. Safe to call twice; in a forked child it leaves the parent's lock alone.

        One that was received is only given back: whoever shared it still has it.
        """


class Storage(ABC):
    """A place for files. Thread-safe.

    Where files have versions, a write may say which one it expects to replace, "" being none at all; elsewhere
    `expected` is not looked at.
    """

    def has_versions(self, directory: str) -> bool:
        """Whether files there have versions. Asks nobody."""
        return False

    @abstractmethod
    def begin(self, path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
        """Start writing a file of `num_bytes` at `path`, making its directories as needed. Blocks.

        Raises OSError when the place can't be written; nothing is left behind then.
        """

    @abstractmethod
    def piece_bytes(self, path: str, num_bytes: int) -> int:
        """How large the pieces of such an upload will be. Asks nobody."""

    @abstractmethod
    def open(self, path: str, *, follow_links: bool = True) -> Reader:
        """Open a committed file. Raises FileNotFoundError when there is none, IsADirectoryError for a directory.

        With `follow_links=False` a symbolic link is an OSError: the name came from a file, not from the user.
        """

    def read(self, path: str, max_bytes: int) -> bytes:
        """The contents of a small file, not a symbolic link. Blocks.

        Raises as `open` does, and OSError when the file is larger, or is cut short while it is read.
        """
        return self.read_version(path, max_bytes)[0]

    def read_version(self, path: str, max_bytes: int) -> tuple[bytes, str]:
        """As `read`, with the version that these are the contents of. What is replaced meanwhile is read anew."""
        for _ in range(_MAX_LOOKS):
            with self.open(path, follow_links=False) as reader:
                if reader.num_bytes > max_bytes:
                    raise OSError(errno.EFBIG, f"larger than {max_bytes:,} bytes", path)
                contents = bytearray(reader.num_bytes)
                try:
                    reader.read_into(0, memoryview(contents))
                except EOFError as error:
                    raise OSError(errno.EIO, str(error), path) from error
                except OSError as error:
                    if error.errno != errno.ESTALE:
                        raise
                    continue
                return bytes(contents), reader.version
        raise OSError(errno.ESTALE, "it was replaced whenever it was read", path)

    def replace(self, path: str, contents: bytes, *, expected: str | None = None) -> str:
        """Write a small file in one act, making its directories as needed; durable on return. Its version. Blocks.

        After an OSError the path holds the old file or the new one, each whole.
        """
        with committing(self.begin(path, len(contents), expected=expected)) as upload:
            upload.write(0, memoryview(contents))
        return upload.version

    def version(self, path: str) -> str:
        """The version of what is there; "" if nothing is, or there are no versions. Blocks."""
        return ""

    @abstractmethod
    def list_names(self, directory: str) -> list[str]:
        """The names in a directory, sorted. Blocks.

        Raises FileNotFoundError when there is none, where there can be an empty one.
        """

    @abstractmethod
    def delete(self, paths: Sequence[str]) -> None:
        """Delete files of one directory; durable on return. Those that are gone already don't matter. Blocks.

        After an OSError, also for a directory among the paths, some are deleted and some are not.
        """

    @abstractmethod
    def link(self, source: str, destination: str) -> None:
        """Make `destination` hold what `source` holds, in one act, without a second copy where that can be had.

        Durable on return, if `source` is. Replaces what is there. The two may share their bytes for good: a program
        that writes into one in place changes both. Blocks, long only where it takes a copy.

        Raises FileNotFoundError when there is no source, or no directory for the destination, and OSError for a source
        that is a symbolic link. After an OSError the destination holds the old file or the new one, each whole.
        """

    @abstractmethod
    def lock(self, directory: str, holder: str) -> Lock:
        """Take the directory's lock, making the directory as needed; `holder` tells others who has it.

        Raises BlockingIOError, with what its holder said of itself as `strerror`, when it is taken; waits only to find
        out whether its holder lives, where that takes time. Where there are no locks it is always had, and the log says
        so once.
        """

    @abstractmethod
    def receive_lock(self, directory: str, share: int | bytes) -> Lock:
        """The lock that another process shared with this one. A descriptor belongs to it now."""

    @abstractmethod
    def is_locked(self, directory: str) -> bool:
        """Whether somebody who lives holds the directory's lock. Blocks where only time can tell whether he does.

        Changes nothing, but may be in the way of who takes it now.
        """

    @abstractmethod
    def holder(self, directory: str) -> str:
        """What the holder of the directory's lock said of itself; "" if nobody did, or it has been released.

        It may have ended since (see `is_locked`). Blocks for a small read. Raises OSError.
        """

    def is_near(self, directory: str) -> bool:
        """Whether a question takes so little time that training may wait for the answer."""
        return True

    def is_shared(self, directory: str) -> bool:
        """Whether another process, given the same options, finds the same files there. Asks nobody."""
        return True

    @property
    def plain_options(self) -> dict[str, Any]:
        """The options as another process can be told them; none at all, if some are no plain data."""
        return {}

    def device(self, directory: str) -> int | None:
        """Which file system the directory is on, or would be made on; None where there is no such thing. Blocks."""
        return None

    @abstractmethod
    def sweep(self, directory: str, *, has_lock: bool = False) -> list[str]:
        """Remove what dead writers left half-written in `directory`, and return the paths.

        Uploads that are still alive, in this process or any other, and files of other programs are never touched. Where
        it can't be seen who is alive, only who has the directory's lock may know that nobody else is. What can't be
        listed or removed is left for the next sweep. Blocks.
        """
