"""Models of which each rank has only a part: not what one file written by one rank can hold."""

from __future__ import annotations

import torch

from asyncckpt.errors import UnsupportedStateError


def check_replicated(model: torch.nn.Module) -> None:
    """Raise `UnsupportedStateError`, naming the parameter or module, if the model is sharded over the ranks."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UnsupportedStateError(_reason(f"the module {name or 'itself'}"))
    for name, parameter in model.named_parameters():
        if type(parameter.data).__module__.startswith("torch.distributed."):  # a DTensor; importing it takes a second
            raise UnsupportedStateError(_reason(name))


def _reason(what: str) -> str:
    return (
        f"{what} is sharded over the ranks (FSDP, tensor parallelism), and a checkpoint written by rank 0 would hold "
        "only its part; save sharded models with torch.distributed.checkpoint"
    )
