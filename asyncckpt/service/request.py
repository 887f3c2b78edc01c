"""What is to be saved, and where: its plan, and what its user is told of a state that will give trouble."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from asyncckpt.errors import UnsafeCheckpointError
from asyncckpt.image.plan import Plan, find_unsafe, plan_state
from asyncckpt.records import Timings
from asyncckpt.registry.directory import Listing
from asyncckpt.version import __version__
from asyncckpt.warn import warn

_LARGE_ARRAYS_BYTES = 16 << 20


@dataclass
class Request:
    """A call to `save`, or the manager's to `save_listed`."""

    state: object
    path: str
    optimizers: Sequence[Any] = ()
    modules: Sequence[torch.nn.Module] = ()
    metadata: Mapping[str, object] | None = None
    listing: Listing | None = None
    weights_only: bool = True

    def plan(self, timings: Timings) -> Plan:
        """Raises `UnsupportedStateError`. Blocks as `plan_state` does."""
        started = time.perf_counter()
        plan = plan_state(self.state, self._describe())
        timings.plan_secs = time.perf_counter() - started
        timings.num_bytes = plan.layout.num_bytes
        return plan

    def check(self, plan: Plan) -> None:
        """Warn of what is slow to save, or hard to load; raise `UnsafeCheckpointError` where that is not allowed."""
        if plan.array_bytes > _LARGE_ARRAYS_BYTES:
            _warn_of_arrays(plan)
        unsafe = find_unsafe(self.state, plan)
        if unsafe is not None and self.listing is None:
            _warn_of_unsafe(*unsafe)
        elif unsafe is not None and self.weights_only:
            raise _unsafe_error(*unsafe)

    def _describe(self) -> Mapping[str, object]:
        """The JSON record inside the file."""
        now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        return {
            "asyncckpt": __version__,
            "name": os.path.basename(self.path).encode("utf-8", "backslashreplace").decode(),
            "created": self.listing.info.timestamp if self.listing is not None else now,
            "torch": str(torch.__version__),
            "metadata": self.metadata or {},
        }


def warn_of_streaming(plan: Plan, limit: int) -> None:
    """The state's image is over the limit, so that it will be streamed."""
    warn(
        f"the state's image ({plan.layout.num_bytes:,} bytes) is over memory_limit ({limit:,} bytes): it is written in "
        "pieces, and save() blocks until it is durable",
    )


def _warn_of_arrays(plan: Plan) -> None:
    warn(
        f"the state holds {plan.array_bytes:,} bytes of NumPy arrays, which torch's format pickles inline, slowly "
        "and with several times their size in memory; torch.from_numpy makes tensors of them without a copy",
    )


def _warn_of_unsafe(path: str, name: str) -> None:
    warn(
        f"{path} refers to {name}, so only a load with weights_only=False, which can run code, will open this "
        "checkpoint; save plain data and state_dicts, or allow it by torch.serialization.add_safe_globals",
    )


def _unsafe_error(path: str, name: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{_dotted(path)} refers to {name}, which a safe load would refuse, so nothing was saved; save plain data "
        "(str(), vars(), a state_dict()) in its place, allow the class by torch.serialization.add_safe_globals, or "
        "pass weights_only=False if every later load may run code"
    )


def _dotted(path: str) -> str:
    """`state['config']['optimizer_cls']` as people say it: `config.optimizer_cls`."""
    return re.sub(r"\['([A-Za-z_]\w*)'\]", r".\1", path).replace("state.", "", 1)
