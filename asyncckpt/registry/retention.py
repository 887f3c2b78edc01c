"""Retention policies: what to keep. Pure: no I/O, no clock, no torch.

Whoever applies a policy after every commit shows it only what it kept before and what is newer. Policies here choose
from that what they would choose from the whole history, so that applying them often or seldom makes no difference.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from asyncckpt.records import CheckpointInfo

_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class RetentionPolicy(ABC):
    """What to keep of a directory's checkpoints. Policies are immutable, and `|` keeps what either of two keeps.

    The newest checkpoint, the best one, pinned and protected ones stay whatever the policy says: see `retained`.
    """

    @abstractmethod
    def kept(self, checkpoints: Sequence[CheckpointInfo]) -> frozenset[int]:
        """The sequence numbers of the checkpoints to keep.

        The checkpoints come in any order, and every one has a sequence number. A policy of your own should choose a
        checkpoint again when some that it did not choose are gone and newer ones have come.
        """

    def __or__(self, other: RetentionPolicy) -> RetentionPolicy:
        if not isinstance(other, RetentionPolicy):
            return NotImplemented
        return KeepAny((*_parts(self), *_parts(other)))


@dataclass(frozen=True, repr=False)
class KeepAny(RetentionPolicy):
    """Keeps what any of its policies keeps; made by `|`."""

    policies: tuple[RetentionPolicy, ...]

    def kept(self, checkpoints: Sequence[CheckpointInfo]) -> frozenset[int]:
        return frozenset[int]().union(*(policy.kept(checkpoints) for policy in self.policies))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))


@dataclass(frozen=True)
class KeepLast(RetentionPolicy):
    """Keeps the `num` newest commits, whatever their steps: after a rollback the new branch is the newest.

    Raises TypeError or ValueError unless `num` is an int of at least 1.
    """

    num: int

    def __post_init__(self) -> None:
        _check_count("num", self.num)

    def kept(self, checkpoints: Sequence[CheckpointInfo]) -> frozenset[int]:
        return frozenset(sorted(map(_sequence, checkpoints))[-self.num :])


@dataclass(frozen=True)
class KeepBest(RetentionPolicy):
    """Keeps the `num` checkpoints with the lowest ("min") or highest ("max") value of a metric; of equals the earlier.

    A checkpoint without the metric, or with NaN, is not kept by it; infinities are values like others.

    Raises TypeError or ValueError unless `num` is an int of at least 1, and ValueError for another mode.
    """

    num: int
    metric: str = "val_loss"
    mode: str = "min"

    def __post_init__(self) -> None:
        _check_count("num", self.num)
        if self.mode not in ("min", "max"):
            raise ValueError(f'mode must be "min" or "max", not {self.mode!r}')

    def kept(self, checkpoints: Sequence[CheckpointInfo]) -> frozenset[int]:
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(
            (sign * value, _sequence(info))
            for info in checkpoints
            if (value := info.metric(self.metric)) is not None and not math.isnan(value)
        )
        return frozenset(sequence for _, sequence in ranked[: self.num])


@dataclass(frozen=True, kw_only=True, repr=False)
class KeepEvery(RetentionPolicy):
    """Keeps milestones for ever: one for every so many `steps`, `epochs` or `hours`. Give exactly one of them.

    `steps`, `epochs`: the first checkpoint at or after each multiple, zero excepted. With `steps=1000` and a save every
    300 these are 1200, 2100, 3000 and so on. A checkpoint that is not above an earlier one starts a new branch: the
    multiples from there on are open again, and the milestones of the abandoned branch stay too. Where nothing else
    would show that there was a rollback, the first checkpoint of the new branch stays as well. Checkpoints without a
    step or an epoch are passed over.

    `hours`: the first commit in each window of that length by the checkpoints' timestamps. Windows are counted from
    1970-01-01 UTC. A timestamp without an offset is UTC; one that can't be read is passed over.

    Raises TypeError or ValueError unless exactly one is given: an int of at least 1, or for `hours` a number above 0.
    """

    steps: int | None = None
    epochs: int | None = None
    hours: float | None = None

    def __post_init__(self) -> None:
        if len(self._given()) != 1:
            raise ValueError(f"give exactly one of steps, epochs and hours, not {self!r}")
        if self.hours is not None:
            _to_window(self.hours)
        else:
            for name, num in self._given().items():
                _check_count(name, num)

    def kept(self, checkpoints: Sequence[CheckpointInfo]) -> frozenset[int]:
        ordered = sorted(checkpoints, key=_sequence)
        if self.hours is not None:
            return frozenset(_first_in_windows(ordered, _to_window(self.hours)))
        commits = [(_sequence(info), position) for info in ordered if (position := self._position(info)) is not None]
        every = self.epochs if self.steps is None else self.steps
        assert every is not None
        return frozenset(_milestones(commits, every))

    def _position(self, info: CheckpointInfo) -> _Position | None:
        count = info.epoch if self.steps is None else info.global_step
        return None if count is None else (count, info.global_step or 0)

    def _given(self) -> dict[str, object]:
        given = {"steps": self.steps, "epochs": self.epochs, "hours": self.hours}
        return {name: num for name, num in given.items() if num is not None}

    def __repr__(self) -> str:
        return f"KeepEvery({', '.join(f'{name}={num!r}' for name, num in self._given().items())})"


def retained(policy: RetentionPolicy, checkpoints: Sequence[CheckpointInfo]) -> frozenset[int]:
    """The sequence numbers that a directory keeps: the policy's, the newest, the best, protected and pinned ones.

    Damaged ones take nobody's place: the policy chooses among the others, and they go when all that is older, and not
    pinned, has gone.
    """
    whole = [info for info in checkpoints if not info.damaged]
    newest = max(map(_sequence, whole), default=None)
    kept = set(policy.kept(whole)) | {_sequence(info) for info in whole if info.is_best or info.protected}
    kept |= {newest} if newest is not None else set()
    oldest = min(kept, default=0)
    kept |= {_sequence(info) for info in checkpoints if info.damaged and _sequence(info) > oldest}
    return frozenset(kept | {_sequence(info) for info in checkpoints if info.pinned})


# What another process may be told of a policy: each part's name and numbers.
PlainPolicy = list[tuple[str, dict[str, Any]]]


def to_plain(policy: RetentionPolicy) -> PlainPolicy | None:
    """The policy as plain data; None if it has a part that is not of this module, whose code others may not have."""
    parts = _parts(policy)
    if any(_KINDS.get(type(part).__name__) is not type(part) for part in parts):
        return None
    return [(type(part).__name__, asdict(part)) for part in parts]  # type: ignore[call-overload]


def from_plain(plain: PlainPolicy) -> RetentionPolicy:
    """The policy that `to_plain` was given."""
    policies = tuple(_KINDS[name](**numbers) for name, numbers in plain)
    return policies[0] if len(policies) == 1 else KeepAny(policies)


_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (KeepLast, KeepBest, KeepEvery)}


def _parts(policy: RetentionPolicy) -> tuple[RetentionPolicy, ...]:
    return policy.policies if isinstance(policy, KeepAny) else (policy,)


def _sequence(info: CheckpointInfo) -> int:
    assert info.sequence is not None
    return info.sequence


# How far training had come: what the multiples are counted in, and the step, since several checkpoints of one epoch are
# no rollback.
_Position = tuple[int, int]


def _milestones(commits: Sequence[tuple[int, _Position]], every: int) -> Iterator[int]:
    """The first commit of each branch at or after each multiple of `every`, and the witnesses that they need.

    With 1200 and 2100 kept, 1500 (after a rollback), 2400: once 1500 is gone, 2400 looks like the next one after 2100,
    no milestone. So the commit that abandoned milestones is kept until a milestone at or below all of them shows the
    rollback in its place; if the next milestone is above one of them, for ever.
    """
    branch: list[_Position] = []  # the milestones of the present branch, ascending
    witness: int | None = None
    lowest_abandoned: _Position = (0, 0)
    for sequence, position in commits:
        while branch and branch[-1] >= position:
            witness, lowest_abandoned = sequence, branch.pop()
        if position[0] // every > (branch[-1][0] // every if branch else 0):
            if witness is not None and position > lowest_abandoned:
                yield witness
            witness = None
            branch.append(position)
            yield sequence
    if witness is not None:
        yield witness


def _first_in_windows(ordered: Sequence[CheckpointInfo], window: timedelta) -> Iterator[int]:
    """By commit order, not by time: a clock that was set back must not displace what was kept."""
    seen: set[int] = set()
    for info in ordered:
        moment = _to_moment(info.timestamp)
        if moment is not None and (number := (moment - _UNIX_EPOCH) // window) not in seen:
            seen.add(number)
            yield _sequence(info)


def _to_moment(timestamp: str) -> datetime | None:
    try:
        # Python 3.10 does not know "Z".
        moment = datetime.fromisoformat(timestamp[:-1] + "+00:00" if timestamp.endswith("Z") else timestamp)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)


def _to_window(hours: float) -> timedelta:
    if isinstance(hours, bool) or not isinstance(hours, int | float):
        raise TypeError(f"hours must be a number, not {hours!r}")
    try:
        window = timedelta(hours=hours)
    except (ValueError, OverflowError):  # NaN, infinities, and what no calendar holds
        window = timedelta()
    if window <= timedelta():
        raise ValueError(f"hours must be a length of time above 0, not {hours!r}")
    return window


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
