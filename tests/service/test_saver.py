"""The saver: what save() promises, backpressure, the barrier, callbacks, closing."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncckpt
from asyncckpt import (
    AsyncCheckpointSaver,
    CheckpointInfo,
    CheckpointWriteError,
    Event,
    QueueFullError,
    SaveHandle,
    SaverClosedError,
    UnsupportedStateError,
    WaitTimeoutError,
)
from asyncckpt.image import streaming
from asyncckpt.image.plan import plan_state
from asyncckpt.service import worker
from asyncckpt.storage import system_calls


@contextmanager
def disk_held() -> Iterator[threading.Event]:
    """A disk that stops answering at fsync, until the event is set."""
    gate = threading.Event()
    fsync = system_calls.fsync

    def held(fd: int) -> None:
        assert gate.wait(60)
        fsync(fd)

    system_calls.fsync = held
    try:
        yield gate
    finally:
        gate.set()
        system_calls.fsync = fsync


@contextmanager
def disk_broken(error: int = 5) -> Iterator[None]:
    """A disk on which every fsync fails."""
    fsync = system_calls.fsync

    def broken(fd: int) -> None:
        raise OSError(error, os.strerror(error))

    system_calls.fsync = broken
    try:
        yield
    finally:
        system_calls.fsync = fsync


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_FIRST_PAUSE_SECS", 0.0)


def state(number: int, num_floats: int = 1000) -> dict[str, Any]:
    return {"number": number, "weights": torch.full((num_floats,), float(number))}


def number_at(path: Path) -> int:
    loaded = torch.load(path, weights_only=True)
    assert torch.all(loaded["weights"] == loaded["number"])
    return int(loaded["number"])


# --- what is saved ---


@pytest.mark.filterwarnings("ignore:.*weights_only=False")
def test_mutating_anything_after_save_changes_nothing(tmp_path: Path) -> None:
    """Tensors, arrays, lists and dicts at any depth, while the disk has not even answered."""
    array, leaf = np.arange(10), torch.arange(10.0)
    items: list[Any] = [1, [2, {"deep": leaf}]]
    live: dict[str, Any] = {"a": {"b": {"c": [leaf, array]}}, "items": items, "view": leaf[2:], "t": (leaf, items)}
    with AsyncCheckpointSaver() as saver, disk_held() as gate:
        handle = saver.save(live, tmp_path / "a.pt")
        leaf.fill_(-1)
        array.fill(-1)
        items[1].append("more")
        items.clear()
        live["a"]["b"].clear()
        live["new"] = 1
        gate.set()
        saved = torch.load(handle.result().filepath, weights_only=False)
    assert torch.equal(saved["a"]["b"]["c"][0], torch.arange(10.0))
    assert np.array_equal(saved["a"]["b"]["c"][1], np.arange(10))
    assert saved["items"][0] == 1
    assert len(saved["items"][1]) == 2
    assert torch.equal(saved["view"], torch.arange(2.0, 10.0))
    assert saved["t"][0].data_ptr() == saved["items"][1][1]["deep"].data_ptr()
    assert "new" not in saved


def test_info_timings_and_events(tmp_path: Path) -> None:
    events: list[Event] = []
    with AsyncCheckpointSaver(on_event=events.append) as saver:
        handle = saver.save(state(1), tmp_path / "a.pt")
        info = handle.result()
    size = (tmp_path / "a.pt").stat().st_size
    assert (info.filepath, info.num_bytes) == (tmp_path / "a.pt", size)
    timings = handle.timings
    assert timings.num_bytes == size
    assert 0 < timings.plan_secs < timings.blocked_secs <= timings.durable_secs
    assert min(timings.stage_secs, timings.checksum_secs, timings.write_secs, timings.commit_secs) > 0
    assert [event.kind for event in events] == ["staged", "submitted", "committed"]
    assert {event.path for event in events} == {str(tmp_path / "a.pt")}


def test_the_file_describes_itself(tmp_path: Path) -> None:
    with AsyncCheckpointSaver() as saver:
        saver.save(state(1), tmp_path / "a.pt", metadata={"epoch": 3})
    metadata = asyncckpt.verify(tmp_path / "a.pt").metadata
    assert metadata is not None
    assert metadata["name"] == "a.pt"
    assert metadata["metadata"] == {"epoch": 3}
    assert metadata["asyncckpt"] == asyncckpt.__version__


def test_relative_paths_mean_the_directory_at_the_time_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with AsyncCheckpointSaver() as saver, disk_held() as gate:
        saver.save(state(1), "a.pt")
        monkeypatch.chdir(tmp_path / "elsewhere")
        gate.set()
    assert number_at(tmp_path / "a.pt") == 1


@pytest.mark.parametrize("num_workers", [1, 4])
def test_the_later_of_two_saves_to_one_path_wins(num_workers: int, tmp_path: Path) -> None:
    """Also when the later one is a thousand times smaller and several workers race."""
    with AsyncCheckpointSaver(num_workers, max_in_flight=8) as saver:
        for number in range(12):
            saver.save(state(number, 10 if number % 2 else 1_000_000), tmp_path / "a.pt")
    assert number_at(tmp_path / "a.pt") == 11


def test_saves_from_many_threads(tmp_path: Path) -> None:
    with AsyncCheckpointSaver(2, max_in_flight=3) as saver, concurrent.futures.ThreadPoolExecutor(8) as threads:
        handles = list(threads.map(lambda number: saver.save(state(number), tmp_path / f"{number}.pt"), range(40)))
        assert {handle.result().filepath.name for handle in concurrent.futures.as_completed(handles)} == {
            f"{number}.pt" for number in range(40)
        }
    assert [number_at(tmp_path / f"{number}.pt") for number in range(40)] == list(range(40))


def test_a_mapped_checkpoint_is_saved_to_its_own_path(tmp_path: Path) -> None:
    with AsyncCheckpointSaver() as saver:
        saver.save(state(1), tmp_path / "a.pt").result()
        for load in (asyncckpt.load, lambda path: torch.load(path, mmap=True, weights_only=True)):
            mapped = load(tmp_path / "a.pt")
            saver.save(mapped, tmp_path / "a.pt").result()
            assert number_at(tmp_path / "a.pt") == 1
            assert torch.all(mapped["weights"] == 1)


def test_signal_handlers_may_save_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """As a SIGTERM handler does; nothing that save() holds may make it wait for itself."""
    num_signals, in_handler = 0, False
    with AsyncCheckpointSaver(max_in_flight=1000) as saver:

        def handle(*args: object) -> None:
            nonlocal num_signals, in_handler
            if in_handler:
                return  # on a busy machine the next signal comes before this save is done, and so on without end
            in_handler = True
            num_signals += 1
            saver.save(state(num_signals), tmp_path / "signal.pt")
            in_handler = False

        before = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.002)
        try:
            for number in range(300):
                saver.save(state(number, 100_000), tmp_path / "loop.pt")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert num_signals > 10
    assert number_at(tmp_path / "loop.pt") == 299
    assert number_at(tmp_path / "signal.pt") == num_signals


def test_an_interrupted_save_leaves_no_copy_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the copiers work is raised once they are done with the memory, and the next save is whole."""
    started, gate = threading.Event(), threading.Event()
    copy = torch._foreach_copy_

    def held(*args: Any) -> None:
        started.set()
        assert gate.wait(60)
        copy(*args)

    def interrupt() -> None:
        started.wait()
        signal.raise_signal(signal.SIGINT)
        threading.Timer(0.2, gate.set).start()

    with AsyncCheckpointSaver(max_in_flight=1, when_full="raise") as saver:
        saver.prepare(state(1, 100_000))
        monkeypatch.setattr(torch, "_foreach_copy_", held)
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            saver.save(state(1, 100_000), tmp_path / "a.pt")
        assert gate.is_set()
        saver.save(state(2, 100_000), tmp_path / "a.pt").result()
    assert number_at(tmp_path / "a.pt") == 2


def test_close_while_another_thread_saves(tmp_path: Path) -> None:
    """That save is refused; its image is given back only when it is no longer being filled."""
    saver = AsyncCheckpointSaver(max_in_flight=1)
    errors: list[BaseException] = []

    def blocked() -> None:
        try:
            saver.save(state(2), tmp_path / "b.pt")
        except SaverClosedError as error:
            errors.append(error)

    with disk_held() as gate:
        saver.save(state(1), tmp_path / "a.pt")
        thread = threading.Thread(target=blocked)
        thread.start()
        thread.join(0.1)
        with pytest.raises(WaitTimeoutError):
            saver.close(0.01)
        gate.set()
        thread.join(60)
    assert len(errors) == 1
    assert os.listdir(tmp_path) == ["a.pt"]


def test_verify_after_save_catches_what_the_disk_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = system_calls.pwrite

    def lossy(fd: int, view: memoryview, offset: int) -> int:
        os.pwrite(fd, bytes(len(view)), offset)
        return len(view)

    with AsyncCheckpointSaver(verify_after_save=True) as saver:
        saver.save(state(1), tmp_path / "a.pt").result()
        monkeypatch.setattr(system_calls, "pwrite", lossy)
        monkeypatch.setattr("asyncckpt.storage.local._O_DIRECT", 0)
        error = saver.save(state(2), tmp_path / "a.pt").exception()
        monkeypatch.setattr(system_calls, "pwrite", pwrite)
    assert isinstance(error, asyncckpt.CorruptCheckpointError)
    assert number_at(tmp_path / "a.pt") == 1
    assert os.listdir(tmp_path) == ["a.pt"]


# --- the handle is a future ---


def test_a_handle_works_wherever_a_future_does(tmp_path: Path) -> None:
    with AsyncCheckpointSaver() as saver:
        handle = saver.save(state(1), tmp_path / "a.pt")
        assert not handle.cancel()
        assert handle.wait_staged(0)
        assert handle.staged
        called = threading.Event()
        handle.add_done_callback(lambda future: called.set())
        assert called.wait(60)

        async def main() -> CheckpointInfo:
            return await asyncio.wrap_future(saver.save(state(2), tmp_path / "b.pt"))

        assert asyncio.run(main()).filepath == tmp_path / "b.pt"


def test_a_time_out_cancels_nothing(tmp_path: Path) -> None:
    with AsyncCheckpointSaver() as saver, disk_held() as gate:
        handle = saver.save(state(1), tmp_path / "a.pt")
        with pytest.raises(concurrent.futures.TimeoutError):
            handle.result(0.01)
        gate.set()
        assert handle.result(60).filepath.exists()


# --- backpressure ---


def test_when_full_raise(tmp_path: Path) -> None:
    with AsyncCheckpointSaver(max_in_flight=2, when_full="raise") as saver, disk_held() as gate:
        saver.save(state(1), tmp_path / "1.pt")
        saver.save(state(2), tmp_path / "2.pt")
        with pytest.raises(QueueFullError, match="2 saves are in flight"):
            saver.save(state(3), tmp_path / "3.pt")
        gate.set()
        saver.wait()
        saver.save(state(4), tmp_path / "4.pt")
    assert sorted(os.listdir(tmp_path)) == ["1.pt", "2.pt", "4.pt"]


def test_when_full_skip(tmp_path: Path) -> None:
    events: list[Event] = []
    with AsyncCheckpointSaver(max_in_flight=1, when_full="skip", on_event=events.append) as saver, disk_held() as gate:
        first = saver.save(state(1), tmp_path / "1.pt")
        second = saver.save(state(2), tmp_path / "2.pt")
        assert second.skipped
        assert second.done()
        assert second.result() is None
        assert second.staged
        gate.set()
        assert not first.skipped
    assert os.listdir(tmp_path) == ["1.pt"]
    assert "skipped" in [event.kind for event in events]


def test_when_full_block(tmp_path: Path) -> None:
    with AsyncCheckpointSaver(max_in_flight=1) as saver, disk_held() as gate:
        saver.save(state(1), tmp_path / "1.pt")
        third = threading.Thread(target=lambda: saver.save(state(2), tmp_path / "2.pt"))
        third.start()
        third.join(0.1)
        assert third.is_alive()
        gate.set()
        third.join(60)
        assert not third.is_alive()
    assert sorted(os.listdir(tmp_path)) == ["1.pt", "2.pt"]


def test_memory_limit_bounds_what_is_in_flight(tmp_path: Path) -> None:
    """Two images would pass the limit, so the second save finds no room although max_in_flight has some."""
    with (
        AsyncCheckpointSaver(max_in_flight=4, memory_limit=6_000_000, when_full="raise") as saver,
        disk_held() as gate,
    ):
        saver.save(state(1, 1_000_000), tmp_path / "1.pt")
        with pytest.raises(QueueFullError, match="memory_limit"):
            saver.save(state(2, 1_000_000), tmp_path / "2.pt")
        saver.save(state(3, 1000), tmp_path / "3.pt")
        gate.set()


def test_a_state_over_the_limit_is_streamed_while_the_caller_waits(tmp_path: Path) -> None:
    with AsyncCheckpointSaver(memory_limit=9 << 20) as saver:
        with pytest.warns(UserWarning, match="over memory_limit"):
            handle = saver.save(state(1, 10_000_000), tmp_path / "a.pt")
        assert handle.done()
    assert number_at(tmp_path / "a.pt") == 1
    assert asyncckpt.verify(tmp_path / "a.pt").ok


def test_a_state_that_changes_while_it_is_streamed_is_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread writes between the reading for checksums and the one for bytes."""
    live = state(1, 10_000_000)
    checksum = streaming.StreamedImage._checksum

    def then_change(image: streaming.StreamedImage) -> None:
        checksum(image)
        live["weights"].add_(1)

    with AsyncCheckpointSaver(memory_limit=9 << 20) as saver:
        saver.save({"number": 0, "weights": torch.zeros(1)}, tmp_path / "a.pt").result()
        monkeypatch.setattr(streaming.StreamedImage, "_checksum", then_change)
        with pytest.warns(UserWarning, match="over memory_limit"):
            handle = saver.save(live, tmp_path / "a.pt")
        assert isinstance(handle.exception(), asyncckpt.TornSnapshotError)
    assert number_at(tmp_path / "a.pt") == 0
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_signal_handler_saves_although_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has interrupted the save that holds the only place, and would wait for it for ever."""
    saver = AsyncCheckpointSaver(max_in_flight=1)

    def interrupted(*args: Any) -> Any:
        monkeypatch.setattr("asyncckpt.service.request.plan_state", plan_state)
        signal.raise_signal(signal.SIGUSR1)
        return plan_state(*args)

    before = signal.signal(signal.SIGUSR1, lambda *args: saver.save(state(1), tmp_path / "signal.pt"))
    try:
        monkeypatch.setattr("asyncckpt.service.request.plan_state", interrupted)
        saver.save(state(2), tmp_path / "loop.pt")
        saver.close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (number_at(tmp_path / "signal.pt"), number_at(tmp_path / "loop.pt")) == (1, 2)


def test_a_log_handler_that_raises_harms_nothing(tmp_path: Path) -> None:
    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("of a log handler")

    handler = Raising()
    logging.getLogger("asyncckpt").addHandler(handler)
    try:
        with AsyncCheckpointSaver() as saver, disk_broken():
            assert isinstance(saver.save(state(1), tmp_path / "a.pt").exception(60), CheckpointWriteError)
    finally:
        logging.getLogger("asyncckpt").removeHandler(handler)


def test_streaming_that_fails_lets_the_caller_go(tmp_path: Path) -> None:
    with AsyncCheckpointSaver(memory_limit=9 << 20) as saver, disk_broken():
        with pytest.warns(UserWarning, match="over memory_limit"):
            handle = saver.save(state(1, 10_000_000), tmp_path / "a.pt")
        assert isinstance(handle.exception(), CheckpointWriteError)
    assert os.listdir(tmp_path) == []


# --- failures are never silent ---


def test_a_failure_reaches_handle_callback_log_and_barrier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failed: list[tuple[SaveHandle, BaseException]] = []
    succeeded: list[CheckpointInfo] = []
    saver = AsyncCheckpointSaver(on_failure=lambda *args: failed.append(args), on_success=succeeded.append)
    with disk_broken():
        handle = saver.save(state(1), tmp_path / "a.pt")
        with pytest.raises(CheckpointWriteError, match=r"a\.pt was not saved: Input/output error") as caught:
            saver.wait()
    assert caught.value.errno == 5
    assert isinstance(caught.value, OSError)
    saver.wait()  # it has been looked at
    saver.close()
    assert failed == [(handle, caught.value)]
    assert succeeded == []
    assert "a.pt was not saved" in caplog.text
    assert os.listdir(tmp_path) == []


def test_the_barrier_reports_all_failures_nobody_looked_at(tmp_path: Path) -> None:
    with AsyncCheckpointSaver(max_consecutive_failures=9, max_in_flight=9) as saver:
        with disk_broken():
            handles = [saver.save(state(number), tmp_path / f"{number}.pt") for number in range(3)]
            assert isinstance(handles[1].exception(), CheckpointWriteError)
            with pytest.raises(CheckpointWriteError, match="2 saves failed") as caught:
                saver.wait()
        assert len(caught.value.failures) == 2


def test_close_raises_and_a_body_error_goes_first(tmp_path: Path) -> None:
    with pytest.raises(CheckpointWriteError), disk_broken(), AsyncCheckpointSaver() as saver:
        saver.save(state(1), tmp_path / "a.pt")
    with pytest.raises(KeyError), disk_broken(), AsyncCheckpointSaver() as saver:
        saver.save(state(1), tmp_path / "a.pt")
        raise KeyError("of the body")


def test_save_itself_raises_after_failures_in_a_row(tmp_path: Path) -> None:
    """And tries again afterwards, so that a disk that came back is used."""
    with AsyncCheckpointSaver(max_consecutive_failures=2) as saver:
        with disk_broken():
            for number in range(2):
                saver.save(state(number), tmp_path / "a.pt").exception()
            with pytest.raises(CheckpointWriteError, match=r"the last 2 saves failed.*not saved"):
                saver.save(state(2), tmp_path / "a.pt")
            assert saver.save(state(3), tmp_path / "a.pt").exception() is not None
            with pytest.raises(CheckpointWriteError, match="the last 2"):
                saver.save(state(4), tmp_path / "a.pt")
        saver.save(state(5), tmp_path / "a.pt").result()
        saver.save(state(6), tmp_path / "a.pt").result()
    assert number_at(tmp_path / "a.pt") == 6


def test_a_passing_error_is_retried(tmp_path: Path) -> None:
    events: list[Event] = []
    fsync, failures = system_calls.fsync, [OSError(5, "once"), OSError(5, "twice")]

    def flaky(fd: int) -> None:
        if failures:
            raise failures.pop()
        fsync(fd)

    with AsyncCheckpointSaver(on_event=events.append) as saver:
        system_calls.fsync = flaky
        try:
            saver.save(state(1), tmp_path / "a.pt").result()
        finally:
            system_calls.fsync = fsync
    assert number_at(tmp_path / "a.pt") == 1
    assert [event.kind for event in events].count("retried") == 2


def test_raising_callbacks_are_logged_and_harm_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("of a callback")

    with AsyncCheckpointSaver(on_success=fail, on_event=fail) as saver:
        handle = saver.save(state(1), tmp_path / "a.pt")
        handle.add_done_callback(fail)
        handle.result()
        saver.save(state(2), tmp_path / "a.pt").result()
    assert "of a callback" in caplog.text


def test_waiting_inside_a_callback_raises_instead_of_deadlocking(tmp_path: Path) -> None:
    errors: list[str] = []

    def misuse(info: CheckpointInfo) -> None:
        for call in (saver.wait, saver.close, lambda: saver.save(state(2), tmp_path / "b.pt")):
            with pytest.raises(RuntimeError, match="inside a callback") as caught:
                call()
            errors.append(str(caught.value))

    with AsyncCheckpointSaver(on_success=misuse) as saver:
        saver.save(state(1), tmp_path / "a.pt")
    assert len(errors) == 3


def test_a_settled_handle_keeps_no_image(tmp_path: Path) -> None:
    """Neither through the job nor through the frames of a traceback."""
    with AsyncCheckpointSaver() as saver:
        good = saver.save(state(1), tmp_path / "a.pt")
        good.result()
        with disk_broken():
            bad = saver.save(state(2), tmp_path / "a.pt")
            error = bad.exception()
        saver._callbacks.thread.drain(60)
        gc.collect()
        from asyncckpt.image.checksum import StagedImage

        assert not [thing for thing in gc.get_objects() if type(thing) is StagedImage]
    assert error is not None


# --- the barrier, closing ---


def test_wait_times_out_and_saves_go_on(tmp_path: Path) -> None:
    with AsyncCheckpointSaver() as saver, disk_held() as gate:
        saver.save(state(1), tmp_path / "a.pt")
        with pytest.raises(WaitTimeoutError, match=r"1 of 1 saves.*a\.pt"):
            saver.wait(0.01)
        gate.set()
        saver.wait(60)
        assert number_at(tmp_path / "a.pt") == 1


def test_close_is_bounded_and_final(tmp_path: Path) -> None:
    saver = AsyncCheckpointSaver()
    with disk_held() as gate:
        handle = saver.save(state(1), tmp_path / "a.pt")
        for _ in range(2):  # closing again waits again: whoever closes may rely on what close() says
            with pytest.raises(WaitTimeoutError):
                saver.close(0.01)
        gate.set()
        saver.close(60)
        assert handle.done()
    saver.close()
    for use in (lambda: saver.save(state(2), tmp_path / "b.pt"), lambda: saver.prepare(state(2))):
        with pytest.raises(SaverClosedError, match="closed"):
            use()
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_dropped_saver_finishes_and_gives_its_threads_back(tmp_path: Path) -> None:
    saver = AsyncCheckpointSaver()
    handle = saver.save(state(1), tmp_path / "a.pt")
    gone = weakref.ref(saver)
    del saver
    handle.result(60)
    handle.add_done_callback(lambda future: None)
    for _ in range(100):
        gc.collect()
        if gone() is None:
            break
        threading.Event().wait(0.01)
    assert gone() is None  # that its threads end, the fixture checks


def test_memory_comes_back_after_close(tmp_path: Path) -> None:
    def resident_shared() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssShmem")) * 1024

    before = resident_shared()
    saver = AsyncCheckpointSaver()
    saver.prepare(state(1, 8_000_000))
    assert resident_shared() - before >= 32_000_000
    for number in range(3):
        saver.save(state(number, 8_000_000), tmp_path / "a.pt").result()
    assert resident_shared() - before <= 1.05 * 2 * 32_000_000
    saver.close()
    assert resident_shared() - before < 1_000_000


def test_dead_temporaries_are_swept_at_the_first_save(tmp_path: Path) -> None:
    dead = tmp_path / ".asyncckpt-0123456789abcdef-a.pt.tmp"
    dead.write_bytes(b"half")
    events: list[Event] = []
    with AsyncCheckpointSaver(on_event=events.append) as saver:
        saver.save(state(1), tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"]
    assert [event.path for event in events if event.kind == "swept"] == [str(dead)]


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_workers": 0}, ValueError),
        ({"num_workers": "2"}, TypeError),
        ({"max_in_flight": 0}, ValueError),
        ({"max_in_flight": True}, TypeError),
        ({"memory_limit": -1}, ValueError),
        ({"memory_limit": 1.5}, TypeError),
        ({"retries": -1}, ValueError),
        ({"max_consecutive_failures": 0}, ValueError),
        ({"nice": -5}, ValueError),
        ({"exit_timeout_secs": -1.0}, ValueError),
        ({"exit_timeout_secs": float("nan")}, ValueError),
        ({"exit_code": 256}, ValueError),
        ({"exit_code": 0}, ValueError),
        ({"exit_code": "x"}, TypeError),
        ({"stall_timeout_secs": 0.0}, ValueError),
        ({"stall_timeout_secs": float("nan")}, ValueError),
        ({"snapshot": "fast"}, ValueError),
        ({"when_full": "drop"}, ValueError),
    ],
)
def test_bad_options_name_themselves(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        AsyncCheckpointSaver(**options)


def test_a_directory_at_the_path(tmp_path: Path) -> None:
    (tmp_path / "a.pt").mkdir()
    with AsyncCheckpointSaver() as saver:
        error = saver.save(state(1), tmp_path / "a.pt").exception()
    assert isinstance(error, CheckpointWriteError)
    assert "there is a directory at this path" in str(error)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_file_on_the_way_to_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with AsyncCheckpointSaver() as saver:
        error = saver.save(state(1), tmp_path / "file" / "a.pt").exception()
    assert "a part of this path is a file" in str(error)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (b"a.pt", TypeError),
        (3, TypeError),
        ("http://server/a.pt", asyncckpt.CheckpointError),
        ("", ValueError),
        ("a/", ValueError),
        ("a\0.pt", ValueError),
    ],
)
def test_bad_paths_are_refused_at_once(path: Any, error: type[Exception]) -> None:
    with AsyncCheckpointSaver() as saver, pytest.raises(error):
        saver.save(state(1), path)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """And leaves the place in flight free."""
    with AsyncCheckpointSaver(max_in_flight=1, when_full="raise") as saver:
        for _ in range(2):
            with pytest.raises(UnsupportedStateError, match=r"state\['config'\]\['hook'\] can't be saved"):
                saver.save({"config": {"hook": lambda: 1}}, tmp_path / "deep" / "a.pt")
        assert os.listdir(tmp_path) == []
        saver.save(state(1), tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:.*weights_only=False")
def test_large_arrays_are_warned_of(tmp_path: Path) -> None:
    with AsyncCheckpointSaver() as saver, pytest.warns(UserWarning, match="NumPy arrays"):
        saver.save({"array": np.zeros(3_000_000)}, tmp_path / "a.pt")


def test_metadata_must_be_plain_data(tmp_path: Path) -> None:
    with AsyncCheckpointSaver() as saver, pytest.raises(UnsupportedStateError, match="metadata must be plain data"):
        saver.save(state(1), tmp_path / "a.pt", metadata={"x": torch.ones(1)})


def test_what_a_safe_load_would_refuse_is_warned_of_with_its_path(tmp_path: Path) -> None:
    config = {"config": {"optimizer_cls": [torch.optim.AdamW]}}
    with AsyncCheckpointSaver() as saver:
        with pytest.warns(
            UserWarning, match=r"state\['config'\]\['optimizer_cls'\]\[0\] refers to torch\.optim\.adamw\.AdamW"
        ):
            saver.save(config, tmp_path / "a.pt").result()
        with pytest.raises(asyncckpt.UnsafeCheckpointError, match="AdamW"):
            asyncckpt.load(tmp_path / "a.pt")
        with torch.serialization.safe_globals([torch.optim.AdamW]):
            saver.save(config, tmp_path / "a.pt").result()  # no warning now
            assert asyncckpt.load(tmp_path / "a.pt") == config


# --- the drop-in functions ---


def test_drop_in_functions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        asyncckpt.wait()
        asyncckpt.prepare(state(1))
        handle = asyncckpt.save(state(1), tmp_path / "a.pt")
        asyncckpt.wait(60)
    assert handle.done()
    assert asyncckpt.load(tmp_path / "a.pt")["number"] == 1
    assert caplog.text == ""
