"""The example that keeps its checkpoints in a bucket, against a real server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from scripts import run
from storage.s3_server import BUCKET, S3Server


@pytest.fixture
def url(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


def test_straight_to_s3(url: str) -> None:
    """Run again, it goes on behind the last checkpoint."""
    assert run("train_to_s3.py", url).stdout.splitlines() == [
        "from step 1",
        f"{url}/checkpoint_epoch0001_step00000020.pt",
        f"{url}/checkpoint_epoch0001_step00000030.pt",
    ]
    assert run("train_to_s3.py", url, "--steps", "40").stdout.splitlines()[0] == "from step 31"


def test_mirrored(url: str, tmp_path: Path) -> None:
    """A new disk resumes from the bucket."""
    local = tmp_path / "checkpoints"
    assert run("train_to_s3.py", url, "--local", local).stdout.splitlines()[0] == "from step 1"
    assert len(list(local.glob("*.pt"))) >= 2
    shutil.rmtree(local)
    assert run("train_to_s3.py", url, "--local", local, "--steps", "40").stdout.splitlines() == [
        "from step 31",
        str(local / "checkpoint_epoch0001_step00000040.pt"),
    ]
