"""What each way of saving costs a training: no saving, torch.save and asyncckpt take turns with one small GPT.

    python examples/compare_overhead.py
    python examples/compare_overhead.py --layers 12 --width 768 --heads 12 --save-every 20

It trains the model of train_gpt.py, saves as that would, and prints a table. It keeps no files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from train_gpt import Options, Training, describe, training_options

import asyncckpt

NUM_WARM_UP_STEPS = 8
MAX_NOISE = 0.25


class CompareOptions(Options):
    rounds: int
    max_secs: float
    directory: Path


# --- the ways of saving ---


class Method:
    """A way of saving. This one does not save."""

    title = "no saving"
    newest: Path | None = None

    def prepare(self, training: Training) -> None:
        """Called once, as soon as the state has its final size."""

    def save(self, training: Training) -> asyncckpt.SaveHandle | None:
        """Returns a handle while the save goes on in the background, None if it is over."""
        return None

    def close(self) -> None:
        """Returns once everything is durable."""


class TorchSave(Method):
    """torch.save as everybody calls it, then the fsync without which a power loss may take the file."""

    title = "torch.save + fsync"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fsync_secs: list[float] = []

    def save(self, training: Training) -> None:
        self.newest = self.directory / f"step{training.step:08}.pt"
        state = asyncckpt.create_checkpoint(
            training.model, training.optimizer, training.scheduler, training.epoch, training.step
        )
        torch.save(state, self.newest)
        started = time.perf_counter()
        with self.newest.open("rb") as file:
            os.fsync(file.fileno())
        self.fsync_secs.append(time.perf_counter() - started)


class ManagerSave(Method):
    """asyncckpt: "copy" copies the state and returns, "overlap" copies it during the next forward and backward."""

    def __init__(self, snapshot: Literal["copy", "overlap"], directory: Path) -> None:
        self.title = f"asyncckpt {snapshot}"
        self.manager = asyncckpt.CheckpointManager(directory, max_checkpoints=1, snapshot=snapshot)

    def prepare(self, training: Training) -> None:
        self.manager.prepare(training.model, training.optimizer)

    def save(self, training: Training) -> asyncckpt.SaveHandle:
        handle = self.manager.save(
            training.model, training.optimizer, training.epoch, training.step, scheduler=training.scheduler
        )
        assert handle is not None  # only with save_best_only
        self.newest = Path(handle.path)
        return handle

    def close(self) -> None:
        self.manager.close()


METHODS: Mapping[str, Callable[[Path], Method]] = {
    "none": lambda directory: Method(),
    "torch": TorchSave,
    "copy": lambda directory: ManagerSave("copy", directory),
    "overlap": lambda directory: ManagerSave("overlap", directory),
}


# --- taking turns ---


@dataclass
class Turn:
    """What one method's steps in one round took, with one save among them."""

    losses: list[float] = field(default_factory=list)
    quiet_steps: list[float] = field(default_factory=list)
    writing_steps: list[float] = field(default_factory=list)  # begun while the save was being written
    wait_secs: float = 0.0
    durable_secs: float = 0.0
    rest_secs: float = 0.0  # how long the write outlasted the last step

    def cost_secs(self) -> float:
        """What the save cost the training: waiting, and steps slower than the turn's others.

        Its own steps are the measure, not another turn, because a shared machine's speed changes by the second.
        """
        slower = sum(self.writing_steps) - len(self.writing_steps) * statistics.median(self.quiet_steps)
        return self.wait_secs + slower + self.rest_secs


@dataclass
class Comparison:
    """The turns of each method, by its title; `fsync_secs` is the part of torch.save's wait that many leave out."""

    turns: dict[str, list[Turn]]
    num_steps: int
    fsync_secs: float
    first_loss: float

    def table(self) -> Table:
        """Medians over the rounds; 80 columns wide."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
        table.add_column("", no_wrap=True)
        for heading in (
            "step",
            "training\nwaits",
            "steps\nslower",
            "durable\nafter",
            "a save\ncosts",
            f"overhead\nevery {self.num_steps} steps",
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        for index, (title, turns) in enumerate(self.turns.items()):
            table.add_row(title, *_cells(turns, saves=index > 0))
        return table

    def footnotes(self) -> str:
        num_rounds = len(next(iter(self.turns.values())))
        last_losses = [loss for turns in self.turns.values() for loss in turns[-1].losses]
        return (
            f"Medians over {num_rounds} rounds: the methods train one model in turns of {self.num_steps} steps.\n"
            "Training waits in the call that saves; with overlap also in optimizer.step, until the copy is done.\n"
            "Steps are slower than their neighbours while the checkpoint is written; a save costs that and the wait.\n"
            f"The fsync is {_duration(self.fsync_secs)} of torch.save's wait; without it a power loss may take the "
            f"file.\n{self.noise_note()}\n"
            f"Loss: {self.first_loss:.2f} at the first step, {statistics.mean(last_losses):.2f} in the last round."
        )

    def noise_note(self) -> str:
        """How far the figures can be trusted."""
        quiet_steps = [secs for turns in self.turns.values() for turn in turns for secs in turn.quiet_steps]
        median = statistics.median(quiet_steps)
        noise = statistics.quantiles([abs(secs / median - 1) for secs in quiet_steps], n=10)[-1]
        busy = ": the machine is busy, so run this again when it is not" if noise >= MAX_NOISE else ""
        return f"Nine in ten steps without a save under way are within {noise:.0%} of their median{busy}."


def compare(options: CompareOptions) -> Comparison:
    """Train one model while the methods take turns; read their last files back, and insist that they are whole."""
    num_steps = NUM_WARM_UP_STEPS + options.rounds * len(METHODS) * options.save_every
    training = Training(options, num_steps)
    print(describe(training))
    folder = tempfile.TemporaryDirectory(prefix="compare-overhead-", dir=options.directory)
    with folder as directory, contextlib.ExitStack() as stack:
        methods: dict[str, Method] = {}
        for name, make in METHODS.items():
            own_directory = Path(directory) / name
            own_directory.mkdir()
            methods[name] = stack.enter_context(contextlib.closing(make(own_directory)))
        first_loss = training.advance()
        for _ in range(NUM_WARM_UP_STEPS - 1):
            training.advance()
        for method in methods.values():
            method.prepare(training)
        turns = take_turns(training, methods, options)
        for method in methods.values():
            if method.newest is not None:
                reopen(method.title, method.newest)
        torch_save = methods["torch"]
        assert isinstance(torch_save, TorchSave)
        fsync_secs = statistics.median(torch_save.fsync_secs)
    return Comparison(turns, options.save_every, fsync_secs, first_loss)


def take_turns(training: Training, methods: Mapping[str, Method], options: CompareOptions) -> dict[str, list[Turn]]:
    """The turns of each method. Stops early on a slow machine.

    The methods share one model and take turns, each round in another order, so that whatever else the machine is
    doing meets all of them.
    """
    turns: dict[str, list[Turn]] = {method.title: [] for method in methods.values()}
    started = time.perf_counter()
    for round_index in range(options.rounds):
        first = round_index % len(methods)
        for name in [*methods][first:] + [*methods][:first]:
            method = methods[name]
            previous = method.newest
            turns[method.title].append(take_turn(training, method, options.save_every))
            if previous is not None:
                previous.unlink(missing_ok=True)  # a manager has done so itself
        loss = statistics.mean(loss for taken in turns.values() for loss in taken[-1].losses)
        print(f"round {round_index + 1} of {options.rounds}  step {training.step}  loss {loss:.3f}", flush=True)
        secs_per_round = (time.perf_counter() - started) / (round_index + 1)
        if (round_index + 2) * secs_per_round > options.max_secs:  # the next would be over it
            break
    return turns


def take_turn(training: Training, method: Method, num_steps: int) -> Turn:
    turn = Turn()
    handle: asyncckpt.SaveHandle | None = None
    for index in range(num_steps):
        writing = handle is not None and not handle.done()
        started = time.perf_counter()
        turn.losses.append(training.advance())
        (turn.writing_steps if writing else turn.quiet_steps).append(time.perf_counter() - started)
        if index == num_steps // 4:  # early, so that the steps that the write may slow down are seen
            started = time.perf_counter()
            handle = method.save(training)
            turn.wait_secs = turn.durable_secs = time.perf_counter() - started
    if handle is not None:
        started = time.perf_counter()
        handle.result()
        turn.rest_secs = time.perf_counter() - started
        turn.durable_secs = handle.timings.durable_secs
        turn.wait_secs += handle.timings.fence_secs
        if turn.writing_steps:
            turn.writing_steps[0] -= handle.timings.fence_secs  # counted as waiting
    return turn


def _cells(turns: Sequence[Turn], saves: bool) -> list[str]:
    quiet_secs = statistics.median(secs for turn in turns for secs in turn.quiet_steps)
    if not saves:
        return [_duration(quiet_secs)]
    slower = [secs / statistics.median(turn.quiet_steps) - 1 for turn in turns for secs in turn.writing_steps]
    cost_secs = statistics.median(turn.cost_secs() for turn in turns)
    num_steps = len(turns[0].losses)
    return [
        _duration(quiet_secs),
        _duration(statistics.median(turn.wait_secs for turn in turns)),
        f"{statistics.median(slower):+.0%}" if slower else "",
        _duration(statistics.median(turn.durable_secs for turn in turns)),
        _duration(cost_secs),
        f"{cost_secs / (num_steps * quiet_secs):+.1%}",
    ]


def _duration(secs: float) -> str:
    return f"{secs:.2f} s" if abs(secs) >= 1 else f"{secs * 1000:.0f} ms"


# --- reading back ---


def reopen(title: str, path: Path) -> None:
    """Read a checkpoint back in both ways, and insist that they agree."""
    ours = asyncckpt.load(path)  # checks every byte
    plain = torch.load(path, weights_only=True, mmap=True)
    if not same(ours, plain):
        raise SystemExit(f"{path}: asyncckpt.load and torch.load disagree")
    print(f"{title}, step {ours['global_step']}: asyncckpt.load (verified) and torch.load agree in every tensor")


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def parse_options(arguments: Sequence[str] | None = None) -> CompareOptions:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[training_options()]
    )
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--rounds", type=int, default=8, help="saves with each method")
    parser.add_argument("--max-secs", type=float, default=160.0, help="begin no round that would end later")
    parser.add_argument("--directory", type=Path, default=Path(), help="where to save to")
    return parser.parse_args(arguments, namespace=CompareOptions())


def main() -> None:
    comparison = compare(parse_options())
    console = Console()
    console.width = max(80, console.width)  # a pipe may be narrower, and the table is not
    console.print(comparison.table())
    print(comparison.footnotes())


if __name__ == "__main__":
    main()
