"""Replication: a second directory of the same run is brought what is committed in the first. No torch.

The replica is a directory like any other, with a registry and a retention of its own. What it lacks follows from the
two registries alone (the sequence numbers above its last one), so nothing needs to be remembered across a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.image.verify import default_num_threads, verify_reader
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory, Listing
from asyncckpt.registry.registry import read_description
from asyncckpt.storage.base import Reader, Storage, Upload

_NUM_THREADS = 4  # each with a piece in memory


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
        """What is to be copied, the oldest first. Opens the replica for writing, where there is something. Blocks.

        Raises as `CheckpointDirectory.read` and `open_for_writing` do: a directory of another run is left alone.
        """
        source = self._source.read().registry
        if not source.checkpoints:
            return ()
        if not self._target.is_open:
            self._target.expect_run(source.run_id)
            self._target.open_for_writing()
        last = self._target.own_registry.last_sequence
        return [info for info in source.checkpoints if (info.sequence or 0) > last and not info.damaged]

    def copy(self, info: CheckpointInfo) -> CheckpointInfo | None:
        """Bring one checkpoint to the replica, verified; listed there, and durable, on return. Blocks.

        None if it is gone from the source, or has been replaced there. Raises `CorruptCheckpointError` if it is
        damaged, and OSError.
        """
        name = str(info.filepath)
        path = self._source.path_of(name)
        try:
            reader = self._storage.open(path, follow_links=False)
        except FileNotFoundError:
            return None
        with reader:
            report = verify_reader(reader, path, num_threads=default_num_threads())
            if not report.ok:
                raise CorruptCheckpointError(f"{path} is damaged, and not mirrored: {report.problems[0]}")
            description = read_description(report.metadata, reader.num_bytes)
            if description is None or description.info.sequence != info.sequence:
                return None
            plain = replace(info, is_best=False, protected=False, num_bytes=reader.num_bytes)
            listing = Listing(self._target, plain, self._target.own_registry.run_id)
            upload = self._storage.begin(self._target.path_of(name), reader.num_bytes)
            try:
                _copy(reader, upload)
                upload.sync()
                copied = self._target.record(listing, upload.commit)
                upload.close()
            except BaseException:
                upload.abort()
                raise
        self._target.delete_pending()
        return self._target.locate(copied)

    def close(self) -> None:
        """Let the next one write to it."""
        self._target.shut()


def _copy(reader: Reader, upload: Upload) -> None:
    """In pieces, several at a time."""
    piece_bytes = min(upload.piece_bytes, max(reader.num_bytes, 1))
    buffers = [memoryview(bytearray(piece_bytes)) for _ in range(min(_NUM_THREADS, upload.num_threads))]

    def copy_piece(offset: int) -> None:
        buffer = buffers.pop()
        try:
            view = buffer[: min(piece_bytes, reader.num_bytes - offset)]
            reader.read_into(offset, view)
            upload.write(offset, view)
        finally:
            buffers.append(buffer)

    with ThreadPoolExecutor(len(buffers), "asyncckpt-mirror") as threads:
        for _ in threads.map(copy_piece, range(0, reader.num_bytes, piece_bytes)):
            pass
