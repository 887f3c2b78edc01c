"""Loading: verify a file through one descriptor, then map that same descriptor with torch."""

from __future__ import annotations

import contextlib
import mmap as mmap_module
import os
import pickle
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from asyncckpt.errors import CorruptCheckpointError, UnsafeCheckpointError
from asyncckpt.image.file import local_path, open_checkpoint
from asyncckpt.image.verify import default_num_threads, verify_reader
from asyncckpt.storage.base import Reader
from asyncckpt.storage.local import LocalReader

MapLocation = Callable[[Any, str], Any] | torch.device | str | dict[str, str] | None

# What torch.save(..., _use_new_zipfile_serialization=False) writes first: a pickled magic number.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_OUT_OF_MEMORY = re.compile("DefaultCPUAllocator|[Cc]annot allocate|unable to mmap|out of memory")


def load(
    path: str | os.PathLike[str],
    map_location: MapLocation = "cpu",
    *,
    weights_only: bool = True,
    mmap: bool = True,
) -> Any:
    """Load a checkpoint after checking every byte of it. Blocks; thread-safe.

    Takes files of asyncckpt and of torch.save. CPU tensors are mapped from the file, privately: writing to them never
    changes it, and replacing or deleting the file does not disturb them (truncating it in place would). `mmap=False`
    reads them into memory instead. `map_location` is torch.load's; the default puts everything on the CPU.

    With `weights_only` (the default) nothing in the file can run code; `weights_only=False` unpickles freely, so use it
    only for files whose author you trust.

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError` (naming the record), `UnsafeCheckpointError` (naming what
    the file wanted to call), and OSError when reading fails.
    """
    name = local_path(path)
    with open_checkpoint(name) as reader:
        return load_reader(reader, name, map_location, weights_only=weights_only, mmap=mmap)


def load_reader(
    reader: LocalReader, path: str, map_location: MapLocation = "cpu", *, weights_only: bool = True, mmap: bool = True
) -> Any:
    """Load an open file as `load` does, and leave it open. `path` is for messages."""
    mmap = _check(reader, path) and mmap
    mapping = _private_mapping() if mmap else contextlib.nullcontext()
    with mapping, _clear_errors(path, map_location, weights_only=weights_only):
        return torch.load(
            _descriptor_path(reader, path), map_location=map_location, weights_only=weights_only, mmap=mmap
        )


def _check(reader: Reader, path: str) -> bool:
    """Raise unless the file is whole; False for the legacy format, which has no checksums."""
    start = memoryview(bytearray(min(len(_LEGACY_MAGIC), reader.num_bytes)))
    reader.read_into(0, start)
    if bytes(start) == _LEGACY_MAGIC:
        warnings.warn(f"{path} is in torch's legacy format, which has no checksums: loaded unverified", stacklevel=3)
        return False
    report = verify_reader(reader, path, num_threads=default_num_threads())
    if not report.ok:
        more = f" (and {len(report.problems) - 1} more problems)" if len(report.problems) > 1 else ""
        raise CorruptCheckpointError(f"{path} is damaged: {report.problems[0]}{more}; load an earlier checkpoint")
    return True


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
    only_file_to_blame = weights_only and map_location in ("cpu", "meta", torch.device("cpu"), torch.device("meta"))
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
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if not only_file_to_blame or _OUT_OF_MEMORY.search(str(error)):
            raise
        raise CorruptCheckpointError(f"{path} holds a pickle that makes no sense: {error!r}") from error
