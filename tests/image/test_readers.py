"""What newer readers do with a file: compute places, skip the data, load under fake tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.serialization import config as _config

import asyncckpt

from .compare import assert_same, storage_bytes
from .images import image_of
from .states import random_state

NUM_STATES = 75
config: Any = _config  # its `patch` is put in at run time
PER_TEST = 15


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """All tensors of a random state, in order."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_of(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_of(value)


@pytest.fixture(params=range(0, NUM_STATES, PER_TEST))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> list[tuple[dict[str, Any], Path]]:
    """Random states, with their files."""
    found = []
    for seed in range(request.param, request.param + PER_TEST):
        state = random_state(seed, max_tensors=20, max_bytes=2 << 20 if seed % 3 == 0 else 5000)
        path = tmp_path / f"{seed}.pt"
        path.write_bytes(image_of(state, {"seed": seed}))
        found.append((state, path))
    return found


def test_random_states_load(saved: list[tuple[dict[str, Any], Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With every combination of what torch.load offers; sharing kept, NaN bits kept."""
    for state, path in saved:
        assert asyncckpt.verify(path).ok
        assert_same(asyncckpt.load(path), state)
        assert_same(torch.load(path, mmap=False, weights_only=True), state)
        with monkeypatch.context() as patch, config.patch({"load.calculate_storage_offsets": True}):
            patch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
            for mmap in (True, False):
                assert_same(torch.load(path, mmap=mmap, weights_only=True), state)
            assert_same(asyncckpt.load(path), state)


@pytest.mark.parametrize("calculate", [True, False])
@pytest.mark.parametrize("fake", [True, False])
def test_offsets_without_data(
    saved: list[tuple[dict[str, Any], Path]], calculate: bool, fake: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`map_location="meta"` and fake tensors note where each storage's bytes lie: they must lie there."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    for state, path in saved:
        content = path.read_bytes()
        with config.patch({"load.calculate_storage_offsets": calculate}):
            if fake:
                with FakeTensorMode():
                    loaded = torch.load(path, weights_only=True)
            else:
                loaded = torch.load(path, map_location="meta", weights_only=True)
        pairs = list(zip(tensors_of(loaded), tensors_of(state), strict=True))
        assert pairs
        for described, tensor in pairs:
            assert (described.shape, described.dtype, described.stride()) == (
                tensor.shape,
                tensor.dtype,
                tensor.stride(),
            )
            expected = storage_bytes(tensor.untyped_storage())
            offset = described.untyped_storage()._checkpoint_offset
            assert offset is not None
            assert content[offset : offset + len(expected)] == expected


def test_a_file_can_be_renamed(tmp_path: Path) -> None:
    """torch.save names the folder inside after the file; ours doesn't depend on it."""
    state = random_state(random.Random(5).randrange(100))
    asyncckpt.save(state, tmp_path / "step 1.pt").result(60)
    (tmp_path / "step 1.pt").rename(tmp_path / "latest")
    assert_same(torch.load(tmp_path / "latest", mmap=True), state)
