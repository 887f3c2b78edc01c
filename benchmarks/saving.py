"""Saving, interleaved: every method once per round, in an order that rotates, each save verified."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import asyncckpt
from benchmarks.machine import RAW_NUM_THREADS, memory_copy_secs, raw_write_secs
from benchmarks.methods import MAKERS, Method, remove
from benchmarks.samples import Samples
from benchmarks.workload import Expected, Workload, aligned_buffer, place


@dataclass
class MethodTimes:
    """One method's figures. The first save is kept apart: it pays for fresh memory and late imports."""

    name: str
    about: str
    blocked: Samples = field(default_factory=Samples)
    durable: Samples = field(default_factory=Samples)
    timings: list[asyncckpt.Timings] = field(default_factory=list)

    def part(self, name: str) -> Samples:
        """One field of the timings, empty for methods that have none."""
        return Samples([getattr(timings, f"{name}_secs") for timings in self.timings])


@dataclass
class SavingResults:
    """All samples run parallel over the rounds, so that figures of one round may be divided by each other."""

    num_bytes: int
    num_tensors: int
    memory_copy: Samples = field(default_factory=Samples)
    raw_write: Samples = field(default_factory=Samples)
    methods: dict[str, MethodTimes] = field(default_factory=dict)


def measure_saving(num_bytes: int, num_rounds: int, directory: Path, tell: Callable[[str], None]) -> SavingResults:
    """Run one cold round and `num_rounds` warm ones. Raises `WrongBytesError` if a method wrote anything else."""
    methods = {key: make() for key, make in MAKERS.items()}
    contest = _Contest(Workload(num_bytes), methods, directory)
    try:
        for index in range(num_rounds + 1):
            tell(f"saving, round {index + 1} of {num_rounds + 1}")
            for key in _rotated([*methods, "memory", "raw"], index):
                contest.run(key)
    finally:
        for method in methods.values():
            method.close()
    return contest.results


class _Contest:
    """One state, saved by every method in turn."""

    def __init__(self, workload: Workload, methods: Mapping[str, Method], directory: Path) -> None:
        self._workload, self._methods, self._directory = workload, methods, directory
        self._expected = Expected(workload.state())
        self._spare = aligned_buffer(self._expected.buffer.nbytes)
        self.results = SavingResults(workload.num_bytes, workload.num_tensors)
        for key, method in methods.items():
            self.results.methods[key] = MethodTimes(method.name, method.about)

    def run(self, key: str) -> None:
        if key == "memory":
            self.results.memory_copy.add(memory_copy_secs(self._expected.buffer, self._spare))
        elif key == "raw":
            file = self._directory / "raw"
            self.results.raw_write.add(min(raw_write_secs(self._spare, file, number) for number in RAW_NUM_THREADS))
        else:
            path = self._directory / f"{key}.pt"
            self._save(self._methods[key], path, self.results.methods[key])
            self._verify(self._methods[key], path)
            remove(path)

    def _save(self, method: Method, path: Path, times: MethodTimes) -> None:
        """In the first round the state changes while a method still writes, so that a snapshot that tears or aliases is
        caught; in the timed rounds only after that (but for overlap, whose fence is there for that step)."""
        is_first = not times.blocked.all
        step_at_once = method.overlaps or (is_first and method.in_background)
        state = self._workload.state()
        self._expected.update(state)
        started = time.perf_counter()
        method.save(self._workload, state, path)
        times.blocked.add(time.perf_counter() - started)
        if step_at_once:
            self._workload.step()
        method.finish()
        times.durable.add(time.perf_counter() - started)
        timings = method.timings()
        if timings is not None:
            times.timings.append(timings)
        if not step_at_once:
            self._workload.step()

    def _verify(self, method: Method, path: Path) -> None:
        self._spare.zero_()  # so that a load in place that does nothing is noticed
        like = {**place(self._workload.state(), self._spare), "global_step": -1}
        self._expected.check(method.load(path, like), method.name)


def _rotated(keys: Sequence[str], index: int) -> list[str]:
    """Another order in each round, so that nobody always follows the same neighbour's leftovers."""
    step = index % len(keys)
    turned = [*keys[step:], *keys[:step]]
    return turned if index % 2 == 0 else turned[::-1]
