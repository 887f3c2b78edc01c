"""Real ranks for tests: processes with a gloo group among them, which run the checks that a test names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

_TESTS = Path(__file__).parents[1]
_MAX_SECS = 90  # then every rank prints its stacks and ends


class RankGroup:
    """So many processes, started at once and used by many tests; as a context manager it ends them."""

    def __init__(self, size: int, directory: Path) -> None:
        self.size = size
        self._logs = [directory / f"rank{rank}.log" for rank in range(size)]
        self._processes = [self._start(rank, directory) for rank in range(size)]

    def _start(self, rank: int, directory: Path) -> subprocess.Popen[str]:
        python_path = os.pathsep.join([str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")])
        with open(self._logs[rank], "w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "distributed.worker", str(rank), str(self.size), str(directory / "store")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": python_path, "GLOO_SOCKET_IFNAME": "lo"},
            )

    def run(self, check: Callable[..., Any], *args: Any, survivors: Sequence[int] | None = None) -> list[Any]:
        """What `check(*args)` (one of the module `checks`) returned on each rank.

        A barrier after it shows that all ranks did the same collectives. `survivors` are the ranks that live to answer;
        with them there is no barrier. Fails the test, with all logs, when a rank raised, hung or died.
        """
        order = {
            "check": check.__name__,
            "args": [str(arg) if isinstance(arg, Path) else arg for arg in args],
            "max_secs": _MAX_SECS,
            "barrier": survivors is None,
        }
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        answers = [self._answer(rank) for rank in (survivors if survivors is not None else range(self.size))]
        if any("result" not in answer for answer in answers):
            pytest.fail(f"{check.__name__}: {self._story(answers)}", pytrace=False)
        return [answer["result"] for answer in answers]

    def _answer(self, rank: int) -> dict[str, Any]:
        stdout = self._processes[rank].stdout
        assert stdout is not None
        line = stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"raised": "ended without an answer"}
        return answer

    def _story(self, answers: list[dict[str, Any]]) -> str:
        parts = [f"rank {rank} raised\n{answer['raised']}" for rank, answer in enumerate(answers) if "raised" in answer]
        parts += [f"rank {rank}'s log\n{log.read_text()[-6000:]}" for rank, log in enumerate(self._logs)]
        return "\n\n".join(parts)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
