"""The drop-in functions: one saver for the whole process, made at the first use."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import torch

from asyncckpt.service.handle import SaveHandle
from asyncckpt.service.saver import AsyncCheckpointSaver

_lock = threading.RLock()
_saver: AsyncCheckpointSaver | None = None


def save(
    obj: object,
    f: str | os.PathLike[str],
    *,
    optimizers: Sequence[Any] = (),
    modules: Sequence[torch.nn.Module] = (),
) -> SaveHandle:
    """Save as torch.save does, in the background: returns once `obj` may be changed. Thread-safe.

    Naming the `optimizers` (and `modules`) whose state it is makes it an overlapped save: it returns in milliseconds.
    See `AsyncCheckpointSaver.save` for what blocks, what may be changed when, and what is raised. Nothing is durable
    on return: `handle.result()` or `wait()` say when it is. What is in flight at the process's exit is flushed then.
    """
    return _default_saver().save(obj, f, optimizers=optimizers, modules=modules)


def prepare(state: object) -> None:
    """Warm the memory for saves of this state. Blocks; see `AsyncCheckpointSaver.prepare`."""
    _default_saver().prepare(state)


def wait(timeout: float | None = None) -> None:
    """Return once everything given to `save` is durable, or raise. See `AsyncCheckpointSaver.wait`."""
    if _saver is not None:
        _saver.wait(timeout)


def _default_saver() -> AsyncCheckpointSaver:
    global _saver
    with _lock:
        if _saver is None:
            _saver = AsyncCheckpointSaver(snapshot="overlap")
        return _saver


def _forget_in_child() -> None:
    global _lock, _saver
    _lock, _saver = threading.RLock(), None


os.register_at_fork(after_in_child=_forget_in_child)
