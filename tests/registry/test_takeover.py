"""Writers on storage without locks: one that was taken for dead, and is not, changes nothing of what comes after it."""

from __future__ import annotations

import io
import itertools
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from storage.s3_server import S3Server

from asyncckpt import AsyncCheckpointSaver, CheckpointError, CheckpointInfo, CheckpointWriteError, KeepLast
from asyncckpt.naming import ALIVE_NAME, BEST_NAME, REGISTRY_NAME, checkpoint_name, is_temporary_name
from asyncckpt.registry.backlog import Mirrored
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.files import NameTakenError
from asyncckpt.registry.recovery import survey
from asyncckpt.registry.replication import Replica
from asyncckpt.storage.base import ConflictError, Storage, Upload
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.s3 import S3Storage

BUCKET = "takeover"
LARGE = 17 << 20  # in parts
SECONDS = itertools.count()
Act = Callable[[], object]


class Sleeper(S3Storage):
    """The storage of a writer that can fall asleep: then it shows no life, and looks at nobody else's."""

    is_asleep = False

    def replace(self, path: str, contents: bytes, *, expected: str | None = None) -> str:
        if self.is_asleep and path.endswith(ALIVE_NAME):
            raise OSError("asleep")
        return super().replace(path, contents, expected=expected)


class Writer:
    """A directory's writer, who saves checkpoints one by one."""

    def __init__(self, storage: Storage, url: str, scratch: Path) -> None:
        self.url, self.storage, self.scratch = url, storage, scratch
        self.saver = AsyncCheckpointSaver()
        self.directory = CheckpointDirectory(
            url, storage, retention=KeepLast(9), metric="val_loss", mode="min", lock_timeout_secs=0.2
        )
        self.directory.open_for_writing()

    def begin(self, step: int, loss: float | None = None, value: float | None = None, num_bytes: int = 0) -> Act:
        """Send all of a checkpoint; what is returned commits and lists it."""
        name = Path(checkpoint_name(1, step, {"loss": loss}))
        info = CheckpointInfo(name, 1, step, val_loss=loss, timestamp=f"2026-01-01T00:00:{next(SECONDS) % 60:02}+00:00")
        listing = self.directory.reserve(info)
        name = listing.info.filepath
        state = {"value": step if value is None else value, "rest": torch.zeros(num_bytes, dtype=torch.uint8)}
        described = self.directory.describe(listing.info)
        self.saver.save(state, self.scratch / name, metadata=described).result(60)
        contents = (self.scratch / name).read_bytes()
        listing = replace(listing, info=replace(listing.info, num_bytes=len(contents)))
        path = self.directory.path_of(str(name))
        upload = self.storage.begin(path, len(contents), expected=self.directory.replaceable(str(name)))
        for offset in range(0, len(contents), upload.piece_bytes):
            upload.write(offset, memoryview(contents)[offset : offset + upload.piece_bytes])

        def finish() -> None:
            try:
                self.directory.record(listing, upload.commit)
                upload.close()
            finally:
                upload.abort()

        return finish

    def save(self, step: int, loss: float | None = None, value: float | None = None) -> None:
        self.begin(step, loss, value)()

    @property
    def steps(self) -> list[int | None]:
        """As anybody finds them."""
        return [info.global_step for info in survey(self.storage, self.url).registry.checkpoints]

    def value_in(self, name: str) -> float:
        return float(
            torch.load(io.BytesIO(self.storage.read(f"{self.url}/{name}", 1 << 30)), weights_only=True)["value"]
        )

    def close(self) -> None:
        self.directory.close()
        self.saver.close()


@pytest.fixture
def url(server: S3Server) -> str:
    if not server.client().exists(BUCKET):
        server.client().mkdir(BUCKET)
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


@pytest.fixture
def start(server: S3Server, url: str, tmp_path: Path) -> Iterator[Callable[[], Writer]]:
    """Writers of one directory, each as in a process of its own."""
    writers: list[Writer] = []

    def start() -> Writer:
        storage = Sleeper(server.options, beat_secs=0.1, lease_secs=1.0)
        writers.append(Writer(storage, url, tmp_path))
        return writers[-1]

    yield start
    for writer in writers:
        writer.close()


def sleep(writer: Writer) -> None:
    assert isinstance(writer.storage, Sleeper)
    writer.storage.is_asleep = True


@pytest.mark.parametrize("num_bytes", [0, LARGE])
@pytest.mark.parametrize("is_begun_before", [False, True], ids=["begun after it", "begun before the takeover"])
def test_its_late_commit_replaces_nothing(
    start: Callable[[], Writer], url: str, is_begun_before: bool, num_bytes: int
) -> None:
    """The successor's checkpoint of the same name, acknowledged, stays what it is."""
    old = start()
    old.save(1)
    finish = old.begin(2, value=-2.0, num_bytes=num_bytes) if is_begun_before else None
    sleep(old)
    new = start()
    new.save(2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises((CheckpointWriteError, ConflictError)):
        if finish is None:
            old.begin(2, value=-2.0, num_bytes=num_bytes)
        else:
            patch.setattr(type(old.directory._lock), "is_taken_over", lambda lock: False)  # it looked just before
            finish()
    assert new.value_in(checkpoint_name(1, 2, {})) == 2.0
    new.save(3)
    assert new.steps == [1, 2, 3]


def test_the_successor_is_the_one_that_goes_on(start: Callable[[], Writer]) -> None:
    """Also when the old one wakes before the new one has saved anything: the registry has changed under it."""
    old = start()
    old.save(1)
    finish = old.begin(2)
    sleep(old)
    new = start()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConflictError):
        patch.setattr(type(old.directory._lock), "is_taken_over", lambda lock: False)  # it looked just before
        finish()
    for step in (3, 4):
        new.save(step)
    assert new.steps == [1, 3, 4]


def test_its_late_best_link_is_put_right(start: Callable[[], Writer]) -> None:
    """With the next checkpoint, though that is not the best one."""
    old = start()
    old.save(1, loss=0.9)
    sleep(old)
    new = start()
    new.save(2, loss=0.1)
    old.storage.link(old.directory.path_of(checkpoint_name(1, 1, {"loss": 0.9})), old.directory.path_of(BEST_NAME))
    assert new.value_in(BEST_NAME) == 1.0
    new.save(3, loss=0.5)
    assert new.value_in(BEST_NAME) == 2.0


@pytest.mark.parametrize("change", ["removed", "an own write that arrived late"])
def test_a_registry_that_is_not_the_last_one_written(start: Callable[[], Writer], change: str) -> None:
    """Nobody else may have written it: so it is written again, and no save fails."""
    writer = start()
    writer.save(1)
    path = f"{writer.url}/{REGISTRY_NAME}"
    if change == "removed":
        writer.storage.delete([path])
    else:
        writer.storage.replace(path, writer.storage.read(path, 1 << 20) + b"\n")
    writer.save(2)
    assert writer.steps == [1, 2]
    writer.storage.delete([path])
    writer.directory.pin(1)
    writer.directory.prune(KeepLast(1))
    assert writer.steps == [1, 2]


def test_another_ones_registry_is_left_alone(start: Callable[[], Writer]) -> None:
    """Written by who has no claim: the save fails, and what is there stays."""
    writer = start()
    writer.save(1)
    path = f"{writer.url}/{REGISTRY_NAME}"
    text = writer.storage.read(path, 1 << 20)
    claim = writer.directory.own_registry.claim.encode()
    assert claim in text
    writer.storage.replace(path, text.replace(claim, b"0123456789abcdef"))
    with pytest.raises(ConflictError, match="another writer"):
        writer.save(2)
    assert writer.storage.read(path, 1 << 20).count(b"0123456789abcdef") == 1


def test_a_strangers_file_that_came_later_is_left_alone(start: Callable[[], Writer]) -> None:
    """Nobody looks at the names on storage far away, but before a commit."""
    writer = start()
    name = checkpoint_name(1, 1, {})
    writer.storage.replace(f"{writer.url}/{name}", b"somebody's own")
    with pytest.raises(NameTakenError, match="not of this run"):
        writer.save(1)
    assert writer.storage.read(f"{writer.url}/{name}", 100) == b"somebody's own"


def test_what_others_send_is_not_swept(start: Callable[[], Writer], server: S3Server, url: str) -> None:
    """A saver that has no claim, and lives; only what an earlier writer of the directory has left is."""
    old = start()
    old.begin(1, num_bytes=LARGE)
    sleep(old)
    others = S3Storage(server.options)
    # As in another process: there nobody has a claim to the directory.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asyncckpt.storage.claim._beating", set())
        export: Upload = others.begin(f"{url}/export.pt", LARGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asyncckpt.storage.s3._alive", set())
        new = start()
    left = [name for name in others.list_names(url) if is_temporary_name(name)]
    assert [name.endswith("export.pt.tmp") for name in left] == [True]
    for offset in range(0, LARGE, export.piece_bytes):
        export.write(offset, memoryview(bytes(min(export.piece_bytes, LARGE - offset))))
    export.commit()
    export.close()
    with others.open(f"{url}/export.pt") as reader:
        assert reader.num_bytes == LARGE
    new.save(2)


def test_a_commit_that_is_in_doubt_is_cleaned_up(start: Callable[[], Writer], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has failed, and the store does not say whether the file is there: if it is, it is deleted with the next."""
    writer = start()
    writer.save(1)
    finish = writer.begin(2)
    assert isinstance(writer.storage, S3Storage)
    requests = writer.storage.requests
    with monkeypatch.context() as patch:
        commit = requests.send

        def lose(operation: str, bucket: str, **arguments: Any) -> Any:
            if str(arguments.get("Key")).endswith(checkpoint_name(1, 2, {})):
                if operation == "put_object":
                    commit(operation, bucket, **arguments)
                raise OSError("no answer")
            return commit(operation, bucket, **arguments)

        patch.setattr(requests, "send", lose)
        with pytest.raises(OSError, match="no answer"):
            finish()
    assert checkpoint_name(1, 2, {}) in writer.storage.list_names(writer.url)
    writer.save(3)
    writer.directory.delete_pending()
    assert checkpoint_name(1, 2, {}) not in writer.storage.list_names(writer.url)
    assert writer.steps == [1, 3]


class TestReplica:
    """A replica's own directory: what is there already, and what is not this trainer's."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Iterator[Writer]:
        (tmp_path / "scratch").mkdir()
        writer = Writer(LocalStorage(), str(tmp_path / "source"), tmp_path / "scratch")
        yield writer
        writer.close()

    @pytest.fixture
    def target(self, tmp_path: Path) -> Iterator[CheckpointDirectory]:
        directory = CheckpointDirectory(str(tmp_path / "mirror"), LocalStorage(), retention=KeepLast(9))
        yield directory
        directory.close()

    @staticmethod
    def catch_up(replica: Replica) -> list[int | None]:
        copied = [replica.copy(info) for info in replica.look(without=()).wanted]
        return [info.global_step for info in copied if info is not None]

    def test_somebodys_file_is_left_alone(self, source: Writer, target: CheckpointDirectory) -> None:
        theirs = Path(target.path) / checkpoint_name(1, 1, {})
        theirs.parent.mkdir()
        theirs.write_bytes(b"somebody's own")
        source.save(1)
        replica = Replica(source.directory, target)
        with pytest.raises(NameTakenError):
            self.catch_up(replica)
        assert theirs.read_bytes() == b"somebody's own"

    def test_a_pinned_one_is_left_alone(self, source: Writer, target: CheckpointDirectory) -> None:
        """Saved again under the same name."""
        replica = Replica(source.directory, target)
        source.save(1)
        assert self.catch_up(replica) == [1]
        target.pin(1)
        before = (Path(target.path) / checkpoint_name(1, 1, {})).read_bytes()
        source.save(1, value=-1.0)
        with pytest.raises(NameTakenError, match="pinned"):
            self.catch_up(replica)
        assert (Path(target.path) / checkpoint_name(1, 1, {})).read_bytes() == before

    def test_pins_are_added_up(self, source: Writer, target: CheckpointDirectory) -> None:
        """What was pinned in the replica stays so; what was pinned in the source is as long as it is there."""
        replica = Replica(source.directory, target)
        for step in (1, 2, 3):
            source.save(step)
        source.directory.pin(1)
        self.catch_up(replica)
        target.pin(2)
        self.catch_up(replica)
        assert [info.pinned for info in target.own_registry.checkpoints] == [True, True, False]
        source.directory.unpin(1)
        self.catch_up(replica)
        assert [info.pinned for info in target.own_registry.checkpoints] == [False, True, False]

    def test_one_that_was_unpinned_and_dropped(self, source: Writer, target: CheckpointDirectory) -> None:
        """In the source, before anybody looked: in the replica it is pinned no more. One that is only gone is."""
        replica = Replica(source.directory, target)
        for step in (1, 2, 3):
            source.save(step)
        source.directory.pin(1)
        source.directory.pin(2)
        self.catch_up(replica)
        source.directory.unpin(1)
        source.directory.prune(KeepLast(1))
        source.save(4)
        self.catch_up(replica)
        assert [info.pinned for info in target.own_registry.checkpoints] == [True, True, False, False]
        replica.look(unpinned=[1])
        assert [info.pinned for info in target.own_registry.checkpoints] == [False, True, False, False]
        source.storage.delete([source.directory.path_of(checkpoint_name(1, 2, {}))])
        replica = Replica(source.directory, target)
        self.catch_up(replica)
        assert [info.pinned for info in target.own_registry.checkpoints] == [False, True, False, False]
        target.unpin(2)
        target.prune(KeepLast(1))
        self.catch_up(replica)
        assert not target.own_registry.followed_pins  # of what is there no more nothing is remembered

    def test_a_crash_while_an_older_one_arrives(
        self, source: Writer, target: CheckpointDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The newest was there before. What was committed, and is not listed, does not stay as nobody's file."""
        for step in (1, 2):
            source.save(step)
        replica = Replica(source.directory, target)
        older, newest = replica.look(without=()).wanted
        replica.copy(newest)
        with refusing_registries(target, monkeypatch, num_taken=1), pytest.raises(OSError, match="not now"):
            replica.copy(older)
        assert (Path(target.path) / older.filepath).exists()
        target.close()
        found = survey(target.storage, target.path)
        assert [info.global_step for info in found.registry.checkpoints] == [2]
        assert not found.strangers
        target.open_for_writing()
        assert not (Path(target.path) / older.filepath).exists()
        assert self.catch_up(replica) == [1]
        assert [info.global_step for info in target.own_registry.checkpoints] == [1, 2]

    @pytest.mark.parametrize("swapped", ["another run's", "empty"])
    def test_the_source_is_swapped(
        self, source: Writer, target: CheckpointDirectory, swapped: str, tmp_path: Path
    ) -> None:
        """Under the replica, which brings nothing of another run there, and does not say that all is there."""
        replica = Replica(source.directory, target)
        source.save(1)
        self.catch_up(replica)
        source.save(2)
        (left,) = replica.look().wanted
        Path(source.directory.path).rename(tmp_path / "moved")
        if swapped != "empty":
            other = Writer(LocalStorage(), str(tmp_path / "other"), tmp_path / "scratch")
            for step in (1, 2, 3):
                other.save(step)
            other.close()
            (tmp_path / "other").rename(source.directory.path)
        with pytest.raises(CheckpointError, match="holds another run's" if swapped != "empty" else "holds nothing of"):
            replica.look()
        assert replica.copy(left) is None
        assert [info.global_step for info in target.own_registry.checkpoints] == [1]

    def test_a_pinned_one_that_was_saved_again(self, source: Writer, target: CheckpointDirectory) -> None:
        """Once it was unpinned, while no replica looked: the later one takes its place there too."""
        replica = Replica(source.directory, target)
        source.save(1)
        source.directory.pin(1)
        self.catch_up(replica)
        source.directory.unpin(1)
        source.save(1, value=-1.0)
        assert self.catch_up(Replica(source.directory, target)) == [1]
        assert [(info.sequence, info.pinned) for info in target.own_registry.checkpoints] == [(2, False)]

    @pytest.mark.parametrize("step", [2, 20], ids=["the same step", "another step"])
    def test_another_trainers_numbers(
        self, source: Writer, target: CheckpointDirectory, step: int, tmp_path: Path
    ) -> None:
        """Both went on from the same checkpoint: nothing is taken for mirrored that is not."""
        replica = Replica(source.directory, target)
        source.save(1)
        self.catch_up(replica)
        other = Writer(LocalStorage(), str(tmp_path / "other"), tmp_path / "scratch")
        other.directory.close()
        other.directory.continue_run(target.own_registry.run_id, 1)
        other.directory.open_for_writing()
        other.save(step)
        source.save(2)
        self.catch_up(replica)
        target.close()
        with pytest.raises(CheckpointError, match="another trainer went on"):
            self.catch_up(Replica(other.directory, target))
        other.close()

    @pytest.mark.parametrize(("last", "numbers"), [(7, [1, 8, 9]), (2, [1, 3, 4]), (1, [1, 2, 3])])
    def test_an_old_directory_that_came_back(
        self, source: Writer, target: CheckpointDirectory, last: int, numbers: list[int]
    ) -> None:
        """Once it is known how far the mirror is, no number is given twice."""
        replica = Replica(source.directory, target)
        source.save(1)
        source.directory.mirrored = Mirrored(last)
        source.save(2)
        source.save(3)
        assert [info.sequence for info in source.directory.own_registry.checkpoints] == numbers
        assert self.catch_up(replica) == [1, 2, 3]

    def test_a_registry_that_could_not_be_written(
        self, source: Writer, target: CheckpointDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Is written before anything counts as mirrored; and the checkpoint is found to be there."""
        source.save(1)
        storage = LocalStorage()
        replica = Replica(source.directory, target)
        with refusing_registries(target, monkeypatch, num_taken=0), pytest.raises(OSError, match="not now"):
            self.catch_up(replica)
        assert survey(storage, target.path).recorded is None
        assert self.catch_up(replica) == []
        recorded = survey(storage, target.path).recorded
        assert recorded is not None
        assert [info.global_step for info in recorded.checkpoints] == [1]
        (found,) = replica.look(without=()).there
        assert replica.locate(found).filepath == Path(target.path) / checkpoint_name(1, 1, {})


@contextmanager
def refusing_registries(
    directory: CheckpointDirectory, monkeypatch: pytest.MonkeyPatch, num_taken: int
) -> Iterator[None]:
    """After so many, no registry gets its name."""
    begin = directory.storage.begin
    taken = itertools.count(1)

    def refuse() -> None:
        raise OSError("not now")

    def begin_in_vain(path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
        upload = begin(path, num_bytes, expected=expected)
        if path.endswith(REGISTRY_NAME) and next(taken) > num_taken:
            monkeypatch.setattr(upload, "commit", refuse)
        return upload

    with monkeypatch.context() as patch:
        patch.setattr(directory.storage, "begin", begin_in_vain)
        yield


def test_what_waits_for_the_mirror_is_kept_up_to_the_backlog(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest of it, without a gap; what is dropped is told of once."""
    writer = Writer(LocalStorage(), str(tmp_path / "run"), tmp_path)
    writer.directory.retention, writer.directory.mirrored = KeepLast(1), Mirrored()
    writer.save(1)
    writer.directory.mirror_backlog_bytes = 2 * writer.directory.own_registry.checkpoints[0].num_bytes
    for step in (2, 3, 4):
        writer.save(step)
    assert writer.steps == [3, 4]
    writer.begin(5, num_bytes=1 << 20)()
    assert writer.steps == [5]
    assert caplog.text.count("bytes wait for the mirror") == 4
    writer.close()


def test_pruning_what_waits_for_the_mirror(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond the backlog; it is told of as when saving drops it."""
    writer = Writer(LocalStorage(), str(tmp_path / "run"), tmp_path)
    for step in (1, 2, 3, 4):
        writer.save(step)
    writer.directory.mirrored = Mirrored(4, frozenset({1, 3}))
    writer.directory.prune(KeepLast(1))
    assert writer.steps == [4]
    told = [line for line in caplog.text.splitlines() if "dropped before it was mirrored" in line]
    assert [step for step in (1, 2, 3, 4) for line in told if checkpoint_name(1, step, {}) in line] == [1, 3]
    writer.close()


def test_a_full_disk_takes_from_what_waits_for_the_mirror(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Never from what retention keeps."""
    writer = Writer(LocalStorage(), str(tmp_path / "run"), tmp_path)
    writer.directory.retention = KeepLast(2)
    writer.directory.mirrored, writer.directory.mirror_backlog_bytes = Mirrored(), 1 << 40
    for step in range(1, 6):
        writer.save(step)
    assert writer.steps == [1, 2, 3, 4, 5]
    with caplog.at_level(logging.ERROR):
        assert writer.directory.make_room()
    assert writer.steps == [4, 5]
    assert caplog.text.count("dropped before it was mirrored: the disk is full") == 3
    assert not writer.directory.make_room()
    writer.close()
