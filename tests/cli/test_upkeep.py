"""`asyncckpt prune` and `asyncckpt repair`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import asyncckpt
from asyncckpt.naming import BEST_NAME, REGISTRY_NAME, temporary_name
from asyncckpt.storage import system_calls
from cli.directories import BEST, files
from cli.running import error_of, run, run_json


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def steps_in(directory: Path) -> list[int | None]:
    infos = asyncckpt.CheckpointManager(directory).list_checkpoints()
    assert [info.filepath for info in infos] == files(directory)
    return [info.global_step for info in infos]


# --- prune ---


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--keep-last", 1], [300, 500]),
        (["--keep-last", 2], [300, 400, 500]),
        (["--keep-last", 9], [100, 200, 300, 400, 500]),
        (["--keep-best", 2], [300, 400, 500]),
        (["--keep-best", 2, "--metric", "accuracy", "--mode", "max"], [300, 400, 500]),
        (["--keep-best", 2, "--metric", "accuracy", "--mode", "min"], [100, 200, 300, 500]),
        (["--keep-best", 1, "--mode", "max"], [100, 300, 500]),
        (["--keep-every", 200], [200, 300, 400, 500]),
        (["--keep-every-epochs", 4], [300, 400, 500]),
        (["--keep-every-hours", 100000], [100, 300, 500]),
        (["--keep-last", 1, "--keep-every", 400, "--keep-best", 1], [300, 400, 500]),
    ],
)
def test_prune_keeps_what_the_options_name(directory: Path, options: Sequence[object], kept: list[int]) -> None:
    """Besides the newest and the best; files and registry agree, and a dry run says beforehand what it will be."""
    before = contents(directory)
    sizes = {path.name: path.stat().st_size for path in files(directory)}
    planned = run_json("prune", directory, *options, "--dry-run")
    assert contents(directory) == before
    pruned = run_json("prune", directory, *options)
    assert steps_in(directory) == kept
    deleted = [entry["filepath"] for entry in pruned["deleted"]]
    assert sorted(deleted) == sorted(set(sizes) - {path.name for path in files(directory)})
    assert pruned["freed_bytes"] == sum(sizes[name] for name in deleted)
    assert pruned["num_kept"] == len(kept)
    assert planned == {**pruned, "dry_run": True}


def test_prune_prints_what_it_deleted(directory: Path) -> None:
    """A line for each file, then the sum; nothing of it on stderr."""
    first = files(directory)[0]
    freed = first.stat().st_size
    outcome = run("prune", directory, "--keep-last", 4)
    line, total = outcome.stdout.splitlines()
    assert line.startswith(f"deleted {first.name} (")
    assert total == f"deleted 1 checkpoint, {freed / 1000:.3g} kB freed; 4 kept"
    assert outcome.stderr == ""
    assert run("prune", directory, "--keep-last", 4).stdout == "nothing to delete; 4 checkpoints kept\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to keep"),
        (["--dry-run"], "say what to keep"),
        (["--keep-last", 1, "--metric", "accuracy"], "--keep-best"),
        (["--keep-last", 1, "--mode", "min"], "--keep-best"),
        (["--keep-last", 0], "--keep-last"),
        (["--keep-best", 1, "--mode", "least"], "min"),
        (["--keep-best", 1, "--metric", "accuracy"], "--mode"),
        (["--keep-every-hours", 0], "hours"),
        (["--keep-every-hours", "nan"], "hours"),
    ],
)
def test_wrong_options_are_usage_errors(directory: Path, options: Sequence[object], message: str) -> None:
    """Exit code 2, and nothing is changed."""
    before = contents(directory)
    assert message in " ".join(run("prune", directory, *options, code=2).stderr.split())
    assert contents(directory) == before


def test_pruning_by_a_metric_that_no_checkpoint_has_is_an_error(directory: Path) -> None:
    """None would be the best, and nearly all would be deleted for a spelling mistake."""
    error = error_of("prune", directory, "--keep-best", 3, "--metric", "acuracy", "--mode", "max")
    assert "acuracy" in error
    assert error.endswith("accuracy, train_loss, val_loss")
    assert len(files(directory)) == 5


def test_a_metric_that_is_nan_throughout_is_none(directory: Path) -> None:
    """Nothing is the best by it either."""
    registry = json.loads((directory / REGISTRY_NAME).read_text())
    for entry in registry["checkpoints"]:
        entry["val_metrics"]["f1"] = "NaN"
    (directory / REGISTRY_NAME).write_text(json.dumps(registry))
    assert "no checkpoint has" in error_of("prune", directory, "--keep-best", 3, "--metric", "f1", "--mode", "max")


def test_prune_waits_for_nobody(directory: Path) -> None:
    """A directory that another writer holds is an error at once; a dry run needs no lock."""
    with asyncckpt.CheckpointManager(directory) as manager:
        manager.prune(asyncckpt.KeepLast(9))
        assert "is being written to by" in error_of("prune", directory, "--keep-last", 1)
        assert "is being written to by" in error_of("repair", directory)
        assert len(run_json("prune", directory, "--keep-last", 1, "--dry-run")["deleted"]) == 3


def test_prune_counts_only_what_could_be_deleted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is named, and the exit code is that of an error."""
    stubborn, other = files(directory)[:2]
    size = other.stat().st_size
    unlink = system_calls.unlink

    def refuse(path: str) -> None:
        if path == str(stubborn):
            raise PermissionError(1, "Operation not permitted")
        unlink(path)

    monkeypatch.setattr(system_calls, "unlink", refuse)
    outcome = run("prune", directory, "--keep-last", 3, code=3)
    assert f"{stubborn.name}: could not be deleted: Operation not permitted" in outcome.stdout
    assert outcome.stdout.splitlines()[-1].startswith(f"deleted 1 checkpoint, {size / 1000:.3g} kB freed")


def test_prune_also_drops_what_was_found_without_a_registry(directory: Path) -> None:
    """Saving leaves protected checkpoints alone; whoever prunes has looked."""
    (directory / REGISTRY_NAME).unlink()
    pruned = run_json("prune", directory, "--keep-last", 1)
    assert steps_in(directory) == [300, 500]
    assert len(pruned["deleted"]) == 3
    assert {action["file"] for action in pruned["repairs"]} <= {path.name for path in files(directory)}


def test_pin_and_unpin(directory: Path, tmp_path: Path) -> None:
    """What is pinned stays when the rest is pruned, and is listed as such; a step that is not there is an error."""
    name = files(directory)[0].name
    assert run("pin", directory, 100).stdout == f"pinned {name}\n"
    assert [line.split()[-2:] for line in run("list", directory).stdout.splitlines() if name in line] == [
        [name, "pinned"]
    ]
    assert [entry["pinned"] for entry in run_json("list", directory)["checkpoints"]] == [True] + [False] * 4
    run("prune", directory, "--keep-last", 1)
    assert steps_in(directory) == [100, 300, 500]
    assert "has no checkpoint of step 200; it has 100, 300, 500" in error_of("pin", directory, 200)
    assert run("unpin", directory, 300).stdout == "no checkpoint of step 300 was pinned\n"
    unpinned = run_json("unpin", directory, 100)
    assert ([entry["filepath"] for entry in unpinned["checkpoints"]], unpinned["pinned"]) == ([name], False)
    run("prune", directory, "--keep-last", 1)
    assert steps_in(directory) == [300, 500]
    run("pin", directory, "last", code=2)
    (tmp_path / "empty").mkdir()
    assert "there are no checkpoints in" in error_of("pin", tmp_path / "empty", 1)
    assert os.listdir(tmp_path / "empty") == []


def test_pruning_an_empty_directory_writes_nothing(tmp_path: Path) -> None:
    """Not even a lock."""
    run("prune", tmp_path, "--keep-last", 1)
    run("prune", tmp_path, "--keep-best", 1)
    assert list(tmp_path.iterdir()) == []


# --- repair ---


def repair(directory: Path) -> list[tuple[str, str]]:
    """What was done; a second time there must be nothing to do."""
    repaired = run_json("repair", directory)
    outcome = run("repair", directory)
    assert outcome.stdout.splitlines()[0] == "nothing to do"
    assert outcome.stderr == ""
    run("verify", directory)
    return [(action["file"], action["detail"]) for action in repaired["actions"]]


def test_nothing_to_repair(directory: Path) -> None:
    """Files of others are named, and left alone."""
    shutil.copy(files(directory)[0], directory / "mine.pt")
    assert repair(directory) == []
    text = run("repair", directory).stdout
    assert text == "nothing to do\nmine.pt: not of this run, left alone\n"
    assert run_json("repair", directory)["left_alone"] == ["mine.pt"]


def test_repair_sweeps_what_a_dead_writer_left(directory: Path) -> None:
    """The file is gone, and said to be."""
    name = temporary_name("0123456789abcdef", "x.pt")
    (directory / name).touch()
    assert repair(directory) == [(name, "left by a writer that died")]
    assert not (directory / name).exists()


def test_repair_forgets_files_that_are_gone(directory: Path) -> None:
    """And brings the best one back from its link."""
    first, best = files(directory)[0], files(directory)[BEST]
    first.unlink()
    best.unlink()
    done = dict(repair(directory))
    assert set(done) == {first.name, best.name}
    assert "listed no more" in done[first.name]
    assert BEST_NAME in done[best.name]
    assert steps_in(directory) == [200, 300, 400, 500]


def test_repair_rebuilds_a_damaged_registry(directory: Path) -> None:
    """The old one is kept aside; stdout says it once, and stderr not again."""
    (directory / REGISTRY_NAME).write_text("junk")
    outcome = run("repair", directory)
    assert outcome.stderr == ""
    lines = outcome.stdout.splitlines()
    assert lines[0].startswith(f"{REGISTRY_NAME}: rebuilt from the files")
    assert [line.split(":")[0] for line in lines[1:]] == [path.name for path in files(directory)]
    assert repair(directory) == []


def test_repair_says_that_it_renewed_the_best_link(directory: Path) -> None:
    """A writer that died between registry and link leaves it one save behind."""
    (directory / BEST_NAME).unlink()
    os.link(files(directory)[0], directory / BEST_NAME)
    assert repair(directory) == [(BEST_NAME, "it was not the best checkpoint: now it is")]
    assert os.path.samefile(directory / BEST_NAME, files(directory)[BEST])


def test_repair_finishes_deletions(directory: Path) -> None:
    """Those that a writer that died had decided on."""
    registry = json.loads((directory / REGISTRY_NAME).read_text())
    dropped = registry["checkpoints"].pop(0)
    registry["pending_deletes"] = [{"name": dropped["filepath"], "sequence": dropped["sequence"]}]
    (directory / REGISTRY_NAME).write_text(json.dumps(registry))
    assert repair(directory) == [(dropped["filepath"], "dropped by retention")]
    assert steps_in(directory) == [200, 300, 400, 500]


def test_repaired_directories_can_be_resumed_from(directory: Path) -> None:
    """The lock is given back."""
    run("repair", directory)
    model = torch.nn.Linear(8, 4)
    with asyncckpt.CheckpointManager(directory) as manager:
        assert manager.load_latest(model)[0] == 5
        assert manager.prune(asyncckpt.KeepLast(9)) == []
