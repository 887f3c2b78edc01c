"""A training loop that saves after every step, and goes on whatever becomes of the saves."""

from __future__ import annotations

import queue
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import nn

from asyncckpt import CheckpointManager, CheckpointWriteError, SaveHandle
from reliability.test_manager_sigkill import assert_in_order
from reliability.writers import writer_options

NUM_KEPT = 3
TIMEOUT_SECS = 60.0


class Loop:
    """Every step makes all weights the step's number; every checkpoint is better than those before."""

    def __init__(self, path: Path, writer: str = "thread", numel: int = 100_000, **options: Any) -> None:
        self.path = path
        self.step = 0
        self.acknowledged: list[int] = []
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(numel))])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self._heard: queue.Queue[tuple[SaveHandle, BaseException]] = queue.Queue()
        given = {"retries": 0, "lock_timeout_secs": 0.1, **writer_options(writer), **options}
        self.manager = CheckpointManager(
            path, NUM_KEPT, on_failure=lambda handle, error: self._heard.put((handle, error)), **given
        )

    def __enter__(self) -> Loop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.manager.__exit__(kind, error, traceback)

    def save(self) -> SaveHandle:
        for parameter in self.model:
            if parameter.grad is None:
                parameter.grad = torch.full_like(parameter, -1.0)
        self.optimizer.step()
        self.step += 1
        handle = self.manager.save(self.model, self.optimizer, 1, self.step, val_loss=-float(self.step))
        assert handle is not None
        return handle

    def succeed(self) -> None:
        """The next save is durable; the directory is in order, and a reader finds all that was to be kept."""
        self.expect_success(self.save())

    def expect_success(self, handle: SaveHandle) -> None:
        info = handle.result(TIMEOUT_SECS)
        assert info.global_step == self.step
        self.acknowledged.append(self.step)
        self.manager.wait(TIMEOUT_SECS)
        self.check()
        assert_in_order(self.path)
        assert self._heard.empty()

    def fail(self, error_number: int | None, *words: str) -> None:
        """The next save fails: the handle, the barrier and the callback say the same, and say all of it."""
        self.expect_failure(self.save(), error_number, *words)

    def expect_failure(self, handle: SaveHandle, error_number: int | None, *words: str) -> None:
        with pytest.raises(CheckpointWriteError) as raised:
            self.manager.wait(TIMEOUT_SECS)
        failure = handle.exception(TIMEOUT_SECS)
        assert raised.value is failure
        assert self._heard.get(timeout=TIMEOUT_SECS) == (handle, failure)
        assert raised.value.errno == error_number
        for word in (str(self.path), *words):
            assert word in str(failure)

    def check(self) -> None:
        """By another reader's eyes, the newest of what was acknowledged is listed, whole, and loads."""
        reader = CheckpointManager(self.path, NUM_KEPT)
        steps = self.acknowledged[-NUM_KEPT:]
        assert [info.global_step for info in reader.list_checkpoints()] == steps
        assert all(report.ok for report in reader.verify())
        if steps:
            model = nn.ParameterList([nn.Parameter(torch.zeros_like(parameter)) for parameter in self.model])
            _, checkpoint = reader.load_latest(model)
            assert checkpoint["global_step"] == steps[-1]
            assert all(bool((parameter == float(steps[-1])).all()) for parameter in model)
        reader.close()
