"""Replication: a second directory of the same run is brought what is committed in the first. No torch.

The replica is a directory like any other, with a registry and a retention of its own; see `backlog` for what it lacks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from asyncckpt.errors import CheckpointError
from asyncckpt.image.file import open_checkpoint, read_anew
from asyncckpt.image.transfer import transferred
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.backlog import Backlog, backlog_of
from asyncckpt.registry.directory import CheckpointDirectory, Listing
from asyncckpt.registry.recovery import describe_file


class ReplacedError(CheckpointError):
    """Another checkpoint of the run has its name by now. Never leaves the package."""


class Replica:
    """A directory that follows `source`, to be written by one thread. The source is only read."""

    def __init__(self, source: CheckpointDirectory, target: CheckpointDirectory) -> None:
        self._source = source
        self._target = target

    def look(self, without: Collection[int] = (), unpinned: Collection[int] = ()) -> Backlog:
        """What is to be copied, but for the numbers in `without`; nothing, as long as there is no run to follow.

        Opens the replica for writing, pins there what is pinned in the source, and unpins what was `unpinned` there
        (though it be listed no more). Blocks. Raises as `CheckpointDirectory.read` and `open_for_writing` do: a
        directory of another run is left alone, and so is one that has other checkpoints of this run under the same
        numbers (`CheckpointError`), or whose source has become another run's, or holds nothing any more.
        """
        source = self._source.read().registry
        if not self._target.is_open:
            if not source.checkpoints:
                return Backlog()
            self._target.expect_run(source.run_id)
            self._target.open_for_writing()
            source = self._source.read().registry  # who wrote to the replica until now has seen later ones
        if source.run_id != self._target.own_registry.run_id:
            what = "holds another run's checkpoints" if source.checkpoints else "holds nothing of the run"
            raise CheckpointError(f"{self._source.path} {what} by now: nothing comes to {self._target.path}")
        self._target.finish_recording()
        self._target.delete_pending()
        self._check_same(source.checkpoints)
        self._target.follow_pins(source.checkpoints, unpinned)
        backlog = backlog_of(source, self._target.own_registry, self._target.retention, without)
        self._target.spared = backlog.kept
        return backlog

    def locate(self, info: CheckpointInfo) -> CheckpointInfo:
        """One that the replica has, with the whole path of its file."""
        return self._target.locate(info)

    def _check_same(self, infos: Sequence[CheckpointInfo]) -> None:
        """Two trainers, each with a directory of its own and one mirror, number their checkpoints alike."""
        there = {info.sequence: info for info in self._target.own_registry.checkpoints}
        for info in infos:
            other = there.get(info.sequence)
            if other is not None and (other.timestamp, other.filepath) != (info.timestamp, info.filepath):
                raise CheckpointError(
                    f"{self._target.path} has {other.filepath} where {self._source.path} has {info.filepath}: another "
                    "trainer went on with the same run, or an old directory came back; give this one another mirror"
                )

    def copy(self, info: CheckpointInfo) -> CheckpointInfo | None:
        """Bring one checkpoint to the replica, verified; listed there, and durable, on return. Blocks.

        None if it is gone from the source. Raises `ReplacedError` if a later one has its name there,
        `CorruptCheckpointError` if it is damaged, `NameTakenError` if another file has its name in the replica,
        `CheckpointNotFoundError` if it goes just now, and OSError.
        """
        path = self._source.path_of(str(info.filepath))
        return read_anew(path, lambda: self._copy(info, path))

    def _copy(self, info: CheckpointInfo, path: str) -> CheckpointInfo | None:
        name = str(info.filepath)
        storage = self._source.storage
        description = describe_file(storage, path)
        run_id = self._target.own_registry.run_id
        if description is None or description.run_id != run_id:
            return None
        if description.info.sequence != info.sequence:
            raise ReplacedError(f"{path} was saved again before it was mirrored")
        with open_checkpoint(storage, path, follow_links=False) as reader:
            plain = replace(info, is_best=False, protected=False, num_bytes=reader.num_bytes)
            listing = Listing(self._target, plain, run_id)
            replaced = self._target.replaceable(name)
            there = self._target.path_of(name)
            with transferred(self._target.storage, reader, path, there, replaced, _unheard) as upload:
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
