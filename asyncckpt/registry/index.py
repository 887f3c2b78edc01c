"""The two files that say what a directory holds, in its writer's hands: `registry.json` and the best link. No torch."""

from __future__ import annotations

import errno
from typing import NamedTuple

from asyncckpt.errors import CheckpointWriteError
from asyncckpt.naming import BEST_NAME, REGISTRY_NAME
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.files import CheckpointFiles, NameTakenError
from asyncckpt.registry.recovery import read_registry
from asyncckpt.registry.registry import Registry, encode_registry
from asyncckpt.storage.base import ConflictError, Lock, Storage, Upload


class IndexState(NamedTuple):
    """What was written last: the versions of the two files ("" where storage has none), and what the link holds."""

    version: str = ""
    linked_best: int | None = None
    linked_version: str = ""


class Index:
    """Writes them, by whoever holds the directory's `lock`. For one thread at a time; all methods block, and raise
    OSError. Where storage has versions, nobody else's registry is overwritten.
    """

    def __init__(self, storage: Storage, path: str, files: CheckpointFiles) -> None:
        self._storage = storage
        self._directory = path
        self._files = files
        self._path, self._link_path = files.path_of(REGISTRY_NAME), files.path_of(BEST_NAME)
        self.state = IndexState()

    def look(self) -> None:
        """Whatever is there now is to be replaced."""
        version, linked_version = self._storage.version(self._path), self._storage.version(self._link_path)
        self.state = IndexState(version, None, linked_version)

    def note_link(self, sequence: int | None) -> None:
        """The link holds this checkpoint."""
        self.state = self.state._replace(linked_best=sequence)

    def begin(self, registry: Registry) -> Upload:
        """Write a registry, and sync it, for `commit`."""
        contents = encode_registry(registry)
        upload = self._storage.begin(self._path, len(contents), expected=self.state.version)
        try:
            upload.write(0, memoryview(contents))
            upload.sync()
        except BaseException:
            upload.abort()
            raise
        return upload

    def commit(self, upload: Upload, registry: Registry, lock: Lock | None) -> None:
        """Durable on return. Raises `ConflictError` when another writer has written it."""
        try:
            upload.commit()
            self.state = self.state._replace(version=upload.version)
            upload.close()
        except ConflictError:
            upload.abort()
            self._overwrite(registry, lock)

    def write(self, registry: Registry, lock: Lock | None) -> None:
        """Both in one act."""
        try:
            version = self._storage.replace(self._path, encode_registry(registry), expected=self.state.version)
            self.state = self.state._replace(version=version)
        except ConflictError:
            self._overwrite(registry, lock)

    def _overwrite(self, registry: Registry, lock: Lock | None) -> None:
        """The registry is not the one that we have written last. Nobody else may write it as long as we have the claim:
        it was removed, or a write of ours has arrived of which we had no answer.
        """
        version = self._storage.version(self._path)
        recorded, _ = read_registry(self._storage, self._directory)
        check_claim(lock, self._directory)
        if recorded is not None and recorded.claim != registry.claim:
            raise ConflictError(errno.EEXIST, "another writer has written it in the same moment")
        written = self._storage.replace(self._path, encode_registry(registry), expected=version)
        self.state = self.state._replace(version=written)

    def link_problem(self, run_id: str) -> str:
        """What keeps the link from being made; "" if nothing does, or that can't be seen."""
        try:
            self._files.check_link(run_id)
        except NameTakenError as error:
            return str(error)
        except OSError:
            pass
        return ""

    def link(self, best: CheckpointInfo, run_id: str) -> None:
        """Let the best link hold this checkpoint, if it does not; durable on return.

        Raises FileNotFoundError if the checkpoint's file is gone, and `LinkTakenError` if somebody else's file has the
        link's name.
        """
        if self._is_linked(best):
            return
        self._files.check_link(run_id)
        self._storage.link(self._files.path_of(str(best.filepath)), self._link_path)
        self.state = self.state._replace(
            linked_best=best.sequence, linked_version=self._storage.version(self._link_path)
        )

    def _is_linked(self, best: CheckpointInfo) -> bool:
        """Where files have versions it is looked up: a writer that was taken for dead may have renewed it since."""
        return best.sequence == self.state.linked_best and (
            not self.state.linked_version or self._storage.version(self._link_path) == self.state.linked_version
        )


def check_claim(lock: Lock | None, directory: str) -> None:
    """Raise `CheckpointWriteError` when the directory has another writer by now."""
    if lock is not None and lock.is_taken_over():
        raise CheckpointWriteError(
            f"{directory} was taken over by another writer, which took this one for dead: nothing is written there any "
            "more"
        )
