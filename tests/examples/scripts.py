"""Running the examples as a user does, warnings as errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # models so small are faster so, above all on a busy machine
TINY = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "16", "--device", "cpu"]


def command(script: str, *options: str | Path) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / script), *map(str, options)]


def run(script: str, *options: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it; fails unless it ends with exit code 0."""
    completed = subprocess.run(
        command(script, *options),
        capture_output=True,
        text=True,
        timeout=200,
        cwd=cwd,
        env={**os.environ, **ONE_THREAD},
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed


def losses(output: str) -> dict[int, str]:
    """What train_gpt.py prints, exact."""
    return {int(step): loss for step, loss in re.findall(r"^step (\d+)  loss (\S+)$", output, re.MULTILINE)}


def state(path: Path) -> dict[str, Any]:
    """What a run must reproduce: all but the time, what says how it was run, and generators that nobody seeds."""
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    for key in ("timestamp", "pytorch_version", "config"):
        del loaded[key]
    loaded["rng_states"] = loaded["rng_states"]["torch"]
    return loaded


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Tensors must be equal bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert a == b, where
