"""What planning costs as tensors get many, and what importing asyncckpt and starting its writer process cost."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from asyncckpt import AsyncCheckpointSaver
from asyncckpt.image.plan import plan_state
from asyncckpt.service import messages
from asyncckpt.service.process_queue import ProcessQueue
from asyncckpt.service.writer_process import WriterProcess, why_not
from benchmarks.samples import Samples


@dataclass
class PlanResults:
    """Seconds for a state of `num_tensors` small tensors."""

    num_tensors: int
    plan: Samples = field(default_factory=Samples)
    torch_save: Samples = field(default_factory=Samples)

    @property
    def share(self) -> Samples:
        return self.plan.over(self.torch_save)


@dataclass
class ImportResults:
    """`alone`: nothing imported before. `over_torch`: torch imported before, and every public name is used."""

    alone: Samples = field(default_factory=Samples)
    over_torch: Samples = field(default_factory=Samples)
    torch: Samples = field(default_factory=Samples)
    imports_torch: bool = False


@dataclass
class WriterResults:
    """A writer process: seconds until it is ready, and its own bytes (without the image's) after a small save."""

    ready: Samples = field(default_factory=Samples)
    own_bytes: Samples = field(default_factory=Samples)


def measure_planning(sizes: tuple[int, ...], num_repeats: int, tell: Callable[[str], None]) -> list[PlanResults]:
    """Alternate plan_state and torch.save (into memory) of the same state; the first of each is left out."""
    found = []
    for num_tensors in sizes:
        tell(f"planning {num_tensors:,} tensors")
        state = {f"layers.{index}.weight": torch.full((8,), float(index)) for index in range(num_tensors)}
        results = PlanResults(num_tensors)
        for _ in range(num_repeats + 1):
            results.plan.add(_secs(plan_state, state))
            results.torch_save.add(_secs(torch.save, state, io.BytesIO()))
        found.append(results)
    return found


def _secs(action: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - started


_IMPORTS = """
import json, sys, time
started = time.perf_counter()
import asyncckpt
alone = time.perf_counter() - started
imports_torch = "torch" in sys.modules
started = time.perf_counter()
import torch
torch_secs = time.perf_counter() - started
started = time.perf_counter()
for name in asyncckpt.__all__:
    getattr(asyncckpt, name)
print(json.dumps([alone, alone + time.perf_counter() - started, torch_secs, imports_torch]))
"""


def measure_imports(num_repeats: int, tell: Callable[[str], None]) -> ImportResults:
    """In fresh processes; the first one, which may read from the disk, is left out."""
    results = ImportResults()
    for index in range(num_repeats + 1):
        tell(f"importing, {index + 1} of {num_repeats + 1}")
        output = subprocess.run([sys.executable, "-c", _IMPORTS], check=True, stdout=subprocess.PIPE, text=True).stdout
        alone, over_torch, torch_secs, imports_torch = json.loads(output)
        results.alone.add(alone)
        results.over_torch.add(over_torch)
        results.torch.add(torch_secs)
        results.imports_torch = results.imports_torch or bool(imports_torch)
    return results


def measure_writer(num_repeats: int, scratch: Path, tell: Callable[[str], None]) -> WriterResults | None:
    """Start writer processes; the first one is left out. None where there can't be any."""
    if why_not() is not None:
        return None
    results = WriterResults()
    for index in range(num_repeats + 1):
        tell(f"starting writer processes, {index + 1} of {num_repeats + 1}")
        results.ready.add(_secs_until_ready())
        results.own_bytes.add(_own_bytes_of_writer(scratch))
    return results


def _secs_until_ready() -> float:
    started = time.perf_counter()
    process = WriterProcess()
    setup = messages.Setup(
        num_workers=1,
        nice=10,
        retries=2,
        verify_after_save=False,
        stall_timeout_secs=60,
        storage_options={},
        journals=None,
    )
    process.connection.send(messages.encode(setup))
    received = process.connection.receive()
    assert received is not None
    assert isinstance(messages.decode_from_writer(received[0]), messages.Hello)
    secs = time.perf_counter() - started
    process.connection.send(messages.encode(messages.Farewell()))
    process.hang_up()
    process.wait()
    return secs


def _own_bytes_of_writer(scratch: Path) -> int:
    with AsyncCheckpointSaver(writer="process") as saver:
        saver.save({"weights": torch.ones(1_000_000)}, scratch / "small.pt").result()
        assert isinstance(saver._queue, ProcessQueue)
        status = Path(f"/proc/{saver._queue.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
