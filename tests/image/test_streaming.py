"""Streaming: the same bytes as staging gives, through a window much smaller than the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import asyncckpt
from asyncckpt.image.arena import Arena
from asyncckpt.image.plan import plan_state
from asyncckpt.image.streaming import StreamedImage, window_bytes

from .compare import assert_same
from .images import stage, write_out
from .states import random_state

PIECE = 4096


def stream(state: object, num_bytes: int, piece_bytes: int = PIECE) -> tuple[bytes, bytes]:
    """The file streamed through a window of `num_bytes`, twice, as a retry does."""
    plan = plan_state(state, {"n": 1})
    arena = Arena(num_bytes)
    try:
        source = StreamedImage(plan, arena, num_bytes)
        return write_out(source, piece_bytes), write_out(source, piece_bytes)
    finally:
        del source
        arena.close()


@pytest.mark.parametrize("num_bytes", [PIECE, 3 * PIECE, 3 * PIECE + 100, 64 * PIECE])
@pytest.mark.parametrize("seed", range(6))
def test_streamed_bytes_are_the_staged_bytes(seed: int, num_bytes: int) -> None:
    state = random_state(seed, max_bytes=100_000)
    staged = stage(plan_state(state, {"n": 1}))
    assert stream(state, num_bytes) == (staged, staged)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 10_000), max_size=12),
    num_pieces=st.integers(1, 5),
    piece_bytes=st.sampled_from([64, 100, 4096, 5000]),
)
def test_any_windows_and_pieces(sizes: list[int], num_pieces: int, piece_bytes: int) -> None:
    """Headers and the directory may be cut anywhere."""
    state = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    staged = stage(plan_state(state, {"n": 1}), piece_bytes)
    assert stream(state, num_pieces * piece_bytes, piece_bytes) == (staged, staged)


@pytest.mark.parametrize(
    ("limit", "expected"), [(0, 8 << 20), (1, 8 << 20), (20 << 20, 16 << 20), (10 << 30, 256 << 20)]
)
def test_window_is_whole_pieces_under_the_limit(limit: int, expected: int) -> None:
    assert window_bytes(limit) == expected


def test_saver_streams_what_is_over_its_limit(tmp_path: Path) -> None:
    """save() warns, and returns only when the file is durable: the state may change at once after it."""
    state = {"large": torch.arange(6 << 20), "shared": [random_state(3)]}
    expected = {"large": state["large"].clone(), "shared": [random_state(3)]}  # type: ignore[attr-defined]
    path = tmp_path / "x.pt"
    with asyncckpt.AsyncCheckpointSaver(memory_limit=20 << 20) as saver:
        with pytest.warns(UserWarning, match=r"over memory_limit \(20,971,520 bytes\)"):
            handle = saver.save(state, path)
        assert handle.staged
        assert path.exists()
        state["large"].zero_()  # type: ignore[attr-defined]
        assert handle.done()
        saver.wait(0)
    assert asyncckpt.verify(path).ok
    assert_same(asyncckpt.load(path), expected)
    assert_same(torch.load(path, mmap=True), expected)


def test_small_states_are_not_streamed(tmp_path: Path) -> None:
    with asyncckpt.AsyncCheckpointSaver(memory_limit=1 << 20) as saver:
        saver.save({"a": torch.ones(10)}, tmp_path / "x.pt")
