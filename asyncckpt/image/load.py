"""Loading: verify a file through one descriptor, then map that same descriptor with torch, or read it once more."""

from __future__ import annotations

import contextlib
import mmap as mmap_module
import os
import pickle
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

import torch

from asyncckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from asyncckpt.image.checked_file import CheckedFile
from asyncckpt.image.file import file_path, open_to_load
from asyncckpt.image.mapped_file import MappedFile
from asyncckpt.image.payloads import Payloads
from asyncckpt.image.verify import default_num_threads, verify_payloads
from asyncckpt.storage.base import Reader
from asyncckpt.storage.local import LocalReader
from asyncckpt.storage.places import Places

MapLocation = Callable[[Any, str], Any] | torch.device | str | dict[str, str] | None

# What torch.save(..., _use_new_zipfile_serialization=False) writes first: a pickled magic number.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# The functions that tensors are pickled by, and those of them that use a storage without looking at its bytes.
_REBUILD = re.compile(rb"_rebuild_\w+")
_REBUILT_UNSEEN = frozenset({b"_rebuild_tensor", b"_rebuild_tensor_v2", b"_rebuild_tensor_v3", b"_rebuild_parameter"})

_NUM_ATTEMPTS = 3  # at a file that is written to, or touched, while it is loaded
_OUT_OF_MEMORY = re.compile("DefaultCPUAllocator|[Cc]annot allocate|unable to mmap|out of memory")


def load(
    path: str | os.PathLike[str],
    map_location: MapLocation = "cpu",
    *,
    weights_only: bool = True,
    mmap: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Load a checkpoint after checking every byte of it. Blocks; thread-safe.

    Takes files of asyncckpt and of torch.save, by a path or a URL (`s3://bucket/run/step100.pt`, opened with fsspec's
    `storage_options`), whose file is fetched into memory first. On the CPU plain tensors are mapped from the file,
    privately: writing to them never changes it, and replacing or deleting the file does not disturb them. What changes
    the file in place while it is loaded is found; later it would change tensors that were not looked at yet, and
    truncating it would end the process. `mmap=False` reads tensors into memory instead, each against its checksum: then
    nothing that happens to the file matters any more. So are all of another `map_location` (torch.load's; the default
    puts everything on the CPU), and files with tensors that torch looks at to load them (sparse, quantized).

    With `weights_only` (the default) nothing in the file can run code; `weights_only=False` unpickles freely, so use it
    only for files whose author you trust.

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError` (naming the record), `UnsafeCheckpointError` (naming what
    the file wanted to call), and OSError when reading fails.
    """
    name = file_path(path)
    with open_to_load(Places(storage_options), name) as reader:
        return load_from(reader, name, map_location, weights_only=weights_only, mmap=mmap).state


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
            with _clear_errors(path, map_location, weights_only=weights_only):
                if payloads is None:
                    state = _load_legacy(reader, path, map_location, weights_only=weights_only)
                elif not (mmap and _looks_at_nothing(payloads, map_location)):
                    return Loaded(_read(payloads, map_location, weights_only=weights_only), metadata, None)
                else:
                    state = _map(reader, path, map_location, weights_only=weights_only)
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
        warnings.warn(f"{path} is in torch's legacy format, which has no checksums: loaded unverified", stacklevel=4)
        return None, None
    report, payloads = verify_payloads(reader, path, num_threads=default_num_threads())
    if not report.ok:
        more = f" (and {len(report.problems) - 1} more problems)" if len(report.problems) > 1 else ""
        raise CorruptCheckpointError(f"{path} is damaged: {report.problems[0]}{more}; load an earlier checkpoint")
    return Payloads(reader, path, payloads), report.metadata


def _looks_at_nothing(payloads: Payloads, map_location: MapLocation) -> bool:
    """Whether torch makes the tensors without touching their bytes, which may be gone by then: that is a SIGBUS."""
    if not _is_on_host(map_location) or payloads.contents("byteorder") != sys.byteorder.encode():
        return False  # moved to a device, or turned around
    return set(_REBUILD.findall(payloads.contents("data.pkl"))) <= _REBUILT_UNSEEN


def _is_on_host(map_location: MapLocation) -> bool:
    return map_location in ("cpu", "meta", torch.device("cpu"), torch.device("meta"))


def _read(payloads: Payloads, map_location: MapLocation, *, weights_only: bool) -> Any:
    """Into memory, every byte against its checksum on the way."""
    file = CheckedFile(payloads)
    try:
        return torch.load(cast(IO[bytes], file), map_location=map_location, weights_only=weights_only, mmap=False)
    except Exception:
        if file.error is not None:
            raise file.error from None
        raise


def _map(reader: LocalReader, path: str, map_location: MapLocation, *, weights_only: bool) -> Any:
    name = _descriptor_path(reader, path)
    with _private_mapping():
        return torch.load(name, map_location=map_location, weights_only=weights_only, mmap=True)


def _load_legacy(reader: LocalReader, path: str, map_location: MapLocation, *, weights_only: bool) -> Any:
    name = _descriptor_path(reader, path)
    return torch.load(name, map_location=map_location, weights_only=weights_only, mmap=False)


def _descriptor_path(reader: LocalReader, path: str) -> str:
    """The verified file itself, whatever has been renamed over its name meanwhile."""
    return f"/proc/self/fd/{reader.fd}" if sys.platform == "linux" else path


_mapping_lock = threading.RLock()


def _forget_in_child() -> None:
    global _mapping_lock
    _mapping_lock = threading.RLock()  # another thread may have held it


os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def _private_mapping() -> Iterator[None]:
    """torch maps as an option says; shared, a write to a loaded tensor would change the file.

    The option is process-wide in older torch (2.13: one per thread), so mapped loads take turns.
    """
    with _mapping_lock:
        before = torch.serialization.get_default_mmap_options() or mmap_module.MAP_PRIVATE
        torch.serialization.set_default_mmap_options(mmap_module.MAP_PRIVATE)
        try:
            yield
        finally:
            torch.serialization.set_default_mmap_options(before)


@contextlib.contextmanager
def _clear_errors(path: str, map_location: MapLocation, *, weights_only: bool) -> Iterator[None]:
    """Say what torch's errors mean. Errors of the caller's own code (classes, `map_location`) pass as they are."""
    only_file_to_blame = weights_only and _is_on_host(map_location)
    try:
        yield
    except pickle.UnpicklingError as error:
        if not weights_only:
            raise CorruptCheckpointError(f"{path} holds a pickle that makes no sense: {error}") from error
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        what = f"it refers to {named[1]}" if named else reason[1] if reason else str(error).splitlines()[0]
        raise UnsafeCheckpointError(
            f"{path} was not loaded, because it could run code: {what}. If you trust its author, allow that class with "
            "torch.serialization.add_safe_globals, or pass weights_only=False"
        ) from error
    except (OSError, MemoryError, CheckpointError):
        raise
    except Exception as error:
        if not only_file_to_blame or _OUT_OF_MEMORY.search(str(error)):
            raise
        raise CorruptCheckpointError(f"{path} holds a pickle that makes no sense: {error!r}") from error
