"""The global random number generators: their states as plain data that a safe load accepts, and back."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

logger = logging.getLogger("asyncckpt")


def capture_rng_states() -> dict[str, Any]:
    """The states of Python's, NumPy's (if it is in use), torch's and every accelerator's generators, as of now.

    Tensors and plain numbers only; copies. Never initialises a device.
    """
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *(_plain(value) for value in rest))
    for kind, module in _accelerators().items():
        states[kind] = [state.cpu() for state in module.get_rng_state_all()]
    return states


def restore_rng_states(states: Mapping[str, Any]) -> None:
    """Set the generators to what `capture_rng_states` found. What is not here is left out, with a warning."""
    for kind, state in states.items():
        if kind == "python":
            version, internal, gauss = state
            random.setstate((version, tuple(internal), gauss))
        elif kind == "torch":
            torch.set_rng_state(state.cpu())
        elif kind == "numpy":
            _restore_numpy(state)
        else:
            _restore_devices(kind, state)


def _restore_numpy(state: Any) -> None:
    try:
        import numpy
    except ImportError:
        logger.warning("the checkpoint holds NumPy's random state, but NumPy is not installed")
        return
    name, keys, *rest = state
    numpy.random.set_state((name, numpy.asarray(keys).astype("uint32"), *rest))


def _restore_devices(kind: str, states: Any) -> None:
    module = _accelerators(initialise=True).get(kind)
    num_devices = module.device_count() if module is not None else 0
    if num_devices != len(states):
        logger.warning("the random states of %d %s devices were saved, and %d are here", len(states), kind, num_devices)
    for device, state in enumerate(states[:num_devices]):
        assert module is not None
        module.set_rng_state(state.cpu(), device)


def _accelerators(*, initialise: bool = False) -> dict[str, Any]:
    """The device modules (`torch.cuda`, …) that are in use, or could be."""
    found = {}
    for kind in ("cuda", "xpu", "mps"):
        module = getattr(torch, kind, None)
        if module is None or not module.is_available() or not hasattr(module, "get_rng_state_all"):
            continue
        if initialise or not hasattr(module, "is_initialized") or module.is_initialized():
            found[kind] = module
    return found


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
