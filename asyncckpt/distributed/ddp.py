"""One file for all ranks: the first one saves, all load."""

from __future__ import annotations

import os
from typing import Any

import torch

from asyncckpt.distributed.ranks import Ranks
from asyncckpt.distributed.sharding import check_replicated
from asyncckpt.errors import CheckpointError
from asyncckpt.image.file import file_path, open_to_load, read_anew
from asyncckpt.image.load import load_to_restore
from asyncckpt.service.default import save
from asyncckpt.state.capture import as_int, unwrap
from asyncckpt.state.restore import restore_checkpoint, taken_apart
from asyncckpt.storage.places import Places


def save_distributed_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    filepath: str | os.PathLike[str],
    rank: int | None = None,
) -> None:
    """Save model (without DDP's or torch.compile's wrapper) and optimizer from rank 0; every rank calls it.

    Blocks until the file is durable, on every rank. `rank` is this process's rank; None asks torch.distributed. Raises
    on every rank what `asyncckpt.save` raised on rank 0, `ValueError` if any rank gave a `rank` that is not its own,
    and `UnsupportedStateError` for a sharded model. `CheckpointManager` saves in the background, and more.
    """
    ranks = Ranks()

    def check() -> None:
        if ranks.size > 1 and rank is not None and rank != ranks.rank:
            raise ValueError(f"rank={rank} was given, but this is rank {ranks.rank}")
        check_replicated(model)

    def save_here(_: list[None]) -> None:
        if ranks.size == 1 and rank:
            return  # without a process group, the caller's word is all there is
        checkpoint = {
            "model_state_dict": unwrap(model).state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "epoch": as_int("epoch", epoch),
        }
        save(checkpoint, filepath).result()

    ranks.on_first_from_all(check, save_here)


def load_distributed_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    filepath: str | os.PathLike[str],
    device: torch.device | str | None = None,
) -> int:
    """Restore model (wrapped or not) and optimizer on every rank from one file; its epoch.

    Blocks. Every rank reads and verifies the file; if one can't, no rank changes anything, and all raise what
    `asyncckpt.load` raised there. Raises `CheckpointError`, also on all, if it does not fit.
    """
    ranks = Ranks()
    checkpoint = ranks.on_all(lambda: read_anew(os.fspath(filepath), lambda: _read(filepath)))
    ranks.on_all(
        lambda: restore_checkpoint(checkpoint, model, optimizer, device=device, restore_rng=False, gives_memory=True)
    )
    epoch: int = checkpoint["epoch"]
    return epoch


def _read(filepath: str | os.PathLike[str]) -> dict[str, Any]:
    name = file_path(filepath)
    with open_to_load(Places(), name) as reader:
        loaded = load_to_restore(reader, name)
        if not isinstance(loaded.state, dict) or not loaded.state.keys() >= {"model_state_dict", "epoch"}:
            raise CheckpointError(f"{os.fspath(filepath)!r} is whole, but has no model_state_dict and epoch")
        return taken_apart(loaded.state, loaded, ("model_state_dict", "optimizer_state_dict"))
