"""A note that lies in a directory and tells how its mirror stands, for whoever lists the directory. No torch.

A courtesy: nothing goes by it, and it may be missing, late or damaged.
"""

from __future__ import annotations

import contextlib
import os
from datetime import datetime, timezone
from typing import Annotated

import msgspec

from asyncckpt.errors import CheckpointError
from asyncckpt.naming import MIRROR_NOTE_NAME, REGISTRY_NAME, printable
from asyncckpt.registry.backlog import Mirrored
from asyncckpt.storage.base import Storage

_MAX_NOTE_BYTES = 64 << 10
_MAX_PLACE_CHARS, _MAX_PROBLEM_CHARS, _MAX_SINCE_CHARS = 4096, 500, 40
_MAX_LACKING = 1000
_Number = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class MirrorNote(msgspec.Struct, frozen=True):
    """`mirror` has come as far as `mirrored` and `lacking` say (see `Mirrored`), and `problem` is what keeps the rest
    waiting ("" if nothing does). So it is since `since`, in ISO 8601."""

    mirror: Annotated[str, msgspec.Meta(max_length=_MAX_PLACE_CHARS)]
    mirrored: _Number = 0
    lacking: Annotated[list[_Number], msgspec.Meta(max_length=_MAX_LACKING)] = []
    problem: Annotated[str, msgspec.Meta(max_length=_MAX_PROBLEM_CHARS)] = ""
    since: Annotated[str, msgspec.Meta(max_length=_MAX_SINCE_CHARS)] = ""

    @property
    def standing(self) -> Mirrored:
        return Mirrored(self.mirrored, frozenset(self.lacking))


_decoder = msgspec.json.Decoder(MirrorNote)


def read_note(storage: Storage, directory: str) -> MirrorNote | None:
    """The note in a directory; None if there is none that can be read. Blocks for a small read.

    Its texts come from a file that anybody may have written.
    """
    try:
        return _decoder.decode(storage.read(os.path.join(directory, MIRROR_NOTE_NAME), _MAX_NOTE_BYTES))
    except (OSError, CheckpointError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None


class NoteWriter:
    """Keeps the note of a directory, whose mirror is elsewhere, up to date. For one thread; raises no OSError."""

    def __init__(self, storage: Storage, directory: str, mirror: str) -> None:
        self._storage = storage
        self._directory = directory
        self._mirror = printable(mirror)[:_MAX_PLACE_CHARS]
        self._written: MirrorNote | None = None

    def tell(self, mirrored: Mirrored, problem: Exception | None) -> None:
        """How things are. Blocks for a small write if that has changed."""
        last = self._written or self._find()
        text = printable(problem)[:_MAX_PROBLEM_CHARS] if problem is not None else ""
        standing = _abridged(mirrored) if mirrored.last else last.standing
        if (standing, text) == (last.standing, last.problem):
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        since = last.since if text and text == last.problem else now
        note = MirrorNote(self._mirror, standing.last, sorted(standing.lacking), text, since)
        with contextlib.suppress(OSError, CheckpointError):
            self._write(note)
            self._written = note

    def _find(self) -> MirrorNote:
        """What an earlier run said of the same mirror."""
        found = read_note(self._storage, self._directory)
        return found if found is not None and found.mirror == self._mirror else MirrorNote(self._mirror)

    def _write(self, note: MirrorNote) -> None:
        """Only where there is a directory of ours: one that was removed stays so."""
        with self._storage.open(os.path.join(self._directory, REGISTRY_NAME), follow_links=False):
            pass
        self._storage.replace(os.path.join(self._directory, MIRROR_NOTE_NAME), msgspec.json.encode(note))


def _abridged(mirrored: Mirrored) -> Mirrored:
    """Of very many that are lacking only the first is told: so what comes after it counts as lacking."""
    return Mirrored(min(mirrored.lacking) - 1) if len(mirrored.lacking) > _MAX_LACKING else mirrored
