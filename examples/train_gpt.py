"""Train a small GPT on the source code of Python's own standard library, saving as it goes.

    python examples/train_gpt.py --compare                          what each way of saving costs, side by side
    python examples/train_gpt.py --method overlap --steps 100       train, saving every 10 steps
    python examples/train_gpt.py --method overlap --steps 200 --resume

The model reads bytes, so there is no tokenizer, and the text is on every machine that runs Python. The defaults are
about 25 million parameters, 300 MB of state with Adam's moments, and half a second a step on two CPU cores.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import asyncckpt

TEXT_BYTES = 8 << 20
NUM_WARM_UP_STEPS = 8
COMPARE_SECS = 160.0


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
    method: str
    save_every: int
    checkpoint_dir: Path
    resume: bool
    log_every: int
    compare: bool
    rounds: int


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


# --- the training ---


class Training:
    """Everything that changes as training goes on, and so everything that a checkpoint holds."""

    def __init__(self, options: Options, num_steps: int) -> None:
        torch.manual_seed(options.seed)
        self.device = _device(options.device)
        self.text = standard_library_text()
        self.batch_shape = (options.batch_size, options.context)
        self.model = ByteGPT(options).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.learning_rate, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _warm_up_and_cosine(num_steps))
        self.step = 0
        self.loss = math.nan

    def advance(self) -> float:
        """One step. Returns its loss once all of it is done, on a GPU too."""
        inputs, targets = self._next_batch()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        self.loss = loss.item()
        return self.loss

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),  # draws the batches, on whatever device the model is
            "step": self.step,
            "loss": self.loss,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]
        self.loss = state["loss"]

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        num_rows, length = self.batch_shape
        starts = torch.randint(len(self.text) - length, (num_rows, 1))
        rows = self.text[starts + torch.arange(length + 1)].to(self.device, torch.int64)
        return rows[:, :-1], rows[:, 1:]


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


# --- the ways of saving ---


class Method:
    """A way of saving. This one does not save."""

    title = "no saving"

    def prepare(self, training: Training) -> None:
        """Called once, as soon as the state has its final size."""

    def save(self, training: Training, path: Path) -> asyncckpt.SaveHandle | None:
        """Returns a handle while the save goes on in the background, None if it is over."""
        return None

    def close(self) -> None:
        """Returns once everything is durable."""


class TorchSave(Method):
    """torch.save as everybody calls it, then the fsync without which a power loss may take the file."""

    title = "torch.save + fsync"

    def __init__(self) -> None:
        self.fsync_secs: list[float] = []

    def save(self, training: Training, path: Path) -> None:
        torch.save(training.state(), path)
        started = time.perf_counter()
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self.fsync_secs.append(time.perf_counter() - started)


class AsyncSave(Method):
    """asyncckpt: "copy" copies the state and returns, "overlap" copies it during the next forward and backward."""

    def __init__(self, snapshot: Literal["copy", "overlap"]) -> None:
        self.title = f"asyncckpt {snapshot}"
        self.saver = asyncckpt.AsyncCheckpointSaver(snapshot=snapshot)

    def prepare(self, training: Training) -> None:
        self.saver.prepare(training.state())

    def save(self, training: Training, path: Path) -> asyncckpt.SaveHandle:
        return self.saver.save(training.state(), path, optimizers=[training.optimizer], modules=[training.model])

    def close(self) -> None:
        self.saver.close()


METHODS: Mapping[str, Callable[[], Method]] = {
    "none": Method,
    "torch": TorchSave,
    "copy": lambda: AsyncSave("copy"),
    "overlap": lambda: AsyncSave("overlap"),
}


# --- a single run ---


def train(options: Options) -> None:
    """Train up to `--steps`, from the start or from the newest checkpoint, saving every `--save-every` steps."""
    training = Training(options, options.steps)
    print(_describe(training))
    if options.resume:
        resume(training, options.checkpoint_dir)
    options.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    prepared = False
    with contextlib.closing(METHODS[options.method]()) as method:
        while training.step < options.steps:
            loss = training.advance()
            if not prepared:  # only now: the first step has made the optimizer's state
                method.prepare(training)
                prepared = True
            if training.step % options.save_every == 0:
                method.save(training, options.checkpoint_dir / f"step-{training.step:08}.pt")
            if training.step % options.log_every == 0 or training.step == options.steps:
                print(f"step {training.step}  loss {loss:.6f}", flush=True)
    if options.method != "none":
        print(f"the checkpoints in {options.checkpoint_dir} are durable")


def resume(training: Training, directory: Path) -> None:
    """Go back to the newest checkpoint that is whole; without any, start from the beginning."""
    for path in sorted(directory.glob("step-*.pt"), reverse=True):
        try:
            # Into memory, not mapped: an optimizer keeps the very tensors that it is given.
            training.restore(asyncckpt.load(path, mmap=False))
        except asyncckpt.CorruptCheckpointError as error:  # a torch.save that was killed
            print(f"skipped: {error}")
        else:
            print(f"resumed after step {training.step} from {path}")
            return
    print(f"no checkpoint in {directory}: starting from the beginning")


# --- the comparison ---


@dataclass
class Turn:
    """What one method's steps in one round took, with one save among them."""

    losses: list[float] = field(default_factory=list)
    quiet_steps: list[float] = field(default_factory=list)
    writing_steps: list[float] = field(default_factory=list)  # begun while the save was being written
    wait_secs: float = 0.0
    durable_secs: float = 0.0
    rest_secs: float = 0.0  # how long the write outlasted the last step

    def cost_secs(self) -> float:
        """What the save cost the training: waiting, and steps slower than the turn's others.

        Its own steps are the measure, not another turn, because a shared machine's speed changes by the second.
        """
        slower = sum(self.writing_steps) - len(self.writing_steps) * statistics.median(self.quiet_steps)
        return self.wait_secs + slower + self.rest_secs


def compare(options: Options) -> None:
    """Train one model while the methods take turns, and print what each of them cost it."""
    num_steps = NUM_WARM_UP_STEPS + options.rounds * len(METHODS) * options.save_every
    training = Training(options, num_steps)
    print(_describe(training))
    folder = tempfile.TemporaryDirectory(prefix="train-gpt-", dir=options.checkpoint_dir.parent)
    with folder as directory, contextlib.ExitStack() as stack:
        methods = {name: stack.enter_context(contextlib.closing(make())) for name, make in METHODS.items()}
        first_loss = training.advance()
        for _ in range(NUM_WARM_UP_STEPS - 1):
            training.advance()
        for method in methods.values():
            method.prepare(training)
        turns, files = run_rounds(training, methods, Path(directory), options)
        report(methods, turns, options)
        last_losses = [loss for taken in turns.values() for loss in taken[-1].losses]
        print(f"Loss: {first_loss:.2f} at the first step, {statistics.mean(last_losses):.2f} in the last round.")
        for path in files.values():
            reopen(path)


def run_rounds(
    training: Training, methods: Mapping[str, Method], directory: Path, options: Options
) -> tuple[dict[str, list[Turn]], dict[str, Path]]:
    """The turns of each method, and the last file of each that saves. Stops early on a slow machine.

    The methods share one model and take turns, each round in another order, so that whatever else the machine is
    doing meets all of them.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in methods}
    files: dict[str, Path] = {}
    started = time.perf_counter()
    for round_index in range(options.rounds):
        first = round_index % len(methods)
        for name in [*methods][first:] + [*methods][:first]:
            path = directory / f"{name}-round-{round_index + 1}.pt"
            turns[name].append(take_turn(training, methods[name], path, options.save_every))
            if path.exists():
                if name in files:
                    files[name].unlink()
                files[name] = path
        loss = statistics.mean(loss for taken in turns.values() for loss in taken[-1].losses)
        print(f"round {round_index + 1} of {options.rounds}  step {training.step}  loss {loss:.3f}", flush=True)
        secs_per_round = (time.perf_counter() - started) / (round_index + 1)
        if (round_index + 2) * secs_per_round > COMPARE_SECS:  # the next would be over it
            break
    return turns, files


def take_turn(training: Training, method: Method, path: Path, num_steps: int) -> Turn:
    turn = Turn()
    handle: asyncckpt.SaveHandle | None = None
    for index in range(num_steps):
        writing = handle is not None and not handle.done()
        started = time.perf_counter()
        turn.losses.append(training.advance())
        (turn.writing_steps if writing else turn.quiet_steps).append(time.perf_counter() - started)
        if index == num_steps // 4:  # early, so that the steps that the write may slow down are seen
            started = time.perf_counter()
            handle = method.save(training, path)
            turn.wait_secs = turn.durable_secs = time.perf_counter() - started
    if handle is not None:
        started = time.perf_counter()
        handle.result()
        turn.rest_secs = time.perf_counter() - started
        turn.durable_secs = handle.timings.durable_secs
        turn.wait_secs += handle.timings.fence_secs
        if turn.writing_steps:
            turn.writing_steps[0] -= handle.timings.fence_secs  # counted as waiting
    return turn


def report(methods: Mapping[str, Method], turns: Mapping[str, list[Turn]], options: Options) -> None:
    """Print the table: medians over the rounds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in (
        "step",
        "training waits\nfor a save",
        "steps while\nit is written",
        "durable\nafter",
        "all in all,\na save costs",
        f"overhead, a save\nevery {options.save_every} steps",
    ):
        table.add_column(heading, justify="right")
    for name, method in methods.items():
        table.add_row(method.title, *_cells(turns[name], saves=name != "none"))
    Console(width=max(110, Console().width)).print(table)  # a pipe would be 80 wide, which is too narrow
    print(_footnotes(methods, turns, options))


def _cells(turns: Sequence[Turn], saves: bool) -> list[str]:
    quiet_secs = statistics.median(secs for turn in turns for secs in turn.quiet_steps)
    if not saves:
        return [_duration(quiet_secs)]
    slower = [secs / statistics.median(turn.quiet_steps) - 1 for turn in turns for secs in turn.writing_steps]
    cost_secs = statistics.median(turn.cost_secs() for turn in turns)
    num_steps = len(turns[0].losses)
    return [
        _duration(quiet_secs),
        _duration(statistics.median(turn.wait_secs for turn in turns)),
        f"{statistics.median(slower):+.0%}" if slower else "",
        _duration(statistics.median(turn.durable_secs for turn in turns)),
        _duration(cost_secs),
        f"{cost_secs / (num_steps * quiet_secs):+.1%}",
    ]


def _footnotes(methods: Mapping[str, Method], turns: Mapping[str, list[Turn]], options: Options) -> str:
    torch_save = methods["torch"]
    assert isinstance(torch_save, TorchSave)
    fsync_secs = statistics.median(torch_save.fsync_secs)
    unsaved = turns["none"]
    noise = statistics.median(
        abs(secs / statistics.median(turn.quiet_steps) - 1) for turn in unsaved for secs in turn.quiet_steps
    )
    return (
        f"Medians over {len(unsaved)} rounds: the methods train one model in turns of {options.save_every} steps.\n"
        "Training waits in the call that saves; with overlap also in optimizer.step, until the copy is done.\n"
        f"The fsync is {_duration(fsync_secs)} of torch.save's wait; without it a power loss may take the file.\n"
        "All in all: the wait, and how much slower than their neighbours the steps during the write are.\n"
        f"Steps of a turn without a save differ by {noise:.0%} typically"
        + ("." if noise < 0.1 else ": the machine is busy, so run this again when it is not.")
    )


def reopen(path: Path) -> None:
    """Read a checkpoint back in both ways, and insist that they agree."""
    ours = asyncckpt.load(path)  # checks every byte
    plain = torch.load(path, weights_only=True, mmap=True)
    if not same(ours, plain):
        raise SystemExit(f"{path.name}: asyncckpt.load and torch.load disagree")
    print(f"{path.name}, step {ours['step']}: asyncckpt.load (verified) and plain torch.load agree in every tensor.")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# --- odds and ends ---


def _describe(training: Training) -> str:
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


def _duration(secs: float) -> str:
    return f"{secs:.2f} s" if abs(secs) >= 1 else f"{secs * 1000:.0f} ms"


def parse_options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=int, default=8)
    model.add_argument("--width", type=int, default=512)
    model.add_argument("--heads", type=int, default=8)
    model.add_argument("--context", type=int, default=64, help="bytes that the model looks back")
    model.add_argument("--batch-size", type=int, default=4)
    model.add_argument("--activation-checkpointing", action="store_true", help="less memory, more computing")
    model.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=50, help="up to which step to train")
    training.add_argument("--learning-rate", type=float, default=5e-4)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--log-every", type=int, default=5, metavar="STEPS")
    saving = parser.add_argument_group("saving")
    saving.add_argument("--method", choices=tuple(METHODS), default="overlap")
    saving.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    saving.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints"))
    saving.add_argument("--resume", action="store_true", help="go on from the newest checkpoint there")
    comparison = parser.add_argument_group("comparison")
    comparison.add_argument("--compare", action="store_true", help="compare the ways of saving; keeps no files")
    comparison.add_argument("--rounds", type=int, default=8, help="saves with each method")
    return parser.parse_args(namespace=Options())


def main() -> None:
    options = parse_options()
    if options.compare:
        compare(options)
    else:
        train(options)


if __name__ == "__main__":
    main()
