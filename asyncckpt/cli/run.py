"""`asyncckpt run`: its arguments. Without typer and rich, which PID 1 of a container would hold in memory all along."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from asyncckpt import init

ERROR = 3

_DESCRIPTION = """Run a command, and end only when the writer processes that it leaves behind have written their
checkpoints: the first process of a container, say, which ends with it. Hands signals on, reaps orphans, and exits as
the command did."""


def main(arguments: Sequence[str]) -> int:
    """Run what comes after the first `--`; the exit code. Blocks until it is over."""
    parser = argparse.ArgumentParser(
        "asyncckpt run", usage="asyncckpt run [--grace SECS] -- COMMAND [ARGUMENT ...]", description=_DESCRIPTION
    )
    parser.add_argument(
        "--grace", type=_secs, default=600.0, metavar="SECS", help="how long to wait for writers at most (600)"
    )
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, others = parser.parse_known_args(arguments[:end])
    command = arguments[end + 1 :]
    if others or not command:
        parser.error("the command comes after --")
    try:
        return init.run(command, options.grace)
    except OSError as error:
        print(f"asyncckpt: {error.strerror or error}", file=sys.stderr)
        return ERROR


def _secs(text: str) -> float:
    try:
        secs = float(text)
    except ValueError:
        secs = math.nan
    if not secs >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return secs
