"""Replication: a second directory of the same run is brought what is committed in the first. No torch.

The replica is a directory like any other, with a registry and a retention of its own. What it lacks follows from the
two registries alone (the sequence numbers above its last one), so nothing needs to be remembered across a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from asyncckpt.image.file import open_checkpoint
from asyncckpt.image.transfer import transferred
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory, Listing
from asyncckpt.registry.recovery import describe_file
from asyncckpt.storage.base import Storage


class Replica:
    """A directory that follows `source`, to be written by one thread. The source is only read."""

    def __init__(self, source: CheckpointDirectory, storage: Storage, target: CheckpointDirectory) -> None:
        self._source = source
        self._storage = storage
        self._target = target

    @property
    def last_sequence(self) -> int:
        """How far the replica has come: the highest sequence number that it ever held. Blocks for small reads."""
        return self._target.registry.last_sequence

    def lacking(self) -> Sequence[CheckpointInfo]:
        """What is to be copied, the oldest first. Opens the replica for writing, where there is something, and pins
        there what is pinned in the source. Blocks.

        Raises as `CheckpointDirectory.read` and `open_for_writing` do: a directory of another run is left alone.
        """
        source = self._source.read().registry
        if not source.checkpoints:
            return ()
        if not self._target.is_open:
            self._target.expect_run(source.run_id)
            self._target.open_for_writing()
        self._target.take_pins(source.checkpoints)
        last = self._target.own_registry.last_sequence
        return [info for info in source.checkpoints if (info.sequence or 0) > last and not info.damaged]

    def copy(self, info: CheckpointInfo) -> CheckpointInfo | None:
        """Bring one checkpoint to the replica, verified; listed there, and durable, on return. Blocks.

        None if it is gone from the source, or has been replaced there. Raises `CorruptCheckpointError` if it is
        damaged, `CheckpointNotFoundError` if it goes just now, and OSError.
        """
        name = str(info.filepath)
        path = self._source.path_of(name)
        description = describe_file(self._storage, path)
        if description is None or description.info.sequence != info.sequence:
            return None
        with open_checkpoint(self._storage, path, follow_links=False) as reader:
            plain = replace(info, is_best=False, protected=False, num_bytes=reader.num_bytes)
            listing = Listing(self._target, plain, self._target.own_registry.run_id)
            with transferred(self._storage, reader, path, self._target.path_of(name), None, _unheard) as upload:
                copied = self._target.record(listing, upload.commit)
        self._target.delete_pending()
        return self._target.locate(copied)

    def await_source(self) -> None:
        """Wait for a writer that finishes the source's checkpoints. See `CheckpointDirectory.await_finishing`."""
        self._source.await_finishing()

    def close(self) -> None:
        """Let the next one write to it."""
        self._target.shut()


def _unheard(num_bytes: int) -> None:
    pass
