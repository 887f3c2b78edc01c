"""Random states: many kinds of tensors of mixed sizes, some sharing storages."""

from __future__ import annotations

import random
from typing import Any

import torch

_DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
)
_DTYPES += (torch.complex64, torch.float8_e4m3fn, torch.uint16)
_SIZES = (0, 1, 7, 63, 64, 65, 1000, 4096, 100_000, 1 << 20, (1 << 20) + 3, 3 << 20)


def random_tensor(rng: random.Random, max_bytes: int = 4 << 20) -> torch.Tensor:
    """Random bits (NaN among them) of a random type and size; sometimes a view of something larger."""
    dtype = rng.choice(_DTYPES)
    num_bytes = rng.choice([size for size in _SIZES if size <= max_bytes]) // dtype.itemsize * dtype.itemsize
    content = bytearray(rng.randbytes(num_bytes))
    if dtype is torch.bool:
        content = bytearray(byte & 1 for byte in content)
    if not content:
        return torch.empty(0, dtype=dtype)
    tensor = torch.empty(num_bytes // dtype.itemsize, dtype=dtype)
    tensor.view(torch.uint8).copy_(torch.frombuffer(content, dtype=torch.uint8))
    if tensor.numel() > 10 and rng.random() < 0.3:
        return tensor[2:-3:2]
    return tensor


def random_state(seed: int, max_tensors: int = 30, max_bytes: int = 4 << 20) -> dict[str, Any]:
    """Up to `max_tensors` tensors in nested containers, with plain values between them."""
    rng = random.Random(seed)
    tensors = [random_tensor(rng, max_bytes) for _ in range(rng.randint(1, max_tensors))]
    state: dict[str, Any] = {"seed": seed, "list": [], "nested": {"ü": {}}}
    for index, tensor in enumerate(tensors):
        state["nested"]["ü"][f"weight.{index}"] = tensor
        if rng.random() < 0.3:
            state["list"].append({index: (tensor, tensor[:1], rng.random())})
    return state
