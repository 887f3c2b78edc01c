"""The global random number generators: their states as plain data that a safe load accepts, and back."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from asyncckpt.naming import printable

logger = logging.getLogger("asyncckpt")


def capture_rng_states() -> dict[str, Any]:
    """The states of Python's, NumPy's (if it is imported), torch's and every accelerator's generators, as of now.

    Tensors and plain numbers only; copies. Accelerators have a list, one state per device; one that is not in use yet
    is left out, since asking would initialise it. Blocks for the work queued on the devices.
    """
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = _capture_numpy(numpy)
    for kind in _accelerator_kinds():
        module = getattr(torch, kind)
        if module.is_initialized() if hasattr(module, "is_initialized") else module.is_available():
            all_states = (
                module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else [module.get_rng_state()]
            )
            states[kind] = [state.cpu() for state in all_states]
    return states


def restore_rng_states(states: Mapping[str, Any]) -> None:
    """Set the generators to what `capture_rng_states` found, or the reference's `random.getstate()` and the like.

    What is not here (NumPy, devices, kinds of generator that this version does not know) is left out, with a warning
    in the log.
    """
    for kind, state in states.items():
        if kind == "python":
            random.setstate(python_state(state))
        elif kind == "torch":
            torch.set_rng_state(state.cpu())
        elif kind == "numpy":
            _restore_numpy(state)
        elif kind in _accelerator_kinds():
            _restore_devices(kind, state)
        else:
            logger.warning("the checkpoint holds the state of an unknown random number generator: %s", printable(kind))


def python_state(state: Any) -> tuple[Any, ...]:
    """The state of a `random.Random`, which takes nothing but tuples, from one that may have become lists."""
    version, internal, gauss = state
    return version, tuple(internal), gauss


def numpy_to_plain(state: Any) -> Any:
    """The state of a NumPy generator with lists and plain numbers in place of arrays and NumPy's numbers."""
    if isinstance(state, dict):
        return {key: numpy_to_plain(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state


def numpy_from_plain(state: Any, like: Any) -> Any:
    """The same with arrays again, of the types in `like`: a state of the generator that it is for.

    Raises ValueError if that is another kind of generator.
    """
    if isinstance(like, dict):
        if like.get("bit_generator") != state.get("bit_generator"):
            raise ValueError(f"the state of a {state.get('bit_generator')}, not of a {like.get('bit_generator')}")
        return {key: numpy_from_plain(state[key], like[key]) for key in like}
    if getattr(like, "shape", ()):
        import numpy

        return numpy.array(state, dtype=like.dtype)
    return state


def _capture_numpy(numpy: Any) -> Any:
    state = numpy.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":  # somebody called numpy.random.set_bit_generator
        return numpy_to_plain(state)
    keys = torch.from_numpy(state["state"]["key"].astype("int64"))
    return "MT19937", keys, int(state["state"]["pos"]), int(state["has_gauss"]), float(state["gauss"])


def _restore_numpy(state: Any) -> None:
    try:
        import numpy
    except ImportError:
        logger.warning("the checkpoint holds NumPy's random state, but NumPy is not installed")
        return
    if not isinstance(state, Mapping):
        name, keys, *rest = state
        state = (name, numpy.asarray(keys).astype("uint32"), *rest)
    try:
        if isinstance(state, Mapping):
            state = numpy_from_plain(state, numpy.random.get_state(legacy=False))
        numpy.random.set_state(state)
    except ValueError as error:
        logger.warning("NumPy's global generator is left as it is: %s", error)


def _restore_devices(kind: str, states: Any) -> None:
    states = [states] if isinstance(states, torch.Tensor) else states
    module = getattr(torch, kind)
    num_devices = module.device_count() if module.is_available() else 0
    if num_devices != len(states):
        logger.warning("the random states of %d %s devices were saved, and %d are here", len(states), kind, num_devices)
    for device, state in enumerate(states[:num_devices]):
        module.set_rng_state(state.cpu(), device)


def _accelerator_kinds() -> list[str]:
    """The names of torch's modules for devices, whether or not there are such devices.

    Not from `torch.accelerator`, which may initialise a device to find out.
    """
    kinds = ("cuda", "mps", "xpu", "mtia", torch._C._get_privateuse1_backend_name())
    return [kind for kind in kinds if hasattr(getattr(torch, kind, None), "get_rng_state")]
