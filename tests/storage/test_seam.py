"""One small module issues the file system calls, so that faults can be injected, counted and enumerated at one seam."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import asyncckpt

PACKAGE = Path(asyncckpt.__file__).parent
SEAM = "storage/system_calls.py"

# In `os` and `fcntl`: whatever reaches the file system. The rest (getpid, path.join, fork hooks, …) does not.
CALLS = frozenset(
    """
    access chdir chmod chown close copy_file_range dup fdatasync fdopen fstat fsync ftruncate getxattr link listdir
    lockf lseek lstat makedirs mkdir mkfifo open posix_fallocate pread preadv pwrite pwritev read readlink remove
    removedirs rename renames replace rmdir scandir sendfile setxattr stat statvfs symlink sync truncate unlink utime
    walk write writev fcntl flock ioctl memfd_create
    """.split()  # noqa: SIM905
)
METHODS = frozenset(  # of pathlib
    """
    chmod exists glob hardlink_to is_dir is_file iterdir mkdir open read_bytes read_text rename rglob rmdir samefile
    symlink_to touch unlink write_bytes write_text
    """.split()  # noqa: SIM905
)
OWNERS = {"self", "system_calls", "storage", "_storage"}  # whose methods may have those names: the contract's too
MODULES = {"shutil", "tempfile", "glob", "fileinput"}

# What is not about checkpoint directories: anonymous memory, the kernel's own figures, and the storage's interface.
ALLOWED = {
    "cli/app.py": {".exists"},  # for a better message
    "doctor/finding.py": {".read_text"},  # /proc and /sys
    "doctor/machine.py": {"os.memfd_create", "os.ftruncate", "os.close", "fcntl.fcntl"},  # a memfd, a pidfd
    "doctor/process.py": {"open", "os.readlink"},  # /proc
    "image/arena.py": {"os.memfd_create", "os.ftruncate", "fcntl.fcntl", "os.fstat", "os.close"},
    "image/fetch.py": {"os.memfd_create", "os.ftruncate", "os.dup", "os.close", "tempfile"},  # a memfd, or like one
    "image/mapped_file.py": {"open"},  # /proc/self/maps
    "image/staging.py": {"open"},  # /proc/self/maps
    "init.py": {"open", "os.listdir", "os.readlink"},  # /proc
    "service/connection.py": {"os.memfd_create", "os.write", "os.pread", "os.fstat", "os.close"},
    "service/memory.py": {".read_text"},  # /proc and /sys
    "image/sparse_file.py": {"os.dup"},  # of a memfd
    "storage/journal.py": {"tempfile"},  # the name of the directory for temporary files
    "storage/places.py": {".open", ".link"},  # the storage's
    "storage/obstore_client.py": {".open"},
    "storage/fsspec_memory.py": {".open"},  # fsspec's
    "storage/fsspec_objects.py": {".open"},
    "storage/fsspec_rename.py": {".open", ".exists"},
    "storage/sftp.py": {".open", ".mkdir"},  # the server's
    "storage/sftp_requests.py": {".open"},
    "storage/files.py": {"os.listdir", "os.readlink", "fcntl.fcntl"},  # /proc/self/fd, and how it was opened
    # /proc; received descriptors; its log file
    "service/writer.py": {"open", ".write", "os.close", "os.readlink", "os.fstat", "os.unlink"},
    "service/writer_process.py": {"tempfile", "open", "os.unlink", "os.close"},  # its log file, pidfds
}


def file_system_calls(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that looks like one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            value = node.value
            owner = value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else ""
            if owner in ("os", "fcntl"):
                if node.attr in CALLS:
                    yield node.lineno, f"{owner}.{node.attr}"
            elif node.attr in METHODS and owner not in OWNERS:
                yield node.lineno, f".{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            yield node.lineno, "open"
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if node.module in MODULES:
                yield node.lineno, str(node.module)
            if node.module in ("os", "fcntl"):
                yield from ((node.lineno, f"os.{alias.name}") for alias in node.names if alias.name in CALLS)
            if node.module == "asyncckpt.storage.system_calls":
                yield node.lineno, "a name imported from the seam, which replacing its attribute would miss"


def modules() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", [name for name in modules() if name != SEAM])
def test_only_the_seam_calls_the_file_system(module: str) -> None:
    """Everybody else goes through `system_calls.…`."""
    found = file_system_calls((PACKAGE / module).read_text())
    strangers = [f"{module}:{line}: {name}" for line, name in found if name not in ALLOWED.get(module, set())]
    assert not strangers


def test_the_scan_sees_something() -> None:
    """The same scan finds the seam's own calls, and each way around it."""
    names = {name for _, name in file_system_calls((PACKAGE / SEAM).read_text())}
    assert {"os.open", "os.pwrite", "os.fsync", "os.replace", "os.unlink", "os.mkdir", "fcntl.flock"} <= names
    for line in ("open('x')", "import shutil", "from os import replace", "Path('x').unlink()", "os.fsync(1)"):
        assert list(file_system_calls(line)), line
