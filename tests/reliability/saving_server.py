"""A fork server: imports torch once, then forks one saving process per line of JSON on stdin.

Each child says `start PID`, `ack NUMBER PATH` once a save is durable, and `done` when it has made all its saves; the
server says `end` when the child has ended, however that came. All on stdout, one line in one write.

A managed child says `resumed NUMBER` once it has loaded the latest state, and `ack JSON`: the entry that a durable
checkpoint should have in the directory.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import stat
import sys
import threading
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from registry.directory_model import Entry
from storage.seam import Call, Seam
from torch import nn

from asyncckpt import AsyncCheckpointSaver, CheckpointManager, SaveHandle
from asyncckpt.storage import local, system_calls
from reliability.power import cut_power


@dataclass
class Order:
    """Save to `paths` in turn the states `first`, `first + 1`, …; all of `num_saves`, or for ever.

    `kill_at`: die by SIGKILL just before this call through the seam to the file system.
    `managed`: through a manager of the directory `paths[0]`, as it says.
    """

    paths: list[str]
    first: int
    num_saves: int | None = None
    num_workers: int = 1
    kill_at: int | None = None
    num_tensors: int = 8
    numel: int = 40_000
    managed: Managed | None = None
    power: Power | None = None


@dataclass
class Power:
    """The saves go to a file system of their own, mounted at `mount`.

    `cut_at_ack`: once this many saves are acknowledged, and before anything more is done for the last of them, cut the
    power and die. `direct`: past the page cache. Without `syncs_files` a file's fsync is left out, a directory's not.
    """

    mount: str
    cut_at_ack: int | None = None
    direct: bool = True
    syncs_files: bool = True


@dataclass
class Managed:
    """Resume from the latest checkpoint, and save the states as those of the next steps, with `losses` in turn.

    `rollback_every`: before every so many saves, go back to the oldest checkpoint there is.
    """

    losses: list[float | None]
    num_kept: int
    snapshot: Literal["copy", "overlap"] = "copy"
    rollback_every: int | None = None


def make_state(order: Order, number: int) -> dict[str, object]:
    tensors = [torch.full((order.numel + index,), float(number)) for index in range(order.num_tensors)]
    return {"number": number, "tensors": tensors}


def say(line: str) -> None:
    os.write(1, (line + "\n").encode())


def cut_if_due(order: Order, number: int) -> None:
    if order.power is not None and number - order.first + 1 == order.power.cut_at_ack:
        cut_power(order.power.mount)
        os.kill(os.getpid(), signal.SIGKILL)


def prepare_for_power_cut(power: Power) -> None:
    if not power.direct:
        local._O_DIRECT = 0
    if not power.syncs_files:
        fsync = system_calls.fsync
        system_calls.fsync = lambda fd: fsync(fd) if stat.S_ISDIR(os.fstat(fd).st_mode) else None
    settle, num_settled = AsyncCheckpointSaver._settle, itertools.count(1)

    def settle_and_stop(self: AsyncCheckpointSaver, *details: Any) -> None:
        settle(self, *details)
        if next(num_settled) == power.cut_at_ack:
            threading.Event().wait()  # for the end

    AsyncCheckpointSaver._settle = settle_and_stop  # type: ignore[assignment,method-assign]


def save_all(order: Order) -> None:
    def acknowledge(number: int, handle: SaveHandle) -> None:
        say(f"ack {number} {handle.result(60).filepath}")
        cut_if_due(order, number)

    with AsyncCheckpointSaver(num_workers=order.num_workers) as saver:
        pending: deque[tuple[int, SaveHandle]] = deque()
        number = order.first
        while order.num_saves is None or number < order.first + order.num_saves:
            path = order.paths[number % len(order.paths)]
            pending.append((number, saver.save(make_state(order, number), path)))
            if len(pending) > 1:
                acknowledge(*pending.popleft())
            number += 1
        while pending:
            acknowledge(*pending.popleft())


class Training:
    """A model all of whose tensors are filled with the number of its state."""

    def __init__(self, order: Order) -> None:
        sizes = [order.numel + index for index in range(order.num_tensors)]
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.number = self.step = 0

    def advance_to(self, number: int) -> None:
        """By a step of the optimizer, which an overlapped save must hold up."""
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, float(self.number - number))
        self.optimizer.step()
        self.number, self.step = number, self.step + 1

    def go_on_from(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint:
            self.number, self.step = checkpoint["extra_state"]["number"], checkpoint["global_step"]

    def save(self, manager: CheckpointManager, loss: float | None) -> SaveHandle:
        handle = manager.save(
            self.model,
            self.optimizer,
            epoch=self.step // 5,
            global_step=self.step,
            val_loss=loss,
            extra_state={"number": self.number},
        )
        assert handle is not None
        return handle


def roll_back(manager: CheckpointManager, training: Training) -> None:
    manager.wait(60)
    for oldest in manager.list_checkpoints()[:1]:
        training.go_on_from(manager.load(oldest.filepath, training.model, training.optimizer)[1])


def manage(order: Order, managed: Managed) -> None:
    def acknowledge(number: int, handle: SaveHandle) -> None:
        info = handle.result(60)
        assert info.sequence is not None
        say("ack " + json.dumps(asdict(Entry(info.sequence, info.filepath.name, info.val_loss, number))))
        cut_if_due(order, number)

    training = Training(order)
    with CheckpointManager(
        order.paths[0], managed.num_kept, num_workers=order.num_workers, snapshot=managed.snapshot, save_rng=False
    ) as manager:
        training.go_on_from(manager.load_latest(training.model, training.optimizer)[1])
        say(f"resumed {training.number}")
        pending: deque[tuple[int, SaveHandle]] = deque()
        number = order.first
        while order.num_saves is None or number < order.first + order.num_saves:
            if managed.rollback_every and number % managed.rollback_every == 0:
                roll_back(manager, training)
            training.advance_to(number)
            pending.append((number, training.save(manager, managed.losses[number % len(managed.losses)])))
            if len(pending) > 1:
                acknowledge(*pending.popleft())
            number += 1
        while pending:
            acknowledge(*pending.popleft())


def run_child(order: Order) -> None:
    def kill_at_call(call: Call) -> None:
        if call.number == order.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    say(f"start {os.getpid()}")
    if order.power is not None:
        prepare_for_power_cut(order.power)
    with Seam(kill_at_call):
        if order.managed is not None:
            manage(order, order.managed)
        else:
            save_all(order)
    say("done")


def read_order(fields: dict[str, Any]) -> Order:
    managed, power = fields.pop("managed"), fields.pop("power")
    return Order(**fields, managed=managed and Managed(**managed), power=power and Power(**power))


def main() -> None:
    torch.set_num_threads(1)  # this process forks
    logging.disable()  # of the dead whom each child sweeps
    Training(Order([], 0)).advance_to(1)  # a first optimizer imports half of torch
    say("ready")
    for line in sys.stdin:
        order = read_order(json.loads(line))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run_child(order)
                code = 0
            finally:
                os._exit(code)
        os.waitpid(pid, 0)
        say("end")


if __name__ == "__main__":
    main()
