"""Crash states whose newest checkpoint is damaged besides, by a bad disk: what recovery must not make worse."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from storage.mounts import memory_directory

from asyncckpt.naming import is_checkpoint_name
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.storage.local import LocalStorage
from reliability.crash.disk import Tree
from reliability.crash.exploring import verdicts
from reliability.crash.findings import Content, content_at
from reliability.crash.workloads import RUN, best_changes


def faults_after_damage(chance: random.Random) -> Iterator[list[str]]:
    """Of one run, in which each save replaces the one before: for each crash state, what opening it did wrong."""
    recorded = best_changes("clone", "hard link")(chance)
    with memory_directory() as base:
        for number, verdict in enumerate(verdicts(recorded, chance)):
            newest = verdict.findings.newest
            if newest is not None:
                path = base / str(number)
                path.mkdir()
                damaged(verdict.tree, f"{RUN}/{newest.name}", chance).write(path)
                yield list(_faults_of_opening(path / RUN, newest, verdict.findings.recorded))


def damaged(tree: Tree, path: str, chance: random.Random) -> Tree:
    """One bit of the file is flipped, under all its names."""
    (inode,) = {inode for other, inode, _ in tree.files if other == path}

    def flipped(content: bytes) -> bytes:
        at = chance.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    contents = {number: flipped(content) for _, number, content in tree.files if number == inode}
    files = ((other, number, contents.get(number, content)) for other, number, content in tree.files)
    return replace(tree, files=tuple(files))


def _faults_of_opening(path: Path, newest: Content, recorded: frozenset[int | None] | None) -> Iterator[str]:
    before = _whole(path)
    directory = CheckpointDirectory(str(path), LocalStorage(), metric="val_loss")
    directory.open_for_writing()
    listed = [str(info.filepath) for info in directory.registry.checkpoints]
    directory.close()
    if newest.name in listed and newest.sequence not in (recorded or ()):
        yield f"{newest.name} was taken in, though it is damaged"
    if before and not _whole(path):
        yield f"{sorted(before)} were deleted, and nothing that is whole is left"


def _whole(path: Path) -> Mapping[str, Content]:
    contents = {entry.name: content_at(entry) for entry in path.iterdir() if is_checkpoint_name(entry.name)}
    return {name: content for name, content in contents.items() if not content.problem}
