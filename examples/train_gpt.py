"""Train a small GPT on the source code of Python's own standard library, saving as it goes.

    python examples/train_gpt.py                            train, with a checkpoint every 10 steps
    python examples/train_gpt.py --resume                   go on from the newest checkpoint
    python examples/train_gpt.py --resume best              or from the best, a step (30), a file
    python examples/train_gpt.py --max-overhead 0.01        save as often as costs at most 1 % of the time

Kill it whenever you like: after `--resume` every loss is, to the last bit, what it would have been.

The model reads bytes, so there is no tokenizer, and the text is on every machine that runs Python. The defaults are
about 25 million parameters, 300 MB of state with Adam's moments, and half a second a step on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import asyncckpt

TEXT_BYTES = 8 << 20
VALIDATION_BYTES = 256 << 10  # the end of the text, which training never sees
NUM_VALIDATION_ROWS = 16


class Options(argparse.Namespace):
    layers: int
    width: int
    heads: int
    context: int
    batch_size: int
    activation_checkpointing: bool
    device: str
    learning_rate: float
    seed: int
    steps: int
    checkpoint_dir: Path
    max_checkpoints: int
    save_every: int
    max_overhead: float | None
    snapshot: Literal["copy", "overlap"]
    resume: str | None


# --- the training loop ---


def train(options: Options) -> None:
    """Train up to step `--steps`, from the start or from a checkpoint."""
    training = Training(options, options.steps)
    say(describe(training))
    config = {name: value for name, value in vars(options).items() if name not in ("checkpoint_dir", "resume")}
    with asyncckpt.CheckpointManager(
        options.checkpoint_dir,
        max_checkpoints=options.max_checkpoints,
        save_policy=save_policy(options),
        snapshot=options.snapshot,
        on_success=lambda info: say(f"durable: {info.filepath.name}"),
    ) as manager:
        if options.resume is not None:
            resume(training, manager, options.resume)
        while training.step < options.steps:
            loss = training.advance()
            say(f"step {training.step}  loss {loss:#.9g}")  # nine digits tell any two losses apart
            if manager.should_save(training.step) or training.step == options.steps:
                manager.save(
                    model=training.model,
                    optimizer=training.optimizer,
                    epoch=training.epoch,
                    global_step=training.step,
                    train_loss=loss,
                    val_loss=training.validate(),
                    scheduler=training.scheduler,
                    config=config,
                )
    say(f"every checkpoint in {options.checkpoint_dir} is durable")  # leaving the block has waited for that


def resume(training: Training, manager: asyncckpt.CheckpointManager, source: str) -> None:
    """Go back to a checkpoint: "latest", "best", a step or a file. Damaged ones are passed over for older ones."""
    restored = (training.model, training.optimizer, training.scheduler, training.device)
    if source == "latest":
        _, checkpoint = manager.load_latest(*restored)
    elif source == "best":
        _, checkpoint = manager.load_best(*restored)
    else:
        _, checkpoint = manager.load(int(source) if source.isdigit() else source, *restored)
    training.step = checkpoint.get("global_step", 0)
    if checkpoint:
        say(f"resumed after step {training.step}")
    else:
        say(f"no checkpoint in {manager.checkpoint_dir}: starting from the beginning")


def save_policy(options: Options) -> asyncckpt.EverySteps | asyncckpt.AdaptiveInterval:
    if options.max_overhead is not None:
        return asyncckpt.AdaptiveInterval(max_overhead=options.max_overhead)
    return asyncckpt.EverySteps(options.save_every)


def say(line: str) -> None:
    """Print it in one write, since callbacks come from another thread."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# --- one training step ---


class Training:
    """The model, what trains it, and how far it is: all that changes as training goes on."""

    def __init__(self, options: Options, num_steps: int) -> None:
        torch.manual_seed(options.seed)
        self.device = _device(options.device)
        self.text = standard_library_text()
        self.batch_shape = (options.batch_size, options.context)
        self.model = ByteGPT(options).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.learning_rate, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _warm_up_and_cosine(num_steps))
        self.step = 0

    @property
    def epoch(self) -> int:
        """How often as many bytes as the text has were read."""
        return self.step * math.prod(self.batch_shape) // len(self.text)

    def advance(self) -> float:
        """One step. Returns its loss once all of it is done, on a GPU too."""
        num_rows, length = self.batch_shape
        # torch's generator draws the batches, and the checkpoint holds its state: a resumed run draws the same ones.
        starts = torch.randint(len(self.text) - VALIDATION_BYTES - length, (num_rows, 1))
        loss = self._loss(starts)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def validate(self) -> float:
        """The loss on text held back. Draws no random numbers, so that training is the same with it or without."""
        first = len(self.text) - VALIDATION_BYTES
        stride = (VALIDATION_BYTES - self.batch_shape[1]) // NUM_VALIDATION_ROWS
        self.model.eval()
        loss = self._loss(torch.arange(NUM_VALIDATION_ROWS)[:, None] * stride + first)
        self.model.train()
        return loss.item()

    def _loss(self, starts: Tensor) -> Tensor:
        """Of predicting the rows of text that begin at `starts`, (rows, 1) int64."""
        rows = self.text[starts + torch.arange(self.batch_shape[1] + 1)].to(self.device, torch.int64)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return functional.cross_entropy(self.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def standard_library_text() -> Tensor:
    """The bytes of the standard library's modules, in alphabetical order."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(path.read_bytes() for path in paths)[:TEXT_BYTES]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _warm_up_and_cosine(num_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate: up over the first steps, then half a cosine down to a tenth."""
    num_rising = min(20, 1 + num_steps // 10)

    def factor(step: int) -> float:
        if step < num_rising:
            return (step + 1) / num_rising
        progress = min(1.0, (step - num_rising) / max(1, num_steps - num_rising))
        return 0.55 + 0.45 * math.cos(math.pi * progress)

    return factor


# --- the model ---


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        projected = self.queries_keys_values(self.attention_norm(x))
        heads = projected.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.attention_output(attended.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.perceptron(x)
        return out


class ByteGPT(nn.Module):
    """Predicts the next byte at every position: (batch, length) int64 in, (batch, length, 256) out."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.activation_checkpointing = options.activation_checkpointing
        self.bytes = nn.Embedding(256, options.width)
        self.positions = nn.Embedding(options.context, options.width)
        self.blocks = nn.ModuleList(Block(options.width, options.heads) for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.width)
        self.head = nn.Linear(options.width, 256, bias=False)
        self.apply(_initialize)
        self.head.weight = self.bytes.weight

    def forward(self, text: Tensor) -> Tensor:
        x: Tensor = self.bytes(text) + self.positions.weight[: text.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.activation_checkpointing else block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# --- the command line ---


def describe(training: Training) -> str:
    num_parameters = sum(parameter.numel() for parameter in training.model.parameters())
    state_bytes = 3 * sum(parameter.nbytes for parameter in training.model.parameters())  # and Adam's two moments
    on_cpu = training.device.type == "cpu"
    machine = f"{os.cpu_count()} CPU cores" if on_cpu else torch.cuda.get_device_name(training.device)
    rows, length = training.batch_shape
    return (
        f"GPT of {num_parameters / 1e6:.1f} M parameters, {state_bytes / 1e6:,.0f} MB of state, "
        f"on {len(training.text) / 1e6:.1f} MB of Python source, {rows} x {length} bytes a step; "
        f"{machine}, torch {torch.__version__}"
    )


def training_options() -> argparse.ArgumentParser:
    """The options that make the model and its training; a parent for parsers that add to them."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("model and training")
    group.add_argument("--layers", type=int, default=8)
    group.add_argument("--width", type=int, default=512)
    group.add_argument("--heads", type=int, default=8)
    group.add_argument("--context", type=int, default=64, help="bytes that the model looks back")
    group.add_argument("--batch-size", type=int, default=4)
    group.add_argument("--activation-checkpointing", action="store_true", help="less memory, more computing")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.add_argument("--learning-rate", type=float, default=5e-4)
    group.add_argument("--seed", type=int, default=0)
    return parser


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[training_options()]
    )
    parser.add_argument("--steps", type=int, default=50, help="up to which step to train")
    saving = parser.add_argument_group("saving")
    saving.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints"))
    saving.add_argument("--max-checkpoints", type=int, default=5, help="how many to keep; and the best")
    when = saving.add_mutually_exclusive_group()
    when.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    when.add_argument("--max-overhead", type=float, metavar="FRACTION", help="save as often as this allows")
    saving.add_argument("--snapshot", choices=("copy", "overlap"), default="overlap")
    saving.add_argument("--resume", nargs="?", const="latest", metavar="latest|best|STEP|PATH")
    return parser.parse_args(namespace=Options())


if __name__ == "__main__":
    train(parse_options())
