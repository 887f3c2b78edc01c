"""One file for all ranks: the first one saves, all load."""

from __future__ import annotations

import os

import torch

from asyncckpt.distributed.ranks import Ranks
from asyncckpt.image.load import load
from asyncckpt.service.default import save
from asyncckpt.state.capture import as_int, unwrap
from asyncckpt.state.restore import restore_checkpoint


def save_distributed_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    filepath: str | os.PathLike[str],
    rank: int | None = None,
) -> None:
    """Save model (without DDP's or torch.compile's wrapper) and optimizer from rank 0; every rank calls it.

    Blocks until the file is durable, on every rank. `rank` is this process's rank; None asks torch.distributed. Raises
    on every rank what `asyncckpt.save` raised on rank 0. `CheckpointManager` saves in the background, and more.
    """
    ranks = Ranks()

    def save_here() -> None:
        checkpoint = {
            "model_state_dict": unwrap(model).state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "epoch": as_int("epoch", epoch),
        }
        save(checkpoint, filepath).result()

    if ranks.size > 1:
        if rank is not None and rank != ranks.rank:
            raise ValueError(f"rank={rank} was given, but this is rank {ranks.rank}")
        ranks.on_first(save_here)
    elif not rank:
        save_here()


def load_distributed_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    filepath: str | os.PathLike[str],
    device: torch.device | str | None = None,
) -> int:
    """Restore model (wrapped or not) and optimizer on every rank from one file; its epoch.

    Blocks. Every rank reads and verifies the file; if one can't, none changes anything and every rank raises: what
    `asyncckpt.load` raises, or a `CheckpointError` that names the failed rank.
    """
    checkpoint = Ranks().on_all(lambda: load(filepath))
    restore_checkpoint(checkpoint, model, optimizer, device=device, restore_rng=False)
    epoch: int = checkpoint["epoch"]
    return epoch
