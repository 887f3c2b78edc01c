"""What the trainer and its writer process say to each other. Plain data; no torch.

A save goes its way by `Submit` (its turn in the queue), `Staged` (its bytes are final), `Begun`, `MayCommit?` and its
answer, `Settled` and `Finished`. Whatever is said twice, after an interrupt or a restart, counts once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from asyncckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    CorruptCheckpointError,
    MissingExtraError,
    RegistryError,
    StorageBusyError,
)
from asyncckpt.events import EventKind
from asyncckpt.paths import as_path
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.backlog import Mirrored
from asyncckpt.registry.directory import WriterState
from asyncckpt.registry.retention import PlainPolicy


class Message(msgspec.Struct, frozen=True, tag=True):
    """One packet. Descriptors travel beside it."""


# --- to the writer ---


class Setup(Message, frozen=True):
    """How to write; said first."""

    num_workers: int
    nice: int
    retries: int
    verify_after_save: bool
    stall_timeout_secs: float
    storage_options: dict[str, Any]
    journals: str | None


class ShareArena(Message, frozen=True):
    """An arena, with its memfd."""

    arena: int


class ForgetArena(Message, frozen=True):
    """The trainer has given the arena back; so should you."""

    arena: int


class Grant(Message, frozen=True):
    """Be the writer of a directory, with its lock or the lock's descriptor; a higher generation counts for a lower."""

    directory: int
    generation: int
    path: bytes
    retention: PlainPolicy | None
    metric: str | None
    mode: str | None
    state: WriterState
    lock: bytes | None
    mirror_backlog_bytes: int


class PlannedListing(msgspec.Struct, frozen=True):
    """Where a checkpoint will be listed, and as what."""

    directory: int
    info: CheckpointInfo
    run_id: str
    is_certain: bool
    damaged: list[int]
    mirrored: Mirrored | None


class Submit(Message, frozen=True):
    """A save takes its turn; its bytes follow."""

    save: int
    path: bytes
    listing: PlannedListing | None


class Staged(Message, frozen=True):
    """The image of a save is complete. `records` are the layout's names and sizes."""

    save: int
    arena: int
    records: list[tuple[str, int]]


class GiveUp(Message, frozen=True):
    """The image of a save will never be complete."""

    save: int


class MayCommit(Message, frozen=True):
    """The answer to `AskCommit`."""

    save: int
    allowed: bool


class Hurry(Message, frozen=True):
    """No more pauses between retries."""


class Farewell(Message, frozen=True):
    """That was all; the trainer lives on. Without it the end of the connection is the trainer's."""


ToWriter = Setup | ShareArena | ForgetArena | Grant | Submit | Staged | GiveUp | MayCommit | Hurry | Farewell


# --- from the writer ---


class Hello(Message, frozen=True):
    """Ready."""


class Begun(Message, frozen=True):
    """A worker has taken up the save."""

    save: int


class AskCommit(Message, frozen=True):
    """All is written and synced: is the image of one moment, so that it may be committed?"""

    save: int


class PlainError(msgspec.Struct, frozen=True):
    """An exception; `cause` is what it was raised from."""

    kind: str
    text: str
    errno: int | None
    cause: PlainError | None


class Settled(Message, frozen=True):
    """A save is durable (`info`), or has failed (`error`)."""

    save: int
    info: CheckpointInfo | None
    error: PlainError | None
    timings: dict[str, float]
    state: WriterState | None


class Finished(Message, frozen=True):
    """What a save replaced is deleted too."""

    save: int
    state: WriterState | None


class Happened(Message, frozen=True):
    """For the trainer's `on_event`."""

    kind: EventKind
    path: bytes
    detail: str


class Logged(Message, frozen=True):
    """For the trainer's log."""

    level: int
    text: str


FromWriter = Hello | Begun | AskCommit | Settled | Finished | Happened | Logged


# --- to the mirror's process, and from it ---


class SetupMirror(Message, frozen=True):
    """What to copy where, and how; said first."""

    source: bytes
    target: bytes
    retention: PlainPolicy
    metric: str
    mode: str
    lock_timeout_secs: float
    nice: int
    source_options: dict[str, Any]
    target_options: dict[str, Any]
    journals: str | None


class Poke(Message, frozen=True):
    """There may be something to copy; in a hurry, no pause after a failure is waited for."""

    number: int
    is_hurried: bool


class Unpin(Message, frozen=True):
    """These are not pinned in the source any more."""

    sequences: list[int]


class Finish(Message, frozen=True):
    """Nothing more will be saved, though the trainer may live on: copy what is lacking, and end."""


class Copied(Message, frozen=True):
    """A checkpoint is in the mirror."""

    sequence: int
    info: CheckpointInfo


class PassedOver(Message, frozen=True):
    """A checkpoint is not brought to the mirror, whose retention would delete it at once."""

    sequence: int


class GivenUp(Message, frozen=True):
    """A checkpoint will never be in the mirror."""

    sequence: int
    error: PlainError


class Progress(Message, frozen=True):
    """How far the mirror is: see `Listener.progress`."""

    mirrored: Mirrored
    problem: PlainError | None
    caught_up_with: int
    tried: int


ToMirror = SetupMirror | Poke | Unpin | Finish | Farewell
FromMirror = Copied | PassedOver | GivenUp | Progress | Happened | Logged


# --- as bytes ---


def encode(message: Message) -> bytes:
    """The bytes of a message, for `Connection.send`."""
    return _encoder.encode(message)


def decode_to_writer(body: bytes | memoryview) -> ToWriter:
    """What the trainer said. Raises msgspec's `ValidationError` for anything else."""
    return _to_writer.decode(body)


def decode_from_writer(body: bytes | memoryview) -> FromWriter:
    """What the writer said. Raises msgspec's `ValidationError` for anything else."""
    return _from_writer.decode(body)


def decode_to_mirror(body: bytes | memoryview) -> ToMirror:
    """What the trainer said. Raises msgspec's `ValidationError` for anything else."""
    return _to_mirror.decode(body)


def decode_from_mirror(body: bytes | memoryview) -> FromMirror:
    """What the mirror's process said. Raises msgspec's `ValidationError` for anything else."""
    return _from_mirror.decode(body)


def _encode_other(value: object) -> object:
    if isinstance(value, Path):  # as bytes: names need not be valid text
        return os.fsencode(value)
    raise NotImplementedError(type(value))


def _decode_other(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, bytes):
        return as_path(os.fsdecode(value))
    raise NotImplementedError(kind)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
_to_writer: msgspec.msgpack.Decoder[ToWriter] = msgspec.msgpack.Decoder(ToWriter, dec_hook=_decode_other)
_from_writer: msgspec.msgpack.Decoder[FromWriter] = msgspec.msgpack.Decoder(FromWriter, dec_hook=_decode_other)
_to_mirror: msgspec.msgpack.Decoder[ToMirror] = msgspec.msgpack.Decoder(ToMirror, dec_hook=_decode_other)
_from_mirror: msgspec.msgpack.Decoder[FromMirror] = msgspec.msgpack.Decoder(FromMirror, dec_hook=_decode_other)


# --- errors ---


class WriterProcessError(Exception):
    """What went wrong in the writer process, where it is not one of our own errors."""


_OWN_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        CheckpointError,
        CheckpointNotFoundError,
        CheckpointWriteError,
        CorruptCheckpointError,
        MissingExtraError,
        RegistryError,
        StorageBusyError,
    )
}


def plain_text(text: str) -> str:
    """Text that can be sent, whatever the names of files in it."""
    return text.encode("utf-8", "backslashreplace").decode()


def describe_error(error: BaseException) -> PlainError:
    """An error, with what it was raised from, as plain data."""
    return _describe_error(error, set())


def _describe_error(error: BaseException, seen: set[int]) -> PlainError:
    seen.add(id(error))
    cause = None
    if error.__cause__ is not None and id(error.__cause__) not in seen:  # some clients raise in circles
        cause = _describe_error(error.__cause__, seen)
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, CheckpointError):
        text = error.strerror or text
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _OWN_KINDS]
    return PlainError(kinds[0] if kinds else type(error).__name__, plain_text(text), number, cause)


def rebuild_error(plain: PlainError) -> Exception:
    """The same error, as far as its kind is known here."""
    error: Exception
    if plain.kind == CheckpointWriteError.__name__:
        error = CheckpointWriteError(plain.text, errno=plain.errno)
    elif plain.kind in _OWN_KINDS:
        error = _OWN_KINDS[plain.kind](plain.text)
    elif plain.errno is not None:
        error = OSError(plain.errno, plain.text)
    else:
        error = WriterProcessError(f"{plain.kind}: {plain.text}")
    if plain.cause is not None:
        error.__cause__ = rebuild_error(plain.cause)
    return error
