"""Handing a save over to the writer process: what the writer is told, and what comes of its answers. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from asyncckpt.image.checksum import StagedImage
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory, WriterState
from asyncckpt.registry.retention import to_plain
from asyncckpt.service.messages import (
    ForgetArena,
    Grant,
    Message,
    PlannedListing,
    Settled,
    ShareArena,
    Staged,
    Submit,
    encode,
    rebuild_error,
)
from asyncckpt.service.queue import Submission
from asyncckpt.service.worker import forget_frames
from asyncckpt.service.writer_process import WriterProcess


@dataclass(eq=False)
class Handover:
    """A save for the writer, until it is finished. `torn` is why it must not commit."""

    number: int
    submission: Submission
    is_started: bool = False  # the writer has been told of it
    is_handed_over: bool = False  # and has its image
    is_begun: bool = False
    is_settled: bool = False
    num_deaths: int = 0
    torn: BaseException | None = None

    @property
    def path(self) -> str:
        return self.submission.handle.path

    @property
    def directory(self) -> CheckpointDirectory | None:
        listing = self.submission.listing
        return listing.directory if listing is not None else None

    # --- to the writer ---

    def advance(self, process: WriterProcess, tell_later: Callable[[Message], None]) -> None:
        """Tell the writer what it does not know of the save yet. Raises what went wrong while staging.

        `tell_later` tells whichever writer there is when the image's memory is given back.
        """
        self.submission.handle.is_submitted = True  # before it can be over, for a `submit` that is interrupted
        if not self.is_started:
            if self.directory is not None:
                _grant(process, self.directory)
            process.connection.send(encode(Submit(self.number, os.fsencode(self.path), self._planned())))
            self.is_started = True
        if not self.is_handed_over and self.submission.image.is_complete:
            self._send_image(process, tell_later)
            self.is_handed_over = True

    def start_anew(self) -> None:
        """Another writer knows nothing of it."""
        self.is_started = self.is_handed_over = self.is_begun = False

    def _planned(self) -> PlannedListing | None:
        if (listing := self.submission.listing) is None:
            return None
        directory = listing.directory
        return PlannedListing(
            id(directory),
            listing.info,
            listing.run_id,
            listing.is_certain,
            sorted(directory.damaged),
            directory.mirrored,
        )

    def _send_image(self, process: WriterProcess, tell_later: Callable[[Message], None]) -> None:
        image = self.submission.image
        source, arena = image.wait(), image.arena
        assert isinstance(source, StagedImage)
        assert arena is not None
        assert arena.fd is not None
        if arena.number not in process.arenas:
            process.connection.send(encode(ShareArena(arena.number)), (arena.fd,))
            process.arenas.add(arena.number)
            arena.before_close(partial(tell_later, ForgetArena(arena.number)))
        records = [(record.name, record.num_bytes) for record in source.layout.records]
        process.connection.send(encode(Staged(self.number, arena.number, records)))

    # --- what comes of it ---

    def may_commit(self) -> bool:
        """Whether the image is still of one moment: asked by the writer, last of all."""
        try:
            self.submission.image.check()
        except BaseException as error:
            forget_frames(error)
            self.torn = error
        return self.torn is None

    def learn(self, state: WriterState | None) -> None:
        """The writer has changed the save's directory: this is how it stands now."""
        if self.directory is not None and state is not None:
            self.directory.learn(state)

    def settle(self, message: Settled) -> None:
        """The writer has said how it ended; it may say so twice."""
        if self.is_settled:
            return
        timings = self.submission.handle.timings
        for name, secs in message.timings.items():
            setattr(timings, name, secs)
        self.learn(message.state)
        error = self.torn or (rebuild_error(message.error) if message.error is not None else None)
        self.acknowledge(message.info, error)

    def acknowledge(self, info: CheckpointInfo | None, error: BaseException | None) -> None:
        """Settle it: the image's memory is given back, then everybody hears of it."""
        self.is_settled = True
        if error is not None:
            forget_frames(error)
        self.submission.image.release()
        if error is not None and (listing := self.submission.listing) is not None:
            listing.directory.withdraw(listing)
        self.submission.settle(info, error)


def _grant(process: WriterProcess, directory: CheckpointDirectory) -> None:
    """Let the writer write the directory; again if this process has written it since."""
    number, generation = id(directory), directory.generation
    if process.generations.get(number) == generation:
        return
    lock = directory.share_lock()
    grant = Grant(
        directory=number,
        generation=generation,
        path=os.fsencode(directory.path),
        retention=to_plain(directory.retention) if directory.retention is not None else None,
        metric=directory.metric,
        mode=directory.mode,
        state=directory.state,
        lock=lock if isinstance(lock, bytes) else None,
        mirror_backlog_bytes=directory.mirror_backlog_bytes,
    )
    process.connection.send(encode(grant), (lock,) if isinstance(lock, int) else ())
    process.generations[number] = generation
