"""Loads while the file is damaged, each time in a process of its own: whoever touches a lost page ends by SIGBUS.

A fork server: reads a list of cases as JSON, and writes, for each, what came of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import asyncckpt
import asyncckpt.image.load as load_module
from asyncckpt import CheckpointManager
from asyncckpt.storage.local import LocalReader

OLDER, NEWEST = 1, 2  # steps; the newest is the best too


@dataclass
class Case:
    """`way`: who loads. `moment`: when the file is damaged. `damage`: truncate, flip; at `offset`."""

    directory: str
    way: str
    moment: str
    damage: str
    offset: int
    shape: tuple[int, int]


def make(shape: tuple[int, int], step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of so many layers of this width and its optimizer, all of whose numbers tell the step."""
    num_layers, width = shape
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(num_layers)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float(step))
        if step:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.full_like(parameter, step * 10.0),
                "exp_avg_sq": torch.full_like(parameter, step * 100.0),
            }
    return model, optimizer


def restored_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Which step's numbers are in place, down to the last one; -1 for a mixture."""
    found = {value.item() for tensor in model.parameters() for value in tensor.detach().unique()}
    step = int(found.pop()) if len(found) == 1 else -1
    for parameter in model.parameters():
        for name, factor in (("exp_avg", 10.0), ("exp_avg_sq", 100.0)):
            state = optimizer.state.get(parameter, {})
            expected = torch.full_like(parameter, step * factor) if step else None
            if bool(state) != (expected is not None) or not (expected is None or torch.equal(state[name], expected)):
                return -1
    return step


def newest_path(directory: str) -> str:
    return str(next(Path(directory).glob(f"checkpoint_*step{NEWEST:08d}*.pt")))


def damage(case: Case) -> None:
    """In place, as another program would."""
    fd = os.open(newest_path(case.directory), os.O_RDWR)
    if case.damage == "truncate":
        os.ftruncate(fd, case.offset)
    else:
        (byte,) = os.pread(fd, 1, case.offset)
        os.pwrite(fd, bytes([byte ^ 0x40]), case.offset)
    os.close(fd)


def wrap(owner: Any, name: str, after: Callable[[], object]) -> None:
    wrapped = getattr(owner, name)

    def wrapper(*args: Any, **options: Any) -> Any:
        result = wrapped(*args, **options)
        after()
        return result

    setattr(owner, name, wrapper)


def prepare(case: Case) -> None:
    """Damage the file once, at the case's moment."""
    is_done: list[bool] = []
    is_loaded: list[bool] = []

    def now() -> None:
        if not is_done:
            is_done.append(True)
            damage(case)

    if case.moment == "verified":
        wrap(load_module, "_check", now)
    elif case.moment == "unpickled":
        wrap(torch, "load", now)
    elif case.moment == "loaded":
        wrap(torch, "load", lambda: is_loaded.append(True))
        wrap(LocalReader, "last_change", lambda: now() if is_loaded else None)
    elif case.moment != "returned":
        raise ValueError(case.moment)


def run(case: Case) -> dict[str, Any]:
    """Load, and say what came of it: the step whose numbers are in place, or the error's name."""
    prepare(case)
    model, optimizer = make(case.shape, 0)
    try:
        if case.way in ("load", "read"):
            state = asyncckpt.load(newest_path(case.directory), mmap=case.way == "load")
            if case.moment == "returned":
                damage(case)
            if case.way == "load":
                return {"error": None, "step": None}
            model.load_state_dict(state["model_state_dict"])
            optimizer.load_state_dict(state["optimizer_state_dict"])
        else:
            with CheckpointManager(case.directory) as manager:
                if case.way == "one":
                    manager.load(NEWEST, model, optimizer)
                else:
                    getattr(manager, f"load_{case.way}")(model, optimizer)
            if case.moment == "returned":
                damage(case)
    except asyncckpt.CorruptCheckpointError as error:
        return {"error": str(error), "step": restored_step(model, optimizer)}
    return {"error": None, "step": restored_step(model, optimizer)}


def run_in_child(case: Case) -> dict[str, Any]:
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(sender, json.dumps(run(case)).encode())
        except BaseException as error:
            os.write(sender, json.dumps({"error": f"UNEXPECTED {error!r}", "step": -1}).encode())
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as answer:
        said = answer.read()
    status = os.waitpid(pid, 0)[1]
    outcome: dict[str, Any] = json.loads(said) if said else {"error": "nothing said", "step": -1}
    return {**outcome, "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}


def main() -> None:
    make((1, 2), 1)[1].step()  # torch imports half of itself at the first step; in few threads, as forking needs it
    for line in sys.stdin:
        case = Case(**json.loads(line))
        path = newest_path(case.directory)
        pristine = Path(path).read_bytes()
        outcome = run_in_child(case)
        with open(path, "r+b") as file:  # in place: best_model.pt is the same file
            file.truncate(len(pristine))
            file.write(pristine)
        print(json.dumps({**asdict(case), **outcome}), flush=True)


if __name__ == "__main__":
    main()
