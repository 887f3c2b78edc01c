"""What a training process does with checkpoints, marked so that strace sees which system calls came through the seam.

A mark is a failing `access` of a path below MARKS, in the thread that makes the call: `begin/NAME` and `end/NAME`
around each call through the seam, `phase/NAME` where another part of the work begins.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from storage.seam import FUNCTIONS

import asyncckpt
from asyncckpt.storage import system_calls
from asyncckpt.storage.journal import Journals, Part, UploadRecord
from asyncckpt.storage.local import LocalStorage
from reliability.test_io_errors import OLD_LOSSES, Process

MARKS = "/asyncckpt-mark"


def mark(*words: str) -> None:
    os.access("/".join((MARKS, *words)), os.F_OK)


def mark_every_call() -> None:
    def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            mark("begin", name)
            try:
                return function(*args)
            finally:
                mark("end", name)

        return call

    for name, function in FUNCTIONS.items():
        setattr(system_calls, name, marked(name, function))


def save_to_a_path(path: Path) -> None:
    """Making directories, over an old file, and reading it back."""
    with asyncckpt.AsyncCheckpointSaver(verify_after_save=True) as saver:
        for number in range(3):
            saver.save({"tensor": torch.full((5000,), float(number))}, path).result(60)


def manage(path: Path) -> None:
    """Recovery, retention, a change of the best, a prune."""
    process = Process(path, len(OLD_LOSSES))
    assert [info.global_step for info in process.manager.list_checkpoints()] == [1, 2, 3]
    for loss in (2.0, 6.0, 1.0, 7.0):
        assert process.save(loss) is None
    assert process.prune() is None
    process.close()


def upload(journals: Path) -> None:
    """What an upload to a store notes on this machine."""
    journal = Journals(str(journals)).begin(UploadRecord("s3://bucket/run/state.pt", "id", "token", "note", 2, 1))
    assert journal is not None
    journal.add(Part(0, "tag", 0, 1))
    journal.remove()


def look(path: Path, run: Path) -> None:
    """Load, list, verify; ask who writes, and how much room there is."""
    assert not LocalStorage().is_locked(str(run))
    assert system_calls.file_system_status(str(run)).f_bsize > 0
    for mmap in (True, False):
        assert asyncckpt.load(path, mmap=mmap)["tensor"][0] == 2
    assert asyncckpt.verify(path).ok
    process = Process(run)
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2000 + index)) for index in range(2)])
    assert process.manager.load_latest(model)[1]["global_step"] == 7
    assert process.manager.load_best(model)[1]["global_step"] == 6
    assert all(report.ok for report in process.manager.verify())
    process.close()


def go_around_the_seam(path: Path) -> None:
    """What the test must find."""
    os.stat(path)
    with path.open("r+b", buffering=0) as file:
        file.write(b"x")
        os.fsync(file.fileno())
    path.rename(path.with_name("elsewhere"))
    mark("begin", "unlink")
    os.truncate(path.with_name("elsewhere"), 0)
    path.with_name("elsewhere").unlink()
    mark("end", "unlink")


def main(base: Path) -> None:
    logging.disable()
    torch.set_num_threads(1)
    path, run = base / "deep/er/state.pt", base / "old"
    mark_every_call()
    mark("phase", "save")
    save_to_a_path(path)
    manage(run)
    upload(base / "journals")
    mark("phase", "load")
    look(path, run)
    mark("phase", "bypass")
    go_around_the_seam(path)


if __name__ == "__main__":
    main(Path(os.environ["ASYNCCKPT_TRACED"]))
