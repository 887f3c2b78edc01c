"""Sharded models are refused, not saved in part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from asyncckpt import CheckpointManager, UnsupportedStateError, save_distributed_checkpoint


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_sharded_models_are_refused(alone: None, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        CheckpointManager(tmp_path / "run") as manager,
        pytest.raises(UnsupportedStateError, match=r"0\.weight is sharded"),
    ):
        manager.save(model, optimizer, 1, 1, 0.5, 0.5)
    with pytest.raises(UnsupportedStateError, match="sharded"):
        save_distributed_checkpoint(model, optimizer, 1, tmp_path / "x.pt")
    assert not (tmp_path / "run").exists()
