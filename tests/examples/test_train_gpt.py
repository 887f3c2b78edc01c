"""The training script does what it prints: it learns, and goes on after a kill as if nothing had happened."""

from __future__ import annotations

import os
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import EXAMPLES, ONE_THREAD, TINY, assert_same, command, losses, run, state

import asyncckpt

NUM_STEPS = 120
OPTIONS = (*TINY, "--steps", str(NUM_STEPS), "--max-checkpoints", "10")
Uninterrupted = tuple[str, Path]


def train(*options: str | Path) -> str:
    return run("train_gpt.py", *OPTIONS, *options).stdout


def checkpoints(directory: Path) -> dict[int, Path]:
    """The files that the registry lists, by their steps."""
    infos = asyncckpt.CheckpointManager(directory).list_checkpoints()
    return {info.global_step: info.filepath for info in infos if info.global_step is not None}


def assert_same_checkpoints(directory: Path, expected_directory: Path) -> None:
    paths, expected = checkpoints(directory), checkpoints(expected_directory)
    assert list(paths) == list(expected)
    for step, path in paths.items():
        assert_same(state(path), state(expected[step]))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """The output and the checkpoints of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return train("--save-every", "20", "--checkpoint-dir", directory), directory


def test_loss_falls(uninterrupted: Uninterrupted) -> None:
    """Text is learned, and not by heart: the last steps and validations are well below the first."""
    output, directory = uninterrupted
    by_step = {step: float(loss) for step, loss in losses(output).items()}
    assert sorted(by_step) == list(range(1, NUM_STEPS + 1))
    assert statistics.mean(by_step[step] for step in range(NUM_STEPS - 9, NUM_STEPS + 1)) < by_step[1] - 1
    val_losses = [state(path)["val_loss"] for path in checkpoints(directory).values()]
    assert val_losses[-1] < val_losses[0] - 0.5


def test_validation_is_on_text_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training never reads a byte that validation does."""
    script = runpy.run_path(str(EXAMPLES / "train_gpt.py"))
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, "--batch-size", "1000"])
    training = script["Training"](script["parse_options"](), num_steps=10)
    length = training.batch_shape[1]
    starts: list[torch.Tensor] = []
    compute = training._loss

    def recorded(rows: torch.Tensor) -> torch.Tensor:
        starts.append(rows)
        loss: torch.Tensor = compute(rows)
        return loss

    training._loss = recorded
    training.advance()
    training.validate()
    first = len(training.text) - script["VALIDATION_BYTES"]
    assert int(starts[0].max()) + length < first
    assert int(starts[1].min()) >= first
    assert int(starts[1].max()) + length < len(training.text)


def test_every_checkpoint_is_announced(uninterrupted: Uninterrupted) -> None:
    """The saves are acknowledged in their order, and the directory lists the same."""
    output, directory = uninterrupted
    announced = re.findall(r"^durable: (\S+)$", output, re.MULTILINE)
    assert announced == [path.name for path in checkpoints(directory).values()]
    assert list(checkpoints(directory)) == list(range(20, NUM_STEPS + 1, 20))


def test_killed_run_goes_on(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """After SIGKILL, `--resume` goes on from the newest whole checkpoint, and every later step is bit-equal."""
    options = ("--save-every", "20", "--checkpoint-dir", tmp_path)
    script = command("train_gpt.py", *OPTIONS, *options)
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD}) as process:
        assert process.stdout is not None
        durable = (line for line in process.stdout if line.startswith("durable: "))
        next(durable)
        next(durable)
        process.kill()
    before = checkpoints(tmp_path)
    *_, older, newest = sorted(before)
    assert newest < NUM_STEPS, "it was over before it could be killed"
    whole = before[newest].read_bytes()
    before[newest].write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"checkpoint_epoch0000_step{NUM_STEPS - 1:08}_loss0.0000.pt").write_bytes(whole[: len(whole) // 2])

    resumed = run("train_gpt.py", *OPTIONS, *options, "--resume")
    assert before[newest].name in resumed.stderr
    assert f"resumed after step {older}\n" in resumed.stdout
    expected_output, expected_directory = uninterrupted
    expected = losses(expected_output)
    assert losses(resumed.stdout) == {step: expected[step] for step in range(older + 1, NUM_STEPS + 1)}
    assert_same_checkpoints(tmp_path, expected_directory)


@pytest.mark.parametrize("source", ["best", "40", "path"])
def test_resume_from(source: str, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """The best, a step and a file are found, and the run from there is bit-equal."""
    expected_output, directory = uninterrupted
    best = asyncckpt.CheckpointManager(directory).best
    assert best is not None
    start = {"best": best.global_step, "40": 40, "path": 80}[source]
    assert start is not None
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in directory.iterdir():
        (copies / path.name).write_bytes(path.read_bytes())
    named = str(checkpoints(copies)[80]) if source == "path" else source
    output = train("--checkpoint-dir", copies, "--resume", named)
    assert f"resumed after step {start}\n" in output
    expected = losses(expected_output)
    assert losses(output) == {step: expected[step] for step in range(start + 1, NUM_STEPS + 1)}


def test_nothing_to_resume_from(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """In an empty directory `--resume` starts from the beginning, so that one command serves a restarted job."""
    output = train("--checkpoint-dir", tmp_path, "--save-every", "60", "--resume")
    assert "starting from the beginning" in output
    assert losses(output) == losses(uninterrupted[0])


def test_activation_checkpointing(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """Recomputing the activations, and saving in another way, change no loss and no file."""
    options = ("--save-every", "20", "--checkpoint-dir", tmp_path, "--snapshot", "copy")
    output = train(*options, "--activation-checkpointing")
    assert losses(output) == losses(uninterrupted[0])
    assert_same_checkpoints(tmp_path, uninterrupted[1])


def test_saving_by_cost(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """With `--max-overhead` the saves come when they are worth it, at the first step for a measure; the losses stay."""
    output = train("--checkpoint-dir", tmp_path, "--max-overhead", "0.01")
    assert losses(output) == losses(uninterrupted[0])
    assert re.search(r"^durable: \S+_step00000001_", output, re.MULTILINE)
    assert NUM_STEPS in checkpoints(tmp_path)
