"""A disk as strict POSIX has it: what was done to it, and what of that a crash may leave.

A file's data is durable only after an fsync of that file, a directory's entries only after one of that directory; a
rename is one act, and durable once both directories are synced. Anything else may have arrived or not, each by itself.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = 0
_NEVER = -1  # awaited by what no later sync makes durable


@dataclass(frozen=True)
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Resize:
    inode: int
    num_bytes: int


@dataclass(frozen=True)
class Grow:
    """To at least so many bytes, the new ones zero."""

    inode: int
    num_bytes: int


@dataclass(frozen=True)
class Enter:
    """A file or directory, new or not, gets a name."""

    directory: int
    name: str
    inode: int
    is_directory: bool = False


@dataclass(frozen=True)
class Move:
    source_directory: int
    source_name: str
    directory: int
    name: str
    inode: int


@dataclass(frozen=True)
class Remove:
    directory: int
    name: str
    inode: int


Change = Write | Resize | Grow | Enter | Move | Remove


@dataclass(frozen=True)
class Sync:
    """Of a file or a directory; one that failed may have dropped a file's data, and no later one brings it back."""

    inode: int
    succeeded: bool = True


@dataclass(frozen=True)
class Tree:
    """What a disk holds, by path; files with one inode number are one file."""

    directories: tuple[str, ...]
    files: tuple[tuple[str, int, bytes], ...]

    def digest(self) -> bytes:
        """The same for trees that nobody can tell apart."""
        known: dict[int, int] = {}
        digest = hashlib.blake2b(repr(self.directories).encode(), digest_size=16)
        for path, inode, content in self.files:
            digest.update(f"{path}\0{known.setdefault(inode, len(known))}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.digest()

    def write(self, base: Path) -> None:
        """Make the empty directory `base` hold it."""
        for path in self.directories:
            os.mkdir(base / path)
        first: dict[int, Path] = {}
        for path, inode, content in self.files:
            if inode in first:
                os.link(first[inode], base / path)
            else:
                first[inode] = base / path
                (base / path).write_bytes(content)


@dataclass
class Disk:
    """Contents of files and entries of directories, by inode number; a number is never used again."""

    files: dict[int, bytes] = field(default_factory=dict)
    directories: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})

    @classmethod
    def read(cls, base: Path) -> Disk:
        """The real directory `base`."""
        disk = cls()
        numbers: dict[int, int] = {}

        def read_into(path: Path, directory: int) -> None:
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                number = numbers.setdefault(entry.inode(), len(numbers) + 1)
                disk.directories[directory][entry.name] = number
                if entry.is_dir():
                    disk.directories[number] = {}
                    read_into(Path(entry.path), number)
                else:
                    disk.files[number] = Path(entry.path).read_bytes()

        read_into(base, ROOT)
        return disk

    def copy(self) -> Disk:
        return Disk(dict(self.files), {inode: dict(entries) for inode, entries in self.directories.items()})

    def apply(self, change: Change) -> None:
        match change:
            case Write(inode, offset, data):
                old = self.files.get(inode, b"")
                self.files[inode] = old[:offset].ljust(offset, b"\0") + data + old[offset + len(data) :]
            case Resize(inode, num_bytes):
                self.files[inode] = self.files.get(inode, b"")[:num_bytes].ljust(num_bytes, b"\0")
            case Grow(inode, num_bytes):
                self.files[inode] = self.files.get(inode, b"").ljust(num_bytes, b"\0")
            case Enter(directory, name, inode, is_directory):
                self.directories.setdefault(directory, {})[name] = inode
                if is_directory:
                    self.directories.setdefault(inode, {})
            case Move(source_directory, source_name, directory, name, inode):
                self._remove(source_directory, source_name, inode)
                self.directories.setdefault(directory, {})[name] = inode
            case Remove(directory, name, inode):
                self._remove(directory, name, inode)

    def _remove(self, directory: int, name: str, inode: int) -> None:
        entries = self.directories.setdefault(directory, {})
        if entries.get(name) == inode:
            del entries[name]

    def tree(self) -> Tree:
        """What can be reached by name."""
        directories: list[str] = []
        files: list[tuple[str, int, bytes]] = []

        def walk(directory: int, prefix: str) -> None:
            for name, inode in sorted(self.directories[directory].items()):
                if inode in self.directories:
                    directories.append(prefix + name)
                    walk(inode, f"{prefix}{name}/")
                else:
                    files.append((prefix + name, inode, self.files.get(inode, b"")))

        walk(ROOT, "")
        return Tree(tuple(directories), tuple(files))


@dataclass(eq=False)
class Pending:
    """A change, and the syncs of which inodes it still awaits."""

    change: Change
    awaits: set[int]

    @property
    def is_of_data(self) -> bool:
        return isinstance(self.change, Write | Resize | Grow)


class Unsettled:
    """A disk on which changes are under way."""

    def __init__(self, disk: Disk) -> None:
        self._settled = disk.copy()
        self._pending: list[Pending] = []

    def change(self, change: Change) -> None:
        self._pending.append(Pending(change, _touched(change)))

    def sync(self, sync: Sync) -> None:
        for pending in self._pending:
            if sync.succeeded:
                pending.awaits.discard(sync.inode)
            elif pending.is_of_data and sync.inode in pending.awaits:
                pending.awaits.add(_NEVER)
        self._settle()

    def _settle(self) -> None:
        """Apply what is durable, unless something in the same place, done before, is not."""
        left: list[Pending] = []
        blocked: set[int] = set()
        for pending in self._pending:
            touched = _touched(pending.change)
            if pending.awaits or touched & blocked:
                left.append(pending)
                blocked |= touched
            else:
                self._settled.apply(pending.change)
        nameable = {inode for entries in self._settled.directories.values() for inode in entries.values()}
        nameable |= {pending.change.inode for pending in left if not pending.is_of_data}
        # The data of files that have lost their last name for good can't be seen by anybody.
        self._pending = [pending for pending in left if not pending.is_of_data or pending.change.inode in nameable]

    def free(self) -> list[Pending]:
        """What a crash may leave out, each by itself, in the order it was done."""
        return [pending for pending in self._pending if pending.awaits]

    def after_crash(
        self, arrived: Collection[Pending], instead: Mapping[Pending, Sequence[Change]] | None = None
    ) -> Tree:
        """What is there if of the free changes only these arrived, some of them as something less."""
        disk = self._settled.copy()
        for pending in self._pending:
            if not pending.awaits or pending in arrived:
                for change in (instead or {}).get(pending, (pending.change,)):
                    disk.apply(change)
        return disk.tree()


def _touched(change: Change) -> set[int]:
    match change:
        case Write(inode) | Resize(inode) | Grow(inode):
            return {inode}
        case Enter(directory) | Remove(directory):
            return {directory}
        case Move(source_directory, _, directory):
            return {source_directory, directory}


def blocks(write: Write, block_bytes: int) -> Iterator[Write]:
    """The write, cut where a disk's blocks begin."""
    end = write.offset + len(write.data)
    start = write.offset
    while start < end:
        stop = min(end, start // block_bytes * block_bytes + block_bytes)
        yield Write(write.inode, start, write.data[start - write.offset : stop - write.offset])
        start = stop
