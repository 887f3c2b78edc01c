"""Writer processes, one after the other: how one is started, and what is found out when it has died. No torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from asyncckpt.errors import CheckpointWriteError
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.service.handover import Handover
from asyncckpt.service.messages import Hurry, Setup, encode
from asyncckpt.service.queue import Emit
from asyncckpt.service.writer_process import WriterProcess
from asyncckpt.threads import log_quietly

_MAX_DEATHS = 3  # of writers, on one image
_MAX_FAILED_STARTS = 3

# Settles and finishes a save that no writer will say more of.
Conclude = Callable[[Handover, CheckpointInfo | None, BaseException | None], None]


class Succession:
    """Starts the writer process, and each that takes its place, while there is hope that one works."""

    def __init__(self, setup: Setup, emit: Emit) -> None:
        self._setup = setup
        self._emit = emit
        self._is_ready = False  # the process has said so
        self._num_failed_starts = 0
        self._in_hurry = False

    def start(self) -> WriterProcess:
        """Raises OSError when it can't be started."""
        process = WriterProcess()
        self._is_ready = False
        process.connection.send(encode(self._setup))
        if self._in_hurry:
            process.connection.send(encode(Hurry()))
        return process

    def start_another(self) -> WriterProcess | None:
        """The next one; None once too many in a row did not come up."""
        while self._num_failed_starts < _MAX_FAILED_STARTS:
            try:
                return self.start()
            except OSError as error:
                self._num_failed_starts += 1
                self.report(f"a writer process can't be started: {error}")
        return None

    def hurry(self) -> None:
        """Those to come make no pauses between retries either."""
        self._in_hurry = True

    def welcome(self) -> None:
        """The process has come up."""
        self._is_ready, self._num_failed_starts = True, 0

    def bury(self, dead: WriterProcess, unfinished: Sequence[Handover]) -> str:
        """Report its end, and count it against what may have caused it. Returns how it ended."""
        dead.wait()
        ending = dead.describe_end()
        self.report(f"the writer process {dead.pid} {ending}")
        if self._is_ready:
            _count_death(unfinished)
        else:  # it has not looked at an image yet
            self._num_failed_starts += 1
        return ending

    def report(self, detail: str) -> None:
        """Say what has become of a writer process, in the log and as an event."""
        log_quietly(logging.WARNING, detail)
        self._emit("writer_died", "", detail)


def _count_death(unfinished: Sequence[Handover]) -> None:
    """Against the saves that the writer had begun; if there are none, those whose images it was given."""
    waiting = [save for save in unfinished if save.is_handed_over and not save.is_settled]
    for save in [save for save in waiting if save.is_begun] or waiting:
        save.num_deaths += 1


def conclude_committed(saves: Iterable[Handover], conclude: Conclude) -> None:
    """Find out what the dead one has committed: the directories and their files say so."""
    by_directory: dict[CheckpointDirectory, list[Handover]] = {}
    for save in saves:
        if save.directory is not None:
            by_directory.setdefault(save.directory, []).append(save)
        elif save.is_settled:
            conclude(save, None, None)
    for directory, own in by_directory.items():
        try:
            directory.recover()
            listed = {info.sequence: info for info in directory.registry.checkpoints}
        except Exception as error:
            directory.close()  # the next save opens it anew
            for save in own:
                conclude(save, None, error)
            continue
        for save in own:
            listing = save.submission.listing
            info = listed.get(listing.info.sequence) if listing is not None else None
            if info is not None or save.is_settled:
                conclude(save, directory.locate(info) if info is not None else None, None)


def conclude_deadly(saves: Sequence[Handover], ending: str, conclude: Conclude) -> None:
    """Give up the saves that too many writers have died on; the last one's `ending` is in their errors."""
    for save in [save for save in saves if save.num_deaths >= _MAX_DEATHS and not save.is_settled]:
        message = f"{save.path} was not saved: the writer process died {save.num_deaths} times while writing it"
        conclude(save, None, CheckpointWriteError(f"{message}; the last one {ending}"))
