"""Links on the local file system: reflink, else hard link, else copy; each durable, none half done."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncckpt.naming import temporary_name
from asyncckpt.storage import links, system_calls
from asyncckpt.storage.local import LocalStorage
from storage.conformance import make_content
from storage.observe import names, no_descriptor_leaks
from storage.seam import FUNCTIONS, Call, Seam, assert_durable, describe_commit, raising

WAYS = ("clone", "hard link", "copy")
OLD = b"old"
CONTENT = make_content(100_001)


def copy_bytes(source: int, destination: int) -> None:
    """What a reflink looks like from outside."""
    os.pwrite(destination, os.pread(source, 1 << 30, 0), 0)


def only_way(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A file system that can do this much."""
    clone: Callable[..., Any] = raising(errno.EOPNOTSUPP, name="clone") if way != "clone" else copy_bytes
    monkeypatch.setattr(system_calls, "clone", clone)
    if way != "hard link":
        monkeypatch.setattr(system_calls, "link", raising(errno.EPERM, name="link"))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    only_way(monkeypatch, request.param)
    return str(request.param)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(CONTENT)
    (tmp_path / "destination").write_bytes(OLD)
    return tmp_path


def link(place: Path) -> None:
    LocalStorage().link(str(place / "source"), str(place / "destination"))


def assert_linked(place: Path, *, same_file: bool) -> None:
    assert names(place) == {"source", "destination"}
    assert (place / "source").read_bytes() == (place / "destination").read_bytes() == CONTENT
    assert os.path.samefile(place / "source", place / "destination") == same_file


def test_each_way(place: Path, way: str) -> None:
    """Only a hard link is the very same file."""
    with no_descriptor_leaks():
        link(place)
    assert_linked(place, same_file=way == "hard link")


RENAMED = ["rename TEMPORARY to destination"]
STEPS = {
    "clone": ["create TEMPORARY", "clone TEMPORARY", "fsync TEMPORARY", *RENAMED, "fsync ."],
    "hard link": ["create TEMPORARY", "unlink TEMPORARY", "link source", *RENAMED, "fsync ."],
    "copy": [
        *("create TEMPORARY", "unlink TEMPORARY", "fsync .."),
        *("create TEMPORARY", "pwrite TEMPORARY", "fsync TEMPORARY", *RENAMED, "fsync ."),
    ],
}


def test_every_step_is_durable_before_the_next(place: Path, way: str) -> None:
    """The bytes, where they are new; then the name; then its directory."""
    with Seam() as seam:
        link(place)
    assert describe_commit(seam.calls, place) == STEPS[way]
    assert_durable(seam.calls, str(place / "destination"))


@pytest.mark.parametrize("error", sorted(links._REFUSALS))
def test_what_a_file_system_may_refuse(place: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Each of these means "not this way": the next way is taken."""
    monkeypatch.setattr(system_calls, "clone", raising(error, name="clone"))
    link(place)
    assert_linked(place, same_file=True)
    monkeypatch.setattr(system_calls, "link", raising(error, name="link"))
    link(place)
    assert_linked(place, same_file=False)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("name", ["clone", "link"])
def test_other_errors_are_errors(place: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int) -> None:
    """A disk that fails is not asked in other ways; the old file stays, alone."""
    only_way(monkeypatch, {"clone": "clone", "link": "hard link"}[name])
    monkeypatch.setattr(system_calls, name, raising(error, name=name))
    with no_descriptor_leaks(), pytest.raises(OSError, match=os.strerror(error)) as raised:
        link(place)
    assert raised.value.errno == error
    assert (place / "destination").read_bytes() == OLD
    assert names(place) == {"source", "destination"}


def test_a_clone_that_cannot_be_synced_is_thrown_away(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the error: a hard link in its place would hide it."""
    only_way(monkeypatch, "clone")
    monkeypatch.setattr(system_calls, "fsync", raising(errno.EINVAL))
    with no_descriptor_leaks(), pytest.raises(OSError, match="Invalid argument"):
        link(place)
    assert (place / "destination").read_bytes() == OLD
    assert names(place) == {"source", "destination"}


def test_onto_a_link_of_the_same_file(place: Path, way: str) -> None:
    """There rename does nothing and keeps the temporary name, which must go; it counts as done, and is synced."""
    (place / "destination").unlink()
    os.link(place / "source", place / "destination")
    with Seam() as seam:
        link(place)
    assert_linked(place, same_file=way == "hard link")
    assert_durable(seam.calls, str(place / "destination"))


# --- sources and destinations ---


@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "pipe", "directory"])
def test_a_source_that_is_no_file(place: Path, way: str, kind: str) -> None:
    """An OSError at once; a link is not followed, whoever put it there."""
    (place / "source").unlink()
    if kind == "pipe":
        os.mkfifo(place / "source")
    elif kind == "directory":
        (place / "source").mkdir()
    else:
        (place / "source").symlink_to(place / ("destination" if kind == "symlink" else "missing"))
    with no_descriptor_leaks(), pytest.raises(OSError, match=r"symbolic links|not a regular file|directory"):
        link(place)
    assert (place / "destination").read_bytes() == OLD
    assert names(place) == {"source", "destination"}


@pytest.mark.parametrize("target", ["old", "missing"])
def test_a_symlink_is_replaced_not_followed(place: Path, way: str, target: str) -> None:
    """Whatever it points to stays as it was."""
    (place / "destination").rename(place / "old")
    (place / "destination").symlink_to(place / target)
    link(place)
    assert not (place / "destination").is_symlink()
    assert (place / "destination").read_bytes() == CONTENT
    assert (place / "old").read_bytes() == OLD
    assert names(place) == {"source", "destination", "old"}


def test_a_directory_at_the_destination(place: Path, way: str) -> None:
    """It is never replaced, and nothing is left beside it."""
    (place / "destination").unlink()
    (place / "destination").mkdir()
    with no_descriptor_leaks(), pytest.raises(IsADirectoryError):
        link(place)
    assert names(place) == {"source", "destination"}


def test_relative_paths(place: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bare names lie in the current directory."""
    monkeypatch.chdir(place)
    LocalStorage().link("source", "destination")
    assert_linked(place, same_file=way == "hard link")


# --- others who are about ---


def test_a_sweeper_before_the_rename(place: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file is under its writer's lock. A hard link's name is not: it may be taken, and another name is tried."""
    swept: list[list[str]] = []

    def rename(source: str, destination: str) -> None:
        if not swept:
            swept.append(LocalStorage().sweep(str(place)))
        FUNCTIONS["rename"](source, destination)

    monkeypatch.setattr(system_calls, "rename", rename)
    link(place)
    assert len(swept[0]) == (1 if way == "hard link" else 0)
    assert_linked(place, same_file=way == "hard link")


@pytest.mark.parametrize("when", ["link", "rename"])
def test_a_sweeper_that_is_always_there(place: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """No endless loop: in the end the bytes are copied, under a lock."""
    only_way(monkeypatch, "hard link")

    def call(source: str, destination: str) -> None:
        if when == "rename":
            LocalStorage().sweep(str(place))
        FUNCTIONS[when](source, destination)
        if when == "link":
            LocalStorage().sweep(str(place))

    monkeypatch.setattr(system_calls, when, call)
    link(place)
    assert_linked(place, same_file=False)


def test_what_a_killed_linker_leaves_is_swept(place: Path) -> None:
    """A second name of the source: it goes, and the source stays."""
    temporary = place / temporary_name("0" * 16, "destination")
    os.link(place / "source", temporary)
    assert LocalStorage().sweep(str(place)) == [str(temporary)]
    assert (place / "source").read_bytes() == CONTENT


@pytest.mark.parametrize("by", ["file", "symlink"])
def test_a_source_that_is_replaced_meanwhile(place: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """What was opened is what is linked, not what has taken its name since."""
    only_way(monkeypatch, "hard link")

    def link_too_late(source: str, destination: str) -> None:
        (place / "new").write_bytes(b"new")
        if by == "symlink":
            (place / "source").unlink()
            (place / "source").symlink_to(place / "new")
        else:
            (place / "new").rename(source)
        FUNCTIONS["link"](source, destination)

    monkeypatch.setattr(system_calls, "link", link_too_late)
    link(place)
    assert (place / "destination").read_bytes() == CONTENT
    assert not (place / "destination").is_symlink()
    assert (place / "source").read_bytes() == b"new"
    assert names(place) == {"source", "destination", "new"} - ({"new"} if by == "file" else set())


def test_a_directory_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening it and linking in it: FileNotFoundError, not a loop."""
    (tmp_path / "source").write_bytes(CONTENT)
    (tmp_path / "d").mkdir()

    def before(call: Call) -> None:
        if call.name == "link":
            (tmp_path / "d").rmdir()

    only_way(monkeypatch, "hard link")
    with no_descriptor_leaks(), Seam(before), pytest.raises(FileNotFoundError):
        LocalStorage().link(str(tmp_path / "source"), str(tmp_path / "d/destination"))
    assert names(tmp_path) == {"source"}
