"""Arenas and their pool: reuse, warmth, bounds, and life without the Linux calls."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import pytest

import asyncckpt
from asyncckpt.image.arena import PAGE_BYTES, Arena, ArenaPool

MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_arena_is_aligned_and_writable() -> None:
    arena = Arena(5 * MIB + 1)
    assert arena.address % PAGE_BYTES == 0
    assert len(arena.buffer) == arena.num_bytes >= 5 * MIB + 1
    arena.buffer[-3:] = b"end"
    assert arena.fd is not None
    assert os.pread(arena.fd, 3, arena.num_bytes - 3) == b"end"  # another process would see it so
    arena.close()
    arena.close()
    assert arena.fd is None


def test_prefault_touches_just_what_it_is_told() -> None:
    arena = Arena(64 * MIB)
    before = resident_bytes()
    arena.prefault(32 * MIB)
    assert 31 * MIB < resident_bytes() - before < 34 * MIB
    arena.prefault(16 * MIB)
    assert arena.used_bytes == 32 * MIB
    arena.close()
    assert resident_bytes() - before < 2 * MIB


def test_the_pool_lends_the_smallest_that_fits() -> None:
    pool = ArenaPool(3)
    large, small = pool.acquire(32 * MIB), pool.acquire(4 * MIB)
    pool.release(large)
    pool.release(small)
    assert pool.acquire(3 * MIB) is small
    assert pool.acquire(8 * MIB) is large
    pool.release(small)
    pool.release(large)
    pool.close()


def test_the_pool_is_bounded_when_sizes_change() -> None:
    pool = ArenaPool(2)
    for size in (4, 8, 16, 2, 32, 64, 1):
        arenas = [pool.acquire(size * MIB), pool.acquire(size * MIB)]
        assert pool.num_bytes <= 2 * 64 * MIB * 33 // 32 + 4 * MIB
        for arena in arenas:
            pool.release(arena)
        assert len(pool._free) <= 2
    pool.close()
    assert pool.num_bytes == 0


def test_what_is_lent_at_close_is_given_back_when_it_returns() -> None:
    pool = ArenaPool(2)
    arena = pool.acquire(MIB)
    pool.close()
    arena.buffer[:4] = b"used"
    pool.release(arena)
    assert arena.address == 0


def test_before_close_actions_run_once() -> None:
    calls: list[bytes] = []
    arena = Arena(MIB)
    arena.buffer[0] = 7
    address = arena.address
    arena.before_close(lambda: calls.append(ctypes.string_at(address, 1)))  # the memory is there still
    arena.close()
    arena.close()
    assert calls == [b"\x07"]


def test_a_lost_arena_is_given_back_with_its_last_view() -> None:
    """An interrupt may come before anybody who would close it has it."""
    before = set(os.listdir("/proc/self/fd"))
    calls: list[int] = []
    arena = Arena(MIB)
    arena.before_close(lambda: calls.append(1))
    view = arena.buffer[:100]
    del arena
    view[0] = 7
    assert (view[0], calls) == (7, [])
    del view
    assert calls == [1]
    assert set(os.listdir("/proc/self/fd")) == before


def test_too_much_is_a_clear_error() -> None:
    with pytest.raises(MemoryError, match=r"checkpoint buffer of [\d,]+ bytes"):
        Arena(1 << 60)
    gc.collect()


def test_no_descriptor_is_leaked(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with asyncckpt.AsyncCheckpointSaver() as saver:
            saver.save({"a": 1}, tmp_path / "a.pt")
    with pytest.raises(MemoryError):
        Arena(1 << 60)
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_the_linux_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac: anonymous memory, buffered writes, no fallocate, loads by path."""
    import torch

    from asyncckpt.storage import local, system_calls

    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(local, "_O_DIRECT", 0)
    monkeypatch.setattr(system_calls, "_libc", object())
    monkeypatch.setattr("sys.platform", "darwin")
    state = {"weights": torch.arange(1_000_000.0)}
    with asyncckpt.AsyncCheckpointSaver() as saver:
        saver.prepare(state)
        saver.save(state, tmp_path / "a.pt").result()
        assert all(arena.fd is None for arena in saver._snapshots._pool._free)
    assert torch.equal(asyncckpt.load(tmp_path / "a.pt")["weights"], state["weights"])
