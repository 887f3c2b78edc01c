"""The invariant: what had been promised before the crash, held against what is found after it.

Once anything was acknowledged, the newest acknowledged checkpoint or a newer one loads; every acknowledged one is
there, unless retention dropped it in favour of others that are there; what was dropped stays dropped; the registry on
the disk names what was acknowledged; the best link holds the best of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from reliability.crash.facts import (
    Acknowledged,
    Fact,
    Failed,
    Found,
    Opened,
    Pruned,
    Pruning,
    RegistryLost,
    Retention,
    Submitted,
)
from reliability.crash.findings import Findings

_KEEP_ALL = 10**9


@dataclass(frozen=True)
class Promise:
    """What the facts so far amount to; checkpoints go by the numbers of their states.

    `limits` are how many newer ones excuse that one is gone, `kept` those acknowledged that a directory still keeps.
    """

    losses: Mapping[int, float | None] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)  # of the acknowledged
    sequences: Mapping[int, int | None] = field(default_factory=dict)
    limits: Mapping[int, int] = field(default_factory=dict)
    failed: frozenset[int] = frozenset()
    found: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()
    num_kept: int = _KEEP_ALL
    in_order: bool = True
    is_recorded: bool = True

    @property
    def said(self) -> tuple[object, ...]:
        """What tells two promises apart for whoever relies on them."""
        return tuple(self.names), self.kept, self.is_recorded, tuple(self.limits[number] for number in self.names)

    def after(self, fact: Fact) -> Promise:
        match fact:
            case Submitted(number, loss):
                limits = {**self.limits, number: self.num_kept}
                return replace(self, losses={**self.losses, number: loss}, limits=limits)
            case Acknowledged(number, path, sequence):
                names = {**self.names, number: path.rsplit("/", 1)[-1]}
                known = replace(self, names=names, sequences={**self.sequences, number: sequence}, is_recorded=True)
                others = {other for other in self.kept if names[other] != names[number]}
                return replace(known, kept=known.retained({*others, number}))
            case Failed(number):
                return replace(self, failed=self.failed | {number})
            case Retention(num_kept, in_order):
                return replace(self, num_kept=_KEEP_ALL if num_kept is None else num_kept, in_order=in_order)
            case Pruning(num_kept):
                return replace(self, limits={number: min(limit, num_kept) for number, limit in self.limits.items()})
            case Pruned():
                kept = self.retained(self.kept)
                return replace(self, kept=kept, limits={**self.limits, **dict.fromkeys(kept, self.num_kept)})
            case RegistryLost():
                # What is rebuilt from the files is protected until somebody prunes.
                limits = {**self.limits, **dict.fromkeys(self.kept, _KEEP_ALL)}
                return replace(self, is_recorded=False, limits=limits)
            case Found(numbers):
                return replace(self, found=numbers)
            case Opened():
                return replace(self, is_recorded=True)
        raise AssertionError(f"an unknown fact: {fact}")

    def retained(self, numbers: Iterable[int]) -> frozenset[int]:
        """Those that are not excused by the others."""
        present = frozenset(numbers)
        return frozenset(number for number in present if not self.is_excused(number, present))

    def is_excused(self, number: int, present: Iterable[int], names: Mapping[int, str] | None = None) -> bool:
        """Whether retention may drop a checkpoint when these are there."""
        names = names or {}
        newer = {other for other in present if other > number}
        if number in names and any(names.get(other) == names[number] for other in newer):
            return True  # saved again under the same name
        return len(newer) >= self.limits[number] and self.best_of({*present, number}) != number

    def best_of(self, numbers: Iterable[int]) -> int | None:
        """The lowest loss, of equals the earliest."""
        known = [(loss, number) for number in numbers if (loss := self.losses[number]) is not None and loss == loss]
        return min(known)[1] if known else None


def promise_of(facts: Iterable[Fact], before: Promise | None = None) -> Promise:
    """What `before` amounts to after these."""
    promise = before or Promise()
    for fact in facts:
        promise = promise.after(fact)
    return promise


def broken(promise: Promise, found: Findings) -> list[str]:
    """How a managed directory breaks the promise; nothing if it doesn't."""
    faults = [*found.faults]
    numbers: dict[int, str] = {}
    for name, content in found.checkpoints.items():
        if content.number is None or content.number not in promise.losses:
            faults.append(f"{name} holds {content}, which nobody saved")
        else:
            numbers[content.number] = name
    faults += _losses(promise, found, numbers)
    faults += _disagreements(promise, found, numbers)
    return faults


def _losses(promise: Promise, found: Findings, numbers: Mapping[int, str]) -> Iterator[str]:
    acknowledged = max(promise.names, default=0)
    newest = found.newest.number if found.newest else None
    if acknowledged > (newest or 0):
        yield f"{acknowledged} was acknowledged, and the newest that loads is {newest}"
    names = {**promise.names, **numbers}
    committed = set[int]()
    if promise.in_order:  # those before the newest that is there were committed too
        committed = {n for n in promise.losses if n < max(numbers, default=0) and n not in promise.failed}
    for number in sorted({*promise.names, *promise.found, *committed} - set(numbers)):
        if not promise.is_excused(number, numbers, names):
            yield f"{number} is gone, though only {sorted(numbers)} are there"
    for number in sorted(set(numbers) & set(promise.names) - promise.kept):
        yield f"{number} is there again, though it had been dropped"


def _disagreements(promise: Promise, found: Findings, numbers: Mapping[int, str]) -> Iterator[str]:
    """Of the registry and of the best link with what had been acknowledged."""
    by_sequence = {content.sequence: content.number for content in found.checkpoints.values()}
    by_sequence |= {sequence: number for number, sequence in promise.sequences.items()}
    if promise.is_recorded and promise.names:
        recorded = {n for s in found.recorded or () if (n := by_sequence.get(s)) is not None}
        for number in sorted(set(promise.names) - recorded):
            if not promise.is_excused(number, recorded, {**promise.names, **numbers}):
                yield f"{number} was acknowledged, and the registry on the disk does not name it"
    yield from _linked(promise, found)
    best = promise.best_of(numbers)
    if best is not None and (found.best is None or found.best.number != best):
        yield f"once opened, the best link holds {found.best}, not {best}"


def _linked(promise: Promise, found: Findings) -> Iterator[str]:
    """The best of what was acknowledged, or one that is better, or saved later under the same name."""
    link = found.link.number if found.link else None
    if link is not None and link not in promise.losses:
        yield f"the best link holds {found.link}, which nobody saved"
        return
    namesakes = {n for n in promise.names if found.link and promise.names[n] == found.link.name}
    rivals = {n for n in promise.kept if n not in namesakes or n > (link or 0)}
    if link is not None and link >= max(namesakes, default=0):
        rivals.add(link)
    if promise.best_of(rivals) != link:
        yield f"the best link holds {link}, and {promise.best_of(rivals)} was acknowledged"


def broken_files(promise: Promise, found: Findings) -> list[str]:
    """The same for explicit paths: each holds the newest acknowledged, or a newer one."""
    faults = [*found.faults]
    for name in {*promise.names.values()}:
        newest = max(number for number, other in promise.names.items() if other == name)
        content = found.checkpoints.get(name)
        if content is None or content.number is None or content.number < newest:
            faults.append(f"{name} holds {content}, and {newest} was acknowledged")
    for name, content in found.checkpoints.items():
        if content.number not in promise.losses:
            faults.append(f"{name} holds {content}, which nobody saved")
    return faults
