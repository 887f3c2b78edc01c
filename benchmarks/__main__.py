"""`python -m benchmarks`: measure, verify, write RESULTS.md and results.png. Exit code 1 when verification fails."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from asyncckpt import CorruptCheckpointError
from benchmarks.loading import measure_loading
from benchmarks.machine import describe
from benchmarks.memory import measure_memory
from benchmarks.plot import plot
from benchmarks.remote import measure_remote
from benchmarks.remote_report import judge_remote, remote_markdown
from benchmarks.report import PLOT_NAME, markdown
from benchmarks.saving import measure_saving
from benchmarks.startup import measure_imports, measure_planning, measure_writer
from benchmarks.targets import Results, Row, judge
from benchmarks.training import COMPARED, COMPARED_WITH_BUSY_PYTHON, BusyPython, Trainer, measure_slowdown
from benchmarks.workload import WrongBytesError

_STYLES = {True: "green", False: "red", None: "dim"}
_WORDS = {True: "met", False: "not met", None: "does not apply"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console()
    started = time.perf_counter()
    if options.part == "remote":
        _measure_remote(options, console)
        return 0
    try:
        # In the given directory's file system, never in the system's temporary one, which may be memory.
        scratch = tempfile.TemporaryDirectory(prefix="asyncckpt-benchmark-", dir=options.directory)
        with scratch as name, console.status("measuring") as status:
            results = measure(options, Path(name).resolve(), status.update)
    except (WrongBytesError, CorruptCheckpointError) as error:
        console.print(f"[red]Verification failed:[/] {error}", soft_wrap=True)
        return 1
    rows = judge(results)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "RESULTS.md").write_text(markdown(results, rows, _command(options)), encoding="utf-8")
    plot(results.saving, options.output / PLOT_NAME)
    console.print(_table(rows))
    console.print(f"{time.perf_counter() - started:.0f} s; all that was written read back right.")
    return 0


def _measure_remote(options: argparse.Namespace, console: Console) -> None:
    scratch = tempfile.TemporaryDirectory(prefix="asyncckpt-benchmark-", dir=options.directory)
    with scratch as name, console.status("measuring") as status:
        results = measure_remote(int(options.gigabytes * 1e9), options.rounds, Path(name).resolve(), status.update)
    rows = judge_remote(results)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "REMOTE.md").write_text(remote_markdown(results, rows, _command(options)), encoding="utf-8")
    console.print(_table(rows, "REMOTE.md"))


def measure(options: argparse.Namespace, scratch: Path, tell: Callable[[str], None]) -> Results:
    """Everything, one part after the other. What runs in child processes comes first, while this one is still small."""
    quick = options.quick
    num_bytes = int(options.gigabytes * 1e9)
    num_repeats = 1 if quick else 3
    undisturbed_secs = 0.1 if quick else 2.0
    return Results(
        machine=describe(scratch),
        imports=measure_imports(1 if quick else 5, tell),
        planning=measure_planning((100, 1000) if quick else (100, 10_000, 100_000), num_repeats, tell),
        writer=measure_writer(1 if quick else 5, scratch, tell),
        memory=measure_memory(num_bytes, scratch, tell),
        saving=measure_saving(num_bytes, options.rounds, scratch, tell),
        slowdown=measure_slowdown(Trainer(), COMPARED, num_bytes, num_repeats, undisturbed_secs, scratch, tell),
        busy_python=measure_slowdown(
            BusyPython(), COMPARED_WITH_BUSY_PYTHON, num_bytes, num_repeats, undisturbed_secs, scratch, tell
        ),
        loading=measure_loading(num_bytes, num_repeats, scratch, tell),
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure asyncckpt beside its peers.")
    parser.add_argument(
        "--part", choices=("local", "remote"), default="local", help="disk, or uploads to S3, for REMOTE.md"
    )
    parser.add_argument("--gigabytes", type=float, help="size of the state (default: 1, for uploads 0.25)")
    parser.add_argument("--rounds", type=int, help="warm rounds, after the cold one (default: 5)")
    parser.add_argument("--directory", type=Path, default=Path(), help="where to write checkpoints (default: here)")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="where RESULTS.md goes (default: benchmarks/)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny state and one round: does everything work?")
    options = parser.parse_args(arguments)
    if options.gigabytes is None:
        options.gigabytes = 0.02 if options.quick else 0.25 if options.part == "remote" else 1.0
    if options.rounds is None:
        options.rounds = 1 if options.quick else 5
    if options.gigabytes <= 0 or options.rounds < 1:
        parser.error("--gigabytes must be above 0, and --rounds at least 1")
    return options


def _command(options: argparse.Namespace) -> str:
    quick = " --quick" if options.quick else ""
    part = "" if options.part == "local" else f" --part {options.part}"
    return f"python -m benchmarks{part}{quick} --gigabytes {options.gigabytes:g} --rounds {options.rounds}"


def _table(rows: Sequence[Row], page: str = "RESULTS.md") -> Table:
    table = Table(title="asyncckpt against its targets", caption=f"What limits the others is said in {page}.")
    for column in ("what", "target", "measured", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(row.what, row.target, row.measured, f"[{_STYLES[row.met]}]{_WORDS[row.met]}[/]")
    return table


if __name__ == "__main__":
    sys.exit(main())
