"""A checkpoint directory on a real file system: commits, retention, recovery, and what it survives."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from storage.mounts import small_file_system
from storage.seam import Call, Fault, Seam

import asyncckpt
from asyncckpt import (
    AsyncCheckpointSaver,
    CheckpointInfo,
    CheckpointNotFoundError,
    CheckpointWriteError,
    RegistryError,
    StorageBusyError,
)
from asyncckpt.naming import BEST_NAME, LOCK_NAME, checkpoint_name, is_temporary_name
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.retention import KeepEvery, KeepLast
from asyncckpt.storage.local import LocalStorage

TENSOR = torch.arange(1000.0)


class Run:
    """Saves into a directory as a manager does, one checkpoint at a time."""

    def __init__(self, path: Path, num_kept: int = 2) -> None:
        self.path = path
        self.num_kept = num_kept
        self.events: list[tuple[str, str]] = []
        self.saver = AsyncCheckpointSaver(retries=0)
        self.directory = self.reopened()

    def reopened(self) -> CheckpointDirectory:
        """As another process sees it."""

        def note(kind: str, path: str, detail: str) -> None:
            self.events.append((kind, os.path.basename(path)))

        return CheckpointDirectory(
            str(self.path),
            LocalStorage(),
            retention=KeepLast(self.num_kept),
            metric="val_loss",
            mode="min",
            lock_timeout_secs=0.1,
            report=note,
        )

    def save(self, step: int, loss: float | None = None) -> CheckpointInfo:
        if not self.directory.look():
            self.directory.open_for_writing()
        info = CheckpointInfo(
            Path(checkpoint_name(1, step, {"loss": loss})),
            epoch=1,
            global_step=step,
            val_loss=loss,
            timestamp=f"2026-01-01T00:00:00.{len(self.events):06}+00:00",
        )
        handle = self.saver.save_listed({"tensor": TENSOR + step}, self.directory.reserve(info))
        result = handle.result(60)
        self.saver.wait(60)
        return result

    def restart(self) -> None:
        """The process ends, and another one opens the directory for writing."""
        self.directory.close()
        self.directory = self.reopened()
        self.events.clear()
        self.directory.open_for_writing()

    def steps(self) -> list[int | None]:
        return [info.global_step for info in self.directory.registry.checkpoints]

    def best_step(self) -> int | None:
        best = self.directory.registry.best
        return best.global_step if best else None

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.path.iterdir() if path.name != LOCK_NAME}

    def file(self, step: int) -> Path:
        (found,) = self.path.glob(f"checkpoint_*step{step:08}*")
        return found

    def assert_in_order(self) -> None:
        """The registry names whole files and only those, the best link is the best, and nothing else lies about."""
        document = json.loads((self.path / "registry.json").read_bytes())
        names = [entry["filepath"] for entry in document["checkpoints"]]
        for entry in document["checkpoints"]:
            assert asyncckpt.verify(self.path / entry["filepath"]).ok
            loaded = torch.load(self.path / entry["filepath"], weights_only=True)
            assert bool((loaded["tensor"] == TENSOR + entry["global_step"]).all())
        best = [entry for entry in document["checkpoints"] if entry["is_best"]]
        assert len(best) <= 1
        if best:
            assert (self.path / "best_model.pt").read_bytes() == (self.path / best[0]["filepath"]).read_bytes()
        expected = {*names, "registry.json", LOCK_NAME, *(["best_model.pt"] if best else [])}
        assert {path.name for path in self.path.iterdir()} == expected


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "run")
    yield run
    run.saver.close(60)
    run.directory.close()


def test_retention_and_best(run: Run) -> None:
    """The newest two and the best; what is worse, NaN or unknown never is the best."""
    for step, loss in [(10, 0.5), (20, 0.4), (30, 0.6), (40, math.nan), (50, None), (60, 0.7)]:
        run.save(step, loss)
        run.assert_in_order()
    assert run.steps() == [20, 50, 60]
    assert run.best_step() == 20


def test_improving_at_every_save_keeps_just_what_the_policy_says(run: Run) -> None:
    for step in range(1, 9):
        assert run.save(step, 1 / step).is_best
    assert run.steps() == [7, 8]
    run.assert_in_order()


def test_pinned_ones_stay_until_they_are_unpinned(run: Run) -> None:
    """Through saves, prunes and restarts; a later save of the same step leaves the file alone."""
    pinned = run.save(1)
    assert [info.filepath.name for info in run.directory.pin(1)] == [pinned.filepath.name]
    for step in (2, 3, 4):
        run.save(step)
    assert run.steps() == [1, 3, 4]
    run.restart()
    run.directory.prune(KeepLast(1))
    assert run.steps() == [1, 4]
    again = run.save(1)
    assert again.filepath.name != pinned.filepath.name
    run.assert_in_order()
    assert [info.sequence for info in run.directory.unpin(1)] == [pinned.sequence]
    assert run.directory.unpin(1) == []
    run.save(5)
    assert run.steps() == [1, 5]
    assert not pinned.filepath.exists()
    run.assert_in_order()


def test_the_newest_whole_one_of_a_step_is_pinned(run: Run) -> None:
    """Also again; of a step that nobody saved there is none."""
    run.save(1)
    second = run.save(2)
    for _ in range(2):
        assert [info.sequence for info in run.directory.pin(2)] == [second.sequence]
    again = run.save(2)
    run.directory.note_damaged(again)
    assert [info.sequence for info in run.directory.pin(2)] == [second.sequence]
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 7; it has 2, 2"):
        run.directory.pin(7)
    with pytest.raises(CheckpointNotFoundError):
        run.directory.unpin(7)


def test_a_pin_that_can_not_be_written_is_an_error(run: Run) -> None:
    """And is not claimed to be there: retention goes on as before."""
    run.save(1)

    def refuse(call: Call) -> None:
        if call.name == "rename":
            raise OSError(errno.EIO, "Input/output error")

    with Seam(refuse), pytest.raises(CheckpointWriteError, match="was not changed"):
        run.directory.pin(1)
    run.save(2)
    run.save(3)
    assert run.steps() == [2, 3]


def test_best_link_shares_its_bytes(run: Run) -> None:
    run.save(1, 0.5)
    assert os.path.samefile(run.path / "best_model.pt", run.file(1))


def test_reading_changes_nothing(run: Run) -> None:
    """Neither a directory that is not there, nor one that a writer has open, nor one that needs recovery."""
    reader = run.reopened()
    assert [*reader.registry.checkpoints] == []
    assert not run.path.exists()
    run.save(1, 0.5)
    (run.path / "registry.json").unlink()
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in run.path.iterdir()}
    assert [info.global_step for info in reader.registry.checkpoints] == [1]
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in run.path.iterdir()} == before


def test_opening_twice_changes_nothing(run: Run) -> None:
    for step in range(4):
        run.save(step, 1.0)
    run.restart()
    before = run.contents()
    for _ in range(2):
        run.restart()
        assert run.contents() == before
        assert run.events == []


def test_one_writer(run: Run) -> None:
    """The second one is told who the first is; it may read, and write once the first has closed."""
    run.save(1, 0.5)
    other = run.reopened()
    with pytest.raises(StorageBusyError, match=rf"process {os.getpid()} on .*, since 20\d\d"):
        other.open_for_writing()
    assert [info.global_step for info in other.registry.checkpoints] == [1]
    run.directory.close()
    other.open_for_writing()
    with pytest.raises(StorageBusyError):
        run.directory.open_for_writing()
    other.close()


def test_numbers_go_on_after_a_restart(run: Run) -> None:
    first = run.save(1, 0.5)
    run.restart()
    second = run.save(2, 0.4)
    assert (first.sequence, second.sequence) == (1, 2)
    run_id = run.directory.registry.run_id
    run.restart()
    assert run.directory.registry.run_id == run_id


def test_a_moved_directory(run: Run, tmp_path: Path) -> None:
    """Names are relative: it works wherever it is."""
    run.save(1, 0.5)
    run.directory.close()
    shutil.move(run.path, tmp_path / "elsewhere")
    run.path = tmp_path / "elsewhere"
    run.directory = run.reopened()
    run.save(2, 0.4)
    assert run.steps() == [1, 2]
    run.assert_in_order()


def test_a_directory_removed_under_a_writer(run: Run) -> None:
    """The lock went with it: the next save opens anew, and lists what is there."""
    run.save(1, 0.5)
    shutil.rmtree(run.path)
    run.save(2, 0.6)
    assert run.steps() == [2]
    run.assert_in_order()


# --- recovery ---


def test_committed_but_not_recorded(run: Run) -> None:
    """A crash after the rename: the file is listed, is the latest, and may be the best."""
    run.save(1, 0.5)
    registry = (run.path / "registry.json").read_bytes()
    run.save(2, 0.4)
    (run.path / "registry.json").write_bytes(registry)
    assert run.reopened().registry.latest == run.directory.registry.latest
    run.restart()
    assert run.events == [("recovered", run.file(2).name)]
    assert run.steps() == [1, 2]
    assert run.best_step() == 2
    run.assert_in_order()


def test_committed_but_torn(run: Run) -> None:
    """What does not verify is not taken in, and is left alone."""
    run.save(1, 0.5)
    registry = (run.path / "registry.json").read_bytes()
    run.save(2, 0.4)
    (run.path / "registry.json").write_bytes(registry)
    damage(run.file(2))
    run.restart()
    assert run.steps() == [1]
    assert run.file(2).exists()
    assert run.best_step() == 1


def damage(path: Path) -> None:
    """Flip a byte of a tensor, in the file itself."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_deletes_left_to_do(run: Run) -> None:
    """A crash after the registry was written: the dropped file goes at the next open."""
    run.save(1, 0.5)
    run.save(2, 0.4)
    dropped = run.file(1).read_bytes()
    name = run.file(1).name
    run.save(3, 0.6)
    assert not (run.path / name).exists()
    (run.path / name).write_bytes(dropped)
    run.restart()
    assert run.events == [("deleted", name)]
    run.assert_in_order()


@pytest.mark.parametrize("victim", [3, 2])
def test_deletes_wait_for_their_replacement(run: Run, victim: int) -> None:
    """If what replaced it is damaged, the dropped file is kept after all."""
    run.save(1, 0.5)
    run.save(2, 0.4)
    dropped, name = run.file(1).read_bytes(), run.file(1).name
    run.save(3, 0.6)
    (run.path / name).write_bytes(dropped)
    damage(run.file(victim))
    run.restart()
    assert ("recovered", name) in run.events
    assert run.steps() == [1, 2, 3]
    run.save(4, 0.9)
    assert 1 in run.steps(), "protected until somebody prunes"


def test_a_name_of_a_pending_delete_that_is_now_somebody_elses(run: Run) -> None:
    """Only the file that was dropped is deleted, not another one with its name."""
    run.save(1, 0.5)
    name = run.file(1).name
    run.save(2, 0.4)
    run.save(3, 0.6)
    torch.save({"mine": 1}, run.path / name)
    run.restart()
    run.save(4, 0.7)
    assert torch.load(run.path / name) == {"mine": 1}


def test_a_gone_file_is_listed_no_more(run: Run) -> None:
    run.save(1, 0.4)
    run.save(2, 0.5)
    run.file(2).unlink()
    assert [info.global_step for info in run.reopened().registry.checkpoints] == [1]
    run.restart()
    assert run.steps() == [1]
    run.assert_in_order()


def test_a_best_file_that_goes_under_the_run(run: Run) -> None:
    """Somebody has deleted it, and then it becomes the best: it is listed no more, the next best is, saves go on."""
    run.directory.retention = KeepLast(4)
    for step, loss in [(1, 0.6), (2, 0.5), (3, 0.4), (4, 0.3)]:
        run.save(step, loss)
    run.file(3).unlink()
    run.file(4).rename(run.file(4).with_name("mine.pt"))
    run.directory.note_damaged(run.directory.registry.checkpoints[-1])  # as a load would
    run.save(5, 0.7)
    assert run.best_step() == 2
    assert ("recovered", "checkpoint_epoch0001_step00000003_loss0.4000.pt") in run.events
    (run.path / "mine.pt").unlink()
    run.restart()
    run.save(6, 0.8)
    assert run.steps() == [2, 5, 6]
    run.assert_in_order()


def test_a_gone_best_file_comes_back_from_its_link(run: Run) -> None:
    run.save(1, 0.4)
    run.save(2, 0.5)
    run.file(1).unlink()
    run.restart()
    assert run.steps() == [1, 2]
    assert run.best_step() == 1
    run.assert_in_order()


@pytest.mark.parametrize("remove", [True, False])
def test_a_best_link_that_is_behind(run: Run, remove: bool) -> None:
    """Gone, or still the one before: it is made to agree with the registry."""
    run.save(1, 0.5)
    old = run.file(1).read_bytes()
    run.save(2, 0.4)
    (run.path / "best_model.pt").unlink()
    if not remove:
        (run.path / "best_model.pt").write_bytes(old)
    run.restart()
    run.assert_in_order()


@pytest.mark.parametrize("text", [None, b"", b"{nonsense", b'{"run_id": 5}'])
def test_a_lost_registry_is_rebuilt(run: Run, text: bytes | None) -> None:
    """From the files; all of them are protected from retention until somebody prunes. A damaged one is kept."""
    for step, loss in [(1, 0.4), (2, 0.5), (3, 0.6)]:
        run.save(step, loss)
    run_id = run.directory.registry.run_id
    run.directory.close()
    (run.path / "registry.json").unlink()
    if text is not None:
        (run.path / "registry.json").write_bytes(text)
    assert [info.global_step for info in run.reopened().registry.checkpoints] == [1, 2, 3]
    run.restart()
    assert run.directory.registry.run_id == run_id
    run.save(4, 0.7)
    run.save(5, 0.8)
    assert run.steps() == [1, 2, 3, 4, 5]
    assert run.best_step() == 1
    aside = list(run.path.glob("registry.damaged-*.json"))
    assert [path.read_bytes() for path in aside] == ([] if text is None else [text])
    for path in aside:
        path.unlink()
    dropped = run.directory.prune()
    assert [info.global_step for info in dropped] == [2, 3]
    run.assert_in_order()


def test_rebuilding_leaves_out_what_is_damaged(run: Run) -> None:
    run.save(1, 0.4)
    run.save(2, 0.5)
    run.directory.close()
    (run.path / "registry.json").unlink()
    damage(run.file(2))
    run.restart()
    assert run.steps() == [1]
    assert run.file(2).exists()


@pytest.mark.parametrize("text", [b'{"version": 2}', b'{"checkpoints": [], "best_score": 1}'])
def test_a_registry_that_is_not_ours_stops_everything(run: Run, text: bytes) -> None:
    """Nothing is read by it, and nothing in the directory is changed."""
    run.save(1, 0.5)
    run.directory.close()
    (run.path / "registry.json").write_bytes(text)
    before = run.contents()
    reader = run.reopened()
    for call in (lambda: reader.registry, reader.open_for_writing):
        with pytest.raises(RegistryError, match=r"registry\.json can't be used"):
            call()
    assert run.contents() == before


def test_another_runs_files_are_left_alone(run: Run, tmp_path: Path) -> None:
    """Neither adopted nor pruned nor overwritten, whatever their names and numbers."""
    other = Run(tmp_path / "other", num_kept=9)
    for step in range(1, 6):
        other.save(step, 0.1)
    other.saver.close(60)
    other.directory.close()
    run.save(1, 0.5)
    run.directory.close()
    stranger = shutil.copy(other.file(5), run.path)
    torch.save({"mine": 1}, run.path / "step7.pt")
    run.directory = run.reopened()
    saved = run.save(5, 0.1)
    assert saved.filepath.name == Path(stranger).name.replace(".pt", "_2.pt")
    run.save(6, 0.2)
    run.save(7, 0.3)
    assert Path(stranger).read_bytes() == other.file(5).read_bytes()
    assert torch.load(run.path / "step7.pt") == {"mine": 1}
    assert run.steps() == [5, 6, 7]
    run.restart()
    assert run.steps() == [5, 6, 7]


def test_the_same_name_again(run: Run) -> None:
    """A run taken back to an old step may write the same name: one file, one entry, the latest."""
    run.save(1, 0.5)
    run.save(2, 0.4)
    run.save(1, 0.5)
    assert run.steps() == [2, 1]
    run.save(2, 0.4)
    assert run.steps() == [1, 2]
    assert run.best_step() == 2
    run.assert_in_order()


def test_the_same_name_again_but_not_recorded(run: Run) -> None:
    run.save(1, 0.5)
    run.save(2, 0.4)
    registry = (run.path / "registry.json").read_bytes()
    run.save(1, 0.5)
    (run.path / "registry.json").write_bytes(registry)
    run.restart()
    assert run.steps() == [2, 1]
    assert run.directory.registry.last_sequence == 3
    run.assert_in_order()


def test_rollback_the_new_branch_is_the_latest(run: Run) -> None:
    for step in (100, 200, 300):
        run.save(step, 1.0)
    for step in (150, 160, 170):
        run.save(step, 2.0)
    assert run.steps()[-2:] == [160, 170]
    assert 300 not in run.steps()


def test_prune(run: Run) -> None:
    for step in (1, 2, 3):
        run.save(step, 1.0 / step)
    before = run.contents()
    assert [info.global_step for info in run.directory.prune(KeepLast(1), dry_run=True)] == [2]
    assert run.contents() == before
    assert [info.global_step for info in run.directory.prune(KeepLast(1))] == [2]
    run.assert_in_order()
    assert run.directory.prune(KeepEvery(steps=1)) == []


# --- faults ---


def test_a_symbolic_link_is_not_followed(run: Run, tmp_path: Path) -> None:
    """A name in the directory that leads out of it is neither read, nor listed, nor written through."""
    outside = tmp_path / "outside.pt"
    run.save(1, 0.5)
    shutil.copy(run.file(1), outside)
    name = run.file(1).name
    run.file(1).unlink()
    (run.path / "best_model.pt").unlink()
    (run.path / name).symlink_to(outside)
    content = outside.read_bytes()
    run.restart()
    run.save(2, 0.4)
    run.save(3, 0.3)
    run.save(4, 0.2)
    assert outside.read_bytes() == content


def test_a_registry_that_is_a_symbolic_link(run: Run, tmp_path: Path) -> None:
    run.save(1, 0.5)
    run.directory.close()
    shutil.move(run.path / "registry.json", tmp_path / "elsewhere.json")
    (run.path / "registry.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(RegistryError, match="symbolic links"):
        _ = run.reopened().registry


def on_registry(name: str) -> Callable[[Call], bool]:
    return lambda call: (
        call.name == name
        and ("registry.json" in call.path or (name == "rename" and "registry.json" in str(call.args[1])))
    )


@pytest.mark.parametrize("name", ["open_file", "allocate", "pwrite", "fsync", "rename"])
@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EIO])
def test_the_registry_can_not_be_written(run: Run, name: str, error_number: int) -> None:
    """Found before anything is committed, unless the very last step fails; then the next save lists the file too."""
    run.save(1, 0.5)
    is_victim = on_registry(name)

    def fail(call: Call) -> None:
        if is_victim(call):
            raise OSError(error_number, os.strerror(error_number))

    before = (run.path / "registry.json").read_bytes()
    is_last_step = name == "rename"
    said = "is whole, but could not be listed in the registry" if is_last_step else "was not saved"
    with Seam(fail), pytest.raises(CheckpointWriteError, match=said):
        run.save(2, 0.4)
    assert (run.path / "registry.json").read_bytes() == before
    assert asyncckpt.verify(run.file(1)).ok
    assert list(run.path.glob("*step00000002*")) == ([run.file(2)] if is_last_step else [])
    assert not any(is_temporary_name(path.name) for path in run.path.iterdir())
    run.save(3, 0.6)
    assert run.steps() == ([2, 3] if is_last_step else [1, 3])
    run.assert_in_order()


def test_a_fault_at_every_call(run: Run) -> None:
    """Whatever fails during a save with retention and a change of the best: the directory is in order after the next
    opening, and holds what was acknowledged or something newer."""
    run.save(1, 0.9)
    run.save(2, 0.8)
    with Seam() as seam:
        run.save(3, 0.7)
    for number in range(len(seam.calls) + 5):
        newest = 10 + 2 * number
        fault = Fault(number, errno.EIO, sticky=False)
        acknowledged = True
        with Seam(fault):
            try:
                run.save(newest, 1 / newest)
            except CheckpointWriteError:
                acknowledged = False
        run.restart()
        run.assert_in_order()
        assert run.steps()[-1] == newest or not acknowledged, fault.hit
        run.save(newest + 1, 1 / (newest + 1))
        run.assert_in_order()


def test_a_denied_delete_fails_no_save(run: Run) -> None:
    """It is tried again after the next one."""
    run.save(1, 0.5)
    run.save(2, 0.4)

    def deny(call: Call) -> None:
        if call.name == "unlink" and call.path.endswith(".pt"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with Seam(deny):
        run.save(3, 0.3)
    assert run.file(1).exists()
    assert run.steps() == [2, 3]
    run.save(4, 0.2)
    run.assert_in_order()


def test_what_can_not_be_looked_at_is_not_deleted(run: Run) -> None:
    """It may be somebody else's by now. Once it can be, it is."""
    run.save(1, 0.5)
    run.save(2, 0.4)
    dropped = run.file(1)

    def fail(call: Call) -> None:
        if call.name == "open_file" and call.path == str(dropped):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with Seam(fail) as seam:
        run.save(3, 0.3)
    assert not [call for call in seam.named("unlink") if call.path == str(dropped)]
    assert dropped.exists()
    assert run.steps() == [2, 3]
    run.save(4, 0.2)
    run.assert_in_order()


def test_a_commit_whose_last_sync_failed(run: Run) -> None:
    """The file is there, and would be nobody's: the next save lists it."""
    run.save(1, 0.5)
    renamed: list[str] = []

    def fail(call: Call) -> None:
        if call.name == "rename" and "step00000002" in str(call.args[1]):
            renamed.append(str(call.args[1]))
        if renamed and call.name == "fsync" and call.path == str(run.path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Seam(fail), pytest.raises(CheckpointWriteError):
        run.save(2, 0.4)
    assert renamed
    run.save(3, 0.6)
    assert run.steps() == [2, 3]
    run.assert_in_order()


def test_prune_leaves_alone_what_is_committed_meanwhile(run: Run) -> None:
    """A name whose old checkpoint is pruned is committed again at that very moment: the new file stays."""
    for step in (1, 2, 3):
        run.save(step, 0.1 * step)
    pruner: list[threading.Thread] = []
    pruned = threading.Event()

    def prune() -> None:
        run.directory.prune(KeepLast(1))
        pruned.set()

    def prune_after_rename(call: Call) -> None:
        is_registry = call.name == "rename" and str(call.args[1]).endswith("registry.json")
        if is_registry and not pruner:  # the checkpoint is renamed, the registry not yet
            pruner.append(threading.Thread(target=prune))
            pruner[0].start()
            assert not pruned.wait(0.2), "prune did not wait for the commit"

    with Seam(prune_after_rename):
        run.save(2, 0.2)
    pruner[0].join(60)
    assert run.steps() == [1, 2]
    run.assert_in_order()


def test_a_prune_that_failed_is_not_done_later(run: Run) -> None:
    for step in (1, 2, 3):
        run.save(step, 0.1 * step)

    def fail(call: Call) -> None:
        if on_registry("rename")(call):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = run.contents()
    with Seam(fail), pytest.raises(CheckpointWriteError, match="was not pruned: Input/output error"):
        run.directory.prune(KeepLast(1))
    assert run.contents() == before
    assert run.steps() == [1, 2, 3]


def test_pruning_a_full_disk(tmp_path: Path) -> None:
    """Room is made first where the registry could not be written otherwise."""
    with small_file_system(tmp_path / "mounted", "size=1m") as place:
        run = Run(place / "run", num_kept=9)
        for step in (1, 2, 3):
            run.save(step, 0.1 * step)
        filler = os.open(place / "filler", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(filler, bytes(4096))
        os.close(filler)
        assert [info.global_step for info in run.directory.prune(KeepLast(1))] == [2]
        assert run.steps() == [1, 3]
        run.assert_in_order()
        run.saver.close(60)
        run.directory.close()


def test_pruning_a_full_disk_keeps_what_is_durable(run: Run) -> None:
    """While the newest checkpoint is not known to be durable, no room is made by deleting the ones before it."""
    run.save(1, 0.5)
    run.save(2, 0.6)

    def fail(call: Call) -> None:
        if call.name == "fsync" and call.path == str(run.path) and renamed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if call.name == "rename":
            renamed.append(call)

    renamed: list[Call] = []
    with Seam(fail):
        for _ in range(2):
            with pytest.raises(CheckpointWriteError):
                run.save(3, 0.4)
        before = {path.name for path in run.path.glob("checkpoint_*")}
        with pytest.raises(CheckpointWriteError, match="was not pruned"):
            run.directory.prune(KeepLast(1))
    assert {path.name for path in run.path.glob("checkpoint_*")} == before
    assert len(before) == 3
    run.directory.prune(KeepLast(1))
    assert run.steps() == [3]
    run.assert_in_order()


def test_another_runs_file_under_a_listed_name(run: Run, tmp_path: Path) -> None:
    """Copied over ours: it is not ours to prune, nor to overwrite."""
    other = Run(tmp_path / "other")
    other.save(1, 0.5)
    run.save(1, 0.5)
    theirs = other.file(1).read_bytes()
    os.replace(shutil.copy(other.file(1), run.path / "copy"), run.file(1))
    run.restart()
    assert run.steps() == []
    for step in (1, 2, 3, 4):
        run.save(step, 0.6)
    assert (run.path / other.file(1).name).read_bytes() == theirs
    other.saver.close(60)
    other.directory.close()


@pytest.mark.parametrize("kind", ["a file", "a link", "another run's", "torch.save's"])
def test_somebody_elses_best_model(run: Run, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Is not overwritten; what is not to be the best is saved all the same."""
    theirs = run.path / BEST_NAME
    run.path.mkdir()
    if kind == "a file":
        theirs.write_bytes(b"mine")
    elif kind == "a link":
        (tmp_path / "model.pt").write_bytes(b"mine")
        theirs.symlink_to(tmp_path / "model.pt")
    elif kind == "torch.save's":
        torch.save({"mine": TENSOR}, theirs)
    else:
        asyncckpt.save({"mine": TENSOR}, theirs).result(60)
    before = theirs.read_bytes(), theirs.is_symlink()
    run.save(1)
    assert "the first best checkpoint will fail" in caplog.text
    with pytest.raises(CheckpointWriteError, match=r"best_model.pt is another file, not of this run: .* move it away"):
        run.save(2, 0.5)
    assert (theirs.read_bytes(), theirs.is_symlink()) == before
    assert run.steps() == [1, 2]
    run.directory.close()
    with pytest.raises(CheckpointWriteError, match=r"best_model\.pt is another file"):
        run.directory.open_for_writing()
    theirs.rename(tmp_path / "away")
    run.restart()
    assert run.best_step() == 2
    run.save(3, 0.4)
    run.assert_in_order()


def test_a_torn_best_link_is_renewed(run: Run) -> None:
    """As a copy may be, where the file system knows no links."""
    run.save(1, 0.5)
    content = (run.path / BEST_NAME).read_bytes()
    (run.path / BEST_NAME).unlink()
    (run.path / BEST_NAME).write_bytes(content[: len(content) // 2])
    run.restart()
    run.assert_in_order()


def script() -> bytes:
    """A model as TorchScript has it: a zip archive of torch's that no checkpoint is."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)), buffer)
    return buffer.getvalue()


def archive(compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", bytes(1000))
    return buffer.getvalue()


def state() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(10)}, buffer)
    return buffer.getvalue()


STRANGE_FILES: dict[str, Callable[[], bytes]] = {
    "TorchScript": script,
    "a state": state,
    "compressed": lambda: archive(zipfile.ZIP_DEFLATED),
    "stored": lambda: archive(zipfile.ZIP_STORED),
    "numbers": lambda: bytes(8) + b"1234567890",
    "text": lambda: b"best model",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", STRANGE_FILES)
def test_somebody_elses_file_is_not_taken_for_a_damaged_one(run: Run, kind: str) -> None:
    """It stays, and the save says so."""
    content = STRANGE_FILES[kind]()
    run.path.mkdir()
    (run.path / BEST_NAME).write_bytes(content)
    with pytest.raises(CheckpointWriteError, match="is another file, not of this run"):
        run.save(1, 0.5)
    assert (run.path / BEST_NAME).read_bytes() == content


def test_while_the_best_link_is_somebody_elses(run: Run) -> None:
    """Every save says so, though it is listed; what it replaces is deleted all the same."""
    run.path.mkdir()
    (run.path / BEST_NAME).write_bytes(b"best model")
    for step in (1, 2, 3):
        with pytest.raises(CheckpointWriteError, match="is saved and listed, but the link"):
            run.save(step, 1 / step)
    assert len(list(run.path.glob("checkpoint_*"))) == run.num_kept
    (run.path / BEST_NAME).unlink()
    run.restart()
    run.assert_in_order()


def test_a_best_link_with_one_bad_bit_is_still_the_runs(run: Run) -> None:
    """Wherever that is: also where the file says whose it is. The next best one replaces it, if no restart does."""
    run.save(1, 0.5)
    link = run.path / BEST_NAME
    whole = link.read_bytes()
    for at in range(0, len(whole), 5):
        link.unlink()
        link.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        run.restart()
    run.save(2, 0.4)
    run.assert_in_order()


@pytest.mark.parametrize("kind", ["directory", "link", "pipe"])
def test_a_name_that_is_taken_by_something_else(run: Run, tmp_path: Path, kind: str) -> None:
    """It stays, and the checkpoint gets another name."""
    path = run.path / checkpoint_name(1, 5, {"loss": 0.5})
    run.path.mkdir()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere.pt")
    before = os.lstat(path)
    saved = run.save(5, 0.5)
    assert saved.filepath.name == path.name.replace(".pt", "_2.pt")
    assert os.lstat(path).st_ino == before.st_ino


def test_numbers_are_given_once_whatever_signals_come(run: Run) -> None:
    """A handler's save within another one's numbering gets a number of its own."""
    run.save(1, 0.5)
    info = CheckpointInfo(Path("x.pt"), epoch=1, global_step=1)
    numbers: list[int | None] = []

    def trace(frame: object, event: str, argument: object) -> object:
        if event == "line" and len(numbers) < 3:
            sys.settrace(None)
            numbers.append(run.directory.reserve(info).info.sequence)
            sys.settrace(trace)  # type: ignore[arg-type]
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    outer = run.directory.reserve(info).info.sequence
    sys.settrace(None)
    assert numbers
    assert len({outer, *numbers}) == 1 + len(numbers)


def test_damaged_checkpoints_take_nobodys_place(run: Run) -> None:
    """Known to be damaged, a checkpoint is not the best, nor kept in place of a whole one."""
    first = run.save(1, 0.5)
    second = run.save(2, 0.4)
    damage(run.file(2))
    run.directory.note_damaged(second)
    assert run.best_step() == 1
    run.save(3, 0.6)
    assert run.steps() == [1, 2, 3]
    assert (run.path / "best_model.pt").read_bytes() == first.filepath.read_bytes()
    run.save(4, 0.7)
    run.save(5, 0.8)
    assert run.steps() == [1, 2, 4, 5], "the best, the damaged one that is newer, and the newest two"


def test_a_damaged_registry_without_files_is_set_aside_once(run: Run) -> None:
    run.path.mkdir()
    (run.path / "registry.json").write_bytes(b"{nonsense")
    for _ in range(3):
        run.restart()
    assert len(list(run.path.glob("registry.damaged-*"))) == 1


def test_a_file_that_can_not_be_read_now(run: Run) -> None:
    """Committed but not recorded, and the disk fails just when it is looked at: it is taken in all the same."""
    run.save(1, 0.5)
    registry = (run.path / "registry.json").read_bytes()
    run.save(2, 0.4)
    run.directory.close()
    (run.path / "registry.json").write_bytes(registry)

    def fail(call: Call) -> None:
        is_verifying = threading.current_thread() is not threading.main_thread()
        if call.name == "pread_into" and "step00000002" in call.path and is_verifying:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    run.directory = run.reopened()
    with Seam(fail):
        run.directory.open_for_writing()
    assert run.steps() == [1, 2]
    run.save(3, 0.6)
    assert run.steps() == [2, 3]


def test_a_writer_commits_while_a_reader_looks(run: Run) -> None:
    """Between the look at the registry and the look at the files: nothing seems to be gone."""
    run.num_kept = 1
    run.directory = run.reopened()
    run.save(1, 0.9)
    done: list[int] = []

    def commit_first(call: Call) -> None:
        if call.name == "list_directory" and not done:
            done.append(1)
            run.save(2, 0.8)

    reader = run.reopened()
    with Seam(commit_first):
        assert [info.global_step for info in reader.registry.checkpoints] == [2]
