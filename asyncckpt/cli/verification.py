"""`asyncckpt verify`: every byte of a file, or of all in a directory. No torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from asyncckpt.cli.output import clean, format_bytes, format_count
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.image.file import file_path, num_reading_threads, open_checkpoint, read_anew
from asyncckpt.image.verify import read_archive, verify_reader
from asyncckpt.image.whole_checksum import matches_store
from asyncckpt.naming import BEST_NAME, REGISTRY_NAME, is_checkpoint_name
from asyncckpt.paths import scheme_of
from asyncckpt.progress import Advance, CountingReader, progress_bar
from asyncckpt.registry.recovery import read_registry
from asyncckpt.storage import system_calls
from asyncckpt.storage.base import Reader, Storage
from asyncckpt.storage.places import is_directory

READ, STORED = "read", "checksum of the store"


@dataclass(frozen=True)
class VerifiedFile:
    """One file; whole when there are no problems.

    `method` says how that is known: all of it was read, or the checksum that the store keeps of it is the one that
    follows from its directory.
    """

    path: str
    ok: bool
    num_bytes: int
    num_records: int
    problems: Sequence[str]
    method: str = READ


@dataclass(frozen=True)
class Verified:
    """`ok` when all files are whole, and none that the registry lists is missing."""

    path: str
    ok: bool
    num_bytes: int
    files: Sequence[VerifiedFile]


class Verifier:
    """Verifies files of one storage. `is_quick`: by the checksum that the store keeps, wherever it keeps one."""

    def __init__(self, storage: Storage, *, is_quick: bool = False) -> None:
        self._storage = storage
        self._is_quick = is_quick

    def verify(self, path: str, advance: Advance, *, follow_links: bool = True) -> VerifiedFile:
        """Raises `CheckpointNotFoundError`, and OSError when it can't be read. Damage is a problem, no error."""
        try:
            return read_anew(path, lambda: self._verify(path, advance, follow_links=follow_links))
        except CorruptCheckpointError as error:  # a directory or a device of that name
            return _damaged(path, str(error))

    def _verify(self, path: str, advance: Advance, *, follow_links: bool) -> VerifiedFile:
        with open_checkpoint(self._storage, path, follow_links=follow_links) as reader:
            if self._is_quick and (verified := _verify_by_store(reader, path)) is not None:
                advance(reader.num_bytes)
                return verified
            counting = CountingReader(reader, advance)
            report = verify_reader(counting, path, num_threads=num_reading_threads(reader))
        return VerifiedFile(report.path, report.ok, report.num_bytes, report.num_records, report.problems)

    def size_of(self, path: str, *, follow_links: bool = True) -> int:
        """0 for what can't be opened."""
        try:
            with self._storage.open(path, follow_links=follow_links) as reader:
                return reader.num_bytes
        except OSError:
            return 0


def _verify_by_store(reader: Reader, path: str) -> VerifiedFile | None:
    """None where that can't be done: the store keeps no checksum of the whole, or the file is not of our layout."""
    try:
        is_whole = matches_store(reader)
    except CorruptCheckpointError as error:
        return VerifiedFile(path, False, reader.num_bytes, 0, (str(error),))
    if is_whole is None:
        return None
    num_records = len(read_archive(reader).entries)
    problems = () if is_whole else ("the store's checksum of it is not the one that its directory asks for",)
    return VerifiedFile(path, is_whole, reader.num_bytes, num_records, problems, STORED)


def gather(storage: Storage, path: str, *, is_quick: bool = False) -> Verified:
    """Read everything (or, if `is_quick`, what the store's checksums leave); blocks, with a progress bar on a terminal.

    Damage is reported; so is what can't be read, in a directory. Raises `CheckpointNotFoundError` when there is nothing
    to verify, OSError when the one file can't be read, and `RegistryError`.
    """
    verifier = Verifier(storage, is_quick=is_quick)
    if is_directory(storage, path):
        files = _verify_directory(storage, path, verifier)
    else:
        with progress_bar("verifying", verifier.size_of(path)) as advance:
            files = [verifier.verify(file_path(path), advance)]
    return Verified(path, all(file.ok for file in files), sum(file.num_bytes for file in files), files)


def draw(verified: Verified, console: Console) -> None:
    """The problems of each damaged file below its name."""
    for file in verified.files:
        console.print("whole  " if file.ok else "DAMAGED", style="green" if file.ok else "bold red", end=" ")
        how = f", by the {file.method}, not read" if file.method != READ else ""
        console.print(f"{clean(file.path)} ({format_bytes(file.num_bytes)}{how})", soft_wrap=True)
        for problem in file.problems:
            console.print(f"        {clean(problem)}", soft_wrap=True)
    num_damaged = sum(not file.ok for file in verified.files)
    outcome = f"{num_damaged} damaged" if num_damaged else "all whole"
    if len(verified.files) > 1:
        console.print(f"{format_count(len(verified.files), 'file')}, {format_bytes(verified.num_bytes)}: {outcome}")


def _verify_directory(storage: Storage, directory: str, verifier: Verifier) -> list[VerifiedFile]:
    recorded, damage = read_registry(storage, directory)
    names = {name for name in storage.list_names(directory) if is_checkpoint_name(name) or name == BEST_NAME}
    if not scheme_of(directory):  # links are somebody's: they lead anywhere
        names = {name for name in names if not _is_link(os.path.join(directory, name))}
    names |= {str(info.filepath) for info in recorded.checkpoints} if recorded else set()
    if not names and not damage:
        raise CheckpointNotFoundError(f"there are no checkpoint files in {directory}")
    paths = [os.path.join(directory, name) for name in sorted(names)]
    if not scheme_of(directory):
        paths = _without_second_names(paths)
    files: list[VerifiedFile] = []
    missing: set[str] = set()
    if damage:
        files.append(_damaged(os.path.join(directory, REGISTRY_NAME), f"{damage}; `asyncckpt repair` rebuilds it"))
    with progress_bar("verifying", sum(verifier.size_of(path, follow_links=False) for path in paths)) as advance:
        for path in paths:
            try:
                files.append(verifier.verify(path, advance, follow_links=False))
            except CheckpointNotFoundError:
                missing.add(path)
                files.append(_damaged(path, "the registry lists it, but the file is gone"))
            except OSError as error:
                files.append(_damaged(path, f"it can't be read: {error.strerror or error}"))
    if missing:  # asked again, since training may have deleted them, as it should, while others were verified
        recorded, _ = read_registry(storage, directory)
        names = {str(info.filepath) for info in recorded.checkpoints} if recorded else set()
        files = [file for file in files if file.path not in missing or os.path.basename(file.path) in names]
    return files


def _damaged(path: str, problem: str) -> VerifiedFile:
    return VerifiedFile(path, False, 0, 0, (problem,))


def _is_link(path: str) -> bool:
    try:
        return stat.S_ISLNK(system_calls.lstat(path).st_mode)
    except OSError:
        return False


def _without_second_names(paths: Sequence[str]) -> list[str]:
    """`best_model.pt` is mostly a hard link: its bytes need not be read twice."""
    kept: dict[object, str] = {}
    for path in sorted(paths, key=lambda path: os.path.basename(path) == BEST_NAME):
        try:
            status = system_calls.lstat(path)
            kept.setdefault((status.st_dev, status.st_ino), path)
        except OSError:
            kept[path] = path
    return list(kept.values())
