"""A saver that takes a writer process on the way does so once, whoever asks for it meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncckpt import AsyncCheckpointSaver
from asyncckpt.service import queues
from asyncckpt.service.process_queue import ProcessQueue
from service.disk import wait_for
from service.test_saver import disk_held


@pytest.fixture
def saver() -> Iterator[AsyncCheckpointSaver]:
    with AsyncCheckpointSaver() as saver:
        yield saver


def num_children() -> int:
    return sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children"))


def test_two_threads_ask_for_the_writer_process(saver: AsyncCheckpointSaver, tmp_path: Path) -> None:
    """Both get the same one, though both found that there was none."""
    before = num_children()
    with disk_held() as gate:
        saver.save({}, tmp_path / "a.pt")
        threads = [threading.Thread(target=saver.use_writer_process) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: saver._is_switching)
        gate.set()
        for thread in threads:
            thread.join(60)
    assert isinstance(saver._queue, ProcessQueue)
    assert num_children() == before + 1
    saver.save({}, tmp_path / "b.pt").result(60)
    saver.close(60)
    assert num_children() == before


def test_a_signal_handler_asks_while_it_is_taken(saver: AsyncCheckpointSaver, tmp_path: Path) -> None:
    """What it saves is written, before or after; what it interrupts is done all the same."""

    def handle(*_: object) -> None:
        gate.set()
        saver.use_writer_process()
        handles.append(saver.save({}, tmp_path / "b.pt"))

    def interrupt() -> None:
        wait_for(lambda: saver._is_switching)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with disk_held() as gate:
            handles = [saver.save({}, tmp_path / "a.pt")]
            interrupting = threading.Thread(target=interrupt)
            interrupting.start()
            assert saver.use_writer_process()
            interrupting.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    handles.append(saver.save({}, tmp_path / "c.pt"))
    assert [Path(handle.result(60).filepath).name for handle in handles] == ["a.pt", "b.pt", "c.pt"]


def test_interrupted_while_the_process_is_started(
    saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C: threads go on writing, and never the one that trains."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(queues, "ProcessQueue", interrupt)
        saver.use_writer_process()
    with disk_held() as gate:
        handle = saver.save({}, tmp_path / "a.pt")
        assert not handle.done()
        gate.set()
        handle.result(60)
    assert saver.use_writer_process()


def test_where_there_can_be_no_process(
    saver: AsyncCheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, and saves in flight are waited for once."""
    monkeypatch.setattr(queues, "why_not", lambda: "there are no processes here")
    with pytest.warns(UserWarning, match="there are no processes here"):
        assert not saver.use_writer_process()
    with disk_held():
        handle = saver.save({}, tmp_path / "a.pt")
        assert not saver.use_writer_process()
        assert not handle.done()


def test_refused_options_leave_no_thread() -> None:
    before = threading.active_count()
    with pytest.raises(TypeError, match="storage_options is a dict"):
        AsyncCheckpointSaver(storage_options=3)  # type: ignore[arg-type]
    assert threading.active_count() == before
