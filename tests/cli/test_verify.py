"""`asyncckpt verify`."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from asyncckpt.cli import upkeep
from asyncckpt.cli.verification import Verifier
from asyncckpt.naming import BEST_NAME, REGISTRY_NAME
from asyncckpt.registry.retention import KeepLast
from asyncckpt.storage.local import LocalReader, LocalStorage
from cli.directories import BEST, files
from cli.running import error_of, on_a_terminal, run, run_json


def flip_a_byte(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def damaged_in(directory: Path) -> list[str]:
    verified = run_json("verify", directory, code=1)
    assert not verified["ok"]
    assert all(bool(file["problems"]) != file["ok"] for file in verified["files"])
    return [os.path.basename(file["path"]) for file in verified["files"] if not file["ok"]]


def test_a_whole_file(directory: Path) -> None:
    """Says so, exits with 0, and leaves its figures in the JSON."""
    path = files(directory)[0]
    assert run("verify", path).stdout.startswith(f"whole   {path} (")
    (file,) = run_json("verify", path)["files"]
    assert (file["path"], file["num_bytes"], file["ok"]) == (str(path), path.stat().st_size, True)
    assert file["num_records"] > 3


def test_a_damaged_file(directory: Path) -> None:
    """Exits with 1 and names the record."""
    path = files(directory)[0]
    flip_a_byte(path)
    outcome = run("verify", path, code=1)
    assert outcome.stdout.startswith(f"DAMAGED {path}")
    assert "does not match its checksum" in outcome.stdout
    assert run_json("verify", path, code=1)["ok"] is False


def test_a_file_of_torch_save(tmp_path: Path) -> None:
    """Is verified by its own checksums."""
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    run("verify", tmp_path / "a.pt")


def test_a_whole_directory_is_read_once(directory: Path) -> None:
    """The best link is not read a second time."""
    verified = run_json("verify", directory)
    assert [file["path"] for file in verified["files"]] == [str(path) for path in files(directory)]
    assert verified["num_bytes"] == sum(path.stat().st_size for path in files(directory))
    assert run("verify", directory).stdout.splitlines()[-1].endswith(": all whole")


def test_a_best_model_that_is_a_copy_is_read(directory: Path) -> None:
    """Its bytes are its own then."""
    contents = files(directory)[BEST].read_bytes()
    (directory / BEST_NAME).unlink()
    (directory / BEST_NAME).write_bytes(contents)
    flip_a_byte(directory / BEST_NAME)
    assert damaged_in(directory) == [BEST_NAME]


def test_every_damage_in_a_directory_is_found(directory: Path) -> None:
    """In recorded files, in those of others, in the registry; and a file that is gone, and one that is none."""
    flip_a_byte(files(directory)[0])
    gone = files(directory)[1]
    gone.unlink()
    (directory / "other.pt").write_text("not a checkpoint")
    (directory / "directory.pt").mkdir()
    assert damaged_in(directory) == [files(directory)[0].name, gone.name, "directory.pt", "other.pt"]
    (directory / REGISTRY_NAME).write_text("junk")
    assert damaged_in(directory) == [REGISTRY_NAME, files(directory)[0].name, "directory.pt", "other.pt"]


def test_what_can_not_be_read_is_a_problem_of_that_file_only(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other files of the directory are verified all the same; of a single file it is an error."""
    broken = files(directory)[0]
    read_into = LocalReader.read_into

    def fail(self: LocalReader, offset: int, view: memoryview) -> None:
        if os.path.samestat(os.fstat(self.fd), broken.stat()):
            raise OSError(5, "Input/output error")
        read_into(self, offset, view)

    monkeypatch.setattr(LocalReader, "read_into", fail)
    assert damaged_in(directory) == [broken.name]
    assert "Input/output error" in error_of("verify", broken)


def test_a_file_that_training_deletes_meanwhile_is_no_damage(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was listed when the command started, and dropped by retention before its turn came."""
    size_of = Verifier.size_of

    def prune_then_size(self: Verifier, path: str, *, follow_links: bool = True) -> int:
        upkeep.prune(LocalStorage(), str(directory), KeepLast(1), dry_run=False)
        return size_of(self, path, follow_links=follow_links)

    monkeypatch.setattr(Verifier, "size_of", prune_then_size)
    verified = run_json("verify", directory)
    assert [os.path.basename(file["path"]) for file in verified["files"]] == [path.name for path in files(directory)]
    assert len(verified["files"]) == 2


def test_nothing_to_verify_is_an_error(tmp_path: Path) -> None:
    """Somebody has the wrong directory, and must not take it for a whole one."""
    assert "no checkpoint files" in error_of("verify", tmp_path)
    assert "no checkpoint at" in error_of("verify", tmp_path / "nothing.pt")
    assert "no checkpoint at" in error_of("verify", f"{tmp_path}/nothing/")


def test_a_terminal_gets_a_progress_bar_on_stderr(directory: Path) -> None:
    """And stdout stays the JSON alone."""
    stdout, drawn = on_a_terminal([sys.executable, "-m", "asyncckpt", "verify", str(directory), "--json"])
    assert json.loads(stdout)["ok"] is True
    assert b"verifying" in drawn
    total = sum(path.stat().st_size for path in files(directory)) / 1000
    shown = re.findall(rf"([\d.]+)/{total:.1f} kB".encode(), drawn)
    assert float(shown[-1]) >= 0.9 * total
