"""The global random number generators: there and back through a file, and what is not there."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

import asyncckpt
from asyncckpt.state.rng import capture_rng_states, restore_rng_states


@pytest.fixture(autouse=True)
def leave_generators_as_they_were() -> Iterator[None]:
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    numpy.random.set_state(before[1])
    torch.set_rng_state(before[2])


def draw() -> tuple[object, ...]:
    """From every generator; the normal ones keep a second number for the next call."""
    return random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn(), torch.rand(3).tolist()


def through_file(state: Any, path: Path) -> Any:
    asyncckpt.save(state, path).result()
    return asyncckpt.load(path)


def test_there_and_back_through_a_file(tmp_path: Path) -> None:
    """A safe load takes the states, and every generator goes on where it was, cached normals included."""
    draw()
    loaded = through_file(capture_rng_states(), tmp_path / "rng.pt")
    expected = draw()
    assert draw() != expected
    restore_rng_states(loaded)
    assert draw() == expected


def test_what_is_captured_does_not_change_with_the_generators() -> None:
    """The captured states are copies."""
    states = capture_rng_states()
    expected = draw()
    for _ in range(700):  # past the end of MT19937's 624 keys, so that all are made anew
        draw()
    restore_rng_states(states)
    assert draw() == expected


def test_the_references_own_form() -> None:
    """What the generators' own functions return is accepted, also with lists in place of tuples."""
    version, internal, gauss = random.getstate()
    states = {"python": [version, list(internal), gauss], "numpy": numpy.random.get_state()}
    expected = draw()
    restore_rng_states({**states, "torch": capture_rng_states()["torch"]})
    assert draw()[:4] == expected[:4]


def test_the_captured_numpy_state_has_the_references_form() -> None:
    """numpy.random.set_state itself takes it, once the tensor is an array."""
    name, keys, *rest = capture_rng_states()["numpy"]
    expected = numpy.random.rand()
    numpy.random.set_state((name, keys.numpy(), *rest))
    assert numpy.random.rand() == expected


def test_another_bit_generator_behind_numpys_functions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A global generator that is no MT19937 is saved too; one of another kind is left alone, with a warning."""
    functions: Any = numpy.random  # not all are in its stubs
    before = functions.get_bit_generator()
    functions.set_bit_generator(numpy.random.PCG64(3))
    try:
        loaded = through_file(capture_rng_states(), tmp_path / "rng.pt")
        expected = numpy.random.rand()
        restore_rng_states(loaded)
        assert numpy.random.rand() == expected
    finally:
        functions.set_bit_generator(before)
    assert not caplog.records
    untouched = functions.get_state()[1].copy()
    restore_rng_states(loaded)
    assert "PCG64" in caplog.text
    assert (functions.get_state()[1] == untouched).all()


@pytest.mark.parametrize("value", [7, [torch.zeros(16, dtype=torch.uint8)]])
def test_unknown_generators_are_named(caplog: pytest.LogCaptureFixture, value: object) -> None:
    """A key that this version does not know is a warning, and the rest is restored."""
    states = {"quantum": value, **capture_rng_states()}
    expected = draw()
    restore_rng_states(states)
    assert "quantum" in caplog.text
    assert draw() == expected


def test_numpy_is_not_imported_for_it() -> None:
    """A process without NumPy saves no state for it, and restores one saved elsewhere with a warning."""
    code = """
import logging, sys
sys.modules["numpy"] = None  # as if it were not installed
import warnings
warnings.simplefilter("ignore")  # torch says that NumPy is missing
from asyncckpt.state.rng import capture_rng_states, restore_rng_states
states = capture_rng_states()
assert sorted(states) == ["python", "torch"], states
logging.basicConfig(stream=sys.stdout)
restore_rng_states({**states, "numpy": ("MT19937", [0] * 624, 624, 0, 0.0)})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "NumPy is not installed" in done.stdout


class Devices:
    """A module for devices, as `torch.cuda` is one; none of them is here."""

    def __init__(self, num_devices: int, *, initialised: bool = True) -> None:
        self.states = [torch.full((16,), index, dtype=torch.uint8) for index in range(num_devices)]
        self.initialised = initialised

    def is_available(self) -> bool:
        return bool(self.states)

    def is_initialized(self) -> bool:
        return self.initialised

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state(self, device: int) -> torch.Tensor:
        return self.states[device].clone()

    def get_rng_state_all(self) -> list[torch.Tensor]:
        assert self.initialised, "asking would initialise the device"
        return [state.clone() for state in self.states]

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        self.states[device] = state


Replace = Callable[[str, object], None]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    return lambda kind, module: monkeypatch.setattr(torch, kind, module)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mtia"])
def test_accelerators_there_and_back(replace: Replace, kind: str) -> None:
    """Every device's state under its kind's name, and back to its own device."""
    devices = Devices(2)
    replace(kind, devices)
    states = capture_rng_states()
    devices.states = [torch.zeros(16, dtype=torch.uint8) for _ in range(2)]
    restore_rng_states(states)
    assert [state[0].item() for state in devices.states] == [0, 1]


def test_an_accelerator_with_a_single_generator(replace: Replace) -> None:
    """MPS has neither is_initialized nor get_rng_state_all."""
    state = torch.arange(16, dtype=torch.uint8)
    given: list[tuple[torch.Tensor, int]] = []
    mps = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_rng_state=lambda: state,
        set_rng_state=lambda state, device: given.append((state, device)),
    )
    replace("mps", mps)
    states = capture_rng_states()
    assert len(states["mps"]) == 1
    restore_rng_states(states)
    assert torch.equal(given[0][0], state)
    assert given[0][1] == 0


def test_no_device_is_initialised_by_a_save(replace: Replace) -> None:
    """An accelerator that training has not used has no state worth asking for."""
    replace("cuda", Devices(1, initialised=False))
    assert "cuda" not in capture_rng_states()


@pytest.mark.parametrize(("num_saved", "num_here"), [(1, 2), (3, 2), (2, 0)])
def test_other_devices_than_were_saved(
    replace: Replace, caplog: pytest.LogCaptureFixture, num_saved: int, num_here: int
) -> None:
    """Those that are here are restored; the difference is a warning."""
    devices = Devices(num_here)
    replace("cuda", devices)
    saved = [torch.full((16,), 9, dtype=torch.uint8) for _ in range(num_saved)]
    restore_rng_states({"cuda": saved})
    assert f"{num_saved} cuda devices were saved, and {num_here} are here" in caplog.text
    assert [state[0].item() for state in devices.states] == [9, 9, 1][:num_saved][:num_here] + [1] * (
        num_here - num_saved
    )


def test_the_state_of_one_device_by_itself(replace: Replace) -> None:
    """`torch.cuda.get_rng_state()` is one tensor, not a list."""
    devices = Devices(1)
    replace("cuda", devices)
    restore_rng_states({"cuda": torch.full((16,), 9, dtype=torch.uint8)})
    assert devices.states[0].tolist() == [9] * 16
