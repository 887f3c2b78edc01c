"""How much slower training steps are while a save is being written."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asyncckpt import AdaptiveInterval
from benchmarks.methods import (
    AsyncckptCopy,
    AsyncckptCopyEager,
    AsyncckptProcess,
    DcpAsyncSave,
    Method,
    ReferenceSaver,
    remove,
)
from benchmarks.samples import Samples
from benchmarks.workload import GPT, Workload, new_optimizer, random_tokens

COMPARED: tuple[Callable[[], Method], ...] = (
    *(ReferenceSaver, DcpAsyncSave),
    *(AsyncckptCopy, AsyncckptProcess, AsyncckptCopyEager),
)
COMPARED_WITH_BUSY_PYTHON: tuple[Callable[[], Method], ...] = (ReferenceSaver, AsyncckptCopy, AsyncckptProcess)
_NUM_ADDITIONS = 100_000  # in a step of pure Python: some milliseconds


@dataclass
class SlowdownResults:
    """`ratio`: median step while writing over median step just before. `lost`: seconds by which all steps in the
    window took longer than as many undisturbed ones. `writing`: seconds from save() returning to durable."""

    name: str
    ratio: Samples = field(default_factory=Samples)
    lost: Samples = field(default_factory=Samples)
    blocked: Samples = field(default_factory=Samples)
    writing: Samples = field(default_factory=Samples)

    def average_slowdown(self, interval_secs: float) -> float:
        """The share of training time that saving takes, stall and slower steps, when one saves that often."""
        return (self.blocked.median + self.lost.median) / interval_secs

    def recommended_interval_secs(self) -> float:
        """How often `AdaptiveInterval` would save."""
        cost_secs = self.blocked.median + self.lost.median
        return AdaptiveInterval().interval_secs(cost_secs, self.blocked.median + self.writing.median)


class Trainer:
    """A small GPT whose steps are timed one by one."""

    def __init__(self) -> None:
        self._model = GPT(width=128, num_layers=4)
        self._optimizer = new_optimizer(self._model)

    def step(self) -> None:
        self._optimizer.zero_grad()
        self._model(random_tokens()).backward()
        self._optimizer.step()

    def run_while(self, go_on: Callable[[], bool]) -> list[float]:
        """Train until `go_on` says no, at least one step; seconds of each."""
        secs: list[float] = []
        while not secs or go_on():
            started = time.perf_counter()
            self.step()
            secs.append(time.perf_counter() - started)
        return secs

    def run_for(self, secs: float) -> list[float]:
        deadline = time.perf_counter() + secs
        return self.run_while(lambda: time.perf_counter() < deadline)


class BusyPython(Trainer):
    """A thread that holds the GIL all the time, as tokenizers and loggers do."""

    def step(self) -> None:
        total = 0
        for number in range(_NUM_ADDITIONS):
            total += number


def measure_slowdown(
    trainer: Trainer,
    compared: Sequence[Callable[[], Method]],
    num_bytes: int,
    num_rounds: int,
    undisturbed_secs: float,
    directory: Path,
    tell: Callable[[str], None],
) -> dict[str, SlowdownResults]:
    """Save a big state in the background of a small training run, each method in turn; the first round is apart."""
    workload = Workload(num_bytes)
    methods = [make() for make in compared]
    found = {method.key: SlowdownResults(method.name) for method in methods}
    trainer.run_for(undisturbed_secs)
    try:
        for index in range(num_rounds + 1):
            tell(f"training while writing, round {index + 1} of {num_rounds + 1}")
            for method in methods:
                before = trainer.run_for(undisturbed_secs)
                _measure_window(method, workload, trainer, before, directory, found[method.key])
    finally:
        for method in methods:
            method.close()
    return found


def _measure_window(
    method: Method, workload: Workload, trainer: Trainer, before: list[float], directory: Path, found: SlowdownResults
) -> None:
    path = directory / f"training-{method.key}.pt"
    started = time.perf_counter()
    method.save(workload, workload.state(), path)
    returned = time.perf_counter()
    settled: list[float] = []

    def finish() -> None:
        method.finish()
        settled.append(time.perf_counter())

    waiter = threading.Thread(target=finish)
    waiter.start()
    during = trainer.run_while(waiter.is_alive)
    waiter.join()
    remove(path)
    usual = statistics.median(before)
    found.blocked.add(returned - started)
    found.writing.add(settled[0] - returned)
    found.ratio.add(statistics.median(during) / usual)
    found.lost.add(max(0.0, sum(during) - usual * len(during)))
