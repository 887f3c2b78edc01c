"""What a mirror lacks of a run, by the two registries and its own retention. Pure: no I/O, no torch.

A mirror is to hold what its policy keeps of all that the two places hold. So what it would delete at once is never
brought there, and what it has lost is brought again; nothing needs to be remembered across a restart. It deletes what
its policy drops of what is there alone, and would drop of both: so an empty source drives nothing, and what comes out
of order finds there what it belongs to.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.registry import Registry
from asyncckpt.registry.retention import RetentionPolicy, retained


@dataclass(frozen=True)
class Mirrored:
    """How far a mirror has come: all commits up to `last` are settled, but for those that are `lacking`.

    Settled is what it has, and what it will never be brought. With `last` 0 nothing is known of it.
    """

    last: int = 0
    lacking: frozenset[int] = frozenset()

    def awaits(self, sequence: int | None) -> bool:
        """Whether the checkpoint with this number is still to be brought there."""
        return sequence is not None and (sequence > self.last or sequence in self.lacking)


@dataclass(frozen=True)
class Backlog:
    """What a mirror lacks: what is `wanted` there, in the order of the commits, and the numbers of the rest.

    `there` is what it has, `kept` are the numbers that its policy keeps of both places, and `last` is the highest one
    in either.
    """

    wanted: tuple[CheckpointInfo, ...] = ()
    unwanted: frozenset[int] = frozenset()
    there: tuple[CheckpointInfo, ...] = ()
    kept: frozenset[int] = frozenset()
    last: int = 0

    @property
    def mirrored(self) -> Mirrored:
        return Mirrored(self.last, frozenset(info.sequence for info in self.wanted if info.sequence is not None))


def backlog_of(
    source: Registry, mirror: Registry, retention: RetentionPolicy | None, without: Collection[int] = ()
) -> Backlog:
    """What the mirror lacks of the source, leaving out what is damaged, and the numbers in `without`.

    Without a policy all of it is wanted.
    """
    numbers = {info.sequence for info in mirror.checkpoints}
    latest = {info.filepath: info.sequence or 0 for info in mirror.checkpoints}
    lacking = [
        replace(info, protected=False)  # that the source has lost its registry is no matter of the mirror's
        for info in source.checkpoints
        if not (info.damaged or info.sequence in numbers or info.sequence in without)
        and (info.sequence or 0) > latest.get(info.filepath, 0)
    ]
    names = {info.filepath for info in lacking}  # of which the mirror has an earlier one, or none
    both = mirror.with_checkpoints([*(info for info in mirror.checkpoints if info.filepath not in names), *lacking])
    everything = frozenset(info.sequence for info in both.checkpoints if info.sequence is not None)
    kept = everything if retention is None else retained(retention, both.checkpoints)
    wanted = tuple(info for info in lacking if info.sequence in kept)
    unwanted = {info.sequence for info in lacking} - {info.sequence for info in wanted}
    last = max([mirror.last_sequence, *(info.sequence or 0 for info in source.checkpoints)])
    return Backlog(wanted, frozenset(n for n in unwanted if n is not None), mirror.checkpoints, kept, last)
