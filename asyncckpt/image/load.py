"""Loading: verify a file through one descriptor, then map that same descriptor with torch, or read it once more."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.image.file import file_path, open_checkpoint, read_anew, to_be_mapped
from asyncckpt.image.mapped_file import MappedFile
from asyncckpt.image.partial import load_part
from asyncckpt.image.payloads import Payloads
from asyncckpt.image.selection import select
from asyncckpt.image.torch_file import (
    MapLocation,
    clear_errors,
    looks_at_nothing,
    map_file,
    read_checked,
    read_legacy,
)
from asyncckpt.image.verify import default_num_threads, verify_payloads
from asyncckpt.storage.base import Reader
from asyncckpt.storage.local import LocalReader
from asyncckpt.storage.places import Places
from asyncckpt.warn import warn

# What torch.save(..., _use_new_zipfile_serialization=False) writes first: a pickled magic number.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_NUM_ATTEMPTS = 3  # at a file that is written to, or touched, while it is loaded


def load(
    path: str | os.PathLike[str],
    map_location: MapLocation = "cpu",
    *,
    weights_only: bool = True,
    mmap: bool = True,
    keys: Sequence[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Load a checkpoint after checking every byte of it. Blocks; thread-safe.

    Takes files of asyncckpt and of torch.save, by a path or a URL (`s3://bucket/run/step100.pt`, opened with fsspec's
    `storage_options`), whose file is fetched into memory first (anew, if it is replaced meanwhile). On the CPU plain
    tensors are mapped from the file, privately: writing to them never changes it, and replacing or deleting the file
    does not disturb them. What changes the file in place while it is loaded is found; later it would change tensors
    that were not looked at yet, and truncating it would end the process. `mmap=False` reads tensors into memory
    instead, each against its checksum: then nothing that happens to the file matters any more. So are all of another
    `map_location` (torch.load's; the default puts everything on the CPU), and files with tensors that torch looks at to
    load them (sparse, quantized).

    With `keys` only a part of nested dictionaries is loaded: `keys=["model_state_dict"]` gives the weights alone, and
    `["model_state_dict.encoder", "epoch"]` less (as `asyncckpt inspect` prints them). Of a file that asyncckpt wrote no
    tensors but the part's are read, or fetched, and what is read is checked, and kept in memory. Files of torch.save,
    other `map_location`s, `weights_only=False` and unusual tensors take reading all of it.

    With `weights_only` (the default) nothing in the file can run code; `weights_only=False` unpickles freely, so use it
    only for files whose author you trust.

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError` (naming the record), `UnsafeCheckpointError` (naming what
    the file wanted to call), `CheckpointError` for a key that nothing is at, and for `storage_options` that
    can't be used, and OSError when reading fails.
    """
    name, storage = file_path(path), Places(storage_options)

    def read() -> Any:
        with open_checkpoint(storage, name) as reader:
            if keys is not None and weights_only and map_location in ("cpu", torch.device("cpu")):
                part = load_part(reader, name, _checked(keys))
                if part is not None:
                    return part
            with to_be_mapped(reader) as file:
                state = load_from(file, name, map_location, weights_only=weights_only, mmap=mmap).state
        return state if keys is None else select(state, _checked(keys), name)

    return read_anew(name, read)


def _checked(keys: Sequence[str]) -> Sequence[str]:
    if isinstance(keys, str) or not keys or not all(isinstance(key, str) and key for key in keys):
        raise TypeError(f"keys is a list of paths of keys, as ['model_state_dict'], not {keys!r}")
    return keys


@dataclass(frozen=True)
class Loaded:
    """What a file holds, and says of itself (`metadata`).

    `file` gives the tensors' bytes once more, from the file rather than from its mapping; None: nothing is mapped.
    """

    state: Any
    metadata: Mapping[str, object] | None
    file: MappedFile | None


def load_from(
    reader: LocalReader, path: str, map_location: MapLocation = "cpu", *, weights_only: bool = True, mmap: bool = True
) -> Loaded:
    """Load an open file as `load` does, and leave it open. `path` is for messages."""
    for _ in range(_NUM_ATTEMPTS):
        before = reader.last_change()
        try:
            payloads, metadata = _check(reader, path)
            with clear_errors(path, map_location, weights_only=weights_only):
                if payloads is None:
                    state = read_legacy(reader, path, map_location, weights_only=weights_only)
                elif not (mmap and looks_at_nothing(payloads, map_location)):
                    return Loaded(read_checked(payloads, map_location, weights_only=weights_only), metadata, None)
                else:
                    state = map_file(reader, path, map_location, weights_only=weights_only)
        except Exception:
            if reader.last_change() == before:
                raise
        else:
            if reader.last_change() == before:
                return Loaded(state, metadata, MappedFile(reader, payloads) if payloads is not None else None)
        # Somebody writes to the file, or has only touched it: what was loaded may not be what was checked.
    raise CorruptCheckpointError(f"{path} keeps being written to while it is loaded")


def load_to_restore(reader: LocalReader, path: str, *, weights_only: bool = True) -> Loaded:
    """As `load_from`, mapped only where all tensors can be read apart from the mapping.

    Objects that are unpickled freely hide theirs, and other systems than Linux don't say what is mapped where.
    """
    return load_from(reader, path, weights_only=weights_only, mmap=weights_only and sys.platform == "linux")


def _check(reader: Reader, path: str) -> tuple[Payloads | None, Mapping[str, object] | None]:
    """Its payloads and its metadata; raises unless it is whole. None of the legacy format, which has no checksums."""
    start = memoryview(bytearray(min(len(_LEGACY_MAGIC), reader.num_bytes)))
    try:
        reader.read_into(0, start)
    except EOFError as error:
        raise CorruptCheckpointError(f"{path} was cut off while it was loaded: {error}") from error
    if bytes(start) == _LEGACY_MAGIC:
        warn(f"{path} is in torch's legacy format, which has no checksums: loaded unverified")
        return None, None
    report, payloads = verify_payloads(reader, path, num_threads=default_num_threads())
    if not report.ok:
        more = f" (and {len(report.problems) - 1} more problems)" if len(report.problems) > 1 else ""
        raise CorruptCheckpointError(f"{path} is damaged: {report.problems[0]}{more}; load an earlier checkpoint")
    return Payloads(reader, path, payloads), report.metadata
