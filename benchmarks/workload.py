"""What is saved: a GPT-like model with AdamW, and the means to tell whether what was loaded is what was saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

State = dict[str, Any]

_NUM_LAYERS = 10  # with weights, two moments and a step count each: about 500 tensors
_NUM_HEADS = 4
_VOCABULARY = 4096
_CONTEXT = 128
_PAGE_BYTES = 4096


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm_attention(x)).view(batch, length, 3, _NUM_HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        mixed: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm_mlp(x))))
        return mixed


class GPT(nn.Module):
    """A decoder with tied embeddings; `forward` gives the loss of predicting each next token."""

    def __init__(self, width: int, num_layers: int = _NUM_LAYERS) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(_VOCABULARY, width), nn.Embedding(_CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        logits = self.norm(self.blocks(x)) @ self.tokens.weight.T
        loss: torch.Tensor = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss


class Workload:
    """A model and an optimizer whose joint state takes about `num_bytes`; `step` changes every tensor of it."""

    def __init__(self, num_bytes: int) -> None:
        self.model = GPT(_width_for(num_bytes))
        self.optimizer = new_optimizer(self.model)
        for parameter in self.model.parameters():
            parameter.grad = torch.rand_like(parameter)
        self.num_steps = 0
        self.step()
        tensors = [leaf for leaf in flatten(self.state()).values() if isinstance(leaf, torch.Tensor)]
        self.num_tensors = len(tensors)
        self.num_bytes = sum(tensor.nbytes for tensor in tensors)

    def state(self) -> State:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "global_step": self.num_steps,
        }

    def step(self) -> None:
        self.optimizer.step()
        self.num_steps += 1


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def random_tokens(batch: int = 8, length: int = 65) -> torch.Tensor:
    return torch.randint(_VOCABULARY, (batch, length))


def _width_for(num_bytes: int) -> int:
    """Solve 12 layers·w² + (13 layers + vocabulary + context + 2)·w = parameters, to a multiple of 16."""
    num_parameters = num_bytes / 12  # four bytes each, and two moments
    square, linear = 12 * _NUM_LAYERS, 13 * _NUM_LAYERS + _VOCABULARY + _CONTEXT + 2
    width = (math.sqrt(linear**2 + 4 * square * num_parameters) - linear) / (2 * square)
    return max(16, round(width / 16) * 16)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The same nest of containers, with every tensor in it changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(change, child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(change, child) for child in value)
    return value


def flatten(value: Any) -> dict[str, Any]:
    """Every leaf by its path."""
    return dict(_leaves(value, "state"))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from _leaves(child, f"{path}[{index}]")
    else:
        yield path, value


class WrongBytesError(Exception):
    """What was loaded is not what was saved."""


class Expected:
    """A second copy of a state, in one warm page-aligned buffer that also serves the raw disk and memory figures."""

    def __init__(self, state: State) -> None:
        sizes = [_round_up(leaf.nbytes) for leaf in flatten(state).values() if isinstance(leaf, torch.Tensor)]
        self.buffer = aligned_buffer(sum(sizes))
        self.update(state)

    def update(self, state: State) -> None:
        self._leaves = flatten(place(state, self.buffer))
        with torch.no_grad():
            for path, leaf in flatten(state).items():
                if isinstance(leaf, torch.Tensor):
                    self._leaves[path].copy_(leaf)

    def check(self, loaded: Any, name: str) -> None:
        """Raise `WrongBytesError` unless `loaded` has the same leaves, bit for bit."""
        found = flatten(loaded)
        if found.keys() != self._leaves.keys():
            raise WrongBytesError(f"{name}: missing or too many: {sorted(found.keys() ^ self._leaves.keys())[:3]}")
        wrong = [path for path, leaf in self._leaves.items() if not _same(leaf, found[path])]
        if wrong:
            raise WrongBytesError(f"{name}: {len(wrong)} of {len(found)} values are not what was saved: {wrong[:3]}")


def place(state: State, buffer: torch.Tensor) -> State:
    """The same nest, its tensors one after the other in `buffer`, whatever that holds."""
    offset = 0

    def view(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal offset
        start, offset = offset, offset + _round_up(tensor.nbytes)
        return buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    placed: State = map_tensors(view, state)
    return placed


def aligned_buffer(num_bytes: int) -> torch.Tensor:
    """Touched memory that starts at a page, as O_DIRECT wants it; a whole number of pages."""
    num_bytes = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
    memory = torch.zeros(num_bytes + _PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE_BYTES
    return memory[start : start + num_bytes]


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


def _same(expected: Any, found: Any) -> bool:
    if not isinstance(expected, torch.Tensor):
        return type(expected) is type(found) and bool(expected == found)
    return isinstance(found, torch.Tensor) and expected.dtype == found.dtype and torch.equal(expected, found)
