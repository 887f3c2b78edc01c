"""The public names, pinned: whoever adds or drops one does it on purpose."""

from __future__ import annotations

import inspect
import pickle

import pytest

import asyncckpt
from asyncckpt import errors

PUBLIC = {
    *("save", "load", "verify", "wait", "prepare"),
    *("CheckpointManager", "KeepBest", "KeepEvery", "KeepLast", "AdaptiveInterval", "EveryMinutes", "EverySteps"),
    "PreemptionGuard",
    *("ResumableSampler", "create_checkpoint", "save_distributed_checkpoint", "load_distributed_checkpoint"),
    *("optimal_interval", "young_interval", "daly_interval", "expected_overhead"),
    *("AsyncCheckpointSaver", "SaveHandle", "CheckpointInfo", "Timings", "VerifyReport", "Event"),
    *("CheckpointError", "CheckpointNotFoundError", "CheckpointWriteError", "CorruptCheckpointError"),
    *("QueueFullError", "SaverClosedError", "TornSnapshotError", "UnsafeCheckpointError", "UnsupportedStateError"),
    *("WaitTimeoutError", "MetricNotFoundError", "RegistryError", "StorageBusyError"),
    "__version__",
}
BUILTIN_OF = {
    "CheckpointNotFoundError": FileNotFoundError,
    "CheckpointWriteError": OSError,
    "CorruptCheckpointError": ValueError,
    "MetricNotFoundError": LookupError,
    "QueueFullError": RuntimeError,
    "RegistryError": ValueError,
    "StorageBusyError": BlockingIOError,
    "SaverClosedError": RuntimeError,
    "TornSnapshotError": RuntimeError,
    "UnsafeCheckpointError": pickle.UnpicklingError,
    "UnsupportedStateError": TypeError,
    "WaitTimeoutError": TimeoutError,
}


def test_public_names() -> None:
    assert set(asyncckpt.__all__) == PUBLIC
    assert dir(asyncckpt) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_each_is_there_and_documented(name: str) -> None:
    thing = getattr(asyncckpt, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            if inspect.isfunction(value) and not attribute.startswith("_"):
                documented = inspect.getdoc(value) or attribute in ("ok", "flush_at_exit", "forget_after_fork")
                assert documented, f"{name}.{attribute}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        asyncckpt.nothing  # noqa: B018


@pytest.mark.parametrize(("name", "builtin"), BUILTIN_OF.items())
def test_each_error_is_also_the_matching_builtin(name: str, builtin: type[Exception]) -> None:
    error = getattr(asyncckpt, name)
    assert issubclass(error, builtin)
    assert issubclass(error, asyncckpt.CheckpointError)
    assert name in (errors.__doc__ or "")
    assert str(error("what failed")) == "what failed"
