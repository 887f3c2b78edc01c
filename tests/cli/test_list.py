"""`asyncckpt list`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import asyncckpt
from asyncckpt.cli.output import format_age, format_bytes
from asyncckpt.naming import BEST_NAME, MIRROR_NOTE_NAME, REGISTRY_NAME
from cli.directories import BEST, files
from cli.running import error_of, run, run_json


def test_the_table_has_every_checkpoint_and_stars_the_best(directory: Path) -> None:
    """In the order of the commits, with their metrics, and names in full although nobody has a wide terminal here."""
    lines = run("list", directory).stdout.splitlines()
    header, rows = lines[0].split(), lines[2:7]
    assert header[:4] == ["step", "epoch", "train", "loss"]
    assert "accuracy" in header
    assert [row.split()[-1] for row in rows] == [path.name for path in files(directory)]
    assert [index for index, row in enumerate(rows) if "★" in row] == [BEST]
    assert rows[BEST].split()[1:6] == ["300", "3", "0.333333", "1", "0.3"]
    assert "5 checkpoints" in lines[8]
    assert "val_loss (min)" in lines[8]
    assert len(lines) == 9


def test_json_says_what_the_manager_lists(directory: Path) -> None:
    """All fields of every record, the total, and NaN as a string."""
    listed = run_json("list", directory)
    infos = asyncckpt.CheckpointManager(directory).list_checkpoints()
    assert [entry["filepath"] for entry in listed["checkpoints"]] == [info.filepath.name for info in infos]
    assert [entry["sequence"] for entry in listed["checkpoints"]] == [info.sequence for info in infos]
    assert [entry["is_best"] for entry in listed["checkpoints"]] == [info.is_best for info in infos]
    assert listed["checkpoints"][-1]["val_loss"] == "NaN"
    assert listed["total_bytes"] == sum(path.stat().st_size for path in files(directory))
    assert set(listed["checkpoints"][0]) == set(vars(infos[0]))


def test_a_directory_without_checkpoints(tmp_path: Path) -> None:
    """It says so, and that is no error."""
    assert run("list", tmp_path).stdout == f"There are no checkpoints in {tmp_path}.\n"
    assert run_json("list", tmp_path)["checkpoints"] == []


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_no_directory(tmp_path: Path, name: str) -> None:
    """What does not exist, or is a file, is an error."""
    (tmp_path / "file").touch()
    assert str(tmp_path / name) in error_of("list", tmp_path / name)


def test_a_registry_of_somebody_else(tmp_path: Path) -> None:
    """It can't be read, and the message says why."""
    (tmp_path / REGISTRY_NAME).write_text('{"checkpoints": []}')
    assert "not written by asyncckpt" in error_of("list", tmp_path)


def test_the_mirror_is_on_a_line_of_its_own(directory: Path) -> None:
    """With what it lacks, why, and since when."""
    note = {"mirror": "s3://bucket/run", "mirrored": 3, "problem": "", "since": "2026-01-02T03:04:05+00:00"}
    last = asyncckpt.CheckpointManager(directory).list_checkpoints()[-1].sequence
    for changes, expected in (
        ({}, "mirror s3://bucket/run: lacks 2 checkpoints"),
        ({"mirrored": last}, "mirror s3://bucket/run: has all"),
        (
            {"mirrored": 4, "problem": "no\x1b[31m route"},
            "mirror s3://bucket/run: lacks 1 checkpoint: no\\x1b[31m route, since 2026-01-02T03:04:05+00:00",
        ),
    ):
        (directory / MIRROR_NOTE_NAME).write_text(json.dumps({**note, **changes}))
        assert run("list", directory).stdout.splitlines()[-1] == expected
    mirror = run_json("list", directory)["mirror"]
    assert (mirror["place"], mirror["lacks"], mirror["problem"]) == ("s3://bucket/run", 1, "no\x1b[31m route")


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"\xff\xfe",
        b"[" * 60_000,
        b"{}",
        b'{"mirror": 5}',
        b'{"mirror": "m", "mirrored": -1}',
        b'{"mirror": "m", "mirrored": 1e400}',
        b'{"mirror": "m", "problem": "' + b"x" * 5000 + b'"}',
        b" " * (1 << 20) + b'{"mirror": "m"}',
        b'{"mirror": "m", "more": ' + b"[" * 60_000,
    ],
)
def test_a_note_of_a_mirror_that_makes_no_sense(directory: Path, contents: bytes) -> None:
    """Does no harm."""
    (directory / MIRROR_NOTE_NAME).write_bytes(contents)
    assert run_json("list", directory)["mirror"] is None
    assert "mirror" not in run("list", directory).stdout


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_note_of_a_mirror_that_is_no_file(directory: Path, make: Callable[[Path], None]) -> None:
    """Nor does that; nobody waits for it either."""
    make(directory / MIRROR_NOTE_NAME)
    assert run_json("list", directory)["mirror"] is None


def test_files_that_are_gone_restorable_or_of_others_are_noted(directory: Path) -> None:
    """Each on a line of its own below the table."""
    first, second, best = files(directory)[0], files(directory)[1], files(directory)[BEST]
    first.unlink()
    best.unlink()
    shutil.copy(second, directory / "mine.pt")
    notes = run("list", directory).stdout.splitlines()[-3:]
    assert notes[0] == f"{first.name}: recorded, but its file is gone"
    assert notes[1].startswith(f"{best.name}: its file is gone, but {BEST_NAME}")
    assert notes[2] == "mine.pt: not of this run; never touched"
    listed = run_json("list", directory)
    assert (listed["gone"], listed["restorable"], listed["not_of_this_run"]) == ([first.name], [best.name], ["mine.pt"])


def test_a_file_that_is_not_recorded_is_listed_and_noted(directory: Path) -> None:
    """As after a crash between the file's commit and the registry's."""
    registry = json.loads((directory / REGISTRY_NAME).read_text())
    dropped = registry["checkpoints"].pop()
    registry["last_sequence"] -= 1
    (directory / REGISTRY_NAME).write_text(json.dumps(registry))
    listed = run_json("list", directory)
    assert listed["not_recorded"] == [dropped["filepath"]]
    assert len(listed["checkpoints"]) == 5
    assert run("list", directory).stdout.splitlines()[-1].startswith(f"{dropped['filepath']}: not recorded yet")


def test_a_file_that_is_to_be_deleted_is_noted(directory: Path) -> None:
    """As after a crash between the registry's commit and the deletion."""
    registry = json.loads((directory / REGISTRY_NAME).read_text())
    dropped = registry["checkpoints"].pop(0)
    registry["pending_deletes"] = [{"name": dropped["filepath"], "sequence": dropped["sequence"]}]
    (directory / REGISTRY_NAME).write_text(json.dumps(registry))
    assert run_json("list", directory)["to_be_deleted"] == [dropped["filepath"]]
    assert "not deleted yet" in run("list", directory).stdout.splitlines()[-1]


@pytest.mark.parametrize(("contents", "note"), [(None, "missing"), ("junk", "damaged")])
def test_without_a_registry_the_files_are_listed(directory: Path, contents: str | None, note: str) -> None:
    """All of them marked as protected, and one line says why; nothing is written."""
    (directory / REGISTRY_NAME).unlink()
    if contents is not None:
        (directory / REGISTRY_NAME).write_text(contents)
    before = sorted(os.listdir(directory))
    outcome = run("list", directory)
    assert outcome.stdout.count("protected") == 5 + 1
    assert [line for line in outcome.stdout.splitlines() if line.startswith(f"{REGISTRY_NAME}: {note}")]
    assert outcome.stderr == ""
    assert sorted(os.listdir(directory)) == before


def test_without_a_registry_damaged_files_are_noted(directory: Path) -> None:
    """Apart from those of others."""
    (directory / REGISTRY_NAME).unlink()
    torn = files(directory)[0]
    torn.write_bytes(torn.read_bytes()[:-100])
    listed = run_json("list", directory)
    assert (listed["damaged"], listed["not_of_this_run"]) == ([torn.name], [])
    assert run("list", directory).stdout.splitlines()[-1].startswith(f"{torn.name}: damaged")


def test_text_from_files_can_neither_control_the_terminal_nor_be_markup(directory: Path) -> None:
    """A registry is not to be trusted: escape sequences are shown, and brackets are brackets."""
    registry = json.loads((directory / REGISTRY_NAME).read_text())
    registry["checkpoints"][0]["val_metrics"] = {"[red]\x1b[31m\u202emetric": 1.0}
    registry["checkpoints"][0]["timestamp"] = "\x1b[2Jyesterday"
    (directory / REGISTRY_NAME).write_text(json.dumps(registry))
    (directory / "[bold]\x1b]0;title\x07.pt").touch()
    text = run("list", directory).stdout
    assert all(char.isprintable() or char == "\n" for char in text)
    assert r"[red]\x1b[31m\u202emetric" in text
    assert r"[bold]\x1b]0;title\x07.pt: not of this run" in text


def test_a_name_that_is_no_text(directory: Path) -> None:
    """Bytes that are not UTF-8 are escaped, in JSON too."""
    (directory / os.fsdecode(b"\xff.pt")).touch()
    assert r"\udcff.pt: not of this run" in run("list", directory).stdout
    assert run_json("list", directory)["not_of_this_run"] == ["\udcff.pt"]


NOW = datetime(2025, 1, 31, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("timestamp", "age"),
    [
        ("2025-01-31T11:59:30+00:00", "now"),
        ("2025-01-31T11:58:30Z", "1 min"),
        ("2025-01-31T11:58:30", "1 min"),
        ("2025-01-31T11:58:30+02:00", "2 h"),
        ((NOW - timedelta(days=40, hours=3)).isoformat(), "40 d"),
        ((NOW + timedelta(days=1)).isoformat(), "now"),
        ("0001-01-01T00:00:00+14:00", "739282 d"),
        ("", "?"),
        ("yesterday", "?"),
    ],
)
def test_ages(timestamp: str, age: str) -> None:
    """In the largest unit; a clock that runs ahead, or no timestamp at all, breaks nothing."""
    assert format_age(timestamp, NOW) == age


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (999_600, "1 MB"), (10**12, "1 TB")],
)
def test_sizes(num_bytes: int, text: str) -> None:
    """Three digits and a unit."""
    assert format_bytes(num_bytes) == text
