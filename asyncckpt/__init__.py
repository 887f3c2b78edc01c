"""Saves the state of PyTorch training without stopping the training.

    handle = asyncckpt.save(state, "step100.pt")   # returns once state may be changed
    asyncckpt.wait()                               # everything is durable, or it raises
    state = asyncckpt.load("step100.pt")           # every byte checked; torch.load opens it too

Names are imported when they are first used, so that `import asyncckpt` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# Registers its exit handlers, the earlier the better: they run after those registered later, which may save too.
from asyncckpt.service import exit as _exit  # noqa: F401
from asyncckpt.version import __version__ as __version__

if TYPE_CHECKING:
    from asyncckpt.distributed.ddp import load_distributed_checkpoint as load_distributed_checkpoint
    from asyncckpt.distributed.ddp import save_distributed_checkpoint as save_distributed_checkpoint
    from asyncckpt.errors import CheckpointError as CheckpointError
    from asyncckpt.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from asyncckpt.errors import CheckpointWriteError as CheckpointWriteError
    from asyncckpt.errors import CorruptCheckpointError as CorruptCheckpointError
    from asyncckpt.errors import MetricNotFoundError as MetricNotFoundError
    from asyncckpt.errors import QueueFullError as QueueFullError
    from asyncckpt.errors import RegistryError as RegistryError
    from asyncckpt.errors import SaverClosedError as SaverClosedError
    from asyncckpt.errors import StorageBusyError as StorageBusyError
    from asyncckpt.errors import TornSnapshotError as TornSnapshotError
    from asyncckpt.errors import UnsafeCheckpointError as UnsafeCheckpointError
    from asyncckpt.errors import UnsupportedStateError as UnsupportedStateError
    from asyncckpt.errors import WaitTimeoutError as WaitTimeoutError
    from asyncckpt.events import Event as Event
    from asyncckpt.image.file import verify as verify
    from asyncckpt.image.load import load as load
    from asyncckpt.interval import daly_interval as daly_interval
    from asyncckpt.interval import expected_overhead as expected_overhead
    from asyncckpt.interval import optimal_interval as optimal_interval
    from asyncckpt.interval import young_interval as young_interval
    from asyncckpt.manager import CheckpointManager as CheckpointManager
    from asyncckpt.policies import AdaptiveInterval as AdaptiveInterval
    from asyncckpt.policies import EveryMinutes as EveryMinutes
    from asyncckpt.policies import EverySteps as EverySteps
    from asyncckpt.preemption import PreemptionGuard as PreemptionGuard
    from asyncckpt.records import CheckpointInfo as CheckpointInfo
    from asyncckpt.records import Timings as Timings
    from asyncckpt.records import VerifyReport as VerifyReport
    from asyncckpt.registry.retention import KeepBest as KeepBest
    from asyncckpt.registry.retention import KeepEvery as KeepEvery
    from asyncckpt.registry.retention import KeepLast as KeepLast
    from asyncckpt.service.default import prepare as prepare
    from asyncckpt.service.default import save as save
    from asyncckpt.service.default import wait as wait
    from asyncckpt.service.handle import SaveHandle as SaveHandle
    from asyncckpt.service.saver import AsyncCheckpointSaver as AsyncCheckpointSaver
    from asyncckpt.state.capture import create_checkpoint as create_checkpoint
    from asyncckpt.state.sampler import ResumableSampler as ResumableSampler

_HOMES = {
    "asyncckpt.distributed.ddp": ("load_distributed_checkpoint", "save_distributed_checkpoint"),
    "asyncckpt.errors": (
        "CheckpointError",
        "CheckpointNotFoundError",
        "CheckpointWriteError",
        "CorruptCheckpointError",
        "MetricNotFoundError",
        "QueueFullError",
        "RegistryError",
        "SaverClosedError",
        "StorageBusyError",
        "TornSnapshotError",
        "UnsafeCheckpointError",
        "UnsupportedStateError",
        "WaitTimeoutError",
    ),
    "asyncckpt.events": ("Event",),
    "asyncckpt.image.file": ("verify",),
    "asyncckpt.image.load": ("load",),
    "asyncckpt.interval": ("daly_interval", "expected_overhead", "optimal_interval", "young_interval"),
    "asyncckpt.manager": ("CheckpointManager",),
    "asyncckpt.policies": ("AdaptiveInterval", "EveryMinutes", "EverySteps"),
    "asyncckpt.preemption": ("PreemptionGuard",),
    "asyncckpt.records": ("CheckpointInfo", "Timings", "VerifyReport"),
    "asyncckpt.registry.retention": ("KeepBest", "KeepEvery", "KeepLast"),
    "asyncckpt.service.default": ("prepare", "save", "wait"),
    "asyncckpt.service.handle": ("SaveHandle",),
    "asyncckpt.service.saver": ("AsyncCheckpointSaver",),
    "asyncckpt.state.capture": ("create_checkpoint",),
    "asyncckpt.state.sampler": ("ResumableSampler",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'asyncckpt' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
