"""The benchmarks run, write what they promise, and notice wrong bytes. No timing is asserted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt import CorruptCheckpointError
from benchmarks import __main__ as command
from benchmarks.methods import MAKERS, AsyncckptCopy, Method, TorchSave
from benchmarks.remote import RemoteResults, Uploads, measure_remote
from benchmarks.remote_methods import REMOTE_METHODS
from benchmarks.remote_report import judge_remote, remote_markdown
from benchmarks.samples import Samples
from benchmarks.saving import measure_saving
from benchmarks.workload import Expected, Workload, WrongBytesError

_ROOT = Path(__file__).resolve().parents[2]
_TINY_BYTES = 1_000_000
_LARGE_UPLOAD_BYTES = 20_000_000  # in parts, and for obstore


@pytest.mark.slow  # twelve processes that import torch
@pytest.mark.timeout(900)
def test_a_quick_run_writes_the_tables_and_the_plot(tmp_path: Path) -> None:
    """Every method, every target and every section is in RESULTS.md, beside a small picture."""
    arguments = ["--quick", "--gigabytes", "0.002", "--directory", str(tmp_path), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "COLUMNS": "200"}
    subprocess.run([sys.executable, "-m", "benchmarks", *arguments], check=True, cwd=_ROOT, env=environment)
    page = (tmp_path / "out" / "RESULTS.md").read_text(encoding="utf-8")
    for make in MAKERS.values():
        name = re.escape(make().name)
        assert len(re.findall(rf"^\| {name} \|", page, re.MULTILINE)) >= 1
    for section in (
        *("Targets", "Saving", "Training while a save is written", "A busy Python thread while a save is written"),
        *("Loading", "Planning and importing"),
    ):
        assert f"## {section}\n" in page
    assert len(re.findall(r"\| (?:met|\*\*not met\*\*|does not apply) \|", page)) == 20
    assert str(tmp_path) not in page
    assert 0 < (tmp_path / "out" / "results.png").stat().st_size < 150_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("method_type", [TorchSave, AsyncckptCopy])
def test_a_flipped_bit_is_noticed(tmp_path: Path, method_type: type[Method]) -> None:
    """torch.load does not notice it, so the comparison has to; asyncckpt.load refuses the file itself."""
    workload, path, method = Workload(_TINY_BYTES), tmp_path / "state.pt", method_type()
    expected = Expected(workload.state())
    method.save(workload, workload.state(), path)
    method.finish()
    method.close()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises((WrongBytesError, CorruptCheckpointError)):
        expected.check(method.load(path, workload.state()), method.name)


def test_stale_data_is_noticed() -> None:
    """Every tensor changes with a step, so an older checkpoint never passes for the present one."""
    workload = Workload(_TINY_BYTES)
    expected = Expected(workload.state())
    expected.check(workload.state(), "same")
    workload.step()
    with pytest.raises(WrongBytesError, match=rf"{workload.num_tensors + 1} of \d+ values"):
        expected.check(workload.state(), "a step later")


def test_a_missing_tensor_is_noticed() -> None:
    workload = Workload(_TINY_BYTES)
    expected = Expected(workload.state())
    state = workload.state()
    del state["model"]["norm.bias"]
    with pytest.raises(WrongBytesError, match=r"norm\.bias"):
        expected.check(state, "incomplete")


def test_a_snapshot_that_aliases_is_caught_in_the_first_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that writes what the state has become since `save` does not get through."""

    class Aliasing(TorchSave):
        in_background = True

        def save(self, workload: Workload, state: dict[str, Any], path: Path) -> None:
            self._job = (state, path)

        def finish(self) -> None:
            torch.save(*self._job)

    monkeypatch.setattr("benchmarks.saving.MAKERS", {"aliasing": Aliasing})
    with pytest.raises(WrongBytesError):
        measure_saving(_TINY_BYTES, 1, tmp_path, lambda what: None)


@pytest.mark.parametrize("error", [WrongBytesError("torch.save: wrong"), CorruptCheckpointError("damaged")])
def test_failed_verification_makes_the_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def measure(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(command, "measure", measure)
    assert command.main(["--quick", "--directory", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert str(error) in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_ratios_are_taken_within_a_round() -> None:
    """Both slower in the second warm round: the ratio is the same; the cold round stays out."""
    ratio = Samples([9.0, 2.0, 20.0]).over(Samples([1.0, 1.0, 10.0]))
    assert (ratio.first, ratio.median, ratio.least, ratio.most) == (9.0, 2.0, 2.0, 2.0)


def test_uploads_are_measured(tmp_path: Path) -> None:
    """One method, its writer process and all, against the server that throws everything away."""
    results = measure_remote(
        _LARGE_UPLOAD_BYTES, 1, tmp_path, lambda what: None, servers=["discarding"], methods=["obstore"]
    )
    assert set(results.uploads) == {("discarding", condition, "obstore") for condition in ("quiet", "busy")}
    for found in results.uploads.values():
        for samples in (found.speed, found.processor_secs, found.slowdown, found.memory):
            assert len(samples.all) == 2
        assert min(found.speed.all) > 0


def test_uploads_are_held_against_their_targets() -> None:
    """Ratios within a round decide; every method is in its server's table."""
    speeds = {"s3fs": 300.0, "obstore": 960.0, "pipe": 99.0, "put": 99.0, "boto3": 99.0, "raw": 1000.0, "dcp": 50.0}
    uploads = {
        ("SeaweedFS", condition, key): Uploads(
            Samples([speed * 2**20]), Samples([1.0]), Samples([0.2 if key == "s3fs" else 0.05]), Samples([1.0])
        )
        for condition in ("quiet", "busy")
        for key, speed in speeds.items()
    }
    results = RemoteResults({"cores": "2"}, 10**9, 1, uploads)
    rows = judge_remote(results)
    assert [(row.measured.split()[0], row.met) for row in rows] == [
        *(("0.96", True), ("3.03", True)),
        *(("0.20", False), ("0.05", True)),
    ]
    page = remote_markdown(results, rows, "the command")
    for method in REMOTE_METHODS.values():
        assert page.count(f"| {method.name} | ") == 1
    assert "| asyncckpt, client='obstore' | 960 (960 to 960) | 1.00 | 0.05 |" in page
