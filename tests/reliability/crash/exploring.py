"""From a recording to verdicts: each crash state is put into memory, looked at, and held against the promise."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from storage.mounts import memory_directory

from reliability.crash.disk import Disk, Tree
from reliability.crash.facts import Fact
from reliability.crash.findings import Findings
from reliability.crash.invariant import Promise
from reliability.crash.states import Step, crash_states


@dataclass(frozen=True)
class Recording:
    """A run of a workload. `look` is given the base, `judge` what was promised (from `before` on) and was found."""

    name: str
    initial: Disk
    steps: list[Step]
    look: Callable[[Path], Findings]
    judge: Callable[[Promise, Findings], list[str]]
    before: Promise = field(default_factory=Promise)

    def promises(self) -> list[Promise]:
        """After so many facts."""
        promises = [self.before]
        for step in self.steps:
            if isinstance(step, Fact):
                promises.append(promises[-1].after(step))
        return promises


@dataclass(frozen=True)
class Verdict:
    """On one crash state: how it breaks the promise, nothing if it does not."""

    tree: Tree
    promise: Promise
    findings: Findings
    faults: list[str]


Seen = set[tuple[bytes, tuple[object, ...]]]


def verdicts(recording: Recording, chance: random.Random, seen: Seen | None = None) -> Iterator[Verdict]:
    """One for each state that is not among those `seen`, told apart by the tree and by what had been promised."""
    promises = recording.promises()
    seen = set() if seen is None else seen
    known: dict[bytes, Findings] = {}
    with memory_directory() as base:
        for number, state in enumerate(crash_states(recording.initial, recording.steps, chance)):
            promise = promises[state.num_facts]
            digest = state.tree.digest()
            key = (digest, promise.said)
            if key in seen:
                continue
            seen.add(key)
            if digest not in known:
                known[digest] = look_at(state.tree, base / str(number), recording.look)
            findings = known[digest]
            yield Verdict(state.tree, promise, findings, recording.judge(promise, findings))


def look_at(tree: Tree, base: Path, look: Callable[[Path], Findings]) -> Findings:
    base.mkdir()
    try:
        tree.write(base)
        return look(base)
    finally:
        shutil.rmtree(base)


def describe(recording: Recording, verdict: Verdict) -> str:
    """For a failed test."""
    files = "\n".join(f"    {path}: {len(content)} bytes" for path, _, content in verdict.tree.files)
    facts = "\n".join(f"    {step}" for step in recording.steps if isinstance(step, Fact))
    faults = "\n".join(f"    {fault}" for fault in verdict.faults)
    return (
        f"{recording.name}, after {sorted(verdict.promise.names)} were acknowledged:\n{faults}\n"
        f"  on the disk:\n{files}\n  the whole run:\n{facts}"
    )
