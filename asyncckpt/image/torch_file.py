"""torch's reader on a file whose bytes are checked: mapped, or read record by record; and what its errors mean."""

from __future__ import annotations

import contextlib
import mmap as mmap_module
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

import torch

from asyncckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from asyncckpt.image.checked_file import CheckedFile
from asyncckpt.image.payloads import Payloads
from asyncckpt.storage.local import LocalReader

MapLocation = Callable[[Any, str], Any] | torch.device | str | dict[str, str] | None

# The functions that tensors are pickled by, and those of them that use a storage without looking at its bytes.
_REBUILD = re.compile(rb"_rebuild_\w+")
_REBUILT_UNSEEN = frozenset({b"_rebuild_tensor", b"_rebuild_tensor_v2", b"_rebuild_tensor_v3", b"_rebuild_parameter"})

_OUT_OF_MEMORY = re.compile("DefaultCPUAllocator|[Cc]annot allocate|unable to mmap|out of memory")


def looks_at_nothing(payloads: Payloads, map_location: MapLocation) -> bool:
    """Whether torch makes the tensors without touching their bytes, which may be gone by then: that is a SIGBUS."""
    if not is_on_host(map_location) or payloads.contents("byteorder") != sys.byteorder.encode():
        return False  # moved to a device, or turned around
    return set(_REBUILD.findall(payloads.contents("data.pkl"))) <= _REBUILT_UNSEEN


def is_on_host(map_location: MapLocation) -> bool:
    """Whether everything stays in host memory, or is not read at all ("meta")."""
    return map_location in ("cpu", "meta", torch.device("cpu"), torch.device("meta"))


def read_checked(payloads: Payloads, map_location: MapLocation, *, weights_only: bool) -> Any:
    """Into memory, every byte against its checksum on the way."""
    file = CheckedFile(payloads)
    try:
        return torch.load(cast(IO[bytes], file), map_location=map_location, weights_only=weights_only, mmap=False)
    except Exception:
        if file.error is not None:
            raise file.error from None
        raise


def map_file(reader: LocalReader, path: str, map_location: MapLocation, *, weights_only: bool) -> Any:
    """What torch.load makes of an open file that has been checked, its tensors mapped, privately."""
    name = _descriptor_path(reader, path)
    with _private_mapping():
        return torch.load(name, map_location=map_location, weights_only=weights_only, mmap=True)


def read_legacy(reader: LocalReader, path: str, map_location: MapLocation, *, weights_only: bool) -> Any:
    """Into memory, from torch's format without checksums."""
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
def clear_errors(path: str, map_location: MapLocation, *, weights_only: bool) -> Iterator[None]:
    """Say what torch's errors mean. Errors of the caller's own code (classes, `map_location`) pass as they are."""
    only_file_to_blame = weights_only and is_on_host(map_location)
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
