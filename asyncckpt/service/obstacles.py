"""What keeps a save from being handed over to the writer process, so that this process has to write it. No torch."""

from __future__ import annotations

import logging

from asyncckpt.image.checksum import StagedImage
from asyncckpt.paths import scheme_of
from asyncckpt.registry.retention import to_plain
from asyncckpt.service.queue import Submission
from asyncckpt.storage.base import Storage
from asyncckpt.threads import log_quietly


class Obstacles:
    """Looks for them, and says why, once, where the user can do something about it."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hinder(self, submission: Submission, storage: Storage) -> bool:
        """Whether threads of this process have to write it; `storage` is what they would write to."""
        image, listing, path = submission.image, submission.listing, submission.handle.path
        if not storage.is_shared(path):
            scheme = scheme_of(path)
            self._tell_once(f"the writer process can't open {scheme}:// as this one does, by class or storage_options")
            return True
        if listing is not None and (policy := listing.directory.retention) is not None and to_plain(policy) is None:
            self._tell_once(f"the retention policy {policy!r} is code that the writer process does not have")
            return True
        if not isinstance(image.source, StagedImage):
            return True
        if image.arena is None or image.arena.fd is None:
            self._tell_once("memory can't be shared with the writer process here (memfd is forbidden, or ulimit -f)")
            return True
        return False

    def _tell_once(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            log_quietly(logging.WARNING, f"{reason}: threads write these checkpoints, and don't outlive the trainer")
