"""What the README shows works as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from storage.s3_server import S3Server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def scripts() -> list[tuple[str, str]]:
    """Each whole script of the README, with what it is said to print."""
    found = re.findall(r"```python\n(import torch, asyncckpt.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
    assert len(found) == 3
    return found


def run(command: list[str], directory: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.stderr, result.returncode) == ("", 0)
    return result.stdout


@pytest.mark.parametrize(("script", "output"), scripts())
def test_the_scripts_print_what_is_shown(server: S3Server, tmp_path: Path, script: str, output: str) -> None:
    assert len([line for line in script.splitlines() if line.strip()]) <= 12
    assert run(["-c", script], tmp_path, **server.environment) == output


def test_the_manager_goes_on(tmp_path: Path) -> None:
    """Run twice, the script resumes; the listing between looks as shown."""
    script, output = scripts()[0]
    run(["-c", script], tmp_path)
    shown = re.search(r"```text\n\$ asyncckpt (list checkpoints)\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    listed = run(["-m", "asyncckpt", *shown[1].split()], tmp_path)
    assert [line.rstrip() for line in listed.splitlines()] == shown[2].splitlines()
    again = run(["-c", script], tmp_path)
    assert "epoch0006_step00000006" in again
    assert again != output


def test_the_guide_resumes_in_mid_epoch(tmp_path: Path) -> None:
    """The script of docs/managing.md, run as a whole and then again, when nothing is left to do."""
    guide = (ROOT / "docs" / "managing.md").read_text()
    script = re.search(r"```python\n(import torch, asyncckpt\n.*?)```", guide, re.DOTALL)
    assert script is not None
    run(["-c", script[1]], tmp_path)
    run(["-c", script[1]], tmp_path)
    names = {path.name for path in (tmp_path / "runs" / "exact" / "checkpoints").glob("*.pt")}
    assert names == {f"checkpoint_epoch000{step // 9}_step000000{step:02}.pt" for step in (5, 10, 15)}


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_two_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "bench"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
