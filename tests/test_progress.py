"""The bar: when there is one, and that it leaves a program's output alone."""

from __future__ import annotations

import sys

import pytest
from cli.running import on_a_terminal

_SCRIPT = """
import sys
from asyncckpt.progress import progress_bar
with progress_bar("working", 10, after_secs=float(sys.argv[1])) as advance:
    advance(5)
    print("inside")
advance(5)
print("after")
"""


@pytest.mark.parametrize(
    ("after_secs", "environment", "num_bars"),
    [(0, {}, 1), (600, {}, 0), (0, {"RANK": "0"}, 1), (0, {"RANK": "1"}, 0)],
)
def test_a_bar(after_secs: int, environment: dict[str, str], num_bars: int) -> None:
    """One at most, on the first rank, gone at the end for good; what is printed meanwhile goes where it always goes."""
    stdout, drawn = on_a_terminal([sys.executable, "-c", _SCRIPT, str(after_secs)], environment)
    assert stdout == "inside\nafter\n"
    assert drawn.count(b"\x1b[?25l") == drawn.count(b"\x1b[?25h") == num_bars  # the cursor is hidden meanwhile
    assert (b"working" in drawn) == bool(num_bars)


def test_no_bar_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing at all is printed."""
    from asyncckpt.progress import progress_bar

    with progress_bar("working", 10) as advance:
        advance(10)
    assert capfd.readouterr() == ("", "")
