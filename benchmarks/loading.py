"""Resuming: from a file to the first optimizer step, verified by asyncckpt and plainly by torch.load."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import asyncckpt
from benchmarks.machine import drop_from_page_cache, warm_page_cache
from benchmarks.samples import Samples
from benchmarks.workload import Expected, Workload, map_tensors, new_optimizer


@dataclass
class LoadResults:
    """Seconds until the first step is done, by what the page cache holds ("warm", "cold")."""

    asyncckpt: dict[str, Samples] = field(default_factory=lambda: {"warm": Samples(), "cold": Samples()})
    torch: dict[str, Samples] = field(default_factory=lambda: {"warm": Samples(), "cold": Samples()})
    verify: Samples = field(default_factory=Samples)  # warm: reading and checking every byte, part of asyncckpt's time


def measure_loading(num_bytes: int, num_rounds: int, directory: Path, tell: Callable[[str], None]) -> LoadResults:
    """Alternate both ways over one file, warm and cold. The model is made before, the optimizer anew each time."""
    workload = Workload(num_bytes)
    path = directory / "load.pt"
    with asyncckpt.AsyncCheckpointSaver() as saver:
        saver.save(workload.state(), path)
    expected = Expected(workload.state())
    results = LoadResults()
    for index in range(num_rounds + 1):
        tell(f"loading, round {index + 1} of {num_rounds + 1}")
        for cache, prepare in (("warm", warm_page_cache), ("cold", drop_from_page_cache)):
            ways = [(results.asyncckpt, _load_verified), (results.torch, _load_plainly)]
            for samples, load in ways if index % 2 == 0 else reversed(ways):
                prepare(path)
                samples[cache].add(_resume(load, path, workload, expected))
        warm_page_cache(path)
        started = time.perf_counter()
        asyncckpt.verify(path)
        results.verify.add(time.perf_counter() - started)
    return results


def _resume(load: Callable[[Path, Workload], None], path: Path, workload: Workload, expected: Expected) -> float:
    """Seconds for loading and one step. What was loaded is checked before the step, outside the clock."""
    workload.optimizer = new_optimizer(workload.model)
    with torch.no_grad():
        for parameter in workload.model.parameters():
            parameter.zero_()
    started = time.perf_counter()
    load(path, workload)
    loaded_secs = time.perf_counter() - started
    expected.check(workload.state(), load.__name__)
    started = time.perf_counter()
    workload.optimizer.step()
    return loaded_secs + time.perf_counter() - started


def _load_verified(path: Path, workload: Workload) -> None:
    state = asyncckpt.load(path)
    workload.model.load_state_dict(state["model"])
    # load_state_dict keeps the tensors that it is given: copy them out of the mapping, into memory of their own.
    workload.optimizer.load_state_dict(_copied(state["optimizer"]))


def _load_plainly(path: Path, workload: Workload) -> None:
    state = torch.load(path, weights_only=True)
    workload.model.load_state_dict(state["model"])
    workload.optimizer.load_state_dict(state["optimizer"])


def _copied(state: dict[str, Any]) -> Any:
    return map_tensors(torch.Tensor.clone, state)
