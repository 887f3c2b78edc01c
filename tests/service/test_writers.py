"""Both writers keep the same promises."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncckpt.service import writer_process
from service.disk import Disk, controlled, wait_for, writer_command
from service.writer_conformance import WriterConformance


class TestThreads(WriterConformance):
    """Threads of the trainer."""

    writer = "thread"

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Disk]:
        """Under this process."""
        disk = Disk(tmp_path / "control")
        with controlled(tmp_path / "control"):
            yield disk


class TestProcess(WriterConformance):
    """A writer process, which must end and leave nothing behind."""

    writer = "process"

    @pytest.fixture
    def disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
        """Under every writer process that is started."""
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        monkeypatch.setattr(writer_process, "command", writer_command(tmp_path / "control"))
        before = set(os.listdir("/proc/self/fd"))
        yield Disk(tmp_path / "control")
        wait_for(lambda: not children())
        wait_for(lambda: set(os.listdir("/proc/self/fd")) == before)
        wait_for(lambda: not list((tmp_path / "tmp").glob("asyncckpt-writer-*")))


def children() -> list[int]:
    """The processes that this one has started, zombies too."""
    found: list[int] = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            found += map(int, Path(f"/proc/self/task/{task}/children").read_text().split())
    return found
