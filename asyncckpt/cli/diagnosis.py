"""`asyncckpt doctor`: what a directory and this machine can do. No torch."""

from __future__ import annotations

from rich.console import Console

from asyncckpt.cli.output import clean, format_count, make_console, make_table
from asyncckpt.doctor.examination import Examination, examine
from asyncckpt.doctor.finding import NOTE, OK, PROBLEM, WARNING
from asyncckpt.storage.base import Storage
from asyncckpt.storage.places import full_path

_SIGNS = {OK: "✓", NOTE: "·", WARNING: "!", PROBLEM: "✗"}
_STYLES = {OK: "", NOTE: "", WARNING: "yellow", PROBLEM: "bold red"}


def gather(storage: Storage, directory: str) -> Examination:
    """Run all checks; blocks for some seconds, and says on a terminal what it is at. Raises as `examine` does."""
    console = make_console(stderr=True)
    if not console.file.isatty():
        return examine(directory, storage=storage)
    with console.status("examining") as status:
        return examine(directory, lambda name: status.update(f"examining: {name}"), storage=storage)


def draw(examination: Examination, console: Console) -> None:
    """A row for each check, and one line that sums up."""
    table = make_table("", "check", "found", "asyncckpt then", "what to change")
    for finding in examination.findings:
        cells = (_SIGNS[finding.status], finding.name, finding.found, finding.choice, finding.advice)
        table.add_row(*map(clean, cells), style=_STYLES[finding.status])
    console.print(table)
    console.print()
    if examination.tested_in != full_path(examination.path):
        console.print(f"examined in {clean(examination.tested_in)}, since {clean(examination.path)} does not exist yet")
    console.print(_sum_up(examination), style="bold")


def _sum_up(examination: Examination) -> str:
    count = {status: sum(finding.status == status for finding in examination.findings) for status in (PROBLEM, WARNING)}
    counted = [format_count(num, status) for status, num in count.items() if num]
    verdict = "Checkpoints are safe here" if examination.ok else "Checkpoints are not safe here"
    return f"{verdict}{': ' if counted else '.'}{', '.join(counted)}{'.' if counted else ''}"
