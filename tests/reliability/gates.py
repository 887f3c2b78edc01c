"""What the gates share: how often each tries, the seed, and the lines of figures.

`make test` runs every gate with a small count, `make reliability` (ASYNCCKPT_FULL=1) with the full one;
`ASYNCCKPT_SEED` repeats a run. A gate that cannot run on this machine skips through `not_checked`, which CI counts as
a failure.
"""

from __future__ import annotations

import os
import random
from typing import NoReturn

import pytest

FULL = os.environ.get("ASYNCCKPT_FULL") == "1"
SEED = int(os.environ.get("ASYNCCKPT_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)

lines: list[str] = []


def count(default: int, full: int) -> int:
    """How often to try: `full` is what the gate promises."""
    return full if FULL else default


def report(gate: str, figures: str) -> None:
    """One line of figures, shown at the end of the run whatever its verbosity. `gate` is its name, "4 SIGKILL" say."""
    line = f"gate {gate}: {figures} (seed {SEED}{', full figure' if FULL else ''})"
    lines.append(line)
    print(line)


def not_checked(reason: str) -> NoReturn:
    """Skip, loudly."""
    pytest.skip(f"NOT CHECKED: {reason}")
