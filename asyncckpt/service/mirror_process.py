"""The mirror's process: copies what the trainer's directory has to the mirror. No torch.

When the trainer ends, however it ends, it brings what is lacking, as long as that can be done, and then ends too.
"""

from __future__ import annotations

import logging
import os
import select

from asyncckpt.events import EventKind
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.backlog import Mirrored
from asyncckpt.registry.retention import from_plain
from asyncckpt.service import messages
from asyncckpt.service.connection import Connection
from asyncckpt.service.messages import (
    Copied,
    Farewell,
    Finish,
    GivenUp,
    Happened,
    Message,
    PassedOver,
    Poke,
    Progress,
    SetupMirror,
    Unpin,
)
from asyncckpt.service.replicator import Replicator, make_replicator
from asyncckpt.service.writer import Forwarder, run_process, step_back
from asyncckpt.storage.places import Places
from asyncckpt.threads import logger

_MAX_ENDING_SECS = 10.0


def main(connection_fd: int, trainer_fd: int) -> None:
    """Run until the trainer ends, or hangs up, and nothing more can be copied. `trainer_fd` is its pidfd."""
    run_process(connection_fd, lambda connection: MirrorProcess(connection, trainer_fd).run())


class MirrorProcess:
    """Receives on the main thread; the replicator has a thread of its own, and tells us what to tell the trainer."""

    def __init__(self, connection: Connection, trainer_fd: int) -> None:
        self._connection = connection
        self._trainer_fd = trainer_fd
        self._replicator: Replicator | None = None
        self._is_orphan = False
        self._is_over = False  # the trainer needs us no more
        self._is_finishing = False  # it saves no more

    @property
    def is_orphan(self) -> bool:
        return self._is_orphan

    def send(self, message: Message) -> None:
        """Tell the trainer, if it still listens."""
        self._connection.send(messages.encode(message))

    def run(self) -> None:
        logger.addHandler(Forwarder(self))
        logger.setLevel(logging.INFO)
        while not self._is_finishing and (self._connection.wait(self._trainer_fd) or self._connection.has_more()):
            received = self._connection.receive()
            if received is None:
                break
            self._take(messages.decode_to_mirror(received[0]))
        if not self._is_finishing:
            self._is_orphan = True
            self._connection.shut_down()
        if self._replicator is not None:
            self._end(self._replicator)

    def _end(self, replicator: Replicator) -> None:
        if self._is_over:
            replicator.stop()
        else:
            if self._is_orphan:
                self._await_end_of_trainer()
                replicator.await_source()
            replicator.finish()
        replicator.join()

    def _await_end_of_trainer(self) -> None:
        """Its connections are closed before it counts as ended, which says that its writer is on its own."""
        poll = select.poll()
        poll.register(self._trainer_fd, select.POLLIN)
        poll.poll(_MAX_ENDING_SECS * 1000)

    def _take(self, message: messages.ToMirror) -> None:
        if isinstance(message, SetupMirror):
            step_back(message.nice)
            places = [Places(options, message.journals) for options in (message.source_options, message.target_options)]
            retention = from_plain(message.retention)
            self._replicator = make_replicator(message, (places[0], places[1]), retention, self, nice=0)
        elif isinstance(message, Poke):
            assert self._replicator is not None, "the trainer's first message is SetupMirror"
            self._replicator.poke(message.number, is_hurried=message.is_hurried)
        elif isinstance(message, Unpin):
            assert self._replicator is not None, "the trainer's first message is SetupMirror"
            self._replicator.unpin(message.sequences)
        elif isinstance(message, Finish):
            self._is_finishing = True
        elif isinstance(message, Farewell):
            self._is_over = True

    # --- what the replicator tells ---

    def emit(self, kind: EventKind, path: str, detail: str) -> None:
        self.send(Happened(kind, os.fsencode(path), messages.plain_text(detail)))

    def copied(self, sequence: int, info: CheckpointInfo) -> None:
        self.send(Copied(sequence, info))
        if self._is_orphan:
            logger.info("%s is mirrored", info.filepath)

    def passed_over(self, sequence: int) -> None:
        self.send(PassedOver(sequence))

    def given_up(self, sequence: int, error: Exception) -> None:
        self.send(GivenUp(sequence, messages.describe_error(error)))
        if self._is_orphan:
            logger.error("%s", error)

    def progress(self, mirrored: Mirrored, problem: Exception | None, caught_up_with: int, tried: int) -> None:
        plain = messages.describe_error(problem) if problem is not None else None
        self.send(Progress(mirrored, plain, caught_up_with, tried))

    def ended(self) -> None:
        """The end of the process says it."""
