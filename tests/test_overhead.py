"""What saving costs, from the times of steps alone."""

from __future__ import annotations

import pytest

from asyncckpt.overhead import OverheadMeter


def run(meter: OverheadMeter, steps: list[tuple[float, str]], start: float = 100.0) -> float:
    """Steps of so many seconds; "w": a write is under way when it ends, "s": a save was made in it."""
    now = start
    meter.note_step(now, is_writing=False)
    for secs, marks in steps:
        if "s" in marks:
            meter.note_save()
        now += secs
        meter.note_step(now, is_writing="w" in marks)
    return meter.slower_secs()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], 0.0),
        ([(1.0, "")] * 5, 0.0),
        # Ten quiet steps, one with the save in it, four while it is written: three of those began during the write
        # and ended before it was over, one after.
        ([(1.0, "")] * 10 + [(7.0, "sw")] + [(1.5, "w")] * 3 + [(1.5, "")] + [(1.0, "")] * 3, 4 * 0.5),
        ([(1.0, "")] * 10 + [(7.0, "sw")] + [(0.8, "w")] * 3 + [(0.8, "")], 0.0),  # faster is no gain of saving
        ([(7.0, "sw"), (1.5, "w"), (1.5, "")], 0.0),  # nothing to compare with yet
        ([(1.0, "")] * 10 + [(7.0, "s")] + [(1.0, "")] * 3, 0.0),  # durable before the next step
        # A pause in one step, for a validation say, is not what the write costs.
        ([(1.0, "")] * 10 + [(7.0, "sw")] + [(1.5, "w"), (60.0, "w"), (1.5, "w"), (1.5, "")], 4 * 0.5),
    ],
)
def test_slower_steps(steps: list[tuple[float, str]], expected: float) -> None:
    assert run(OverheadMeter(), steps) == pytest.approx(expected)


def test_the_median_of_several_saves() -> None:
    meter = OverheadMeter()
    for slow in (1.5, 1.1, 3.0):
        run(meter, [(1.0, "")] * 10 + [(7.0, "sw")] + [(slow, "w"), (slow, "")])
    assert meter.slower_secs() == pytest.approx(2 * 0.5)
