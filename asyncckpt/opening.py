"""A manager's directory: looked at, and opened for writing, within bounds of time. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from asyncckpt.errors import CheckpointError, StorageBusyError
from asyncckpt.mirror_tier import MirrorTier
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.registry import Registry
from asyncckpt.storage.bounded import BoundedStorage, NoAnswerError

_MAX_LOOK_SECS = 2.0  # what a save spends on looking at a directory that does not answer, once
_MIRROR_TIER = 1  # among the places that are loaded from


class Opening:
    """Opens the directory by the first save, and anew when it was lost on the way. An empty one goes on with the run
    that is in the mirror.

    `wait_idle` waits until nothing is in flight, and `seen` is what each place held when it was loaded from.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        storage: BoundedStorage,
        wait_idle: Callable[[float], bool],
        max_secs: float,
        mirror: MirrorTier | None,
        seen: Mapping[int, Registry],
    ) -> None:
        self._directory = directory
        self._storage = storage
        self._wait_idle = wait_idle
        self._max_secs = max_secs
        self._mirror = mirror
        self._seen = seen
        self._is_opening = False
        self.continued: Registry | None = None  # what was in the mirror, for a run that goes on from there

    def open_for_writing(self) -> bool:
        """Open the directory for writing, if it is not open; False when the storage does not say whether it still is.

        For one thread at a time, and the signal handlers that interrupt it. When the storage does not answer during the
        opening, that goes on in the background, and `StorageBusyError` is raised; else as the directory's own method.
        """
        path = self._directory.path
        if self._is_opening:
            raise CheckpointError(f"{path} is being opened for writing by what this signal interrupted")
        is_open = self._looks_open()
        if is_open is not False:
            return is_open is True
        self._is_opening = True
        try:
            # Somebody may have moved or removed the directory under what is in flight.
            if not self._wait_idle(self._max_secs):
                raise NoAnswerError
            if not self._directory.was_open and self._mirror is not None:
                self._continue_run(self._mirror)
            self._storage.ask(self._directory.open_for_writing, self._max_secs)
        except NoAnswerError:
            raise StorageBusyError(
                f"{path} could not be opened for writing: the storage does not answer. The opening goes on in the "
                "background; a later save finds it done, or tries again"
            ) from None
        finally:
            self._is_opening = False
        return True

    def registry(self) -> Registry:
        """The registry: the writer's own, also when the storage does not answer, or what is read from the directory."""
        known = self._directory.known if self._looks_open() is not False else None
        return self._directory.registry if known is None else known

    def _looks_open(self) -> bool | None:
        """Whether the directory is open for writing; None when it should be, but the storage does not answer."""
        if self._directory.known is None:
            return False
        try:
            return self._storage.ask(self._directory.look, _MAX_LOOK_SECS)
        except NoAnswerError:
            return None

    def _continue_run(self, mirror: MirrorTier) -> None:
        """Let an empty directory go on with the run that is in the mirror: what a load found there, or what is found
        there now.

        The mirror is asked only if the directory is empty and nothing was loaded, and not for long: a save does not
        wait for it. Raises `NoAnswerError` if the directory itself does not answer.
        """
        self.continued = self._seen.get(_MIRROR_TIER)
        if self.continued is None and self._storage.ask(self._is_empty, self._max_secs):
            self.continued = mirror.look()
        if self.continued is not None:
            self._directory.continue_run(self.continued.run_id, self.continued.last_sequence)

    def _is_empty(self) -> bool:
        """Whether the directory holds nothing of any run; not so if it can't be read, which its opening tells of."""
        with contextlib.suppress(OSError, CheckpointError):
            found = self._directory.read()
            return found.recorded is None and not found.registry.checkpoints
        return False
