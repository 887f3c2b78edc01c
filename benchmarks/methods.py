"""The ways of saving that are compared: one small class each, all used in the same way."""

from __future__ import annotations

import os
import queue
import shutil
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch

import asyncckpt
from benchmarks.workload import State, Workload, map_tensors


class Method(ABC):
    """A way of saving. `save` is what the training thread waits for; `finish` returns once all is durable.

    One save at a time: `finish` follows each `save`. `about` says what is measured, and what was added to make it
    comparable.
    """

    key: str
    name: str
    about: str
    in_background = True
    overlaps = False  # whether `save` leaves work that the next optimizer step waits for

    @abstractmethod
    def save(self, workload: Workload, state: State, path: Path) -> None: ...

    @abstractmethod
    def finish(self) -> None: ...

    def load(self, path: Path, like: State) -> Any:
        """What was written; `like` is overwritten by those that load in place, the others map the file."""
        return torch.load(path, weights_only=True, mmap=True)

    def timings(self) -> asyncckpt.Timings | None:
        """Where the time of the last save went, for methods that say so."""
        return None

    def close(self) -> None:  # noqa: B027  # most have nothing to give back
        pass


class TorchSave(Method):
    key = "torch"
    name = "torch.save + fsync"
    about = "torch.save, then fsync of the file and its directory; training waits for all of it."
    in_background = False

    def save(self, workload: Workload, state: State, path: Path) -> None:
        torch.save(state, path)
        sync_tree(path)

    def finish(self) -> None:
        pass


class ReferenceSaver(Method):
    """The reference's AsyncCheckpointSaver in essence: clone the tensors, queue them, torch.save in a thread."""

    key = "reference"
    name = "reference (clone + thread)"
    about = (
        "the reference's AsyncCheckpointSaver: clones, a queue, torch.save in a thread. It clones top-level tensors "
        "only, so a nested state would race with training: here tensors at any depth are cloned. It does not fsync: "
        "the bench adds fsync of file and directory to its durable time."
    )

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[State, Path] | None] = queue.Queue()
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def save(self, workload: Workload, state: State, path: Path) -> None:
        self._path = path
        self._queue.put((map_tensors(lambda tensor: tensor.detach().cpu().clone(), state), path))

    def finish(self) -> None:
        self._queue.join()
        sync_tree(self._path)

    def close(self) -> None:
        self._queue.put(None)
        self._worker.join()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            torch.save(*job)
            del job
            self._queue.task_done()


class DcpAsyncSave(Method):
    key = "dcp"
    name = "DCP async_save"
    about = (
        "torch.distributed.checkpoint.async_save with its defaults: one process, thread, no pinned memory. It syncs "
        "its files but not its directory: the bench adds fsync of all files, of the directory and its parent."
    )

    _stager: Any = None

    def __init__(self) -> None:
        warnings.filterwarnings("ignore", module=r"torch\.distributed")  # at every call: there is one process only

    def save(self, workload: Workload, state: State, path: Path) -> None:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self._path = path
        response: Any = async_save(state, checkpoint_id=path, no_dist=True, async_stager=self._stager)
        self._future: Future[Any] = getattr(response, "upload_completion", response)

    def finish(self) -> None:
        self._future.result()
        del self._future
        sync_tree(self._path)

    def load(self, path: Path, like: State) -> Any:
        from torch.distributed.checkpoint.state_dict_loader import load

        load(like, checkpoint_id=path, no_dist=True)
        return like


class DcpKeptStager(DcpAsyncSave):
    key = "dcp-kept"
    name = "DCP async_save, kept stager"
    about = (
        "the same with one DefaultStager on shared memory kept for all saves, which spares it fresh memory. Its "
        "buffers are safe only because each save ends before the next begins. Synced by the bench like the one above."
    )

    def __init__(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__()
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
        )
        self._stager = DefaultStager(options)

    def close(self) -> None:
        self._stager.close()


class AsyncckptCopy(Method):
    key = "copy"
    name = "asyncckpt copy"
    about = (
        "AsyncCheckpointSaver(snapshot='copy'). The handle resolves when the file is durable; nothing is added. The "
        "first save pays for fresh memory, as nobody called prepare()."
    )
    nice = 10
    writer: Literal["thread", "process"] = "thread"

    def __init__(self) -> None:
        snapshot: Any = "overlap" if self.overlaps else "copy"
        self._saver = asyncckpt.AsyncCheckpointSaver(snapshot=snapshot, writer=self.writer, nice=self.nice)

    def save(self, workload: Workload, state: State, path: Path) -> None:
        self._handle = self._saver.save(state, path, **self._arguments(workload))

    def finish(self) -> None:
        self._handle.result()

    def load(self, path: Path, like: State) -> Any:
        return asyncckpt.load(path)

    def timings(self) -> asyncckpt.Timings | None:
        return self._handle.timings

    def close(self) -> None:
        self._saver.close()

    def _arguments(self, workload: Workload) -> dict[str, Any]:
        return {}


class AsyncckptOverlap(AsyncckptCopy):
    key = "overlap"
    name = "asyncckpt overlap"
    about = (
        "AsyncCheckpointSaver(snapshot='overlap') with its optimizer and model named; an optimizer step follows save() "
        "at once and waits at the fence, and its own time is part of the durable figure."
    )
    overlaps = True

    def _arguments(self, workload: Workload) -> dict[str, Any]:
        return {"optimizers": [workload.optimizer], "modules": [workload.model]}


class AsyncckptProcess(AsyncckptCopy):
    key = "process"
    name = "asyncckpt copy, process"
    about = "as asyncckpt copy, with writer='process': another process, which outlives the trainer, does the writing."
    writer = "process"


class AsyncckptCopyEager(AsyncckptCopy):
    key = "copy-nice-0"
    name = "asyncckpt copy, nice=0"
    about = "as asyncckpt copy, with the writing threads at the trainer's own priority (measured while training only)."
    nice = 0


MAKERS: dict[str, Callable[[], Method]] = {
    method.key: method
    for method in (
        TorchSave,
        ReferenceSaver,
        DcpAsyncSave,
        DcpKeptStager,
        AsyncckptCopy,
        AsyncckptProcess,
        AsyncckptOverlap,
    )
}


def sync_tree(path: Path) -> None:
    """Make a file, or a directory with its files, durable, and its name in its parent too."""
    inside = [child for child in path.rglob("*") if child.is_file()] if path.is_dir() else []
    for entry in [*inside, path, path.parent]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
