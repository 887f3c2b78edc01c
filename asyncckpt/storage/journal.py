"""Journals of uploads in parts: which parts the store has, so that a process that takes over sends only the others.

One small file per upload, in a directory of this machine that belongs to one writer at a time: whoever finds a journal
there knows that its upload is nobody's any more. It survives a process, not the machine. No torch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from dataclasses import dataclass, field

import msgspec

from asyncckpt.storage import system_calls
from asyncckpt.storage.files import Descriptor

_SUFFIX = ".journal"
_MAX_JOURNAL_BYTES = 8 << 20


def journals_directory() -> str:
    """A new name for one writer's: made by the first upload in parts, gone with the last.

    For the writer process that takes over from a dead one.
    """
    return os.path.join(tempfile.gettempdir(), f"asyncckpt-uploads-{os.getpid()}-{secrets.token_hex(8)}")


class UploadRecord(msgspec.Struct, frozen=True):
    """An upload in parts: its first line. `note` is the temporary name that tells of it in its directory."""

    path: str
    upload_id: str
    token: str
    note: str
    num_bytes: int
    part_bytes: int
    has_whole_checksum: bool = True


class Part(msgspec.Struct, frozen=True):
    """A part that the store has acknowledged; every other line."""

    number: int
    etag: str
    crc: int
    num_bytes: int


@dataclass
class Journal:
    """One upload's journal. `add` is thread-safe."""

    file_path: str
    upload: UploadRecord
    parts: dict[int, Part] = field(default_factory=dict)

    def add(self, part: Part) -> None:
        """Note a part. Best effort: a journal that can't be written only means that the part may be sent again."""
        self.parts[part.number] = part
        with contextlib.suppress(OSError):
            _append(self.file_path, msgspec.json.encode(part))

    def remove(self) -> None:
        """The upload is over."""
        _taken.discard(self.file_path)
        with contextlib.suppress(OSError):
            system_calls.unlink(self.file_path)
            system_calls.remove_directory(os.path.dirname(self.file_path))


class Journals:
    """The journals in one directory; None means that none are kept."""

    def __init__(self, directory: str | None) -> None:
        self._directory = directory

    def begin(self, upload: UploadRecord) -> Journal | None:
        """Start a journal; None where none are kept. Best effort, as `Journal.add`."""
        if self._directory is None:
            return None
        with contextlib.suppress(OSError):
            system_calls.make_directory(self._directory, 0o700)
        journal = Journal(os.path.join(self._directory, f"{secrets.token_hex(8)}{_SUFFIX}"), upload)
        _taken.add(journal.file_path)
        with contextlib.suppress(OSError):
            _append(journal.file_path, msgspec.json.encode(upload))
        return journal

    def take(self, path: str, num_bytes: int, part_bytes: int) -> Journal | None:
        """The journal of an upload to `path` that was left, if it can go on; others to this path are removed."""
        found: Journal | None = None
        for journal in self._left(path):
            fits = (journal.upload.num_bytes, journal.upload.part_bytes) == (num_bytes, part_bytes)
            if found is None and fits:
                found = journal
                _taken.add(journal.file_path)
            else:
                journal.remove()
        return found

    @property
    def notes(self) -> set[str]:
        """The notes of all uploads that may still go on."""
        return {journal.upload.note for journal in self._all()}

    def _left(self, path: str) -> list[Journal]:
        return [journal for journal in self._all() if journal.upload.path == path and journal.file_path not in _taken]

    def _all(self) -> list[Journal]:
        if self._directory is None:
            return []
        try:
            names = sorted(system_calls.list_directory(self._directory))
        except OSError:
            return []
        read = [_read(os.path.join(self._directory, name)) for name in names if name.endswith(_SUFFIX)]
        return [journal for journal in read if journal is not None]


_taken: set[str] = set()  # paths of journals that uploads of this process keep


def _append(path: str, line: bytes) -> None:
    with Descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
        system_calls.append(file.fd, line + b"\n")


def _read(path: str) -> Journal | None:
    """None for one that is gone, or was torn before its first line was whole."""
    try:
        with Descriptor(path, os.O_RDONLY) as file:
            contents = bytearray(min(system_calls.fstat(file.fd).st_size, _MAX_JOURNAL_BYTES))
            count = system_calls.pread_into(file.fd, memoryview(contents), 0)
        first, *rest = bytes(contents[:count]).split(b"\n")
        journal = Journal(path, msgspec.json.decode(first, type=UploadRecord))
    except (OSError, msgspec.MsgspecError):
        return None
    for line in rest:
        with contextlib.suppress(msgspec.MsgspecError):  # the last one may be torn
            part = msgspec.json.decode(line, type=Part)
            journal.parts[part.number] = part
    return journal
