"""`asyncckpt verify`: every byte of a file, or of all in a directory. No torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from asyncckpt.cli.output import clean, format_bytes, format_count, progress_bar
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.image.file import file_path, open_checkpoint
from asyncckpt.image.verify import default_num_threads, verify_reader
from asyncckpt.naming import BEST_NAME, REGISTRY_NAME, is_checkpoint_name
from asyncckpt.records import VerifyReport
from asyncckpt.registry.recovery import read_registry
from asyncckpt.storage import system_calls
from asyncckpt.storage.base import Reader
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.places import Places

Advance = Callable[[int], None]


@dataclass(frozen=True)
class VerifiedFile:
    """One file; whole when there are no problems."""

    path: str
    ok: bool
    num_bytes: int
    num_records: int
    problems: Sequence[str]


@dataclass(frozen=True)
class Verified:
    """`ok` when all files are whole, and none that the registry lists is missing."""

    path: str
    ok: bool
    num_bytes: int
    files: Sequence[VerifiedFile]


def gather(path: str) -> Verified:
    """Read everything; blocks, with a progress bar on a terminal.

    Damage is reported; so is what can't be read, in a directory. Raises `CheckpointNotFoundError` when there is nothing
    to verify, OSError when the one file can't be read, and `RegistryError`.
    """
    files = _verify_directory(path) if os.path.isdir(path) else [_verify_file(path)]
    return Verified(path, all(file.ok for file in files), sum(file.num_bytes for file in files), files)


def draw(verified: Verified, console: Console) -> None:
    """The problems of each damaged file below its name."""
    for file in verified.files:
        console.print("whole  " if file.ok else "DAMAGED", style="green" if file.ok else "bold red", end=" ")
        console.print(f"{clean(file.path)} ({format_bytes(file.num_bytes)})", soft_wrap=True)
        for problem in file.problems:
            console.print(f"        {clean(problem)}", soft_wrap=True)
    num_damaged = sum(not file.ok for file in verified.files)
    outcome = f"{num_damaged} damaged" if num_damaged else "all whole"
    if len(verified.files) > 1:
        console.print(f"{format_count(len(verified.files), 'file')}, {format_bytes(verified.num_bytes)}: {outcome}")


def _verify_file(path: str) -> VerifiedFile:
    with progress_bar("verifying", _size_of(path)) as advance:
        return _to_file(_verify(path, advance))


def _verify_directory(directory: str) -> list[VerifiedFile]:
    storage = LocalStorage()
    recorded, damage = read_registry(storage, directory)
    names = {name for name in storage.list_names(directory) if is_checkpoint_name(name) or name == BEST_NAME}
    names = {name for name in names if not _is_link(os.path.join(directory, name))}  # somebody's: they lead anywhere
    names |= {str(info.filepath) for info in recorded.checkpoints} if recorded else set()
    if not names and not damage:
        raise CheckpointNotFoundError(f"there are no checkpoint files in {directory}")
    paths = _without_second_names([os.path.join(directory, name) for name in sorted(names)])
    files: list[VerifiedFile] = []
    missing: set[str] = set()
    if damage:
        problem = f"{damage}; `asyncckpt repair` rebuilds it"
        files.append(VerifiedFile(os.path.join(directory, REGISTRY_NAME), False, 0, 0, (problem,)))
    with progress_bar("verifying", sum(map(_size_of, paths))) as advance:
        for path in paths:
            try:
                files.append(_to_file(_verify(path, advance, follow_links=False)))
            except CheckpointNotFoundError:
                missing.add(path)
                files.append(VerifiedFile(path, False, 0, 0, ("the registry lists it, but the file is gone",)))
            except OSError as error:
                files.append(VerifiedFile(path, False, 0, 0, (f"it can't be read: {error.strerror or error}",)))
    if missing:  # asked again, since training may have deleted them, as it should, while others were verified
        recorded, _ = read_registry(storage, directory)
        names = {str(info.filepath) for info in recorded.checkpoints} if recorded else set()
        files = [file for file in files if file.path not in missing or os.path.basename(file.path) in names]
    return files


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


def _verify(path: str, advance: Advance, *, follow_links: bool = True) -> VerifyReport:
    try:
        with open_checkpoint(Places(), file_path(path), follow_links=follow_links) as reader:
            return verify_reader(_CountingReader(reader, advance), path, num_threads=default_num_threads())
    except CorruptCheckpointError as error:  # a directory or a device of that name
        return VerifyReport(path, 0, 0, (str(error),), None)


def _to_file(report: VerifyReport) -> VerifiedFile:
    return VerifiedFile(report.path, report.ok, report.num_bytes, report.num_records, report.problems)


def _size_of(path: str) -> int:
    try:
        return system_calls.stat(path).st_size
    except OSError:
        return 0


class _CountingReader(Reader):
    """Tells how many bytes were read."""

    def __init__(self, reader: Reader, advance: Advance) -> None:
        self._reader = reader
        self._advance = advance
        self.num_bytes = reader.num_bytes

    def read_into(self, offset: int, view: memoryview) -> None:
        self._reader.read_into(offset, view)
        self._advance(len(view))

    def close(self) -> None:
        self._reader.close()
