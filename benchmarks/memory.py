"""Peak memory of a save, in a fresh process for each method: `python -m benchmarks.memory KEY NUM_BYTES DIRECTORY`."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.methods import MAKERS, remove
from benchmarks.workload import Workload

_NUM_SAVES = 2  # the second one shows whether memory is reused
_SMALL_STATE_BYTES = 1 << 20


@dataclass(frozen=True)
class MemoryUse:
    """Multiples of the state's size, beyond what the process had before it saved."""

    peak: float
    after_close: float


def measure_memory(num_bytes: int, directory: Path, tell: Callable[[str], None]) -> dict[str, MemoryUse]:
    found: dict[str, MemoryUse] = {}
    for key in MAKERS:
        tell(f"memory of {key}")
        command = [sys.executable, "-m", "benchmarks.memory", key, str(num_bytes), str(directory)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=_ROOT).stdout
        found[key] = MemoryUse(**json.loads(output))
    return found


def _measure_here(key: str, num_bytes: int, directory: Path) -> MemoryUse:
    _save(key, Workload(_SMALL_STATE_BYTES), directory, 1)  # imports, allocator, thread stacks: not the save's
    workload = Workload(num_bytes)
    gc.collect()
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    _save(key, workload, directory, _NUM_SAVES)
    gc.collect()
    peak, after = _status_bytes("VmHWM") - before, _status_bytes("VmRSS") - before
    return MemoryUse(peak / workload.num_bytes, after / workload.num_bytes)


def _save(key: str, workload: Workload, directory: Path, num_saves: int) -> None:
    method = MAKERS[key]()
    path = directory / f"memory-{key}.pt"
    for _ in range(num_saves):
        method.save(workload, workload.state(), path)
        method.finish()
        remove(path)
    method.close()


def _status_bytes(field: str) -> int:
    """Of this process; resident memory counts shared memory and memfds as soon as their pages are mapped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


_ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    print(json.dumps(asdict(_measure_here(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))))
