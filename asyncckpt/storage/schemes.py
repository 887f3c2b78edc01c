"""The kinds of storage that URLs name: which class writes to them, and which package opens them. No torch.

What counts is how a file becomes visible there: by a rename, by the finished put, or in this process's memory.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from asyncckpt.errors import CheckpointError, MissingExtraError
from asyncckpt.storage.base import Storage
from asyncckpt.threads import log_quietly

Way = Literal["s3", "sftp", "memory", "objects", "rename"]


@dataclass(frozen=True)
class Scheme:
    """One kind of storage: `package` opens it, and `install` is what pip is told if it is missing."""

    way: Way
    package: str
    install: str
    can_copy: bool = True  # an object store that copies in one act
    has_buckets: bool = False  # an object store that tells of a bucket that is not there
    replaces: bool = True  # a file system whose rename replaces what is there
    is_elsewhere_too: bool = True  # another process finds the same by the same scheme and options


_GCS = Scheme("objects", "gcsfs", "asyncckpt[gcs]", has_buckets=True)
# Its copies go on after they are acknowledged.
_AZURE = Scheme("objects", "adlfs", "asyncckpt[azure]", can_copy=False, has_buckets=True)
_SFTP = Scheme("sftp", "paramiko", "asyncckpt[sftp]")
_SCHEMES: Mapping[str, Scheme] = {
    "s3": Scheme("s3", "s3fs", "asyncckpt[s3]"),
    "gs": _GCS,
    "gcs": _GCS,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "az": _AZURE,
    "oss": Scheme("objects", "ossfs", "ossfs"),
    "oci": Scheme("objects", "ocifs", "ocifs"),
    "tos": Scheme("objects", "tosfs", "tosfs"),
    "sftp": _SFTP,
    "ssh": _SFTP,
    "smb": Scheme("rename", "smbprotocol", "smbprotocol fsspec", replaces=False),
    "hdfs": Scheme("rename", "pyarrow", "pyarrow fsspec", replaces=False),
    "webhdfs": Scheme("rename", "requests", "requests fsspec", replaces=False),
    "webdav": Scheme("rename", "webdav4", "webdav4[fsspec]", replaces=False),
    "memory": Scheme("memory", "fsspec", "fsspec", is_elsewhere_too=False),
}


def scheme_named(name: str) -> Scheme:
    """What is known of a URL's scheme. Asks nobody, imports at most fsspec.

    Raises `CheckpointError` for one that checkpoints can't be written to, and `MissingExtraError`, which is one too, if
    its package is not installed.
    """
    if (registered := _registered_here(name)) is not None:
        return registered
    scheme = _SCHEMES.get(name) or _known_to_fsspec(name)
    if scheme is None:
        known = ", ".join(f"{known}://" for known in sorted(_SCHEMES))
        raise CheckpointError(
            f"{name}:// is not a kind of storage that is supported; these are: local paths, {known}, and what is "
            "registered by fsspec.register_implementation"
        )
    if find_spec(scheme.package) is None:
        install = " ".join(shlex.quote(package) for package in scheme.install.split())
        raise MissingExtraError(f"{name}:// needs {scheme.package}: pip install {install}")
    return scheme


def is_known(name: str) -> bool:
    """Whether it is a scheme at all, of a kind that can be written to or not."""
    if name in _SCHEMES:
        return True
    if find_spec("fsspec") is None:
        return False
    from fsspec.registry import known_implementations, registry

    return name in known_implementations or name in registry


def _registered_here(name: str) -> Scheme | None:
    """A class that this process has registered with fsspec: no other process knows of it."""
    if find_spec("fsspec") is None:
        return None
    from fsspec.registry import known_implementations, registry

    kind = registry.get(name)
    if kind is None or _is_stock(kind, known_implementations.get(name)):
        return None
    package = kind.__module__.split(".")[0]
    return Scheme(_way_of(name, kind), package, package, is_elsewhere_too=False)


def _is_stock(kind: type, known: Mapping[str, Any] | None) -> bool:
    """Whether it is what fsspec itself would import: of fsspec's own classes that one, of another package any.

    Packages call their classes as they like: `gcsfs.GCSFileSystem` is an `ExtendedGcsFileSystem` by now.
    """
    path = str(known["class"]).replace(":", ".") if known is not None else ""
    package = path.split(".")[0]
    is_same = package != "fsspec" or path.rpartition(".")[2] == kind.__name__
    return is_same and package == kind.__module__.split(".")[0]


def _known_to_fsspec(name: str) -> Scheme | None:
    """One that a package of its own brings; what fsspec itself has beyond our table is nothing to write to."""
    if find_spec("fsspec") is None:
        return None
    from fsspec import get_filesystem_class
    from fsspec.registry import known_implementations

    known = known_implementations.get(name)
    if known is None:
        return None
    package = str(known["class"]).replace(":", ".").split(".")[0]
    if package == "fsspec":
        return None
    if find_spec(package) is None:
        raise MissingExtraError(f"{name}:// needs another package: {known.get('err') or package}")
    return Scheme(_way_of(name, get_filesystem_class(name)), package, package)


def _way_of(name: str, kind: type) -> Way:
    """How files become visible in a file system that we don't know, as its class lets us guess; said once."""
    from fsspec import AbstractFileSystem
    from fsspec.implementations.memory import MemoryFileSystem

    if issubclass(kind, MemoryFileSystem):
        return "memory"
    has_rename = any(
        getattr(kind, method, None) is not getattr(AbstractFileSystem, method, None) for method in ("mv", "mv_file")
    )
    how = "its mv is taken for one act" if has_rename else "a file is taken to appear when it is finished"
    _say_once(f"{name}:// ({kind.__name__}) is not among the file systems whose ways are known here: {how}")
    return "rename" if has_rename else "objects"


_told: set[str] = set()


def _say_once(what: str) -> None:
    if what not in _told:
        _told.add(what)
        log_quietly(logging.WARNING, what)


def make_storage(name: str, options: Mapping[str, Any]) -> Storage:
    """The storage for URLs of a scheme, of those that fsspec opens. Raises as `scheme_named` does."""
    scheme = scheme_named(name)
    if scheme.way == "memory":
        from asyncckpt.storage.fsspec_memory import MemoryStorage

        return MemoryStorage(options)
    if scheme.way == "sftp":
        from asyncckpt.storage.sftp import SFTPStorage

        return SFTPStorage(options)
    if scheme.way == "objects":
        from asyncckpt.storage.fsspec_objects import ObjectStorage

        return ObjectStorage(
            options,
            can_copy=scheme.can_copy,
            has_buckets=scheme.has_buckets,
            is_elsewhere_too=scheme.is_elsewhere_too,
        )
    assert scheme.way == "rename"
    from asyncckpt.storage.fsspec_rename import RenameStorage

    return RenameStorage(options, replaces=scheme.replaces, is_elsewhere_too=scheme.is_elsewhere_too)
