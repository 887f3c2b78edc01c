"""Running commands in this process, and reading what they print."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Mapping, Sequence
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


def on_a_terminal(command: Sequence[str], added: Mapping[str, str] | None = None) -> tuple[str, bytes]:
    """Run a command whose stderr is a terminal, `added` to its environment; its stdout, and what was drawn."""
    terminal, its_end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", **(added or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=its_end, env=environment, text=True) as process:
        os.close(its_end)
        drawn = b""
        while True:
            try:
                drawn += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
        assert process.stdout is not None
        stdout = process.stdout.read()
    os.close(terminal)
    assert process.returncode == 0, drawn
    return stdout, drawn


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
