"""Running commands in this process, and reading what they print."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from typer.testing import CliRunner

from asyncckpt.cli.app import app


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


def run(*arguments: object, code: int = 0) -> Outcome:
    """Run a command that must exit with `code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="asyncckpt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return Outcome(result.exit_code, result.stdout, result.stderr)


def run_json(*arguments: object, code: int = 0) -> Any:
    """Run it with --json; stdout must be strict JSON."""
    return json.loads(run(*arguments, "--json", code=code).stdout, parse_constant=_refuse)


def error_of(*arguments: object) -> str:
    """The one line that a command which fails with 3 prints."""
    outcome = run(*arguments, code=3)
    assert outcome.stdout == ""
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr
    return lines[0]


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
