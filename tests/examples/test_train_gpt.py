"""The example does what it prints: it compares, learns, and goes on after a kill as if nothing had happened."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "train_gpt.py"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # so small a model is faster so, above all on a busy machine
TINY = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "16", "--device", "cpu", "--log-every", "1"]


def command(*options: str | Path) -> list[str]:
    return [sys.executable, "-W", "error", str(SCRIPT), *TINY, *map(str, options)]


def run(*options: str | Path, cwd: Path | None = None) -> str:
    completed = subprocess.run(command(*options), capture_output=True, text=True, timeout=120, cwd=cwd, env=ONE_THREAD)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def losses(output: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"^step (\d+)  loss (\S+)$", output, re.MULTILINE)}


def state(directory: Path, step: int) -> dict[str, object]:
    loaded: dict[str, object] = torch.load(directory / f"step-{step:08}.pt", weights_only=True)
    return loaded


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The output and the checkpoints of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return run("--steps", "120", "--save-every", "20", "--checkpoint-dir", directory), directory


def test_comparison(tmp_path: Path) -> None:
    """All four rows with figures in them, each kind of file read back in both ways, and nothing left behind."""
    output = run("--compare", "--rounds", "2", "--save-every", "4", cwd=tmp_path)
    num_durations = {"no saving": 1, "torch.save + fsync": 4, "asyncckpt copy": 4, "asyncckpt overlap": 4}
    for title, expected in num_durations.items():
        row = re.search(rf"^ *{re.escape(title)} +(\d.*)$", output, re.MULTILINE)
        assert row is not None, output
        assert len(re.findall(r"[\d.]+ m?s\b", row[1])) == expected, output
    for name in ("torch", "copy", "overlap"):
        assert re.search(rf"^{name}-round-2\.pt, step \d+: .* agree in every tensor", output, re.MULTILINE), output
    assert list(tmp_path.iterdir()) == []


def test_loss_falls(uninterrupted: tuple[str, Path]) -> None:
    """Text is learned: the last steps are well below the first."""
    by_step = {step: float(loss) for step, loss in losses(uninterrupted[0]).items()}
    assert sorted(by_step) == list(range(1, 121))
    assert statistics.mean(by_step[step] for step in range(111, 121)) < by_step[1] - 1


def test_killed_run_goes_on(uninterrupted: tuple[str, Path], tmp_path: Path) -> None:
    """After SIGKILL, `--resume` goes on behind the newest whole file, and every later step is bit-equal."""
    options = ("--steps", "120", "--save-every", "20", "--checkpoint-dir", tmp_path)
    with subprocess.Popen(command(*options), stdout=subprocess.PIPE, text=True, env=ONE_THREAD) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("step ") and list(tmp_path.glob("step-*.pt")))
        process.kill()
    saved = max(int(path.stem.removeprefix("step-")) for path in tmp_path.glob("step-*.pt"))
    assert saved < 119, "it was over before it could be killed"
    whole = (tmp_path / f"step-{saved:08}.pt").read_bytes()
    (tmp_path / "step-00000119.pt").write_bytes(whole[: len(whole) // 2])  # as a killed torch.save leaves it

    output = run(*options, "--resume")
    assert re.search(r"^skipped: .*step-00000119\.pt", output, re.MULTILINE)
    assert f"resumed after step {saved} from" in output
    expected_output, expected_directory = uninterrupted
    expected = losses(expected_output)
    assert losses(output) == {step: expected[step] for step in range(saved + 1, 121)}
    for step in range(20, 121, 20):
        torch.testing.assert_close(state(tmp_path, step), state(expected_directory, step), rtol=0, atol=0)


def test_activation_checkpointing(uninterrupted: tuple[str, Path], tmp_path: Path) -> None:
    """Recomputing the activations, and saving in another way, change no loss and no file."""
    options = ("--steps", "120", "--save-every", "60", "--checkpoint-dir", tmp_path)
    output = run(*options, "--activation-checkpointing", "--method", "torch")
    assert losses(output) == losses(uninterrupted[0])
    torch.testing.assert_close(state(tmp_path, 60), state(uninterrupted[1], 60), rtol=0, atol=0)
