"""Both writers keep the same promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.disk import Disk, controlled, writer_disk
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
        with writer_disk(tmp_path, monkeypatch) as disk:
            yield disk
