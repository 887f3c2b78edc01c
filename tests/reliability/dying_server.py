"""A fork server: imports torch once, then forks one trainer per line of JSON on stdin, each with a writer process.

A trainer says `start PID`, `writer PID`, `child PID` for each child that it has forked, and `staged NUMBER` once that
save is in the writer's hands; then it stays until it is killed. The server says `end STATUS` when it has ended.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from service.disk import writer_command
from torch import nn
from torch.utils.data import DataLoader

from asyncckpt import AsyncCheckpointSaver, CheckpointManager, SaveHandle
from asyncckpt.service import writer_process
from reliability.saving_server import say


@dataclass
class Order:
    """Save the states `first`, `first + 1`, …, `num_saves` of them or for ever, into `directory`.

    `warm`: how many are acknowledged before the others are begun. `control`: of the disk that the writer works on.
    `cgroup`: join it, and use up its memory once all is staged.
    """

    directory: str
    first: int = 1
    num_saves: int | None = 1
    is_managed: bool = True
    snapshot: Literal["copy", "overlap"] = "copy"
    warm: int = 0
    children: Literal["none", "loader", "native"] = "none"
    numel: int = 250_000
    control: str | None = None
    cgroup: str | None = None


class Trainer:
    """A model all of whose weights are the number of its state."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(order.numel))])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.number = 0
        if order.is_managed:
            self.manager = CheckpointManager(
                order.directory, 10**6, writer="process", snapshot=order.snapshot, save_rng=False
            )
            self.saver = self.manager._saver
        else:
            self.saver = AsyncCheckpointSaver(writer="process", snapshot=order.snapshot)
        say(f"writer {self.saver._queue.pid}")  # type: ignore[union-attr]

    def advance_to(self, number: int) -> None:
        """By a step of the optimizer, which an overlapped save must hold up."""
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, float(self.number - number))
        self.optimizer.step()
        self.number = number

    def save(self) -> SaveHandle:
        number = self.number
        if self.order.is_managed:
            handle = self.manager.save(self.model, self.optimizer, 0, number)
            assert handle is not None
            return handle
        state = {"global_step": number, "model_state_dict": self.model.state_dict()}
        path = Path(self.order.directory) / f"{number}.pt"
        return self.saver.save(state, path, optimizers=[self.optimizer], modules=[self.model])

    def run(self) -> None:
        order, number = self.order, self.order.first
        while order.num_saves is None or number < order.first + order.num_saves:
            self.advance_to(number)
            handle = self.save()
            if number < order.first + order.warm:
                handle.result(60)
            if order.snapshot == "overlap":
                assert handle.wait_staged(60)
            say(f"staged {number}")
            number += 1


def fork_children(kind: str) -> list[object]:
    """Children that live on, whatever becomes of this process. The result keeps them."""
    if kind == "native":  # without Python's hooks, so that it keeps every descriptor
        libc = ctypes.PyDLL(None)
        pid = libc.fork()
        while pid == 0:
            libc.pause()
        say(f"child {pid}")
    if kind == "loader":
        numbers: Any = list(range(1000))
        loader: DataLoader[int] = DataLoader(numbers, num_workers=2, persistent_workers=True)
        batches = iter(loader)
        next(batches)
        for worker in batches._workers:  # type: ignore[attr-defined]
            say(f"child {worker.pid}")
        return [loader, batches]
    return []


def run_trainer(order: Order) -> None:
    os.setpgid(0, 0)
    if order.cgroup is not None:
        Path(order.cgroup, "cgroup.procs").write_text(str(os.getpid()))
    if order.control is not None:
        writer_process.command = writer_command(Path(order.control))  # type: ignore[assignment]
    say(f"start {os.getpid()}")
    trainer = Trainer(order)
    kept = fork_children(order.children)
    trainer.run()
    if order.cgroup is not None:
        while True:
            kept.append(torch.ones(1_000_000))
    while True:
        signal.pause()


def main() -> None:
    torch.set_num_threads(1)  # this process forks
    logging.disable()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.step()  # a first optimizer imports half of torch
    say("ready")
    for line in sys.stdin:
        order = Order(**json.loads(line))
        pid = os.fork()
        if pid == 0:
            try:
                run_trainer(order)
            finally:
                os._exit(1)
        say(f"end {os.waitpid(pid, 0)[1]}")


if __name__ == "__main__":
    main()
