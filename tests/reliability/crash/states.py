"""Crash states: every state of the disk that a crash during a recorded run may leave, or a fair choice of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reliability.crash.disk import Change, Disk, Grow, Pending, Sync, Tree, Unsettled, Write, blocks
from reliability.crash.facts import Fact

BLOCK_BYTES = 4096
_MAX_FREE = 8  # up to so many free changes all their subsets are tried
_NUM_RANDOM = 24  # subsets, where there are more
_NUM_TORN = 6  # random ways to tear one write, besides the plain ones

Step = Change | Sync | Fact


@dataclass(frozen=True)
class CrashState:
    """What is on the disk after the crash, and how many of the recording's facts came before it."""

    tree: Tree
    num_facts: int


def crash_states(initial: Disk, steps: Sequence[Step], chance: random.Random) -> Iterator[CrashState]:
    """Each once: told apart by the tree and by what had been promised."""
    disk = Unsettled(initial)
    num_facts = 0
    seen: set[bytes] = set()
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if isinstance(step, Fact):
            num_facts += 1
            seen.clear()
        elif isinstance(step, Sync):
            disk.sync(step)
        else:
            disk.change(step)
        # While changes only add up, a crash after the last of them leaves all that one before it could have left.
        if _is_change(following) and len(disk.free()) < _MAX_FREE:
            continue
        for tree in _trees(disk, chance):
            digest = tree.digest()
            if digest not in seen:
                seen.add(digest)
                yield CrashState(tree, num_facts)


def _is_change(step: Step | None) -> bool:
    return step is not None and not isinstance(step, Fact | Sync)


def _trees(disk: Unsettled, chance: random.Random) -> Iterator[Tree]:
    free = disk.free()
    for arrived in _subsets(free, chance):
        yield disk.after_crash(arrived)
        for pending in arrived:
            if isinstance(pending.change, Write) and len(list(blocks(pending.change, BLOCK_BYTES))) > 1:
                yield disk.after_crash(arrived, {pending: _torn_at_random(pending.change, chance)})
    for pending in free:
        if isinstance(pending.change, Write):
            for torn in _torn(pending.change, chance):
                yield disk.after_crash(free, {pending: torn})


def _subsets(free: list[Pending], chance: random.Random) -> Iterator[list[Pending]]:
    if len(free) <= _MAX_FREE:
        for count in range(len(free) + 1):
            yield from map(list, itertools.combinations(free, count))
        return
    for index in range(len(free) + 1):
        yield free[:index]
    for pending in free:
        yield [pending]
        yield [other for other in free if other is not pending]
    for _ in range(_NUM_RANDOM):
        yield [pending for pending in free if chance.random() < 0.5]


def _torn(write: Write, chance: random.Random) -> Iterator[list[Change]]:
    """Ways in which a write of several blocks may arrive: its beginning, its end, all but one block, some of them."""
    pieces = list(blocks(write, BLOCK_BYTES))
    if len(pieces) == 1:
        return
    for index in range(1, len(pieces)):
        yield [*pieces[:index]]
        yield _grown(write, pieces[:index])
        yield _grown(write, pieces[index:])
        yield _grown(write, [*pieces[: index - 1], *pieces[index:]])
    for _ in range(_NUM_TORN):
        yield _torn_at_random(write, chance)


def _torn_at_random(write: Write, chance: random.Random) -> list[Change]:
    pieces = [piece for piece in blocks(write, BLOCK_BYTES) if chance.random() < 0.5]
    return _grown(write, pieces) if chance.random() < 0.5 else [*pieces]


def _grown(write: Write, pieces: Sequence[Write]) -> list[Change]:
    """The file has its new size; blocks that did not arrive hold what they did, or zeros where it grew."""
    return [Grow(write.inode, write.offset + len(write.data)), *pieces]
