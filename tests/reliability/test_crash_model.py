"""The disk model loses what POSIX lets it lose, and keeps the rest; the recorder notes what really happened."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from asyncckpt.storage import system_calls
from asyncckpt.storage.local import LocalStorage
from reliability.crash.disk import ROOT, Disk, Enter, Grow, Move, Remove, Resize, Sync, Tree, Write
from reliability.crash.facts import Opened
from reliability.crash.invariant import Promise
from reliability.crash.recorder import recording
from reliability.crash.states import Step, crash_states

FILE, OTHER, DIRECTORY = 1, 2, 3
BLOCK = 4096

Contents = dict[str, bytes]


def left_by(*steps: Step, disk: Disk | None = None) -> list[Contents]:
    """What a crash may leave after these."""
    states = crash_states(disk or Disk(), [*steps, Opened()], random.Random(1))
    return [contents(state.tree) for state in states if state.num_facts == 1]


def contents(tree: Tree) -> Contents:
    return {path: content for path, _, content in tree.files}


def holding(**files: bytes) -> Disk:
    disk = Disk()
    for inode, (name, content) in enumerate(files.items(), FILE):
        disk.files[inode], disk.directories[ROOT][name] = content, inode
    return disk


def unordered(states: Iterable[Contents]) -> list[list[tuple[str, bytes]]]:
    return sorted(sorted(state.items()) for state in states)


NEW_FILE = (Enter(ROOT, "a", FILE), Grow(FILE, 3), Write(FILE, 0, b"new"))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((), [{}, {"a": b""}, {"a": b"\0\0\0"}, {"a": b"new"}]),
        ((Sync(FILE),), [{}, {"a": b"new"}]),
        ((Sync(ROOT),), [{"a": b""}, {"a": b"\0\0\0"}, {"a": b"new"}]),
        ((Sync(ROOT), Sync(FILE)), [{"a": b"new"}]),
        ((Sync(FILE, succeeded=False), Sync(FILE), Sync(ROOT)), [{"a": b""}, {"a": b"\0\0\0"}, {"a": b"new"}]),
    ],
    ids=["nothing synced", "the file", "the directory", "both", "the file, after a sync that failed"],
)
def test_a_new_file(steps: tuple[Step, ...], expected: list[Contents]) -> None:
    """Contents and name arrive each by itself, until they are synced."""
    assert unordered(left_by(*NEW_FILE, *steps)) == unordered(expected)


def test_a_rename_is_one_act() -> None:
    """The old file or the new one, never none; and once the directory is synced, the new one."""
    disk = holding(a=b"new", b=b"old")
    rename = Move(ROOT, "a", ROOT, "b", FILE)
    assert unordered(left_by(rename, disk=disk)) == unordered([{"a": b"new", "b": b"old"}, {"b": b"new"}])
    assert left_by(rename, Sync(ROOT), disk=disk) == [{"b": b"new"}]


def test_a_rename_across_directories_needs_both_synced() -> None:
    """Until then the file is where it was or where it went."""
    disk = holding(a=b"new")
    disk.directories[ROOT]["d"], disk.directories[DIRECTORY] = DIRECTORY, {}
    rename = Move(ROOT, "a", DIRECTORY, "b", FILE)
    both = unordered([{"a": b"new"}, {"d/b": b"new"}])
    assert unordered(left_by(rename, Sync(DIRECTORY), disk=disk)) == both
    assert unordered(left_by(rename, Sync(ROOT), disk=disk)) == both
    assert left_by(rename, Sync(ROOT), Sync(DIRECTORY), disk=disk) == [{"d/b": b"new"}]


def test_what_came_later_stays_later() -> None:
    """A durable change is not undone by an earlier one in the same place that arrives with the crash."""
    disk = holding(a=b"first", c=b"second")
    disk.directories[ROOT]["d"], disk.directories[DIRECTORY] = DIRECTORY, {}
    steps = (
        Move(ROOT, "a", DIRECTORY, "b", FILE),  # needs ROOT synced too
        Enter(DIRECTORY, "b", OTHER),
        Sync(DIRECTORY),
    )
    assert all(state["d/b"] == b"second" for state in left_by(*steps, disk=disk))


def test_a_directory_may_be_lost_with_all_in_it() -> None:
    """Its own entries are durable, its name in its parent is not."""
    made = (Enter(ROOT, "d", DIRECTORY, True), Enter(DIRECTORY, "a", FILE), Write(FILE, 0, b"x"), Sync(FILE))
    assert unordered(left_by(*made, Sync(DIRECTORY))) == unordered([{}, {"d/a": b"x"}])
    assert left_by(*made, Sync(DIRECTORY), Sync(ROOT)) == [{"d/a": b"x"}]


def test_a_write_of_several_blocks_tears() -> None:
    """Any block may be missing: what was there is there still, or zeros where the file grew."""
    write = Write(FILE, 0, b"1" * BLOCK + b"2" * BLOCK + b"3" * 10)
    found = [state["a"] for state in left_by(write, disk=holding(a=b"o" * BLOCK))]
    assert b"o" * BLOCK in found
    assert write.data in found
    assert write.data[:BLOCK] in found
    assert b"1" * BLOCK + bytes(BLOCK) + b"3" * 10 in found
    assert b"1" * BLOCK + bytes(BLOCK + 10) in found
    assert b"o" * BLOCK + write.data[BLOCK:] in found
    assert left_by(write, Sync(FILE), disk=holding(a=b"o" * BLOCK)) == [{"a": write.data}]


def test_truncated_and_unlinked() -> None:
    """Neither is durable by itself."""
    disk = holding(a=b"old")
    assert unordered(left_by(Resize(FILE, 1), disk=disk)) == unordered([{"a": b"old"}, {"a": b"o"}])
    assert unordered(left_by(Remove(ROOT, "a", FILE), disk=disk)) == unordered([{"a": b"old"}, {}])
    assert left_by(Remove(ROOT, "a", FILE), Sync(ROOT), disk=disk) == [{}]


def test_all_subsets_of_a_few_and_a_choice_of_many() -> None:
    """Of eight free changes all 256, of more at least none, all, and all but each one."""

    def created(count: int) -> list[Contents]:
        return left_by(*(Enter(ROOT, f"{index}", FILE + index) for index in range(count)))

    assert len(created(8)) == 256
    many = [set(state) for state in created(12)]
    everything = {f"{index}" for index in range(12)}
    assert set() in many
    assert everything in many
    assert all(everything - {name} in many and {name} in many for name in everything)
    assert len(many) < 200


def test_the_recorder_notes_a_commit(tmp_path: Path) -> None:
    """Create, reserve, write, sync, rename, sync, with the data, in this order; and so what a crash may leave."""
    (tmp_path / "file").write_bytes(b"old")
    with recording(tmp_path) as recorder:
        LocalStorage().replace(str(tmp_path / "file"), b"new")
    assert [type(step) for step in recorder.steps] == [Enter, Grow, Write, Sync, Move, Sync]
    states = crash_states(recorder.initial, recorder.steps, random.Random(1))
    found = {contents(state.tree)["file"] for state in states}
    assert found == {b"old", b"new"}


def test_renaming_onto_the_same_file_is_nothing(tmp_path: Path) -> None:
    """The kernel leaves both names, and so does the model."""
    (tmp_path / "a").write_bytes(b"x")
    with recording(tmp_path) as recorder:
        system_calls.link(str(tmp_path / "a"), str(tmp_path / "b"))
        system_calls.rename(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [type(step) for step in recorder.steps] == [Enter]


def test_the_recorder_sees_what_went_past_it(tmp_path: Path) -> None:
    """A change that was not noted would make every verdict worthless."""
    with pytest.raises(AssertionError, match="past the recorder"), recording(tmp_path):
        (tmp_path / "stray").touch()


def test_a_tree_can_be_written_and_read(tmp_path: Path) -> None:
    """Hard links stay links, and the digest tells them from copies."""
    disk = holding(a=b"x", b=b"x")
    linked = disk.copy()
    linked.directories[ROOT]["b"] = FILE
    assert linked.tree().digest() != disk.tree().digest()
    linked.tree().write(tmp_path)
    assert os.path.samefile(tmp_path / "a", tmp_path / "b")
    assert Disk.read(tmp_path).tree().digest() == linked.tree().digest()


def test_what_excuses_a_missing_checkpoint() -> None:
    """As many newer ones as retention keeps, a better one if it was the best, or one of the same name."""
    promise = Promise(losses={1: 1.0, 2: 2.0, 3: None}, limits=dict.fromkeys((1, 2, 3), 1))
    assert promise.is_excused(2, {1, 3})
    assert not promise.is_excused(2, {1})
    assert not promise.is_excused(1, {2, 3})  # it was the best
    assert not promise.is_excused(3, {1, 2})  # it was the newest
    assert promise.is_excused(1, {3}, {1: "same.pt", 3: "same.pt"})
