"""The whole of asyncckpt in two minutes: kill a training while it saves, resume it, and see that nothing was lost.

    python examples/demo.py

Trains a small GPT (train_gpt.py) without interruption; trains it again, and kills that with SIGKILL while a checkpoint
is half-written; resumes; holds every loss and every tensor against those of the uninterrupted run; and measures what
saving costs (compare_overhead.py). Ends with exit code 1 if anything differs. Options of the model (`--layers 4
--width 256`) go to all of these. Keeps no files.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compare_overhead import Comparison, compare, same
from compare_overhead import parse_options as parse_compare_options
from rich.console import Console, Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

import asyncckpt

EXAMPLES = Path(__file__).parent
MIN_WIDTH, MAX_WIDTH = 100, 110
BARS = "▁▂▃▄▅▆▇█"
MAX_BARS = 54
NUM_ROWS = 8  # of the table of losses
PAGE_BYTES = 4096
LEAST_WRITTEN = 0.05  # of a file that is called half-written


class Options(argparse.Namespace):
    steps: int
    save_every: int
    rounds: int
    directory: Path


# --- running the training ---


@dataclass
class Run:
    """What a training printed. Losses are as printed, nine digits: equal text, equal bits."""

    losses: dict[int, str] = field(default_factory=dict)
    durable_steps: list[int] = field(default_factory=list)
    resumed_at: int | None = None

    @property
    def last_step(self) -> int:
        return max(self.losses, default=0)

    def read(self, line: str) -> bool:
        """Take in one line of output; False if it is none that the script prints: a warning, a traceback."""
        if match := re.match(r"step (\d+)  loss (\S+)$", line):
            self.losses[int(match[1])] = match[2]
        elif match := re.match(r"durable: \S+_step(\d+)_", line):
            self.durable_steps.append(int(match[1]))
        elif match := re.match(r"resumed after step (\d+)$", line):
            self.resumed_at = int(match[1])
        else:
            return line.startswith(("GPT of ", "every checkpoint in "))
        return True


@dataclass(frozen=True)
class Wreck:
    """The temporary file that the killed training left behind; `written` is the share of its pages that hold data."""

    path: Path
    step: int
    num_bytes: int
    written: float
    problem: str

    @property
    def share(self) -> str:
        return f"{math.floor(100 * self.written)} % of {self.num_bytes / 1e6:,.0f} MB"


def train(console: Console, title: str, command: Sequence[str], watcher: Watcher | None = None) -> Run:
    """Run the training script to its end, or to the watcher's."""
    run = Run()
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with console.status(title) as status, subprocess.Popen(command, stdout=pipe, stderr=both, text=True) as process:
        assert process.stdout is not None
        if watcher is not None:
            watcher.start(process)
        try:
            for line in process.stdout:
                if run.read(line.strip()):
                    status.update(f"{title}: {line.strip()}")
                else:
                    console.print(f"   {line.rstrip()}", style="dim", highlight=False, soft_wrap=True)
        except BaseException:
            process.kill()
            raise
    expected = 0 if watcher is None else -signal.SIGKILL
    if process.returncode != expected:
        raise SystemExit(f"{title}: ended with {process.returncode} instead of {expected}, after step {run.last_step}")
    durable = ", ".join(map(str, run.durable_steps))
    console.print(
        f"{title}: {len(run.losses)} steps, up to {run.last_step}; durable checkpoints of the steps {durable}"
    )
    return run


class Watcher:
    """Kills a training while a checkpoint of step `first_step` or later is half-written."""

    def __init__(self, directory: Path, first_step: int) -> None:
        self.directory = directory
        self.first_step = first_step
        self._thread: threading.Thread | None = None

    def start(self, process: subprocess.Popen[str]) -> None:
        self._thread = threading.Thread(target=self._watch, args=(process,))
        self._thread.start()

    def _watch(self, process: subprocess.Popen[str]) -> None:
        while process.poll() is None:
            for path in half_written(self.directory):
                if step_of(path) < self.first_step:
                    continue
                process.send_signal(signal.SIGSTOP)  # so that the file is not finished while we look at it
                caught = False
                try:
                    with contextlib.suppress(ChildProcessError):  # it has ended meanwhile
                        os.waitpid(process.pid, os.WUNTRACED)
                    caught = inspect(path) is not None
                finally:
                    process.send_signal(signal.SIGKILL if caught else signal.SIGCONT)
                if caught:
                    return
                time.sleep(0.005)
            time.sleep(0.001)

    def wreck(self) -> Wreck:
        """What is there now that the training is dead."""
        assert self._thread is not None
        self._thread.join()
        found = [wreck for path in half_written(self.directory) if (wreck := inspect(path)) is not None]
        if len(found) != 1:
            raise SystemExit(f"killed, but not in the middle of a save: {found}")
        return found[0]


def half_written(directory: Path) -> list[Path]:
    return list(directory.glob(".asyncckpt-*-checkpoint_*.tmp"))


def inspect(path: Path) -> Wreck | None:
    """None if the file is gone (renamed), or whole, or next to empty."""
    with contextlib.suppress(FileNotFoundError):
        report = asyncckpt.verify(path)
        written = share_written(path)
        if not report.ok and LEAST_WRITTEN <= written < 1 and path.exists():
            return Wreck(path, step_of(path), report.num_bytes, written, report.problems[0])
    return None


def share_written(path: Path) -> float:
    """How many of a file's pages are not zero, which they are from when it is made until they are written."""
    num_pages = path.stat().st_size // PAGE_BYTES
    if num_pages == 0:
        return 0.0
    pages = torch.from_file(str(path), size=num_pages * PAGE_BYTES // 8, dtype=torch.int64).view(num_pages, -1)
    return float(pages.any(1).double().mean())


def step_of(path: Path) -> int:
    match = re.search(r"_step(\d+)_", path.name)
    return int(match[1]) if match else 0


# --- what must be so ---


def differences(uninterrupted: Run, killed: Run, resumed: Run, wreck: Wreck) -> list[str]:
    """What asyncckpt promises and did not keep; nothing, one hopes."""
    found = []
    acknowledged = max(killed.durable_steps, default=0)
    if resumed.resumed_at is None or resumed.resumed_at < acknowledged:
        found.append(f"resumed at {resumed.resumed_at}, though step {acknowledged} was acknowledged as durable")
    if wreck.path.exists():
        found.append(f"the half-written {wreck.path.name} was not cleaned up")
    expected = range((resumed.resumed_at or 0) + 1, uninterrupted.last_step + 1)
    if list(resumed.losses) != list(expected):
        found.append(f"resumed steps {list(resumed.losses)} instead of {list(expected)}")
    for name, run in (("killed", killed), ("resumed", resumed)):
        wrong = [step for step, loss in run.losses.items() if loss != uninterrupted.losses.get(step)]
        if wrong:
            found.append(f"the {name} run's losses differ at the steps {wrong}")
    return found


def different_parts(uninterrupted: Path, resumed: Path, step: int) -> list[str]:
    """The parts in which two runs' checkpoints of one step differ. Read by torch alone."""
    states: list[dict[str, Any]] = []
    for directory in (uninterrupted, resumed):
        (path,) = directory.glob(f"checkpoint_*_step{step:08}_*.pt")
        state = torch.load(path, weights_only=True, mmap=True)
        del state["timestamp"]
        state["rng_states"] = state["rng_states"]["torch"]  # the others are not seeded, and not used
        states.append(state)
    return [key for key in states[0] | states[1] if not same(states[0].get(key), states[1].get(key))]


# --- the last screen ---


def summary(uninterrupted: Run, killed: Run, resumed: Run, wreck: Wreck, listing: str, comparison: Comparison) -> Group:
    resumed_at = resumed.resumed_at or 0
    repeated = killed.last_step - resumed_at
    return Group(
        Rule("asyncckpt: killed while saving, and nothing lost", style="green"),
        Text.assemble(
            ("✗ ", "red"),
            f"SIGKILL while the checkpoint of step {wreck.step} was being written: {wreck.share} done\n",
            ("✓ ", "green"),
            f"resumed after step {resumed_at}, the newest durable one: {repeated} steps had to be done again\n",
            ("✓ ", "green"),
            f"{len(resumed.losses)} losses since, and all of the last checkpoint: as uninterrupted, bit for bit",
        ),
        curves(uninterrupted, killed, resumed),
        losses_around(uninterrupted, killed, resumed),
        Rule("asyncckpt list", style="dim"),
        Text("\n".join(map(str.rstrip, listing.rstrip().splitlines())), no_wrap=True, overflow="ellipsis"),
        Rule("what saving costs", style="dim"),
        comparison.table(),
        comparison.noise_note(),
    )


def curves(uninterrupted: Run, killed: Run, resumed: Run) -> Table:
    """The losses of the three runs as bars, a column a step."""
    values = [float(loss) for loss in uninterrupted.losses.values()]
    low, high = min(values), max(values)
    stride = -(-len(values) // MAX_BARS)  # one bar for so many steps

    def bar(run: Run, step: int) -> str:
        if step not in run.losses:
            return " "
        height = (float(run.losses[step]) - low) / ((high - low) or 1)
        return BARS[round(height * (len(BARS) - 1))]

    table = Table.grid(padding=(0, 2))
    for name, run, style in (
        ("uninterrupted", uninterrupted, "blue"),
        ("killed", killed, "red"),
        ("resumed", resumed, "green"),
    ):
        bars = "".join(bar(run, step) for step in range(1, uninterrupted.last_step + 1, stride)).rstrip()
        table.add_row(name, Text(bars + " ✗ SIGKILL" * (run is killed), style))
    return table


def losses_around(uninterrupted: Run, killed: Run, resumed: Run) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("step", "uninterrupted", "killed", "resumed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    notes = {resumed.resumed_at: "  ← resumed after this", killed.last_step: "  ← the last before the kill"}
    for step in steps_to_show(resumed.resumed_at or 0, killed.last_step, uninterrupted.last_step):
        if step is None:
            table.add_row(*["…"] * 4, "")
            continue
        losses = [run.losses.get(step, "") for run in (uninterrupted, killed, resumed)]
        equal = len(set(filter(None, losses))) == 1
        mark = Text("✓ equal", "green") if equal else Text("✗ DIFFERENT", "bold red")
        table.add_row(str(step), *losses, mark.append(notes.get(step, ""), "default"))
    return table


def steps_to_show(resumed_at: int, killed_at: int, last: int) -> list[int | None]:
    """The steps around the resumption, the kill and the end; None where some are left out."""
    chosen: set[int] = set()
    nearest: Iterable[int] = (resumed_at, resumed_at + 1, killed_at, killed_at + 1, last, killed_at - 1, resumed_at - 1)
    for step in nearest:
        if 1 <= step <= last and len(chosen) < NUM_ROWS - 2:
            chosen.add(step)
    rows: list[int | None] = []
    for step in sorted(chosen):
        if rows and step - 1 not in chosen:
            rows.append(None)
        rows.append(step)
    return rows


# --- the demo ---


def demo(options: Options, model_arguments: Sequence[str], directory: Path, console: Console) -> int:
    def command(name: str, *more: str) -> list[str]:
        return [
            *(sys.executable, *(f"-W{option}" for option in sys.warnoptions)),
            *(str(EXAMPLES / "train_gpt.py"), "--checkpoint-dir", str(directory / name), "--max-checkpoints", "3"),
            *("--steps", str(options.steps), "--save-every", str(options.save_every), *model_arguments, *more),
        ]

    uninterrupted = train(console, "1. Uninterrupted", command("uninterrupted"))
    watcher = Watcher(directory / "killed", first_step=options.steps // 2)
    killed = train(console, "2. The same again, killed", command("killed"), watcher)
    wreck = watcher.wreck()
    console.print(f"   It left {wreck.path.name},", highlight=False)
    console.print(f"   {wreck.share} written; asyncckpt.verify: {wreck.problem}", highlight=False)
    resumed = train(console, "3. Resumed", command("killed", "--resume", "latest"))

    found = differences(uninterrupted, killed, resumed, wreck)
    parts = different_parts(directory / "uninterrupted", directory / "killed", options.steps)
    if parts:
        found.append(f"the checkpoints of step {options.steps} differ in {', '.join(parts)}")
    if found:
        console.print("[bold red]NOT AS IF UNINTERRUPTED:", *found, sep="\n  ")
        return 1

    listing = subprocess.run(
        [sys.executable, "-m", "asyncckpt", "list", str(directory / "killed")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    console.print("4. What saving costs, all methods in turn")
    compared = ["--rounds", str(options.rounds), "--save-every", str(options.save_every), "--max-secs", "75"]
    comparison = compare(parse_compare_options([*model_arguments, *compared, "--directory", str(directory)]))
    print(comparison.footnotes())
    console.print(summary(uninterrupted, killed, resumed, wreck, listing, comparison))
    return 0


def parse_options() -> tuple[Options, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32, help="up to which step to train")
    parser.add_argument("--save-every", type=int, default=8, metavar="STEPS")
    parser.add_argument("--rounds", type=int, default=3, help="saves with each method in the comparison")
    parser.add_argument("--directory", type=Path, default=Path(), help="where to put the files meanwhile")
    options, model_arguments = parser.parse_known_args(namespace=Options())
    # On the CPU, since equal bits need deterministic kernels: some of a GPU's are not.
    return options, ["--device", "cpu", *model_arguments]


def main() -> None:
    options, model_arguments = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the files are removed then too
    console = Console()
    console.width = min(max(console.width, MIN_WIDTH), MAX_WIDTH)
    with tempfile.TemporaryDirectory(prefix="asyncckpt-demo-", dir=options.directory) as directory:
        sys.exit(demo(options, model_arguments, Path(directory).resolve(), console))


if __name__ == "__main__":
    main()
