"""The demo keeps what it says: killed in the middle of a save, resumed, equal bit for bit."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import EXAMPLES, run

SMALL = ["--layers", "4", "--width", "256", "--heads", "4", "--context", "16"]  # large enough to be caught at saving


def test_demo(tmp_path: Path) -> None:
    """From beginning to end; the last screen says what happened, in the measure of a terminal."""
    output = run("demo.py", *SMALL, "--steps", "60", "--save-every", "3", "--rounds", "1", cwd=tmp_path).stdout
    assert re.search(r"^   It left \.asyncckpt-[0-9a-f]{16}-checkpoint_\S+\.tmp,$", output, re.MULTILINE), output
    screen = output[output.index("asyncckpt: killed while saving") :]
    killed = re.search(
        r"^✗ SIGKILL while the checkpoint of step (\d+) was being written: (\d+) % of 39 MB done$", screen, re.M
    )
    resumed = re.search(r"^✓ resumed after step (\d+), the newest durable one: (\d+) steps", screen, re.MULTILINE)
    equal = re.search(r"^✓ (\d+) losses since, and all of the last checkpoint: .* bit for bit$", screen, re.MULTILINE)
    assert killed is not None, output
    assert resumed is not None, output
    assert equal is not None, output
    assert 30 <= int(killed[1]) <= 60
    assert 0 < int(killed[2]) < 100
    assert int(resumed[1]) <= int(killed[1]) - 3
    assert int(equal[1]) == 60 - int(resumed[1])
    assert "DIFFERENT" not in screen
    assert screen.count("✓ equal") >= 4
    listing = screen[screen.index(" asyncckpt list ") : screen.index(" what saving costs ")]
    for step in ("54", "57", "60"):
        assert step in listing
    assert re.search(r"^asyncckpt overlap +\d", screen, re.MULTILINE)
    lines = screen.splitlines()
    assert len(lines) <= 36
    assert max(map(len, lines)) <= 100
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return runpy.run_path(str(EXAMPLES / "demo.py"))
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (None, None),
        ("loss of the resumed run", r"the resumed run's losses differ at the steps \[6\]"),
        ("loss of the killed run", r"the killed run's losses differ at the steps \[2\]"),
        ("missing step", "resumed steps"),
        ("not resumed", "resumed at None"),
        ("lost acknowledged", "resumed at 4, though step 5 was acknowledged"),
        ("temporary file", "was not cleaned up"),
    ],
)
def test_differences_are_found(change: str | None, expected: str | None, demo: dict[str, Any], tmp_path: Path) -> None:
    """Whatever goes wrong is told; nothing is when all is well."""
    losses = {step: f"{10 - step:#.9g}" for step in range(1, 11)}
    uninterrupted = demo["Run"](losses)
    killed = demo["Run"]({step: losses[step] for step in range(1, 7)}, [4])
    resumed = demo["Run"]({step: losses[step] for step in range(5, 11)}, [8], 4)
    wreck = demo["Wreck"](tmp_path / "temporary", 6, 100, 0.5, "truncated")
    if change == "loss of the resumed run":
        resumed.losses[6] = "4.00000001"
    elif change == "loss of the killed run":
        killed.losses[2] = "8.00000001"
    elif change == "missing step":
        del resumed.losses[7]
    elif change == "not resumed":
        resumed.resumed_at = None
    elif change == "lost acknowledged":
        killed.durable_steps.append(5)
    elif change == "temporary file":
        wreck.path.touch()
    found = demo["differences"](uninterrupted, killed, resumed, wreck)
    if expected is None:
        assert found == []
    else:
        assert re.search(expected, "\n".join(found))


@pytest.mark.parametrize("change", [None, "model_state_dict", "rng_states", "val_loss"])
def test_different_parts_are_found(change: str | None, demo: dict[str, Any], tmp_path: Path) -> None:
    """One bit of one tensor is enough; the time of day and the generators that nobody seeds don't count."""
    for name in ("one", "other"):
        state: dict[str, Any] = {
            "model_state_dict": {"weight": torch.ones(3)},
            "rng_states": {"torch": torch.zeros(4), "python": name},
            "val_loss": 0.5,
            "timestamp": name,
        }
        if name == "other" and change == "model_state_dict":
            state["model_state_dict"]["weight"][2] += torch.finfo(torch.float32).eps
        elif name == "other" and change == "rng_states":
            state["rng_states"]["torch"][0] = 1
        elif name == "other" and change == "val_loss":
            state["val_loss"] = 0.25
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "checkpoint_epoch0000_step00000008_loss0.5000.pt")
    found = demo["different_parts"](tmp_path / "one", tmp_path / "other", 8)
    assert found == ([change] if change else [])


@pytest.mark.parametrize(
    ("size", "written", "is_wreck"), [(8, 4, True), (8, 0, False), (64, 1, False), (8, 8, False), (0, 0, False)]
)
def test_half_written_is_half_written(
    size: int, written: int, is_wreck: bool, demo: dict[str, Any], tmp_path: Path
) -> None:
    """A file of which some pages, but not next to none and not all, are written; a missing one is not."""
    path = tmp_path / ".asyncckpt-0123456789abcdef-checkpoint_epoch0000_step00000024_loss1.0000.pt.tmp"
    assert demo["inspect"](path) is None
    path.write_bytes((bytes(4095) + b"\1") * written + bytes(4096 * (size - written)))
    wreck = demo["inspect"](path)
    if is_wreck:
        assert (wreck.step, wreck.num_bytes, wreck.written) == (24, 4096 * size, written / size)
    else:
        assert wreck is None


@pytest.mark.parametrize(
    ("resumed_at", "killed_at", "last", "expected"),
    [
        (16, 25, 40, [16, 17, None, 24, 25, 26, None, 40]),
        (16, 17, 40, [15, 16, 17, 18, None, 40]),
        (0, 3, 6, [1, 2, 3, 4, None, 6]),
        (4, 6, 6, [3, 4, 5, 6]),
    ],
)
def test_steps_to_show(
    resumed_at: int, killed_at: int, last: int, expected: list[int | None], demo: dict[str, Any]
) -> None:
    """Around the resumption, the kill and the end, however near to each other they are."""
    assert demo["steps_to_show"](resumed_at, killed_at, last) == expected
