"""A fork server: imports torch once, then forks one saving process per line of JSON on stdin.

Each child says `start PID`, `ack NUMBER PATH` once a save is durable, and `done` when it has made all its saves; the
server says `end` when the child has ended, however that came. All on stdout, one line in one write.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections import deque
from dataclasses import dataclass

import torch
from storage.seam import Call, Seam

from asyncckpt import AsyncCheckpointSaver, SaveHandle


@dataclass
class Order:
    """Save to `paths` in turn the states `first`, `first + 1`, …; all of `num_saves`, or for ever.

    `kill_at`: die by SIGKILL just before this call through the seam to the file system.
    """

    paths: list[str]
    first: int
    num_saves: int | None = None
    num_workers: int = 1
    kill_at: int | None = None
    num_tensors: int = 8
    numel: int = 40_000


def make_state(order: Order, number: int) -> dict[str, object]:
    tensors = [torch.full((order.numel + index,), float(number)) for index in range(order.num_tensors)]
    return {"number": number, "tensors": tensors}


def say(line: str) -> None:
    os.write(1, (line + "\n").encode())


def save_all(order: Order) -> None:
    def acknowledge(number: int, handle: SaveHandle) -> None:
        say(f"ack {number} {handle.result(60).filepath}")

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


def run_child(order: Order) -> None:
    def kill_at_call(call: Call) -> None:
        if call.number == order.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    say(f"start {os.getpid()}")
    with Seam(kill_at_call):
        save_all(order)
    say("done")


def main() -> None:
    torch.set_num_threads(1)  # this process forks
    logging.disable()  # of the dead whom each child sweeps
    say("ready")
    for line in sys.stdin:
        order = Order(**json.loads(line))
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
