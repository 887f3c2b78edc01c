"""What all commands print with: tables and lines for people, strict JSON for programs.

Names, keys and metadata come from files, so nothing in them may reach the terminal as a control sequence or as markup.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import PurePath
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from asyncckpt.naming import printable

_PIPE_COLUMNS = 10_000  # a pipe has no width: no name may be broken
clean = printable
_BYTE_UNITS = ("kB", "MB", "GB", "TB", "PB")


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints every string as it is; colours and the terminal's width only on a terminal."""
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.file.isatty():  # `is_terminal` also says yes to FORCE_COLOR
        console.width = _PIPE_COLUMNS
    return console


def make_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines between the rows; columns named in `right` hold numbers."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(clean(column), justify="right" if column in right else "left", overflow="fold")
    return table


def print_json(report: object) -> None:
    """The one thing on stdout: the report as strict JSON, NaN and infinities as strings."""
    print(json.dumps(to_plain(report), indent=2, allow_nan=False))


def to_plain(value: object) -> Any:
    """What JSON can hold: dataclasses become objects, paths strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, PurePath):
        return str(value)
    return value


def format_bytes(num_bytes: int) -> str:
    """1234567 → "1.23 MB"."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    amount = float(num_bytes)
    for unit in _BYTE_UNITS:
        amount /= 1000
        if amount < 999.5 or unit == _BYTE_UNITS[-1]:
            return f"{amount:,.3g} {unit}"
    raise AssertionError("unreachable")


def format_number(value: float | None) -> str:
    """A metric: six digits are enough to tell two apart."""
    return "-" if value is None else f"{value:.6g}"


def format_secs(secs: float) -> str:
    """5400 → "1.5 h"."""
    for unit, unit_secs in (("d", 86400), ("h", 3600), ("min", 60)):
        if secs >= unit_secs:
            return f"{secs / unit_secs:.3g} {unit}"
    return f"{secs:.3g} s"


def format_count(num: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{num:,} {noun}" if num == 1 else f"{num:,} {noun}s"


def format_age(timestamp: str, now: datetime) -> str:
    """How long ago an ISO 8601 timestamp was, in its largest unit; "?" for what is none."""
    try:
        # Python 3.10 does not know "Z".
        moment = datetime.fromisoformat(timestamp[:-1] + "+00:00" if timestamp.endswith("Z") else timestamp)
        age = now - (moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc))
    except (ValueError, OverflowError):
        return "?"
    if age < timedelta(minutes=1):
        return "now"
    for unit, length in (("d", timedelta(days=1)), ("h", timedelta(hours=1)), ("min", timedelta(minutes=1))):
        if age >= length:
            return f"{age // length} {unit}"
    raise AssertionError("unreachable")
