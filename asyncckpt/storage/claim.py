"""A directory's lock on storage without locks: an object that says whose the directory is. No torch.

`writer.json` holds a claim: a number that grows with every writer, and the writer's random token. It is written under a
condition, so of two writers that claim at a time one is refused. Whoever holds a claim shows that he lives by renewing
`writer.alive` every few seconds; a claim whose holder has not done so for `lease_secs` can be taken, with the next
number. No clocks are compared: the waiting is done by who wants it.

A writer that was taken for dead, and is not, is kept from the registry by the registry's own version, which its
successor has changed first thing. Where there are no versions, or the store takes no notice of conditions, a claim is
advisory: whoever has written his reads it again, then at every beat, and stops when it is another's.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import logging
import os
import re
import secrets
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Collection

import msgspec

from asyncckpt.errors import RegistryError
from asyncckpt.naming import ALIVE_NAME, CLAIM_NAME, is_claimed_name, temporary_name
from asyncckpt.storage.base import ConflictError, Lock, Storage
from asyncckpt.threads import log_quietly

BEAT_SECS = 5.0
LEASE_SECS = 20.0
_MAX_ENDING_SECS = 1.0
_NUM_LOOKS = 10  # within a beat
_MAX_CLAIM_BYTES = 4096
_NOBODYS_VERSION = f'"{32 * "0"}"'  # of no contents


class _Record(msgspec.Struct, frozen=True):
    """What `writer.json` holds."""

    epoch: int
    token: str
    holder: str
    released: bool = False


_HEAD = b'{"epoch":,"token":"'  # of every claim, but for its number
# What a beat writes, or nothing; where there is a claim also the beginning of it, which alone may be anybody's number.
_SIGN = re.compile(rb"([0-9a-f]{16} \d+)?")
_BEGUN_SIGN = re.compile(rb"[0-9a-f]{0,16}|[0-9a-f]{16} \d*")
_TORN = _Record(0, "", "somebody whose claim makes no sense")
_NO_CLAIM = _Record(0, "", "another program, whose file has the name of a claim", released=True)


class Claim(Lock):
    """A claim that is held, and kept alive by a thread of its own."""

    def __init__(self, storage: Storage, directory: str, record: _Record, beat_secs: float, *, is_ours: bool) -> None:
        self._storage = storage
        self._directory = directory
        self._record = record
        self._is_ours = is_ours
        self._beats = _Beats(storage, directory, record.token, beat_secs)
        self._finalizer = weakref.finalize(self, self._beats.stop)
        self._finalizer.atexit = False
        _end_beats_at_exit()

    @classmethod
    def received(
        cls, storage: Storage, directory: str, share: bytes, *, beat_secs: float = BEAT_SECS, **_: float
    ) -> Claim:
        """One that another process shared with this one."""
        return cls(storage, directory, msgspec.json.decode(share, type=_Record), beat_secs, is_ours=False)

    def is_intact(self) -> bool:
        """As of the last beat: asks the store nothing."""
        return self._beats.are_ours

    def describe(self, holder: str) -> None:
        with contextlib.suppress(OSError):
            self._rewrite(msgspec.structs.replace(self._record, holder=holder))

    @property
    def claim(self) -> str:
        return self._record.token

    def is_taken_over(self) -> bool:
        return self._beats.are_taken_over()

    def share(self) -> bytes:
        return msgspec.json.encode(self._record)

    def inherit(self) -> None:
        self._is_ours = True

    def release(self) -> None:
        if self._beats.stop() and self._is_ours:
            with contextlib.suppress(OSError):
                self._rewrite(msgspec.structs.replace(self._record, released=True))

    def _rewrite(self, record: _Record) -> None:
        """Only if it is still our claim."""
        path = f"{self._directory}/{CLAIM_NAME}"
        version, found = _read(self._storage, path)
        if found is not None and found.token == self._record.token and not found.released:
            self._storage.replace(path, msgspec.json.encode(record), expected=version)
            self._record = record


class _Beats:
    """The thread that shows that a claim's holder lives. None runs in a forked child."""

    def __init__(self, storage: Storage, directory: str, token: str, beat_secs: float) -> None:
        self._storage, self.directory, self._token = storage, directory, token
        self._beat_secs = beat_secs
        self._pid = os.getpid()
        self._is_lost = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="asyncckpt-claim", daemon=True)
        self._thread.start()
        _beating.add(self)

    @property
    def are_ours(self) -> bool:
        return not self._is_lost and not self._stopped.is_set() and os.getpid() == self._pid

    def stop(self) -> bool:
        """End the thread; whether it was ours to end, and had not ended yet."""
        if os.getpid() != self._pid or self._stopped.is_set():
            return False
        self._stopped.set()
        return not self._is_lost

    def end_at_exit(self) -> None:
        """The client's connections close next: a request that is still under way would complain on stderr."""
        if self.stop():
            self._thread.join(_MAX_ENDING_SECS)

    def _run(self) -> None:
        number = 0
        while not self._stopped.is_set() and not self._is_lost:
            number += 1
            # As long as the store does not answer nobody else can claim either; and at exit much is gone by now.
            with contextlib.suppress(Exception):
                self._beat(number)
            self._stopped.wait(self._beat_secs)

    def _beat(self, number: int) -> None:
        self._storage.replace(f"{self.directory}/{ALIVE_NAME}", f"{self._token} {number}".encode())
        self.are_taken_over()

    def are_taken_over(self) -> bool:
        """Look whose claim there is. Blocks; raises OSError."""
        _, found = _read(self._storage, f"{self.directory}/{CLAIM_NAME}")
        if found is not None and found.token == self._token:
            return False
        if not self._is_lost:
            self._is_lost = True
            what = f"another writer has taken it over: {found.holder}" if found is not None else "the claim is gone"
            log_quietly(logging.ERROR, f"{self.directory}: {what}")
        return found is not None


_beating: weakref.WeakSet[_Beats] = weakref.WeakSet()


def new_temporary_name(path: str, attempt: str) -> str:
    """A temporary name (without its directory) for an attempt to write `path`.

    It says whether this process has a claim to the directory: only then may a later writer know that it is dead.
    """
    directory, name = path.rsplit("/", 1)
    is_claimed = any(beats.directory == directory and beats.are_ours for beats in list(_beating))
    return temporary_name(attempt, name, is_claimed=is_claimed)


@functools.cache
def _end_beats_at_exit() -> None:
    """Registered after the first finalizer, so that it runs before theirs, which close connections."""

    def end() -> None:
        for beats in list(_beating):
            beats.end_at_exit()

    atexit.register(end)


def take_claim(
    storage: ClaimedStorage,
    directory: str,
    holder: str,
    *,
    beat_secs: float = BEAT_SECS,
    lease_secs: float = LEASE_SECS,
) -> Claim:
    """Claim a directory. Blocks for a lease where there is a claim whose holder shows no life.

    Raises BlockingIOError, with what its holder said of itself, when somebody has it, and `RegistryError` for files of
    other programs that have the names of a claim's: they are left alone.
    """
    path = f"{directory}/{CLAIM_NAME}"
    version, found = _read_ours(storage, path)
    if (
        found is not None
        and not found.released
        and is_claimed(storage, directory, beat_secs=beat_secs, lease_secs=lease_secs)
    ):
        version, found = _read_ours(storage, path)  # by now it may be another's, or nobody's
        if found is not None and not found.released:
            raise BlockingIOError(errno.EAGAIN, found.holder)
    _check_sign_of_life(storage, directory, _SIGN if found is None else _BEGUN_SIGN)
    record = _Record((found.epoch if found is not None else 0) + 1, secrets.token_hex(8), holder)
    try:
        storage.replace(path, msgspec.json.encode(record), expected=version)
    except ConflictError:
        _, found = _read(storage, path)
        raise BlockingIOError(errno.EAGAIN, found.holder if found is not None else "somebody else") from None
    claim = Claim(storage, directory, record, beat_secs, is_ours=True)
    try:
        if not storage.has_versions(directory) or not has_conditions(storage, f"{directory}/{ALIVE_NAME}"):
            _say_that_it_is_advisory(storage, directory)
            _, found = _read(storage, path)
            if found is not None and found.token != record.token:  # the second of two has overwritten the first
                raise BlockingIOError(errno.EAGAIN, found.holder)
    except BaseException:
        claim.release()
        raise
    return claim


def has_conditions(storage: ClaimedStorage, path: str) -> bool:
    """Whether the store binds a write to the version that it is to replace, as it finds when it writes at `path`.

    Blocks for some small writes. Raises OSError when those fail.
    """
    storage.replace(path, b"")
    for expected in ("", _NOBODYS_VERSION):
        with contextlib.suppress(ConflictError):
            storage.replace(path, b"", expected=expected)
            return False
    return storage.binds_writes


_told: set[str] = set()


def _say_that_they_stay(directory: str, error: PermissionError) -> None:
    what = f"{directory}: what dead writers have left (.asyncckpt-claimed-….tmp) stays"
    if what not in _told:
        _told.add(what)
        log_quietly(logging.WARNING, f"{what}: {error.strerror}")


def _say_that_it_is_advisory(storage: Storage, directory: str) -> None:
    place = "/".join(directory.split("/")[:3])
    if place not in _told:
        _told.add(place)
        log_quietly(
            logging.WARNING if storage.has_versions(directory) else logging.INFO,  # of some kinds nobody expects more
            f"{place} has no conditional writes that can be used here: a second writer is refused, but two that start "
            "in the same moment may both write for some seconds",
        )


def holder_of(storage: Storage, directory: str) -> str:
    """Who has a claim, dead or alive; "" if nobody has. Blocks for one small read."""
    _, found = _read(storage, f"{directory}/{CLAIM_NAME}")
    return found.holder if found is not None and not found.released else ""


def is_claimed(
    storage: Storage, directory: str, *, beat_secs: float = BEAT_SECS, lease_secs: float = LEASE_SECS
) -> bool:
    """Whether somebody has a claim, and lives. Blocks until he shows it, or lets go; a lease, if he does neither."""
    before, deadline = _sign_of_life(storage, directory), time.monotonic() + lease_secs
    while holder_of(storage, directory):
        if _sign_of_life(storage, directory) != before:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(beat_secs / _NUM_LOOKS)
    return False


def _sign_of_life(storage: Storage, directory: str) -> str:
    """Another one at every beat."""
    path = f"{directory}/{ALIVE_NAME}"
    if storage.has_versions(directory):
        return storage.version(path)
    contents, _ = _look(storage, path)
    return (contents or b"").decode("utf-8", "replace")


def _look(storage: Storage, path: str) -> tuple[bytes | None, str]:
    """What a small file holds, with its version; None for none, and what nobody here writes for one that is large."""
    try:
        return storage.read_version(path, _MAX_CLAIM_BYTES)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        return b"too large", ""


def _read(storage: Storage, path: str) -> tuple[str, _Record | None]:
    """The claim there is, with its version; `_NO_CLAIM` for a file of another program."""
    contents, version = _look(storage, path)
    if contents is None:
        return "", None
    try:
        return version, msgspec.json.decode(contents, type=_Record)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return version, _TORN if _is_torn_claim(contents) else _NO_CLAIM


def _read_ours(storage: Storage, path: str) -> tuple[str, _Record | None]:
    version, found = _read(storage, path)
    if found is _NO_CLAIM:
        raise _of_others(path)
    return version, found


def _is_torn_claim(contents: bytes) -> bool:
    """Whether it begins as every claim does, as far as it goes: after a crash of the server its end may be missing, or
    be zeros."""
    text = re.sub(rb"(?<=:)\d+", b"", contents.rstrip(b"\0"), count=1)
    return text[: len(_HEAD)] == _HEAD[: len(text)]


def _check_sign_of_life(storage: Storage, directory: str, ours: re.Pattern[bytes]) -> None:
    """Raise `RegistryError` for a file that no beat has written: the next one would."""
    path = f"{directory}/{ALIVE_NAME}"
    contents, _ = _look(storage, path)
    if contents is not None and not ours.fullmatch(contents.rstrip(b"\0")):
        raise _of_others(path)


def _of_others(path: str) -> RegistryError:
    return RegistryError(
        f"{path} can't be used: it was not written by asyncckpt; use another directory, or move it away"
    )


class ClaimedStorage(Storage):
    """Storage far away, without locks: claims stand in for them, and only who has one knows that no other lives.

    What was left by somebody who had none, a saver of single files, is left alone: nobody can tell whether he lives.
    """

    def __init__(self, **claim_secs: float) -> None:
        self._claim_secs = claim_secs

    @property
    def binds_writes(self) -> bool:
        """False once the store has refused to bind a write to the version that it replaces: that is only looked at."""
        return True

    def lock(self, directory: str, holder: str) -> Lock:
        return take_claim(self, directory, holder, **self._claim_secs)

    def receive_lock(self, directory: str, share: int | bytes) -> Lock:
        assert isinstance(share, bytes)
        return Claim.received(self, directory, share, **self._claim_secs)

    def is_locked(self, directory: str) -> bool:
        return is_claimed(self, directory, **self._claim_secs)

    def holder(self, directory: str) -> str:
        return holder_of(self, directory)

    def is_near(self, directory: str) -> bool:
        return False

    def sweep(self, directory: str, *, has_lock: bool = False) -> list[str]:
        if not has_lock:
            return []
        alive, swept = self.alive_names(), list[str]()
        with contextlib.suppress(OSError):
            for name in self.list_names(directory):
                if is_claimed_name(name) and name not in alive:
                    path = f"{directory}/{name}"
                    try:
                        swept += [path] * self.sweep_file(path)
                    except PermissionError as error:  # the same is to be expected of all others, however many
                        _say_that_they_stay(directory, error)
                        break
                    except OSError:
                        continue
        return swept

    @abstractmethod
    def alive_names(self) -> Collection[str]:
        """Temporary names that are still in use, or may be again."""

    @abstractmethod
    def sweep_file(self, path: str) -> bool:
        """Remove what a dead writer has left under its temporary name; False if it is not ours. Raises OSError."""
