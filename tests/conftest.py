"""What every test gets: stacks of all threads on a time-out, and a check that no thread is left behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
from storage.s3_server import server

__all__ = ["server"]  # one S3 server for all


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI a skipped check is a failure; only a missing GPU is an excuse."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and os.environ.get("ASYNCCKPT_FORBID_SKIPS") and "gpu" not in item.keywords:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI forbids: {report.longrepr}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `full` belongs to the full figures only."""
    from reliability import gates

    left_out = [] if gates.FULL else [item for item in items if "full" in item.keywords]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures of the reliability gates that ran."""
    from reliability import gates

    if gates.lines:
        terminalreporter.section("reliability gates")
        for line in gates.lines:
            terminalreporter.write_line(line)


def saver_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("asyncckpt-")]


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    """Savers that a test makes must be closed by it; the drop-in functions' own is closed here."""
    before = set(saver_threads())
    yield
    from asyncckpt.service import default

    if default._saver is not None:
        default._saver.close(60)
        default._saver = None
    deadline = time.monotonic() + 10
    while left := set(saver_threads()) - before:
        next(iter(left)).join(0.1)
        assert time.monotonic() < deadline, f"threads left behind: {[thread.name for thread in left]}"
