"""A long run, in a process of its own: saves of all sizes through a manager and a saver that live from beginning to
end, and managers that come and go. Says what it holds, as lines of JSON.

    python soak.py DIRECTORY WRITER NUM_SAVES SEED
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asyncckpt import AsyncCheckpointSaver, CheckpointManager, CheckpointWriteError, SaveHandle, UnsafeCheckpointError
from reliability.resources import settled_usage
from reliability.writers import writer_options

NUM_KEPT = 3
NUM_PATHS = 4
SAVES_PER_ROUND = 40
LARGEST = 1_000_000  # floats
MEMORY_LIMIT = 10 << 20  # bytes; what is larger is streamed
STREAMED = 3_000_000
TIMEOUT_SECS = 120.0


class Training:
    """A model of two layers, the second of which may be exchanged for one of another size."""

    def __init__(self) -> None:
        self.step = 0
        self.resize(1000)

    def resize(self, numel: int) -> None:
        self.model = nn.ParameterDict({"small": torch.ones(10), "large": torch.ones(numel)})
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.advance()

    def advance(self) -> None:
        for parameter in self.model.values():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.step += 1

    def save(self, manager: CheckpointManager, **changes: Any) -> SaveHandle | None:
        loss = None if self.step % 3 == 0 else float(self.step % 7)
        return manager.save(self.model, self.optimizer, self.step // 10, self.step, val_loss=loss, **changes)


def sizes(chance: random.Random) -> Iterator[int]:
    """Growing, shrinking, random, each in turn; every round sees the largest."""
    while True:
        third = SAVES_PER_ROUND // 3
        growing = [LARGEST * (index + 1) // third for index in range(third)]
        yield from growing
        yield from reversed(growing)
        yield from (chance.randrange(1, LARGEST) for _ in range(SAVES_PER_ROUND - 2 * third))


class Soak:
    """All that is saved, and how often."""

    def __init__(self, directory: Path, writer: str, seed: int) -> None:
        self.directory = directory
        self.options = writer_options(writer)
        self.chance = random.Random(seed)
        self.sizes = sizes(self.chance)
        self.training = Training()
        self.paths = itertools.cycle(directory / "explicit" / f"{number}.pt" for number in range(NUM_PATHS))
        self.reset()
        directory.mkdir()
        (directory / "file").touch()

    def reset(self) -> None:
        self.num_saved = self.num_failed = self.num_refused = self.num_loaded = self.num_streamed = 0

    def manager(self, name: str, **options: Any) -> CheckpointManager:
        return CheckpointManager(self.directory / name, NUM_KEPT, **self.options, **options)

    def saver(self) -> AsyncCheckpointSaver:
        return AsyncCheckpointSaver(2, memory_limit=MEMORY_LIMIT, max_consecutive_failures=9, **self.options)

    def round(self, number: int, manager: CheckpointManager, saver: AsyncCheckpointSaver) -> None:
        """`SAVES_PER_ROUND` saves, and the failures among them."""
        snapshot = ("copy", "overlap")[number % 2]
        half = SAVES_PER_ROUND // 2
        for size in itertools.islice(self.sizes, half):
            self.training.resize(size)
            self.note(self.training.save(manager))
            self.training.advance()
            self.save_explicitly(saver, next(self.paths))
        self.save_explicitly(saver, next(self.paths), STREAMED)
        self.fail(manager, saver)
        with self.manager("coming and going", snapshot=snapshot) as passing:
            self.resume(passing)
            for _ in range(3):
                self.note(self.training.save(passing))
                self.training.advance()
        self.resume(manager)
        manager.wait(TIMEOUT_SECS)
        saver.wait(TIMEOUT_SECS)

    def save_explicitly(self, saver: AsyncCheckpointSaver, path: Path, numel: int | None = None) -> None:
        numel = numel or self.chance.randrange(1, LARGEST)
        self.num_streamed += 4 * numel > MEMORY_LIMIT
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of streaming
            self.note(saver.save({"weights": torch.ones(numel), "step": self.training.step}, path))

    def note(self, handle: SaveHandle | None) -> None:
        assert handle is not None
        self.num_saved += 1

    def fail(self, manager: CheckpointManager, saver: AsyncCheckpointSaver) -> None:
        """On the worker (a path through a file), and before anything is staged (what no safe load would open)."""
        for state in ({"weights": torch.ones(LARGEST)}, {"weights": torch.ones(STREAMED)}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                failure = saver.save(state, self.directory / "file" / "a.pt").exception(TIMEOUT_SECS)
            assert isinstance(failure, CheckpointWriteError), failure
            self.num_failed += 1
        try:
            self.training.save(manager, config={"optimizer": torch.optim.SGD})
        except UnsafeCheckpointError:
            self.num_refused += 1

    def resume(self, manager: CheckpointManager) -> None:
        """From the latest, whatever its size; what it returns is dropped."""
        manager.wait(TIMEOUT_SECS)
        latest = manager.latest
        if latest is None:
            return
        numel = int(torch.load(latest.filepath, weights_only=True)["model_state_dict"]["large"].numel())
        step = self.training.step
        self.training.resize(numel)
        _, checkpoint = manager.load_latest(self.training.model, self.training.optimizer)
        assert checkpoint["global_step"] == latest.global_step
        self.training.step = max(step, checkpoint["global_step"]) + 1
        self.num_loaded += 1

    def say(self, moment: str) -> None:
        files = {
            folder.name: sorted(path.name for path in folder.iterdir())
            for folder in self.directory.iterdir()
            if folder.is_dir()
        }
        counts = {name: value for name, value in vars(self).items() if name.startswith("num_")}
        print(
            json.dumps({"moment": moment, "files": files, **counts, **dataclasses.asdict(settled_usage())}), flush=True
        )


def main() -> None:
    directory, writer, num_saves, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    logging.disable()  # of the failures that are meant
    soak = Soak(directory, writer, seed)
    # The first use of everything imports, compiles and caches.
    with soak.manager("long") as manager, soak.saver() as saver:
        soak.round(0, manager, saver)
        soak.round(1, manager, saver)
    soak.reset()
    soak.say("start")
    with soak.manager("long") as manager, soak.saver() as saver:
        for number in itertools.count():
            soak.round(number, manager, saver)
            soak.say("running")
            if soak.num_saved >= num_saves:
                break
    del manager, saver
    soak.say("end")


if __name__ == "__main__":
    main()
