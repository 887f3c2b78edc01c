"""`asyncckpt copy`: a checkpoint, or a whole directory, from any storage to any other. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from asyncckpt.cli.output import clean, format_bytes, format_count
from asyncckpt.copying import COPIED, FAILED, GONE, CopiedFile, DirectoryCopy, copy_file
from asyncckpt.errors import CheckpointError, CheckpointNotFoundError
from asyncckpt.image.file import file_path
from asyncckpt.progress import progress_bar
from asyncckpt.storage.base import Storage
from asyncckpt.storage.places import full_path, is_directory


@dataclass(frozen=True)
class Copied:
    """`ok` when everything that is to be kept is at the destination, whole."""

    source: str
    destination: str
    ok: bool
    files: Sequence[CopiedFile]


def gather(storage: Storage, source: str, destination: str) -> Copied:
    """Copy; blocks, with a progress bar on a terminal. Durable on return. Raises as `copy_file`, `DirectoryCopy` do."""
    if not storage.is_shared(full_path(destination)):
        raise CheckpointError(
            f"{destination} is in this process's memory, and gone when it ends: copy to another place"
        )
    if is_directory(storage, source):
        files = _copy_directory(storage, full_path(source), full_path(destination))
    else:
        files = [_copy_file(storage, file_path(source), destination)]
    return Copied(source, destination, all(file.outcome != FAILED for file in files), files)


def _copy_directory(storage: Storage, source: str, destination: str) -> list[CopiedFile]:
    if source == destination:
        raise CheckpointError(f"{source} can't be copied into itself")
    copy = DirectoryCopy(storage, source, destination)
    with progress_bar("copying", copy.num_bytes) as advance:
        return list(copy.run(advance))


def _copy_file(storage: Storage, source: str, destination: str) -> CopiedFile:
    """Into a directory by its own name, as cp does."""
    is_into = destination.endswith("/")
    destination = full_path(destination)
    if is_into or is_directory(storage, destination):
        destination = os.path.join(destination, os.path.basename(source))
    if source == destination:
        raise CheckpointError(f"{source} can't be copied onto itself")
    try:
        with storage.open(source) as reader:
            num_bytes = reader.num_bytes
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"there is no checkpoint at {source}") from error
    with progress_bar("copying", num_bytes) as advance:
        return copy_file(storage, source, destination, advance)


def draw(copied: Copied, console: Console) -> None:
    """A line for each file, then the sum."""
    for file in copied.files:
        style = "bold red" if file.outcome == FAILED else ""
        size = f" ({format_bytes(file.num_bytes)})" if file.num_bytes else ""
        problem = f": {clean(file.problem)}" if file.outcome == FAILED else ""
        name = clean(os.path.basename(file.source))
        console.print(f"{file.outcome}: {name}{size}{problem}", style=style, soft_wrap=True)
    by_outcome = {kind: [file for file in copied.files if file.outcome == kind] for kind in (COPIED, GONE, FAILED)}
    copied_bytes = sum(file.num_bytes for file in by_outcome[COPIED])
    console.print(
        f"{format_count(len(by_outcome[COPIED]), 'checkpoint')} copied to {clean(copied.destination)}, "
        f"{format_bytes(copied_bytes)}"
        + (f"; {len(by_outcome[GONE])} dropped by retention meanwhile" if by_outcome[GONE] else "")
        + (f"; {len(by_outcome[FAILED])} failed" if by_outcome[FAILED] else ""),
        soft_wrap=True,
    )
