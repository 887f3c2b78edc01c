"""What the machine, its kernel and this user's limits let asyncckpt do."""

from __future__ import annotations

import fcntl
import importlib.metadata
import mmap
import os
import platform
import resource

from asyncckpt.cli.output import format_bytes, format_count
from asyncckpt.doctor.finding import NOTE, OK, WARNING, Finding, Place, reason
from asyncckpt.service.memory import default_memory_limit
from asyncckpt.threads import num_cores

_LITTLE_MEMORY_BYTES = 1 << 30
_FEW_FILES = 256
_MADV_POPULATE_WRITE = 23


def check_memory(place: Place) -> Finding:
    """The default limit: of what the machine and every control group over this process leave."""
    limit = default_memory_limit(place.root)
    found = f"{format_bytes(limit)} for images: 0.6 of what machine and control groups leave"
    choice = f"memory_limit={limit:_}, unless you set it; a larger state is written in pieces while the caller waits"
    if limit < _LITTLE_MEMORY_BYTES:
        return Finding(WARNING, found, choice, "raise the container's memory limit if the state is larger")
    return Finding(OK, found, choice)


def check_memfd(place: Place) -> Finding:
    """Memory that a writer process can map, and that nobody can take away under it."""
    threads = "images are anonymous memory: only threads can write them"
    if not hasattr(os, "memfd_create"):
        return Finding(NOTE, "this system has none", threads)
    try:
        fd = os.memfd_create("asyncckpt-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return Finding(NOTE, f"refused: {reason(error)}", threads, "allow memfd_create in the sandbox")
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        os.ftruncate(fd, 0)
    except PermissionError:  # as it should
        return Finding(OK, "there, with seals", "a writer process maps the images")
    except OSError as error:
        return Finding(NOTE, f"there, without seals: {reason(error)}", threads)
    finally:
        os.close(fd)
    return Finding(NOTE, "there, but its seals don't hold", threads)


def check_cores(place: Place) -> Finding:
    """Saving takes turns with training where there is only one."""
    num = num_cores()
    found = f"{format_count(num, 'core')} for this process"
    choice = "writes at low priority (nice 10)"
    return Finding(OK if num > 1 else NOTE, found, choice, "" if num > 1 else "one more, and training need not wait")


def check_kernel(place: Place) -> Finding:
    """The calls that make the first save fast (5.14), and tell that a process has ended (5.3)."""
    missing, choices = [], []
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as memory:
            memory.madvise(_MADV_POPULATE_WRITE)
    except (AttributeError, OSError):
        missing.append("MADV_POPULATE_WRITE")
        choices.append("memory is touched when it is written: slower first saves")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        missing.append("pidfd")
        choices.append("a writer process learns of the trainer's end by its socket alone")
    found = f"{platform.system()} {platform.release()}"
    if missing:
        return Finding(NOTE, f"{found}, without {' and '.join(missing)}", "; ".join(choices), "Linux 5.14 has both")
    return Finding(OK, found)


def check_limits(place: Place) -> Finding:
    """`ulimit`: sizes of files, open files, locked memory."""
    file_size, num_files, locked = (
        resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)
    )
    found = f"files of {_size(file_size)}, {_number(num_files)} open, {_size(locked)} locked"
    if file_size != resource.RLIM_INFINITY:
        return Finding(WARNING, found, "a larger checkpoint fails with EFBIG", "ulimit -f unlimited")
    if num_files != resource.RLIM_INFINITY and num_files < _FEW_FILES:
        return Finding(WARNING, found, "", f"ulimit -n {_FEW_FILES} or more")
    return Finding(OK, found)


def check_packages(place: Place) -> Finding:
    """torch, without importing it."""
    python = f"Python {platform.python_version()}"
    try:
        return Finding(OK, f"torch {importlib.metadata.version('torch')}, {python}")
    except importlib.metadata.PackageNotFoundError:
        return Finding(WARNING, f"no torch, {python}", "can't save or load", "run this with the training's Python")


def _size(limit: int) -> str:
    return "any size" if limit == resource.RLIM_INFINITY else format_bytes(limit)


def _number(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else f"{limit:,}"
